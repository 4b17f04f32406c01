"""Parameters and groups as they are given: named, twice, later, and many groups."""

from __future__ import annotations

import pytest
import torch
from peers import each_backend
from scenarios import compare_with_torch, each_case, param_of, values, walk
from torch import Tensor

import fused_warmup as fw


@each_backend
def test_named_parameters(backend: str) -> None:
    """``model.named_parameters()`` is taken as torch takes it, and the names are kept."""
    model = torch.nn.Linear(3, 2)
    opt = fw.AdamW(model.named_parameters(), backend=backend)
    model(values(5, 3)).sum().backward()
    opt.step()
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_duplicates() -> None:
    """A parameter given twice is trained once in one group, with a warning, and is an error in two."""
    for twice in (lambda p: [p, p], lambda p: [("a", p), ("b", p)]):
        param = param_of(torch.ones(3))
        param.grad = torch.ones(3)
        with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
            opt = fw.SGD(twice(param), lr=0.5)
        opt.step()
        assert param.tolist() == [0.5] * 3
    with pytest.raises(ValueError, match="more than one parameter group"):
        fw.Adam([{"params": [param]}, {"params": [param]}])


@each_backend
@each_case
def test_parameters_added_later(case: str, backend: str) -> None:
    """A later group starts at its own first step, with its own options."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        walk(opt, params, 3)
        late = [param_of(values(6, seed=9)), param_of(values(3, 4, seed=8))]
        opt.add_param_group({"params": late, "lr": 0.2, "weight_decay": 0.1})
        params += late
        walk(opt, params, 3, seed=50)

    compare_with_torch(case, backend, lambda: [param_of(values(5))], scenario)


@each_backend
def test_many_tensors_in_many_groups(backend: str) -> None:
    """Hundreds of small tensors, each in a group of its own rate."""
    params = [param_of(values(1 + i % 7, seed=i)) for i in range(150)]
    start = [param.detach().clone() for param in params]
    opt = fw.SGD([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(params)], backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    for i, (param, old) in enumerate(zip(params, start, strict=True)):
        torch.testing.assert_close(param.detach(), old - 0.01 * i)
