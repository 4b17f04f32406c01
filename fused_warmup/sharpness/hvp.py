"""Products of the Hessian of a loss closure with vectors, from first derivatives or by double backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check
from .loss_evaluator import LossEvaluator
from .vectors import dot

METHODS = ("difference", "autograd")


class Hessian:
    """Hessian of a loss at the parameters of a ``LossEvaluator``, in flat vectors of ``[n]``.

    ``"difference"`` takes the central difference of two gradients, which works wherever training does:
    fused attention, compiled models, custom operators. ``"autograd"`` differentiates twice and keeps the
    graph of one evaluation.

    The step along the unit direction in which the parameters move is ``2**-12 (1 + |params|)``, and ``2**-8``
    where parameters or the forward pass have 16 bits. Float64 would bear a smaller one, but then too few
    kinks of a ReLU network lie within a step to average: its sharpness came out up to twice too large.

    Args:
        evaluator: An entered ``LossEvaluator``.
        method: ``"difference"`` or ``"autograd"``.
        sign: -1 for the Hessian of minus the loss.
        stretch: Multiplies the step, a number or 0-dim tensor.

    Attributes:
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
        self.method = check.one_of(evaluator.owner, "method", method, METHODS)
        norms = [torch.linalg.vector_norm(p, dtype=evaluator.vectors.dtype) for p in evaluator.snapshot]
        self._length = torch.linalg.vector_norm(torch.stack(norms)).to(torch.float64)
        self._gradient: list[Tensor | None] = []

    @property
    def in_16_bits(self) -> bool:
        """Whether parameters or the forward pass are rounded to 16 bits."""
        return self.evaluator.vectors.is_narrow or self.evaluator.autocast

    def gradient(self) -> list[Tensor | None]:
        """Return the gradients of the loss at the parameters; ``sign`` does not count."""
        found = list(self._gradients(create_graph=False))
        self.evaluator.share(*found)
        return found

    def product(
        self,
        basis: Tensor,
        out: Tensor,
        scale: Tensor | None,
        inverse: Tensor,
        length: Tensor,
        times: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write ``C H C v`` into ``out``, up to a factor, for the unit vector ``v = inverse * basis[-1]``.

        Args:
            basis: ``[m, n]``.
            out: ``[n]``.
            scale: Diagonal of ``C``, ``[n]``, or None for the identity.
            inverse: 0-dim, one over the length of the last basis vector; 0 for a vector that is not one.
            length: 0-dim, the length of ``C v``.
            times: Multiplies the finite step.

        Returns:
            The factor, 0-dim; products of ``out``, without the factor, with the basis, ``[m]``; and
            ``v' C H C v``, 0-dim. All float64.
        """
        self.products += 1
        find = self._differentiate if self.method == "autograd" else self._difference
        factor, products, quotient = find(basis, out, scale, inverse, length, times)
        return self.sign * factor, products, self.sign * quotient

    def _difference(
        self,
        basis: Tensor,
        out: Tensor,
        scale: Tensor | None,
        inverse: Tensor,
        length: Tensor,
        times: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``product`` from the gradients at both ends of a step."""
        vectors, step = self.evaluator.vectors, self._relative_step()
        # no step along a vector that is not one
        size = torch.where(length == 0.0, 0.0, self.stretch * times * step * (1.0 + self._length) / length)
        raw = size * inverse
        vectors.perturb(basis[-1], scale, raw)
        plus = self._gradients(create_graph=False)
        if step != self._relative_step():
            # the closure turned out to compute in 16 bits
            return self._difference(basis, out, scale, inverse, length, times)
        vectors.perturb(basis[-1], scale, -raw)
        minus = self._gradients(create_graph=False)
        products, moved = vectors.finish(basis, out, plus, minus, scale, raw)
        # all that is made of the gradients is linear in them
        self.evaluator.share(out, products, moved)
        if not vectors.is_narrow:
            factor = torch.where(size == 0.0, 0.0, 0.5 / size)
            return factor, products, factor * inverse * products[-1]
        # exact along the way that rounded parameters went, whatever the rounding
        ratio = torch.where(size == 0.0, 0.0, length * length / moved[0])
        return ratio.sqrt(), products, ratio * moved[1]

    def _relative_step(self) -> float:
        return 2.0**-8 if self.in_16_bits else 2.0**-12

    def _gradients(self, create_graph: bool) -> Sequence[Tensor | None]:
        """Return the gradients of one evaluation; None for a parameter that the loss does not depend on."""
        with torch.enable_grad():
            loss = self.evaluator.evaluate()
            if not loss.requires_grad:
                check.fail(self.evaluator.owner, "loss_fn", "return a loss with a gradient", loss)
            return torch.autograd.grad(
                loss, self.evaluator.params, create_graph=create_graph, allow_unused=True
            )

    def _differentiate(
        self,
        basis: Tensor,
        out: Tensor,
        scale: Tensor | None,
        inverse: Tensor,
        length: Tensor,
        times: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``product`` by a second backward pass."""
        vectors = self.evaluator.vectors
        self._gradient = self._gradient or list(self._gradients(create_graph=True))
        v = basis[-1] if scale is None else scale * basis[-1]
        pairs = [
            (g, part.to(g.dtype))
            for g, part in zip(self._gradient, vectors.split(v), strict=True)
            if g is not None and g.requires_grad
        ]
        out.zero_()
        if pairs:
            ends, ways = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                ends, self.evaluator.params, ways, retain_graph=True, allow_unused=True
            )
            product = vectors.flat(found)
            out.copy_(product if scale is None else scale * product)
        self.evaluator.share(out)
        products = torch.stack([dot(b, out) for b in basis])
        # of the raw vector, hence once more than its unit vector has
        return inverse, products, inverse * inverse * products[-1]
