"""Whether tensors, groups and states are still those that a table was built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor


class TensorSignatures(Protocol):
    """The forms of some tensors: type, dtype, device, shape and strides."""

    def read(self, tensors: list[Any], out: int, grads: bool = False) -> list[int]:
        """Write where tensors of these forms lie: 0 for None or another form, 1 for an empty tensor.

        Args:
            tensors: As many as the forms.
            out: Address of as many uint64.
            grads: Read the gradients of the tensors instead, and keep them alive until ``release``.

        Returns:
            Positions of the tensors whose form is another one.
        """
        ...

    def release(self) -> None:
        """Let go of the gradients."""
        ...


class AddressCache:
    """Tensors whose addresses are in the table.

    Args:
        make_signatures: Makes ``TensorSignatures``.
        tensors: The tensors.
    """

    def __init__(self, make_signatures: Callable[..., TensorSignatures], tensors: list[Tensor]) -> None:
        self._tensors, self._forms = tensors, make_signatures(tensors)
        self._addresses, self._now = (np.zeros(len(tensors), np.uint64) for _ in range(2))
        self._out = self._now.ctypes.data
        self._forms.read(tensors, self._addresses.ctypes.data)

    def is_valid(self) -> bool:
        """Whether all of them are where they were, in the form that they had."""
        return not self._forms.read(self._tensors, self._out) and bool((self._now == self._addresses).all())


def groups_unchanged(groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the groups hold the very parameters they held."""
    now = [group["params"] for group in groups]
    return [len(a) for a in now] == [len(b) for b in members] and all(
        p is q for a, b in zip(now, members, strict=True) for p, q in zip(a, b, strict=True)
    )


def states_unchanged(
    dicts: Sequence[Mapping[str, Any]], names: Sequence[str], objects: Sequence[Tensor]
) -> bool:
    """Whether each dictionary still holds its object under its name."""
    return all(d.get(name) is value for d, name, value in zip(dicts, names, objects, strict=True))
