"""Counts of steps: the step where RAdam rectifies, counts that float32 cannot hold, counts of every kind in a file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from peers import each_backend
from scenarios import build, each_case, param_of, values, walk

import fused_warmup as fw


@each_backend
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.6, 2.0 / 3.0, 0.7, 0.9, 0.99, 0.999, 0.9999])
def test_radam_near_its_threshold(backend: str, beta2: float) -> None:
    """Rectification sets in at the step of the closed form, or never; no NaN on the way."""
    param = param_of(values(4))
    opt = fw.RAdam([param], betas=(0.9, beta2), backend=backend)
    walk(opt, [param], 12)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    for t, rect in enumerate(opt.telemetry.history()["rect"].tolist(), 1):
        rho = rho_inf - 2.0 * t * beta2**t / (1.0 - beta2**t)
        expected = 0.0
        if rho > 5.0:
            expected = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        assert rect == pytest.approx(expected, rel=1e-9)
    assert bool(param.isfinite().all())


@each_backend
@each_case
@pytest.mark.parametrize("start", [2**24, 2**31, 2**53, 2**60], ids=["2^24", "2^31", "2^53", "2^60"])
def test_counting_goes_on_after_huge_steps(case: str, backend: str, start: int) -> None:
    """The float32 of torch stops at 2^24; the count behind it is int64, in the state dict as well."""
    param = param_of(values(4))
    opt = build(case, [param], backend=backend)
    walk(opt, [param], 1)
    opt.state[param]["step"].fill_(start)
    walk(opt, [param], 3)
    assert opt.state_dict()["fused_warmup"]["steps"].tolist() == [start + 3]
    assert float(opt.state[param]["step"]) == float(np.float32(start + 3))
    assert bool(param.isfinite().all())
    other = build(case, [param], backend=backend)
    other.load_state_dict(opt.state_dict())
    walk(other, [param], 1)
    assert other.state_dict()["fused_warmup"]["steps"].tolist() == [start + 4]


@each_backend
@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7.0])], ids=repr)
def test_step_counts_of_every_kind_load(backend: str, step: Any) -> None:
    """Step counts as int, float, 0-dim and one-element tensors load; we write torch's 0-dim float32."""
    param = param_of(values(4))
    theirs = torch.optim.Adam([param])
    walk(theirs, [param])
    state = theirs.state_dict()
    state["state"][0]["step"] = step
    opt = fw.Adam([param], backend=backend)
    opt.load_state_dict(state)
    assert int(opt.state[param]["step"]) == 7
    written = opt.state_dict()["state"][0]["step"]
    assert (written.dtype, written.shape, float(written)) == (torch.float32, (), 7.0)
