"""The norm of a group on a sphere: measured before any gradient, loaded, and beside an infinite gradient.

Some tests run once more by CUDA on the host in ``test_cuda_on_host.py``, by Triton in ``interpreted.py``.
"""

import math

import pytest
import torch
from cases import THREE_SHAPES, assert_same_bits, every_backend, make_params, set_grads

import fused_warmup as fw

backend = every_backend


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


@pytest.mark.parametrize("radius", [None, 2.0])
def test_a_sphere_that_is_asked_for_before_any_gradient(radius, backend):
    """The first step on it measures the norm, as that of an optimizer that is made with it."""
    (param,), (other,) = make_params(torch.float64, [(5,)]), make_params(torch.float64, [(5,)])
    wanted = float(param.detach().norm()) if radius is None else radius
    opt = fw.SGD([param], lr=0.1, backend=backend)
    opt.step()
    opt.param_groups[0].update(projection="sphere", radius=radius)
    fresh = fw.SGD([other], lr=0.1, projection="sphere", radius=radius, backend=backend)
    for step in range(3):
        for p, each in ((param, opt), (other, fresh)):
            if step:
                set_grads([p], step)
            each.step()
            assert float(each.param_groups[0]["norm"]) == pytest.approx(wanted, rel=1e-12)
            assert float(p.detach().norm()) == pytest.approx(wanted, rel=1e-12)
        assert_same_bits("parameter", param, other)


def test_a_loaded_norm_is_a_copy():
    """Loaded before the first step, where the group has no norm yet; a later step writes the one that it has."""
    saved = None
    for seed in (0, 1):
        params = make_params(torch.float32, THREE_SHAPES, seed)
        opt = fw.SGD(params, lr=0.01, projection="sphere", radius=2.0)
        if saved is not None:
            opt.load_state_dict(saved)
        opt.param_groups[0]["radius"] = 2.0 + seed
        set_grads(params, 0)
        opt.step()
        saved = saved or opt.state_dict()
    assert float(opt.param_groups[0]["norm"]) == 3.0
    assert float(saved["param_groups"][0]["norm"]) == 2.0
