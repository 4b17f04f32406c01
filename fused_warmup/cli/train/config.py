"""Configuration of ``fused-warmup train``: options, defaults and checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import fused_warmup as fw

from ... import _checks as check
from ...backends import BACKENDS, resolve
from ...reference.rounding import MODES
from ...schedules import Schedule
from ..machine import MAX_THREADS

MODELS = ("gpt", "digits")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCHEDULES = ("constant", "linear", "cosine", "exponential", "polynomial", "inverse_sqrt")
# the largest seed of torch's generators
MAX_SEED = 2**64 - 1
_OWNER = "train"
_MOMENTUM = 0.9


@dataclass(frozen=True)
class OptimizerPair:
    """An optimizer of this package and the torch optimizer to compare it with.

    Attributes:
        ours: Class of this package.
        theirs: Class of torch.
        fused: Whether torch has a fused kernel for the CPU.
        lr: Default learning rate, suitable for both models.
        weight_decay: Default of both classes.
        note: Caveat about the comparison, or an empty string.
    """

    ours: type[fw.FusedOptimizer]
    theirs: type[torch.optim.Optimizer]
    fused: bool
    lr: float
    weight_decay: float = 0.0
    note: str = ""

    @property
    def peer(self) -> str:
        """Name of the torch optimizer with its options."""
        return f"{self.theirs.__name__}(fused=True)" if self.fused else self.theirs.__name__


OPTIMIZERS = {
    "adam": OptimizerPair(fw.Adam, torch.optim.Adam, fused=True, lr=2e-3),
    "adamw": OptimizerPair(fw.AdamW, torch.optim.AdamW, fused=True, lr=2e-3, weight_decay=1e-2),
    "giadam": OptimizerPair(
        fw.GIAdam,
        torch.optim.Adam,
        fused=True,
        lr=2e-3,
        note="torch has no GIAdam: its column is Adam, so the losses differ",
    ),
    "radam": OptimizerPair(fw.RAdam, torch.optim.RAdam, fused=False, lr=2e-3),
    "sgd": OptimizerPair(fw.SGD, torch.optim.SGD, fused=True, lr=0.1),
}

_MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt": {"steps": 400, "batch_size": 16},
    "digits": {"steps": 300, "batch_size": 64},
}


@dataclass(frozen=True)
class TrainConfig:
    """All options of a training; ``from_options`` fills in defaults and checks the values.

    Attributes:
        model: ``"gpt"`` or ``"digits"``.
        optimizer: A key of ``OPTIMIZERS``.
        schedule: Shape after the warmup, one of ``SCHEDULES``.
        lr: Learning rate at the end of the warmup, >= 0.
        weight_decay: Weight decay, >= 0.
        steps: Optimizer steps, >= 1.
        warmup: Steps of linear warmup, at most ``steps``.
        batch_size: Examples per step, >= 1.
        dtype: Dtype of parameters and buffers, a key of ``DTYPES``.
        param_rounding: How our optimizer rounds bfloat16 parameters; ``"nearest"`` for float32.
        state_dtype: Dtype of the states of our optimizer, a key of ``DTYPES``.
        max_grad_norm: Largest norm of the gradients; 0 disables clipping.
        ema: Decay of the weight average, in [0, 1); 0 disables averaging.
        seed: Seed of the model and of the batch order, in [0, 2**64).
        threads: Threads of torch and of our kernels, in [1, 1024].
        backend: Backend of our optimizer.
        out: Output folder.
        sharpness_every: Steps between sharpness readings; 0 disables them.
        find_lr: Whether to search for the critical learning rate of the first step.
        compare: Whether to train with the torch lines too.
    """

    model: str
    optimizer: str
    schedule: str
    lr: float
    weight_decay: float
    steps: int
    warmup: int
    batch_size: int
    dtype: str
    param_rounding: str
    state_dtype: str
    max_grad_norm: float
    ema: float
    seed: int
    threads: int
    backend: str
    out: str
    sharpness_every: int
    find_lr: bool
    compare: bool

    @classmethod
    def from_options(cls, **options: Any) -> TrainConfig:
        """Return the checked configuration for command-line options.

        Args:
            options: Fields of ``TrainConfig``; None means the default for this model or optimizer.

        Returns:
            The complete configuration.

        Raises:
            ValueError: If a value is out of range; the message names option, condition and value.
            RuntimeError: If the backend cannot be used here.
        """
        model = check.one_of(_OWNER, "--model", options["model"].lower(), MODELS)
        optimizer = check.one_of(_OWNER, "--optimizer", options["optimizer"].lower(), tuple(OPTIMIZERS))
        schedule = check.one_of(_OWNER, "--schedule", options["schedule"].lower(), SCHEDULES)
        dtype = check.one_of(_OWNER, "--dtype", options["dtype"].lower(), tuple(DTYPES))
        rounding = check.one_of(_OWNER, "--param-rounding", options["param_rounding"].lower(), MODES)
        state_dtype = check.one_of(_OWNER, "--state-dtype", options["state_dtype"].lower(), tuple(DTYPES))
        pair = OPTIMIZERS[optimizer]
        defaults = {**_MODEL_DEFAULTS[model], "lr": pair.lr, "weight_decay": pair.weight_decay}
        values = {
            **options,
            "model": model,
            "optimizer": optimizer,
            "schedule": schedule,
            "dtype": dtype,
            "param_rounding": rounding,
            "state_dtype": state_dtype,
        }
        for name, default in defaults.items():
            if values[name] is None:
                values[name] = default
        if values["warmup"] is None:
            values["warmup"] = int(values["steps"]) // 10
        config = cls(**values)
        config.validate()
        return config

    def validate(self) -> None:
        """Raise for the first value that is out of range."""
        for name in ("steps", "batch_size"):
            check.whole(_OWNER, _option(name), getattr(self, name), 1)
        check.whole(_OWNER, "--threads", self.threads, 1, MAX_THREADS)
        check.whole(_OWNER, "--warmup", self.warmup)
        check.whole(_OWNER, "--seed", self.seed, 0, MAX_SEED)
        for name in ("lr", "weight_decay", "max_grad_norm"):
            check.number(_OWNER, _option(name), getattr(self, name))
        check.number(_OWNER, "--ema", self.ema, 0.0, 1.0)
        if self.find_lr and self.lr == 0.0:
            check.fail(_OWNER, "--lr", "be > 0 for --find-lr", self.lr)
        if self.warmup > self.steps:
            check.fail(_OWNER, "--warmup", f"be <= --steps, which is {self.steps}", self.warmup)
        if self.dtype == "float32" and self.param_rounding != "nearest":
            check.fail(_OWNER, "--param-rounding", "be 'nearest' for --dtype float32", self.param_rounding)
        check.one_of(_OWNER, "--backend", self.backend, ("auto", *BACKENDS))
        resolve(self.backend, torch.device("cpu"))

    @property
    def pair(self) -> OptimizerPair:
        """The optimizers to train with."""
        return OPTIMIZERS[self.optimizer]

    @property
    def param_dtype(self) -> torch.dtype:
        """Dtype of parameters and buffers."""
        return DTYPES[self.dtype]

    @property
    def notes(self) -> list[str]:
        """Caveats about the comparison with torch."""
        notes = [self.pair.note] if self.pair.note else []
        if self.dtype != "float32":
            notes.append(
                f"torch rounds {self.dtype} parameters and states to nearest, ours the parameters by "
                f"{self.param_rounding!r} with {self.state_dtype} states, so the losses differ"
            )
        elif self.state_dtype != "float32":
            notes.append(
                f"torch keeps float32 states, ours keeps {self.state_dtype} ones, so the losses differ"
            )
        return notes if self.compare else []

    def build_schedule(self) -> Schedule:
        """Return the schedule: linear warmup, then the named shape over the remaining steps."""
        rest = self.steps - self.warmup
        if rest == 0:
            return fw.schedules.warmup(self.warmup)
        match self.schedule:
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
                shape = fw.schedules.inverse_sqrt(max(1, self.warmup))
        return fw.schedules.warmup(self.warmup).then(shape) if self.warmup else shape

    def shared_options(self) -> dict[str, Any]:
        """Return the keyword arguments that both optimizers take."""
        options = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            options["momentum"] = _MOMENTUM
        return options


def _option(name: str) -> str:
    """Return the command-line option of a field."""
    return "--" + name.replace("_", "-")
