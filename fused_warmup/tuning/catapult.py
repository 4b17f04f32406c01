"""Warmup that follows the critical learning rate upwards."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _checks as check
from ..processes import average
from ..sharpness.critical import Line
from ..sharpness.keeper import Keeper, Loss
from ..sharpness.preview import Preview
from .initial import search
from .states import checked_state

_VERSION = 1


class PersistentCatapult:
    """Sets the learning rate of an optimizer: slightly above critical, again whenever the loss has recovered.

    The rate starts where ``fused_warmup.tuning.initial_lr`` puts it, a little too high on purpose. The loss
    rises, the sharpness falls, and when the loss is below its lowest value at a search the rate is searched
    for again, from where it is. It never falls, and stays at ``target`` once there. Call ``step`` between
    ``backward()`` and the optimizer's ``step()``.

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
        self.optimizer = optimizer
        self.start = check.number(name, "start", start, ends="()")
        self.target = check.number(name, "target", target, self.start)
        self.tolerance = check.number(name, "tolerance", tolerance, ends="()")
        self.reduce = check.flag(name, "reduce", reduce)
        if any(group.get("schedule") is not None for group in optimizer.param_groups):
            check.fail(name, "schedule", "be None for all groups of the optimizer", "a schedule")
        # raises for an optimizer that nothing is known about
        Preview(name, optimizer, use_grad=False)
        self._ratios = _ratios(optimizer)
        self.lr, self.best, self.forwards, self.searches = 0.0, math.inf, 0, 0

    @property
    def done(self) -> bool:
        """Whether the target is reached."""
        return self.lr >= self.target

    def step(self, loss: torch.Tensor | float, loss_fn: Loss) -> float:
        """Set the rate for the step about to be made; waits for the device until the target is reached.

        Args:
            loss: Loss at the parameters as they are. On small batches give a smoothed one, or that of a fixed
                batch: a low loss by luck starts a search.
            loss_fn: Returns the loss of the batch whose gradient is in ``.grad``, the same each time.

        Returns:
            The learning rate of the first group.

        Raises:
            TypeError: If an argument has a wrong type.
        """
        if self.done:
            return self.lr
        shared = torch.as_tensor(loss).detach().to(torch.float64, copy=True)
        if self.reduce:
            average(shared)
        value = float(shared)
        if value < self.best or not self.searches:
            self._search(loss_fn)
            self.best = value if math.isfinite(value) else self.best
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            _set_lr(group, self.lr * ratio)
        return self.lr

    def _search(self, loss_fn: Loss) -> None:
        """Raise the rate to the critical one; it stays if that is lower."""
        name = type(self).__name__
        preview = Preview(name, self.optimizer)
        with Keeper(name, loss_fn, preview.params, preview.backend, self.reduce) as keeper:
            line = Line(keeper, preview)
            line.forwards = 0
            if math.isfinite(line.start):
                found = search(line, self.lr or self.start, self.target, self.tolerance)
                self.lr = max(self.lr, found.value)
            self.forwards += line.forwards
        self.searches += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain types."""
        names = ("lr", "best", "forwards", "searches", "target", "start", "tolerance")
        return {"version": _VERSION, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; the optimizer's own state dict holds its learning rates.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            ValueError: If something is missing, or it is of another version; nothing is changed then.
        """
        name = type(self).__name__
        checked_state(name, state_dict, self.state_dict(), _VERSION)
        for key, value in state_dict.items():
            if key != "version":
                setattr(self, key, value)


def _ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rates of the groups over that of the first."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return [rate / rates[0] if rates[0] > 0.0 else 1.0 for rate in rates]


def _set_lr(group: dict[str, Any], lr: float) -> None:
    """Set the rate of a group; a tensor keeps its place, for captured graphs."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
