"""Automatic warmup: the rate grows until the losses have passed their minimum, then goes back and decays."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import _checks as check
from ...distributed.agreement import agreed_group
from ...distributed.groups import average
from ...optim.losses import checked_loss
from ...plan.device_buffers import is_capturing
from ...schedules import Schedule, Segment
from ...schedules.adaptive import AdaptiveSchedule
from .gaussian_process import Parity, ScaleFree, one_thread
from .loss_buffer import LossBuffer

_VERSION = 1
_FORMAT = "fused_warmup.autowu"
_DECAYS = ("cosine", "half-cosine", "constant-cosine", "plateau")
# keys of a state dict besides the arguments
_STATE = ("steps", "phase", "back_at", "rates", "epoch", "filled", "losses", "tests", "smoother", "plateau")


@dataclass(frozen=True)
class WarmupTest:
    """One test of the losses, at the end of an epoch of the warmup.

    Attributes:
        step: Losses recorded so far.
        probability: Probability that the smoothed loss was lower at an earlier step; the mean over the votes.
        positive: Whether most votes were above the confidence.
        lr: Rate of the last step.
        back: Rate at the smoothed minimum, from which the decay would start.
    """

    step: int
    probability: float
    positive: bool
    lr: float
    back: float


class AutoWU(AdaptiveSchedule):
    """Automatic warmup: detects the end of warmup from the losses and decays from the best learning rate.

    The rate grows from ``min_lr`` towards ``max_lr``. After each epoch a Gaussian process smooths all losses
    so far. The test is positive if, with probability ``confidence``, the smoothed loss was lower at an
    earlier step; ``patience`` positive tests in a row end the warmup. The rate returns to the one at the
    smoothed minimum and decays until ``total_steps``. Parameters are not rolled back.

    Pass it as ``schedule=`` to an optimizer of this package with ``lr=1.0``; a group's ``lr`` is then its
    ratio to the rate. Call ``opt.record_loss(loss)`` before each ``opt.step()``. The losses stay on their
    device; the call that ends an epoch of the warmup copies them once, which waits, and the schedule on the
    device is rewritten if the rate changes. To drive any other optimizer, set its rate to ``wu.lr`` before
    the first step and to ``wu.step(loss)`` after each one.

    In a group of processes the losses are averaged, so that all ranks decide the same: every rank records its
    losses, equally often. The end of an epoch raises an error if a rank has other arguments or has recorded
    another number of losses, or none for 10 minutes.

    Args:
        total_steps: Steps of the training; the last rate is held after them.
        steps_per_epoch: Losses from one test to the next.
        min_lr: First rate, > 0.
        max_lr: Rate at the end of the longest possible warmup, >= ``min_lr``.
        max_warmup_fraction: Length of the longest warmup over ``total_steps``, in [0, 1]; the decay then
            starts at the rate reached.
        growth: ``"exponential"`` or ``"linear"``.
        decay: ``"cosine"`` to 0, ``"half-cosine"``, which starts at half the rate, ``"constant-cosine"``, or
            ``"plateau"``: multiplied by ``plateau_factor`` after more than ``plateau_patience`` epochs in a
            row whose mean loss was not below the lowest by 1e-4 of it. The last two end with a cosine.
        parity: Decide as the authors' code does: it expects losses of order 1, draws random samples, ends
            with a step of rate 0 and leaves out non-finite losses. By default the scale of the losses does
            not matter, an epoch with more than half of them non-finite ends the warmup, and no step has the
            rate 0.
        confidence: Probability above which a test is positive, in (0, 1).
        patience: Positive tests in a row that end the warmup.
        cooldown_fraction: Last part of ``total_steps``, in [0, 1], in which the rate always decays.
        plateau_factor: Factor of the rate on a plateau, in (0, 1).
        plateau_patience: Epochs without progress that a plateau tolerates.
        reduce: Average the losses over the default process group, if there is one. False if they are the
            same on all ranks.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range.

    Attributes:
        phase: ``"warmup"``, ``"decay"`` while constant or on a plateau, ``"final"``.
        back_at: Losses recorded when a test ended the warmup; None before that or if none did.
        tests: All tests so far.

    Example:
        >>> wu = fw.AutoWU(total_steps=12_000, steps_per_epoch=100)
        >>> opt = fw.AdamW(model.parameters(), lr=1.0, schedule=wu)
        >>> opt.record_loss(loss)
        >>> opt.step()

    Source: Kim, Kim, Kim, Lee & Lee 2021, arXiv:2107.05855, and the constants of the authors' code.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: int,
        *,
        min_lr: float = 1e-5,
        max_lr: float = 1.0,
        max_warmup_fraction: float = 0.5,
        growth: str = "exponential",
        decay: str = "cosine",
        parity: bool = False,
        confidence: float = 0.95,
        patience: int = 3,
        cooldown_fraction: float = 0.2,
        plateau_factor: float = 0.1,
        plateau_patience: int = 5,
        reduce: bool = True,
    ) -> None:
        name = type(self).__name__
        least = check.number(name, "min_lr", min_lr, ends="()")
        self._options: dict[str, Any] = {
            "total_steps": check.whole(name, "total_steps", total_steps, 1),
            "steps_per_epoch": check.whole(name, "steps_per_epoch", steps_per_epoch, 1),
            "min_lr": least,
            "max_lr": check.number(name, "max_lr", max_lr, least),
            "max_warmup_fraction": check.number(
                name, "max_warmup_fraction", max_warmup_fraction, 0.0, 1.0, ends="[]"
            ),
            "growth": check.one_of(name, "growth", growth, ("exponential", "linear")),
            "decay": check.one_of(name, "decay", decay, _DECAYS),
            "parity": check.flag(name, "parity", parity),
            "confidence": check.number(name, "confidence", confidence, 0.0, 1.0, ends="()"),
            "patience": check.whole(name, "patience", patience, 1),
            "cooldown_fraction": check.number(
                name, "cooldown_fraction", cooldown_fraction, 0.0, 1.0, ends="[]"
            ),
            "plateau_factor": check.number(name, "plateau_factor", plateau_factor, 0.0, 1.0, ends="()"),
            "plateau_patience": check.whole(name, "plateau_patience", plateau_patience),
            "reduce": check.flag(name, "reduce", reduce),
        }
        self._total, self._per_epoch = self._options["total_steps"], self._options["steps_per_epoch"]
        self._longest = int(self._options["max_warmup_fraction"] * self._total)
        # a phase lasts at least one step
        self._cooldown_at = max(1, math.ceil((1.0 - self._options["cooldown_fraction"]) * self._total))
        self.phase = "warmup" if self._longest else self._next_phase
        self.back_at: int | None = None
        self.tests: list[WarmupTest] = []
        self._steps = 0
        self._losses = torch.empty(0, dtype=torch.float64, device="cpu")
        self._epoch = LossBuffer(self._per_epoch)
        self._smoother: ScaleFree | Parity = Parity() if parity else ScaleFree()
        self._plateau = [math.inf, 0.0]
        self._source: weakref.ref[object] | None = None
        self._alone = False
        self._set_rates(self._first_rates())

    # rates

    @property
    def _next_phase(self) -> str:
        """Phase after the warmup."""
        return "decay" if self._options["decay"] in ("constant-cosine", "plateau") else "final"

    @property
    def lr(self) -> float:
        """Learning rate of the step after the last recorded loss."""
        return float(self._rates[min(self._steps, self._total - 1)])

    def _first_rates(self) -> np.ndarray:
        """Return the rates of a training in which no test ends the warmup, float64 of ``[total_steps]``."""
        most = self._options["max_lr"]
        if not self._longest:
            return self._decayed(most, 0, shifted=False)
        steps = min(self._longest, self._cooldown_at)
        x = np.arange(steps) / self._longest
        grown = self._grown(most, x)
        return np.concatenate([grown, self._decayed(float(grown[-1]), steps)])

    def _grown(self, to: float, x: Any) -> Any:
        """Return the rates at fractions ``x`` of a growth from ``min_lr``."""
        least = self._options["min_lr"]
        if self._options["growth"] == "linear":
            return least + (to - least) * x
        return least * (to / least) ** x

    def _decayed(self, rate: float, begin: int, shifted: bool | None = None) -> np.ndarray:
        """Return the rates from step ``begin`` to the end for a decay that begins there.

        Args:
            rate: Rate that decays.
            begin: First step.
            shifted: Leave out the first point of the curve and reach the last, as the authors' code does; by
                default only with ``parity``.
        """
        hold = max(0, self._cooldown_at - begin) if self._next_phase == "decay" else 0
        length = self._total - begin - hold
        if length <= 0:
            return np.full(self._total - begin, rate)
        x = (np.arange(length) + (self._options["parity"] if shifted is None else shifted)) / length
        if self._options["decay"] == "half-cosine":
            x = (1.0 + x) / 2.0
        return np.concatenate([np.full(hold, rate), rate * 0.5 * (1.0 + np.cos(math.pi * x))])

    def _set_rates(self, rates: np.ndarray) -> None:
        """Set the rates as one table of a fixed size, so that captured graphs can keep its address."""
        self._rates = rates
        values = tuple(rates.tolist())
        self.schedule = Schedule((Segment("table", self._total, values[0], values[-1], values=values),))

    def _decay_from(self, rate: float, made: int) -> None:
        """Decay the rate after step number ``made``; earlier rates and the end of the training stay.

        Args:
            rate: Rate to decay from.
            made: Index of the next step, less than ``self._steps`` if steps were skipped.
        """
        rest = self._decayed(rate, self._steps)
        past = self._rates[: made + 1]
        held = np.full(self._total, rest[-1] if len(rest) else rate)
        self._set_rates(np.concatenate([past, rest, held])[: self._total])

    # losses

    def step(self, loss: Tensor | float) -> float:
        """Record the loss of the last step, and return the rate of the next one.

        Args:
            loss: Number of Python or numpy, or tensor with one element. Synchronises only at the end of a
                warmup (or plateau) epoch.

        Returns:
            The learning rate.

        Raises:
            TypeError: If the loss is not a number.
            ValueError: If it has more than one element.
            RuntimeError: If an optimizer records losses for this schedule already.
        """
        self.feed(loss, None, None)
        return self.lr

    def feed(self, loss: Tensor | float, source: object, counters: Tensor | None) -> bool:
        """Record the loss of the next step; ``record_loss`` calls this, see ``AdaptiveSchedule``.

        Raises:
            TypeError: If the loss is not a number.
            ValueError: If it has more than one element.
            RuntimeError: If losses come from another source as well, or a graph is captured.
        """
        loss = checked_loss(type(self).__name__, "loss", loss)
        self._check_source(loss, source)
        before = self.schedule
        self._steps += 1
        if self.phase != "final" and self._steps >= self._cooldown_at:
            self._enter("final")
        elif self.phase == "warmup" and self._steps >= self._longest:
            self._enter(self._next_phase)
        elif self.phase == "warmup" or (self.phase == "decay" and self._options["decay"] == "plateau"):
            self._collect(loss, counters)
        return self.schedule is not before

    def _enter(self, phase: str) -> None:
        """Begin a phase with a new epoch."""
        self.phase, self._epoch.filled = phase, 0

    def _check_source(self, loss: Tensor | float, source: object) -> None:
        """Raise ``RuntimeError`` if losses come from a second source or during a capture."""
        name = type(self).__name__
        if isinstance(loss, Tensor) and is_capturing(loss.device):
            raise RuntimeError(f"{name}: losses must be recorded outside of a graph, got one in a capture.")
        known = self._source() if self._source is not None else None
        if (known is not None and known is not source) or (self._alone and source is not None):
            hint = "Give each optimizer one of its own, or set the lr of several from wu.step(loss)."
            raise RuntimeError(f"{name}: losses must come from one place, got another one. {hint}")
        if source is None:
            self._alone = True
        elif known is None:
            self._source = weakref.ref(source)

    def _collect(self, loss: Tensor | float, counters: Tensor | None) -> None:
        """Add a loss to the current epoch, and evaluate the epoch when it is full."""
        self._epoch.add(loss, None if counters is None else counters.device)
        if not self._epoch.full:
            return
        losses, made = self._epoch.drain(self._steps - 1 if counters is None else counters[0])
        if self._options["reduce"]:
            self._share(losses)
        if self.phase == "warmup":
            self._test(losses, made)
        else:
            self._check_plateau(losses, made)

    def _share(self, losses: Tensor) -> None:
        """Replace the losses of an epoch by their means over all ranks.

        Raises:
            ValueError: If ranks have other arguments, or have recorded other numbers of losses.
            RuntimeError: If a rank has recorded fewer losses and does not record more in time.
        """
        facts = {**self._options, "phase": self.phase, "recorded losses": self._steps}
        hint = "Record the losses on all ranks; independent trainings need reduce=False."
        average(losses, agreed_group(type(self).__name__, facts, hint))

    def _test(self, losses: Tensor, made: int) -> None:
        """Test all losses of the warmup, and end it after enough positive tests or too many lost losses."""
        self._losses = torch.cat([self._losses, losses])
        with one_thread():
            votes = self._smoother.votes(self._losses)
        positive = 2 * sum(p > self._options["confidence"] for p, _ in votes) > len(votes)
        now = float(self._rates[min(made, self._total - 1)])
        back = float(np.mean([self._grown(now, place) for _, place in votes]))
        probability = float(np.mean([p for p, _ in votes]))
        self.tests.append(WarmupTest(self._steps, probability, positive, now, back))
        last = self.tests[-self._options["patience"] :]
        lost = not self._options["parity"] and float(losses.isfinite().double().mean()) < 0.5
        if lost or (len(last) == self._options["patience"] and all(test.positive for test in last)):
            self._enter(self._next_phase)
            self.back_at = self._steps
            self._decay_from(back, made)

    def _check_plateau(self, losses: Tensor, made: int) -> None:
        """Lower the rate if the mean loss has not fallen for more epochs than the patience."""
        mean = float(losses.mean())
        lowest, waited = self._plateau
        if mean < lowest - 1e-4 * abs(lowest) or lowest == math.inf > mean:
            self._plateau = [mean, 0.0]
            return
        self._plateau = [lowest, waited + 1.0]
        if waited + 1.0 > self._options["plateau_patience"]:
            self._plateau = [lowest, 0.0]
            now = float(self._rates[min(made, self._total - 1)])
            self._decay_from(now * self._options["plateau_factor"], made)

    # state

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run, as tensors and plain types.

        The state dict of an optimizer with this schedule includes it already.
        """
        state = {
            "steps": self._steps,
            "phase": self.phase,
            "back_at": self.back_at,
            "rates": torch.tensor(self._rates, dtype=torch.float64, device="cpu"),
            "epoch": None if self._epoch.values is None else self._epoch.values.clone(),
            "filled": self._epoch.filled,
            "losses": self._losses,
            "tests": [asdict(test) for test in self.tests],
            "smoother": self._smoother.state_dict(),
            "plateau": list(self._plateau),
        }
        return {"format": _FORMAT, "version": _VERSION, "options": dict(self._options), **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, including the arguments.

        Args:
            state_dict: A result of ``state_dict``.

        Raises:
            ValueError: If an entry is missing or out of range, or the version is another one; nothing is
                changed then.
        """
        for name, value in vars(type(self).from_state_dict(state_dict)).items():
            # the source of the losses stays
            if name not in ("_source", "_alone"):
                setattr(self, name, value)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> AutoWU:
        """Return a schedule with this state, see ``load_state_dict``."""
        name = cls.__name__
        keys = ("format", "options", *_STATE)
        check.state_dict(name, state_dict, keys, _VERSION)
        if state_dict["format"] != _FORMAT:
            check.fail(name, "state_dict['format']", f"be {_FORMAT!r}", state_dict["format"])
        new = cls(**state_dict["options"])
        rates, losses = state_dict["rates"], state_dict["losses"]
        if rates.shape != (new._total,):
            check.fail(name, "state_dict['rates']", f"have the shape ({new._total},)", tuple(rates.shape))
        new._steps = check.whole(name, "state_dict['steps']", state_dict["steps"])
        new.phase = check.one_of(
            name, "state_dict['phase']", state_dict["phase"], ("warmup", "decay", "final")
        )
        new.back_at = state_dict["back_at"]
        new._losses = losses.to("cpu", torch.float64, copy=True)
        new._epoch.values = None if state_dict["epoch"] is None else state_dict["epoch"].clone()
        new.tests = [WarmupTest(**test) for test in state_dict["tests"]]
        new._smoother.load_state_dict(state_dict["smoother"])
        new._epoch.filled = check.whole(name, "state_dict['filled']", state_dict["filled"])
        new._plateau = list(state_dict["plateau"])
        new._set_rates(rates.cpu().numpy().astype(np.float64))
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and deepcopy, without the source of the losses."""
        return {**self.__dict__, "_source": None, "_alone": False}

    def __repr__(self) -> str:
        """Show the main arguments and the progress of the training."""
        given = ", ".join(
            f"{key}={self._options[key]!r}" for key in ("total_steps", "steps_per_epoch", "decay")
        )
        return f"{type(self).__name__}({given}: {self.phase}, {self._steps} losses, lr {self.lr:.3g})"
