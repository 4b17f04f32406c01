"""Scaled losses: steps by torch's ``GradScaler``, steps that it skips, and what it leaves on the optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from cases import assert_same_bits
from peers import each_backend
from scenarios import build, each_case, param_of, values, walk
from torch import Tensor

import fused_warmup as fw


def tensors_of(opt: torch.optim.Optimizer, param: Tensor) -> list[Tensor]:
    """The states of a parameter, the count of steps included."""
    return [value for value in opt.state[param].values() if isinstance(value, Tensor)]


@each_backend
@each_case
@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("unscaled", [True, False], ids=["unscaled", "scaled"])
def test_grad_scaler(case: str, backend: str, clip: float | None, unscaled: bool) -> None:
    """Unscale, then norm, then clip, with or without ``unscale_``; an overflow halves the scale.

    A skipped step changes nothing, on the first step too, and leaves a row that says so.
    """
    results = []
    for ours in (False, True):
        param = param_of(values(6))
        options = {"backend": backend, "max_grad_norm": clip} if ours else {"foreach": False}
        opt = build(case, [param], ours, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        norms = []
        for i in range(5):
            opt.zero_grad()
            loss = (param * values(6, seed=i)).sum() * (math.inf if i in {0, 3} else 1.0)
            scaler.scale(loss).backward()
            if unscaled or not ours:
                scaler.unscale_(opt)
            if not ours and clip is not None:
                torch.nn.utils.clip_grad_norm_([param], clip)
            norms.append(float(values(6, seed=i).norm()))
            before = [t.clone() for t in (param.detach(), *tensors_of(opt, param))]
            scaler.step(opt)
            scaler.update()
            if ours and i == 3:
                for old, new in zip(before, (param.detach(), *tensors_of(opt, param)), strict=True):
                    assert_same_bits("after an overflow", old, new)
        results.append(param.detach())
        assert scaler.get_scale() == 256.0
        assert not hasattr(opt, "found_inf")
    torch.testing.assert_close(results[1], results[0])
    history = opt.telemetry.history()
    assert history["skipped"].tolist() == [1, 0, 0, 1, 0]
    assert history["step"].tolist() == [0, 1, 2, 2, 3]
    made = history["skipped"] == 0
    assert history["grad_norm"][made].tolist() == pytest.approx([norms[i] for i in (1, 2, 4)], rel=1e-6)
    # without a measure pass nobody looks at the gradients of a step that is not made
    assert not history["grad_norm"][~made].isfinite().any()


@each_backend
@pytest.mark.parametrize("late", [False, True], ids=["first step skipped", "gradient comes later"])
def test_a_random_start_waits_for_the_first_update(backend: str, late: bool) -> None:
    """The random start is scaled by the norm at the first update, even if that is not the first call of ``step``."""
    results = []
    for waits in (False, True):
        torch.manual_seed(3)
        params = [param_of(values(6)), param_of(values(5))]
        opt = fw.Adam(params, lr=0.1, exp_avg_sq_init="random", backend=backend)
        opt.init_state()
        if waits and late:
            opt.step()
        elif waits:
            for p in params:
                p.grad = torch.full_like(p, math.inf)
            opt.found_inf = torch.ones(())
            opt.step()
            del opt.found_inf
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        results.append([p.detach() for p in params])
        assert float(opt.state[params[0]]["exp_avg_sq"].mean()) > 0.0
    for a, b in zip(*results, strict=True):
        assert_same_bits("param", a, b)


@each_backend
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros((), dtype=torch.float64)], ids=["two", "wide"])
def test_what_a_scaler_leaves_is_checked(backend: str, name: str, value: Tensor) -> None:
    """A scale of another kind would be read as other bits."""
    param = param_of(values(4))
    opt = fw.Adam([param], backend=backend)
    walk(opt, [param], 1)
    before = param.detach().clone()
    param.grad = values(4)
    setattr(opt, name, value)
    with pytest.raises(ValueError, match=f"Adam: {name} must be one float32 on cpu, got"):
        opt.step()
    assert_same_bits("param", before, param.detach())
