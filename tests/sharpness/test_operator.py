"""The Hessian as a matrix, its trace and its spectral density: against dense matrices, SciPy and curvlinops."""

import copy
import gc
import math
import sys

import numpy as np
import pytest
import torch
from cases import assert_same_bits, make_params
from dense import dense_hessian, symmetric, tanh_model
from torch import nn
from torch.nn import functional as F

import fused_warmup as fw
from fused_warmup.sharpness import HessianOperator, PreconditionedOperator, spectral_density, trace

pytestmark = pytest.mark.usefixtures("one_thread")


methods = pytest.mark.parametrize("method", ["difference", "autograd"])
# of the norm of a product with the identity
RTOL = {
    ("difference", torch.float64): 1e-5,
    ("autograd", torch.float64): 1e-13,
    ("difference", torch.float32): 1e-3,
    ("autograd", torch.float32): 1e-6,
}


def close(a, b, rtol):
    """The distance of two tensors, relative to the second one."""
    distance = ((a.double() - b.double()).norm() / b.double().norm()).item()
    assert distance <= rtol, distance


def quadratic(values=None, seed=0):
    """A parameter and a loss with a given Hessian, by default one of 60 rows."""
    matrix = symmetric([i**2 / 900.0 - 1.0 for i in range(60)] if values is None else values, seed)
    p = nn.Parameter(torch.randn(len(matrix), dtype=torch.float64))
    return p, lambda: 0.5 * p @ matrix @ p, matrix


def mixed(dtype):
    """Empty, 0-dim, odd and strided parameters, one of them not dense, one unused; every pair interacts."""
    params = make_params(dtype, [(0,), (), (3,), (5, 7)])
    params += [nn.Parameter(torch.randn(6, 5, dtype=dtype).T)]
    params += [
        nn.Parameter(torch.randn(4, 6, dtype=dtype)[:, ::2]),
        nn.Parameter(torch.randn(2, dtype=dtype)),
    ]
    weights = [torch.randn(p.shape, dtype=dtype) for p in params]

    def loss():
        mixture = sum((w * p).sum() for w, p in zip(weights[:-1], params[:-1], strict=True))
        return torch.tanh(0.1 * mixture) + 0.3 * sum(
            (w * torch.cos(p)).sum() for w, p in zip(weights[:-1], params[:-1], strict=True)
        )

    return params, loss


@methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dense", [True, False], ids=["network", "shapes"])
def test_products(dense, dtype, method):
    """Vectors, matrices and lists, against the dense Hessian."""
    if dense:
        model, loss = tanh_model(dtype, sizes=(6, 8, 4))
        params = list(model.parameters())
    else:
        params, loss = mixed(dtype)
    exact = dense_hessian(loss, params)
    n, rtol = len(exact), RTOL[method, dtype]
    operator = HessianOperator(loss, iter(params), method=method)
    assert (operator.shape, operator.dtype, operator.device) == ((n, n), dtype, torch.device("cpu"))
    found = operator @ torch.eye(n)
    assert (found.shape, found.dtype) == ((n, n), dtype)
    close(found, exact, rtol)
    matrix = torch.randn(n, 3, dtype=torch.float64)
    products = operator @ matrix
    close(products, exact @ matrix, 10 * rtol)
    for column, product in zip(matrix.T, products.T, strict=True):
        assert_same_bits("vector", operator @ column, product.contiguous())
        parts = [
            v.view(p.shape) for v, p in zip(column.split([p.numel() for p in params]), params, strict=True)
        ]
        listed = operator @ parts
        assert [t.shape for t in listed] == [p.shape for p in params]
        assert_same_bits("list", torch.cat([t.reshape(-1) for t in listed]), product.contiguous())
    assert (operator @ matrix[:, :0]).shape == (n, 0)
    assert not products.requires_grad


@methods
def test_length_of_the_vector(method):
    """A product is linear in the length of its vector, 0 and the ends of float32 included."""
    model, loss = tanh_model(torch.float32)
    operator = HessianOperator(loss, model.parameters(), method=method)
    v = torch.randn(operator.shape[0])
    unit = operator @ v
    for size in (1e-30, 1e30):
        close((operator @ (size * v)).double() / size, unit, 1e-5 if method == "autograd" else 1e-3)
    assert not (operator @ torch.zeros_like(v)).any()
    assert (operator @ torch.full_like(v, math.nan)).isnan().all()
    opt = fw.Adam(model.parameters(), lr=1e-2)
    assert not (PreconditionedOperator(loss, opt, method=method) @ torch.zeros_like(v)).any()


def by_hand(opt, params, exact, kind):
    """``P^-1/2 H P^-1/2`` of the next step, from the states and the definition."""
    group = opt.param_groups[0]
    decay = group["weight_decay"]
    hessian = (-exact if group.get("maximize") else exact) + decay * torch.eye(
        len(exact), dtype=torch.float64
    )
    if kind == "sgd":
        return hessian
    beta1, beta2 = group["betas"]
    inverse = []
    for p in params:
        state = opt.state[p]
        t = int(state["step"]) + 1
        grad = (-p.grad if group.get("maximize") else p.grad).double() + decay * p.detach().double()
        v = beta2 * state["exp_avg_sq"].double() + (1.0 - beta2) * grad.square()
        inverse.append(1.0 / ((1.0 - beta1**t) * ((v / (1.0 - beta2**t)).sqrt() + group["eps"])))
    scale = torch.cat([x.reshape(-1) for x in inverse]).sqrt()
    return scale[:, None] * hessian * scale


@methods
@pytest.mark.parametrize("kind", ["adam", "torch", "sgd", "maximize"])
def test_preconditioned(kind, method):
    """The matrix of the next step, which follows the parameters, states and gradients."""
    model, loss = tanh_model(torch.float64, sizes=(5, 6, 4))
    params = list(model.parameters())
    cls = {"adam": fw.Adam, "torch": torch.optim.Adam, "sgd": fw.SGD, "maximize": torch.optim.Adam}[kind]
    opt = cls(params, lr=1e-2, weight_decay=0.1, **({"maximize": True} if kind == "maximize" else {}))
    operator = None
    for _ in range(3):
        opt.zero_grad()
        loss().backward()
        if opt.state:
            operator = operator or PreconditionedOperator(loss, opt, method=method)
            grads = [p.grad.clone() for p in params]
            exact = by_hand(opt, params, dense_hessian(loss, params), kind)
            close(operator @ torch.eye(len(exact)), exact, 1e-5 if method == "difference" else 1e-12)
            for p, grad in zip(params, grads, strict=True):
                assert_same_bits("grad", p.grad, grad)
        opt.step()
    reading = fw.sharpness.preconditioned(loss, opt, method=method, iterations=25)
    density = spectral_density(operator, steps=25, vectors=1)
    assert density.largest == pytest.approx(reading.value.item(), rel=1e-4)
    # in .grad is what the closure gives
    opt.zero_grad()
    loss().backward()
    v = torch.randn(len(exact), dtype=torch.float64)
    close(PreconditionedOperator(loss, opt, method=method, use_grad=False) @ v, operator @ v, 1e-9)
    opt.zero_grad()
    close(PreconditionedOperator(loss, opt, method=method) @ v, operator @ v, 1e-9)


def test_follows_the_parameters():
    model, loss = tanh_model(torch.float64)
    params = list(model.parameters())
    operator = HessianOperator(loss, params, method="autograd")
    v = torch.randn(operator.shape[0], dtype=torch.float64)
    before = operator @ v
    with torch.no_grad():
        for p in params:
            p.mul_(1.5)
    after = operator @ v
    close(after, dense_hessian(loss, params) @ v, 1e-12)
    assert (after - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("how", ["parameters", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype, how):
    """The top of the spectrum to a tenth; the trace to 2 %, with longer steps than those of other products."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    narrow = copy.deepcopy(wide).to(dtype)
    wide.load_state_dict(narrow.state_dict())
    x, y = torch.randn(512, 8).to(dtype), torch.randint(4, (512,))

    def autocast():
        with torch.autocast("cpu", dtype=dtype):
            return F.cross_entropy(wide(x.float()).float(), y)

    if how == "parameters":
        operator = HessianOperator(lambda: F.cross_entropy(narrow(x).float(), y), narrow.parameters())
        parts = [p.detach().clone() for p in narrow.parameters()]
        assert {t.dtype for t in operator @ parts} == {torch.float32}
    else:
        operator = HessianOperator(autocast, wide.parameters())
    exact = HessianOperator(lambda: F.cross_entropy(wide(x.float()), y), wide.parameters(), method="autograd")
    values, vectors = torch.linalg.eigh((exact @ torch.eye(operator.shape[0])).double())
    top = operator @ vectors[:, -1]
    assert (top @ vectors[:, -1].float()).item() == pytest.approx(values[-1].item(), rel=0.1)
    assert spectral_density(operator, steps=8, vectors=1).largest == pytest.approx(values[-1].item(), rel=0.1)
    found, wanted = (trace(item, vectors=64) for item in (operator, exact))
    assert found.value == pytest.approx(wanted.value, rel=0.02)
    assert found.standard_error == pytest.approx(wanted.standard_error, rel=0.05)


def test_one_matrix_whatever_is_drawn_between_its_products():
    """Dropout masks are those of the operator's birth; the caller's random numbers go on as without it."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(50, dtype=torch.float64))
    operator = HessianOperator(lambda: 0.5 * (F.dropout(w, 0.5) ** 2).sum(), [w], method="autograd")
    other = HessianOperator(lambda: 0.5 * (F.dropout(w, 0.5) ** 2).sum(), [w], method="autograd")
    state = torch.get_rng_state()
    expected = [torch.randn(50, dtype=torch.float64) for _ in range(3)]
    torch.set_rng_state(state)
    ones = torch.ones(50, dtype=torch.float64)
    diagonal = operator @ ones
    assert sorted(set(diagonal.tolist())) == pytest.approx([0.0, 4.0], rel=1e-12)
    for wanted in expected:
        drawn = torch.randn(50, dtype=torch.float64)
        assert torch.equal(drawn, wanted)
        close(operator @ drawn, diagonal * drawn, 1e-12)
    assert torch.equal(other @ ones, diagonal)
    third = HessianOperator(lambda: 0.5 * (F.dropout(w, 0.5) ** 2).sum(), [w], method="autograd")
    assert not torch.equal(third @ ones, diagonal)


@pytest.mark.parametrize("on", ["product", "scipy", "trace", "density"])
def test_training_is_that_without(on):
    """Training beside an operator, with dropout and batch statistics, is bit for bit that without one."""

    def train(measured):
        torch.manual_seed(1)
        layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3)]
        model = nn.Sequential(*layers)
        x, y = torch.randn(32, 6), torch.randint(3, (32,))
        loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
        opt = fw.Adam(model.parameters(), lr=1e-2)
        operators = [HessianOperator(loss, model.parameters()), PreconditionedOperator(loss, opt)]
        for _ in range(4):
            opt.zero_grad()
            loss().backward()
            for operator in operators if measured else ():
                if on == "product":
                    assert (operator @ torch.ones(operator.shape[0])).any()
                elif on == "scipy":
                    operator.to_scipy() @ np.ones(operator.shape[0])
                elif on == "trace":
                    trace(operator, vectors=2)
                else:
                    spectral_density(operator, steps=2, vectors=2)
            opt.step()
        return {**model.state_dict(), "random": torch.get_rng_state()}

    for (name, a), b in zip(train(True).items(), train(False).values(), strict=True):
        assert_same_bits(name, a, b)


@methods
def test_nothing_is_held_between_products(method):
    model, loss = tanh_model(torch.float32)
    operator = HessianOperator(loss, model.parameters(), method=method)
    v = torch.randn(operator.shape[0])

    def tensors():
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    operator @ v
    before = tensors()
    for _ in range(20):
        operator @ v
        trace(operator, vectors=2)
    assert tensors() == before


@methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scipy(dtype, method):
    """Both ends by ARPACK, and products of vectors and matrices in NumPy."""
    sparse = pytest.importorskip("scipy.sparse.linalg", reason="SciPy is not installed")
    model, loss = tanh_model(dtype)
    params = list(model.parameters())
    exact = dense_hessian(loss, params)
    operator = HessianOperator(loss, params, method=method)
    linear = operator.to_scipy()
    n = len(exact)
    assert (linear.shape, linear.dtype) == ((n, n), np.dtype(str(dtype).removeprefix("torch.")))
    ends = sparse.eigsh(linear, k=2, which="BE", return_eigenvectors=False, tol=1e-4)
    values = torch.linalg.eigvalsh(exact)
    assert sorted(ends) == pytest.approx([values[0].item(), values[-1].item()], rel=1e-3)
    x = np.random.default_rng(0).standard_normal((n, 3))[::-1]
    x.flags.writeable = False
    products = operator @ torch.from_numpy(x.copy())
    for found in (linear @ x, linear.T @ x, linear.H @ x):
        np.testing.assert_array_equal(found, products.numpy())
    np.testing.assert_array_equal(linear @ x[:, 0], products[:, 0].numpy())
    np.testing.assert_array_equal(linear.matvec(x[:, :1]), products[:, :1].numpy())
    assert operator.to_scipy(dtype="float64").matvec(x[:, 0]).dtype == np.float64
    with pytest.raises(
        TypeError, match=r"v must be a dense tensor of a floating-point dtype, got torch\.complex128"
    ):
        linear @ (1j * x)


def test_scipy_is_optional(monkeypatch):
    p, loss, _ = quadratic()
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="HessianOperator: to_scipy needs SciPy; pip install scipy"):
        HessianOperator(loss, [p]).to_scipy()


@pytest.fixture
def pair():
    """The Hessian of one network and batch by curvlinops and by us."""
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    x, y = torch.randn(64, 8, dtype=torch.float64), torch.randint(4, (64,))
    theirs = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False
    )
    return theirs, HessianOperator(
        lambda: F.cross_entropy(model(x), y), model.parameters(), method="autograd"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_products_of_curvlinops(pair):
    """The same vectors, matrices and lists; and its estimators accept our operator in the place of its own."""
    import curvlinops

    theirs, ours = pair
    matrix = torch.randn(*ours.shape, dtype=torch.float64)
    close(ours @ matrix, theirs @ matrix, 1e-12)
    close(ours @ matrix[0], theirs @ matrix[0], 1e-12)
    parts = [torch.randn(p.shape, dtype=torch.float64) for p in ours.params]
    for a, b in zip(ours @ parts, theirs @ parts, strict=True):
        close(a, b, 1e-12)
    v = np.random.default_rng(0).standard_normal(ours.shape[0])
    np.testing.assert_allclose(ours.to_scipy() @ v, theirs.to_scipy() @ v, rtol=1e-10, atol=1e-14)
    estimates = {
        "trace": lambda operator: curvlinops.hutchinson_trace(operator, 20),
        "density": lambda operator: curvlinops.lanczos_approximate_spectrum(
            operator, 10, boundaries=(-1.0, 1.0)
        )[1],
    }
    for estimate in estimates.values():
        found = []
        for operator in (ours, theirs):
            torch.manual_seed(5)
            found.append(estimate(operator))
        close(*found, 1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_estimates_of_curvlinops(pair):
    """Traces of other random vectors within their errors, and a density as near the exact one as theirs."""
    import curvlinops

    theirs, ours = pair
    n = ours.shape[0]
    mine = trace(ours, vectors=100)
    torch.manual_seed(1)
    samples = torch.stack([curvlinops.hutchinson_trace(theirs, 1) for _ in range(100)])
    error = samples.std().item() / 10.0
    assert error == pytest.approx(mine.standard_error, rel=0.3)
    assert abs(mine.value - samples.mean().item()) <= 3.0 * math.hypot(mine.standard_error, error)
    values = torch.linalg.eigvalsh(theirs @ torch.eye(n, dtype=torch.float64))
    ends, steps = (values[0].item(), values[-1].item()), 16
    grid, density = curvlinops.lanczos_approximate_spectrum(
        theirs, steps, num_points=400, num_repeats=20, boundaries=ends
    )
    # the width of curvlinops, which widens the interval by a twentieth on both sides
    width = 1.1 * (ends[1] - ends[0]) / (steps - 1) / math.sqrt(8.0 * math.log(3.0))
    exact = torch.distributions.Normal(values, width).log_prob(grid[:, None]).exp().mean(1)
    found = spectral_density(ours, steps=steps, vectors=20)
    areas = [torch.trapezoid((d - exact).abs(), grid).item() for d in (found.evaluate(grid, width), density)]
    print(f"area to the exact density: {areas[0]:.3f}, that of curvlinops: {areas[1]:.3f}")
    assert areas[0] <= 1.25 * areas[1]
    assert ends[0] - 1e-12 <= found.smallest <= 0.99 * ends[0]
    assert 0.99 * ends[1] <= found.largest <= ends[1] + 1e-12


def test_trace_of_a_diagonal_matrix():
    """Random signs give the trace of a diagonal matrix exactly, with one vector."""
    p, loss, _ = quadratic()
    weights = torch.linspace(-1.0, 3.0, 60, dtype=torch.float64)
    found = trace(HessianOperator(lambda: 0.5 * (weights * p * p).sum(), [p], method="autograd"), vectors=1)
    assert found.value == pytest.approx(60.0, rel=1e-12)
    assert math.isnan(found.standard_error)
    assert found.asdict() == {
        "value": found.value,
        "standard_error": pytest.approx(math.nan, nan_ok=True),
        "hvps": 1,
        "cost": 1,
    }
    found = trace(HessianOperator(lambda: 0.5 * (weights * p * p).sum(), [p], method="autograd"), vectors=3)
    assert (found.value, found.standard_error) == (
        pytest.approx(60.0, rel=1e-12),
        pytest.approx(0.0, abs=1e-12),
    )
    assert loss().isfinite()


@pytest.mark.slow
def test_standard_error_of_the_trace_is_honest():
    """Over 200 seeds of 16 vectors: no bias, and errors distributed as the standard errors say."""
    p, loss, matrix = quadratic()
    operator = HessianOperator(loss, [p], method="autograd")
    exact = matrix.trace().item()
    found = [trace(operator, vectors=16, seed=seed) for seed in range(200)]
    errors = torch.tensor([f.value - exact for f in found], dtype=torch.float64)
    sizes = torch.tensor([f.standard_error for f in found], dtype=torch.float64)
    assert abs(errors.mean().item()) <= 3.0 * errors.std().item() / math.sqrt(200)
    inside = (errors.abs() <= 2.0 * sizes).double().mean().item()
    square = (errors / sizes).square().mean().item()
    print(f"{inside:.1%} within two standard errors, mean square {square:.2f}")
    # Student's t of 15 degrees of freedom: 93.6 % within 2, mean square 15 / 13; both within 3 standard deviations
    assert abs(inside - 0.936) <= 3.0 * math.sqrt(0.936 * 0.064 / 200)
    assert square == pytest.approx(15 / 13, abs=0.4)
    off = matrix - torch.diag(matrix.diagonal())
    assert sizes.square().mean().item() == pytest.approx(2.0 / 16.0 * off.square().sum().item(), rel=0.1)


@methods
def test_trace_of_a_network(method):
    model, loss = tanh_model(torch.float32)
    params = list(model.parameters())
    exact = dense_hessian(loss, params).trace().item()
    operator = HessianOperator(loss, params, method=method)
    found = trace(operator, vectors=64, seed=3)
    assert abs(found.value - exact) <= 3.0 * found.standard_error
    assert (found.hvps, found.cost) == (64, 128 if method == "difference" else 1)
    assert trace(operator, vectors=64, seed=3) == found
    assert trace(operator, vectors=64, seed=4).value != found.value


def signs(n, count, seed):
    """The random signs of a seed, ``[count, n]``."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, dtype=torch.float64, generator=generator) for _ in range(count)]
    return torch.stack([torch.where(row < 0.0, -1.0, 1.0).double() for row in rows])


def test_moments_of_the_density():
    """A rule of ``m`` nodes is exact up to the power ``2 m - 1``; the first moment is the trace of that seed."""
    p, loss, matrix = quadratic()
    operator = HessianOperator(loss, [p], method="autograd")
    found = spectral_density(operator, steps=3, vectors=4, seed=2)
    assert found.nodes.shape == found.weights.shape == (4, 3)
    assert (found.numel, found.hvps, found.cost) == (60, 12, 1)
    z = signs(60, 4, 2)
    for order in range(6):
        wanted = ((z @ torch.linalg.matrix_power(matrix, order)) * z).sum(1).mean().item() / 60
        assert found.moment(order) == pytest.approx(wanted, rel=1e-10)
    wanted = ((z @ torch.linalg.matrix_power(matrix, 6)) * z).sum(1).mean().item() / 60
    assert abs(found.moment(6) / wanted - 1.0) > 1e-6
    assert 60 * found.moment(1) == pytest.approx(trace(operator, vectors=4, seed=2).value, rel=1e-12)
    rows = torch.stack([(found.weights[i] * found.nodes[i]).sum() for i in range(4)])
    assert rows.unique().numel() == 4


def test_density_of_few_eigenvalues():
    """With three distinct entries on a diagonal the space ends after three products: shares are exact."""
    weights = torch.tensor([2.0] * 30 + [5.0] * 60 + [-1.0] * 10, dtype=torch.float64)
    p = nn.Parameter(torch.randn(100, dtype=torch.float64))
    operator = HessianOperator(lambda: 0.5 * (weights * p * p).sum(), [p], method="autograd")
    found = spectral_density(operator, steps=6, vectors=2)
    for nodes, shares in zip(found.nodes, found.weights, strict=True):
        assert nodes.tolist() == pytest.approx([-1.0, 2.0, 5.0, 5.0, 5.0, 5.0], rel=1e-9)
        assert shares.tolist() == pytest.approx([0.05, 0.15, 0.3, 0.0, 0.0, 0.0], abs=1e-12)
    assert (found.smallest, found.largest) == pytest.approx((-1.0, 5.0), rel=1e-9)
    grid = torch.linspace(-2.0, 6.0, 4001, dtype=torch.float64)
    curve = found.evaluate(grid, 0.1)
    assert torch.trapezoid(curve, grid).item() == pytest.approx(1.0, rel=1e-6)
    normal = torch.distributions.Normal(torch.tensor([-1.0, 2.0, 5.0]).double(), 0.1)
    wanted = (normal.log_prob(grid[:, None]).exp() * torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)).sum(
        1
    )
    torch.testing.assert_close(curve, wanted, rtol=1e-8, atol=1e-12)
    assert torch.equal(found.evaluate(grid), found.evaluate(grid, (found.largest - found.smallest) / 100.0))
    assert torch.equal(found.evaluate([0.5, 2.0], 0.1), found.evaluate(torch.tensor([0.5, 2.0]), 0.1))
    assert found.evaluate(torch.zeros(2, 3), 0.1).shape == (2, 3)
    plain = found.asdict()
    assert plain == {
        "nodes": found.nodes.tolist(), "weights": found.weights.tolist(), "numel": 100, "hvps": 12,
        "cost": found.cost, "largest": found.largest, "smallest": found.smallest,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype"), [("autograd", torch.float64), ("difference", torch.float32)])
def test_density_of_a_network(method, dtype):
    """Shares of the eigenvalues below some values, both ends and two moments, against the dense Hessian."""
    model, loss = tanh_model(dtype)
    params = list(model.parameters())
    values = torch.linalg.eigvalsh(dense_hessian(loss, params))
    found = spectral_density(HessianOperator(loss, params, method=method), steps=40, vectors=16)
    assert found.weights.sum().item() == pytest.approx(1.0, rel=1e-12)
    assert (found.smallest, found.largest) == pytest.approx((values[0].item(), values[-1].item()), rel=1e-3)
    for order in (1, 2):
        rows = 16.0 * (found.weights * found.nodes**order).sum(1)
        error = abs(found.moment(order) - (values**order).mean().item())
        assert error <= 3.0 * rows.std().item() / 4.0
    for bound in (-0.1, -0.03, 0.05, 0.2):
        share = found.weights[found.nodes < bound].sum().item()
        assert share == pytest.approx((values < bound).double().mean().item(), abs=0.03)


def test_not_finite():
    p = nn.Parameter(torch.ones(5))
    operator = HessianOperator(lambda: (p * p).sum() * math.inf, [p])
    assert math.isnan(trace(operator, vectors=2).value)
    found = spectral_density(operator, steps=2, vectors=2)
    assert math.isnan(found.largest)
    assert math.isnan(found.smallest)
    assert found.evaluate([0.0], 1.0).isnan().all()
    assert found.weights.isnan().all()


@pytest.mark.parametrize(
    ("v", "error", "message"),
    [
        (torch.ones(9), ValueError, r"v must be a plain tensor of shape \(10,\) or \(10, k\), got \(9,\)"),
        (torch.ones(1, 10), ValueError, r"v must be a plain tensor of shape \(10,\) or \(10, k\), got \(1, 10\)"),
        (torch.ones(10, 1, 1), ValueError, r"v must be a plain tensor of shape \(10,\) or \(10, k\), got \(10, 1, 1\)"),
        (torch.tensor(1.0), ValueError, r"v must be a plain tensor of shape \(10,\) or \(10, k\), got \(\)"),
        (torch.ones(10, dtype=torch.int64), TypeError, "v must be a dense tensor of a floating-point dtype, got torch.int64"),
        (torch.ones(10).to_sparse(), TypeError, "v must be a dense tensor"),
        (torch.ones(10, device="meta"), ValueError, "v must be on cpu with the parameters, got 'meta'"),
        (np.ones(10), TypeError, r"v must be a tensor or a list of 2 tensors .*, got 'ndarray'\. to_scipy\(\) takes arrays"),
        (3.0, TypeError, "v must be a tensor or a list of 2 tensors shaped like the parameters, got 'float'"),
        ([torch.ones(2, 3)], ValueError, "v must be a tensor or a list of 2 tensors shaped like the parameters, got '1 items'"),
        ([torch.ones(2, 3), torch.ones(5)], ValueError, r"v\[1\] must have the shape \(4,\), got \(5,\)"),
        ([torch.ones(2, 3), 4.0], TypeError, r"v\[1\] must be a tensor, got 4\.0"),
        ([torch.ones(2, 3), torch.ones(4).bool()], TypeError, r"v\[1\] must be a dense tensor of a floating-point dtype"),
    ],
)  # fmt: skip
def test_refused_vectors(v, error, message):
    params = make_params(torch.float32, [(2, 3), (4,)])
    calls = []
    operator = HessianOperator(lambda: calls.append(0), params)
    with pytest.raises(error, match=f"HessianOperator: {message}"):
        operator @ v
    assert not calls


def test_refused_arguments():
    p, loss, _ = quadratic()
    opt = torch.optim.Adam([p])
    with pytest.raises(
        ValueError,
        match="HessianOperator: method must be one of 'difference', 'autograd', 'auto', got 'exact'",
    ):
        HessianOperator(loss, [p], method="exact")
    with pytest.raises(ValueError, match="HessianOperator: params must hold at least one element"):
        HessianOperator(loss, [])
    with pytest.raises(
        TypeError, match="HessianOperator: loss_fn must be a function that returns the loss, got 3"
    ):
        HessianOperator(3, [p])
    with pytest.raises(
        TypeError, match="PreconditionedOperator: optimizer must be one whose rule is known, got 'Rprop'"
    ):
        PreconditionedOperator(loss, torch.optim.Rprop([p]))
    with pytest.raises(TypeError, match="PreconditionedOperator: use_grad must be True or False, got 2"):
        PreconditionedOperator(loss, opt, use_grad=2)
    with pytest.raises(
        TypeError, match="trace: operator must be a HessianOperator or PreconditionedOperator, got 'function'"
    ):
        trace(loss)
    operator = HessianOperator(loss, [p])
    with pytest.raises(ValueError, match="trace: vectors must be >= 1, got 0"):
        trace(operator, vectors=0)
    with pytest.raises(TypeError, match=r"spectral_density: seed must be an integer, got 0\.5"):
        spectral_density(operator, seed=0.5)
    with pytest.raises(ValueError, match="spectral_density: steps must be >= 1, got 0"):
        spectral_density(operator, steps=0)
    one = spectral_density(operator, steps=1, vectors=1)
    with pytest.raises(
        ValueError, match="SpectralDensity: width must be given where all nodes are equal, got None"
    ):
        one.evaluate([0.0])
    with pytest.raises(ValueError, match="SpectralDensity: width must be finite and > 0, got 0"):
        one.evaluate([0.0], 0.0)
    with pytest.raises(ValueError, match="SpectralDensity: order must be >= 0, got -1"):
        one.moment(-1)


def test_other_parameters_take_part():
    params = make_params(torch.float64, [(3,), (2,)])
    loss = lambda: sum((p**4).sum() for p in params)  # noqa: E731
    opt = fw.SGD(params, lr=0.1)
    loss().backward()
    operator = PreconditionedOperator(loss, opt)
    assert operator.shape == (5, 5)
    params[1].grad = None
    message = (
        "PreconditionedOperator: optimizer must have gradients for the same parameters as when the operator"
    )
    with pytest.raises(ValueError, match=message):
        operator @ torch.ones(5)
    assert PreconditionedOperator(loss, opt).shape == (3, 3)
