"""Closed-loop schedules, adapted during training from recorded losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from . import Schedule, from_dict


class AdaptiveSchedule(ABC):
    """Schedule that an optimizer feeds with the recorded losses and reads again when it has changed.

    Attributes:
        schedule: Multiplier of ``lr`` over the steps; the part that is over does not change.
    """

    schedule: Schedule

    @abstractmethod
    def feed(self, loss: Tensor | float, source: object, counters: Tensor | None) -> bool:
        """Record the loss of the step about to be made; return whether ``schedule`` has changed.

        Args:
            loss: 0-dim tensor or number.
            source: The optimizer that feeds; there must be only one.
            counters: Its counters on the device, the updates made first; None before the first step.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain types, with a ``format`` of its own."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that ``state_dict`` returned."""

    @classmethod
    @abstractmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> AdaptiveSchedule:
        """Return a new schedule with a state that ``state_dict`` returned."""


# loaders of the classes, by the format of their state dicts
_FORMATS: dict[str, Callable[[], type[AdaptiveSchedule]]] = {}


def register(format: str, load: Callable[[], type[AdaptiveSchedule]]) -> None:
    """Register a class of adaptive schedules, so that optimizers can load its state.

    Args:
        format: Entry ``format`` of its state dicts.
        load: Returns the class; called when a state of that format is loaded, so that it may import it then.
    """
    _FORMATS[format] = load


def adaptive_schedules(groups: Iterable[Mapping[str, Any]]) -> list[AdaptiveSchedule]:
    """Return the adaptive schedules of parameter groups, each once."""
    found = {id(s): s for group in groups if isinstance(s := group.get("schedule"), AdaptiveSchedule)}
    return list(found.values())


def restored(data: Mapping[str, Any]) -> Schedule | AdaptiveSchedule:
    """Return the schedule, fixed or adaptive, with this state.

    Raises:
        ValueError: If something is missing, unknown or out of range; it is named.
    """
    if not isinstance(data.get("format"), str) or data["format"] not in _FORMATS:
        return from_dict(data)
    return _FORMATS[data["format"]]().from_state_dict(dict(data))
