"""Search for the critical learning rate: evaluates the loss along the next step of an optimizer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from .. import _checks as check
from .hvp import Hessian
from .loss_evaluator import Loss, LossEvaluator
from .operators import evaluator_of
from .pending_step import PendingStep
from .result import RateSearch
from .vectors import dot

# one closure, or one for each of several batches
Losses = Loss | Sequence[Loss]

_MOST_FORWARDS = 128


class Line:
    """The loss at ``param - eta * direction``, for the direction of a pending step.

    Args:
        evaluator: An entered ``LossEvaluator`` over the parameters of ``pending``.
        pending: The step.
        like: Line along whose direction this one goes, with the loss of another batch; None for the direction
            of the step.

    Attributes:
        forwards: Evaluations of the loss so far, the one at ``eta = 0`` included.
        direction: The direction, ``[n]``.
        start: Loss at ``eta = 0``.
        slope: Decrease of the loss per unit of ``eta`` at ``eta = 0``, its increase for an optimizer that
            ascends; that of the other for a line like another one.
    """

    def __init__(self, evaluator: LossEvaluator, pending: PendingStep, like: Line | None = None) -> None:
        self._evaluator, self._sign = evaluator, pending.sign
        self.slope: float
        self.direction: Tensor
        toward = self._toward(pending) if like is None else (like.slope, like.direction)
        self.slope, self.direction = toward
        self.forwards = 0
        self.start = self.loss(0.0)

    def _toward(self, pending: PendingStep) -> tuple[float, Tensor]:
        """Return the slope along the direction of a step, and that direction, ``[n]``."""
        grads = pending.grads_of(Hessian(self._evaluator))
        directions = pending.directions(grads)
        pairs = zip(grads, directions, strict=True)
        slope = float(pending.shards.total([dot(g.to(u.dtype), u) for g, u in pairs]))
        return self._sign * slope, self._evaluator.vectors.flat(directions)

    @torch.no_grad()
    def loss(self, eta: float) -> float:
        """Return the loss at ``eta``, negated for an optimizer that ascends; infinity if not finite."""
        vectors = self._evaluator.vectors
        vectors.perturb(self.direction, None, vectors.number(-eta))
        self.forwards += 1
        value = self._sign * self._evaluator.mean(self._evaluator.value())
        return value if math.isfinite(value) else math.inf


def closures_of(owner: str, loss_fn: Losses) -> list[Loss]:
    """Return the closures of all batches.

    Raises:
        TypeError: If one is not callable.
        ValueError: If there is none.
    """
    closures = list(loss_fn) if isinstance(loss_fn, Sequence) else [loss_fn]
    if not closures:
        check.fail(owner, "loss_fn", "hold at least one closure", closures)
    for i, closure in enumerate(closures):
        if not callable(closure):
            name = f"loss_fn[{i}]" if isinstance(loss_fn, Sequence) else "loss_fn"
            check.fail(owner, name, "be a function that returns the loss", closure, error=TypeError)
    return closures


def mean_of(closures: Sequence[Loss]) -> Loss:
    """Return a closure of the mean loss of all batches."""
    if len(closures) == 1:
        return closures[0]

    def mean_loss() -> Tensor:
        first, *others = (closure() for closure in closures)
        return sum(others, first) / len(closures)

    return mean_loss


def search_batches(
    pending: PendingStep,
    closures: Sequence[Loss],
    reduce: bool,
    search: Callable[[Line], RateSearch],
    search_one: Callable[[Line, RateSearch], RateSearch] | None = None,
) -> RateSearch:
    """Search along the mean loss of all batches, then along the same direction for each of them alone.

    Args:
        pending: The step.
        closures: Closures of the batches.
        reduce: As for ``top_eigenvalue``.
        search: Searches along a line.
        search_one: Searches along the line of one batch, given the result for the mean; None for ``search``.
    """
    with evaluator_of(pending, mean_of(closures), reduce) as evaluator:
        line = Line(evaluator, pending)
        found = search(line)
    if len(closures) == 1:
        return found
    batches = []
    for closure in closures if math.isfinite(found.value) else ():
        with evaluator_of(pending, closure, reduce) as evaluator:
            own = Line(evaluator, pending, line)
            batches.append(search(own) if search_one is None else search_one(own, found))
    forwards = len(closures) * found.forwards + sum(batch.forwards for batch in batches)
    return replace(found, forwards=forwards, err_batch=_spread(batches), batches=tuple(batches))


def _spread(batches: Sequence[RateSearch]) -> float:
    """Return the mean distance between the rates of two batches, NaN without any."""
    rates = [batch.value for batch in batches]
    if not all(map(math.isfinite, rates)):
        return math.inf
    return fmean(abs(a - b) for a, b in itertools.combinations(rates, 2)) if rates else math.nan


def critical_lr(
    loss_fn: Losses,
    optimizer: torch.optim.Optimizer,
    *,
    previous: RateSearch | float | None = None,
    start: float | None = None,
    use_grad: bool = True,
    reduce: bool = False,
) -> RateSearch:
    """Find the smallest learning rate at which the step about to be made would raise the loss.

    With ``maximize`` it is the smallest rate at which the step would lower the loss.

    It is the critical rate of this one direction, not ``2 / top_eigenvalue``: the two come close only at the
    edge of stability. All state is restored afterwards.

    Args:
        loss_fn: Returns the loss of the same batch each time; runs without gradients. A sequence of closures,
            one for each of several batches, searches along their mean loss and then for each alone, from the
            rate found; the gradients in ``.grad`` should be those of the mean.
        optimizer: As for ``preconditioned``.
        previous: Result of the last search, as a warm start: about 4 evaluations instead of 13, for a bracket
            of an eighth instead of a sixteenth. That of another batch shows in ``err_batch`` how far the
            rates of two batches lie apart.
        start: First rate of a search without ``previous``; the current learning rate if None.
        use_grad: Use the gradients in ``.grad`` if there are any; otherwise they cost one backward pass.
        reduce: As for ``top_eigenvalue``.

    Returns:
        The middle of the bracket ``lo``, ``hi``, as a learning rate of the first group; the others keep their
        ratios to it. NaN with the flag ``ascent`` if the direction does not descend, ``nonfinite`` if the
        loss is not finite, ``no_increase`` or ``no_decrease`` if no bracket was found. A non-finite loss
        along the line counts as an increase, whatever its sign.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range.

    Source: critical sharpness of Kalra et al. 2026, arXiv:2601.16979.
    """
    owner = "critical_lr"
    pending = PendingStep(owner, optimizer, check.flag(owner, "use_grad", use_grad))
    guess = previous.value if isinstance(previous, RateSearch) else previous
    warm = guess is not None and not (isinstance(guess, float) and math.isnan(guess))
    if warm:
        eta = check.number(owner, "previous", guess, ends="()")
    else:
        eta = pending.lr or 1e-3
        eta = eta if start is None else check.number(owner, "start", start, ends="()")
    found = search_batches(
        pending,
        closures_of(owner, loss_fn),
        reduce,
        lambda line: _critical(line, eta, warm=warm),
        lambda line, mean: _critical(line, mean.value, warm=True),
    )
    if isinstance(previous, RateSearch) and not found.batches:
        return replace(found, err_batch=abs(found.value - previous.value))
    return found


def _critical(line: Line, eta: float, *, warm: bool) -> RateSearch:
    """Search for the critical rate of a line from ``eta``, which is near it for a warm start."""
    problem = _problem(line)
    if problem:
        return RateSearch(math.nan, 0.0, math.inf, line.forwards, (problem,))
    lo, hi = _bracket(line, eta, 1.25 if warm else 2.0)
    while lo > 0.0 and hi < math.inf and 1.0 - lo / hi > (1 / 8 if warm else 1 / 16):
        middle = (lo + hi) / 2.0 if hi < 4.0 * lo else math.sqrt(lo * hi)
        lo, hi = (lo, middle) if line.loss(middle) > line.start else (middle, hi)
    if lo == 0.0 or hi == math.inf:
        flag = "no_decrease" if lo == 0.0 else "no_increase"
        return RateSearch(math.nan, lo, hi, line.forwards, (flag,))
    return RateSearch((lo + hi) / 2.0, lo, hi, line.forwards)


def _problem(line: Line) -> str | None:
    """Return the flag of a line that has no critical rate, or None."""
    if not math.isfinite(line.start) or not math.isfinite(line.slope):
        return "nonfinite"
    return "ascent" if line.slope <= 0.0 else None


def _bracket(line: Line, eta: float, factor: float) -> tuple[float, float]:
    """Return rates below and above the critical one, in strides from ``eta``; 0 or infinity if not found."""
    lo, hi, stride = 0.0, math.inf, factor
    while line.forwards < _MOST_FORWARDS and 1e-300 < eta < 1e300:
        if line.loss(eta) > line.start:
            hi = eta
        else:
            lo = eta
        if lo > 0.0 and hi < math.inf:
            break
        eta = eta * stride if hi == math.inf else eta / stride
        # strides grow, so that a guess that is far off costs few forwards
        stride = min(stride * stride, 16.0) if factor < 2.0 else factor
    return lo, hi
