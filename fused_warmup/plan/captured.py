"""Arguments of the launches that a CUDA graph records, which later steps leave as they are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# captures that may follow one another without an eager step between them
ROOM = 8


class CapturedArguments:
    """Memory on the host that replays of captured graphs copy to the device.

    A graph that was recorded with other gradients than the eager steps needs their addresses at each replay.
    The memory must be there before the capture, which must not allocate pinned memory.

    Args:
        owner: Name of the optimizer class, for messages.
        size: Bytes that one graph needs.
        device: Where the kernels run.
    """

    def __init__(self, owner: str, size: int, device: torch.device) -> None:
        self._owner, self._size, self._pins = owner, size, device.type == "cuda"
        # kept for as long as a graph may be replayed
        self._blocks: list[Tensor] = []
        self._used = 0
        self.reserve()

    def reserve(self) -> None:
        """Allocate memory for the next captures, unless there is some."""
        if self._used == ROOM * len(self._blocks):
            self._blocks.append(torch.empty(ROOM, self._size, dtype=torch.uint8, pin_memory=self._pins))

    def hold(self, data: np.ndarray) -> Tensor:
        """Return a copy of bytes that stays as it is; the same bytes are held once.

        Args:
            data: uint8 of ``[size]``.

        Raises:
            RuntimeError: If too many captures followed one another.
        """
        held = torch.from_numpy(data)
        slots: list[Tensor] = [slot for block in self._blocks for slot in block]
        for slot in slots[: self._used]:
            if torch.equal(slot, held):
                return slot
        if self._used == len(slots):
            raise RuntimeError(
                f"{self._owner}: at most {ROOM} graphs must be captured without an eager step between them, "
                f"got one more. Call init_state() before the next capture."
            )
        self._used += 1
        return slots[self._used - 1].copy_(held)
