"""Find the regimes of constant learning rates, and the window just above the convergence threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from ... import _checks as check
from ...optim.losses import loss_value

# last part of a run, over which losses and accuracies are averaged
_TAIL = 0.1
# margin above the accuracy of random guesses: half of that accuracy for ten classes
_ABOVE_CHANCE = 1.0 / 18.0
_LARGEST_BARRIER = 0.01
# upper end of the window over the threshold, without fine-tuning
_WINDOW = 2.0
_COLORS = {
    "slow": "#9aa3ad",
    "1": "#2a6fbb",
    "2A": "#2f9e44",
    "2B": "#e0a800",
    "2": "#e0a800",
    "3": "#c8501e",
}


@dataclass(frozen=True)
class Trial:
    """A training at a constant rate.

    Attributes:
        losses: Training loss of each epoch; the threshold depends on this number of epochs.
        accuracies: Accuracy on held-out data, of each epoch or the last ones, in [0, 1]; may be empty.
        tuned: Accuracy after fine-tuning at a low rate, or averaging, from the end of this training.
        barrier: Training error barrier between fine-tuning at a low and at a high rate, in [0, 1].
    """

    losses: tuple[float, ...]
    accuracies: tuple[float, ...] = ()
    tuned: float | None = None
    barrier: float | None = None


@dataclass(frozen=True)
class Point:
    """A learning rate and its regime.

    Attributes:
        lr: The rate.
        regime: ``"1"`` converges, ``"2A"`` and ``"2B"`` settle at a loss above zero (``"2"`` where nothing
            was fine-tuned), ``"3"`` diverges; ``"slow"`` is too low to converge within the epochs.
        epoch: First epoch, from 1, with a loss below the limit; None without one.
        loss: Mean training loss of the last tenth of the epochs.
        spread: Standard deviation of these losses.
        accuracy: Mean of the accuracies of the last tenth; NaN without any.
        trial: The measurements.
    """

    lr: float
    regime: str
    epoch: int | None
    loss: float
    spread: float
    accuracy: float
    trial: Trial


@dataclass(frozen=True)
class Regimes:
    """Result of ``find_regimes``.

    Attributes:
        points: All rates tried, ascending.
        threshold: Largest rate that converged and smallest above it that did not: 0 or infinity at the ends
            of the range. It grows with the number of epochs.
        divergence: Smallest rate of regime 3, or None.
        window: Interval of rates for pre-training, just above the threshold; None if all or none converge.
        best: Rate of regime 2A with the highest accuracy after fine-tuning; None if nothing was fine-tuned or
            no rate is in 2A.
    """

    points: tuple[Point, ...]
    threshold: tuple[float, float]
    divergence: float | None
    window: tuple[float, float] | None
    best: float | None

    def plot(self, ax: Any = None) -> Any:
        """Draw losses and accuracies over the rates; needs matplotlib (the extra ``plot``).

        Args:
            ax: Matplotlib axes to draw the losses into; None makes a figure. The accuracies get a twin of it.

        Returns:
            The axes of the losses.
        """
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(7, 4), layout="constrained", facecolor="white").subplots()
        for regime, color in _COLORS.items():
            members = [p for p in self.points if p.regime == regime]
            if members:
                floor = [max(p.loss, 1e-5) for p in members]
                ax.plot([p.lr for p in members], floor, "o", color=color, label=f"regime {regime}")
        ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="training loss at the end")
        if self.window is not None:
            ax.axvspan(*self.window, color=_COLORS["2A"], alpha=0.12, lw=0)
        other = ax.twinx()
        for label, style, value in (
            ("accuracy", "--", [p.accuracy for p in self.points]),
            ("accuracy, fine-tuned or averaged", "-", [_or_nan(p.trial.tuned) for p in self.points]),
        ):
            if not all(map(math.isnan, value)):
                other.plot([p.lr for p in self.points], value, style, color="#1f2430", lw=1.2, label=label)
        other.set_ylabel("accuracy")
        lines = [*ax.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
        # below the axes: inside them it would cover a curve
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 3}
        ax.legend(handles=lines, frameon=False, fontsize=8, **below)
        return ax


def find_regimes(
    train: Callable[[float], Trial | Mapping[str, Any]],
    lrs: Iterable[float],
    *,
    converged_loss: float = 1e-2,
    chance: float | None = None,
    precision: float = 1.05,
    max_runs: int = 12,
) -> Regimes:
    """Train at constant rates, find the convergence threshold by bisection, and name the regimes.

    A rate converges if the training loss of an epoch falls below ``converged_loss``. The threshold is the end
    of the first stretch of converging rates. Regime 3 starts at the smallest rate above the threshold where a
    loss is not finite, the accuracy stays that of random guesses or, without accuracies, the last losses are
    no lower than the first. A rate in between is in 2A if fine-tuning or averaging from its end is at least
    as accurate as the best of regime 1 and its barrier, if measured, is at most 1 %; otherwise in 2B.

    Args:
        train: Trains from scratch at a constant rate and returns a ``Trial``, or a mapping with its fields;
            ``pretrain_finetune(...).trial`` is one.
        lrs: Rates to begin with, > 0, at least two.
        converged_loss: Loss below which a training has converged, > 0.
        chance: Accuracy of random guesses, in (0, 1); needed to detect divergence from accuracies.
        precision: The bisection of the threshold stops when its ends are closer than this factor, > 1.
        max_runs: Largest number of trainings of the bisection.

    Returns:
        The regimes.

    Raises:
        TypeError: If ``train`` returns another type.
        ValueError: If an argument is out of range, or there are fewer than two rates.

    Source: regimes of Kodryan et al. 2022, arXiv:2209.03695, and Sadrtdinov et al. 2024, arXiv:2410.22113,
    who draw the boundaries by hand: the definition of convergence is theirs, the others are ours.
    """
    owner = "find_regimes"
    rates = sorted({check.number(owner, f"lrs[{i}]", lr, ends="()") for i, lr in enumerate(lrs)})
    if len(rates) < 2:
        check.fail(owner, "lrs", "hold at least two rates", rates)
    check.number(owner, "converged_loss", converged_loss, ends="()")
    check.number(owner, "precision", precision, 1.0, ends="()")
    check.whole(owner, "max_runs", max_runs)
    if chance is not None:
        check.number(owner, "chance", chance, 0.0, 1.0, ends="()")

    trials = {lr: _trial(owner, train(lr)) for lr in rates}
    for _ in range(max_runs):
        low, high = _threshold(trials, converged_loss)
        if not 0.0 < low < high < math.inf or high / low < precision:
            break
        middle = math.sqrt(low * high)
        trials[middle] = _trial(owner, train(middle))
    low, high = _threshold(trials, converged_loss)
    above = sorted(lr for lr in trials if lr > low)
    divergence = next((lr for lr in above if _diverged(trials[lr], chance)), None)
    return _named(trials, (low, high), divergence, converged_loss)


def _trial(owner: str, found: Any) -> Trial:
    """Return the validated result of a training."""
    if isinstance(found, Mapping):
        try:
            found = Trial(**found)
        except TypeError:
            check.fail(owner, "train", "return the fields of a Trial", sorted(found), error=TypeError)
    if not isinstance(found, Trial):
        check.fail(owner, "train", "return a Trial or a mapping", found, error=TypeError)
    losses = _numbers(owner, "losses", found.losses)
    accuracies = _numbers(owner, "accuracies", found.accuracies)
    if not losses:
        check.fail(owner, "losses", "hold the loss of each epoch", found.losses)
    tuned = None if found.tuned is None else loss_value(owner, "tuned", found.tuned)
    barrier = None if found.barrier is None else loss_value(owner, "barrier", found.barrier)
    return Trial(losses, accuracies, tuned, barrier)


def _numbers(owner: str, name: str, values: Any) -> tuple[float, ...]:
    """Return a sequence of numbers as floats."""
    try:
        found = list(values)
    except TypeError:
        check.fail(owner, name, "be a sequence of numbers", values, error=TypeError)
    return tuple(loss_value(owner, f"{name}[{i}]", x) for i, x in enumerate(found))


def _first_epoch(trial: Trial, limit: float) -> int | None:
    """Return the first epoch with a loss below the limit, from 1."""
    return next((i for i, loss in enumerate(trial.losses, 1) if loss < limit), None)


def _threshold(trials: Mapping[float, Trial], limit: float) -> tuple[float, float]:
    """Return the last rate of the first stretch of converging rates, and the next rate."""
    low, high = 0.0, math.inf
    for lr in sorted(trials):
        if _first_epoch(trials[lr], limit) is not None:
            low = lr
        elif low:
            return low, lr
        else:
            high = min(high, lr)
    return (low, math.inf) if low else (0.0, high)


def _tail(values: tuple[float, ...]) -> tuple[float, ...]:
    """Return the last tenth of the values, at least one."""
    return values[-max(1, round(_TAIL * len(values))) :]


def _diverged(trial: Trial, chance: float | None) -> bool:
    """Return whether a training diverged: regime 3."""
    if not all(map(math.isfinite, trial.losses)):
        return True
    if chance is not None and trial.accuracies:
        return fmean(_tail(trial.accuracies)) <= chance + _ABOVE_CHANCE * (1.0 - chance)
    return fmean(_tail(trial.losses)) >= trial.losses[0] and len(trial.losses) > 1


def _named(
    trials: Mapping[float, Trial], threshold: tuple[float, float], divergence: float | None, limit: float
) -> Regimes:
    """Name the regime of each rate, and choose the window."""
    low, high = threshold
    first = min((lr for lr in trials if _first_epoch(trials[lr], limit) is not None), default=math.inf)
    converged = [lr for lr in trials if first <= lr <= low]
    accuracies = [_accuracy(trials[lr]) for lr in converged]
    goal = max((accuracy for accuracy in accuracies if accuracy is not None), default=None)
    points = []
    for lr in sorted(trials):
        if lr in converged:
            regime = "1"
        elif lr < first and low:
            regime = "slow"
        elif divergence is not None and lr >= divergence:
            regime = "3"
        else:
            regime = _above_threshold(trials[lr], goal)
        points.append(_point(lr, regime, trials[lr], limit))
    good = [p for p in points if p.regime == "2A"]
    best = max(good, key=lambda p: p.trial.tuned or 0.0).lr if good else None
    window = None
    if 0.0 < low < high < math.inf:
        end = max(p.lr for p in good) if good else _WINDOW * high
        window = (high, max(high, min(end, divergence if divergence is not None else math.inf)))
    return Regimes(tuple(points), threshold, divergence, window, best)


def _above_threshold(trial: Trial, goal: float | None) -> str:
    """Return the regime of a training that settled at a loss above zero: 2A, 2B, or 2 without fine-tuning."""
    if trial.tuned is None or goal is None:
        return "2"
    near = trial.barrier is None or trial.barrier <= _LARGEST_BARRIER
    return "2A" if near and trial.tuned >= goal else "2B"


def _point(lr: float, regime: str, trial: Trial, limit: float) -> Point:
    """Return a rate with the statistics of its training."""
    tail = _tail(trial.losses)
    finite = all(map(math.isfinite, tail))
    return Point(
        lr=lr,
        regime=regime,
        epoch=_first_epoch(trial, limit),
        loss=fmean(tail) if finite else math.nan,
        spread=pstdev(tail) if finite else math.nan,
        accuracy=fmean(_tail(trial.accuracies)) if trial.accuracies else math.nan,
        trial=trial,
    )


def _accuracy(trial: Trial) -> float | None:
    """Return the best known accuracy of a converged training: after fine-tuning, or of the last epoch."""
    found = [*([] if trial.tuned is None else [trial.tuned]), *trial.accuracies[-1:]]
    return max(found, default=None)


def _or_nan(x: float | None) -> float:
    return math.nan if x is None else x
