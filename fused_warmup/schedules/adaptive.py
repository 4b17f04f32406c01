"""Adaptive schedules, which change during training with the recorded losses, and how optimizers save them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from . import Schedule, from_dict

_loaders: dict[str, Callable[[Mapping[str, Any]], AdaptiveSchedule]] = {}


class AdaptiveSchedule(ABC):
    """A schedule that receives an optimizer's recorded losses and may change after each of them.

    Attributes:
        schedule: Current multiplier of ``lr`` over the steps; multipliers of past steps never change.
    """

    schedule: Schedule

    @abstractmethod
    def feed(self, loss: Tensor | float, source: object, counters: Tensor | None) -> bool:
        """Record the loss of the next step, and return whether ``schedule`` has changed.

        Args:
            loss: 0-dim tensor or number.
            source: The optimizer that records the loss; there must be only one.
            counters: The optimizer's counters on the device, with the updates made first; None before the
                first step.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain types, with a unique ``format``."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of ``state_dict``."""


def adaptive_schedules(groups: Iterable[Mapping[str, Any]]) -> list[AdaptiveSchedule]:
    """Return the adaptive schedules of parameter groups, each once."""
    found: list[AdaptiveSchedule] = []
    for group in groups:
        schedule = group.get("schedule")
        if isinstance(schedule, AdaptiveSchedule) and not any(schedule is other for other in found):
            found.append(schedule)
    return found


def register_format(name: str, load: Callable[[Mapping[str, Any]], AdaptiveSchedule]) -> None:
    """Register the function that restores an adaptive schedule from states of a format."""
    _loaders[name] = load


def restored(data: Mapping[str, Any]) -> Schedule | AdaptiveSchedule:
    """Return the schedule, adaptive or not, with the given state.

    Raises:
        ValueError: If an entry is missing, unknown or out of range; it is named.
    """
    name = data.get("format")
    if isinstance(name, str) and name in _loaders:
        return _loaders[name](data)
    return from_dict(data)
