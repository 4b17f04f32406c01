"""What a training takes: defaults, checks, and the objects that the words name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import fused_warmup as fw

from ... import _checks as check
from ...backends import BACKENDS, resolve
from ...schedules import Schedule
from ..machine import MOST_THREADS

MODELS = ("gpt", "digits")
SCHEDULES = ("constant", "linear", "cosine", "exponential", "polynomial", "inverse_sqrt")
# what the generators of torch take
MOST_SEED = 2**64 - 1
_OWNER = "train"
_MOMENTUM = 0.9


@dataclass(frozen=True)
class Choice:
    """An optimizer by name: ours, and what stands against it.

    Attributes:
        ours: Class of this package.
        theirs: Class of torch.
        fused: Whether torch has a fused kernel for the CPU.
        lr: Learning rate that suits the two models.
        weight_decay: The class's own default.
        note: What must be known to read the comparison.
    """

    ours: type[fw.FusedOptimizer]
    theirs: Callable[..., torch.optim.Optimizer]
    fused: bool
    lr: float
    weight_decay: float = 0.0
    note: str = ""

    @property
    def peer(self) -> str:
        """Name of torch's optimizer with its options."""
        return f"{getattr(self.theirs, '__name__', '')}{'(fused=True)' if self.fused else ''}"


OPTIMIZERS = {
    "adam": Choice(fw.Adam, torch.optim.Adam, True, 2e-3),
    "adamw": Choice(fw.AdamW, torch.optim.AdamW, True, 2e-3, 1e-2),
    "giadam": Choice(
        fw.GIAdam,
        torch.optim.Adam,
        True,
        2e-3,
        note="torch has no GIAdam: its column is Adam, so the losses differ",
    ),
    "radam": Choice(fw.RAdam, torch.optim.RAdam, False, 2e-3),
    "sgd": Choice(fw.SGD, torch.optim.SGD, True, 0.1),
}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt": {"steps": 400, "batch_size": 16},
    "digits": {"steps": 300, "batch_size": 64},
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training; ``make`` fills in the defaults and checks.

    Attributes:
        model: ``"gpt"`` or ``"digits"``.
        optimizer: A key of ``OPTIMIZERS``.
        schedule: One of ``SCHEDULES``, after the warmup.
        lr: Learning rate at the end of the warmup, >= 0.
        weight_decay: >= 0.
        steps: Optimizer steps, >= 1.
        warmup: Steps of linear warmup, at most ``steps``.
        batch_size: Examples per step, >= 1.
        max_grad_norm: Largest norm of the gradients; 0 does not clip.
        ema: Decay of the weight average, in [0, 1); 0 keeps none.
        seed: Seed of the model and of the order of the data, in [0, 2**64).
        threads: Threads of torch and of our kernels, in [1, 1024].
        backend: Backend of ours.
        out: Folder for what is written.
        sharpness_every: Steps from one reading of the sharpness to the next; 0 takes none.
        find_lr: Search for the critical learning rate of the first step.
        compare: Train with the torch lines too.
    """

    model: str
    optimizer: str
    schedule: str
    lr: float
    weight_decay: float
    steps: int
    warmup: int
    batch_size: int
    max_grad_norm: float
    ema: float
    seed: int
    threads: int
    backend: str
    out: str
    sharpness_every: int
    find_lr: bool
    compare: bool

    @property
    def choice(self) -> Choice:
        """The optimizers that the name stands for."""
        return OPTIMIZERS[self.optimizer]


def make(**given: Any) -> Settings:
    """Return checked settings.

    Args:
        given: Fields of ``Settings``; None stands for the default, which may depend on model and optimizer.

    Returns:
        The settings, complete.

    Raises:
        ValueError: If a value is out of range; option, condition and value are named.
        RuntimeError: If the backend cannot be used here.
    """
    model = check.one_of(_OWNER, "--model", given["model"].lower(), MODELS)
    optimizer = check.one_of(_OWNER, "--optimizer", given["optimizer"].lower(), tuple(OPTIMIZERS))
    schedule = check.one_of(_OWNER, "--schedule", given["schedule"].lower(), SCHEDULES)
    choice = OPTIMIZERS[optimizer]
    defaults = {"lr": choice.lr, "weight_decay": choice.weight_decay}
    given = {**given, "model": model, "optimizer": optimizer, "schedule": schedule}
    for name, value in {**defaults, **_DEFAULTS[model]}.items():
        given[name] = value if given[name] is None else given[name]
    given["warmup"] = int(given["steps"]) // 10 if given["warmup"] is None else given["warmup"]
    settings = Settings(**given)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    """Raise for the first value that is out of range."""
    for name in ("steps", "batch_size"):
        check.whole(_OWNER, _option(name), getattr(settings, name), 1)
    check.whole(_OWNER, "--threads", settings.threads, 1, MOST_THREADS)
    check.whole(_OWNER, "--warmup", settings.warmup)
    check.whole(_OWNER, "--seed", settings.seed, 0, MOST_SEED)
    for name in ("lr", "weight_decay", "max_grad_norm"):
        check.number(_OWNER, _option(name), getattr(settings, name))
    check.number(_OWNER, "--ema", settings.ema, 0.0, 1.0)
    if settings.find_lr and settings.lr == 0.0:
        check.fail(_OWNER, "--lr", "be > 0 for --find-lr", settings.lr)
    if settings.warmup > settings.steps:
        check.fail(_OWNER, "--warmup", f"be <= --steps, which is {settings.steps}", settings.warmup)
    check.one_of(_OWNER, "--backend", settings.backend, ("auto", *BACKENDS))
    resolve(settings.backend, torch.device("cpu"))


def _option(name: str) -> str:
    """Return the option of a field."""
    return "--" + name.replace("_", "-")


def schedule_of(settings: Settings) -> Schedule:
    """Return the schedule: the warmup, then the named shape over the steps that are left."""
    rest = settings.steps - settings.warmup
    if rest == 0:
        return fw.schedules.warmup(settings.warmup)
    match settings.schedule:
        case "constant":
            shape = fw.schedules.constant()
        case "linear":
            shape = fw.schedules.linear(1.0, 0.0, rest)
        case "cosine":
            shape = fw.schedules.cosine(1.0, 0.0, rest)
        case "exponential":
            shape = fw.schedules.exponential(1.0, 0.01, rest)
        case "polynomial":
            shape = fw.schedules.polynomial(1.0, 0.0, rest, 2.0)
        case _:
            shape = fw.schedules.inverse_sqrt(max(1, settings.warmup))
    return fw.schedules.warmup(settings.warmup).then(shape) if settings.warmup else shape


def hyper_of(settings: Settings) -> dict[str, Any]:
    """Return the keyword arguments that both optimizers take."""
    momentum = {"momentum": _MOMENTUM} if settings.optimizer == "sgd" else {}
    return {"lr": settings.lr, "weight_decay": settings.weight_decay, **momentum}
