"""Addresses of tensors, and checks that what a table was built from is unchanged.

The only file that calls ``data_ptr()``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .tensors import same_layout


class TensorSignatures(Protocol):
    """Type, dtype, device, shape and strides of some tensors."""

    def read(self, tensors: list[Any], out: int, grads: bool = False) -> list[int]:
        """Write the addresses of tensors: 0 for None or another signature, 1 for an empty tensor.

        Args:
            tensors: As many as there are signatures.
            out: Address of as many uint64.
            grads: Read the gradients of the tensors instead, and keep them alive until ``release``.

        Returns:
            Positions of the tensors that have another signature.
        """
        ...

    def release(self) -> None:
        """Let go of the gradients."""
        ...


class AddressCache:
    """Addresses that tensors had when the table was built.

    Args:
        make_signatures: Makes ``TensorSignatures``.
        tensors: The tensors.
    """

    def __init__(self, make_signatures: Callable[..., TensorSignatures], tensors: list[Tensor]) -> None:
        self._tensors, self._signatures = tensors, make_signatures(tensors)
        self._addresses, self._now = (np.zeros(len(tensors), np.uint64) for _ in range(2))
        self._out = self._now.ctypes.data
        self._signatures.read(tensors, self._addresses.ctypes.data)

    def is_valid(self) -> bool:
        """Return whether every tensor still has the cached address, dtype, shape and strides."""
        return not self._signatures.read(self._tensors, self._out) and bool(
            (self._now == self._addresses).all()
        )


def groups_unchanged(groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[Tensor]]) -> bool:
    """Return whether the groups still hold the same parameters."""
    now = [group["params"] for group in groups]
    return [len(a) for a in now] == [len(b) for b in members] and all(
        p is q for a, b in zip(now, members, strict=True) for p, q in zip(a, b, strict=True)
    )


def states_unchanged(dicts: Sequence[dict[Any, Any]], keys: Sequence[Any], objects: Sequence[Any]) -> bool:
    """Return whether each dictionary still holds its object under its key."""
    # past the method of a tracked dictionary, which would note the access
    return all(dict.get(d, key) is value for d, key, value in zip(dicts, keys, objects, strict=True))


def address_of(tensor: Tensor | None) -> int:
    """Return the address of the first element of a tensor, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses_of(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the addresses of the first elements of tensors, 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


class PythonSignatures:
    """``TensorSignatures`` without the extension, or for a torch without the DLPack exchange API."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = [torch.empty_like(t, device="meta", requires_grad=False) for t in tensors]
        self._kinds = [(t.dtype, t.device, t.layout) for t in tensors]
        self._types = [(Tensor, type(t)) for t in tensors]
        self._kept: list[Tensor] = []

    def read(self, tensors: list[Any], out: int, grads: bool = False) -> list[int]:
        """Write the addresses of tensors, see ``TensorSignatures``."""
        addresses = np.ctypeslib.as_array(ctypes.cast(out, ctypes.POINTER(ctypes.c_uint64)), (len(tensors),))
        odd = []
        for i, (t, like) in enumerate(zip(tensors, self._tensors, strict=True)):
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


def select_reader() -> tuple[Callable[..., Any], Callable[..., bool], Callable[..., bool]]:
    """Return ``TensorSignatures`` and the two comparisons of this module, compiled if possible."""
    try:
        from .. import _cpu
    except ImportError:
        return PythonSignatures, groups_unchanged, states_unchanged
    exchange = hasattr(Tensor, "__dlpack_c_exchange_api__")
    signatures = partial(_cpu.TensorSignatures, Tensor) if exchange else PythonSignatures
    return signatures, _cpu.groups_unchanged, _cpu.states_unchanged
