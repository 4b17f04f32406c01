"""Both moments for every coefficient in [0, 1): against the recurrence in exact fractions, and against torch."""

import math
from fractions import Fraction

import pytest
import torch
from cases import Case, assert_close, assert_same_bits, device_of
from torch.nn import Parameter

import fused_warmup as fw
from fused_warmup import Adam, AdamP, AdamW, GIAdam, RAdam

BETAS = (0.0, 1e-8, 1e-3, 0.3, 0.5, 0.9, 0.999, 0.9999999)
# each coefficient once for each moment
PAIRS = [(beta, BETAS[i - 5]) for i, beta in enumerate(BETAS)]
LR, EPS = 1e-3, 1e-8
PLAIN = {"lr": LR, "eps": EPS, "weight_decay": 0.0}
CASES = [
    Case("adam", Adam, PLAIN, torch.optim.Adam),
    Case("adam-amsgrad", Adam, {**PLAIN, "amsgrad": True}, torch.optim.Adam),
    Case("adamw", AdamW, PLAIN, torch.optim.AdamW),
    Case("giadam", GIAdam, PLAIN),
    Case("radam", RAdam, PLAIN, torch.optim.RAdam),
    Case("lamb", fw.LAMB, PLAIN),
    Case("lamb-sums", fw.LAMB, {**PLAIN, "grad_averaging": False}),
    Case("adamp", AdamP, {**PLAIN, "delta": 0.0}),
    Case("adamp-nesterov", AdamP, {**PLAIN, "delta": 0.0, "nesterov": True}),
]
# the rule of each of these moves parameters as Adam does where nothing decays and nothing is projected
LIKE_ADAM = ("adam", "adamw", "giadam", "lamb", "lamb-sums", "adamp", "adamp-nesterov")
# Of each element at each step. They fall and rise by factors of 1e4 to 1e9, and the last three change sign.
GRADIENTS = [
    [10.0, 1e-3, 1e-3, 2e-3, 1e-3],
    [10.0, 1e-8, 1e-8, 1e-8, 1e-8],
    [1e3, 1.0, 1e-3, 1e-6, 1e-9],
    [1e3, 1e-6, 2e-6, 1e-6, 3e-6],
    [1e-6, 1e3, 1e-6, 1e3, 1e-6],
    [1e-9, 1e-6, 1e-3, 1.0, 1e3],
    [1e-7, 100.0, 99.0, 98.0, 1e-2],
    [10.0, -1e-3, 2e-3, -1e-3, 2e-3],
    [-1e3, 1e-6, 1e-6, -1e-6, 1e-6],
    [1e-4, -1.0, 1e-8, 1e4, -1e-5],
]
STEPS = len(GRADIENTS[0])
FLOATS = [torch.float32, torch.float64]
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@pytest.fixture(params=fw.available_backends())
def backend(request):
    return request.param


def groups(pairs, dtype, device, n):
    """One parameter of zeros in a group of its own for each pair of coefficients."""
    zeros = torch.zeros(n, dtype=dtype, device=device)
    return [{"params": [Parameter(zeros.clone())], "betas": pair} for pair in pairs]


def trained(make, dtype, device="cpu"):
    """Parameters and their two moments after each step, by pair of coefficients."""
    rows = groups(PAIRS, dtype, device, len(GRADIENTS))
    params = [row["params"][0] for row in rows]
    opt = make(rows)
    table = torch.tensor(GRADIENTS, dtype=dtype, device=device)
    for step in range(STEPS):
        for p in params:
            p.grad = table[:, step].clone()
        opt.step()
        for pair, p in zip(PAIRS, params, strict=True):
            state = opt.state[p]
            yield step, pair, p.detach(), state["exp_avg"], state["exp_avg_sq"]


def followed(grads, pair, case):
    """Exact moments after each step, the first one's sum of magnitudes, and the path and length of the way."""
    beta1, beta2 = map(Fraction, pair)
    gain = 1 / (1 - beta1) if case.name == "lamb-sums" else 1
    exp_avg = size = Fraction(0)
    exp_avg_sq = Fraction(grads[0]) ** 2 if case.cls is GIAdam else Fraction(0)
    param = length = 0.0
    for step, grad in enumerate(map(Fraction, grads), 1):
        exp_avg = beta1 * exp_avg + (1 - beta1) * gain * grad
        size = beta1 * size + (1 - beta1) * gain * abs(grad)
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad**2
        ahead, ahead_size = exp_avg, size
        if case.options.get("nesterov"):
            ahead = beta1 * exp_avg + (1 - beta1) * grad
            ahead_size = beta1 * size + (1 - beta1) * abs(grad)
        rate = LR / (math.sqrt(exp_avg_sq / (1 - beta2**step)) + EPS)
        param -= rate * float(ahead / (1 - beta1**step))
        length += rate * float(ahead_size / (1 - beta1**step))
        yield float(exp_avg), float(size), float(exp_avg_sq), param, length


def check_moments(case, backend, dtype):
    """A few roundings a step, each of at most half a unit of what has been added up: nothing is cancelled."""
    unit = UNIT[dtype]
    grads = torch.tensor(GRADIENTS, dtype=dtype).tolist()
    exact = {pair: [list(followed(row, pair, case)) for row in grads] for pair in PAIRS}
    run = trained(lambda rows: case.make(rows, backend=backend), dtype, device_of(backend))
    for step, pair, param, exp_avg, exp_avg_sq in run:
        truth = torch.tensor([row[step] for row in exact[pair]], dtype=torch.float64)
        mean, size, square, path, length = truth.unbind(1)
        some = 5 * (step + 1) * unit
        where = f"{pair} at {step}"
        assert_close(f"exp_avg_sq {where}", exp_avg_sq, square, 0.0, some)
        assert_close(f"exp_avg {where}", exp_avg / size.to(exp_avg), mean / size, some)
        if case.name in LIKE_ADAM:
            assert_close(f"param {where}", param / length.to(param), path / length, 2 * some)


@each_dtype
@each_case
def test_moments_are_those_of_the_recurrence(case, dtype, backend):
    check_moments(case, backend, dtype)


@each_dtype
@pytest.mark.parametrize("case", [c for c in CASES if c.torch_cls], ids=lambda case: case.name)
def test_same_as_torch_in_double(case, dtype, backend):
    """Torch's own first moment is right to 1e-8 where beta1 is 1e-8, because it computes with 1 - beta1."""
    device = device_of(backend)
    ours = trained(lambda rows: case.make(rows, backend=backend), dtype, device)
    truth = trained(lambda rows: case.make_torch(rows, foreach=False), torch.float64)
    tolerance = 1e-7 + 20 * STEPS * UNIT[dtype]
    for (step, pair, *values), (_, _, *expected) in zip(ours, truth, strict=True):
        largest = max(abs(row[i]) for row in GRADIENTS for i in range(step + 1))
        for name, value, wanted in zip(("param", "exp_avg", "exp_avg_sq"), values, expected, strict=True):
            # only a first moment may cancel, where the gradient changes its sign
            absolute = {"param": LR, "exp_avg": largest, "exp_avg_sq": 0.0}[name] * UNIT[dtype]
            assert_close(f"{name} {pair} at {step}", value, wanted, absolute, tolerance)


@each_dtype
@pytest.mark.parametrize("betas", [(0.9, 0.0), (0.9, 1e-8)])
def test_a_gradient_that_collapses_makes_no_leap(betas, dtype, backend):
    """The weight went to -473,736 in float32, and to -47,368,421 in float64, when the second moment was lost."""
    grads = torch.tensor([10.0, 1e-3] if dtype == torch.float32 else [1e3, 1e-6], dtype=dtype)
    ours = Parameter(torch.zeros(1, dtype=dtype, device=device_of(backend)))
    theirs = Parameter(torch.zeros(1, dtype=torch.float64))
    opt = Adam([ours], lr=1e-3, betas=betas, backend=backend)
    truth = torch.optim.Adam([theirs], lr=1e-3, betas=betas, foreach=False)
    for grad in grads:
        ours.grad = torch.full_like(ours, float(grad))
        theirs.grad = torch.full_like(theirs, float(grad))
        opt.step()
        truth.step()
    assert_close("param", ours, theirs, 0.0, 16 * UNIT[dtype])


def constant(cls, steps, dtype, backend, pairs):
    """Groups after the first and the last of many steps with one gradient."""
    rows = groups(pairs, dtype, device_of(backend), 7)
    opt = cls(rows, lr=0.0, backend=backend)
    for row in opt.param_groups:
        row["params"][0].grad = torch.linspace(0.3, 4.0, 7, dtype=dtype, device=device_of(backend))
    opt.step()
    first = [{k: v.clone() for k, v in opt.state[g["params"][0]].items()} for g in opt.param_groups]
    for _ in range(steps - 1):
        opt.step()
    return [
        (g["betas"], g["params"][0].grad, before, opt.state[g["params"][0]])
        for g, before in zip(opt.param_groups, first, strict=True)
    ]


@each_dtype
def test_a_moment_that_has_arrived_stays(dtype, backend):
    """GIAdam starts with the square of the gradient: no bit may change while the gradient is the same."""
    pairs = [(0.0, beta) for beta in BETAS]
    for _, _, before, after in constant(GIAdam, 1000, dtype, backend, pairs):
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(name, after[name], before[name])


@pytest.mark.slow
@each_dtype
def test_no_drift_near_one(dtype, backend):
    """Each of 10,000 steps rounds a moment that grows by half a unit at most; the coefficient adds nothing."""
    beta, steps = 0.9999999, 10_000
    ((_, grad, _, state),) = constant(Adam, steps, dtype, backend, [(beta, beta)])
    share = -math.expm1(steps * math.log(beta))
    for name, arrived in (("exp_avg", grad.double()), ("exp_avg_sq", grad.double().square())):
        assert_close(name, state[name], share * arrived, 0.0, steps * UNIT[dtype])
