"""Refine learning-rate schedules from the gradient norms of a previous run."""

from __future__ import annotations

import bisect
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ... import _checks as check
from ... import schedules
from ...schedules import Schedule
from .norms import read_norms

_POWERS = {"sgd": 2.0, "adam": 1.0}
# limits of norm range and peak, beyond which the loss went to zero and refinement does harm
_LARGEST_RANGE, _LATEST_PEAK, _START = 10.0, 0.5, 0.1
_FALLBACK_WARMUP = 0.05
ADVICE = (
    "A loss that goes to zero takes its gradients with it, and the schedule would learn at the end of the "
    "run only: take the fallback, warmup and linear decay, or a higher floor."
)


@dataclass(frozen=True)
class PolynomialFit:
    """Linear warmup and polynomial decay fitted to a schedule.

    Attributes:
        warmup: Steps of linear warmup over all steps.
        power: Power of the decay.
        rmse: Root mean square of the differences.
        schedule: The fit, with the length of the original schedule.
    """

    warmup: float
    power: float
    rmse: float
    schedule: Schedule


@dataclass(frozen=True)
class Refinement:
    """A refined schedule with diagnostics.

    Attributes:
        schedule: A table with maximum 1 and last value 0.
        smoothed: Norms after smoothing and resampling, float64 of ``[steps]``.
        width: Width of the median filter, in recorded steps.
        raised: Number of norms raised to the floor.
        dropped: Number of non-finite norms.
        norm_range: Largest over smallest smoothed norm after the first tenth.
        peak: Step of the maximum over the number of steps.
        trouble: Reasons not to use the schedule; empty if there are none.
        fallback: Warmup over a twentieth of the steps and linear decay, to use instead.
    """

    schedule: Schedule
    smoothed: np.ndarray
    width: int
    raised: int
    dropped: int
    norm_range: float
    peak: float
    trouble: tuple[str, ...]
    fallback: Schedule

    def fit(self) -> PolynomialFit:
        """Return the warmup and polynomial decay closest to the schedule, see ``fit_polynomial``."""
        return fit_polynomial(self.schedule)


def refine_schedule(
    norms: Any,
    kind: str = "adam",
    smoothing: float = 0.1,
    steps: int | None = None,
    *,
    on_trouble: str = "warn",
    **options: Any,
) -> Schedule:
    """Return the learning-rate schedule refined from the gradient norms of a previous run.

    Record a run with a good schedule, such as warmup and linear decay; refine; then tune the peak rate again
    and train with the result, which includes a warmup.

    If the norms collapse (training loss near zero) the refined schedule would learn only at the very end and
    do worse than linear decay; this case is detected, see ``on_trouble``.

    Args:
        norms: As for ``refinement``.
        kind: ``"sgd"`` or ``"adam"``, as for ``refinement``.
        smoothing: As for ``refinement``.
        steps: Length of the schedule; None takes that of the recording.
        on_trouble: Reaction to collapsing norms: ``"warn"``, ``"raise"``, ``"fallback"`` to warmup and linear
            decay, or ``"ignore"``.
        options: Further arguments of ``refinement``.

    Returns:
        A table of multipliers for ``schedule=``: maximum 1, last value 0, which is held in a longer run.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range, a file was cut short, or ``on_trouble="raise"``.
        OSError: If a file cannot be read.

    Example:
        >>> s = fw.tuning.refine_schedule(opt.telemetry, kind="adam")
        >>> opt = fw.AdamW(model.parameters(), lr=2e-3, schedule=s)

    Source: Defazio, Cutkosky, Mehta & Mishchenko 2023, arXiv:2310.07831.
    """
    owner = "refine_schedule"
    check.one_of(owner, "on_trouble", on_trouble, ("warn", "raise", "fallback", "ignore"))
    found = refinement(norms, kind, smoothing, steps, **options)
    if not found.trouble or on_trouble == "ignore":
        return found.schedule
    if on_trouble == "raise":
        check.fail(owner, "norms", "not collapse during the run", " and ".join(found.trouble), ADVICE)
    if on_trouble == "warn":
        warnings.warn(f"{owner}: {' and '.join(found.trouble)}. {ADVICE}", stacklevel=2)
    return found.fallback if on_trouble == "fallback" else found.schedule


def refinement(
    norms: Any,
    kind: str = "adam",
    smoothing: float = 0.1,
    steps: int | None = None,
    *,
    power: float | None = None,
    width: int | None = None,
    floor: float = 1e-3,
    interpolation: str = "linear",
    zero_last: bool = True,
    column: str | None = None,
    parity: bool = False,
) -> Refinement:
    """Refine a schedule from gradient norms, and return it with its diagnostics.

    The norms are smoothed, and each step gets the weight ``w = smoothed ** -power``. The schedule is
    ``rate[t] = w[t] * (w[t+1] + ... + w[T-1])``, divided by its maximum. Constant norms give linear decay, a
    spike at the start gives a warmup.

    Args:
        norms: ``opt.telemetry``, its ``history()``, the path of a CSV file with a header line, or numbers of
            shape ``[steps]``: norms of the gradients of all parameters together, one per update, before
            clipping. Non-finite ones are left out without moving the others.
        kind: ``"sgd"`` for L2 norms and power 2; ``"adam"`` and similar rules: L1 norms and power 1.
        smoothing: Width of the median filter as a fraction of the run, in [0, 1]; 0 does not smooth. The
            filter extends the run by its first norm on the left and by reflection on the right.
        steps: Length of the schedule, to which the norms are resampled; None takes that of the recording.
        power: Exponent of the weights instead of that of ``kind``, >= 0.
        width: Width of the median filter instead of ``smoothing``: an odd number of recorded steps.
        floor: Norms below this fraction of their median are raised to it, in (0, 1].
        interpolation: Interpolation of the resampled norms, ``"linear"`` or ``"log"``.
        zero_last: Whether the last rate is 0; False adds a step's own weight to the sum.
        column: Column of a file or history to take instead of ``grad_norm`` or ``grad_norm_l1``.
        parity: Resample to ``steps`` before smoothing if that is longer, and take the width from ``steps``,
            as the authors' code does.

    Returns:
        The schedule with its smoothed norms and diagnostics.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range, or a file was cut short.
        OSError: If a file cannot be read.

    Source: Defazio, Cutkosky, Mehta & Mishchenko 2023, arXiv:2310.07831, algorithms 1 and 2; boundaries of
    the filter as in the authors' code. The paper leaves open whether norms are those before clipping.
    """
    owner = "refine_schedule"
    recorded = read_norms(owner, norms, kind, column)
    tau = check.number(owner, "smoothing", smoothing, 0.0, 1.0, ends="[]")
    length = len(recorded) if steps is None else check.whole(owner, "steps", steps, 2)
    exponent = _POWERS[kind] if power is None else check.number(owner, "power", power)
    least = check.number(owner, "floor", floor, 0.0, 1.0, ends="(]")
    check.one_of(owner, "interpolation", interpolation, ("linear", "log"))
    check.flag(owner, "zero_last", zero_last)
    if width is None:
        width = filter_width(tau, length if check.flag(owner, "parity", parity) else len(recorded))
    elif check.whole(owner, "width", width, 1) % 2 == 0:
        check.fail(owner, "width", "be odd", width)

    places = np.flatnonzero(np.isfinite(recorded))
    kept = recorded[places]
    lowest = max(float(np.finfo(np.float64).tiny), least * float(np.median(kept)))
    raised = np.maximum(kept, lowest)
    if parity and len(recorded) < length:
        smoothed = median_filter(_resampled(places, raised, len(recorded), length, interpolation), width)
    else:
        smoothed = _resampled(places, median_filter(raised, width), len(recorded), length, interpolation)
    table = _rates(smoothed, exponent, zero_last)
    if not table.any():
        check.fail(owner, "power", "leave two steps a weight above 0", exponent)
    later = smoothed[int(_START * length) :].tolist()
    spread, peak = max(later) / min(later), int(table.argmax()) / length
    ramp = max(1, round(_FALLBACK_WARMUP * length))
    return Refinement(
        schedule=schedules.table(table),
        smoothed=smoothed,
        width=width,
        raised=int((kept < lowest).sum()),
        dropped=len(recorded) - len(kept),
        norm_range=spread,
        peak=peak,
        trouble=_trouble(spread, peak),
        fallback=schedules.warmup(ramp).then(schedules.linear(1.0, 0.0, max(1, length - ramp))),
    )


def refine_groups(norms: Any, **options: Any) -> list[Schedule]:
    """Refine a schedule for each parameter group, tensor or coordinate from its own norms: a heuristic.

    The theory covers one weight per step. For one weight per coordinate the natural extension of its bound is
    false: there are convex counterexamples with two steps. Each schedule has the maximum 1; the groups'
    learning rates set the scale.

    Args:
        norms: Norms of shape ``[steps, groups]``.
        options: As for ``refine_schedule``.

    Returns:
        One schedule per group, for ``schedule`` of the parameter groups.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has a wrong type.
    """
    columns = norms.detach().cpu() if isinstance(norms, torch.Tensor) else norms
    try:
        array = np.asarray(columns, dtype=np.float64)
    except (TypeError, ValueError):
        check.fail("refine_groups", "norms", "be numbers", norms, error=TypeError)
    if array.ndim != 2:
        check.fail("refine_groups", "norms", "have the shape [steps, groups]", array.shape)
    return [refine_schedule(column, **options) for column in array.T]


def filter_width(smoothing: float, steps: int) -> int:
    """Return the odd width of a median filter over the fraction ``smoothing`` of the steps."""
    return 2 * (int(smoothing * steps) // 2) + 1


def median_filter(values: np.ndarray, width: int) -> np.ndarray:
    """Return running medians of values extended by the first one on the left and by reflection on the right.

    Args:
        values: float64 array of ``[n]``.
        width: Odd.

    Returns:
        float64 array of ``[n]``, each entry one of the values.
    """
    if width == 1:
        return values
    n, half = len(values), width // 2
    period = max(1, 2 * (n - 1))
    beyond = np.arange(n, n + half) % period
    right = values[np.where(beyond < n, beyond, period - beyond)]
    padded = np.concatenate([np.full(half, values[0]), values, right])
    try:
        from scipy.ndimage import median_filter as filtered
    except ImportError:
        return _running_medians(padded, width)
    found: np.ndarray = filtered(padded, size=width)[half : half + n]
    return found


def _running_medians(padded: np.ndarray, width: int) -> np.ndarray:
    """Return the medians of all windows that fit, from a sorted window: the fallback without scipy."""
    values = padded.tolist()
    window = sorted(values[:width])
    medians = [window[width // 2]]
    for old, new in zip(values[:-width], values[width:], strict=True):
        del window[bisect.bisect_left(window, old)]
        bisect.insort(window, new)
        medians.append(window[width // 2])
    return np.array(medians)


def _resampled(places: np.ndarray, values: np.ndarray, n: int, steps: int, interpolation: str) -> np.ndarray:
    """Interpolate values known at some of ``n`` equidistant places at ``steps`` places of the same range."""
    if len(places) == n == steps:
        return values
    at = np.linspace(0.0, 1.0, steps)
    known = np.linspace(0.0, 1.0, n)[places.astype(np.int64)]
    if interpolation == "log":
        return np.asarray(np.exp(np.interp(at, known, np.log(values))))
    return np.asarray(np.interp(at, known, values))


def _rates(smoothed: np.ndarray, power: float, zero_last: bool) -> np.ndarray:
    """Return the refined rates with maximum 1; all are 0 if only one step has a weight above 0."""
    # the scale of the norms cancels; dividing by the smallest keeps all weights within (0, 1]
    weights: np.ndarray = (smoothed.min() / smoothed) ** power
    tails = np.cumsum(weights[::-1])[::-1]
    rates: np.ndarray = weights * (np.append(tails[1:], 0.0) if zero_last else tails)
    return rates / (rates.max() or 1.0)


def _trouble(spread: float, peak: float) -> tuple[str, ...]:
    """Return the signs that the norms collapse during the run."""
    found = []
    if spread > _LARGEST_RANGE:
        found.append(f"the norms after the first tenth of the run range over a factor of {spread:.3g}")
    if peak > _LATEST_PEAK:
        found.append(f"the rate peaks after {peak:.0%} of the run")
    return tuple(found)


def fit_polynomial(schedule: Schedule, steps: int | None = None) -> PolynomialFit:
    """Fit linear warmup and polynomial decay to a schedule, by least squares on a grid.

    Args:
        schedule: Schedule to fit.
        steps: Length of the schedule; None takes its own.

    Returns:
        The fit; the grid has warmups up to 0.6 in steps of 0.01 and powers from 0.1 to 6 in steps of 0.05.

    Raises:
        TypeError: If the schedule has no end and ``steps`` is None.
        ValueError: If ``steps`` is below 2.

    Source: Defazio et al. 2023, arXiv:2310.07831, who print such fits beside their refined schedules.
    """
    n = check.whole("fit_polynomial", "steps", len(schedule) if steps is None else steps, 2)
    target = schedule.values(n)
    at = np.unique(np.linspace(0, n - 1, min(n, 500)).astype(np.int64))
    powers = np.arange(0.1, 6.025, 0.05)
    best = (np.inf, 0, 1.0)
    for ramp in sorted({round(fraction * n) for fraction in np.arange(0.0, 0.605, 0.01)}):
        left = 1.0 - (at[at >= ramp] - ramp) / (n - ramp)
        errors = np.square(left ** powers[:, None] - target[at[at >= ramp]]).sum(1)
        errors += np.square((at[at < ramp] + 1) / max(1, ramp) - target[at[at < ramp]]).sum()
        k = int(errors.argmin())
        best = min(best, (float(errors[k]), ramp, float(powers[k])))
    _, ramp, power = best
    decay = schedules.polynomial(1.0, 0.0, n - ramp, power)
    fit = schedules.warmup(ramp).then(decay) if ramp else decay
    rmse = float(np.sqrt(np.square(fit.values(n) - target).mean()))
    return PolynomialFit(ramp / n, power, rmse, fit)
