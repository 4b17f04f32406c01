"""Products of the Hessian of a loss closure with vectors, from first derivatives or by double backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check
from .keeper import Keeper
from .vectors import dot, finish, perturb

METHODS = ("difference", "autograd")


class Hessian:
    """Hessian of a loss at the parameters of a ``Keeper``, in flat vectors of ``[n]``.

    ``"difference"`` takes the central difference of two gradients, which works wherever training does:
    fused attention, compiled models, custom operators. ``"autograd"`` differentiates twice and keeps the
    graph of one evaluation.

    The step along the unit direction in which the parameters move is ``2**-12 (1 + |params|)``, and ``2**-8``
    where parameters or the forward pass have 16 bits. Float64 would bear a smaller one, but then too few
    kinks of a ReLU network lie within a step to average: its sharpness came out up to twice too large.

    Args:
        keeper: An entered ``Keeper``.
        method: ``"difference"`` or ``"autograd"``.
        sign: -1 for the Hessian of minus the loss.
        stretch: Multiplies the step, a number or 0-dim tensor.

    Attributes:
        products: Number of products so far.
    """

    def __init__(
        self, keeper: Keeper, method: str = "difference", sign: float = 1.0, stretch: Tensor | float = 1.0
    ) -> None:
        self.keeper, self.sign, self.stretch, self.products = keeper, sign, stretch, 0
        self.method = check.one_of(keeper.owner, "method", method, METHODS)
        self._narrow = any(p.dtype.itemsize == 2 for p in keeper.params)
        norms = [dot(p.to(keeper.dtype), p.to(keeper.dtype)) for p in keeper.snapshot]
        self._length = torch.stack(norms).sum().sqrt()
        self._gradient: list[Tensor | None] = []

    @property
    def in_16_bits(self) -> bool:
        """Whether parameters or the forward pass are rounded to 16 bits."""
        return self._narrow or self.keeper.autocast

    def gradient(self) -> Tensor:
        """Return the gradient of the loss at the parameters, ``[n]``; ``sign`` does not count."""
        return self._flat_gradient()

    def product(
        self, vector: Tensor, scale: Tensor | None = None, times: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return ``C H C v`` and ``v' C H C v``.

        Args:
            vector: Unit vector ``v`` of ``[n]``.
            scale: Diagonal of ``C``, ``[n]``, or None for the identity.
            times: Multiplies the finite step.

        Returns:
            The product, ``[n]``, and the quotient, 0-dim float64.
        """
        self.products += 1
        way = vector if scale is None else scale * vector
        if self.method == "autograd":
            found, quotient = self._differentiate(way)
            product = found if scale is None else scale * found
            return self.sign * product, self.sign * quotient
        ends, size, moved = self._two_gradients(way, times)
        product, quotient = finish(vector, scale, ends, size, moved)
        return self.sign * product, self.sign * quotient

    def _two_gradients(self, way: Tensor, times: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the difference of the gradients at both ends, the step, and how far the parameters went."""
        keeper, step = self.keeper, self._relative_step()
        norm = dot(way, way).sqrt()
        size = self.stretch * times * step * (1.0 + self._length) / norm
        parts = keeper.split(way)
        try:
            perturb(keeper.params, keeper.snapshot, parts, size)
            plus = self._flat_gradient()
            if step != self._relative_step():
                # the closure turned out to compute in 16 bits
                return self._two_gradients(way, times)
            moved = keeper.flat(keeper.params) if self._narrow else None
            perturb(keeper.params, keeper.snapshot, parts, -size)
            difference = plus - self._flat_gradient()
            moved = None if moved is None else moved - keeper.flat(keeper.params)
        finally:
            for param, value in zip(keeper.params, keeper.snapshot, strict=True):
                param.data.copy_(value)
        return difference, size, moved

    def _relative_step(self) -> float:
        return 2.0**-8 if self.in_16_bits else 2.0**-12

    def _flat_gradient(self) -> Tensor:
        return self.keeper.flat(self._gradients(create_graph=False))

    def _gradients(self, create_graph: bool) -> Sequence[Tensor | None]:
        """Return the gradients of one evaluation; None for a parameter that the loss does not depend on."""
        with torch.enable_grad():
            loss = self.keeper.evaluate()
            if not loss.requires_grad:
                check.fail(self.keeper.owner, "loss_fn", "return a loss with a gradient", loss)
            return torch.autograd.grad(loss, self.keeper.params, create_graph=create_graph, allow_unused=True)

    def _differentiate(self, way: Tensor) -> tuple[Tensor, Tensor]:
        """Return the product and quotient along ``way`` by a second backward pass."""
        keeper = self.keeper
        self._gradient = self._gradient or list(self._gradients(create_graph=True))
        pairs = [
            (g, v.to(g.dtype))
            for g, v in zip(self._gradient, keeper.split(way), strict=True)
            if g is not None and g.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(way), dot(way, torch.zeros_like(way))
        outputs, vectors = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, keeper.params, vectors, retain_graph=True, allow_unused=True)
        product = keeper.flat(found)
        return product, dot(way, product)
