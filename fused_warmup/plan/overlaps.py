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

    The tensors are sorted by address once. Those whose stretches of memory intersect, like the columns of a
    matrix, are compared by their places within the common stride; if that does not decide, their elements are
    marked in a map of the memory. Neither takes time for each pair of tensors.

    Args:
        owner: Name of the optimizer class.
        rows: The parameters.
        addresses: Address of each, uint64 of ``[rows]``.
        reaches: Bytes from the first element of each to the end of its last, int64 of ``[rows]``; 0 for an
            empty one.

    Returns:
        The number of elements that were marked.

    Raises:
        ValueError: If two share memory; both are named.
    """
    if len(rows) < 2:
        return 0
    filled = np.flatnonzero(reaches)
    order = filled[np.argsort(addresses[filled], kind="stable")]
    begins = addresses[order].astype(np.int64)
    ends = np.maximum.accumulate(begins + reaches[order])
    meets = np.flatnonzero(begins[1:] < ends[:-1])
    marked = 0
    # runs of tensors each of which begins before those in front of it end
    for run in np.split(meets, np.flatnonzero(np.diff(meets) > 1) + 1) if len(meets) else ():
        places = slice(run[0], run[-1] + 2)
        members = order[places].tolist()
        tensors, offsets = [rows[i].local for i in members], begins[places] - begins[run[0]]
        if _are_apart(tensors, offsets, reaches[members]):
            continue
        found, count = _mark(tensors, offsets, reaches[members])
        marked += count
        if found is not None:
            i, j = sorted(rows[members[k]].index for k in found)
            raise ValueError(
                f"{owner}: parameters must not share memory, got {i} and {j} over the same addresses; give "
                "the tensor that both are views of."
            )
    return marked


def _outer_dimension(tensor: Tensor) -> tuple[int, int]:
    """Return the largest stride of a tensor in bytes, and the length of its dimension."""
    dimensions = [(stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    stride, n = max(dimensions, default=(0, 1))
    return stride * tensor.element_size(), n


def _are_apart(tensors: Sequence[Tensor], offsets: np.ndarray, reaches: np.ndarray) -> bool:
    """Return whether tensors of one outer stride lie in disjoint places within it."""
    outer = [_outer_dimension(tensor) for tensor in tensors]
    stride = outer[0][0]
    if stride == 0 or any(own != stride for own, _ in outer):
        return False
    inner = reaches - stride * (np.array([n for _, n in outer], np.int64) - 1)
    order = np.argsort(offsets % stride, kind="stable")
    begins, lengths = (offsets % stride)[order], inner[order]
    # the place after the last one is the first one, a stride later
    return bool((begins + lengths <= np.append(begins[1:], begins[0] + stride)).all())


def _mark(
    tensors: Sequence[Tensor], offsets: np.ndarray, reaches: np.ndarray
) -> tuple[tuple[int, int] | None, int]:
    """Return the positions of two tensors that share memory, or None, and the number of elements marked."""
    sizes = [t.element_size() for t in tensors]
    # the largest unit in which all offsets and strides are whole; a dimension of one element has any stride
    strides = [
        t.element_size() * stride
        for t in tensors
        for n, stride in zip(t.shape, t.stride(), strict=True)
        if n > 1
    ]
    unit = int(np.gcd.reduce([*offsets.tolist(), *strides, *sizes]))
    taken = torch.zeros(int((offsets + reaches).max()) // unit, dtype=torch.bool, device="cpu")
    marked = 0
    for k, (tensor, offset) in enumerate(zip(tensors, offsets.tolist(), strict=True)):
        own = _cells(taken, tensor, offset, unit)
        marked += tensor.numel()
        if bool(own.any()):
            return (_partner(taken, tensors[: k + 1], offsets.tolist(), unit), k), marked
        own.fill_(True)
    return None, marked


def _cells(taken: Tensor, tensor: Tensor, offset: int, unit: int) -> Tensor:
    """Return the part of a map of memory, one cell for each unit of bytes, that a tensor lies in."""
    size = tensor.element_size() // unit
    # any stride serves for a dimension of one element
    strides = [stride * size if n > 1 else 1 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return taken.as_strided((*tensor.shape, size), (*strides, 1), offset // unit)


def _partner(taken: Tensor, tensors: Sequence[Tensor], offsets: Sequence[int], unit: int) -> int:
    """Return the position of a tensor that shares memory with the last one."""
    *others, last = tensors
    taken.zero_()
    _cells(taken, last, offsets[len(others)], unit).fill_(True)
    cells = (_cells(taken, t, offset, unit) for t, offset in zip(others, offsets, strict=False))
    return next(k for k, own in enumerate(cells) if bool(own.any()))
