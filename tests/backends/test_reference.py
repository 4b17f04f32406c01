"""The reference is tested too: against torch.optim, closed forms and the published values."""

import csv
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from cases import SMALL_SHAPES, TORCH_CASES, assert_close, make_params, set_grads

import fused_warmup as fw
from fused_warmup.plan.hyper import Hyper
from fused_warmup.reference import rules

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("case", TORCH_CASES, ids=lambda case: case.name)
def test_reference_is_torch(case):
    ours, theirs = (make_params(torch.float64, SMALL_SHAPES) for _ in range(2))
    opt = case.make(ours, backend="reference", max_grad_norm=3.0)
    peer = case.make_torch(theirs, foreach=False)
    for step in range(100):
        set_grads(ours, step)
        set_grads(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 3.0)
        opt.step()
        peer.step()
        if step + 1 not in (1, 5, 6, 7, 100):
            continue
        assert opt.telemetry.latest()["grad_norm"] == pytest.approx(float(norm), rel=1e-12)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(f"param {i} at {step}", a, b, 1e-12, 1e-12)
            for name, value in peer.state[b].items():
                if value is not None:
                    assert_close(f"{name} {i} at {step}", opt.state[a][name], value, 1e-13, 1e-12)


def test_radam_golden_table():
    with (DATA / "radam_table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 69
    for row in rows:
        beta2, t = float(row["beta2"]), int(row["t"])
        rho = rules.sma_length(beta2, t)
        # the table was made with 1 - beta2**t, which cancels at the first steps; exact fractions did not
        assert rho == pytest.approx(float(row["rho_t"]), rel=1e-12 if t >= 10 else 2e-11 if t > 1 else 1e-9)
        if t <= 100:
            b = Fraction(beta2)
            exact = 2 / (1 - b) - 1 - 2 * t * b**t / (1 - b**t)
            assert rho == pytest.approx(float(exact), rel=2e-13)
        branch = {"momentum": False, "adaptive": True}.get(row["torch_branch_rho_gt_5"])
        assert (rho > 5.0) == branch, row
        if not math.isnan(float(row["r_t"])):
            assert rules.rectification(beta2, rho) == pytest.approx(float(row["r_t"]), rel=1e-11)
        assert math.sqrt(rules.bias_correction(beta2, t)) == pytest.approx(
            float(row["sqrt_1_minus_beta2_pow_t"]), rel=1e-12
        )
        if rho > 5.0:
            h = Hyper(lr=1.0, beta1=0.9, beta2=beta2, rho_threshold=5.0)
            s = rules.common_scalars(h, 1.0, 0.0, 1.0)
            rules.RAdam.scalars(h, 1.0, t, s)
            assert s.step_size == pytest.approx(float(row["adaptive_step_factor_beta1_0.9"]), rel=1e-11)


@pytest.mark.parametrize(
    ("beta2", "paper", "torch_"),
    [(0.5, None, None), (0.6, None, None), (2 / 3, 7, None), (0.7, 6, 10), (0.8, 5, 7), (0.9, 5, 6), (0.99, 5, 6),
     (0.999, 5, 6), (0.9999, 5, 6), (0.99999, 5, 6)],
)  # fmt: skip
def test_radam_first_adaptive_step(beta2, paper, torch_):
    """The crossing table E7, and O-B9: no adaptive step before the sixth at extreme beta2."""
    for threshold, expected in ((4.0, paper), (5.0, torch_)):
        first = next((t for t in range(1, 5000) if rules.sma_length(beta2, t) > threshold), None)
        assert first == expected, threshold


def _descend(make, steps):
    """Minimise x^2 / 2 from 1 and return x by step."""
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = make([x])
    path = {}
    for step in range(1, max(steps) + 1):
        x.grad = x.detach().clone()
        opt.step()
        path[step] = x.item()
    return {step: path[step] for step in steps}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (fw.Adam, {1: 0.999000000010000, 2: 0.998000026223837, 5: 0.995000436077413, 10: 0.990003247397883,
                   50: 0.950305702181439, 100: 0.901743598573192}),
        (fw.GIAdam, {1: 0.999968377223408, 2: 0.999923667788339, 5: 0.999735097838413, 10: 0.999290554140984,
                     50: 0.992514944099324, 100: 0.979247652652918}),
        (lambda p, **k: fw.RAdam(p, rho_threshold=4.0, eps=0.0, **k),
         {1: 0.999, 4: 0.996003226918548, 5: 0.995985919032793, 6: 0.995960104588290, 10: 0.995795578213321,
          50: 0.991487305404419, 100: 0.982297382586837}),
        (fw.RAdam, {1: 0.999, 4: 0.996003226918548, 5: 0.995005435389686, 6: 0.994979622134540,
                    10: 0.994815113379234, 50: 0.990507375579191, 100: 0.981318077200114}),
        (lambda p, **k: fw.RAdam(p, unrectified="skip", **k),
         {1: 1.0, 5: 1.0, 6: 0.999974178890536, 7: 0.999941440120956, 10: 0.999809600100878,
          50: 0.995500184814835, 100: 0.986308910118222}),
    ],
    ids=["adam", "giadam", "radam-paper", "radam-torch", "radam-author"],
)  # fmt: skip
def test_unit_problem(make, expected, backend):
    """O-A1 and O-B3: the authors' own problem, printed to 15 digits."""
    path = _descend(lambda p: make(p, lr=1e-3, backend=backend), list(expected))
    assert path == pytest.approx(expected, rel=0, abs=1e-14)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_constant_gradient(backend):
    """O-A2: Adam's step is eta g/(|g|+eps); GI-Adam's is eta g/(|g|/sqrt(1-beta2^t)+eps)."""
    for cls, factor in ((fw.Adam, lambda t: 1.0), (fw.GIAdam, lambda t: math.sqrt(1 - 0.999**t))):
        x = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        opt = cls([x], lr=0.1, eps=1e-3, backend=backend)
        g = torch.tensor([0.5, -2.0, 1e-3], dtype=torch.float64)
        for t in range(1, 20):
            before = x.detach().clone()
            x.grad = g.clone()
            opt.step()
            assert_close(
                f"{cls.__name__} {t}", before - x, 0.1 * g / (g.abs() / factor(t) + 1e-3), 1e-14, 1e-10
            )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_giadam_is_adam_with_prepared_state(backend):
    """O-A4, bit for bit, and O-A3: with beta2 = 0 the start is forgotten."""
    a, b = make_params(torch.float32), make_params(torch.float32)
    gi, adam = fw.GIAdam(a, backend=backend), fw.Adam(b, backend=backend)
    set_grads(b, 0)
    adam.step()
    saved = adam.state_dict()
    for i, param in enumerate(make_params(torch.float32)):
        b[i].data.copy_(param)
        saved["state"][i] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": b[i].grad ** 2,
        }
    adam.load_state_dict(saved)
    forgetful = fw.GIAdam(c := make_params(torch.float32), betas=(0.9, 0.0), backend=backend)
    plain = fw.Adam(d := make_params(torch.float32), betas=(0.9, 0.0), backend=backend)
    for step in range(9):
        for params, opt in ((a, gi), (b, adam), (c, forgetful), (d, plain)):
            set_grads(params, step)
            opt.step()
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(c, d, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_init_from_gradients_is_a_separate_batch(backend):
    """v_0 = a g_0^2 from one batch, the first step from another: v_1 = beta2 v_0 + (1 - beta2) g_1^2."""
    x = torch.nn.Parameter(torch.full((2,), 3.0, dtype=torch.float64))
    opt = fw.GIAdam(
        [x], lr=0.1, exp_avg_sq_init_scale=2.0, weight_decay=0.5, max_grad_norm=10.0, backend=backend
    )
    x.grad = torch.tensor([30.0, 40.0], dtype=torch.float64)
    opt.init_from_gradients()
    clipped = x.grad * (10.0 / (50.0 + 1e-6)) + 0.5 * 3.0
    assert_close("v0", opt.state[x]["exp_avg_sq"], 2.0 * clipped**2, 1e-12, 1e-14)
    assert opt.state[x]["step"] == 0
    assert len(opt.telemetry) == 0
    x.grad = torch.tensor([1.0, 2.0], dtype=torch.float64)
    opt.step()
    seen = torch.tensor([1.0, 2.0], dtype=torch.float64) + 0.5 * 3.0
    assert_close("v1", opt.state[x]["exp_avg_sq"], 0.999 * 2.0 * clipped**2 + 0.001 * seen**2, 1e-12, 1e-13)
    with pytest.raises(RuntimeError, match="before the first step"):
        opt.init_from_gradients()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_random_init_has_the_norm_of_the_gradient(backend):
    """The paper's control: v_0 = a z^2 with the norm of z over all parameters that of the clipped gradient."""
    params = make_params(torch.float64, [(50,), (7, 3), ()])
    opt = fw.Adam(params, exp_avg_sq_init="random", exp_avg_sq_init_scale=3.0, betas=(0.9, 0.5),
                  max_grad_norm=2.0, backend=backend)  # fmt: skip
    set_grads(params, 0)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in params))
    assert norm > 2.0
    grads = [p.grad * (2.0 / (norm + 1e-6)) for p in params]
    opt.step()
    start = [opt.state[p]["exp_avg_sq"] / 0.5 - g**2 for p, g in zip(params, grads, strict=True)]
    assert sum(float(v.sum()) for v in start) == pytest.approx(
        3.0 * (norm * 2.0 / (norm + 1e-6)) ** 2, rel=1e-12
    )
    assert all((v > -1e-12).all() for v in start)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_radam_properties(backend):
    """O-B5, O-B6, O-B7, O-B8, O-B11."""

    def run(scale=1.0, steps=5, **options):
        x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        opt = fw.RAdam([x], lr=0.1, eps=0.0, backend=backend, **options)
        path = [x.detach().clone()]
        for t in range(steps):
            x.grad = torch.tensor([1.0, 0.3], dtype=torch.float64) * math.cos(t) * scale
            opt.step()
            path.append(x.detach().clone())
        return torch.stack(path).diff(dim=0), opt, x

    # beta2 <= 0.6 never rectifies: a bias-corrected moving average of the gradient
    steps, opt, _ = run(betas=(0.9, 0.6), steps=40)
    m = torch.zeros(2, dtype=torch.float64)
    for t in range(40):
        m = 0.9 * m + 0.1 * torch.tensor([1.0, 0.3], dtype=torch.float64) * math.cos(t)
        assert_close(f"step {t}", steps[t], -0.1 * m / (1 - 0.9 ** (t + 1)), 1e-14, 1e-12)
    assert set(opt.telemetry.history()["rect"].tolist()) == {0.0}
    # the author's package: nothing moves for five steps, decay included, while the moments do
    steps, opt, x = run(unrectified="skip", weight_decay=0.5, decoupled_weight_decay=True)
    assert not steps.any()
    assert opt.state[x]["exp_avg"].all()
    assert opt.state[x]["step"] == 5
    # the momentum phase scales with the gradient, the adaptive phase does not
    small, large = run(1.0, 8)[0], run(10.0, 8)[0]
    assert_close("momentum", large[:5], 10 * small[:5], 0, 1e-12)
    assert_close("adaptive", large[5:], small[5:], 0, 1e-12)
    # zero gradients with eps = 0 do not move anything while unrectified
    assert not run(0.0)[0].any()
    # groups switch at their own step
    a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    opt = fw.RAdam(
        [{"params": [a], "betas": (0.9, 0.7)}, {"params": [b]}], unrectified="skip", backend=backend
    )
    moved = []
    for _ in range(10):
        a.grad, b.grad = torch.ones(1), torch.ones(1)
        opt.step()
        moved.append((a.item() != 1.0, b.item() != 1.0))
    assert [pair[0] for pair in moved].index(True) == 9
    assert [pair[1] for pair in moved].index(True) == 5
