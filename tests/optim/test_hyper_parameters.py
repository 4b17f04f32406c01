"""Hyper-parameters written in place, set by torch's schedulers or turned on later, and flags of torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import each_backend
from scenarios import build, compare_with_torch, each_case, param_of, values, walk
from torch import Tensor
from torch.optim import lr_scheduler

import fused_warmup as fw

# written in place


@each_backend
def test_a_learning_rate_tensor_shared_by_groups(backend: str) -> None:
    """One tensor given to two groups stays the user's, as in torch: filling it sets both."""

    def applied(make: Any, step: Any) -> tuple[list[float], float]:
        lr = torch.tensor(0.1)
        opt = make([{"params": [param_of(values(3))]}, {"params": [param_of(values(3))]}], lr)
        scheduler = lr_scheduler.LambdaLR(opt, [lambda t: 1.0, lambda t: 0.5])
        for _ in range(3):
            step(opt, [p for g in opt.param_groups for p in g["params"]], 1)
            scheduler.step()
        lr.fill_(0.3)
        step(opt, [p for g in opt.param_groups for p in g["params"]], 1)
        return [float(group["lr"]) for group in opt.param_groups], float(lr)

    ours = applied(lambda groups, lr: fw.Adam(groups, lr=lr, backend=backend), walk)
    assert ours == applied(lambda groups, lr: torch.optim.Adam(groups, lr=lr), walk)
    assert ours[0] == [pytest.approx(0.3)] * 2


@each_backend
@each_case
def test_a_learning_rate_tensor_written_in_place(case: str, backend: str) -> None:
    """``group["lr"].fill_(...)`` reaches the next step."""
    params = [param_of(values(5))]
    opt = build(case, params, lr=torch.tensor(0.05), backend=backend)
    applied = []
    for lr in (0.05, 0.01, 0.0):
        opt.param_groups[0]["lr"].fill_(lr)
        walk(opt, params, 1)
        applied.append(opt.telemetry.latest()["lr"])
    assert applied == [float(torch.tensor(lr)) for lr in (0.05, 0.01, 0.0)]


@each_backend
@pytest.mark.parametrize("key", ["weight_decay", "betas"])
def test_other_hyper_parameters_written_in_place(backend: str, key: str) -> None:
    """A decay or a list of betas written in place takes effect like a rate."""
    params = [param_of(values(5)), param_of(values(5))]
    start = {"weight_decay": torch.tensor(0.0), "betas": [0.9, 0.99]}
    end = {"weight_decay": torch.tensor(0.5), "betas": [0.5, 0.99]}
    written = fw.Adam([params[0]], lr=0.1, backend=backend, **{key: start[key]})
    replaced = fw.Adam([params[1]], lr=0.1, backend=backend, **{key: copy.deepcopy(start[key])})
    for opt, param in zip((written, replaced), params, strict=True):
        walk(opt, [param], 2)
    if key == "betas":
        written.param_groups[0]["betas"][0] = 0.5
    else:
        written.param_groups[0]["weight_decay"].fill_(0.5)
    replaced.param_groups[0][key] = end[key]
    for opt, param in zip((written, replaced), params, strict=True):
        walk(opt, [param], 2, seed=5)
    assert torch.equal(params[0], params[1])


# schedulers

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (t + 1)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[4],
    ),
}


@each_backend
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
@pytest.mark.parametrize("case", ["Adam", "RAdam", "SGD-momentum"])
def test_schedulers_of_torch(case: str, backend: str, scheduler: str, as_tensor: bool) -> None:
    """Torch's schedulers drive our rates (and momenta) as they drive torch's."""
    results = []
    for ours in (False, True):
        params = [param_of(values(6))]
        options = {"backend": backend} if ours else {"foreach": False}
        lr = torch.tensor(0.05, dtype=torch.float64) if as_tensor and ours else 0.05
        opt = build(case, params, ours, lr=lr, **options)
        driver = SCHEDULERS[scheduler](opt)
        rates = []
        for i in range(12):
            walk(opt, params, 1, seed=i)
            driver.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            rates.append(float(opt.param_groups[0]["lr"]))
        results.append((params[0].detach(), rates))
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-12)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)


# flags


@each_backend
@each_case
@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable"])
def test_flags_of_torch_change_nothing(case: str, backend: str, flag: str) -> None:
    """Accepted, so that a swap-in needs one changed word."""
    plain, flagged = [param_of(values(20))], [param_of(values(20))]
    walk(build(case, plain, backend=backend), plain)
    walk(build(case, flagged, backend=backend, **{flag: True}), flagged)
    assert torch.equal(plain[0], flagged[0])


@each_backend
@each_case
def test_maximize(case: str, backend: str) -> None:
    """Ascent is descent with the opposite gradient."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        opt.param_groups[0]["maximize"] = True
        walk(opt, params)

    compare_with_torch(case, backend, lambda: [param_of(values(20))], scenario)


@each_backend
def test_options_turned_on_later(backend: str) -> None:
    """Amsgrad and momentum switched between steps; SGD's buffer then starts with the whole gradient."""

    def amsgrad(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        walk(opt, params, 2)
        opt.param_groups[0]["amsgrad"] = True
        if not isinstance(opt, fw.FusedOptimizer):
            opt.state[params[0]]["max_exp_avg_sq"] = torch.zeros_like(params[0])
        walk(opt, params, 3, seed=20)
        opt.param_groups[0]["amsgrad"] = False
        walk(opt, params, 2, seed=60)

    def momentum(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        opt.param_groups[0]["dampening"] = 0.5
        walk(opt, params, 2)
        opt.param_groups[0]["momentum"] = 0.9
        walk(opt, params, 3, seed=20)

    make = lambda: [param_of(values(20))]  # noqa: E731
    compare_with_torch("Adam", backend, make, amsgrad)
    compare_with_torch("SGD", backend, make, momentum)
