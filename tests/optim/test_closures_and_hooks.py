"""Closures, hooks, and the name of a step in torch's profiler.

``test_torch_calls.py`` has what torch's own tests ask of them.
"""

from __future__ import annotations

import pytest
import torch
from peers import each_backend
from scenarios import build, each_case, param_of, values, walk
from torch import Tensor

import fused_warmup as fw


@each_backend
@each_case
def test_closures(case: str, backend: str) -> None:
    """A closure is called once with gradients enabled, even under no_grad; the loss comes back and is recorded."""
    param = param_of(values(4))
    opt = build(case, [param], backend=backend)
    calls = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    with torch.no_grad():
        losses = [opt.step(closure) for _ in range(3)]
    assert [float(loss.detach()) for loss in losses] == calls
    assert len(calls) == 3
    recorded = opt.telemetry.history()["loss"].tolist()
    assert recorded == [float(torch.tensor(call)) for call in calls]
    assert calls[2] < calls[0]
    assert build(case, [param_of(values(2))], backend=backend).step(lambda: 0.25) == 0.25


@each_backend
def test_an_error_in_the_closure_changes_nothing(backend: str) -> None:
    """The exception of the closure propagates."""
    param = param_of(values(4))
    opt = fw.Adam([param], backend=backend)
    walk(opt, [param])
    before = param.detach().clone()

    def closure() -> Tensor:
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        opt.step(closure)
    assert torch.equal(param, before)
    assert len(opt.telemetry) == 3


@each_backend
@each_case
def test_hooks_and_profiler_names(case: str, backend: str) -> None:
    """Pre and post hooks run around the step, and the profiler sees torch's name for it."""
    param = param_of(values(4))
    opt = build(case, [param], backend=backend)
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o is opt, param.detach().clone())))
    opt.register_step_post_hook(
        lambda o, args, kwargs: seen.append(("post", o is opt, param.detach().clone()))
    )
    opt.register_state_dict_post_hook(lambda o, state: seen.append(("saved", o is opt, None)))
    opt.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o is opt, None)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        walk(opt, [param], 1)
    assert [(name, same) for name, same, _ in seen] == [("pre", True), ("post", True)]
    assert not torch.equal(seen[0][2], seen[1][2])
    assert f"Optimizer.step#{type(opt).__name__}.step" in {event.key for event in profile.key_averages()}
    opt.load_state_dict(opt.state_dict())
    assert [name for name, _, _ in seen[2:]] == ["saved", "loaded"]
