"""Groups that are kept on a sphere: the oracles of Sadrtdinov et al. 2024, and every rule against the reference.

Their tests run once more by CUDA on the host in ``test_cuda_on_host.py``, by Triton in ``interpreted.py``.
"""

import copy
import io
import math

import pytest
import torch
from backends.test_backends import EPS
from cases import (
    BACKENDS,
    assert_close,
    assert_same_bits,
    every_backend,
    make_params,
    set_grads,
    states_of,
)
from torch.nn import Parameter

import fused_warmup as fw
from fused_warmup.plan.sphere import norm_of

RULES = {
    "sgd": (fw.SGD, {}),
    "sgd-nesterov": (fw.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (fw.Adam, {}),
    "giadam-amsgrad": (fw.GIAdam, {"amsgrad": True}),
    "radam": (fw.RAdam, {"betas": (0.8, 0.99)}),
    "lamb": (fw.LAMB, {}),
    "lamb-adapts": (fw.LAMB, {"always_adapt": True}),
    "adamp": (fw.AdamP, {"delta": 1.0}),
    "sgdp-momentum": (fw.SGDP, {"momentum": 0.9, "delta": 1.0}),
}
SHAPES = [(17, 3), (), (2049,)]
each_rule = pytest.mark.parametrize("rule", RULES)
backend = every_backend


def norm(params):
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in params))


def made(rule, backend, params, *others, **options):
    """The optimizer over a group on a sphere, and over the groups that follow."""
    cls, own = RULES[rule]
    groups = [{"params": params, "projection": "sphere"}, *others]
    return cls(groups, **{"lr": 0.01, "backend": backend, **own, **options})


# a scale-invariant network


class Invariant:
    """Layers whose outputs are normalised without a constant, so that no weight's scale matters."""

    def __init__(self, radius, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.x, self.y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (6, 5))
        weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((9, 6), (7, 9))]
        self.last = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        scale = radius / norm(weights)
        self.params = [Parameter(w * scale) for w in weights]

    def backward(self):
        h = self.x
        for param in self.params:
            h = h @ param.T
            h = torch.tanh((h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True))
        loss = (h @ self.last.T - self.y).square().mean()
        for param, grad in zip(self.params, torch.autograd.grad(loss, self.params), strict=True):
            param.grad = grad

    @property
    def flat(self):
        return torch.cat([p.detach().flatten() for p in self.params])

    @property
    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.params])

    def train(self, opt, steps):
        """The direction of the weights after each step."""
        directions = []
        for _ in range(steps):
            self.backward()
            opt.step()
            directions.append(self.flat / self.flat.norm())
        return torch.stack(directions)


# eps sets a scale of its own, and so do the bounds of LAMB
EXACT = {name: {} if cls is fw.SGD else {"eps": 0.0} for name, (cls, _) in RULES.items()}


@each_rule
def test_directions_do_not_depend_on_the_radius(rule, backend):
    check_directions(rule, backend, 30)


def check_directions(rule, backend, steps):
    """Two radii give the same directions; RAdam's steps include the first rectified one."""
    runs = []
    for radius in (1.0, 28.0):
        net = Invariant(radius)
        runs.append(net.train(made(rule, backend, net.params, **EXACT[rule]), steps))
        assert net.flat.norm() == pytest.approx(radius, rel=1e-14)
    assert (runs[0][-1] - Invariant(1.0).flat).norm() > 0.01
    assert_close("direction", runs[0], runs[1], 1e-12)


def test_the_angle_of_a_step_is_that_of_the_effective_rate(backend):
    """The angle is arctan(effective rate * |gradient on the unit sphere|); the gradient is orthogonal to the weights."""
    net = Invariant(28.0)
    opt = made("sgd", backend, net.params, lr=0.3)
    for _ in range(5):
        before = net.flat / net.flat.norm()
        net.backward()
        slope = float(net.gradient.norm()) * 28.0
        assert abs(float(net.gradient @ before)) < 1e-10 * float(net.gradient.norm())
        opt.step()
        after = net.flat / net.flat.norm()
        across = after - (after @ before) * before
        angle = math.atan2(float(across.norm()), float(after @ before))
        assert angle == pytest.approx(math.atan(0.3 * slope), rel=1e-12)


def test_norms_grow_without_a_sphere_only(backend):
    """Free weights grow, so that their effective rate decays; those on a sphere keep both."""
    free, kept = Invariant(3.0), Invariant(3.0)
    opts = fw.SGD(free.params, lr=0.5, backend=backend), made("sgd", backend, kept.params, lr=0.5)
    last = 3.0
    for _ in range(20):
        free.train(opts[0], 1)
        assert float(free.flat.norm()) > last
        last = float(free.flat.norm())
        kept.train(opts[1], 1)
        assert kept.flat.norm() == pytest.approx(3.0, rel=1e-14)


def test_a_given_radius_changes_no_direction(backend):
    """The first step turns the weights at the norm that their gradient belongs to, then brings them there."""
    runs = []
    for options in ({}, {"radius": 5.0}):
        net = Invariant(2.0)
        runs.append(net.train(made("sgd", backend, net.params, lr=0.3, **options), 8))
        assert net.flat.norm() == pytest.approx(options.get("radius", 2.0), rel=1e-14)
    assert_close("direction", runs[0], runs[1], 1e-13)


# against the reference


def tensors_of(opt):
    found = [g["norm"] for g in opt.param_groups if "norm" in g]
    for group in opt.param_groups:
        for p in group["params"]:
            found += [p.detach(), *(value for _, value in sorted(states_of(opt, p).items()))]
    return found


def three_groups(dtype, shapes=None, device="cpu"):
    """Parameters of a group that keeps its norm, of one that is free, and of one with a radius."""
    shapes = SHAPES if shapes is None else shapes
    return [make_params(dtype, shapes, seed, device) for seed in range(3)]


def on_spheres(rule, backend, groups, **options):
    plain, other = {"params": groups[1]}, {"params": groups[2], "projection": "sphere", "radius": 3.0}
    return made(rule, backend, groups[0], plain, other, **options)


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@each_rule
def test_one_step_from_the_same_state_on_a_sphere(rule, dtype, backend):
    check_steps(rule, dtype, backend, SHAPES, 4)


def check_steps(rule, dtype, backend, shapes, steps, device="cpu"):
    """The reference in float64; stored twice, with a norm of what was stored first: three halves of a unit."""
    groups = three_groups(dtype, shapes, device)
    truth = [[Parameter(p.detach().double().cpu().clone()) for p in group] for group in groups]
    options = {"max_grad_norm": 40.0, "average": fw.EMA(0.9)}
    opt, ref = (on_spheres(rule, b, g, **options) for b, g in ((backend, groups), ("reference", truth)))
    unit, state_unit = EPS[dtype], EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    pairs = [pair for g, t in zip(groups, truth, strict=True) for pair in zip(g, t, strict=True)]
    for step in range(steps):
        for own in (groups, truth):
            flat = [p for group in own for p in group]
            set_grads(flat, step)
            # one of each group on a sphere at some step
            flat[step].grad = flat[8 - step % 3].grad = None
        for a, b in pairs:
            b.data.copy_(a)
            for name, value in states_of(opt, a).items():
                ref.state[b][name].copy_(value)
        opt.step()
        ref.step()
        for i, (a, b) in enumerate(pairs):
            stores = 1.53 if not 3 <= i < 6 else 0.51
            bound = 0.04 * unit + 8 * state_unit
            if dtype == torch.float64:
                # the reference rounds as often, and the factor of a sphere scales what was rounded before it
                bound *= 2 * max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
            assert_close(f"param {i} at {step}", a, b, bound, stores * unit)
            for name, value in states_of(ref, b).items():
                loose = stores * unit + 8 * state_unit if name == "average" else 4 * state_unit
                assert_close(f"{name} {i} at {step}", states_of(opt, a)[name], value, loose, loose)
    for g, own in ((0, groups[0]), (2, groups[2])):
        radius = opt.param_groups[g]["norm"]
        assert float(radius) == (
            3.0 if g else float(norm_of(make_params(dtype, shapes), torch.device("cpu")))
        )
        # rounding moves every element, and so the norm, by half a unit at most, and the factor as much again
        assert norm(own) == pytest.approx(float(radius), rel=unit)
    assert opt.telemetry.latest() == pytest.approx(ref.telemetry.latest(), rel=1e-6, nan_ok=True)


@each_rule
def test_other_groups_do_not_notice(rule, backend):
    """The free group is the same bit for bit, frozen parameters stay."""
    results = []
    for projection in (None, "sphere"):
        groups = three_groups(torch.float32)
        groups[0].append(Parameter(torch.ones(5), requires_grad=False))
        opt = on_spheres(rule, backend, groups, average=fw.SWA(1))
        opt.param_groups[0]["projection"] = projection
        if projection is None:
            opt.param_groups[2].update(projection=None, radius=None)
        for step in range(3):
            set_grads([p for group in groups for p in group if p.requires_grad], step)
            opt.step()
        results.append([t for p in groups[1] for t in (p.detach(), *states_of(opt, p).values())])
        assert torch.equal(groups[0][-1], torch.ones(5))
        assert groups[0][-1] not in opt.session.state
    for a, b in zip(*results, strict=True):
        assert_same_bits("free", a, b)


def test_telemetry_has_the_effective_rate(backend):
    params = make_params(torch.float32, SHAPES)
    opt = made("sgd", backend, params, lr=0.25, schedule=fw.schedules.constant(0.5))
    set_grads(params, 0)
    opt.step()
    assert opt.telemetry.latest()["lr"] == 0.125
    assert opt.get_last_lr() == [0.125]


@pytest.mark.parametrize("rule", ["adam", "adamp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_has_no_gradient_turns_with_the_rest(rule, dtype, backend):
    """It belongs to the norm from the first step on, and is averaged where it is."""
    params = make_params(dtype, [(40,), (3, 5)])
    before, radius = params[1].detach().double().clone(), norm(params)
    opt = made(rule, backend, params, lr=0.1, average=fw.SWA(1))
    set_grads(params[:1], 0)
    opt.step()
    unit = EPS[dtype]
    assert norm(params) == pytest.approx(radius, rel=unit)
    ratios = params[1].detach().double() / before
    assert abs(float(ratios.mean()) - 1.0) > 2 * unit
    assert_close("ratio", ratios, ratios.mean().expand_as(ratios), unit)
    for p in params:
        assert_same_bits("average", opt.state[p]["average"], p.detach().float())


def test_versions_of_all_parameters_move(backend):
    params = make_params(torch.float32, SHAPES)
    opt = made("sgd", backend, params)
    set_grads(params[:1], 0)
    before = [p._version for p in params]
    opt.step()
    assert all(p._version > old for p, old in zip(params, before, strict=True))


# steps that are not made, norms that are none


@pytest.mark.parametrize("rule", ["adam", "lamb"])
@pytest.mark.parametrize("how", ["nonfinite", "found_inf"])
def test_a_skipped_step_changes_nothing(rule, how, backend):
    check_skipped_steps(rule, how, backend, SHAPES)


def check_skipped_steps(rule, how, backend, shapes):
    """The first one, too, which does not bring the group to its radius."""
    groups = three_groups(torch.float32, shapes)
    opt = on_spheres(rule, backend, groups, nonfinite="skip", average=fw.EMA(0.5))
    flat = [p for group in groups for p in group]
    for step in range(4):
        set_grads(flat, step)
        if step % 2 == 0:
            opt.init_state()
            before = [t.clone() for t in tensors_of(opt)]
            if how == "nonfinite":
                flat[0].grad[3, 1] = math.inf
            else:
                opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)
        opt.step()
        if how == "found_inf" and step % 2 == 0:
            del opt.grad_scale, opt.found_inf
        if step % 2 == 0:
            for a, b in zip(before, tensors_of(opt), strict=True):
                assert_same_bits("kept", a, b)
    assert float(opt.param_groups[2]["norm"]) == 3.0
    assert norm(groups[2]) == pytest.approx(3.0, rel=1e-6)
    assert opt.telemetry.latest()["step"] == 2.0


def test_scaled_gradients_are_unscaled_first(backend):
    results = []
    for scale in (1.0, 1024.0):
        params = make_params(torch.float32, SHAPES)
        opt = made("sgd", backend, params)
        set_grads(params, 0, scale)
        opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(0.0)
        opt.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert_same_bits("param", a, b)


@pytest.mark.parametrize("rule", ["sgd", "lamb"])
def test_a_norm_that_is_none_rescales_nothing(rule, backend):
    """Zeros stay where the update left them, and so does a group that holds what is not finite."""
    zeros, broken = [Parameter(torch.zeros(70))], make_params(torch.float32, [(70,)])
    opt = made(rule, backend, zeros, {"params": broken, "projection": "sphere"})
    plain = make_params(torch.float32, [(70,)])
    free = RULES[rule][0](plain, lr=0.01 * norm(plain) ** 2, backend=backend, **RULES[rule][1])
    zeros[0].grad = torch.zeros(70)
    for p in (broken[0], plain[0]):
        p.grad = torch.ones(70)
        p.grad[3] = math.nan
    opt.step()
    free.step()
    assert not zeros[0].any()
    assert float(opt.param_groups[0]["norm"]) == 0.0
    assert broken[0].isnan().sum() == 1 if rule == "sgd" else broken[0].isnan().any()
    if rule == "sgd":
        assert_close("param", broken[0], plain[0], 1e-4, 1e-6)


# states, options, errors


def trained(rule, backend, steps, opt=None, groups=None, **options):
    groups = groups or three_groups(torch.float32)
    opt = opt or on_spheres(rule, backend, groups, average=fw.EMA(0.9), **options)
    for step in steps:
        set_grads([p for group in groups for p in group], step)
        opt.step()
    return groups, opt


@each_rule
def test_a_state_dict_goes_on_bit_for_bit(rule, backend):
    groups, opt = trained(rule, backend, range(3))
    file, live = io.BytesIO(), opt.state_dict()
    torch.save(live, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [[Parameter(p.detach().clone()) for p in group] for group in groups]
    loaded = on_spheres(rule, backend, others, average=fw.EMA(0.9))
    loaded.load_state_dict(saved)
    copied = copy.deepcopy((groups, opt))
    for g, o in ((groups, opt), (others, loaded), copied):
        trained(rule, backend, range(3, 6), o, g)
    for other in (loaded, copied[1]):
        for a, b in zip(tensors_of(opt), tensors_of(other), strict=True):
            assert_same_bits("state", a, b)
    # what was saved has not moved, and loading fills the tensor that kernels read
    held = opt.param_groups[2]["norm"]
    held.fill_(7.0)
    assert float(live["param_groups"][2]["norm"]) == 3.0
    opt.load_state_dict(saved)
    assert opt.param_groups[2]["norm"] is held
    assert float(held) == 3.0


def test_a_state_dict_without_a_norm_measures_it(backend):
    groups, opt = trained("sgd", backend, range(2))
    fresh = on_spheres("sgd", backend, three_groups(torch.float32), average=fw.EMA(0.9)).state_dict()
    for p in groups[0]:
        p.data.mul_(2.0)
    radius = norm(groups[0])
    opt.load_state_dict(fresh)
    trained("sgd", backend, range(2), opt, groups)
    assert norm(groups[0]) == pytest.approx(radius, rel=1e-6)


def test_looking_at_the_traffic_measures_nothing(backend):
    params = make_params(torch.float32, SHAPES)
    opt = made("sgd", backend, params)
    set_grads(params, 0)
    opt.traffic()
    assert "norm" not in opt.param_groups[0]
    for p in params:
        p.data.mul_(3.0)
    radius = norm(params)
    opt.step()
    assert norm(params) == pytest.approx(radius, rel=1e-6)


def test_projection_and_radius_may_change(backend):
    """Off, on again at the norm of then, and to another radius; all at the next step."""
    params = make_params(torch.float32, SHAPES)
    opt, group = made("sgd", backend, params), None
    group = opt.param_groups[0]
    wanted = norm(params)
    for step in range(6):
        if step == 2:
            group["projection"] = None
        if step == 3:
            group["projection"], wanted = "sphere", norm(params)
        if step == 5:
            group["radius"] = wanted = 11.0
        set_grads(params, step)
        opt.step()
        if step != 2:
            assert norm(params) == pytest.approx(wanted, rel=1e-6), step
        else:
            assert "norm" not in group
            assert abs(norm(params) - wanted) > 1e-4


def test_a_group_that_other_parameters_join(backend):
    params, more = make_params(torch.float32, SHAPES), make_params(torch.float32, [(50,)], 1)
    opt = made("sgd", backend, params)
    radius = norm(params)
    set_grads([*params, *more], 0)
    opt.step()
    opt.add_param_group({"params": more, "projection": "sphere"})
    opt.param_groups[0]["params"].append(opt.param_groups.pop()["params"][0])
    opt.step()
    assert norm([*params, *more]) == pytest.approx(radius, rel=1e-6)


def test_the_groups_of_another_optimizer_bring_no_norm(backend):
    params = make_params(torch.float32, SHAPES)
    _, opt = trained("sgd", backend, range(1))
    first = made("sgd", backend, params)
    set_grads(params, 0)
    first.step()
    opt = fw.SGD([dict(group) for group in first.param_groups], lr=0.1, backend=backend)
    assert "norm" not in opt.param_groups[0]
    opt.step()
    assert opt.param_groups[0]["norm"] is not first.param_groups[0]["norm"]


ERRORS = {
    "a projection that is none": (
        {"projection": "ball"},
        r"projection must be 'sphere' or None, got 'ball'\.",
    ),
    "a radius without a projection": (
        {"radius": 1.0},
        r"radius must be None without a projection, got 1\.0\.",
    ),
    "no radius": ({"projection": "sphere", "radius": 0.0}, r"radius must be finite and > 0, got 0\.0\."),
    "a negative radius": ({"projection": "sphere", "radius": -1}, "radius must be finite and > 0, got -1"),
    "an infinite radius": ({"projection": "sphere", "radius": math.inf}, "radius must be finite and > 0"),
    "NaN": ({"projection": "sphere", "radius": math.nan}, "radius must be finite and > 0, got nan"),
    "a word": ({"projection": "sphere", "radius": "large"}, "radius must be a number, got 'large'"),
    "decay": (
        {"projection": "sphere", "weight_decay": 0.1},
        r"weight_decay must be 0 beside projection='sphere', got 0\.1\. On a sphere decay has nothing",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error):
    """For all groups, for one, and where it is set between steps."""
    options, message = ERRORS[error]
    params = make_params(torch.float32, SHAPES)
    for groups, rest in ((params, options), ([{"params": params, **options}], {})):
        with pytest.raises((ValueError, TypeError), match=f"Adam: {message}"):
            fw.Adam(groups, **rest)
    opt = fw.Adam(params)
    set_grads(params, 0)
    opt.step()
    before = [t.clone() for t in tensors_of(opt)]
    opt.param_groups[0].update(options)
    with pytest.raises((ValueError, TypeError), match=f"Adam: {message}"):
        opt.step()
    for a, b in zip(before, tensors_of(opt), strict=True):
        assert_same_bits("kept", a, b)


def test_decay_by_default_is_named():
    with pytest.raises(
        ValueError, match=r"AdamW: weight_decay must be 0 beside projection='sphere', got 0\.01"
    ):
        fw.AdamW(make_params(torch.float32, SHAPES), projection="sphere")


def test_a_norm_of_another_shape_is_not_loaded():
    _, opt = trained("sgd", "auto", range(1))
    saved = opt.state_dict()
    saved["param_groups"][0]["norm"] = torch.ones(2)
    with pytest.raises(
        ValueError, match=r"state_dict\['param_groups'\]\[0\]\['norm'\] must be a number >= 0, got 'shape"
    ):
        opt.load_state_dict(saved)


LOOKS = {
    "initial_lr": lambda loss, opt: fw.tuning.initial_lr(loss, opt, target=1.0),
    "critical_lr": fw.sharpness.critical_lr,
    "preconditioned": fw.sharpness.preconditioned,
    "threshold": lambda loss, opt: fw.sharpness.threshold(opt),
    "SharpnessProbe": lambda loss, opt: fw.SharpnessProbe(opt, loss),
    "PersistentCatapult": lambda loss, opt: fw.PersistentCatapult(opt, target=1.0),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_ahead_refuses_what_it_cannot_honour(look):
    params = make_params(torch.float32, [(5,)])
    opt = made("sgd", "auto", params)
    set_grads(params, 0)
    opt.step()
    with pytest.raises(ValueError, match=f"{look}: projection must be None in groups that are measured, got"):
        LOOKS[look](lambda: params[0].square().sum(), opt)


# bits


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension fused_warmup._cpu is not built")
@pytest.mark.parametrize("rule", ["adam", "adamp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(rule, dtype):
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            groups = three_groups(dtype, [(90_001,), (300, 301), (7,)])
            opt = on_spheres(rule, "cpu", groups, average=fw.EMA(0.9))
            for step in range(2):
                set_grads([p for group in groups for p in group], step)
                opt.step()
            results.append([*tensors_of(opt), opt.telemetry.rows()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits("result", a, b)


def test_the_norm_before_the_first_step():
    """Of strided, empty and 0-dim tensors of every dtype, and of numbers whose squares are not finite."""
    device = torch.device("cpu")
    for dtype in EPS:
        tensors = [t.detach() for t in make_params(dtype, [(0,), (), (70_001,), (90, 50)])]
        tensors.append(tensors[-1][::2, 1::3])
        expected = torch.cat([t.double().flatten() for t in tensors]).norm()
        assert float(norm_of(tensors, device)) == pytest.approx(float(expected), rel=1e-14)
    assert float(norm_of([], device)) == 0.0
