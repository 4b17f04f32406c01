"""Combinations that faults planted by ``mutants.py`` slipped through: one test for each kind.

Tests that take ``backend`` run once more by CUDA on the host in ``test_cuda_on_host.py``, by Triton in
``interpreted.py``.
"""

import math

import numpy as np
import pytest
import torch
from cases import BACKENDS, CASES, assert_same_bits, make_params, set_grads, states_of
from torch.nn import Parameter

import fused_warmup as fw
from fused_warmup import plan as planning
from fused_warmup import watch

BY_NAME = {case.name: case for case in CASES}
SHAPES = [(63,), (7, 9), ()]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def tensors_of(opt, params):
    """Parameters, then all of their states."""
    return [t for p in params for t in (p.detach(), *states_of(opt, p).values())]


# gradients of another dtype

OTHERS = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch forbids gradients of another dtype"
)
@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-amsgrad", "lamb", "adamp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_that_change_dtype_and_back(name, dtype, clip, backend):
    check_changing_dtypes(
        name, dtype, clip, backend, [dtype, *(d for other in OTHERS for d in (other, dtype))]
    )


def check_changing_dtypes(name, dtype, clip, backend, seen):
    """Of numbers that all dtypes have, bit for bit what gradients of the parameter's dtype give; one of three changes."""
    runs = []
    for changes in (True, False):
        params = make_params(dtype, SHAPES)
        params[0].grad_dtype = None
        opt = BY_NAME[name].make(params, backend=backend, max_grad_norm=clip)
        for step, grad_dtype in enumerate(seen):
            set_grads(params, step)
            if changes:
                params[0].grad = params[0].grad.to(grad_dtype)
            opt.step()
        runs.append([*tensors_of(opt, params), opt.telemetry.rows()])
    for a, b in zip(*runs, strict=True):
        assert_same_bits("result", a, b)


# what a GradScaler leaves


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "adamp"])
def test_norms_of_scaled_gradients(name, clip, backend):
    """Both norms are those of the gradients without the scale, whoever added them up."""
    params = make_params(torch.float32, SHAPES)
    opt = BY_NAME[name].make(params, backend=backend, max_grad_norm=clip)
    set_grads(params, 0, scale=1024.0)
    opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    opt.step()
    flat = torch.cat([p.grad.double().flatten() for p in params]) / 1024.0
    line = opt.telemetry.latest()
    assert line["grad_norm"] == pytest.approx(float(flat.norm()), rel=1e-12)
    assert line["grad_norm_l1"] == pytest.approx(float(flat.abs().sum()), rel=1e-6)


# starts of the second moment


@pytest.mark.parametrize("stepped", [False, True])
def test_init_from_gradients_leaves_out_what_has_none(stepped, backend):
    """The other parameter starts from its own first gradient, or goes on where it was."""
    first, other = make_params(torch.float64, [(5,), (7,)])
    opt = fw.GIAdam([first, other], lr=0.1, exp_avg_sq_init_scale=2.0, backend=backend)
    opt.init_state()
    if stepped:
        other.grad = torch.full((7,), 3.0, dtype=torch.float64)
        opt.step()
        other.grad = None
    before = [t.clone() for t in tensors_of(opt, [other])]
    first.grad = torch.full((5,), 4.0, dtype=torch.float64)
    opt.init_from_gradients()
    assert torch.equal(opt.state[first]["exp_avg_sq"], torch.full((5,), 32.0, dtype=torch.float64))
    for a, b in zip(before, tensors_of(opt, [other]), strict=True):
        assert_same_bits("kept", a, b)
    seen = opt.state[other]["exp_avg_sq"].clone() if stepped else torch.full((7,), 50.0, dtype=torch.float64)
    other.grad = torch.full((7,), 5.0, dtype=torch.float64)
    opt.step()
    expected = 0.999 * seen + 0.001 * 25.0
    assert torch.allclose(opt.state[other]["exp_avg_sq"], expected, rtol=1e-14, atol=0.0)
    assert torch.allclose(opt.state[first]["exp_avg_sq"], torch.full_like(first, 0.999 * 32.0 + 0.016))


# spheres


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_gradient_on_a_sphere_spoils_its_element_only(bad, backend):
    """The norm is infinite then, and dividing by it would make zeros of all others."""
    kept, free = make_params(torch.float32, [(70,)]), make_params(torch.float32, [(70,)])
    norm = float(kept[0].detach().double().norm())
    opts = (
        fw.SGD(kept, lr=0.01, projection="sphere", backend=backend),
        fw.SGD(free, lr=0.01 * norm**2, backend=backend),
    )
    for (p,), opt in zip((kept, free), opts, strict=True):
        p.grad = torch.ones(70)
        p.grad[3] = bad
        opt.step()
    assert kept[0][3] == -bad
    torch.testing.assert_close(kept[0].detach(), free[0].detach(), rtol=1e-6, atol=1e-6)
    assert float(opts[0].param_groups[0]["norm"]) == pytest.approx(norm, rel=1e-14)


# averages


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


# telemetry


@pytest.mark.parametrize("unread", [1025, 2500])
def test_loading_drops_rows_that_nobody_has_read(unread):
    """Full pages that were copied aside do not come back after a load, and later pages are whole."""
    x, y = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    short, long = fw.SGD([x], lr=0.1), fw.SGD([y], lr=0.1)
    x.grad = y.grad = torch.zeros(1)
    for _ in range(3):
        short.step()
    for _ in range(unread):
        long.step()
    long.load_state_dict(short.state_dict())
    assert long.telemetry.history()["step"].tolist() == [1, 2, 3]
    for _ in range(1500):
        long.step()
    assert long.telemetry.history()["step"].tolist() == list(range(1, 1504))


# hyper-parameters written in place

PAIRS = {
    "tensors in a tuple": lambda: (torch.tensor(0.9), torch.tensor(0.99)),
    "arrays in a tuple": lambda: (np.array(0.9), np.array(0.99)),
    "tensors in a list": lambda: [torch.tensor(0.9), torch.tensor(0.99)],
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("which", [0, 1])
def test_betas_written_in_place_inside_their_pair(pair, which, backend):
    """The next step takes them, as it would take another pair."""
    params = make_params(torch.float64, [(5,), (5,)])
    written, replaced = (
        fw.Adam([p], lr=0.1, betas=betas, backend=backend)
        for p, betas in zip(params, (PAIRS[pair](), (0.9, 0.99)), strict=True)
    )
    for step in range(4):
        if step == 2:
            held = written.param_groups[0]["betas"][which]
            held.fill(0.5) if isinstance(held, np.ndarray) else held.fill_(0.5)
            replaced.param_groups[0]["betas"] = (0.5, 0.99) if which == 0 else (0.9, 0.5)
        set_grads(params, step)
        params[1].grad = params[0].grad.clone()
        written.step()
        replaced.step()
    for a, b in zip(tensors_of(written, params[:1])[1:], tensors_of(replaced, params[1:])[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)


# what tells a table that it is out of date, with and without the extension

WATCHERS = {"python": (watch.same_members, watch.same_entries), "compiled": planning.watch()[1:]}


@pytest.mark.parametrize("how", WATCHERS)
def test_groups_that_are_the_same_and_not(how):
    a, b, c = (Parameter(torch.zeros(2)) for _ in range(3))
    same = WATCHERS[how][0]
    members = [[a, b], [c]]

    def held(*lists):
        return same([{"params": params} for params in lists], members)

    assert held([a, b], [c])
    for others in ([[b, a], [c]], [[a, b], [a]], [[a], [c]], [[a, b, c], [c]], [[a, b]], [[a, b], [c], []]):
        assert not held(*others), others


@pytest.mark.parametrize("how", WATCHERS)
def test_entries_that_are_the_same_and_not(how):
    a, b = torch.zeros(2), torch.zeros(2)
    same, names = WATCHERS[how][1], ["step", "exp_avg"]
    assert same([{"step": a}, {"exp_avg": b, "more": a}], names, [a, b])
    for second in ({}, {"exp_avg": a}, {"exp_avg": b.clone()}, {"exp_avg": None}, {"more": b}):
        assert not same([{"step": a}, second], names, [a, b])
