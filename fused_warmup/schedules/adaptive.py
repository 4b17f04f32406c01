"""Closed-loop schedules, adapted during training from recorded losses."""

from __future__ import annotations

import base64
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
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


def to_text(schedule: Schedule | AdaptiveSchedule) -> str:
    """Return the state of a schedule, fixed or adaptive, as one line of JSON; waits for the device.

    A checkpoint that torch flattens keeps or replaces a text whole, whatever the progress of the schedule.
    Floats are exact, and tensors are entered as base64 of their memory.
    """
    state = schedule.to_dict() if isinstance(schedule, Schedule) else schedule.state_dict()
    return json.dumps(state, default=_encoded)


def restored(data: Mapping[str, Any] | str) -> Schedule | AdaptiveSchedule:
    """Return the schedule, fixed or adaptive, with this state.

    Args:
        data: A result of ``to_text``, or the state as a dictionary.

    Raises:
        ValueError: If something is missing, unknown or out of range; it is named.
    """
    state = _parsed(data) if isinstance(data, str) else data
    if not isinstance(state, Mapping) or state.get("format") not in _FORMATS:
        return from_dict(state)
    return _FORMATS[state["format"]]().from_state_dict(dict(state))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_hook=_decoded)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"state_dict: a schedule must be complete JSON, got {error.msg} at column {error.colno}."
        ) from None


def _encoded(value: Any) -> dict[str, Any]:
    """Return a tensor as types of JSON."""
    if not isinstance(value, Tensor):
        check.fail("state_dict", "a schedule", "hold tensors and plain types", value, error=TypeError)
    memory = value.detach().to("cpu").reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(value.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(value.shape), "base64": base64.b64encode(memory).decode()}


def _decoded(item: dict[str, Any]) -> Any:
    """Return the tensor that ``_encoded`` made to a dictionary, and any other dictionary as it is."""
    if item.keys() != {"dtype", "shape", "base64"}:
        return item
    memory = bytearray(base64.b64decode(item["base64"]))
    dtype, shape = getattr(torch, item["dtype"]), item["shape"]
    return torch.frombuffer(memory, dtype=dtype).reshape(shape) if memory else torch.empty(shape, dtype=dtype)
