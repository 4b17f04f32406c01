"""The optimizer stage of a training step: in one line, and in the four lines of torch that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_warmup as fw

from .config import Settings, hyper_of, schedule_of
from .edge import EdgeWatch, search


class Contestant(Protocol):
    """A model with its optimizer stage."""

    name: str
    model: nn.Module

    def observe(self, loss: Tensor, loss_fn: Callable[[], Tensor]) -> None:
        """Take note of the loss and how to compute it again, before the stage and outside all times."""

    def step(self) -> None:
        """Make the optimizer stage, which is what is timed."""

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Give the model with the averaged weights."""


class Ours:
    """One line."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.name = f"fused_warmup {settings.choice.ours.__name__}"
        self.model = model
        average = fw.EMA(settings.ema) if settings.ema else None
        options: dict[str, Any] = {
            "schedule": schedule_of(settings),
            "max_grad_norm": settings.max_grad_norm or None,
            "average": average,
            "backend": settings.backend,
        }
        kind: Any = settings.choice.ours
        self.opt: fw.FusedOptimizer = kind(model.parameters(), **hyper_of(settings), **options)
        self.edge = EdgeWatch(self.opt, settings.sharpness_every) if settings.sharpness_every else None
        self.found: dict[str, Any] | None = None
        self._target = settings.lr if settings.find_lr else None

    def observe(self, loss: Tensor, loss_fn: Callable[[], Tensor]) -> None:
        """Leave the loss for the telemetry; look at the sharpness, and along the first step, if asked to."""
        self.opt.record_loss(loss)
        if self._target is not None:
            self.found = search(self.opt, loss_fn, self._target)
            self._target = None
        if self.edge is not None:
            self.edge.measure(loss_fn)

    def step(self) -> None:
        """Make the optimizer stage."""
        self.opt.step()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Put the averages in the place of the parameters.

        Yields:
            The model.
        """
        with self.opt.averaged_parameters():
            yield self.model


class Theirs:
    """The four lines."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.name = f"torch {settings.choice.peer}"
        self.model = model
        fused = {"fused": True} if settings.choice.fused else {}
        self.opt = settings.choice.theirs(model.parameters(), **hyper_of(settings), **fused)
        self.scheduler = LambdaLR(self.opt, schedule_of(settings))
        self.max_grad_norm = settings.max_grad_norm
        self.average = None
        if settings.ema:
            ema = get_ema_multi_avg_fn(settings.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(model, multi_avg_fn=ema)

    def observe(self, loss: Tensor, loss_fn: Callable[[], Tensor]) -> None:
        """Do nothing."""

    def step(self) -> None:
        """Make the optimizer stage."""
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.opt.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Do nothing: the averages have a model of their own.

        Yields:
            The averaged copy of the model.
        """
        assert self.average is not None
        yield self.average
