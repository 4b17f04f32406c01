"""Schedules as functions of the number of steps made; the statements of ``csrc/schedules.h``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def segment_value(segment: Any, t: int) -> float:
    """Multiplier of one segment at its own step ``t >= 0``; the end value is held when it is over.

    A segment is what ``fused_warmup.schedules.Segment`` describes.
    """
    start: float = segment.start
    end: float = segment.end
    shape: float = segment.shape
    if segment.kind == "inverse_sqrt":
        return start / math.sqrt(1.0 + t / shape)
    if segment.kind == "warmup":
        t = t + 1
    if segment.steps is not None and t >= segment.steps:
        return end
    x = t / segment.steps if segment.steps is not None else 0.0
    match segment.kind:
        case "warmup" | "linear":
            return start + (end - start) * x
        case "cosine":
            return start + (end - start) * (0.5 * (1.0 - math.cos(math.pi * x)))
        case "exponential":
            return start * math.pow(end / start, x)
        case "polynomial":
            return start + (end - start) * (1.0 - math.pow(1.0 - x, shape))
        case "table":
            return float(segment.values[t])
        case _:
            return start


def multiplier(segments: Sequence[Any], t: int) -> float:
    """Multiplier at step ``t`` of a chain of segments; an empty chain is the constant 1."""
    if not segments:
        return 1.0
    i, begin = 0, 0
    while i + 1 < len(segments) and t >= begin + (segments[i].steps or 0):
        begin, i = begin + (segments[i].steps or 0), i + 1
    return segment_value(segments[i], t - begin)


def is_averaged(kind: str | None, start: int, every: int, step: int) -> bool:
    """Return whether update number ``step`` is averaged."""
    return kind is not None and step >= start and (step - start) % every == 0


def average_weight(kind: str | None, decay: float, n_averaged: int) -> float:
    """Weight of a parameter in its average, as value number ``n_averaged`` of it."""
    if kind == "SWA":
        return 1.0 / n_averaged
    return 1.0 if n_averaged == 1 else 1.0 - decay
