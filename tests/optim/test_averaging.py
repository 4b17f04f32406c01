"""Averages written by the update: the numbers of swa_utils, and a swap that leaves no trace.

Some tests run once more by CUDA on the host in ``test_cuda_on_host.py``, by Triton in ``interpreted.py``.
"""

import copy

import pytest
import torch
from cases import (
    BACKENDS,
    THREE_SHAPES,
    assert_close,
    assert_same_bits,
    every_backend,
    make_params,
    set_grads,
)
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fused_warmup as fw

backend = every_backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("average", "due", "multi_avg_fn"),
    [
        (fw.EMA(0.9), lambda step: True, get_ema_multi_avg_fn(0.9)),
        (fw.EMA(0.3), lambda step: True, get_ema_multi_avg_fn(0.3)),
        (fw.EMA(0.9, every=3), lambda step: step % 3 == 0, get_ema_multi_avg_fn(0.9)),
        (fw.SWA(1), lambda step: True, None),
        (fw.SWA(4, every=2), lambda step: step >= 4 and step % 2 == 0, None),
    ],
    ids=["ema", "ema-fast", "ema-every3", "swa", "swa-4-every2"],
)
def test_same_as_swa_utils(average, due, multi_avg_fn, dtype, backend):
    params = make_params(dtype, [(33,), (3, 5), ()])
    opt = fw.Adam(params, lr=0.1, average=average, backend=backend)
    model = torch.nn.ParameterList(params)
    averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn)
    eps = 2.0**-23 if dtype == torch.float32 else 2.0**-52
    for step in range(1, 15):
        set_grads(params, step)
        opt.step()
        if due(step):
            averaged.update_parameters(model)
        if int(averaged.n_averaged):
            with opt.averaged_parameters():
                for p, q in zip(params, averaged.module, strict=True):
                    assert_close(f"average at {step}", p, q, 4 * eps, 4 * eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_swap_is_exact_also_when_the_body_raises(backend):
    base = torch.randn(6, 8)
    strided = torch.nn.Parameter(base[:, ::2])
    half = torch.nn.Parameter(torch.randn(5).to(torch.bfloat16))
    plain, frozen = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(2))
    params = [strided, half, plain, frozen]
    opt = fw.Adam(params, lr=0.5, average=fw.EMA(0.5), backend=backend)
    for step in range(3):
        set_grads(params[:3], step)
        opt.step()
    before = [p.detach().clone() for p in params]
    addresses = [p.data_ptr() for p in params]
    others = base[:, 1::2].clone()

    def evaluate():
        with opt.averaged_parameters():
            assert not any(torch.equal(p, q) for p, q in zip(params[:3], before, strict=False))
            assert torch.equal(frozen, before[3])
            assert_same_bits("half", half, opt.state[half]["average"].to(torch.bfloat16))
            # the storage is exchanged, not copied
            assert plain.data_ptr() == opt.state[plain]["average"].data_ptr()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    for p, q, address in zip(params, before, addresses, strict=True):
        assert_same_bits("param", p, q)
        assert p.data_ptr() == address
    assert torch.equal(base[:, 1::2], others)
    set_grads(params[:3], 4)
    opt.step()
    assert torch.equal(base[:, 1::2], others)


def test_no_step_and_no_second_swap_inside():
    params = make_params(torch.float32, [(3,)])
    opt = fw.Adam(params, average=fw.EMA(0.5))
    set_grads(params, 0)
    opt.step()
    with opt.averaged_parameters():
        with pytest.raises(RuntimeError, match="inside averaged_parameters"):
            opt.step()
        with pytest.raises(RuntimeError, match="must not be nested"), opt.averaged_parameters():
            pass
    opt.step()
    with pytest.raises(RuntimeError, match="must have average= set"), fw.Adam(params).averaged_parameters():
        pass


def test_parameter_without_gradient_is_still_averaged():
    """As swa_utils does: its average moves on towards the value that stands still."""
    a, b = make_params(torch.float32, [(4,), (4,)])
    opt = fw.SGD([a, b], lr=1.0, average=fw.EMA(0.5))
    model = torch.nn.ParameterList([a, b])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(6):
        set_grads([a, b], step)
        if step in (2, 3):
            b.grad = None
        opt.step()
        averaged.update_parameters(model)
    with opt.averaged_parameters():
        for p, q in zip((a, b), averaged.module, strict=True):
            assert_close("average", p, q, 1e-6)


def test_update_bn_works():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    data = [torch.randn(16, 4) for _ in range(5)]
    opt = fw.Adam(model.parameters(), lr=0.05, average=fw.EMA(0.8))
    averaged = AveragedModel(copy.deepcopy(model), multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for x in data * 4:
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        averaged.update_parameters(model)
    update_bn(data, averaged)
    with opt.averaged_parameters():
        update_bn(data, model)
        model.eval()
        averaged.eval()
        with torch.no_grad():
            assert torch.allclose(model(data[0]), averaged(data[0]), atol=1e-6)


def test_an_average_whose_period_does_not_divide_its_start(backend):
    """The mean of what was there after steps 4, 7 and 10."""
    params = make_params(torch.float64, THREE_SHAPES)
    opt = fw.SGD(params, lr=0.1, average=fw.SWA(4, every=3), backend=backend)
    seen = []
    for step in range(1, 13):
        set_grads(params, step)
        opt.step()
        if step in (4, 7, 10):
            seen.append([p.detach().clone() for p in params])
    for p, *values in zip(params, *seen, strict=True):
        torch.testing.assert_close(
            opt.state[p]["average"], torch.stack(values).mean(0), rtol=1e-14, atol=1e-15
        )


def test_averages_of_parameters_that_jump(backend):
    """The first is the parameter itself, though the difference is rounded; a small weight leaves small averages exact."""
    param = Parameter(torch.full((70,), 2.0**25))
    opt = fw.SGD([param], lr=0.25, average=fw.EMA(1.0 - 2.0**-30, every=2), backend=backend)
    values = []
    for grad in (2.0**27 - 8.0, 2.8, 0.0, -(2.0**27)):
        param.grad = torch.full((70,), grad)
        opt.step()
        values.append((param.detach().clone(), opt.state[param]["average"].clone()))
    assert_same_bits("first", values[1][1], values[1][0])
    assert float(values[1][0][0]) == pytest.approx(1.3)
    first, last = values[1][0].double(), values[3][0].double()
    expected = first + 2.0**-30 * (last - first)
    torch.testing.assert_close(values[3][1].double(), expected, rtol=2.0**-23, atol=0.0)


@pytest.mark.parametrize("how", ["columns", "transposed rows"])
def test_the_base_of_a_strided_view_holds_the_averages_inside_the_block(how, backend):
    """A model that uses the memory, not the view, must be evaluated with them, and have its own back."""
    base = make_params(torch.float32, [(6, 8)])[0].detach()
    view = base[:, ::2] if how == "columns" else base[::2].T
    rest = base[:, 1::2] if how == "columns" else base[1::2].T
    param, others = Parameter(view), rest.clone()
    opt = fw.SGD([param], lr=0.5, average=fw.EMA(0.5), backend=backend)
    for step in range(3):
        set_grads([param], step)
        opt.step()
    trained = view.clone()
    with opt.averaged_parameters():
        assert_same_bits("average", view, opt.state[param]["average"])
        assert not torch.equal(view, trained)
        assert torch.equal(rest, others)
    assert_same_bits("restored", view, trained)
    assert torch.equal(rest, others)
