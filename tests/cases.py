"""Optimizers, schedules and shapes as data; a new optimizer adds its lines here."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_warmup as fw
from fused_warmup import schedules

# backends that take tensors on the CPU without an interpreter
BACKENDS = tuple(name for name in ("reference", "cpu") if name in fw.available_backends())


@dataclass(frozen=True)
class Case:
    """An optimizer with options, and the torch optimizer that must agree with it."""

    name: str
    cls: type[fw.FusedOptimizer]
    options: dict[str, Any] = field(default_factory=dict)
    torch_cls: type[torch.optim.Optimizer] | None = None
    torch_options: dict[str, Any] | None = None

    def make(self, params: Any, **options: Any) -> fw.FusedOptimizer:
        return self.cls(params, **{**self.options, **options})

    def make_torch(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        own = self.options if self.torch_options is None else self.torch_options
        assert self.torch_cls is not None
        return self.torch_cls(params, **{**own, **options})


def _adam(name: str, **options: Any) -> Case:
    return Case(name, fw.Adam, options, torch.optim.Adam)


def _radam(name: str, torch_cls: Any = torch.optim.RAdam, **options: Any) -> Case:
    return Case(name, fw.RAdam, options, torch_cls)


def _sgd(name: str, **options: Any) -> Case:
    return Case(name, fw.SGD, options, torch.optim.SGD)


def _layer(name: str, cls: type[fw.FusedOptimizer], **options: Any) -> Case:
    return Case(name, cls, {"lr": 1e-2, **options})


# decay 0.093: no parameter of make_params times it comes near a gradient of set_grads, which would leave rounding
# errors alone for Adam to normalise
CASES = [
    _adam("adam", lr=1e-2),
    _adam("adam-l2", lr=1e-2, weight_decay=0.093),
    _adam("adam-decoupled", lr=1e-2, weight_decay=0.093, decoupled_weight_decay=True),
    _adam("adam-amsgrad", lr=1e-2, amsgrad=True, betas=(0.8, 0.95)),
    _adam("adam-maximize", lr=1e-2, maximize=True, weight_decay=0.093),
    _adam("adam-beta0", lr=1e-2, betas=(0.0, 0.9), eps=1e-3),
    Case("adamw", fw.AdamW, {"lr": 1e-2}, torch.optim.AdamW),
    Case("adamw-amsgrad", fw.AdamW, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.3}, torch.optim.AdamW),
    Case("giadam", fw.GIAdam, {"lr": 1e-2}),
    Case("giadam-l2-scale", fw.GIAdam, {"lr": 1e-2, "weight_decay": 0.093, "exp_avg_sq_init_scale": 3.0}),
    Case("giadam-amsgrad", fw.GIAdam, {"lr": 1e-2, "amsgrad": True, "decoupled_weight_decay": True}),
    _radam("radam", lr=1e-2),
    _radam("radam-l2", lr=1e-2, weight_decay=0.093),
    _radam("radam-decoupled", lr=1e-2, weight_decay=0.093, decoupled_weight_decay=True),
    _radam("radam-maximize", lr=1e-2, maximize=True, betas=(0.8, 0.99)),
    _radam("radam-never", lr=1e-2, betas=(0.9, 0.6)),
    _radam("radam-paper", None, lr=1e-2, rho_threshold=4.0),
    _radam("radam-skip", None, lr=1e-2, unrectified="skip", weight_decay=0.093, decoupled_weight_decay=True),
    _sgd("sgd", lr=1e-2),
    _sgd("sgd-l2-maximize", lr=1e-2, weight_decay=0.093, maximize=True),
    _sgd("sgd-momentum", lr=1e-2, momentum=0.9, weight_decay=0.093),
    _sgd("sgd-dampening", lr=1e-2, momentum=0.9, dampening=0.5),
    _sgd("sgd-nesterov", lr=1e-2, momentum=0.9, nesterov=True),
    _layer("lamb", fw.LAMB, weight_decay=0.093),
    _layer("lamb-nvlamb", fw.LAMB, preset="nvlamb", max_grad_norm=None),
    _layer(
        "lamb-bounds",
        fw.LAMB,
        preset="lambc",
        norm_clip=(0.5, 20.0),
        bias_correction=False,
        betas=(0.8, 0.95),
    ),
    _layer(
        "lamb-l2", fw.LAMB, weight_decay=0.093, decay_mode="gradient", grad_averaging=False, maximize=True
    ),
    _layer("lamb-decoupled", fw.LAMB, weight_decay=0.093, decay_mode="decoupled", always_adapt=True),
    _layer("adamp", fw.AdamP, weight_decay=0.093),
    _layer("adamp-channel", fw.AdamP, weight_decay=0.093, delta=1e3, nesterov=True),
    _layer("adamp-never", fw.AdamP, weight_decay=0.093, delta=0.0, maximize=True),
    _layer("sgdp", fw.SGDP, weight_decay=0.093, delta=1.0),
    _layer(
        "sgdp-momentum", fw.SGDP, momentum=0.9, dampening=0.5, delta=3.0, wd_ratio=0.5, weight_decay=0.093
    ),
    _layer("sgdp-nesterov", fw.SGDP, momentum=0.9, nesterov=True, maximize=True),
]
TORCH_CASES = [case for case in CASES if case.torch_cls is not None]
BY_NAME = {case.name: case for case in CASES}

SCHEDULES = {
    "none": None,
    "warmup_linear": schedules.warmup(5, 0.1).then(schedules.linear(1.0, 0.0, 50)),
    "cosine": schedules.cosine(1.0, 0.1, 30),
    "exponential": schedules.exponential(0.01, 1.0, 40),
    "polynomial": schedules.constant(0.5, 3).then(schedules.polynomial(1.0, 0.2, 20, 2.0)),
    "inverse_sqrt": schedules.warmup(7).then(schedules.inverse_sqrt(10.0)),
    "table": schedules.table([0.1, 0.9, 0.3, 1.0, 0.7]).then(schedules.constant(0.25)),
}

# empty and 0-dim tensors, sizes around the lanes, blocks and chunks of the kernels
SHAPES = [(0,), (), (1,), (63,), (2, 3, 5), (17, 31), (2047,), (2049,), (32769,), (3, 0)]
SMALL_SHAPES = [(0,), (), (1,), (63,), (2, 3, 5), (17, 31)]
# a vector, a matrix and a 0-dim tensor
THREE_SHAPES = [(63,), (7, 9), ()]


@pytest.fixture(params=BACKENDS)
def every_backend(request: pytest.FixtureRequest) -> str:
    """Give one backend after the other to the tests of a file in which ``backend = every_backend`` stands.

    A file that imports such tests to run them by another backend has a fixture ``backend`` of its own.
    """
    return request.param


def device_of(backend: str) -> str:
    """Where tests put the parameters of a backend."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def make_params(
    dtype: torch.dtype, shapes: Any = SHAPES, seed: int = 0, device: str = "cpu"
) -> list[torch.nn.Parameter]:
    """Normal parameters, the same numbers for every dtype up to rounding to bfloat16 and float16 at once."""
    generator = torch.Generator().manual_seed(seed)
    values = [
        torch.randn(shape, generator=generator).to(torch.bfloat16).to(torch.float16) for shape in shapes
    ]
    return [torch.nn.Parameter(value.to(device, dtype)) for value in values]


def set_grads(params: Any, step: int, scale: float = 1.0) -> None:
    """Give gradients that depend on the step and the parameter only, exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(torch.bfloat16) * (0.25 * (1 + i % 3))
        param.grad = (grad.to(torch.float16).to(torch.float32) * scale).to(param.device, param.dtype)


def states_of(opt: fw.FusedOptimizer, param: Tensor) -> dict[str, Tensor]:
    """The tensors that belong to one parameter, by name."""
    return {name: value for name, value in opt.state[param].items() if isinstance(value, Tensor)}


def tensors_of(opt: fw.FusedOptimizer, params: Any) -> list[Tensor]:
    """Parameters, each with all of its states in the order of their names."""
    return [t for p in params for t in (p.detach(), *(t for _, t in sorted(states_of(opt, p).items())))]


def assert_close(name: str, actual: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
    """Every element within ``atol + rtol * |expected|``; the worst one is named."""
    actual, expected = (t.detach().double().cpu() for t in (actual, expected))
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    excess = (actual - expected).abs() - (atol + rtol * expected.abs())
    same_nan = actual.isnan() & expected.isnan()
    bad = ~(excess <= 0) & ~same_nan & (actual != expected)
    if bad.any():
        worst = int(excess.nan_to_num(torch.inf).flatten().argmax())
        a, e = float(actual.flatten()[worst]), float(expected.flatten()[worst])
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} differ; [{worst}] is {a!r}, expected {e!r}"
        )


def assert_same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, NaN payloads and signs of zero included."""
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, name
    same = [t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (actual, expected)]
    assert torch.equal(*same), f"{name}: bits differ"


def through_file(saved: Any) -> Any:
    """Return what comes back from a file that only tensors and plain types may be in."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
