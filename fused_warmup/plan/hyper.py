"""Hyper-parameters of parameter groups, and how the table holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

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
    """

    sphere: bool = False
    radius: float = 0.0
    schedule: Schedule | None = None
    weight_decay_schedule: Schedule | None = None

    def rates_at(self, t: int) -> tuple[float, float]:
        """Return learning rate and weight decay at the step with the 0-based index ``t``."""
        lr = self.lr * (self.schedule(t) if self.schedule else 1.0)
        decay = self.weight_decay_schedule(t) if self.weight_decay_schedule else 1.0
        return lr, self.weight_decay * decay


@dataclass(frozen=True)
class Settings:
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


def pack_hypers(hypers: Sequence[Hyper]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the columns Hyper, Segment and values of the groups; each schedule is packed once."""
    segments: list[tuple[float, ...]] = []
    values: list[float] = []
    places: dict[Schedule, tuple[int, int]] = {}

    def place(schedule: Schedule | None) -> tuple[int, int]:
        if schedule is None:
            return 0, 0
        if schedule not in places:
            places[schedule] = len(segments), len(schedule.segments)
            begin = 0
            for s in schedule.segments:
                kind = SEGMENT_KINDS.index(s.kind)
                segments.append((begin, s.steps or 0, s.start, s.end, s.shape, kind, len(values)))
                values.extend(s.values)
                begin += s.steps or 0
        return places[schedule]

    table = np.zeros(len(hypers), STRUCTS["Hyper"])
    plain = [f.name for f in fields(rules.Hyper) if f.name != "init"]
    for packed, h in zip(table, hypers, strict=True):
        for name in plain:
            packed[name] = getattr(h, name)
        packed["init"] = INIT_KINDS[h.init]
        packed["lr_segment"], packed["lr_segments"] = place(h.schedule)
        packed["decay_segment"], packed["decay_segments"] = place(h.weight_decay_schedule)
    return table, np.array(segments, STRUCTS["Segment"]), np.array(values, np.float64)
