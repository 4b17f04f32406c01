"""Sharpness against known Hessians: prescribed spectra, closed forms, dense matrices."""

import math

import pytest
import torch
from cases import make_params
from dense import DenseOperator, dense_hessian, symmetric, tanh_model
from torch.nn import functional as F
from vector_cases import PRECONDITIONED

import fused_warmup as fw
from fused_warmup import schedules
from fused_warmup.sharpness import preconditioned, threshold, top_eigenvalue
from fused_warmup.sharpness.hvp import Hessian
from fused_warmup.sharpness.lanczos import eigh, jacobi, lanczos
from fused_warmup.sharpness.loss_evaluator import LossEvaluator
from fused_warmup.sharpness.measure import make_reading
from fused_warmup.sharpness.operators import Operator, random_vector
from fused_warmup.sharpness.pending_step import PendingStep

BULK = [i / 100 for i in range(100)]
SPECTRA = {
    "gap": [10.0, 5.0, *BULK],
    "near": [10.0, 9.9, *BULK],
    "negative": [-12.0, 10.0, *BULK],
    "all-negative": [-5.0, -3.0, -1.0],
    "double": [10.0, 10.0, *BULK],
    "zero": [0.0] * 10,
    "one": [3.0],
    "minus-one": [-3.0],
    "fewer-than-steps": [2.0, 1.0, -1.0],
}


pytestmark = pytest.mark.usefixtures("one_thread")


methods = pytest.mark.parametrize("method", ["difference", "autograd"])


def quadratic(values, dtype=torch.float64):
    h = symmetric(values).to(dtype)
    p = torch.randn(len(values), dtype=dtype, requires_grad=True)
    return p, lambda: 0.5 * p @ h @ p


@methods
@pytest.mark.parametrize("name", SPECTRA)
def test_prescribed_spectrum(name, method):
    """Lanczos-10 in float64 is exact to 1e-6 at the top, whatever is below it."""
    values = SPECTRA[name]
    p, loss = quadratic(values)
    reading = top_eigenvalue(loss, [p], method=method).asdict()
    assert reading["value"] == pytest.approx(max(values), abs=1e-6)
    assert reading["lo"] - 1e-9 <= max(values) <= reading["hi"] + 1e-9
    assert reading["lambda_min"] >= min(values) - 1e-6
    if name in ("negative", "all-negative", "zero", "one", "minus-one", "fewer-than-steps"):
        assert reading["lambda_min"] == pytest.approx(min(values), abs=1e-6)
    assert reading["flags"] == []
    assert math.isnan(reading["edge_ratio"])
    assert math.isnan(reading["err_batch"])


@pytest.mark.parametrize(("method", "rtol"), [("autograd", 1e-5), ("difference", 1e-4)])
@pytest.mark.parametrize("name", ["gap", "near", "negative", "double"])
def test_float32(name, method, rtol):
    p, loss = quadratic(SPECTRA[name], torch.float32)
    reading = top_eigenvalue(loss, [p], method=method)
    assert reading.value.item() == pytest.approx(10.0, rel=rtol)
    assert abs(reading.value.item() - 10.0) <= 3 * (reading.err_fd + reading.err_krylov).item()


def test_many_shapes_and_an_unused_parameter():
    """Empty, 0-dim, odd and strided tensors, and one without influence on the loss: offsets and zero rows."""
    params = make_params(torch.float32, [(0,), (), (1,), (3,), (1023,), (33, 31), (4097,)])
    params.append(torch.nn.Parameter(torch.randn(6, 5).T))
    params.append(torch.nn.Parameter(torch.randn(7)))
    weights = [torch.rand(p.shape) for p in params]
    weights[4][-1], weights[7][4, 5], weights[5][0, 0] = 11.0, 9.0, -2.0

    def loss():
        return 0.5 * sum((w * p * p).sum() for w, p in zip(weights[:-1], params[:-1], strict=True))

    for method in ("difference", "autograd"):
        reading = top_eigenvalue(loss, params, method=method, iterations=15)
        assert reading.value.item() == pytest.approx(11.0, rel=1e-4), method
        assert reading.lambda_min.item() == pytest.approx(-2.0, rel=1e-3), method
    last = top_eigenvalue(lambda: params[1] ** 2, params[-1:])
    assert last.value.item() == 0.0


def test_dots_in_double_precision():
    """A product along a float32 vector of 100,000 elements against the same in float64."""
    p = torch.nn.Parameter(torch.randn(100_000))
    weights = torch.rand(100_000)
    with LossEvaluator("test", lambda: 0.5 * (weights * p * p).sum(), [p]) as evaluator:
        v = torch.randn(100_000)
        v = v / v.norm()
        quotient = Operator(Hessian(evaluator, "autograd"), None, None).quotient(v)
    exact = float((weights.double() * v.double() ** 2).sum())
    assert quotient.item() == pytest.approx(exact, rel=1e-6)


def test_linear_regression():
    torch.manual_seed(1)
    model = torch.nn.Linear(7, 3, bias=False).double()
    x, y = torch.randn(50, 7).double(), torch.randn(50, 3).double()
    found = top_eigenvalue(lambda: F.mse_loss(model(x), y), model.parameters()).value
    exact = torch.linalg.eigvalsh(2.0 * x.T @ x / (50 * 3))[-1]
    assert found.item() == pytest.approx(exact.item(), rel=1e-7)


@pytest.mark.parametrize(("dtype", "method", "rtol"), [
    (torch.float64, "difference", 1e-4), (torch.float32, "difference", 1e-4), (torch.float32, "autograd", 1e-5)
])  # fmt: skip
def test_logistic_regression(dtype, method, rtol):
    torch.manual_seed(2)
    w = torch.randn(12, dtype=torch.float64).to(dtype).requires_grad_()
    x, y = torch.randn(200, 12, dtype=torch.float64), torch.rand(200, dtype=torch.float64).round()
    s = torch.sigmoid(x @ w.detach().double())
    exact = torch.linalg.eigvalsh(x.T @ ((s * (1 - s))[:, None] * x) / 200)
    loss = lambda: F.binary_cross_entropy_with_logits(x.to(dtype) @ w, y.to(dtype))  # noqa: E731
    found = top_eigenvalue(loss, [w], method=method, iterations=12)
    assert found.value.item() == pytest.approx(exact[-1].item(), rel=rtol)
    assert abs(found.lambda_min.item() - exact[0].item()) < 10 * rtol * exact[-1].item()


def trained_model():
    model, loss = tanh_model()
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        opt.zero_grad()
        loss().backward()
        opt.step()
    return model, loss


@pytest.mark.parametrize(("dtype", "method", "iterations", "rtol"), [
    (torch.float64, "autograd", 20, 1e-6),
    (torch.float64, "difference", 20, 5e-4),
    (torch.float64, "autograd", 10, 1e-2),
    (torch.float32, "difference", 20, 5e-4),
    (torch.bfloat16, "difference", 20, 8e-2),
])  # fmt: skip
def test_mlp_against_the_dense_hessian(dtype, method, iterations, rtol):
    """A tanh MLP of 400 parameters after some training; bfloat16 parameters too."""
    model, loss = trained_model()
    assert sum(p.numel() for p in model.parameters()) < 500
    rounded = {k: v.to(dtype).double() for k, v in model.state_dict().items()}
    model.load_state_dict(rounded)
    exact = torch.linalg.eigvalsh(dense_hessian(loss, model.parameters()))
    twin, data = tanh_model(dtype)
    twin.load_state_dict({k: v.to(dtype) for k, v in rounded.items()})
    found = top_eigenvalue(data, twin.parameters(), method=method, iterations=iterations)
    error = abs(found.value.item() - exact[-1].item()) / exact[-1].item()
    print(f"{dtype} {method} {iterations}: relative error {error:.1e}, err_fd {found.err_fd.item():.1e}")
    assert error < rtol
    if dtype == torch.float64 and iterations == 20:
        assert abs(found.lambda_min.item() - exact[0].item()) < 1e-3 * exact[-1].item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mlp_under_autocast(seed):
    """Float32 parameters, a forward pass in bfloat16: within 5 % (0.5 % with these seeds), and within err_fd."""
    model, loss = trained_model()
    exact = torch.linalg.eigvalsh(dense_hessian(loss, model.parameters()))[-1].item()
    twin, data = tanh_model(torch.float32)
    twin.load_state_dict({k: v.float() for k, v in model.state_dict().items()})

    def rounded():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return data()

    found = top_eigenvalue(rounded, twin.parameters(), iterations=20, seed=seed)
    error = abs(found.value.item() / exact - 1.0)
    print(f"seed {seed}: relative error {error:.1e}, err_fd {found.err_fd.item() / exact:.1e}")
    assert error < 5e-2
    assert found.err_fd.item() > error * exact


def test_difference_error_covers_long_steps():
    """err_fd of a step that is far too long is at least 0.3 of the error of the value."""
    model, loss = tanh_model()
    exact = top_eigenvalue(loss, model.parameters(), method="autograd", iterations=20).value
    with LossEvaluator("test", loss, list(model.parameters())) as evaluator:
        for stretch in (2.0**2, 2.0**4, 2.0**6, 2.0**8, 2.0**12, 2.0**14):
            operator = Operator(Hessian(evaluator, stretch=stretch), None, None)
            spectrum = lanczos(operator, random_vector(evaluator, 0), 20)
            for found, error in ((spectrum, operator.difference_error(spectrum)), operator.refine(spectrum)):
                missed = (found.largest - exact).abs()
                print(f"stretch {stretch}: missed {missed.item():.2e}, err_fd {error.item():.2e}")
                assert error > 0.3 * missed


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 10])
def test_jacobi_is_eigh(m):
    for seed in range(20):
        torch.manual_seed(seed)
        a = torch.randn(m, m, dtype=torch.float64)
        a = a + a.T
        if seed % 3 == 0:
            a = torch.diag(a.diagonal()) + torch.diag(a.diagonal(1), 1) + torch.diag(a.diagonal(1), -1)
        if seed % 5 == 0:
            a = torch.zeros_like(a) + (torch.eye(m) if seed else 0.0)
        values, vectors = jacobi(a)
        assert torch.allclose(values, eigh(a)[0], rtol=0, atol=1e-13 * max(1.0, a.norm().item()))
        assert torch.allclose(vectors.T @ vectors, torch.eye(m, dtype=torch.float64), rtol=0, atol=1e-13)
        assert torch.allclose(a @ vectors, vectors * values, rtol=0, atol=1e-12 * max(1.0, a.norm().item()))


@pytest.mark.parametrize("solver", [eigh, jacobi])
def test_breakdown(solver, monkeypatch):
    """A start that spans one, two or three dimensions: later iterations add no eigenvalue and no vector."""
    monkeypatch.setattr("fused_warmup.sharpness.lanczos.eigh", solver)
    h = torch.diag(torch.tensor([-1.0, -2.0, -4.0, -8.0], dtype=torch.float64))
    for k, smallest in ((1, -1.0), (2, -2.0), (3, -4.0)):
        start = torch.zeros(4, dtype=torch.float64)
        start[:k] = 1.0
        found = lanczos(DenseOperator(h), start, 4)
        assert found.largest.item() == pytest.approx(-1.0, abs=1e-12)
        assert found.smallest.item() == pytest.approx(smallest, abs=1e-12)
        assert found.residual.item() < 1e-12
        assert found.vector.abs().tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-12)


def test_not_finite():
    """NaN rather than a number, and a flag."""
    p, _ = quadratic([1.0, 2.0])
    for loss in (lambda: p.sum() * math.nan, lambda: (p * p).sum() * math.inf):
        reading = top_eigenvalue(loss, [p]).asdict()
        assert all(math.isnan(reading[k]) for k in ("value", "lo", "hi", "lambda_min"))
        assert reading["flags"] == ["nonfinite"]


def state_of_adam(model, loss, opt, steps):
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        opt.step()
    opt.zero_grad()
    loss().backward()


def groups_of(model):
    params = list(model.parameters())
    return [
        {"params": params[:2], "lr": 1e-3, "eps": 1e-8},
        {"params": params[2:4], "lr": 4e-3, "eps": 1e-4, "weight_decay": 0.3},
        {"params": params[4:], "lr": 2e-3, "betas": (0.8, 0.95)},
    ]


@pytest.mark.parametrize("steps", [0, 1, 49])
@pytest.mark.parametrize("kind", ["fw.Adam", "torch.Adam", "fw.GIAdam", "fw.RAdam", "torch.RAdam", "fw.clip"])
def test_preconditioner_against_dense(kind, steps):
    """P of the step about to be made, written out by hand; groups with other lr, eps, betas and L2."""
    model, loss = tanh_model(sizes=(5, 8, 6, 3))
    make = {
        "fw.Adam": fw.Adam, "torch.Adam": torch.optim.Adam, "fw.GIAdam": fw.GIAdam, "fw.RAdam": fw.RAdam,
        "torch.RAdam": torch.optim.RAdam, "fw.clip": lambda g: fw.Adam(g, max_grad_norm=0.05),
    }[kind]  # fmt: skip
    opt = make(groups_of(model))
    state_of_adam(model, loss, opt, steps)
    t = steps + 1
    grads = [p.grad.double() for g in opt.param_groups for p in g["params"]]
    clip = (
        min(1.0, 0.05 / (torch.cat([g.flatten() for g in grads]).norm().item() + 1e-6))
        if kind == "fw.clip"
        else 1.0
    )
    weights, rates, decays = [], [], []
    for group in opt.param_groups:
        (b1, b2), eps, wd = group["betas"], group["eps"], group["weight_decay"]
        for p in group["params"]:
            g = p.grad * clip + wd * p.detach()
            state = opt.state.get(p, {})
            old = state.get("exp_avg_sq", g * g if kind == "fw.GIAdam" else torch.zeros_like(g))
            v = b2 * old + (1 - b2) * g * g
            if "RAdam" in kind:
                rho_inf = 2 / (1 - b2) - 1
                rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
                if rho > 5:
                    r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
                    inverse = r * math.sqrt(1 - b2**t) / (v.sqrt() + eps) / (1 - b1**t)
                else:
                    inverse = torch.ones_like(v) / (1 - b1**t)
            else:
                inverse = 1 / ((1 - b1**t) * ((v / (1 - b2**t)).sqrt() + eps))
            weights.append(inverse.flatten())
            rates.append(
                torch.full((p.numel(),), group["lr"] / (2 * (1 + b1) / (1 - b1)), dtype=torch.float64)
            )
            decays.append(torch.full((p.numel(),), float(wd), dtype=torch.float64))
    h = dense_hessian(loss, model.parameters()) + torch.diag(torch.cat(decays))
    c = torch.cat(weights).sqrt()
    d = (torch.cat(weights) * torch.cat(rates)).sqrt()
    exact = torch.linalg.eigvalsh(c[:, None] * h * c)
    unsymmetric = torch.linalg.eigvals(torch.cat(weights)[:, None] * h).real.max()
    reading = preconditioned(loss, opt, iterations=40, method="autograd")
    assert unsymmetric.item() == pytest.approx(exact[-1].item(), rel=1e-6)
    assert reading.value.item() == pytest.approx(exact[-1].item(), rel=1e-5)
    assert reading.edge_ratio.item() == pytest.approx(
        torch.linalg.eigvalsh(d[:, None] * h * d)[-1].item(), rel=1e-5
    )
    assert int(reading.step) == steps
    model.zero_grad()
    again = preconditioned(loss, opt, iterations=40, method="autograd")
    assert again.value.item() == pytest.approx(reading.value.item(), rel=1e-9)


def test_diagonal_quadratic_is_exact():
    """The largest ``h / P``, with the current gradient in P."""
    h = torch.tensor([5.0, 1.0, 0.3, 40.0], dtype=torch.float64)
    p = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    opt = fw.Adam([p], lr=1e-3, eps=1e-8)
    loss = lambda: 0.5 * (h * p * p).sum()  # noqa: E731
    for expected in (h / (0.1 * ((h * p.detach()).abs() + 1e-8)), None):
        opt.zero_grad()
        loss().backward()
        found = preconditioned(loss, opt, method="autograd", iterations=4).value.item()
        if expected is None:
            v = 0.999 * opt.state[p]["exp_avg_sq"] + 0.001 * p.grad**2
            expected = h / ((1 - 0.9**2) * ((v / (1 - 0.999**2)).sqrt() + 1e-8))
        assert found == pytest.approx(expected.max().item(), rel=1e-9)
        opt.step()


def test_sgd_schedule_and_maximize():
    """No P, the threshold of momentum, the schedule in the rate, the sign of ascent."""
    p, loss = quadratic([-7.0, 3.0, 1.0])
    schedule = schedules.table([0.25, 0.5])
    up = fw.SGD([p], lr=0.4, momentum=0.9, schedule=schedule, maximize=True)
    down = fw.SGD([p], lr=0.4, momentum=0.5, nesterov=True, weight_decay=2.0, schedule=schedule)
    assert preconditioned(loss, up).value.item() == pytest.approx(7.0, rel=1e-6)
    assert preconditioned(loss, up).edge_ratio.item() == pytest.approx(7.0 * 0.1 / 3.8, rel=1e-6)
    assert preconditioned(loss, down).edge_ratio.item() == pytest.approx(5.0 * 0.1 / 1.5, rel=1e-6)
    loss().backward()
    down.step()
    assert threshold(down) == pytest.approx(1.5 / 0.2)


def test_update_is_what_the_optimizer_does():
    """The pending step of every rule equals the step that follows, and 1 / P times the momentum."""
    for case in PRECONDITIONED:
        params = make_params(torch.float64, [(5,), (3, 4)])
        opt = case.make(params, backend="reference")
        for step in range(3 if case.name != "radam-skip" else 8):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i)).double()
            pending = PendingStep("test", opt)
            before = [p.detach().clone() for p in params]
            moves = pending.directions(pending.grads)
            inverse = pending.inverse_preconditioners(pending.grads)
            opt.step()
            for p, old, u, c in zip(params, before, moves, inverse, strict=True):
                assert torch.allclose(p, old - pending.lr * u, rtol=1e-12, atol=1e-14), case.name
                if "exp_avg" in opt.state[p] and not opt.param_groups[0]["weight_decay"]:
                    assert torch.allclose(u, c * opt.state[p]["exp_avg"], rtol=1e-10, atol=1e-13), case.name


@pytest.mark.parametrize(("make", "low", "high"), [
    (lambda p, lr: fw.SGD(p, lr=lr), 1.99, 2.01),
    (lambda p, lr: fw.SGD(p, lr=lr, momentum=0.9), 3.79, 3.81),
    (lambda p, lr: fw.SGD(p, lr=lr, momentum=0.9, nesterov=True), 1.35, 1.364),
    (lambda p, lr: fw.SGD(p, lr=lr, momentum=0.9, dampening=0.5), 7.58, 7.62),
])  # fmt: skip
@pytest.mark.parametrize("curvature", [1.0, 7.0])
def test_threshold_of_gradient_descent(make, low, high, curvature):
    """A quadratic converges just below the threshold and diverges just above it, as the edge ratio predicts."""
    for product, stable in ((low, True), (high, False)):
        x = torch.ones((), dtype=torch.float64, requires_grad=True)
        opt = make([x], product / curvature)
        loss = lambda: 0.5 * curvature * x * x  # noqa: B023, E731
        assert (threshold(opt) > curvature) == stable
        assert (preconditioned(loss, opt).edge_ratio.item() < 1.0) == stable
        for _ in range(1500):
            opt.zero_grad()
            loss().backward()
            opt.step()
        assert (abs(x.item()) < 1e-3) == stable
        assert (abs(x.item()) > 1e3) == (not stable)


@pytest.mark.parametrize(("product", "stable"), [(37.9, True), (38.1, False)])
def test_threshold_of_adam(product, stable):
    """Adam with a frozen second moment: 38 / lr late in training."""
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    start = 1e-6
    opt = fw.Adam([x], lr=1.0, betas=(0.9, 1 - 1e-6), eps=0.0)
    x.grad = torch.zeros_like(x)
    opt.step()
    # late, with a second moment that a hundred steps do not change
    opt.state[x]["step"].fill_(10**8)
    opt.state[x]["exp_avg_sq"].fill_(1.0)
    x.data.fill_(start)
    loss = lambda: 0.5 * product * x * x  # noqa: E731
    opt.zero_grad()
    loss().backward()
    assert threshold(opt) == pytest.approx(38.0)
    assert preconditioned(loss, opt).value.item() == pytest.approx(product, rel=1e-5)
    assert (preconditioned(loss, opt).edge_ratio.item() < 1.0) == stable
    for _ in range(100):
        opt.zero_grad()
        loss().backward()
        opt.step()
    assert (abs(x.item()) < start) == stable
    assert (abs(x.item()) > 1e3 * start) == (not stable)


def test_early_thresholds():
    """The first step from zero momentum overshoots from here on: the loss rises."""
    for make, expected in (
        (lambda p, lr: fw.SGD(p, lr=lr, momentum=0.9), 2.0),
        (lambda p, lr: fw.SGD(p, lr=lr, momentum=0.9, nesterov=True), 2.0 / 1.9),
        (lambda p, lr: fw.Adam(p, lr=lr, betas=(0.8, 0.999), eps=0.0), 2.0 / 0.2),
    ):
        x = torch.full((), 3.0, dtype=torch.float64, requires_grad=True)
        loss = lambda: 0.5 * 4.0 * x * x  # noqa: B023, E731
        loss().backward()
        opt = make([x], 1.0)
        edge = threshold(opt, phase="early")
        assert edge == pytest.approx(expected)
        sharpness = preconditioned(loss, opt, method="autograd").value.item()
        for factor, rises in ((0.999, False), (1.001, True)):
            x.data.fill_(3.0)
            opt = make([x], factor * edge / sharpness)
            before = loss().item()
            opt.step()
            assert (loss().item() > before) == rises


def test_errors():
    p, loss = quadratic([1.0, 2.0])
    with pytest.raises(
        TypeError, match=r"top_eigenvalue: loss_fn must be a function that returns the loss, got 3\."
    ):
        top_eigenvalue(3, [p])
    with pytest.raises(ValueError, match=r"top_eigenvalue: params must hold at least one element"):
        top_eigenvalue(loss, [])
    with pytest.raises(
        ValueError, match=r"method must be one of 'difference', 'autograd', 'auto', got 'exact'"
    ):
        top_eigenvalue(loss, [p], method="exact")
    with pytest.raises(ValueError, match=r"iterations must be >= 1, got 0"):
        top_eigenvalue(loss, [p], iterations=0)
    with pytest.raises(ValueError, match=r"loss_fn must return a loss with one element, got \(2,\)"):
        top_eigenvalue(lambda: p * p, [p])
    with pytest.raises(TypeError, match="loss_fn must return a tensor"):
        top_eigenvalue(lambda: loss().item(), [p])
    with pytest.raises(ValueError, match="return the loss without calling backward"):
        top_eigenvalue(lambda: (loss().backward(), loss())[1], [p])
    with pytest.raises(ValueError, match="be a leaf that requires a gradient"):
        top_eigenvalue(loss, [p * 2])
    with pytest.raises(TypeError, match=r"params\[0\] must be a dense tensor"):
        top_eigenvalue(loss, [torch.zeros(3, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(ValueError, match="return a loss with a gradient"):
        top_eigenvalue(lambda: torch.ones(()), [p])
    with pytest.raises(
        TypeError, match=r"preconditioned: optimizer must be one whose rule is known, got 'Rprop'"
    ):
        preconditioned(loss, torch.optim.Rprop([p]))
    with pytest.raises(ValueError, match=r"threshold: phase must be one of 'late', 'early', got 'middle'"):
        threshold(fw.SGD([p]), phase="middle")
    q = torch.zeros(2, requires_grad=True)
    groups = [{"params": [p]}, {"params": [q], "maximize": True}]
    with pytest.raises(ValueError, match="maximize must be the same for all groups"):
        preconditioned(loss, torch.optim.SGD(groups, lr=0.1))
    assert p.grad is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_against_curvlinops():
    """The same batch and model through another library and another eigenvalue solver, to 1e-4."""
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
    from scipy.sparse.linalg import eigsh

    model, loss = tanh_model(torch.float64)
    x, y = (
        cell.cell_contents
        for name, cell in zip(loss.__code__.co_freevars, loss.__closure__, strict=True)
        if name in "xy"
    )
    params = dict(model.named_parameters())
    operator = curvlinops.HessianLinearOperator(
        model, torch.nn.CrossEntropyLoss(), list(params.values()), [(x, y)], check_deterministic=False
    )
    top = eigsh(operator.to_scipy(dtype="float64"), k=1, which="LA", return_eigenvectors=False)[0]
    for method in ("difference", "autograd"):
        assert top_eigenvalue(
            loss, params.values(), method=method, iterations=20
        ).value.item() == pytest.approx(top, rel=1e-4)


def kinked_loss(dtype, seed):
    torch.manual_seed(seed)
    layers = [
        torch.nn.Linear(10, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 3),
    ]
    model = torch.nn.Sequential(*layers).to(dtype)
    x, y = torch.randn(500, 10).to(dtype), torch.randn(500, 3).to(dtype)
    return model, lambda: F.mse_loss(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinks_are_flagged(dtype):
    """ReLU with too few kinks to average: err_fd covers the error of the value, and ``rough`` is set."""
    model, loss = kinked_loss(dtype, 0)
    exact = top_eigenvalue(loss, model.parameters(), method="autograd").value.item()
    found = top_eigenvalue(loss, model.parameters())
    print(f"{dtype}: off by {found.value.item() / exact - 1:.1e}, err_fd {found.err_fd.item() / exact:.1e}")
    assert abs(found.value.item() - exact) <= found.err_fd.item()
    assert found.asdict()["flags"] == ["rough"]
    with LossEvaluator("test", loss, list(model.parameters())) as evaluator:
        hessian = Hessian(evaluator, stretch=2.0**-9 if dtype == torch.float64 else 2.0**-7)
        spectrum = lanczos(Operator(hessian, None, None), random_vector(evaluator, 0), 10)
        zero = torch.zeros_like(spectrum.largest)
        small = make_reading(spectrum, zero, zero, zero, hessian, 0)
    print(
        f"{dtype}, small step: off by {small.value.item() / exact - 1:.1e}, err_fd {small.err_fd.item() / exact:.1e}"
    )
    # half of it would not do
    assert 0.5 * small.err_fd.item() < abs(small.value.item() - exact) <= small.err_fd.item()
    assert small.err_fd.item() > found.err_fd.item()
    assert small.asdict()["flags"] == ["rough"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinks_are_not_extrapolated(dtype):
    """Steps of four and eight times the length agree by chance, with errors of a twelfth and a quarter."""
    model, loss = kinked_loss(dtype, 11)
    found = top_eigenvalue(loss, model.parameters())
    with LossEvaluator("test", loss, list(model.parameters())) as evaluator:
        operator = Operator(Hessian(evaluator), None, None)
        search = lanczos(operator, random_vector(evaluator, 0), 10)
        near, far = (operator.quotient(search.vector, times).item() for times in (4.0, 8.0))
    assert abs(far - near) < 0.05 * near
    assert found.value == search.largest
