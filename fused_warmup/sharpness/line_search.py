"""The loss along the step that an optimizer is about to make, and the rate at which it stops falling."""

from __future__ import annotations

import math

import torch

from .. import _checks as check
from .hvp import Hessian
from .loss_evaluator import Loss, LossEvaluator
from .pending_step import PendingStep
from .result import RateSearch
from .vectors import dot

_MOST_FORWARDS = 128


class Line:
    """The loss at ``param - eta * direction``, for the direction of the step about to be made.

    Args:
        evaluator: An entered ``LossEvaluator`` over the parameters of ``pending``.
        pending: The step.

    Attributes:
        forwards: Evaluations of the closure so far.
        start: Loss at the parameters as they are.
        slope: Decrease of what the optimizer descends per unit of ``eta``, at ``eta = 0``.
    """

    def __init__(self, evaluator: LossEvaluator, pending: PendingStep) -> None:
        self._keeper, self._sign = evaluator, pending.sign
        grads = pending.grads_of(Hessian(evaluator))
        directions = pending.directions(grads)
        self.slope = self._sign * float(
            torch.stack([dot(g.to(u.dtype), u) for g, u in zip(grads, directions, strict=True)]).sum()
        )
        self._way = evaluator.vectors.flat(directions)
        self.forwards = 0
        self.start = self.loss(0.0)

    @torch.no_grad()
    def loss(self, eta: float) -> float:
        """Return the loss at ``eta``, negated for an optimizer that ascends; infinity if not finite."""
        vectors = self._keeper.vectors
        vectors.perturb(self._way, None, vectors.number(-eta))
        self.forwards += 1
        loss = self._keeper.value()
        self._keeper.share(loss)
        value = self._sign * float(loss)
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

    With ``maximize`` it is the smallest at which the step would lower the loss.

    It is the critical rate of this one direction, not ``2 / top_eigenvalue``: only at the edge of stability
    do the two come near each other. Parameters, states and all else are left as they were.

    Args:
        loss_fn: Returns the loss of the same batch each time; run without gradients.
        optimizer: As for ``preconditioned``.
        previous: What the last search found: it then takes about 4 evaluations instead of 13, for a bracket
            of an eighth instead of a sixteenth.
        start: Where a search without ``previous`` starts; the learning rate in force if None.
        use_grad: Use the gradients in ``.grad`` if there are any; otherwise they cost one backward pass.
        reduce: As for ``top_eigenvalue``.

    Returns:
        The middle of the bracket ``lo``, ``hi``, as a learning rate of the first group; the others keep their
        ratios to it. NaN with the flag ``ascent`` if the direction does not descend, ``nonfinite`` if the
        loss is not finite, ``no_increase`` or ``no_decrease`` if no bracket was found. A loss that is not
        finite is an increase, whatever its sign.

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
    with LossEvaluator(owner, loss_fn, pending.params, pending.backend, reduce) as evaluator:
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
    """Return why there is nothing to search for, or None."""
    if not math.isfinite(line.start) or not math.isfinite(line.slope):
        return "nonfinite"
    return "ascent" if line.slope <= 0.0 else None


def _bracket(line: Line, eta: float, factor: float) -> tuple[float, float]:
    """Return rates around the critical one, found in strides from ``eta``; 0 or infinity where none is."""
    lo, hi, stride = 0.0, math.inf, factor
    while line.forwards < _MOST_FORWARDS and 1e-300 < eta < 1e300:
        if line.loss(eta) > line.start:
            hi = eta
        else:
            lo = eta
        if lo > 0.0 and hi < math.inf:
            break
        eta = eta * stride if hi == math.inf else eta / stride
        # a guess that is far off must not cost a forward per quarter
        stride = min(stride * stride, 16.0) if factor < 2.0 else factor
    return lo, hi
