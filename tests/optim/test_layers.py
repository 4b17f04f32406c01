"""LAMB, AdamP and SGDP: the golden steps, what they reduce to, their oracles and edges, and the authors' package."""

import json
import math
from pathlib import Path

import pytest
import torch
from cases import BACKENDS, SMALL_SHAPES, assert_close, assert_same_bits, make_params, set_grads, states_of
from torch.nn import Parameter

import fused_warmup as fw
from fused_warmup.reference import rules

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_optim.json").read_text())
INPUTS = GOLDEN["inputs"]
LAMBS = {
    "paper": {"preset": "paper"},
    "nodebias": {"preset": "paper", "bias_correction": False},
    "v1clip": {"trust_clip": 10.0},
    "wnorm_clip1": {"norm_clip": (0.0, 1.0)},
    "lambc": {"preset": "lambc"},
    "apex": {"preset": "apex"},
    "apex_wd0": {"preset": "apex", "weight_decay": 0.0},
    "nvlamb_wd0": {"preset": "nvlamb", "weight_decay": 0.0},
    "apex_noavg": {"preset": "apex", "grad_averaging": False},
    "apex_l2": {"preset": "apex", "decay_mode": "gradient"},
    "bnb": {"decay_mode": "decoupled", "trust_clip": 1.0},
}
# the rounding of a parameter, three of them per step of a trajectory
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def golden_steps(make, pattern, dtype, clip=None):
    """The parameters after each of the three steps."""
    p = Parameter(tensor(INPUTS["p0"], dtype))
    opt, steps = make([p], lr=INPUTS["lr"]), []
    for scale in INPUTS["grad_scale_per_step"]:
        p.grad = (tensor(INPUTS["grad"][pattern]) * scale).to(dtype)
        if clip is not None:
            # Apex divides by the norm itself, clip_grad_norm_ by a millionth more
            opt.max_grad_norm = clip * (1.0 + 1e-6 / float(p.grad.double().norm()))
        opt.step()
        steps.append(p.detach().clone())
    return torch.stack(steps)


def assert_golden(name, steps, dtype):
    assert_close(name, steps, tensor(GOLDEN[name]), TOLERANCE[dtype], TOLERANCE[dtype])


@each_dtype
@each_backend
@pytest.mark.parametrize("name", LAMBS)
def test_golden_lamb(name, backend, dtype):
    options = {"weight_decay": INPUTS["weight_decay"], "eps": INPUTS["eps_lamb"], **LAMBS[name]}
    clip = 1.0 if options.get("preset") in ("apex", "nvlamb") else None
    steps = golden_steps(lambda p, **k: fw.LAMB(p, backend=backend, **k, **options), "none", dtype, clip)
    assert_golden(f"lamb_{name}", steps, dtype)


@each_dtype
@each_backend
@pytest.mark.parametrize("pattern", INPUTS["grad"])
def test_golden_projections(pattern, backend, dtype):
    options = {key: INPUTS[key] for key in ("weight_decay", "delta", "wd_ratio")}
    options |= {"eps": INPUTS["eps_adamp"], "backend": backend}
    for nesterov in (False, True):
        steps = golden_steps(
            lambda p, n=nesterov, **k: fw.AdamP(p, nesterov=n, **k, **options), pattern, dtype
        )
        assert_golden(f"adamp_{pattern}_nest{int(nesterov)}", steps, dtype)
    steps = golden_steps(
        lambda p, **k: fw.SGDP(p, momentum=INPUTS["sgdp_momentum"], **k, **options), pattern, dtype
    )
    assert_golden(f"sgdp_{pattern}", steps, dtype)


@pytest.mark.parametrize("name", ["paper", "nodebias", "v1clip", "wnorm_clip1", "lambc", "bnb"])
def test_golden_trust_ratios(name):
    """Of the steps that clip no gradient; the parameter moves along the update times rate and ratio."""
    h = fw.LAMB.spec.hyper(
        "LAMB", {**fw.LAMB([Parameter(torch.ones(2))], weight_decay=0.2, **LAMBS[name]).param_groups[0]}
    )
    p, states = tensor(INPUTS["p0"]), [torch.zeros(2, 3, dtype=torch.float64)] * 2
    for step, scale in enumerate(INPUTS["grad_scale_per_step"], 1):
        g = tensor(INPUTS["grad"]["none"]) * scale
        s = rules.common_scalars(h, INPUTS["lr"], 0.2, 1.0)
        rules.LAMB.scalars(h, INPUTS["lr"], step, s)
        states = rules.LAMB.update_moments(p, g, states, s)
        update = rules.LAMB.direction(p, g, states, s)
        rules.LAMB.layer_scalars(
            h, [float(x.sum()) for x in rules.LAMB.reductions(p, g, update, s)], False, s
        )
        assert s.step_size / INPUTS["lr"] == pytest.approx(GOLDEN[f"lamb_{name}_trust"][step - 1], rel=1e-12)
        p = rules.LAMB.apply(p, update, torch.zeros(()), s)


def trained(make, shapes=SMALL_SHAPES, steps=12, dtype=torch.float64):
    """The parameters after some steps with gradients that depend on nothing but the step."""
    params = make_params(dtype, shapes)
    opt = make(params)
    for step in range(steps):
        set_grads(params, step)
        opt.step()
    return params


def assert_trained_alike(ours, theirs):
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(f"param {i}", p, q, 1e-13, 1e-13)


@each_backend
def test_what_they_reduce_to(backend):
    """Without projection AdamP and SGDP are AdamW and SGD; with a trust ratio of 1 LAMB is Adam or AdamW."""
    adamw = trained(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3))
    common = {"lr": 0.01, "backend": backend}
    assert_trained_alike(trained(lambda p: fw.AdamP(p, weight_decay=0.3, delta=0.0, **common)), adamw)
    options = {"weight_decay": 0.3, "eps": 1e-8, "trust_clip": 1.0, **common}
    # every update is smaller than its parameter, but for those of one element
    lambc = trained(lambda p: fw.LAMB(p, decay_mode="decoupled", norm_clip=(1e9, math.inf), **options))
    assert_trained_alike(lambc, adamw)
    adam = trained(lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-6))
    assert_trained_alike(trained(lambda p: fw.LAMB(p, **common)), adam)
    sgd = trained(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True))
    sgdp = trained(lambda p: fw.SGDP(p, momentum=0.9, nesterov=True, delta=0.0, **common))
    assert_trained_alike(sgdp, sgd)


@each_backend
def test_vectors_are_not_projected(backend):
    for shapes in ([()], [(17,)], [(5000,)]):
        ours = trained(lambda p: fw.AdamP(p, weight_decay=0.3, delta=1e9, backend=backend), shapes)
        assert_trained_alike(ours, trained(lambda p: torch.optim.AdamW(p, weight_decay=0.3), shapes))


@each_backend
def test_lamb_moves_every_layer_by_its_rate(backend):
    """The relative step is the learning rate, and neither the scale of the gradient nor of the layer matters."""
    shapes = [(9,), (40, 30), (70_000,), (3, 5, 7)]

    def steps(of_gradient=1.0, of_parameter=1.0, **options):
        params = make_params(torch.float64, shapes)
        opt = fw.LAMB(params, lr=0.02, eps=0.0, preset="paper", backend=backend, **options)
        with torch.no_grad():
            for p in params:
                p *= of_parameter
        made = []
        for step in range(4):
            set_grads(params, step, of_gradient)
            before = [p.detach().clone() for p in params]
            opt.step()
            made += [p.detach() - q for p, q in zip(params, before, strict=True)]
            for p, q in zip(params, before, strict=True):
                assert float((p.detach() - q).norm() / q.norm()) == pytest.approx(0.02, rel=1e-12)
        return made

    for options in ({}, {"weight_decay": 0.1}):
        plain = steps(**options)
        for a, b in zip(plain, steps(of_gradient=1024.0, **options), strict=True):
            assert_close("gradient", a, b, 1e-14, 1e-12)
    for a, b in zip(steps(), steps(of_parameter=8.0), strict=True):
        assert_close("layer", 8.0 * a, b, 1e-13, 1e-12)


@each_backend
def test_layers_without_a_ratio(backend):
    """Zero parameters, zero updates and no weight decay train as Adam does; NaN stays NaN, in its layer alone."""
    params = [Parameter(tensor(x)) for x in ([0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [3.0])]
    opt = fw.LAMB(params, lr=0.1, eps=0.0, preset="paper", backend=backend)
    grads = ([1.0, -2.0], [0.0, 0.0], [math.nan, 1.0], [1.0])
    for p, g in zip(params, grads, strict=True):
        p.grad = tensor(g)
    # eps is 0, so a gradient of 0 would give 0 / 0
    opt.add_param_group({"params": [Parameter(tensor([1.0, 2.0]))], "eps": 1e-6})
    opt.param_groups[1]["params"][0].grad = tensor([0.0, 0.0])
    params[1].grad = None
    opt.step()
    assert_close("zeros", params[0], tensor([-0.1, 0.1]), 1e-15)
    assert params[1].tolist() == [1.0, 2.0]
    assert params[2].isnan().all()
    assert_close("alone", params[3], tensor([3.0 - 0.3]), 1e-15)
    assert opt.param_groups[1]["params"][0].tolist() == [1.0, 2.0]


def rows_of(p):
    return p.detach().reshape(len(p), -1)


@each_backend
def test_channels_are_made_orthogonal(backend):
    """A huge delta projects always: no channel moves along itself, norms never shrink, and order does not matter."""
    shapes = [(6, 4), (3, 5, 7), (2, 3000), (1, 9), (33, 9)]
    for cls, options in (
        (fw.AdamP, {}),
        (fw.AdamP, {"nesterov": True}),
        (fw.SGDP, {"lr": 0.1, "momentum": 0.9}),
    ):
        params = make_params(torch.float64, shapes)
        mirrored = [Parameter(p.detach().flip(0)) for p in params]
        opts = [cls(p, delta=1e9, eps=1e-12, backend=backend, **options) for p in (params, mirrored)]
        for step in range(4):
            set_grads(params, step)
            before = [rows_of(p).clone() for p in params]
            for p, q in zip(params, mirrored, strict=True):
                q.grad = p.grad.flip(0)
            for opt in opts:
                opt.step()
            for p, q, old in zip(params, mirrored, before, strict=True):
                moved = rows_of(p) - old
                along = (moved * old).sum(1) / (moved.norm(dim=1) * old.norm(dim=1))
                assert float(along.abs().max()) < 1e-10
                assert (rows_of(p).norm(dim=1) >= old.norm(dim=1)).all()
                assert_close("order", p, q.flip(0), 1e-14)


@each_backend
def test_every_row_must_be_orthogonal_to_be_projected_by_row(backend):
    """One row along its gradient stops the view of channels; the sum over rows may still vanish."""
    base = tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    orthogonal = tensor([[0.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
    balanced = tensor([[2.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    along = tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])

    def step(grad, value=base, **options):
        p = Parameter(value.clone())
        opt = fw.SGDP([p], lr=0.1, weight_decay=0.5, backend=backend, **options)
        p.grad = grad.clone()
        opt.step()
        return p.detach()

    assert_close("channel", step(orthogonal), base * (1 - 0.05 * 0.1) - 0.1 * orthogonal, 1e-15)
    assert_close("layer", step(balanced), base * (1 - 0.05 * 0.1) - 0.1 * balanced, 1e-15)
    assert_close("none", step(along), base * (1 - 0.05) - 0.1 * along, 1e-15)
    # a zero row and a zero gradient are orthogonal to everything; nothing is taken out of a zero parameter
    lone = tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert_close("zero row", step(orthogonal, lone), lone * (1 - 0.05 * 0.1) - 0.1 * orthogonal, 1e-15)
    assert_close("zero grad", step(0 * base), base * (1 - 0.05 * 0.1), 1e-15)
    assert_close("zero param", step(along, 0 * base), -0.1 * along, 1e-15)
    broken = step(along.where(along != 1.0, math.nan))
    assert broken.isnan().tolist() == [[False, True, False], [False, True, False]]
    assert_close("not projected", broken[:, ::2], (base * 0.95 - 0.1 * along)[:, ::2], 1e-15)


@each_backend
@pytest.mark.parametrize("shape", [(600, 64), (20, 4097), (3, 20_000), (3, 33_000)], ids=str)
def test_one_row_along_its_gradient_stops_the_others(shape, backend):
    """Wherever it is: many rows in a chunk, one in a chunk, or several chunks to a row."""
    value, grad = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grad -= value * (grad * value).sum(1, keepdim=True) / value.square().sum(1, keepdim=True)
    for along in (None, 0, shape[0] // 2, shape[0] - 1):
        p = Parameter(value.clone())
        opt = fw.SGDP([p], lr=0.1, weight_decay=0.5, wd_ratio=0.0, eps=1e-12, backend=backend)
        p.grad = grad.clone()
        if along is not None:
            p.grad[along] += 100.0 * value[along]
        opt.step()
        decay = 0.0 if along is None else 0.05
        assert_close(f"row {along}", p, value * (1 - decay) - 0.1 * p.grad, 1e-12)


@each_backend
def test_sixteen_bit_gradients_of_scale_invariant_rows_are_still_seen(backend):
    """The rounding of bfloat16 leaves a cosine far below the threshold, if the sums do not add to it."""
    torch.manual_seed(3)
    weight = torch.randn(64, 512)
    unit = weight / weight.norm(dim=1, keepdim=True)
    grad = torch.randn(64, 512)
    grad -= (grad * unit).sum(1, keepdim=True) * unit
    for scale in (1.0, 1e-4):
        p = Parameter(weight.bfloat16())
        opt = fw.SGDP([p], lr=0.0, weight_decay=0.5, wd_ratio=0.0, backend=backend)
        opt.param_groups[0]["lr"] = 1.0
        p.grad = (grad * scale).bfloat16()
        before = p.detach().float()
        opt.step()
        # decay of a half would show
        moved = p.detach().float() - before + p.grad.float()
        assert float(moved.abs().max()) < 0.1


# rows shorter than a vector, around blocks, pieces and chunks, longer than a chunk, and many of them
CHANNELS = [
    (1, 1), (5, 1), (300, 9), (4000, 9), (33, 3, 3, 3), (3, 255), (3, 257), (7, 2047), (5, 2048), (5, 2049),
    (20, 4097), (2, 32768), (3, 32769), (2, 70_001), (1, 40_000), (40_000, 1), (0, 4), (4, 0), (17,), (),
]  # fmt: skip


def layouts(dtype, seed=0):
    """Parameters in unusual layouts: channels last, transposed, strided, and one that starts off a vector."""
    conv = make_params(dtype, [(6, 4, 3, 3)], seed)[0].detach().contiguous(memory_format=torch.channels_last)
    wide = make_params(dtype, [(70, 41)], seed)[0].detach()
    room = torch.zeros(41 * 9 + 1, dtype=dtype)
    room[1:] = make_params(dtype, [(41 * 9,)], seed)[0].detach()
    return [
        Parameter(x)
        for x in (conv, wide.t(), wide.clone()[::2, 1::3], wide.clone().t()[::3], room[1:].view(41, 9))
    ]


def assert_like_the_reference(cls, dtype, params, backend, steps=3, **options):
    """Some steps from the same start; the reference runs in float64 on plain tensors."""
    truth = [Parameter(p.detach().double().contiguous()) for p in params]
    opt, ref = cls(params, backend=backend, **options), cls(truth, backend="reference", **options)
    unit = torch.finfo(dtype).eps
    for step in range(steps):
        set_grads(params, step)
        set_grads(truth, step)
        opt.step()
        ref.step()
    for i, (p, q) in enumerate(zip(params, truth, strict=True)):
        assert_close(f"param {i} {tuple(p.shape)}", p, q, 8 * unit, 8 * unit)
    ours, theirs = opt.telemetry.latest(), ref.telemetry.latest()
    for name in ("grad_norm", "grad_norm_l1"):
        assert ours[name] == pytest.approx(theirs[name], rel=8 * unit), name


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("delta", [0.1, 2.0, 1e9])
def test_rows_of_every_length(delta, dtype, backend):
    for shapes in (CHANNELS[:10], CHANNELS[10:]):
        params = make_params(dtype, shapes)
        options = {"lr": 0.01, "delta": delta, "weight_decay": 0.1, "average": fw.EMA(0.5)}
        assert_like_the_reference(fw.AdamP, dtype, params, backend, **options)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_are_those_of_the_shape_whatever_the_layout(dtype, backend):
    for options in ({"delta": 1e9}, {"delta": 1.0, "max_grad_norm": 1.0, "average": fw.SWA(1)}):
        common = {"lr": 0.01, "weight_decay": 0.1, **options}
        assert_like_the_reference(fw.AdamP, dtype, layouts(dtype), backend, **common)
        assert_like_the_reference(
            fw.SGDP, dtype, layouts(dtype), backend, momentum=0.9, nesterov=True, **common
        )
    assert_like_the_reference(fw.LAMB, dtype, layouts(dtype), backend, lr=0.01, weight_decay=0.1)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension fused_warmup._cpu is not built")
@pytest.mark.parametrize("cls", [fw.LAMB, fw.AdamP], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
def test_threads_share_layers_without_a_trace(cls, clip):
    """Layers of many chunks, in rows that several of them hold or that hold several of them."""
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        params = make_params(torch.float32, [(700, 130), (3, 40_001), (9, 9), (70_000,)])
        opt = cls(params, lr=0.01, weight_decay=0.1, max_grad_norm=clip, average=fw.EMA(0.9), backend="cpu")
        for step in range(3):
            set_grads(params, step)
            opt.step()
        tensors = [t for p in params for t in (p, *states_of(opt, p).values())]
        results.append([*tensors, *opt.telemetry.history().values()])
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert_same_bits(str(i), a, b)


def network():
    """Convolutions that batch norms make scale invariant, one by channels, and a layer that is not.

    Without biases, whose gradients would be rounding errors alone, for Adam to normalise.
    """
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, groups=8, bias=False),
        torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 10),
    ).double()  # fmt: skip


@each_backend
@pytest.mark.parametrize(
    ("ours", "keeps_buffer", "options"),
    [
        (fw.AdamP, True, {"lr": 1e-2, "weight_decay": 0.1}),
        (fw.AdamP, True, {"lr": 1e-2, "nesterov": True, "betas": (0.8, 0.95), "wd_ratio": 0.5}),
        (fw.SGDP, True, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
        (fw.SGDP, False, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "delta": 0.5}),
        (fw.SGDP, True, {"lr": 0.1, "weight_decay": 1e-2}),
    ],
    ids=["adamp", "adamp-nesterov", "sgdp-nesterov", "sgdp-dampening", "sgdp-plain"],
)
def test_the_authors_package(ours, keeps_buffer, options, backend):
    """Thirty steps of a network with gradients from its own loss."""
    package = pytest.importorskip("adamp", reason="adamp is not installed")
    theirs = getattr(package, ours.__name__)
    if not keeps_buffer:
        # where the update is the buffer, the package projects the buffer too, in place
        project = theirs._projection
        theirs = type("Kept", (theirs,), {"_projection": lambda *a: project(*a[:3], a[3].clone(), *a[4:])})
    torch.manual_seed(5)
    nets = [network(), network()]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = [ours(nets[0].parameters(), backend=backend, **options), theirs(nets[1].parameters(), **options)]
    start = [p.detach().clone() for p in nets[0].parameters()]
    for _ in range(30):
        x, y = torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.randint(10, (16,))
        for net, opt in zip(nets, opts, strict=True):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            opt.step()
    for (name, p), q, p0 in zip(nets[0].named_parameters(), nets[1].parameters(), start, strict=True):
        assert_close(name, p, q, 1e-10, 1e-10)
        assert not torch.equal(p, p0)


@each_backend
def test_scale_invariant_weights_are_projected_and_the_last_layer_is_not(backend):
    """Steps of the weights before a batch norm are orthogonal to the weights, in float32."""
    torch.manual_seed(1)
    net = network().float()
    opt = fw.AdamP(net.parameters(), lr=1e-2, backend=backend)
    for _ in range(5):
        x, y = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
        opt.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        opt.step()
        along = {}
        for name in ("0.weight", "3.weight", "7.weight"):
            old = before[name].flatten(1)
            moved = net.get_parameter(name).detach().flatten(1) - old
            along[name] = float(((moved * old).sum(1) / (moved.norm(dim=1) * old.norm(dim=1))).abs().max())
        assert along["0.weight"] < 1e-4
        assert along["3.weight"] < 1e-4
        assert along["7.weight"] > 1e-2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: fw.LAMB(p, preset="nv"), "LAMB: preset must be one of 'paper', 'apex', 'nvlamb', 'lambc', got 'nv'"),
        (lambda p: fw.LAMB(p, trust_clip=0.0), r"LAMB: trust_clip must be finite and > 0, got 0\.0"),
        (lambda p: fw.LAMB(p, trust_clip=math.nan), "LAMB: trust_clip must be finite and > 0, got nan"),
        (lambda p: fw.LAMB(p, norm_clip=(2.0, 1.0)), r"LAMB: norm_clip\[1\] must be finite and >= 2, got 1\.0"),
        (lambda p: fw.LAMB(p, norm_clip=3.0), r"LAMB: norm_clip must be a pair of numbers or None, got 3\.0"),
        (lambda p: fw.LAMB(p, decay_mode="l2"), "LAMB: decay_mode must be one of 'update', 'gradient', 'decoupled', got"),
        (lambda p: fw.LAMB(p, always_adapt=2), "LAMB: always_adapt must be True or False, got 2"),
        (lambda p: fw.LAMB(p, bias_correction=None), "LAMB: bias_correction must be True or False, got None"),
        (lambda p: fw.AdamP(p, delta=-0.1), r"AdamP: delta must be finite and >= 0, got -0\.1"),
        (lambda p: fw.AdamP(p, wd_ratio=math.inf), "AdamP: wd_ratio must be finite and >= 0, got inf"),
        (lambda p: fw.AdamP(p, nesterov="yes"), "AdamP: nesterov must be True or False, got 'yes'"),
        (lambda p: fw.AdamP(p, betas=(0.9, 1.0)), r"AdamP: betas\[1\] must lie in \[0, 1\), got 1\.0"),
        (lambda p: fw.SGDP(p, lr=0.1, momentum=1.0), r"SGDP: momentum must lie in \[0, 1\), got 1\.0"),
        (lambda p: fw.SGDP(p, lr=0.1, eps=-1.0), r"SGDP: eps must be finite and >= 0, got -1\.0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make([Parameter(torch.ones(2))])


def test_presets_and_what_is_given_beside_them():
    def options(**given):
        opt = fw.LAMB([Parameter(torch.ones(2))], **given)
        return opt.param_groups[0]["always_adapt"], opt.param_groups[0]["trust_clip"], opt.max_grad_norm

    assert options() == (False, math.inf, None)
    assert options(preset="paper") == (True, math.inf, None)
    assert options(preset="apex") == (False, math.inf, 1.0)
    assert options(preset="nvlamb") == (True, math.inf, 1.0)
    assert options(preset="lambc") == (True, 1.0, None)
    assert options(preset="nvlamb", always_adapt=False, max_grad_norm=None, trust_clip=5.0) == (
        False,
        5.0,
        None,
    )
    assert options(preset="lambc", trust_clip=math.inf) == (True, math.inf, None)
