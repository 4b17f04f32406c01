"""Addresses of tensors, and checks that what a table was built from is unchanged.

The only file that calls ``data_ptr()``.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from .structs import DTYPES, STRUCTS
from .tensors import same_layout


class TensorSignatures(Protocol):
    """Type, dtype, device, shape and strides of some tensors."""

    def add(self, tensors: list[Tensor]) -> None:
        """Append the signatures of more tensors."""

    def read(self, tensors: list[Any], out: int, grads: bool = False, among: int = 0) -> list[int]:
        """Write the addresses of tensors: 0 for None or another signature, 1 for an empty tensor.

        Args:
            tensors: As many as there are signatures.
            out: Address of as many uint64.
            grads: Read the gradients of the tensors instead, and keep them alive until ``release``.
            among: Address of as many uint64; tensors with a 0 there are not read. 0 reads all.

        Returns:
            Positions of the tensors that have another signature.
        """
        ...

    def release(self) -> None:
        """Let go of the gradients."""
        ...


class TensorReader(NamedTuple):
    """Functions that read many tensors at once.

    Attributes:
        signatures: Makes ``TensorSignatures``.
        extents: Returns the struct ``TensorExtent`` of each tensor; its dtype is -1 unless the tensor is a
            plain one, a ``Tensor`` or ``Parameter`` with contiguous elements of a supported dtype.
        others: Returns the positions of tensors that are no plain ones.
        groups_unchanged: Returns whether groups still hold the same parameters.
        changed_groups: Returns the positions of groups with other hyper-parameters than at the last reading.
        states_unchanged: Returns whether dictionaries still hold the same objects under the same keys.
        referenced_beyond: Returns whether any object has more references than a number.
        any_gradient: Returns whether any tensor has a gradient.
    """

    signatures: Callable[[list[Tensor]], TensorSignatures]
    extents: Callable[[list[Tensor]], np.ndarray]
    others: Callable[[list[Tensor]], list[int]]
    groups_unchanged: Callable[..., bool]
    changed_groups: Callable[..., list[int]]
    states_unchanged: Callable[..., bool]
    referenced_beyond: Callable[[list[Any], int], bool]
    any_gradient: Callable[[list[Tensor]], bool]


_NO_POSITIONS = np.zeros(0, np.int64)


class AddressCache:
    """Addresses that tensors had when they entered the table.

    Args:
        signatures: Makes ``TensorSignatures``.
        tensors: The tensors.

    Attributes:
        addresses: uint64 of ``[tensors]``; 1 for an empty tensor.
        now: The same at the last comparison.
    """

    def __init__(self, signatures: Callable[[list[Tensor]], TensorSignatures], tensors: list[Tensor]) -> None:
        self._tensors, self._signatures = tensors, signatures(tensors)
        self.addresses = np.zeros(len(tensors), np.uint64)
        self._signatures.read(tensors, self.addresses.ctypes.data)
        self._make_room()

    def _make_room(self) -> None:
        """Allocate memory for the addresses of the next comparison."""
        self.now = self.addresses.copy()
        self._out: int = self.now.ctypes.data
        # bytes compare at once, where numpy makes two arrays
        self._known = self.addresses.tobytes()

    def extend(self, tensors: list[Tensor]) -> None:
        """Add tensors with their present addresses; only these are read."""
        self._tensors.extend(tensors)
        self._signatures.add(tensors)
        known = len(self.addresses)
        added = np.zeros(len(tensors), np.uint64)
        if known:
            added[:] = [t.data_ptr() if t.numel() else 1 for t in tensors]
        else:
            self._signatures.read(tensors, added.ctypes.data)
        self.addresses = np.concatenate([self.addresses, added])
        self._make_room()

    def find_moved(self, among: int = 0) -> np.ndarray | None:
        """Return the positions of tensors with another address; None if a dtype, shape or stride changed.

        Args:
            among: Address of as many uint64; tensors with a 0 there are read only if another has moved.
        """
        if self._signatures.read(self._tensors, self._out, False, among):
            return None
        if self.now.tobytes() == self._known:
            return _NO_POSITIONS
        moved = np.flatnonzero(self.now != self.addresses)
        # perhaps to where one was that has moved, too
        return self.find_moved() if among and len(moved) else moved

    def accept(self) -> None:
        """Keep the addresses that ``find_moved`` has read."""
        self.addresses[:] = self.now
        self._known = self.addresses.tobytes()


def groups_unchanged(groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[Tensor]]) -> bool:
    """Return whether the groups still hold the same parameters."""
    now = [group["params"] for group in groups]
    return [len(a) for a in now] == [len(b) for b in members] and all(
        p is q for a, b in zip(now, members, strict=True) for p, q in zip(a, b, strict=True)
    )


def changed_groups(
    groups: Sequence[Mapping[str, Any]],
    keys: tuple[str, ...],
    values: Sequence[tuple[Any, ...] | None],
) -> list[int]:
    """Return the positions of groups whose values under the keys are others than those, or for which is None.

    What cannot be compared, as a tensor or array of many elements, is another value.
    """
    now = map(itemgetter(*keys), groups)
    return [i for i, (a, b) in enumerate(zip(now, values, strict=True)) if not are_equal(a, b)]


def are_equal(a: Any, b: Any) -> bool:
    """Return whether values are equal; False for those that cannot be compared."""
    try:
        return bool(a == b)
    except (RuntimeError, TypeError, ValueError):
        return False


def states_unchanged(dicts: Sequence[dict[Any, Any]], keys: Sequence[Any], objects: Sequence[Any]) -> bool:
    """Return whether each dictionary still holds its object under its key."""
    # past the method of a tracked dictionary, which would note the access
    return all(dict.get(d, key) is value for d, key, value in zip(dicts, keys, objects, strict=True))


def referenced_beyond(objects: list[Any], references: int) -> bool:
    """Return whether any object is referenced more often than ``references``."""
    # an object that only a list holds shows how many references the call itself adds
    (own,) = [sys.getrefcount(value) - 1 for value in [object()]]
    for value in objects:  # noqa: SIM110
        if sys.getrefcount(value) - own > references:
            return True
    return False


def any_gradient(tensors: list[Tensor]) -> bool:
    """Return whether any tensor has a gradient."""
    return any(tensor.grad is not None for tensor in tensors)


def address_of(tensor: Tensor | None) -> int:
    """Return the address of the first element of a tensor, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses_of(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the addresses of the first elements of tensors, 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _uint64_at(address: int, count: int) -> np.ndarray:
    """Return the numbers at an address."""
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint64)), (count,))


class PythonSignatures:
    """``TensorSignatures`` without the extension, or for a torch without the DLPack exchange API."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors: list[Tensor] = []
        self._kinds: list[tuple[torch.dtype, torch.device, torch.layout]] = []
        self._types: list[tuple[type, type]] = []
        self._kept: list[Tensor] = []
        self.add(tensors)

    def add(self, tensors: list[Tensor]) -> None:
        """Append the signatures of more tensors."""
        self._tensors += [torch.empty_like(t, device="meta", requires_grad=False) for t in tensors]
        self._kinds += [(t.dtype, t.device, t.layout) for t in tensors]
        self._types += [(Tensor, type(t)) for t in tensors]

    def read(self, tensors: list[Any], out: int, grads: bool = False, among: int = 0) -> list[int]:
        """Write the addresses of tensors, see ``TensorSignatures``."""
        addresses = _uint64_at(out, len(tensors))
        wanted = _uint64_at(among, len(tensors)) if among else None
        odd = []
        for i, (t, like) in enumerate(zip(tensors, self._tensors, strict=True)):
            if wanted is not None and not wanted[i]:
                continue
            addresses[i] = 0
            t = t.grad if grads else t
            if t is None:
                continue
            known = type(t) in self._types[i] and (t.dtype, t.device, t.layout) == self._kinds[i]
            if known and same_layout(t, like):
                addresses[i] = t.data_ptr() if t.numel() else 1
            if not addresses[i]:
                odd.append(i)
            elif grads:
                self._kept.append(t)
        return odd

    def release(self) -> None:
        """Let go of the gradients."""
        self._kept = []


def python_extents(tensors: list[Tensor]) -> np.ndarray:
    """Return the extents of tensors, see ``TensorReader``."""
    table = np.zeros(len(tensors), STRUCTS["TensorExtent"])
    table["dtype"] = -1
    # as DLPack numbers them
    devices = {"cpu": 1, "cuda": 2}
    for i, t in enumerate(tensors):
        plain = type(t) in (Tensor, Parameter) and t.layout is torch.strided and t.device.type in devices
        if plain and t.dtype in DTYPES and t.numel() and t.is_contiguous():
            device = devices[t.device.type], t.device.index or 0
            table[i] = (t.data_ptr(), t.numel(), t.nbytes, DTYPES[t.dtype], t.dim(), *device)
    return table


def _python_others(tensors: list[Tensor]) -> list[int]:
    """Return the positions of tensors that are no plain ones, see ``TensorReader``."""
    return [i for i, dtype in enumerate(python_extents(tensors)["dtype"]) if dtype < 0]


PYTHON_READER = TensorReader(
    PythonSignatures,
    python_extents,
    _python_others,
    groups_unchanged,
    changed_groups,
    states_unchanged,
    referenced_beyond,
    any_gradient,
)


def _compiled_extents(fill: Callable[..., None], tensors: list[Tensor]) -> np.ndarray:
    """Return the extents of tensors that compiled code writes."""
    table = np.empty(len(tensors), STRUCTS["TensorExtent"])
    fill(Tensor, Parameter, tensors, table.ctypes.data)
    return table


@cache
def select_reader() -> TensorReader:
    """Return the functions that read tensors, compiled if possible."""
    try:
        from .. import _cpu
    except ImportError:
        return PYTHON_READER
    names = ("groups_unchanged", "changed_groups", "states_unchanged", "referenced_beyond", "any_gradient")
    compiled = PYTHON_READER._replace(**{name: getattr(_cpu, name) for name in names})
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return compiled
    signatures = partial(_cpu.TensorSignatures, Tensor)
    return compiled._replace(
        signatures=signatures,
        extents=partial(_compiled_extents, _cpu.extents),
        others=partial(_cpu.others, Tensor, Parameter),
    )
