"""Losses of an epoch, kept on their device until it is over."""

from __future__ import annotations

import torch
from torch import Tensor

from ...distributed.groups import average


class LossBuffer:
    """Collects as many losses as an epoch has; only ``drain`` waits for the device.

    Args:
        size: Losses of an epoch.
        reduce: Average them over the default process group, where there is one.

    Attributes:
        filled: Losses collected so far.
        values: The losses, then the updates that the optimizer had made; float64 of ``[size + 1]``.
    """

    def __init__(self, size: int, reduce: bool) -> None:
        self.size, self.reduce, self.filled = size, reduce, 0
        self.values: Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether the epoch is over."""
        return self.filled == self.size

    def add(self, loss: Tensor | float, device: torch.device | None = None) -> None:
        """Put a loss into its place; without ``device`` the first loss says where.

        Args:
            loss: What ``checked_loss`` returns.
            device: Device of the buffer.
        """
        if device is None and self.values is None:
            device = loss.device if isinstance(loss, Tensor) else torch.device("cpu")
        if self.values is None:
            self.values = torch.zeros(self.size + 1, dtype=torch.float64, device=device)
        elif device is not None:
            # a state may have been loaded to another device
            self.values = self.values.to(device)
        if isinstance(loss, Tensor):
            self.values[self.filled].copy_(loss, non_blocking=True)
        else:
            self.values[self.filled] = loss
        self.filled += 1

    def drain(self, made: Tensor | int) -> tuple[Tensor, int]:
        """Begin a new epoch; return the losses of this one and ``made`` on the CPU, in one copy."""
        assert self.values is not None
        if isinstance(made, Tensor):
            self.values[-1].copy_(made)
        else:
            self.values[-1] = made
        if self.reduce:
            average(self.values[:-1])
        self.filled = 0
        host = self.values.to("cpu", copy=True)
        return host[:-1], int(host[-1])
