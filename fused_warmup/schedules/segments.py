"""Learning-rate schedules as data: segments that a backend evaluates from its own step counter.

A schedule is a tuple of segments. ``s(t)`` is a multiplier of ``lr``, where ``t`` is the 0-based index of
the step being made, so ``torch.optim.lr_scheduler.LambdaLR(opt, s)`` and ``schedule=s`` train the same.

Example:
    >>> from fused_warmup import schedules
    >>> s = schedules.warmup(4).then(schedules.linear(1.0, 0.0, 4))
    >>> s.values(9).tolist()
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from .. import _checks as check
from ..reference.schedules import multiplier

__all__ = [
    "Schedule",
    "Segment",
    "constant",
    "cosine",
    "exponential",
    "from_json",
    "inverse_sqrt",
    "linear",
    "parallel_warmup",
    "polynomial",
    "table",
    "warmup",
]

# in the order of enum SegmentKind in csrc/table.h
SEGMENT_KINDS = (
    "warmup",
    "constant",
    "linear",
    "cosine",
    "exponential",
    "polynomial",
    "inverse_sqrt",
    "table",
)

_FORMAT = "fused_warmup.schedule"
_VERSION = 1


@dataclass(frozen=True)
class Segment:
    """One stretch of a schedule.

    Attributes:
        kind: Name of the shape, one of ``SEGMENT_KINDS``.
        steps: Length in optimizer steps, or None for one that never ends.
        start: Multiplier at the beginning.
        end: Multiplier at the end, held afterwards when nothing follows.
        shape: Power of a polynomial or time scale of an inverse square root, in steps.
        values: Multipliers of a table, one per step.
    """

    kind: str
    steps: int | None
    start: float
    end: float
    shape: float = 0.0
    # a table may have a value for every step of a long training: too long to print
    values: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Schedule:
    """A multiplier of the learning rate (or weight decay) as a function of the step.

    Attributes:
        segments: Stretches in the order in which they run.
    """

    segments: tuple[Segment, ...]

    def __call__(self, t: int) -> float:
        """Return the multiplier at step ``t``.

        Args:
            t: 0-based index of the step being made.

        Returns:
            The multiplier, dimensionless, computed in double precision.

        Raises:
            ValueError: If ``t`` is negative.
        """
        return multiplier(self.segments, check.whole("Schedule", "t", t))

    def __len__(self) -> int:
        """Return the number of steps until the end value is reached.

        Raises:
            TypeError: If the schedule has no end.
        """
        if self.segments and self.segments[-1].steps is None:
            raise TypeError(
                f"Schedule: len() must be asked of one that ends, got {self.segments[-1].kind} as the last."
            )
        return sum(segment.steps or 0 for segment in self.segments)

    def __bool__(self) -> bool:
        """Return True, also for a schedule without steps."""
        return True

    def then(self, other: Schedule) -> Schedule:
        """Return this schedule followed by another one, which starts at its own step 0.

        Args:
            other: Schedule that begins when this one ends.

        Returns:
            The joined schedule.

        Raises:
            TypeError: If ``other`` is not a schedule.
            ValueError: If this schedule has no end.
        """
        if not isinstance(other, Schedule):
            check.fail("Schedule", "other", "be a Schedule", other, error=TypeError)
        if not self.segments:
            return other
        if self.segments[-1].steps is None:
            check.fail(
                "Schedule", "then()", "follow a schedule that ends", self.segments[-1].kind, "Give it steps=."
            )
        return Schedule(self.segments + other.segments)

    def values(self, n: int) -> np.ndarray:
        """Return the multipliers of the first ``n`` steps.

        Args:
            n: Number of steps.

        Returns:
            float64 array of shape ``[n]``.
        """
        return np.array([self(t) for t in range(check.whole("Schedule", "n", n))], dtype=np.float64)

    def plot(self, n: int | None = None, ax: Any = None) -> Any:
        """Draw the multiplier over the steps; needs matplotlib (the extra ``plot``).

        Args:
            n: Number of steps to draw; None draws the whole schedule and a tenth more.
            ax: Matplotlib axes to draw into; None makes a figure.

        Returns:
            The axes.
        """
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(6, 3), layout="constrained").subplots()
        ax.plot(self.values(n if n is not None else len(self) + max(1, len(self) // 10)))
        ax.set(xlabel="step", ylabel="multiplier")
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as plain types, which ``torch.load(weights_only=True)`` accepts."""
        segments = [_plain(segment) for segment in self.segments]
        return {"format": _FORMAT, "version": _VERSION, "segments": segments}

    def to_json(self) -> str:
        """Return the schedule as JSON text; ``from_json`` reads it back exactly."""
        return json.dumps(self.to_dict(), indent=2)


# LambdaLR keeps a schedule in its own state dict, which torch.load must then accept
torch.serialization.add_safe_globals([Schedule, Segment])


def from_dict(data: Any) -> Schedule:
    """Return the schedule that ``Schedule.to_dict`` described.

    Args:
        data: A result of ``to_dict``.

    Returns:
        An equal schedule.

    Raises:
        ValueError: If an entry is missing, unknown or out of range; it is named.
    """
    if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
        check.fail(
            "from_json",
            "format",
            f"be {_FORMAT!r}",
            data.get("format") if isinstance(data, Mapping) else data,
        )
    if data.get("version") != _VERSION:
        check.fail(
            "from_json",
            "version",
            f"be {_VERSION}",
            data.get("version"),
            "It was written by another release.",
        )
    items = data.get("segments")
    if not isinstance(items, list):
        check.fail("from_json", "segments", "be a list of segments", items)
    schedule = Schedule(())
    for i, item in enumerate(items):
        schedule = schedule.then(_segment(item, i))
    return schedule


def from_json(text: str) -> Schedule:
    """Return the schedule that ``Schedule.to_json`` wrote.

    Args:
        text: JSON text.

    Returns:
        An equal schedule.

    Raises:
        ValueError: If the text was cut short or altered; the line is named.
        TypeError: If it is not a string.
    """
    if not isinstance(text, str):
        check.fail("from_json", "text", "be a string", text, error=TypeError)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"from_json: text must be complete JSON, got {error.msg} "
            f"at line {error.lineno}, column {error.colno}."
        ) from None
    return from_dict(data)


def _segment(item: Any, i: int) -> Schedule:
    """Rebuild one segment by its public function, which validates it."""
    where = f"segments[{i}]"
    if not isinstance(item, Mapping):
        check.fail("from_json", where, "be an object", item)
    keys = ("kind", "steps", "start", "end", "shape", "values")
    if sorted(item) != sorted(keys):
        check.fail("from_json", where, "have the keys " + ", ".join(keys), sorted(item))
    kind, steps, start, end, shape, values = (item[key] for key in keys)
    check.one_of("from_json", f"{where}.kind", kind, SEGMENT_KINDS)
    if not isinstance(values, list):
        check.fail("from_json", f"{where}.values", "be a list", values)
    try:
        match kind:
            case "warmup":
                schedule = warmup(steps, start)
            case "constant":
                schedule = constant(start, steps)
            case "polynomial":
                schedule = polynomial(start, end, steps, shape)
            case "inverse_sqrt":
                schedule = inverse_sqrt(shape)
            case "table":
                schedule = table(values)
            case _:
                schedule = {"linear": linear, "cosine": cosine, "exponential": exponential}[kind](
                    start, end, steps
                )
    except (TypeError, ValueError) as error:
        raise ValueError(f"from_json: {where} must be a valid segment, got: {error}") from None
    for key, value in _plain(schedule.segments[0]).items():
        if item[key] != value:
            check.fail("from_json", f"{where}.{key}", f"be {value!r} in a segment {kind}", item[key])
    return schedule


def _plain(segment: Segment) -> dict[str, Any]:
    """Return a segment as plain types."""
    return {**asdict(segment), "values": list(segment.values)}


def warmup(steps: int, start: float = 0.0) -> Schedule:
    """Return a linear warmup ``start + (1 - start) * (t + 1) / steps``, whose last step has the full rate.

    Args:
        steps: Length; 0 is no warmup, a schedule without steps.
        start: Multiplier before the first step, >= 0.

    Returns:
        The schedule; 1 is held afterwards.

    Source: Kalra & Barkeshli 2024, arXiv:2406.09405, with the step index of the authors' code.
    """
    if check.whole("warmup", "steps", steps) == 0:
        check.number("warmup", "start", start)
        return Schedule(())
    return _ramp("warmup", start, 1.0, steps)


def parallel_warmup(steps: int, start: float) -> Schedule:
    """Return a warmup as steep as ``warmup(steps)`` that begins higher: ``min(1, start + (t + 1) / steps)``.

    With the critical rate over the target rate as ``start`` it skips the steps below the critical rate.

    Args:
        steps: Length of the parallel ``warmup(steps)``; 0 is no warmup.
        start: Multiplier before the first step, >= 0.

    Returns:
        The schedule; 1 is held afterwards.

    Source: Kalra & Barkeshli 2024, arXiv:2406.09405, section 5.1.
    """
    name = "parallel_warmup"
    n, first = check.whole(name, "steps", steps), check.number(name, "start", start)
    below = sum(first + (t + 1) / n < 1.0 for t in range(n))
    if not below:
        return constant()
    return linear(first + 1 / n, first + (below + 1) / n, below).then(constant())


def constant(value: float = 1.0, steps: int | None = None) -> Schedule:
    """Return a constant multiplier.

    Args:
        value: Multiplier, >= 0.
        steps: Length in steps, or None for no end.

    Returns:
        The schedule.
    """
    value = check.number("constant", "value", value)
    length = None if steps is None else check.whole("constant", "steps", steps, 1)
    return Schedule((Segment("constant", length, value, value),))


def linear(start: float, end: float, steps: int) -> Schedule:
    """Return a linear schedule ``start + (end - start) * t / steps``.

    Args:
        start: Multiplier at t = 0, >= 0.
        end: Multiplier from t = steps on, >= 0.
        steps: Length, at least 1 step.

    Returns:
        The schedule.

    Source: Defazio et al. 2023, arXiv:2310.07831, for decay to zero.
    """
    return _ramp("linear", start, end, steps)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """Return half a cosine wave ``start + (end - start) * (1 - cos(pi * t / steps)) / 2``.

    Args:
        start: Multiplier at t = 0, >= 0.
        end: Multiplier from t = steps on, >= 0.
        steps: Length, at least 1 step.

    Returns:
        The schedule.
    """
    return _ramp("cosine", start, end, steps)


def exponential(start: float, end: float, steps: int) -> Schedule:
    """Return an exponential growth or decay ``start * (end / start) ** (t / steps)``.

    Args:
        start: Multiplier at t = 0, > 0.
        end: Multiplier from t = steps on, > 0.
        steps: Length, at least 1 step.

    Returns:
        The schedule.
    """
    check.number("exponential", "start", start, ends="()")
    check.number("exponential", "end", end, ends="()")
    return _ramp("exponential", start, end, steps)


def polynomial(start: float, end: float, steps: int, power: float = 1.0) -> Schedule:
    """Return a polynomial decay ``end + (start - end) * (1 - t / steps) ** power``, as torch's PolynomialLR.

    Args:
        start: Multiplier at t = 0, >= 0.
        end: Multiplier from t = steps on, >= 0.
        steps: Length, at least 1 step.
        power: Exponent, > 0.

    Returns:
        The schedule.
    """
    return _ramp("polynomial", start, end, steps, check.number("polynomial", "power", power, ends="()"))


def inverse_sqrt(timescale: float) -> Schedule:
    """Return the decay ``1 / sqrt(1 + t / timescale)``, without end.

    Args:
        timescale: Steps after which the multiplier is ``1 / sqrt(2)``, > 0.

    Returns:
        The schedule.
    """
    shape = check.number("inverse_sqrt", "timescale", timescale, ends="()")
    return Schedule((Segment("inverse_sqrt", None, 1.0, 0.0, shape),))


def table(values: Iterable[float]) -> Schedule:
    """Return a table with one multiplier per step; the last one is held.

    Args:
        values: Multipliers, each >= 0; at least one.

    Returns:
        The schedule.

    Raises:
        ValueError: If there are no values, or one of them is negative or not finite; it is named.
    """
    entries = tuple(check.number("table", f"values[{t}]", value) for t, value in enumerate(values))
    if not entries:
        check.fail("table", "values", "hold at least one multiplier", entries)
    return Schedule((Segment("table", len(entries), entries[0], entries[-1], values=entries),))


def _ramp(kind: str, start: float, end: float, steps: int, shape: float = 0.0) -> Schedule:
    """Build a segment from ``start`` to ``end``."""
    first = check.number(kind, "start", start)
    last = check.number(kind, "end", end)
    return Schedule((Segment(kind, check.whole(kind, "steps", steps, 1), first, last, shape),))
