"""Warmup that follows the critical learning rate upwards."""

from __future__ import annotations

import math
from typing import Any

import torch

from ... import _checks as check
from ...distributed.groups import average
from ...optim.losses import checked_loss
from ...sharpness.line_search import Line
from ...sharpness.loss_evaluator import Loss, LossEvaluator
from ...sharpness.pending_step import PendingStep
from ..states import checked_state
from .initial_lr import search

_VERSION = 1
# attributes that a state dict must hold
_STATE = ("lr", "best", "forwards", "searches", "target", "start", "tolerance")


class PersistentCatapult:
    """Sets the learning rate of an optimizer: slightly above critical, again whenever the loss has recovered.

    The rate starts where ``fused_warmup.tuning.initial_lr`` puts it, a little too high on purpose. The loss
    rises, the sharpness falls, and when the loss is below its lowest value at a search the rate is searched
    for again, from where it is. It never falls, and stays at ``target`` once there. For an optimizer with
    ``maximize`` all of this is about the negative of the loss. Call ``step`` between ``backward()`` and the
    optimizer's ``step()``.

    A group that is added later is taken along from the next ``step`` on: its learning rate keeps the ratio
    that the ``lr`` it is added with has to the first group's ``lr`` when the catapult was made.

    Args:
        optimizer: One of this package without a schedule, or ``Adam``, ``AdamW``, ``RAdam`` or ``SGD`` of
            torch.
        target: Learning rate of the first group at which warmup ends, > 0; the others keep their ratios to
            it.
        start: First rate to try, > 0.
        tolerance: As for ``initial_lr``.
        reduce: As for ``initial_lr``; it counts for the loss given to ``step`` as well.

    Raises:
        TypeError: If the rule of the optimizer is not known, or an argument has a wrong type.
        ValueError: If an argument is out of range, or the optimizer has a schedule.

    Attributes:
        lr: Learning rate of the first group now in force; 0 before the first call.
        forwards: Evaluations of closures so far, counted as for ``initial_lr``.
        searches: Searches so far.

    Source: Kalra & Barkeshli 2024, arXiv:2406.09405, algorithm 3; each search starts from the current rate,
    which the paper leaves open.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        target: float,
        *,
        start: float = 1e-4,
        tolerance: float = 0.1,
        reduce: bool = True,
    ) -> None:
        name = type(self).__name__
        self.start = check.number(name, "start", start, ends="()")
        self.target = check.number(name, "target", target, self.start)
        self.tolerance = check.number(name, "tolerance", tolerance, ends="()")
        self.reduce = check.flag(name, "reduce", reduce)
        # raises for an optimizer that nothing is known about
        self.optimizer = PendingStep(name, optimizer, use_grad=False).optimizer
        # learning rate of each group when it was first seen
        self._given: list[float] = []
        self._take_groups()
        self.lr, self.best, self.forwards, self.searches = 0.0, math.inf, 0, 0

    @property
    def done(self) -> bool:
        """Whether the target is reached."""
        return self.lr >= self.target

    def step(self, loss: torch.Tensor | float, loss_fn: Loss) -> float:
        """Set the rate for the step about to be made; waits for the device until the target is reached.

        Args:
            loss: Loss at the parameters as they are, a number or a tensor with one element. On small batches
                give a smoothed one, or that of a fixed batch: a low loss by luck starts a search.
            loss_fn: Returns the loss of the batch whose gradient is in ``.grad``, the same each time.

        Returns:
            The learning rate of the first group.

        Raises:
            TypeError: If an argument has a wrong type.
            ValueError: If the loss has several elements, a group with a schedule was added, or groups are
                gone.
        """
        loss = checked_loss(type(self).__name__, "loss", loss)
        # rates of known groups are the user's own again once the target is reached
        first = len(self._given) if self.done else 0
        self._take_groups()
        if not self.done:
            shared = torch.as_tensor(loss).to(torch.float64, copy=True)
            if self.reduce:
                average(shared)
            self._follow(float(shared), loss_fn)
        for group, given in list(zip(self.optimizer.param_groups, self._given, strict=True))[first:]:
            _set_lr(group, self.lr * (given / self._given[0] if self._given[0] > 0.0 else 1.0))
        return self.lr

    def _take_groups(self) -> None:
        """Note the learning rates of groups that are new.

        Raises:
            ValueError: If one has a schedule, or there are fewer groups than before.
        """
        name, groups = type(self).__name__, self.optimizer.param_groups
        if any(group.get("schedule") is not None for group in groups):
            check.fail(name, "schedule", "be None for all groups of the optimizer", "a schedule")
        if len(groups) < len(self._given):
            hint = "Make a new one after removing groups."
            check.fail(name, "optimizer", f"keep its {len(self._given)} groups", len(groups), hint)
        for i in range(len(self._given), len(groups)):
            # groups of torch.optim share a tensor, whose value is that of now
            shared = [j for j in range(i) if _is_shared(groups[i]["lr"], groups[j]["lr"])]
            self._given.append(self._given[shared[0]] if shared else float(groups[i]["lr"]))

    def _follow(self, value: float, loss_fn: Loss) -> None:
        """Search for a rate if the loss has recovered.

        Args:
            value: The loss.
            loss_fn: As for ``step``.
        """
        value = -value if self.optimizer.param_groups[0].get("maximize") else value
        if value < self.best or not self.searches:
            self._search(loss_fn)
            # without a rate yet the next step searches again
            self.best = value if math.isfinite(value) and self.lr > 0.0 else self.best

    def _search(self, loss_fn: Loss) -> None:
        """Raise the rate to the critical one; it stays if that is lower."""
        name = type(self).__name__
        pending = PendingStep(name, self.optimizer)
        with LossEvaluator(name, loss_fn, pending.params, pending.backend, self.reduce) as evaluator:
            line = Line(evaluator, pending)
            line.forwards = 0
            if math.isfinite(line.start):
                found = search(line, self.lr or self.start, self.target, self.tolerance)
                self.lr = max(self.lr, found.value)
            self.forwards += line.forwards
        self.searches += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain types."""
        state = {name: getattr(self, name) for name in _STATE}
        return {"version": _VERSION, **state, "given_lrs": list(self._given)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; the optimizer's own state dict holds its learning rates.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            ValueError: If something is missing or out of range, or it is of another version; nothing is
                changed then.
        """
        name = type(self).__name__
        checked_state(name, state_dict, _STATE, _VERSION)
        # states of before groups could be added have none
        given = [
            check.number(name, f"state_dict['given_lrs'][{i}]", lr)
            for i, lr in enumerate(state_dict.get("given_lrs", ()))
        ]
        if len(given) > len(self.optimizer.param_groups):
            most = len(self.optimizer.param_groups)
            check.fail(
                name, "state_dict['given_lrs']", f"have at most one rate for each of {most} groups", given
            )
        self._given[: len(given)] = given
        for key in _STATE:
            setattr(self, key, state_dict[key])


def _is_shared(a: Any, b: Any) -> bool:
    """Whether the learning rates of two groups are one tensor."""
    return isinstance(a, torch.Tensor) and a is b


def _set_lr(group: dict[str, Any], lr: float) -> None:
    """Set the rate of a group; a tensor keeps its place, for captured graphs."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
