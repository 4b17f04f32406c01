"""Persistent catapult: a warmup that follows the critical learning rate upwards."""

from __future__ import annotations

import math
from typing import Any

import torch

from ... import _checks as check
from ...distributed.agreement import agreed_group
from ...distributed.groups import average
from ...optim.losses import checked_loss
from ...sharpness.line_search import Losses, closures_of, search_batches
from ...sharpness.loss_evaluator import ALONE
from ...sharpness.pending_step import PendingStep
from ...sharpness.result import RateSearch
from .initial_lr import search_step

_VERSION = 1
# attributes saved in a state dict
_STATE = ("lr", "best", "forwards", "searches", "target", "start", "tolerance")


class PersistentCatapult:
    """Sets the learning rate slightly above the critical one, again whenever the loss has recovered.

    The first rate is that of ``fused_warmup.tuning.initial_lr``, slightly too high on purpose. The loss
    rises, the sharpness falls, and once the loss is below its lowest value at earlier searches, the next
    search begins at the current rate. The rate never falls, and ends at ``target``. With ``maximize`` this
    applies to the negative of the loss. Call ``step`` between ``backward()`` and the optimizer's ``step()``.

    A group that is added later follows from the next ``step`` on: its learning rate keeps the ratio of its
    own initial ``lr`` to that of the first group when the catapult was created.

    Args:
        optimizer: One of this package without a schedule, or ``Adam``, ``AdamW``, ``RAdam`` or ``SGD`` of
            torch.
        target: Learning rate of the first group at the end of the warmup, > 0; the others keep their ratios
            to it.
        start: First rate to try, > 0.
        tolerance: As for ``initial_lr``.
        reduce: As for ``initial_lr``; applies to the loss given to ``step`` as well.

    Raises:
        TypeError: If the rule of the optimizer is not known, or an argument has a wrong type.
        ValueError: If an argument is out of range, or the optimizer has a schedule.

    Attributes:
        lr: Current learning rate of the first group; 0 before the first call.
        forwards: Evaluations of closures so far, counted as for ``initial_lr``.
        searches: Searches so far.
        last_search: Result of the last search, or None. Its ``err_batch`` says how far the rates of single
            batches lie apart, where ``step`` gets the closures of several. Not part of a state dict.

    Source: Kalra & Barkeshli 2024, arXiv:2406.09405, algorithm 3; the paper leaves the start of each search
    open, ours is the current rate.
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
        # raises for an optimizer without a known rule
        self.optimizer = PendingStep(name, optimizer, use_grad=False).optimizer
        # learning rate of each group at its first call
        self._given: list[float] = []
        self._take_groups()
        self.lr, self.best, self.forwards, self.searches = 0.0, math.inf, 0, 0
        self.last_search: RateSearch | None = None

    @property
    def done(self) -> bool:
        """Whether the rate has reached the target."""
        return self.lr >= self.target

    def step(self, loss: torch.Tensor | float, loss_fn: Losses) -> float:
        """Set the rate for the next step; waits for the device until the target is reached.

        Args:
            loss: Loss at the current parameters, a number or a tensor with one element. For small batches
                pass a smoothed loss or that of a fixed batch: a low loss by chance starts a search.
            loss_fn: Returns the loss of the batch whose gradient is in ``.grad``, on the same batch each
                time; or closures of several batches, as for ``initial_lr``.

        Returns:
            The learning rate of the first group.

        Raises:
            TypeError: If an argument has a wrong type.
            ValueError: If the loss has several elements, a group with a schedule was added, or groups were
                removed.
        """
        loss = checked_loss(type(self).__name__, "loss", loss)
        # once the target is reached, the user may change the rates of known groups
        first = len(self._given) if self.done else 0
        self._take_groups()
        if not self.done:
            shared = torch.as_tensor(loss).to(torch.float64, copy=True)
            if self.reduce:
                facts = {"target": self.target, "start": self.start, "searches": self.searches}
                agreed_group(type(self).__name__, facts, ALONE)
                average(shared)
            self._follow(float(shared), loss_fn)
        for group, given in list(zip(self.optimizer.param_groups, self._given, strict=True))[first:]:
            _set_lr(group, self.lr * (given / self._given[0] if self._given[0] > 0.0 else 1.0))
        return self.lr

    def _take_groups(self) -> None:
        """Record the learning rates of new groups.

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
            # groups of torch.optim may share a tensor, which the catapult has written since
            shared = [j for j in range(i) if _is_shared(groups[i]["lr"], groups[j]["lr"])]
            self._given.append(self._given[shared[0]] if shared else float(groups[i]["lr"]))

    def _follow(self, value: float, loss_fn: Losses) -> None:
        """Search for a rate if the loss has recovered; arguments as for ``step``."""
        value = -value if self.optimizer.param_groups[0].get("maximize") else value
        if value < self.best or not self.searches:
            self._search(loss_fn)
            # without a rate so far the next step searches again
            self.best = value if math.isfinite(value) and self.lr > 0.0 else self.best

    def _search(self, loss_fn: Losses) -> None:
        """Raise the rate to the critical one, unless that is lower."""
        name, start = type(self).__name__, self.lr or self.start
        closures = closures_of(name, loss_fn)
        found = search_batches(
            PendingStep(name, self.optimizer),
            closures,
            self.reduce,
            lambda line: search_step(line, start, self.target, self.tolerance),
        )
        if math.isfinite(found.value):
            self.lr = max(self.lr, found.value)
        self.forwards += found.forwards
        self.searches += 1
        self.last_search = found

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run, in plain types."""
        state = {name: getattr(self, name) for name in _STATE}
        return {"version": _VERSION, **state, "given_lrs": list(self._given)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the optimizer's own state dict holds its learning rates.

        Args:
            state_dict: A result of ``state_dict``.

        Raises:
            ValueError: If an entry is missing or out of range, or the version is another one; nothing is
                changed then.
        """
        name = type(self).__name__
        check.state_dict(name, state_dict, _STATE, _VERSION)
        # states of earlier releases have no such entry
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
    """Return whether the learning rates of two groups are one tensor."""
    return isinstance(a, torch.Tensor) and a is b


def _set_lr(group: dict[str, Any], lr: float) -> None:
    """Set the rate of a group; a tensor is filled in place, for captured graphs."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
