"""The four vector operations of a measurement, in plain PyTorch; a backend may replace them one by one.

Vectors are flat tensors of ``[n]`` over all parameters; scalars are 0-dim float64 tensors on their device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product, summed in double precision."""
    return torch.sum(a * b, dtype=torch.float64)


def perturb(
    params: Sequence[Tensor], snapshot: Sequence[Tensor], vector: Sequence[Tensor], size: Tensor
) -> None:
    """Write ``snapshot + size * vector`` into the parameters, past their version counters."""
    for param, value, v in zip(params, snapshot, vector, strict=True):
        param.data.copy_(value + size.to(v.dtype) * v)


def finish(
    vector: Tensor, scale: Tensor | None, difference: Tensor, size: Tensor, moved: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Turn a difference of gradients into a product and a Rayleigh quotient.

    Args:
        vector: Unit vector ``v``.
        scale: Diagonal ``C`` or None for the identity; the parameters were moved by ``size * C v``.
        difference: Gradient at one end minus that at the other.
        size: Half the distance between them in units of ``C v``.
        moved: How far rounded parameters really moved, or None if they followed.

    Returns:
        ``C H C v`` and ``v' C H C v``.
    """
    if moved is None:
        product = difference * (0.5 / size).to(difference.dtype)
        product = product if scale is None else scale * product
        return product, dot(vector, product)
    # exact along the way that they went, whatever the rounding
    aimed = vector if scale is None else scale * vector
    ratio = dot(aimed, aimed) / dot(moved, moved)
    product = difference * ratio.sqrt().to(difference.dtype)
    return product if scale is None else scale * product, dot(moved, difference) * ratio


def orthogonalise(w: Tensor, basis: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Take the parts along an orthonormal basis off a vector, twice.

    Returns:
        What is left of ``w``, its norm, and the products of ``w`` with the basis as it came.
    """
    overlaps: list[Tensor] = []
    for _ in range(2):
        parts = [dot(v, w) for v in basis]
        overlaps = overlaps or parts
        for v, c in zip(basis, parts, strict=True):
            w = w - c.to(w.dtype) * v
    return w, dot(w, w).sqrt(), overlaps


def combine(basis: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Return the sum of the basis vectors times ``coefficients`` of ``[len(basis)]``."""
    total = torch.zeros_like(basis[0])
    for v, c in zip(basis, coefficients.to(basis[0].dtype).unbind(), strict=True):
        total = total + c * v
    return total
