"""Check that no two parameters share memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .rows import Row


def reach_of(tensor: Tensor) -> int:
    """Return the bytes from the first element of a tensor to the end of its last, 0 for an empty one."""
    if not tensor.numel():
        return 0
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((n - 1) * stride for n, stride in strides) + 1) * tensor.element_size()


def check_disjoint(owner: str, rows: Sequence[Row], addresses: np.ndarray, reaches: np.ndarray) -> int:
    """Raise if two parameters share memory.

    The tensors are sorted by address once. Only where the stretches of memory from first to last element
    intersect, as those of the columns of a matrix do, are their elements marked in a map of that memory, so that
    the time grows with the elements and not with the pairs of tensors.

    Args:
        owner: Name of the optimizer class.
        rows: The parameters.
        addresses: Address of each, uint64 of ``[rows]``.
        reaches: Bytes from the first element of each to the end of its last, int64 of ``[rows]``; 0 for an empty
            one.

    Returns:
        The number of elements that were marked.

    Raises:
        ValueError: If two share memory; both are named.
    """
    filled = np.flatnonzero(reaches)
    order = filled[np.argsort(addresses[filled], kind="stable")]
    begins = addresses[order].astype(np.int64)
    ends = np.maximum.accumulate(begins + reaches[order])
    meets = np.flatnonzero(begins[1:] < ends[:-1])
    marked = 0
    # runs of tensors each of which begins before those in front of it end
    for run in np.split(meets, np.flatnonzero(np.diff(meets) > 1) + 1) if len(meets) else ():
        members = order[run[0] : run[-1] + 2]
        found, count = _mark([rows[i].local for i in members], begins[run[0] : run[-1] + 2])
        marked += count
        if found is not None:
            i, j = sorted(rows[members[k]].index for k in found)
            raise ValueError(
                f"{owner}: parameters must not share memory, got {i} and {j} over the same addresses; give the "
                "tensor that both are views of."
            )
    return marked


def _mark(tensors: Sequence[Tensor], addresses: np.ndarray) -> tuple[tuple[int, int] | None, int]:
    """Return the positions of two tensors that share memory, or None, and the number of elements marked."""
    offsets = addresses - addresses[0]
    # the largest unit in which all addresses and strides are whole
    steps = [
        t.element_size() * stride
        for t in tensors
        for n, stride in zip(t.shape, t.stride(), strict=True)
        if n > 1
    ]
    unit = int(np.gcd.reduce([*offsets, *steps, *(t.element_size() for t in tensors)]))
    spans = [reach_of(t) for t in tensors]
    size = max(int(o) + span for o, span in zip(offsets, spans, strict=True)) // unit
    taken = torch.zeros(size, dtype=torch.bool, device="cpu")
    marked = 0
    for k, (tensor, offset) in enumerate(zip(tensors, offsets, strict=True)):
        own = _cells(taken, tensor, int(offset), unit)
        marked += own.numel()
        if bool(own.any()):
            return (_partner(tensors[: k + 1], offsets, unit, size), k), marked
        own.fill_(True)
    return None, marked


def _cells(taken: Tensor, tensor: Tensor, offset: int, unit: int) -> Tensor:
    """Return the part of a map of memory, one cell for each unit of bytes, that a tensor lies in."""
    size = tensor.element_size() // unit
    strides = [stride * size for stride in tensor.stride()]
    return taken.as_strided((*tensor.shape, size), (*strides, 1), offset // unit)


def _partner(tensors: Sequence[Tensor], offsets: np.ndarray, unit: int, size: int) -> int:
    """Return the position of a tensor that shares memory with the last one."""
    *others, last = tensors
    taken = torch.zeros(size, dtype=torch.bool, device="cpu")
    _cells(taken, last, int(offsets[len(others)]), unit).fill_(True)
    cells = (_cells(taken, t, int(offset), unit) for t, offset in zip(others, offsets, strict=False))
    return next(k for k, own in enumerate(cells) if bool(own.any()))
