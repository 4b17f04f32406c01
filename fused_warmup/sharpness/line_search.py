"""Search for the critical learning rate: evaluates the loss along the next step of an optimizer."""

from __future__ import annotations

import math

import torch

from .. import _checks as check
from .hvp import Hessian
from .loss_evaluator import Loss, LossEvaluator
from .operators import evaluator_of
from .pending_step import PendingStep
from .result import RateSearch
from .vectors import dot

_MOST_FORWARDS = 128


class Line:
    """The loss at ``param - eta * direction``, for the direction of a pending step.

    Args:
        evaluator: An entered ``LossEvaluator`` over the parameters of ``pending``.
        pending: The step.

    Attributes:
        forwards: Evaluations of the closure so far, the one at ``eta = 0`` included.
        start: Loss at ``eta = 0``.
        slope: Decrease of the loss per unit of ``eta`` at ``eta = 0``, its increase for an optimizer that
            ascends.
    """

    def __init__(self, evaluator: LossEvaluator, pending: PendingStep) -> None:
        self._evaluator, self._sign = evaluator, pending.sign
        grads = pending.grads_of(Hessian(evaluator))
        directions = pending.directions(grads)
        self.slope = self._sign * float(
            pending.shards.total([dot(g.to(u.dtype), u) for g, u in zip(grads, directions, strict=True)])
        )
        self._direction = evaluator.vectors.flat(directions)
        self.forwards = 0
        self.start = self.loss(0.0)

    @torch.no_grad()
    def loss(self, eta: float) -> float:
        """Return the loss at ``eta``, negated for an optimizer that ascends; infinity if not finite."""
        vectors = self._evaluator.vectors
        vectors.perturb(self._direction, None, vectors.number(-eta))
        self.forwards += 1
        value = self._sign * self._evaluator.mean(self._evaluator.value())
        return value if math.isfinite(value) else math.inf


def critical_lr(
    loss_fn: Loss,
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
        loss_fn: Returns the loss of the same batch each time; runs without gradients.
        optimizer: As for ``preconditioned``.
        previous: Result of the last search, as a warm start: about 4 evaluations instead of 13, for a bracket
            of an eighth instead of a sixteenth.
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
    with evaluator_of(pending, loss_fn, reduce) as evaluator:
        line = Line(evaluator, pending)
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
