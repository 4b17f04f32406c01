"""Buffer for the losses of an epoch, on their device."""

from __future__ import annotations

import torch
from torch import Tensor


class LossBuffer:
    """Collects the losses of an epoch; only ``drain`` waits for the device.

    Args:
        size: Losses per epoch.

    Attributes:
        filled: Losses collected so far.
        values: The losses, then the number of updates made; float64 of ``[size + 1]``, None before the first.
    """

    def __init__(self, size: int) -> None:
        self.size, self.filled = size, 0
        self.values: Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether the epoch is complete."""
        return self.filled == self.size

    def add(self, loss: Tensor | float, device: torch.device | None = None) -> None:
        """Append a loss.

        Args:
            loss: A result of ``checked_loss``.
            device: Device of the buffer; None takes that of the first loss.
        """
        if device is None and self.values is None:
            device = loss.device if isinstance(loss, Tensor) else torch.device("cpu")
        if self.values is None:
            self.values = torch.zeros(self.size + 1, dtype=torch.float64, device=device)
        elif device is not None:
            # a loaded state may be on another device
            self.values = self.values.to(device)
        if isinstance(loss, Tensor):
            self.values[self.filled].copy_(loss, non_blocking=True)
        else:
            self.values[self.filled] = loss
        self.filled += 1

    def drain(self, made: Tensor | int) -> tuple[Tensor, int]:
        """Return the losses of the epoch and ``made`` on the CPU, in one copy, and begin a new epoch."""
        assert self.values is not None
        if isinstance(made, Tensor):
            self.values[-1].copy_(made)
        else:
            self.values[-1] = made
        self.filled = 0
        host = self.values.to("cpu", copy=True)
        return host[:-1], int(host[-1])
