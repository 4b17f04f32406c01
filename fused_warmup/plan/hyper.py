"""Hyper-parameters of parameter groups, and how the table holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch

from ..reference import rules
from ..schedules import SEGMENT_KINDS, Schedule
from .structs import INIT_KINDS, STRUCTS


@dataclass
class Hyper(rules.Hyper):
    """Hyper-parameters of one parameter group, with the schedules and the sphere that it may have.

    Attributes:
        sphere: Whether the group is kept on a sphere.
        radius: Norm to keep, 0 for the norm before the first step.
        schedule: Multiplier of the learning rate, or None.
        weight_decay_schedule: Multiplier of the weight decay, or None.
        param_rounding: How 16-bit parameters are rounded, one of ``reference.rounding.MODES``.
        state_dtype: Dtype of the states beside parameters of no more bits than 32.
        rounding_seed: Seed of the random bits of both, below 2**64.
    """

    sphere: bool = False
    radius: float = 0.0
    schedule: Schedule | None = None
    weight_decay_schedule: Schedule | None = None
    param_rounding: str = "nearest"
    state_dtype: torch.dtype = torch.float32
    rounding_seed: int = 0

    @property
    def rounds(self) -> bool:
        """Whether parameters or states are rounded in another way than to nearest."""
        return self.param_rounding != "nearest" or self.state_dtype is not torch.float32

    @property
    def rounded_state_dtype(self) -> torch.dtype | None:
        """Dtype of states that are rounded; None where they have that of the arithmetic."""
        return None if self.state_dtype is torch.float32 else self.state_dtype

    def rates_at(self, t: int) -> tuple[float, float]:
        """Return learning rate and weight decay at the step with the 0-based index ``t``."""
        lr = self.lr * (self.schedule(t) if self.schedule else 1.0)
        decay = self.weight_decay_schedule(t) if self.weight_decay_schedule else 1.0
        return lr, self.weight_decay * decay


class Settings(NamedTuple):
    """Per-step settings shared by all parameter groups.

    Attributes:
        max_grad_norm: Norm to clip to, or None.
        skip_nonfinite: Leave everything as it is when a gradient is not finite.
        measure: Whether the update must know the norms beforehand.
        init_norm_sq: Squared norm of the random start of the second moments.
    """

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    measure: bool = False
    init_norm_sq: float = 0.0


class AverageSettings(NamedTuple):
    """Average of the parameters that an optimizer keeps.

    Attributes:
        kind: ``"EMA"``, ``"SWA"`` or None for no average.
        decay: Weight of the old average.
        start: Number of the first step that is averaged, from 1.
        every: Average after every so many steps.
    """

    kind: str | None = None
    decay: float = 0.0
    start: int = 1
    every: int = 1

    def due_count(self, step: int) -> int:
        """Return how many of the first ``step`` updates are averaged."""
        return 0 if self.kind is None or step < self.start else (step - self.start) // self.every + 1


# fields of the struct before and after the start of the second moment, which is a code there
_NAMES = [field.name for field in fields(rules.Hyper)]
_INIT = _NAMES.index("init")
_before_init, _after_init = attrgetter(*_NAMES[:_INIT]), attrgetter(*_NAMES[_INIT + 1 :])

_NO_SEGMENTS, _NO_VALUES = np.zeros(0, STRUCTS["Segment"]), np.zeros(0, np.float64)

# first segment and number of segments of a schedule
Place = tuple[int, int]
# those of the learning rate and of the weight decay
Places = tuple[Place, Place]


def pack_rows(hypers: Sequence[Hyper], places: Sequence[Places], segments: int) -> np.ndarray:
    """Return the column Hyper.

    Args:
        hypers: Hyper-parameters of the groups.
        places: Places of their schedules in the column Segment.
        segments: Address of that column.
    """
    size = STRUCTS["Segment"].itemsize
    rows = [
        (
            *(*_before_init(h), INIT_KINDS[h.init], *_after_init(h)),
            *(n_lr, n_decay, 0, segments + size * lr, segments + size * decay),
        )
        for h, ((lr, n_lr), (decay, n_decay)) in zip(hypers, places, strict=True)
    ]
    return np.array(rows, STRUCTS["Hyper"])


def pack_schedules(hypers: Sequence[Hyper]) -> tuple[list[Places], np.ndarray, np.ndarray]:
    """Return the places of the schedules of each group, the column Segment and the values of all tables.

    Each schedule is packed once. The address of a table is counted from that of the values.
    """
    segments: list[tuple[float, ...]] = []
    values: list[float] = []
    equal: dict[Schedule, Place] = {}
    # the hash of a long table takes long, and groups often share one object
    same: dict[int, Place] = {id(None): (0, 0)}
    if all(h.schedule is None and h.weight_decay_schedule is None for h in hypers):
        return [((0, 0), (0, 0))] * len(hypers), _NO_SEGMENTS, _NO_VALUES

    def pack(schedule: Schedule) -> Place:
        place, begin = (len(segments), len(schedule.segments)), 0
        for s in schedule.segments:
            kind = SEGMENT_KINDS.index(s.kind)
            table = len(values) * _NO_VALUES.itemsize
            segments.append((begin, s.steps or 0, s.start, s.end, s.shape, table, kind, 0))
            values.extend(s.values)
            begin += s.steps or 0
        return place

    for h in hypers:
        for schedule in (h.schedule, h.weight_decay_schedule):
            if schedule is not None and id(schedule) not in same:
                if schedule not in equal:
                    equal[schedule] = pack(schedule)
                same[id(schedule)] = equal[schedule]
    places = [(same[id(h.schedule)], same[id(h.weight_decay_schedule)]) for h in hypers]
    return places, np.array(segments, STRUCTS["Segment"]), np.array(values, np.float64)
