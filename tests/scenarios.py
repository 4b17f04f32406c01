"""Optimizers by name, and scenarios of steps with small tensors that are run with torch's optimizer and with ours.

``peers.py`` has the same for the cases of ``cases.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_warmup as fw

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("Adam", {}),
    "Adam-amsgrad": ("Adam", {"amsgrad": True}),
    "AdamW": ("AdamW", {}),
    "RAdam": ("RAdam", {}),
    "SGD": ("SGD", {}),
    "SGD-momentum": ("SGD", {"momentum": 0.9}),
    "LAMB": ("LAMB", {"weight_decay": 0.1}),
    "AdamP": ("AdamP", {"delta": 1.0, "weight_decay": 0.1}),
    "SGDP-momentum": ("SGDP", {"momentum": 0.9, "delta": 1e9}),
}
each_case = pytest.mark.parametrize("case", list(CASES))


def build(case: str, params: Any, ours: bool = True, **options: Any) -> torch.optim.Optimizer:
    """Return our optimizer, or that of torch with the same name; the reference where torch has none."""
    name, hyper = CASES[case]
    if not ours and not hasattr(torch.optim, name):
        ours, options = True, {**options, "backend": "reference"}
    return getattr(fw if ours else torch.optim, name)(params, **{"lr": 0.05, **hyper, **options})


def values(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers that depend on the shape and seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def param_of(tensor: Tensor) -> Tensor:
    """Return a leaf over the same memory, with the same strides."""
    return tensor.detach().requires_grad_()


Scenario = Callable[[torch.optim.Optimizer, list[Tensor]], None]


def compare_with_torch(case: str, backend: str, make: Callable[[], list[Tensor]], scenario: Scenario) -> None:
    """Run a scenario with torch's single-tensor optimizer and with ours; the parameters must agree."""
    results = []
    for ours in (False, True):
        params = make()
        options = {"backend": backend} if ours else {"foreach": False}
        scenario(build(case, params, ours, **options), params)
        results.append([param.detach().clone() for param in params])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=3e-6, atol=3e-6)


def walk(opt: torch.optim.Optimizer, params: list[Tensor], steps: int = 3, seed: int = 1) -> None:
    """Make steps with gradients that are new tensors each time."""
    for i in range(steps):
        for j, param in enumerate(params):
            param.grad = values(*param.shape, seed=seed + 10 * i + j).to(param.dtype)
        opt.step()
