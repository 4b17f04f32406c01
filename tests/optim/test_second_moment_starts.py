"""Starts of the second moment other than zero, from gradients and at random: first steps, copies and files.

Some tests run once more by CUDA on the host in ``test_cuda_on_host.py``, by Triton in ``interpreted.py``.
"""

import copy
import pickle

import pytest
import torch
from cases import BACKENDS, THREE_SHAPES, assert_same_bits, every_backend, make_params, set_grads, tensors_of
from torch.nn import Parameter
from vector_cases import check_preconditioner

import fused_warmup as fw
from fused_warmup.backends.native import CpuBackend

backend = every_backend


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


@pytest.mark.parametrize("clip", [None, 2.0])
def test_a_random_start_has_the_norm_of_the_gradient_that_is_applied(clip, backend):
    """Also where nothing but the start asks for the norm, and for parameters that come later: part of it then."""
    first, later = make_params(torch.float64, [(50,), (30,)])
    options = {"exp_avg_sq_init": "random", "exp_avg_sq_init_scale": 3.0, "max_grad_norm": clip}
    opt = fw.Adam([first], betas=(0.9, 0.5), backend=backend, **options)
    for params in ([first], [first, later]):
        if params[1:]:
            opt.add_param_group({"params": later})
        opt.init_state()
        drawn = opt.state[params[-1]]["exp_avg_sq"].clone()
        set_grads(params, 0)
        opt.step()
        line = opt.telemetry.latest()
        norm = line["grad_norm"] * line["clip_coef"]
        # the squares of those that have started already count as what they are expected to be
        squares = float(drawn.sum()) + (50 if params[1:] else 0)
        start = 3.0 * norm**2 / squares * drawn
        expected = 0.5 * start + 0.5 * (params[-1].grad * line["clip_coef"]).square()
        torch.testing.assert_close(opt.state[params[-1]]["exp_avg_sq"], expected, rtol=1e-12, atol=0.0)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension fused_warmup._cpu is not built")
@pytest.mark.parametrize("init", ["grad", "random"])
def test_a_look_at_a_first_step_that_does_not_start_at_zero(init):
    check_first_look(init, "cpu", lambda: CpuBackend())


def check_first_look(init, backend, kernels):
    """The pre-conditioner has the start value in it, once; then it is a moment as any other."""

    def started(_, params, **options):
        options |= {"exp_avg_sq_init": init, "exp_avg_sq_init_scale": 0.5, "max_grad_norm": 2.0}
        opt = fw.Adam(params, lr=1e-2, backend=backend, **options)
        opt.init_state()
        return opt, kernels()

    check_preconditioner(None, started, make_params(torch.float32, [(33,), ()]), steps=(0, 1))


def test_a_random_start_of_no_element(backend):
    """Empty tensors step alone first; another one then starts as it would without them."""
    results = []
    for with_empty in (True, False):
        torch.manual_seed(0)
        empty, param = make_params(torch.float32, [(0, 3), (5,)])
        params = [empty, param] if with_empty else [param]
        opt = fw.Adam(params, lr=0.1, exp_avg_sq_init="random", backend=backend)
        if with_empty:
            for _ in range(2):
                empty.grad = torch.zeros_like(empty)
                opt.step()
            assert int(opt.state[empty]["step"]) == 2
        for step in range(2):
            set_grads([param], step)
            opt.step()
        results.append(tensors_of(opt, [param]))
    assert int(opt.state[param]["step"]) == 2
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        assert_same_bits("with and without the empty tensor", one, other)


def test_a_random_start_of_states_that_stand_already(backend):
    """They were not drawn: the step is that of a start at zero."""
    results = []
    for init in ("random", "zeros"):
        (param,) = make_params(torch.float32, [(5,)])
        opt = fw.Adam([param], lr=0.1, backend=backend)
        opt.init_state()
        opt.param_groups[0]["exp_avg_sq_init"] = init
        set_grads([param], 0)
        opt.step()
        results.append((param, opt.state[param]["exp_avg_sq"]))
    for a, b in zip(*results, strict=True):
        assert_same_bits("tensor", a, b)


COPIES = {
    "state dict": lambda opt, params: None,
    "deepcopy": lambda opt, params: copy.deepcopy((opt, params)),
    "pickle": lambda opt, params: pickle.loads(pickle.dumps((opt, params))),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_random_start_goes_on_from_a_copy(how, backend):
    """The numbers are drawn already, and their norm must come along until the first update has used it."""
    params = make_params(torch.float64, THREE_SHAPES)
    options = {"exp_avg_sq_init": "random", "max_grad_norm": 2.0, "betas": (0.9, 0.5), "backend": backend}
    opt = fw.Adam(params, **options)
    opt.init_state()
    if how == "state dict":
        others = [Parameter(p.detach().clone()) for p in params]
        other = fw.Adam(others, **options)
        other.load_state_dict(opt.state_dict())
    else:
        other, others = COPIES[how](opt, params)
    for group, o in ((params, opt), (others, other)):
        set_grads(group, 0)
        o.step()
    for a, b in zip(tensors_of(opt, params), tensors_of(other, others), strict=True):
        assert_same_bits("result", a, b)


def test_a_start_from_gradients_is_loaded_and_unloaded(backend):
    """Whether the second moment was prepared is a part of the state, both ways."""
    runs = []
    for prepared in (True, False):
        pair = []
        for loaded in (True, False):
            params = make_params(torch.float64, THREE_SHAPES)
            opt = fw.GIAdam(params, lr=0.1, backend=backend)
            # the state that is loaded over is the other one
            if prepared != loaded:
                set_grads(params, 0)
                opt.init_from_gradients()
            else:
                opt.init_state()
            if loaded:
                source = fw.GIAdam(make_params(torch.float64, THREE_SHAPES), lr=0.1, backend=backend)
                others = source.param_groups[0]["params"]
                set_grads(others, 0)
                source.init_from_gradients() if prepared else source.init_state()
                opt.load_state_dict(source.state_dict())
            set_grads(params, 1)
            opt.step()
            pair.append(tensors_of(opt, params))
        runs.append(pair)
        for a, b in zip(*pair, strict=True):
            assert_same_bits("result", a, b)
    assert not torch.equal(runs[0][0][0], runs[1][0][0])
