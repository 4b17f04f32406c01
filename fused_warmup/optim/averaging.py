"""Averages of the parameters: their settings, and the swap that evaluates with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks as check
from ..plan.hyper import AverageSettings


@dataclass(frozen=True)
class EMA:
    """Exponential moving average, as ``torch.optim.swa_utils.get_ema_multi_avg_fn``.

    The first averaged step copies the parameters; after that ``average += (1 - decay) * (param - average)``.
    The update itself writes it: 8 more bytes per float32 parameter, and no further launch.

    Attributes:
        decay: Weight of the old average, in [0, 1].
        every: Average after every so many steps, >= 1.
    """

    decay: float
    every: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        check.number("EMA", "decay", self.decay, 0.0, 1.0, ends="[]")
        check.whole("EMA", "every", self.every, 1)

    @property
    def settings(self) -> AverageSettings:
        """Return the average as the table holds it."""
        return AverageSettings("EMA", self.decay, self.every, self.every)


@dataclass(frozen=True)
class SWA:
    """Equal-weight average of the parameters, as ``torch.optim.swa_utils.AveragedModel``.

    Attributes:
        start: Number of the first step that enters the average, counted from 1.
        every: Average after every so many steps, >= 1.
    """

    start: int
    every: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        check.whole("SWA", "start", self.start, 1)
        check.whole("SWA", "every", self.every, 1)

    @property
    def settings(self) -> AverageSettings:
        """Return the average as the table holds it."""
        return AverageSettings("SWA", 0.0, self.start, self.every)


Average = EMA | SWA


@contextmanager
def swapped(pairs: Iterable[tuple[Tensor, Tensor, bool]]) -> Iterator[None]:
    """Swap the averages into the parameters, and restore the parameters on exit, even after an exception.

    Dense parameters exchange storage: nothing is copied, unless the average has another dtype. A strided view
    is part of a larger tensor, so its values are copied and copied back.

    Args:
        pairs: Parameters with their averages, of equal shapes, and whether a parameter must keep its memory.
    """
    undo: list[tuple[Tensor, Tensor, bool]] = []
    try:
        with torch.no_grad():
            for param, average, stays in pairs:
                dense = param.stride() == average.stride() and not stays
                undo.append((param, param.data if dense else param.data.clone(), dense))
                if dense:
                    param.data = average.to(param.dtype)
                else:
                    param.data.copy_(average)
        yield
    finally:
        with torch.no_grad():
            for param, kept, dense in reversed(undo):
                if dense:
                    param.data = kept
                else:
                    param.data.copy_(kept)
