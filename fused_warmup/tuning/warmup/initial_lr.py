"""Find the initial learning rate of a warmup, and the number of steps that it saves."""

from __future__ import annotations

import math

import torch

from ... import _checks as check
from ...sharpness.line_search import Line, Losses, closures_of, search_batches
from ...sharpness.pending_step import PendingStep
from ...sharpness.result import RateSearch

# halvings after which the ends of a bracket are adjacent in float64
_MOST_HALVINGS = 60


def initial_lr(
    loss_fn: Losses,
    optimizer: torch.optim.Optimizer,
    *,
    start: float = 1e-4,
    target: float,
    tolerance: float = 0.1,
    use_grad: bool = True,
    reduce: bool = True,
) -> RateSearch:
    """Find the initial learning rate of a warmup: the smallest at which one step slightly raises the loss.

    The rate doubles from ``start``, at most to ``target``, while the step that the optimizer is about to make
    lowers the loss. Bisection follows until the upper end raises the loss by no more than the relative
    ``tolerance``; that end is the result. The tolerance is relative to the loss or to its largest decrease in
    the search, whichever is larger, because losses may be negative. With ``maximize`` the negative of the
    loss is searched. No step is made, and all state is restored.

    Args:
        loss_fn: Returns the loss of the batch whose gradient is in ``.grad``, on the same batch each time. A
            sequence of closures, one for each of several batches, searches along their mean loss and then
            for each alone; the gradients in ``.grad`` should be those of the mean.
        optimizer: One of this package, or ``Adam``, ``AdamW``, ``RAdam`` or ``SGD`` of torch.
        start: First rate to try, > 0.
        target: Rate at the end of the warmup, >= ``start``.
        tolerance: Relative increase of the loss that is accepted, > 0; 0.1 in the paper, or 0.01 for Adam.
        use_grad: Use the gradients in ``.grad`` if there are any; otherwise they cost one backward pass.
        reduce: Search along the mean of the losses of all ranks of the default process group, if there is
            one: every rank calls this and finds the same rate.

    Returns:
        The upper end, as a learning rate of the first group; the others keep their ratios to it. ``forwards``
        does not count the loss at the current parameters, as in the paper: training evaluates it anyway.
        Flags: ``target`` if the loss rose by less than the tolerance up to the target; ``rises`` if it rose
        at ``start`` already, which is then the result; ``nonfinite`` with NaN if the loss is not finite;
        ``unresolved`` if no rate in the bracket meets the tolerance.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range.

    Source: Kalra & Barkeshli 2024, arXiv:2406.09405, algorithms 1 and 2.
    """
    owner = "initial_lr"
    check.number(owner, "start", start, ends="()")
    check.number(owner, "target", target, start)
    check.number(owner, "tolerance", tolerance, ends="()")
    pending = PendingStep(owner, optimizer, check.flag(owner, "use_grad", use_grad))
    closures = closures_of(owner, loss_fn)
    return search_batches(pending, closures, reduce, lambda line: search_step(line, start, target, tolerance))


def search_step(line: Line, start: float, target: float, tolerance: float) -> RateSearch:
    """Search along a line that has just been made, without counting the loss at its begin."""
    line.forwards = 0
    if not math.isfinite(line.start):
        return RateSearch(math.nan, 0.0, math.inf, 0, ("nonfinite",))
    return search(line, start, target, tolerance)


def search(line: Line, start: float, target: float, tolerance: float) -> RateSearch:
    """Double and bisect along a line, see ``initial_lr``."""
    upper, rise = start, line.loss(start)
    if not rise < line.start:
        return RateSearch(start, 0.0, start, line.forwards, ("rises",))
    lowest = rise
    while rise < line.start:
        lowest = min(lowest, rise)
        if upper >= target:
            break
        upper *= 2.0
        rise = line.loss(min(upper, target))
    lower, upper = min(upper, target) / 2.0, min(upper, target)
    # the value of a loss that may be negative does not measure its scale
    accepted = line.start + tolerance * max(line.start, line.start - lowest)
    if rise < line.start:
        return RateSearch(target, target, math.inf, line.forwards, ("target",))
    for _ in range(_MOST_HALVINGS):
        if rise <= accepted:
            flags = ("target",) if upper == target else ()
            return RateSearch(upper, lower, upper, line.forwards, flags)
        middle = (lower + upper) / 2.0
        loss = line.loss(middle)
        if loss < line.start:
            lower = middle
        else:
            upper, rise = middle, loss
    return RateSearch(upper, lower, upper, line.forwards, ("unresolved",))


def reach_steps(steps: int, critical: float, target: float) -> float:
    """Return the steps until a parallel warmup reaches its target: ``steps (1 - critical / target)``.

    The schedule is ``fused_warmup.schedules.parallel_warmup(steps, critical / target)``.

    Args:
        steps: Length of the warmup, in steps.
        critical: Learning rate that ``initial_lr`` found.
        target: Learning rate at the end of the warmup.

    Returns:
        Steps, not rounded; 1 if the target is not above the critical rate.

    Raises:
        ValueError: If an argument is out of range.

    Source: Kalra & Barkeshli 2024, arXiv:2406.09405, section 5.1.
    """
    steps = check.whole("reach_steps", "steps", steps, 1)
    critical = check.number("reach_steps", "critical", critical)
    target = check.number("reach_steps", "target", target, ends="()")
    return 1.0 if target <= critical else steps * (1.0 - critical / target)


def saved_steps(steps: int, critical: float, target: float, forwards: int = 0) -> float:
    """Return the number of steps that an initial rate saves: ``steps critical / target - forwards / 2``.

    Args:
        steps: Length of the warmup, in steps.
        critical: Learning rate that ``initial_lr`` found; at the target or above it saves the whole warmup.
        target: Learning rate at the end of the warmup.
        forwards: Evaluations in the search; two count as a step.

    Returns:
        Steps, not rounded; negative if the search cost more than it saved.

    Raises:
        ValueError: If an argument is out of range.

    Source: Kalra & Barkeshli 2024, arXiv:2406.09405, section 5.1.
    """
    reached = reach_steps(steps, critical, target)
    return steps - reached - check.whole("saved_steps", "forwards", forwards) / 2.0
