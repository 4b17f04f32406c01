"""What a state dict brings and what stays when it is loaded, ours or torch's: hyper-parameters, buffers, dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from peers import each_backend
from scenarios import build, each_case, param_of, values, walk
from torch import Tensor

import fused_warmup as fw


@each_backend
@each_case
def test_state_dicts_of_torch_load_both_ways(case: str, backend: str) -> None:
    """Training goes on as torch's after loading torch's state, and the reverse."""

    def continued(first: bool, second: bool) -> list[Tensor]:
        params = [param_of(values(5, 4)), param_of(values(3))]
        options = [{"backend": backend} if ours else {"foreach": False} for ours in (first, second)]
        opt = build(case, params, first, **options[0])
        walk(opt, params, 4)
        other = build(case, params, second, lr=0.9, **options[1])
        other.load_state_dict(opt.state_dict())
        walk(other, params, 4, seed=90)
        return [param.detach() for param in params]

    expected = continued(False, False)
    for path in ((False, True), (True, False), (True, True)):
        for actual, want in zip(continued(*path), expected, strict=True):
            torch.testing.assert_close(actual, want, rtol=3e-6, atol=3e-6)


@each_backend
@pytest.mark.parametrize("saved", [{"momentum": 0.9}, {"momentum": 0.0}], ids=["with", "without"])
@pytest.mark.parametrize("live", [{"momentum": 0.9}, {"momentum": 0.0}], ids=["into with", "into without"])
def test_momentum_comes_with_the_state_dict(
    backend: str, saved: dict[str, float], live: dict[str, float]
) -> None:
    """The saved momentum replaces the live one, so its buffer must load, as in torch."""
    results = []
    for ours in (False, True):
        param = param_of(values(5))
        opt = torch.optim.SGD([param], lr=0.1, **saved)
        walk(opt, [param])
        options = {"backend": backend} if ours else {}
        other = (fw if ours else torch.optim).SGD([param], lr=0.5, **live, **options)
        other.load_state_dict(opt.state_dict())
        walk(other, [param], seed=30)
        results.append(param.detach())
    torch.testing.assert_close(results[1], results[0])


@each_backend
def test_amsgrad_comes_with_the_state_dict(backend: str) -> None:
    """The saved amsgrad flag and its third state replace the live ones."""
    results = []
    for ours in (False, True):
        param = param_of(values(5))
        opt = torch.optim.Adam([param], lr=0.1, amsgrad=True)
        walk(opt, [param])
        other = fw.Adam([param], backend=backend) if ours else torch.optim.Adam([param])
        other.load_state_dict(opt.state_dict())
        walk(other, [param], seed=30)
        results.append(param.detach())
    torch.testing.assert_close(results[1], results[0])


@each_backend
@each_case
def test_loading_keeps_the_buffers(case: str, backend: str) -> None:
    """Values are copied into the tensors that exist."""
    param = param_of(values(5))
    opt = build(case, [param], backend=backend, average=fw.EMA(0.9))
    walk(opt, [param])
    before = {key: (id(value), value.data_ptr()) for key, value in opt.state[param].items()}
    saved = copy.deepcopy(opt.state_dict())
    walk(opt, [param])
    opt.load_state_dict(saved)
    assert {key: (id(value), value.data_ptr()) for key, value in opt.state[param].items()} == before
    assert int(opt.state[param]["step"]) == 3


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loading_keeps_float32_states(backend: str, dtype: torch.dtype) -> None:
    """Float32 moments beside 16-bit parameters stay float32, to the last bit."""
    param = param_of(values(50).to(dtype))
    opt = fw.Adam([param], backend=backend, amsgrad=True, average=fw.EMA(0.9))
    walk(opt, [param])
    saved = copy.deepcopy(opt.state_dict())
    other = fw.Adam([param], backend=backend, amsgrad=True, average=fw.EMA(0.9))
    other.load_state_dict(saved)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "average"):
        assert other.state[param][key].dtype == torch.float32
        assert torch.equal(other.state[param][key], opt.state[param][key])
