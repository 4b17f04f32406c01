"""Steps and autograd: version counters of parameters, gradients with a history, gradients on or off."""

from __future__ import annotations

import pytest
import torch
from peers import each_backend
from scenarios import param_of, values, walk

import fused_warmup as fw


@each_backend
@pytest.mark.parametrize("view", [False, True], ids=["dense", "strided"])
def test_version_counters_protect_stale_graphs(backend: str, view: bool) -> None:
    """A backward pass through a graph from before the step raises, as after torch's optimizers."""
    param = param_of(values(4, 6)[:, ::2] if view else values(4, 6))
    opt = fw.SGD([param], lr=0.1, backend=backend)
    param.grad = torch.ones_like(param)
    stale = (param**2).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@each_backend
def test_version_counters_of_parameters_that_did_not_change(backend: str) -> None:
    """A parameter without a gradient is not written, so its graph is still good, as after torch's."""
    trained, resting = param_of(values(4)), param_of(values(4))
    opt = fw.SGD([trained, resting], lr=0.1, backend=backend)
    walk(opt, [trained, resting], 1)
    resting.grad = None
    graph = (resting**2).sum()
    version = resting._version
    opt.step()
    assert resting._version == version
    graph.backward()
    assert resting.grad is not None


@each_backend
def test_gradients_that_need_gradients(backend: str) -> None:
    """``create_graph=True`` leaves gradients with a history of their own."""
    param = param_of(values(4))
    opt = fw.Adam([param], backend=backend)
    (grad,) = torch.autograd.grad((param**3).sum(), param, create_graph=True)
    param.grad = grad
    opt.step()
    assert int(opt.state[param]["step"]) == 1


@each_backend
def test_steps_are_made_with_gradients_on_or_off(backend: str) -> None:
    """The mode of the caller does not matter."""
    results = []
    for mode in (torch.enable_grad, torch.no_grad):
        param = param_of(values(4, 6)[:, ::2])
        opt = fw.Adam([param], lr=0.1, backend=backend, average=fw.EMA(0.9))
        with mode():
            walk(opt, [param])
        results.append(param.detach().clone())
    assert torch.equal(*results)
