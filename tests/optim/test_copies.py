"""Copies of an optimizer with its parameters: by ``deepcopy``, by pickle and from a file."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from peers import each_backend
from scenarios import build, each_case, values, walk

import fused_warmup as fw


@each_backend
@each_case
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_as_the_original(case: str, backend: str, how: str) -> None:
    """A copy of model and optimizer trains on with the same bits, and leaves the original alone."""
    params = [torch.nn.Parameter(values(40, 3)), torch.nn.Parameter(values(7))]
    warmup = fw.schedules.warmup(5)
    opt = build(case, params, backend=backend, average=fw.EMA(0.9), schedule=warmup, max_grad_norm=1.0)
    walk(opt, params)
    if how == "deepcopy":
        params2, opt2 = copy.deepcopy((params, opt))
    elif how == "pickle":
        params2, opt2 = pickle.loads(pickle.dumps((params, opt)))
    else:
        file = io.BytesIO()
        torch.save((params, opt), file)
        file.seek(0)
        params2, opt2 = torch.load(file, weights_only=False)
    assert opt2.param_groups[0]["params"][0] is params2[0]
    before = [param.detach().clone() for param in params]
    walk(opt2, params2, seed=40)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    walk(opt, params, seed=40)
    for a, b in zip(params, params2, strict=True):
        assert torch.equal(a, b)
        for key, value in opt.state[a].items():
            assert torch.equal(opt2.state[b][key], value), key
    assert torch.equal(opt.telemetry.rows().nan_to_num(), opt2.telemetry.rows().nan_to_num())
    assert type(opt2) is type(opt)
    assert repr(opt2) == repr(opt)
