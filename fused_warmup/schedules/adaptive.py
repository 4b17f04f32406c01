"""Schedules that change while training runs, and how an optimizer keeps them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from . import Schedule, from_dict

# classes of this package by the format of their state, imported when a state of one is loaded
_FORMATS = {"fused_warmup.autowu": ("tuning.autowu", "AutoWU")}


class AdaptiveSchedule(ABC):
    """A schedule that an optimizer feeds with the recorded losses and reads again when it has changed.

    Attributes:
        schedule: Multiplier of ``lr`` over the steps as it stands; what is over stays as it was.
    """

    schedule: Schedule

    @abstractmethod
    def feed(self, loss: Tensor | float, source: object, counters: Tensor | None) -> bool:
        """Take the loss of the step about to be made; True if ``schedule`` is another one now.

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
        """Take over what ``state_dict`` returned."""


def adaptive_schedules(groups: Iterable[Mapping[str, Any]]) -> list[AdaptiveSchedule]:
    """Return the live schedules of parameter groups, each once."""
    found = {id(s): s for group in groups if isinstance(s := group.get("schedule"), AdaptiveSchedule)}
    return list(found.values())


def restored(data: Mapping[str, Any]) -> Schedule | AdaptiveSchedule:
    """Return the schedule, live or not, whose state this is.

    Raises:
        ValueError: If something is missing, unknown or out of range; it is named.
    """
    if not isinstance(data.get("format"), str) or data["format"] not in _FORMATS:
        return from_dict(data)
    module, name = _FORMATS[data["format"]]
    cls = getattr(importlib.import_module(f".{module}", __package__), name)
    live: AdaptiveSchedule = cls.from_state_dict(data)
    return live
