"""The packed table where the kernels of a device read it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of ``device`` records a CUDA graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Columns:
    """Columns of the table by name, as byte tensors on one device.

    On the CPU a column is the memory of its numpy array. Elsewhere it is a copy, sent without a wait from
    fresh pinned memory, which torch's allocator keeps until the copy is over.

    Attributes:
        tensors: The columns, uint8 of shape ``[bytes]``.
        captured: Whether a graph was recorded that reads them: what is replaced then stays in memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tensors: dict[str, Tensor] = {}
        self.captured = False
        self._replaced: list[Tensor] = []
        self._arrays: dict[str, np.ndarray] = {}

    def put(self, name: str, array: np.ndarray) -> Tensor:
        """Make a column of an array; one of the same size keeps its address, for captured graphs read it."""
        data = torch.from_numpy(array.reshape(-1).view(np.uint8))
        held = self.tensors.get(name)
        self._arrays[name] = array
        if self.device.type == "cpu":
            self.tensors[name] = data
        elif held is not None and len(held) == len(data):
            self.push(name)
        else:
            if held is not None and self.captured:
                self._replaced.append(held)
            self.tensors[name] = torch.empty(len(data), dtype=torch.uint8, device=self.device)
            self.push(name)
        return self.tensors[name]

    def push(self, name: str) -> None:
        """Send an array that was changed in place."""
        if self.device.type != "cpu" and self._arrays[name].size:
            data = torch.from_numpy(self._arrays[name].reshape(-1).view(np.uint8))
            self.tensors[name].copy_(data.pin_memory(), non_blocking=True)

    def scratch(self, name: str, dtype: np.dtype, count: int) -> Tensor:
        """Make a column that only the kernels write and read."""
        self.tensors[name] = torch.zeros(count * dtype.itemsize, dtype=torch.uint8, device=self.device)
        return self.tensors[name]
