"""Combinations that faults planted by ``mutants.py`` slipped through: one test for each kind.

Tests that take ``backend`` run once more by CUDA on the host in ``test_cuda_on_host.py``, by Triton in
``interpreted.py``.
"""

import copy
import gc
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from cases import BACKENDS, CASES, assert_same_bits, make_params, set_grads, states_of
from optim.test_dtensors import mesh  # noqa: F401
from plan.test_growth import check_late_gradients
from torch.nn import Parameter
from vector_cases import check_preconditioner

import fused_warmup as fw
from fused_warmup.backends.native import CpuBackend
from fused_warmup.optim.telemetry import Telemetry
from fused_warmup.plan import address_cache
from fused_warmup.sharpness.lanczos import Spectrum
from fused_warmup.sharpness.probe import _larger
from fused_warmup.tuning import Trial
from fused_warmup.tuning.autowu.gaussian_process import Parity, ScaleFree
from fused_warmup.tuning.autowu.loss_buffer import LossBuffer
from fused_warmup.tuning.warmup.initial_lr import search

BY_NAME = {case.name: case for case in CASES}
SHAPES = [(63,), (7, 9), ()]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def tensors_of(opt, params):
    """Parameters, each with all of its states in the order of their names."""
    return [t for p in params for t in (p.detach(), *(t for _, t in sorted(states_of(opt, p).items())))]


# gradients of another dtype

OTHERS = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch forbids gradients of another dtype"
)
@pytest.mark.pairwise
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


def test_a_scale_and_a_decision_are_read_anew_one_by_one(backend):
    """Another tensor of the one beside the same tensor of the other."""
    param = Parameter(torch.zeros(3))
    opt = fw.SGD([param], lr=1.0, backend=backend)
    scales, verdicts = ([torch.tensor(x) for x in pair] for pair in ((2.0, 4.0), (0.0, 1.0)))
    moved = []
    for scale, found in ((0, 0), (1, 0), (1, 1), (1, 0), (0, 0)):
        param.grad = torch.full((3,), 8.0)
        opt.grad_scale, opt.found_inf = scales[scale], verdicts[found]
        before = float(param.detach()[0])
        opt.step()
        moved.append(before - float(param.detach()[0]))
    assert moved == [4.0, 2.0, 0.0, 2.0, 4.0]


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


# layers


@pytest.mark.parametrize("cls", [fw.AdamP, fw.SGDP])
def test_a_gradient_of_zeros_is_at_right_angles_to_everything(cls, backend):
    """``eps`` stands in for its norm, so that the layer decays as one whose scale does not matter."""
    param = Parameter(torch.ones(2, 3, dtype=torch.float64))
    opt = cls([param], lr=0.1, weight_decay=0.1, wd_ratio=0.5, backend=backend)
    param.grad = torch.zeros(2, 3, dtype=torch.float64)
    opt.step()
    torch.testing.assert_close(param.detach(), torch.full_like(param, 0.995), rtol=1e-15, atol=0.0)


# averages


def test_an_average_whose_period_does_not_divide_its_start(backend):
    """The mean of what was there after steps 4, 7 and 10."""
    params = make_params(torch.float64, SHAPES)
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


# settings


def test_settings_that_change_while_norms_are_measured_anyway(backend):
    """Another norm to clip to, and skipping besides."""
    param = Parameter(torch.zeros(1, dtype=torch.float64))
    opt = fw.SGD([param], lr=1.0, max_grad_norm=1.0, backend=backend)
    moved = []
    for clip, policy, grad in (
        (1.0, "propagate", 8.0),
        (2.0, "propagate", 8.0),
        (2.0, "skip", math.inf),
        (3.0, "skip", 8.0),
    ):
        opt.max_grad_norm, opt.nonfinite = clip, policy
        before = param.detach().clone()
        param.grad = torch.full((1,), grad, dtype=torch.float64)
        opt.step()
        moved.append(float(before - param.detach()))
    assert moved == pytest.approx([1.0, 2.0, 0.0, 3.0], rel=1e-6)


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


def test_a_loss_that_a_closure_returns_as_a_number_is_recorded():
    param = Parameter(torch.zeros(1))
    opt = fw.SGD([param], lr=1.0)
    param.grad = torch.zeros(1)
    assert opt.step(lambda: 2.5) == 2.5
    assert opt.telemetry.latest()["loss"] == 2.5


def test_what_is_kept_on_a_device_follows_the_parameters():
    """Of which there is another one on every machine, though nothing can be read there."""
    cpu, meta = torch.device("cpu"), torch.device("meta")
    telemetry, losses = Telemetry(), LossBuffer(3)
    for device in (cpu, meta):
        telemetry.allocate(device)
        losses.add(1.0, device)
        assert (
            telemetry.pending_scalars.device == telemetry.ring_buffer.device == losses.values.device == device
        )


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


# nothing to work on


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


def test_steps_without_any_group(backend):
    """They change nothing, as in torch; there is no rate to report, and the group that comes back goes on."""
    params = make_params(torch.float64, [(5,), (5,)])
    params[1].data.copy_(params[0])
    opt, other = fw.SGD(params[:1], lr=0.1, backend=backend), torch.optim.SGD(params[1:], lr=0.1)
    for both in (opt, other):
        held = both.param_groups
        for empty in (False, True, False, True):
            both.param_groups = [] if empty else held
            set_grads([p for g in both.param_groups for p in g["params"]], 0)
            both.step()
    torch.testing.assert_close(*params)
    assert np.array_equal(opt.telemetry.history()["lr"], [0.1, np.nan, 0.1, np.nan], equal_nan=True)
    assert opt.get_last_lr() == []


# what tells a table that it is out of date, with and without the extension

WATCHERS = {
    "python": (address_cache.groups_unchanged, address_cache.states_unchanged),
    "compiled": (
        address_cache.select_reader().groups_unchanged,
        address_cache.select_reader().states_unchanged,
    ),
}


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


def test_a_shard_that_was_replaced_is_trained(backend, mesh):  # noqa: F811
    """As FSDP does when it moves a model: the parameter stays the same object, and its old memory stays in place."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def placed(value):
        return distribute_tensor(torch.full((4, 3), value), mesh, [Shard(0)])

    param = Parameter(placed(1.0))
    opt = fw.SGD([param], lr=0.5, backend=backend)
    for _ in range(2):
        param.grad = placed(1.0)
        opt.step()
    old = param._local_tensor
    param._local_tensor = torch.full((4, 3), 7.0)
    param.grad = placed(1.0)
    opt.step()
    assert torch.equal(param._local_tensor, torch.full((4, 3), 6.5))
    assert not old.any()


@pytest.mark.parametrize("how", ["python", "compiled"])
def test_gradients_are_kept_until_they_are_released(how):
    """Another thread may replace them while the kernels read."""
    param = Parameter(torch.zeros(3))
    forms = (
        address_cache.PythonSignatures([param])
        if how == "python"
        else address_cache.select_reader().signatures([param])
    )
    out, held = np.zeros(1, np.uint64), torch.ones(3)
    param.grad, ref = held, weakref.ref(held)
    assert forms.read([param], out.ctypes.data, True) == []
    assert out[0] == held.data_ptr()
    param.grad = None
    del held
    gc.collect()
    assert ref() is not None
    forms.release()
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("how", WATCHERS)
def test_entries_that_are_the_same_and_not(how):
    a, b = torch.zeros(2), torch.zeros(2)
    same, names = WATCHERS[how][1], ["step", "exp_avg"]
    assert same([{"step": a}, {"exp_avg": b, "more": a}], names, [a, b])
    for second in ({}, {"exp_avg": a}, {"exp_avg": b.clone()}, {"exp_avg": None}, {"more": b}):
        assert not same([{"step": a}, second], names, [a, b])


# state dicts


def test_a_saved_state_follows_training_as_in_torch():
    """Its counts, as its moments do; what was loaded stays as it is, whatever is written in place afterwards."""
    params = make_params(torch.float32, SHAPES)
    opt = fw.Adam(params, lr=torch.tensor(0.1))
    set_grads(params, 0)
    opt.step()
    saved = opt.state_dict()
    frozen = copy.deepcopy(saved)
    opt.step()
    assert_same_bits("record", saved["fused_warmup"]["telemetry"], frozen["fused_warmup"]["telemetry"])
    assert int(saved["fused_warmup"]["counters"][0]) == 2
    assert [int(step) for step in saved["fused_warmup"]["steps"]] == [2] * len(params)
    assert [float(state["step"]) for state in saved["state"].values()] == [2.0] * len(params)
    other = fw.Adam(make_params(torch.float32, SHAPES), lr=torch.tensor(0.2))
    other.load_state_dict(saved)
    other.param_groups[0]["lr"].fill_(7.0)
    assert float(saved["param_groups"][0]["lr"]) == pytest.approx(0.1)
    saved["fused_warmup"]["telemetry"].fill_(-1.0)
    other.telemetry.rows().fill_(-2.0)
    assert_same_bits("record", other.telemetry.rows(), frozen["fused_warmup"]["telemetry"])


def test_a_loaded_norm_is_a_copy():
    """Loaded before the first step, where the group has no norm yet; a later step writes the one that it has."""
    saved = None
    for seed in (0, 1):
        params = make_params(torch.float32, SHAPES, seed)
        opt = fw.SGD(params, lr=0.01, projection="sphere", radius=2.0)
        if saved is not None:
            opt.load_state_dict(saved)
        opt.param_groups[0]["radius"] = 2.0 + seed
        set_grads(params, 0)
        opt.step()
        saved = saved or opt.state_dict()
    assert float(opt.param_groups[0]["norm"]) == 3.0
    assert float(saved["param_groups"][0]["norm"]) == 2.0


COPIES = {
    "state dict": lambda opt, params: None,
    "deepcopy": lambda opt, params: copy.deepcopy((opt, params)),
    "pickle": lambda opt, params: pickle.loads(pickle.dumps((opt, params))),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_random_start_goes_on_from_a_copy(how, backend):
    """The numbers are drawn already, and their norm must come along until the first update has used it."""
    params = make_params(torch.float64, SHAPES)
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


def test_counts_beyond_those_of_float32_are_saved():
    """``step`` is float32 as in torch, which cannot tell 2**24 + 1 from 2**24."""
    params = make_params(torch.float32, SHAPES)
    opt, other = fw.Adam(params), fw.Adam(params)
    set_grads(params, 0)
    opt.step()
    opt.state[params[0]]["step"].fill_(2**24)
    opt.step()
    for copied in (other, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        if copied is other:
            copied.load_state_dict(opt.state_dict())
        counts = copied.state_dict()["fused_warmup"]["steps"]
        assert counts.tolist() == [2**24 + 1, 2, 2]
        set_grads(copied.param_groups[0]["params"], 1)
        copied.step()
        copied.step()
        assert copied.state_dict()["fused_warmup"]["steps"].tolist() == [2**24 + 3, 4, 4]
        assert [float(s["step"]) for s in copied.state.values()] == [2**24 + 4, 4, 4]


def test_what_a_hook_before_loading_returns_is_loaded():
    params = make_params(torch.float32, SHAPES)
    opt = fw.Adam(params, lr=0.1)
    saved = opt.state_dict()
    other = copy.deepcopy(saved)
    other["param_groups"][0]["lr"] = 0.3
    opt.register_load_state_dict_pre_hook(lambda o, state_dict: other)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.3
    assert saved["param_groups"][0]["lr"] == 0.1


def test_a_start_from_gradients_is_loaded_and_unloaded(backend):
    """Whether the second moment was prepared is a part of the state, both ways."""
    runs = []
    for prepared in (True, False):
        pair = []
        for loaded in (True, False):
            params = make_params(torch.float64, SHAPES)
            opt = fw.GIAdam(params, lr=0.1, backend=backend)
            # the state that is loaded over is the other one
            if prepared != loaded:
                set_grads(params, 0)
                opt.init_from_gradients()
            else:
                opt.init_state()
            if loaded:
                source = fw.GIAdam(make_params(torch.float64, SHAPES), lr=0.1, backend=backend)
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


def test_states_that_the_file_does_not_have_are_dropped():
    """Those of parameters that it does not know, so that their next step is a first one, and averages not wanted."""
    params = make_params(torch.float32, SHAPES)
    opt = fw.Adam(params, lr=0.1, average=fw.EMA(0.9))
    fresh = opt.state_dict()
    set_grads(params, 0)
    opt.step()
    trained = opt.state_dict()
    opt.load_state_dict(fresh)
    assert not any(opt.state.get(p) for p in params)
    assert opt.state_dict()["state"] == {}
    opt.load_state_dict(trained)
    opt.average = None
    opt.load_state_dict(trained)
    assert all(set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in params)


def test_states_of_another_rule_or_shape_are_refused():
    """Those that no state is missing for, and shapes of as many elements."""
    params = make_params(torch.float32, [(7, 9)])
    theirs = torch.optim.Adam(params)
    set_grads(params, 0)
    theirs.step()
    saved = theirs.state_dict()
    for momentum, wanted in ((0.9, "momentum_buffer"), (0.0, "no tensors")):
        opt = fw.SGD(params, lr=0.1, momentum=momentum)
        with pytest.raises(ValueError, match=f"must hold {wanted}, got 'exp_avg, exp_avg_sq'"):
            opt.load_state_dict(saved)
    turned = fw.Adam(make_params(torch.float32, [(9, 7)]))
    with pytest.raises(ValueError, match=r"must have the shape \(9, 7\) of parameter 0, got \(7, 9\)"):
        turned.load_state_dict(saved)


@pytest.mark.parametrize("cls", ["Adam", "SGD"])
def test_schedules_go_on_from_the_counts_of_torch(cls):
    """From the parameter that made most steps; SGD of torch counts none, and its buffers do not say how many."""
    params = make_params(torch.float32, SHAPES)
    options = {"lr": 0.1} if cls == "Adam" else {"lr": 0.1, "momentum": 0.9}
    theirs = getattr(torch.optim, cls)(params, **options)
    for step in range(3):
        set_grads(params, step)
        if step:
            params[1].grad = None
        theirs.step()
    opt = getattr(fw, cls)(params, schedule=fw.schedules.warmup(10), **options)
    saved = theirs.state_dict()
    # saved by an optimizer that knows no schedules, which are kept
    opt.load_state_dict(saved)
    set_grads(params, 3)
    opt.step()
    made = 3 if cls == "Adam" else 0
    assert opt.telemetry.latest()["step"] == made + 1
    assert opt.get_last_lr() == pytest.approx([0.1 * (made + 1) / 10])


# a probe


def readings_of(probe, n, before=lambda i: None):
    """The readings of so many measurements, which are all due."""
    found = []
    for i in range(n):
        before(i)
        assert probe.measure()
        found.append(probe.poll())
    return found


def quadratic(values):
    """Parameters in two tensors, and the loss of a Hessian with these eigenvalues, which may change in place."""
    n = len(values)
    drawn = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(drawn)[0]
    params = [torch.ones(k, dtype=torch.float64, requires_grad=True) for k in (n // 2, n - n // 2)]
    return params, lambda: 0.5 * ((basis.T @ torch.cat(params).double()) ** 2 * values).sum()


def spectrum(largest, **others):
    """A spectrum of numbers, for parts of a probe."""
    found = {"smallest": 0.0, "residual": 0.0, "unseen": 0.0, "asymmetry": 0.0, "vector": [1.0], **others}
    found = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
    return Spectrum(largest=torch.tensor(largest, dtype=torch.float64), **found)


def test_audits_and_their_cost():
    """Every twentieth, with products of its own and a new look at the error of differences; cold is the first alone."""
    params, loss = quadratic(torch.linspace(0.0, 1.0, 40, dtype=torch.float64))
    probe = fw.SharpnessProbe(
        torch.optim.SGD(params, lr=0.1), loss, every=1, steps=7, max_products=7, method="difference"
    )
    readings = readings_of(probe, 42)
    # two for the error of differences, and one for the previous vector
    assert [r.hvps for r in readings] == [9, *[10] * 19, 17, *[10] * 19, 17, 10]
    flags = [r.asdict()["flags"] for r in readings]
    assert [i for i, names in enumerate(flags) if "audit" in names] == [20, 40]
    assert [i for i, names in enumerate(flags) if "cold" in names] == [0]
    # nothing was lost, so an audit of a search that had found the largest finds nothing larger
    assert not any("locked" in names for names in flags)
    # torch's SGD counts no steps, so the calls do
    assert [r.step for r in readings] == list(range(42))


def test_an_audit_says_that_the_search_was_locked(monkeypatch):
    monkeypatch.setattr("fused_warmup.sharpness.probe._ADMIXTURE", 0.0)
    values = torch.cat([torch.tensor([10.0, 5.0]), torch.linspace(0, 1, 38)]).double()
    p = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=0.1)
    probe = fw.SharpnessProbe(optimizer, lambda: 0.5 * (values * p * p).sum(), every=1, method="autograd")

    def lose(i):
        if i == 1:
            probe._vectors[0], values[1] = torch.eye(40, dtype=torch.float64)[0], 20.0

    readings = readings_of(probe, 22, lose)
    assert [i for i, r in enumerate(readings) if "locked" in r.asdict()["flags"]] == [20]
    assert readings[19].value.item() == pytest.approx(10.0)
    assert readings[20].value.item() == pytest.approx(20.0, rel=1e-3)
    assert readings[21].value.item() == pytest.approx(20.0, rel=1e-3)
    assert {type(held) for r in readings for held in r.asdict()["flags"]} == {str}
    assert readings[20].flags.tensors["locked"].dtype == torch.bool


def test_products_until_the_bound_meets_the_tolerance():
    """At least ``steps`` of them."""
    params, loss = quadratic(torch.linspace(0.0, 1.0, 40, dtype=torch.float64))
    counts = []
    for steps, tolerance in ((2, 0.05), (15, 0.05), (2, 1e-4)):
        probe = fw.SharpnessProbe(
            torch.optim.SGD(params, lr=0.1), loss, every=1, steps=steps, tolerance=tolerance, max_products=40
        )
        readings = readings_of(probe, 7)
        assert not any("unconverged" in r.flags for r in readings)
        counts.append(readings[-1].hvps)
    assert counts[0] < counts[1] == 1 + 15 < counts[2]


def test_arguments_of_a_probe_reach_the_measurement():
    """Seed, method, the gradients to use, and the closure of the call before that of the probe."""
    values = torch.linspace(0.0, 1.0, 400, dtype=torch.float64)
    params, loss = quadratic(values)

    def first(optimizer=None, call=None, **options):
        optimizer = optimizer or torch.optim.SGD(params, lr=0.1)
        probe = fw.SharpnessProbe(optimizer, loss, every=1, **options)
        assert probe.measure(call)
        return probe.poll()

    assert first().value != first(seed=1).value
    assert first(seed=1).value == first(seed=1).value
    assert first(method="autograd").err_fd == 0.0 < first().err_fd
    assert first(call=lambda: 3.0 * loss()).value == pytest.approx(3.0 * float(first().value), rel=1e-6)
    assert first(torch.optim.SGD(params, lr=0.1, maximize=True)).lambda_min < -0.9
    # Adam's pre-conditioner has the gradient in it: of scaled ones, as for a GradScaler, or computed anew
    loss().backward()
    expected = first(fw.Adam(params), use_grad=False).value
    for p in params:
        p.grad.mul_(1024.0)
    assert first(fw.Adam(params), use_grad=False).value == expected
    assert first(fw.Adam(params)).value < expected / 1000


@pytest.mark.parametrize("change", ["fewer", "dtype"])
def test_other_parameters_make_a_cold_start(change):
    """A vector of another length or dtype is no start."""
    params, loss = quadratic(torch.linspace(0.0, 1.0, 40, dtype=torch.float64))
    for p in params:
        p.data = p.data.float()

    def alter(i):
        if i == 2 and change == "fewer":
            params[0].requires_grad_(False)
        elif i == 2:
            for p in params:
                p.data = p.data.double()

    probe = fw.SharpnessProbe(
        torch.optim.SGD(params, lr=0.1), loss, every=1, steps=7, max_products=7, method="difference"
    )
    readings = readings_of(probe, 4, alter)
    assert ["cold" in r.asdict()["flags"] for r in readings] == [True, False, True, False]
    assert [r.hvps for r in readings] == [9, 10, 9, 10]
    assert math.isnan(readings[2].err_batch)


def test_a_vector_survives_a_loss_that_is_not_finite():
    """Three products from a random start would miss a tenth of the sharpness."""
    values = torch.cat([torch.linspace(0.0, 1.0, 399), torch.tensor([1.02])]).double()
    params, loss = quadratic(values)
    scale = [1.0]
    optimizer = torch.optim.SGD(params, lr=0.1)
    probe = fw.SharpnessProbe(optimizer, lambda: scale[0] * loss(), every=1, steps=3)
    readings = readings_of(probe, 14, lambda i: scale.__setitem__(0, math.nan if i == 12 else 1.0))
    assert math.isnan(readings[12].value)
    assert readings[13].value.item() == pytest.approx(readings[11].value.item(), rel=1e-2)
    assert readings[13].err_batch.isfinite()
    assert readings[13].err_fd.isfinite()


def test_how_batches_differ_is_smoothed():
    params, loss = quadratic(torch.ones(4, dtype=torch.float64))
    probe = fw.SharpnessProbe(torch.optim.SGD(params, lr=0.1), loss)
    assert math.isnan(probe._batch_error(torch.tensor(5.0), None))
    for largest, earlier, expected in (
        (5.0, 3.0, 2.0),
        (5.0, 5.5, 0.9 * 2.0),
        (math.nan, math.nan, 0.9 * 2.0),
        (5.0, 1.0, 0.81 * 2.0 + 0.1 * 4.0),
    ):
        error = float(probe._batch_error(*torch.tensor([largest, earlier], dtype=torch.float64)))
        assert error == pytest.approx(expected, rel=1e-14)


def test_the_first_batch_error_may_be_unknown():
    params, loss = quadratic(torch.ones(4, dtype=torch.float64))
    probe = fw.SharpnessProbe(torch.optim.SGD(params, lr=0.1), loss)
    assert math.isnan(probe._batch_error(*torch.tensor([math.nan, 1.0])))
    assert float(probe._batch_error(*torch.tensor([3.0, 1.0]))) == 2.0


class Known:
    """An operator whose error of differences is known."""

    def difference_error(self, spectrum):
        return torch.tensor(self.error, dtype=torch.float64)


def test_steps_that_are_too_long_are_shortened():
    """Once for each calibration that is off by a hundredth, down to a sixteenth; 16 bits bear no shorter one."""
    params, loss = quadratic(torch.ones(4, dtype=torch.float64))
    probe = fw.SharpnessProbe(torch.optim.SGD(params, lr=0.1), loss)
    operator = Known()

    def calibrated(error, largest=2.0, shorten=True):
        operator.error = error
        probe._calibrate(operator, spectrum(largest), shorten)
        return float(probe._relative_error), float(probe._stretch)

    assert calibrated(math.nan)[1] == 1.0
    assert math.isnan(float(probe._relative_error))
    assert calibrated(0.018) == (0.009, 1.0)
    assert calibrated(1.0, shorten=False) == (0.5, 1.0)
    assert calibrated(1.0) == (0.5, 0.5)
    assert calibrated(math.inf) == (0.5, 0.5)
    assert calibrated(0.03, -2.0) == (0.015, 0.25)
    assert calibrated(0.0, 0.0) == (0.0, 0.25)
    assert [calibrated(1.0)[1] for _ in range(4)] == [0.125, 0.0625, 0.0625, 0.0625]


def test_the_larger_of_two_spectra():
    """All that belongs to its top comes along."""
    low = spectrum(1.0, smallest=-3.0, residual=0.1, unseen=0.5, asymmetry=0.01, vector=[1.0, 0.0])
    high = spectrum(2.0, smallest=-1.0, residual=0.2, unseen=0.7, asymmetry=0.02, vector=[0.0, 1.0])
    for a, b in ((low, high), (high, low)):
        found = _larger(a, b)
        for name in ("largest", "residual", "unseen", "asymmetry", "vector"):
            assert torch.equal(getattr(found, name), getattr(high, name)), name
        assert found.smallest == -3.0


# searches for a rate


class Known1d:
    """A line whose losses are known, and the rates that were asked for."""

    def __init__(self, loss):
        self._loss, self.asked = loss, []
        self.start = loss(0.0)

    @property
    def forwards(self):
        return len(self.asked)

    def loss(self, eta):
        self.asked.append(eta)
        return self._loss(eta)


def parabola(eta):
    """1 at 0 and at a quarter, where it begins to rise above its start."""
    return (1.0 - 8.0 * eta) ** 2


SEARCHES = {
    # doubling to the threshold itself, where the loss no longer falls
    "exact": (1 / 64, 1.0, 0.1, [1, 2, 4, 8, 16], 16, 8, 16, ()),
    # past it, and back by halves until the rise is a tenth at most
    "halves": (3 / 64, 1.0, 0.1, [3, 6, 12, 24, 18, 15, 16.5, 15.75, 16.125], 16.125, 15.75, 16.125, ()),
    # the bracket is between half of the target and the target
    "target below": (3 / 64, 20 / 64, 3.0, [3, 6, 12, 20], 20, 10, 20, ("target",)),
    "falls up to the target": (1 / 64, 10 / 64, 0.1, [1, 2, 4, 8, 10], 10, 10, math.inf, ("target",)),
    "starts at the target": (1 / 64, 1 / 64, 0.1, [1], 1, 1, math.inf, ("target",)),
    "rises at once": (32 / 64, 1.0, 0.1, [32], 32, 0, 32, ("rises",)),
    "stands still at once": (16 / 64, 1.0, 0.1, [16], 16, 0, 16, ("rises",)),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_rates_that_a_search_tries(name):
    """Each one, in 64ths."""
    start, target, tolerance, asked, value, lo, hi, flags = SEARCHES[name]
    line = Known1d(parabola)
    found = search(line, start, target, tolerance)
    assert [64 * eta for eta in line.asked] == asked
    assert (64 * found.value, 64 * found.lo, 64 * found.hi) == (value, lo, hi)
    assert (found.forwards, found.flags) == (len(asked), flags)


def test_a_search_without_a_resolution_ends():
    """No rate above the threshold raises the loss by little."""
    found = search(Known1d(lambda eta: 1.0 - eta if eta < 0.2 else 5.0), 0.1, 1.0, 0.1)
    assert found.flags == ("unresolved",)
    assert found.lo == pytest.approx(0.2, rel=1e-12)
    assert found.lo < found.value == found.hi


def test_a_loss_as_high_as_at_the_start_has_risen():
    line = Known1d(lambda eta: 1.0 - eta if eta < 0.2 else 1.0 if eta < 0.24 else 5.0)
    found = search(line, 1 / 8, 1.0, 0.1)
    assert [64 * eta for eta in line.asked] == [8, 16, 12, 14]
    assert (64 * found.lo, 64 * found.value, found.flags) == (12, 14, ())


def test_the_rate_that_is_the_target_saves_all_steps_but_one():
    assert fw.tuning.reach_steps(100, 1.0, 1.0) == 1.0
    assert fw.tuning.saved_steps(100, 1.0, 1.0, forwards=3) == 97.5


def bowl(*rates):
    """A quadratic bowl over one group for each rate, whose gradients stand; 2 is the critical rate of their sum."""
    params = [torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in rates]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(params, rates, strict=True)]
    loss = lambda: 0.5 * sum(p.square().sum() for p in params)  # noqa: E731
    loss().backward()
    return groups, loss


@pytest.mark.parametrize("cls", [fw.SGD, torch.optim.SGD])
def test_a_catapult_keeps_ratios_and_tensors(cls):
    groups, loss = bowl(torch.tensor(0.1), torch.tensor(0.05))
    opt = cls(groups, lr=0.1)
    held = [group["lr"] for group in opt.param_groups]
    catapult = fw.PersistentCatapult(opt, target=1.0)
    assert catapult.step(5.0, loss) == catapult.lr > 0.1
    assert all(group["lr"] is lr for group, lr in zip(opt.param_groups, held, strict=True))
    assert [float(lr) for lr in held] == pytest.approx([catapult.lr, catapult.lr / 2])


def test_a_catapult_without_rates_gives_all_groups_the_same():
    groups, loss = bowl(0.0, 0.0)
    opt = fw.SGD(groups, lr=0.1)
    catapult = fw.PersistentCatapult(opt, target=1.0)
    catapult.step(5.0, loss)
    assert [group["lr"] for group in opt.param_groups] == [catapult.lr] * 2


def test_a_catapult_searches_below_its_lowest_loss_only():
    """Not at an equal one, and not for ever after one that is not finite; all evaluations are counted."""
    groups, loss = bowl(0.1)
    catapult = fw.PersistentCatapult(fw.SGD(groups, lr=0.1), target=1e6, start=1e-3)
    counts = []
    for value, searches in ((math.nan, 1), (math.inf, 1), (5.0, 2), (5.0, 2), (6.0, 2), (4.0, 3)):
        rate = catapult.lr
        catapult.step(value, loss)
        assert catapult.searches == searches, value
        assert catapult.lr >= rate
        counts.append(catapult.forwards)
    # from where the rate is, one look is enough to see that it rises
    assert counts == [counts[0], counts[0], counts[0] + 1, counts[0] + 1, counts[0] + 1, counts[0] + 2]
    assert counts[0] > 10
    assert catapult.best == 4.0


def test_a_catapult_stays_where_the_loss_is_not_finite():
    groups, loss = bowl(0.1)
    catapult = fw.PersistentCatapult(fw.SGD(groups, lr=0.1), target=1.0)
    assert catapult.step(5.0, lambda: loss() * math.nan) == 0.0
    # without a rate yet the next step searches again
    assert (catapult.searches, catapult.best) == (1, math.inf)


@pytest.mark.parametrize("reduce", [True, False])
def test_a_catapult_shares_a_copy_of_the_loss(reduce, monkeypatch):
    """The mean over processes, which is taken in place, must not be written into the user's loss."""
    groups, loss = bowl(0.1)
    monkeypatch.setattr(
        "fused_warmup.tuning.warmup.persistent_catapult.average",
        lambda *values: [v.mul_(3.0) for v in values],
    )
    catapult = fw.PersistentCatapult(fw.SGD(groups, lr=0.1), target=1.0, reduce=reduce)
    given = torch.tensor(5.0, dtype=torch.float64)
    catapult.step(given, loss)
    assert given == 5.0
    assert catapult.best == (15.0 if reduce else 5.0)


def test_a_state_of_a_catapult_is_whole():
    groups, loss = bowl(0.1)
    first = fw.PersistentCatapult(fw.SGD(groups, lr=0.1), target=3.0, start=1e-3, tolerance=0.3)
    first.step(5.0, loss)
    second = fw.PersistentCatapult(fw.SGD(groups, lr=0.1), target=1.0)
    second.load_state_dict(first.state_dict())
    names = ("lr", "best", "forwards", "searches", "target", "start", "tolerance")
    assert [getattr(second, name) for name in names] == [getattr(first, name) for name in names]
    with pytest.raises(ValueError, match=r"state_dict must have the keys .*version"):
        second.load_state_dict({k: v for k, v in first.state_dict().items() if k != "version"})


# large rates


def test_means_of_states_are_of_doubles_and_of_their_own_memory():
    states = [{"x": torch.tensor([value]), "n": torch.tensor(value > 0.0)} for value in (1e8, 1.0, -1e8)]
    mean = fw.tuning.average_states(states)
    assert mean["x"] == torch.tensor([1.0 / 3.0])
    mean["n"].fill_(True)
    assert not states[-1]["n"]


# accuracies of the last epoch count, tuned ones where they are higher; one epoch alone cannot diverge
TRIALS = {
    0.1: Trial((1.0, 1e-3), (0.9, 0.6), tuned=0.7),
    0.2: Trial((0.5,), (0.5,), tuned=0.7),
    0.3: Trial((1.0, 0.4) + (0.5, 0.7) * 9, (0.5,), tuned=0.8, barrier=0.01),
    0.4: Trial((1.0, 0.5), (0.5,), tuned=0.75),
    0.5: Trial((1.0, 0.5), (0.5,), tuned=0.69),
    0.6: Trial((1.0, 0.5), (0.5,), tuned=0.8, barrier=0.02),
    0.7: Trial((1.0, 1.5), (0.5,), tuned=0.8),
}


def test_what_makes_the_best_rate():
    """As accurate as regime 1 is enough; the most accurate is the best, not the largest."""
    found = fw.tuning.find_regimes(TRIALS.__getitem__, TRIALS, max_runs=0)
    assert [p.regime for p in found.points] == ["1", "2A", "2A", "2A", "2B", "2B", "3"]
    assert (found.divergence, found.best, found.window) == (0.7, 0.3, (0.2, 0.4))
    assert (found.points[2].loss, found.points[2].spread) == pytest.approx((0.6, 0.1))


def test_a_bit_above_chance_is_chance():
    """One and a half times it for ten classes."""
    trials = {0.1: 0.9, 0.2: 0.2, 0.3: 0.14, 0.4: 0.16}
    found = fw.tuning.find_regimes(
        lambda lr: Trial((1.0, 1e-3 if lr == 0.1 else 0.5), (trials[lr],)), trials, chance=0.1, max_runs=0
    )
    assert found.divergence == 0.3


def test_the_window_ends_where_training_diverges():
    untuned = {lr: Trial(trial.losses) for lr, trial in TRIALS.items() if lr not in (0.3, 0.4, 0.5, 0.6)}
    found = fw.tuning.find_regimes(
        {**untuned, 0.3: Trial((1.0, 2.0))}.__getitem__, [*untuned, 0.3], max_runs=0
    )
    assert (found.divergence, found.window) == (0.3, (0.2, 0.3))


def test_a_protocol_of_rates_in_any_order():
    """The barrier is between the lowest and the highest; what came before tuning is no result of it."""
    x = Parameter(torch.tensor([10.0], dtype=torch.float64))
    model = torch.nn.ParameterList([x])

    def run_epoch(optimizer):
        x.grad = torch.ones_like(x)
        optimizer.step()
        return float(x.detach())

    found = fw.tuning.pretrain_finetune(
        model, lambda lr: fw.SGD([x], lr=lr), run_epoch, lambda: float(x.detach()), lr=1.0, epochs=2,
        finetune_lrs=(0.5, 0.1, 1.0), finetune_epochs=1, average=0,
        error=lambda: 1.0 - abs(float(x.detach()) - 7.5),
    )  # fmt: skip
    # from 7.9 to 7 over a top at 7.5; the place next to it is 7.495
    assert found.barrier == pytest.approx(0.995 - 0.555)
    assert found.best == "pretrained"
    assert found.trial.tuned == pytest.approx(7.9)


# refined schedules


def test_a_header_of_any_case_and_spacing(tmp_path):
    """Steps and one value first, as exports of experiment trackers have them."""
    file = tmp_path / "run.csv"
    file.write_text(" Step ,norm,other\n0,3.0,9.0\n1,2.0,9.0\n2,1.0,9.0\n")
    found = fw.tuning.refinement(file, smoothing=0.0)
    assert found.smoothed.tolist() == [3.0, 2.0, 1.0]


# a warmup that ends by itself


def driven(wu, losses):
    """The rates of so many steps."""
    rates = [wu.lr]
    for loss in losses:
        rates.append(wu.step(loss))
    return rates[:-1]


def test_the_cooldown_does_not_begin_early():
    """A part of a step counts as a whole one."""
    wu = fw.AutoWU(10, 2, max_warmup_fraction=0.0, decay="constant-cosine", cooldown_fraction=0.25)
    assert driven(wu, [1.0] * 10) == pytest.approx([1.0] * 9 + [0.5])


def test_a_plateau_may_fall_by_little():
    """By less than a ten-thousandth per epoch it is one; it goes on from its state."""
    options = {"decay": "plateau", "max_warmup_fraction": 0.1, "plateau_patience": 2}
    losses = [1.0 - 1e-6 * i for i in range(200)]
    rates = driven(fw.AutoWU(1000, 10, **options), losses)
    assert rates[139] == rates[99]
    assert rates[140] == pytest.approx(rates[99] / 10)
    first, second = fw.AutoWU(1000, 10, **options), fw.AutoWU(50, 5)
    assert driven(first, losses[:125]) == rates[:125]
    second.load_state_dict(first.state_dict())
    assert driven(second, losses[125:]) == rates[125:]


@pytest.mark.parametrize("positive", [2, 3])
def test_most_votes_decide(positive):
    wu = fw.AutoWU(100, 1, parity=True, patience=1)
    wu._smoother.votes = lambda losses: [(0.96, 0.5)] * positive + [(0.94, 0.5)] * (5 - positive)
    wu.step(1.0)
    assert [test.positive for test in wu.tests] == [positive == 3]
    assert (wu.back_at == 1) == (positive == 3)


def test_a_copy_of_a_schedule_that_was_stepped_may_be_given_away():
    """Whoever fed the original does not feed the copy."""
    wu = fw.AutoWU(100, 10)
    wu.step(1.0)
    opt = fw.SGD([Parameter(torch.zeros(1))], lr=1.0, schedule=copy.deepcopy(wu))
    opt.record_loss(1.0)
    wu.step(1.0)


def test_the_minimum_is_not_beyond_the_last_loss():
    """Losses that fall would go on to do so."""
    losses = torch.linspace(3.0, 1.0, 10, dtype=torch.float64).square()
    ((_, place),) = ScaleFree().votes(losses)
    assert 0.8 < place <= 0.9


def test_four_losses_are_enough_for_a_vote():
    rising = torch.tensor([1.0, 1.1, 2.0, 3.0], dtype=torch.float64)
    assert ScaleFree().votes(rising[:3]) == [(0.0, 0.0)]
    assert ScaleFree().votes(rising)[0][0] > 0.5


def test_a_fit_goes_on_from_its_state():
    """Moments, the count that corrects them, and random numbers."""
    losses = torch.linspace(3.0, 1.0, 150, dtype=torch.float64).sin()
    first, second = Parity(), Parity()
    first.votes(losses[:120])
    second.load_state_dict(first.state_dict())
    assert first.votes(losses) == second.votes(losses)
    assert first.fitted == second.fitted


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


@pytest.mark.parametrize("name", ["adam", "lamb", "adamp"])
def test_experts_that_come_one_by_one(backend, name):
    """On backends that have no memory of their own for a row without states."""
    case = next(case for case in CASES if case.name == name)
    check_late_gradients(case, backend, max_grad_norm=0.5)
