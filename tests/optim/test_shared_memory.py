"""Memory that parameters or gradients share, and two optimizers that share nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peers import each_backend
from scenarios import build, compare_with_torch, each_case, param_of, values, walk
from torch import Tensor

import fused_warmup as fw

OVERLAPS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "the same memory": lambda base: [base, base.view(-1)],
    "a part": lambda base: [base, base[1:3]],
    "ends overlap": lambda base: [base[:3], base[2:]],
    "the same columns twice": lambda base: [base[:, ::2], base[:, ::2]],
    "some of the columns twice": lambda base: [base[:, ::2], base[:, ::4]],
    "all, and some columns": lambda base: [base, base[:, ::2]],
    "another dtype": lambda base: [base, base.view(torch.bfloat16)],
}


@each_backend
@pytest.mark.parametrize("overlap", list(OVERLAPS))
def test_parameters_over_the_same_memory(backend: str, overlap: str) -> None:
    """Tied weights that are two tensors are named, and nothing is changed."""
    base = values(4, 8)
    before = base.clone()
    params = [param_of(view) for view in OVERLAPS[overlap](base)]
    for param in params:
        param.grad = torch.ones_like(param)
    opt = fw.SGD(params, lr=1.0, momentum=0.9, backend=backend)
    with pytest.raises(ValueError, match=r"^SGD: parameters must not share memory, got 0 and 1"):
        opt.step()
    assert torch.equal(base, before)
    assert not opt.state


@each_backend
@each_case
def test_gradients_with_strange_memory(case: str, backend: str) -> None:
    """Gradients that are expanded, shared between parameters, or the parameter itself."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        params[0].grad = torch.tensor(0.5).expand(600)
        params[1].grad = params[2].grad = values(600, seed=4)
        opt.step()
        params[0].grad = values(1, seed=3).expand(600)
        params[1].grad = params[0].grad
        params[2].grad = values(1200, seed=3)[::2]
        opt.step()
        # torch's AdamW decays the parameter before it reads the gradient, so it gets a copy
        mine = isinstance(opt, fw.FusedOptimizer)
        params[0].grad = params[0].data if mine else params[0].data.clone()
        params[1].grad = params[1].data.clone()
        opt.step()

    compare_with_torch(case, backend, lambda: [param_of(values(600, seed=i)) for i in range(3)], scenario)


@each_backend
@each_case
def test_optimizers_do_not_disturb_each_other(case: str, backend: str) -> None:
    """Two optimizers in turn give the bits of each alone."""

    def pair() -> list[tuple[torch.optim.Optimizer, list[Tensor]]]:
        made = [[param_of(values(50))], [param_of(values(7, 9))]]
        return [(build(case, params, backend=backend), params) for params in made]

    together, apart = pair(), pair()
    for i in range(4):
        for opt, params in together:
            walk(opt, params, 1, seed=i)
    for opt, params in apart:
        for i in range(4):
            walk(opt, params, 1, seed=i)
    for (_, a), (_, b) in zip(together, apart, strict=True):
        assert torch.equal(a[0], b[0])
