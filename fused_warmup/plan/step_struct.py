"""Struct ``Step``, the argument of the kernels: addresses of the columns and settings of one step."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .address_cache import addresses_of
from .structs import STRUCTS


class StepStruct:
    """Struct ``Step`` on the host.

    Attributes:
        array: The struct, a numpy struct array of ``[1]``.
        address: Its address.
        is_stale: Whether it was written since ``is_stale`` was last set to False.
    """

    def __init__(self) -> None:
        self.array = np.zeros(1, STRUCTS["Step"])
        self.address: int = self.array.ctypes.data
        self.is_stale = True

    def set(self, **fields: float) -> None:
        """Write fields."""
        for name, value in fields.items():
            self.array[name] = value
        self.is_stale = True

    def point_to(self, **tensors: Tensor | None) -> None:
        """Write the addresses of tensors into fields, 0 for None."""
        for name, address in zip(tensors, addresses_of(list(tensors.values())), strict=True):
            self.array[name] = address
        self.is_stale = True
