"""The packed table where the kernels of a device read it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def is_capturing(device: torch.device) -> bool:
    """Return whether the current stream of ``device`` records a CUDA graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_mirrored(device: torch.device) -> bool:
    """Return whether kernels on ``device`` need a copy of what the host packs."""
    return device.type != "cpu"


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on a device, without waiting for it; on the CPU they share memory."""
    data = torch.from_numpy(array)
    if device.type != "cuda":
        return data.to(device)
    return data.pin_memory().to(device, non_blocking=True)


class DeviceBuffers:
    """DeviceBuffers of the table by name, as byte tensors on one device.

    On the CPU a column is the memory of its numpy array. Elsewhere it is a copy, sent without a wait from
    fresh pinned memory, which torch's allocator keeps until the copy is over.

    Attributes:
        mirrored: Whether columns are copies.
        tensors: The columns, uint8 of shape ``[bytes]``.
        captured: Whether a graph was recorded that reads them where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.mirrored = device, is_mirrored(device)
        self.tensors: dict[str, Tensor] = {}
        self.captured = False
        self._arrays: dict[str, np.ndarray] = {}

    def upload(self, name: str, array: np.ndarray) -> Tensor:
        """Make a column of an array; one of the same size keeps its address.

        Captured graphs have the addresses of some columns in their arguments, and find the others there.
        """
        data = _bytes(array)
        held = self.tensors.get(name)
        self._arrays[name] = array
        if not self.mirrored:
            self.tensors[name] = data
        elif held is not None and len(held) == len(data):
            self.reupload(name)
        else:
            self.tensors[name] = torch.empty(len(data), dtype=torch.uint8, device=self.device)
            self.reupload(name)
        return self.tensors[name]

    def reupload(self, name: str) -> None:
        """Send an array that was changed in place.

        Raises:
            RuntimeError: If a graph is captured: each replay would send what lies there by then.
        """
        if not self.mirrored or not self._arrays[name].size:
            return
        if is_capturing(self.device):
            raise RuntimeError(
                f"fused_warmup: the table must stay as it is while a graph is captured, got other {name}. "
                "Make one more step with the same settings before the capture."
            )
        data = _bytes(self._arrays[name])
        pinned = self.device.type == "cuda"
        self.tensors[name].copy_(data.pin_memory() if pinned else data, non_blocking=pinned)

    def rewrite(self, name: str, positions: Sequence[int]) -> None:
        """Send those structs of an array that were changed in place; the cost is that of these."""
        array = self._arrays[name]
        if not self.mirrored or not len(positions):
            return
        column = self.tensors[name].view(len(array), array.itemsize)
        data = array[positions].view(np.uint8).reshape(len(positions), array.itemsize)
        column.index_copy_(0, send(np.array(positions, np.int64), self.device), send(data, self.device))

    def allocate(self, name: str, dtype: np.dtype, count: int) -> Tensor:
        """Make a column that only the kernels write and read."""
        self.tensors[name] = torch.zeros(count * dtype.itemsize, dtype=torch.uint8, device=self.device)
        return self.tensors[name]


def _bytes(array: np.ndarray) -> Tensor:
    """Return the memory of an array as a tensor of bytes."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))
