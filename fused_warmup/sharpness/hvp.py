"""Hessian-vector products of a loss closure, by finite differences of gradients or by double backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check
from .loss_evaluator import LossEvaluator
from .vectors import Direction, Product, dot

METHODS = ("difference", "autograd", "auto")


class Hessian:
    """Hessian of a loss at the parameters of a ``LossEvaluator``, in flat vectors of ``[n]``.

    ``"difference"`` takes the central difference of two gradients, which works wherever training does:
    fused attention, compiled models, custom operators. ``"autograd"`` differentiates twice and keeps the
    graph of one evaluation.

    The finite-difference step has the length ``2**-12 (1 + |params|)`` in parameter space, and ``2**-8``
    instead of ``2**-12`` where parameters or the forward pass have 16 bits. A smaller step would be accurate
    enough in float64, but for ReLU networks it averages over too few kinks and overestimated the sharpness by
    up to 2x.

    Args:
        evaluator: An entered ``LossEvaluator``.
        method: ``"difference"``, ``"autograd"``, or ``"auto"``: double backward, and differences from the
            first product on that raises because an operation has no second derivative.
        sign: -1 for the Hessian of minus the loss.
        stretch: Multiplies the step, a number or 0-dim tensor.

    Attributes:
        method: ``"difference"`` or ``"autograd"``, whichever computes products.
        is_exact: Whether ``"autograd"`` was asked for.
        products: Number of products so far.
    """

    def __init__(
        self,
        evaluator: LossEvaluator,
        method: str = "difference",
        sign: float = 1.0,
        stretch: Tensor | float = 1.0,
    ) -> None:
        self.evaluator, self.sign, self.stretch, self.products = evaluator, sign, stretch, 0
        asked = evaluator.shards.check_method(check.one_of(evaluator.owner, "method", method, METHODS))
        self.is_exact, self._may_fail = asked == "autograd", asked == "auto"
        self.method = "difference" if asked == "difference" else "autograd"
        self._params_norm = evaluator.shards.norm(evaluator.snapshot, evaluator.dtype)
        # with their graph, for double backward
        self._graph_gradients: Sequence[Tensor | None] = ()

    @property
    def in_16_bits(self) -> bool:
        """Whether parameters or the forward pass are rounded to 16 bits."""
        return self.evaluator.vectors.is_narrow or self.evaluator.autocast

    def gradient(self) -> list[Tensor | None]:
        """Return the gradients of the loss at the parameters, without ``sign``."""
        found = list(self._gradients(create_graph=False))
        self.evaluator.share(*found)
        return found

    def product(self, direction: Direction, out: Tensor, scale: Tensor | None, times: float = 1.0) -> Product:
        """Write ``C H C v`` into ``out``, up to a factor, for the unit vector ``v`` of a direction.

        Args:
            direction: ``v``, with the length of ``C v``.
            out: ``[n]``.
            scale: Diagonal of ``C``, ``[n]``, or None for the identity.
            times: Multiplies the finite-difference step.
        """
        self.products += 1
        found = self._differentiate_or_none(direction, out, scale) if self.method == "autograd" else None
        if found is None:
            found = self._difference(direction, out, scale, times)
        return Product(self.sign * found.factor, found.dots, self.sign * found.quotient)

    def _difference(self, direction: Direction, out: Tensor, scale: Tensor | None, times: float) -> Product:
        """Return the product as a difference of the gradients at both ends of a step."""
        vectors, basis, length = self.evaluator.vectors, direction.basis, direction.length
        relative = self._relative_step()
        step = self.stretch * times * relative * (1.0 + self._params_norm)
        # a direction of length 0 takes no step
        size = torch.where(length == 0.0, 0.0, step / length)
        raw = size * direction.inverse
        vectors.perturb(basis[-1], scale, raw)
        plus = self._gradients(create_graph=False)
        if relative != self._relative_step():
            # the evaluation has shown that the closure computes in 16 bits: start again with a longer step
            return self._difference(direction, out, scale, times)
        vectors.perturb(basis[-1], scale, -raw)
        minus = self._gradients(create_graph=False)
        dots, moved = vectors.finish(basis, out, plus, minus, scale, raw)
        # all three are linear in the gradients
        self.evaluator.share(out, dots, moved)
        if not vectors.is_narrow:
            factor = torch.where(size == 0.0, 0.0, 0.5 / size)
            return Product(factor, dots, factor * direction.inverse * dots[-1])
        # divides by the distance that rounded parameters really moved
        ratio = torch.where(size == 0.0, 0.0, length * length / moved[0])
        return Product(ratio.sqrt(), dots, ratio * moved[1])

    def _relative_step(self) -> float:
        return 2.0**-8 if self.in_16_bits else 2.0**-12

    def _gradients(self, create_graph: bool) -> Sequence[Tensor | None]:
        """Return the gradients of one evaluation; None for a parameter that the loss does not depend on."""
        with torch.enable_grad():
            loss = self.evaluator.evaluate()
            if not loss.requires_grad:
                check.fail(self.evaluator.owner, "loss_fn", "return a loss with a gradient", loss)
            return self.evaluator.gradients(loss, create_graph)

    def _differentiate_or_none(
        self, direction: Direction, out: Tensor, scale: Tensor | None
    ) -> Product | None:
        """Return the product by a second backward pass; None, for ever, if an operation does not have one."""
        try:
            return self._differentiate(direction, out, scale)
        except RuntimeError:
            # an error of the closure itself comes again
            if not self._may_fail:
                raise
        self.method, self._graph_gradients = "difference", ()
        return None

    def _differentiate(self, direction: Direction, out: Tensor, scale: Tensor | None) -> Product:
        """Return the product by a second backward pass."""
        vectors, basis, inverse = self.evaluator.vectors, direction.basis, direction.inverse
        if not self._graph_gradients:
            self._graph_gradients = self._gradients(create_graph=True)
        vector = basis[-1] if scale is None else scale * basis[-1]
        pairs = [
            (g, part.to(g.dtype))
            for g, part in zip(self._graph_gradients, vectors.split(vector), strict=True)
            if g is not None and g.requires_grad
        ]
        out.zero_()
        if pairs:
            gradients, cotangents = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                gradients, self.evaluator.params, cotangents, retain_graph=True, allow_unused=True
            )
            product = vectors.flat(found)
            out.copy_(product if scale is None else scale * product)
        self.evaluator.share(out)
        dots = torch.stack([dot(b, out) for b in basis])
        # out is the product with the raw vector: one inverse norm normalises it, a second one the quotient
        return Product(inverse, dots, inverse * inverse * dots[-1])
