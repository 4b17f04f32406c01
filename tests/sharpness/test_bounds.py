"""Bounds of readings: hidden eigenvalues, four models on changing batches, and what a reading names."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from dense import DenseOperator
from torch import nn
from torch.nn import functional

import fused_warmup as fw
from benchmarks.readings import MODELS, run, within
from fused_warmup.sharpness.lanczos import lanczos, unseen
from fused_warmup.sharpness.result import Flags

pytestmark = pytest.mark.usefixtures("one_thread")


def recurrence(diagonal, below):
    return [[torch.tensor(x, dtype=torch.float64) for x in part] for part in (diagonal, below)]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("beyond", [0.02, 0.3, 2.0])
def test_a_hidden_eigenvalue_lies_at_the_bound(k, beyond):
    """A matrix with one more row whose largest eigenvalue is prescribed: the bound is that eigenvalue."""
    generator = torch.Generator().manual_seed(k)
    diagonal, below = torch.rand(2, k, dtype=torch.float64, generator=generator) + 0.5
    small = torch.diag(diagonal) + torch.diag(below[:-1], 1) + torch.diag(below[:-1], -1)
    top = torch.linalg.eigvalsh(small)[-1]
    size = torch.maximum(diagonal.abs().max(), below.max())
    hidden = top + beyond * size
    # Golub 1973: the last diagonal entry of the larger matrix follows from the prescribed eigenvalue
    last = torch.zeros(k, dtype=torch.float64)
    last[-1] = below[-1] ** 2
    corner = hidden + torch.linalg.solve(small - hidden * torch.eye(k, dtype=torch.float64), last)[-1]
    sides = torch.cat([below[:-1], below[-1:]])
    large = torch.diag(torch.cat([diagonal, corner[None]])) + torch.diag(sides, 1) + torch.diag(sides, -1)
    values, vectors = torch.linalg.eigh(large)
    assert values[-1] == pytest.approx(float(hidden), rel=1e-12)
    overlap = float(vectors[0, -1].abs())
    rows = recurrence(diagonal.tolist(), below.tolist())
    found = float(unseen(top, *rows, size, overlap))
    # rounded up to an eighth of an octave
    assert float(hidden - top) * (1 - 1e-9) <= found <= float(hidden - top) * 2 ** (1 / 8) * (1 + 1e-9)
    assert float(unseen(top, *rows, size, 0.0)) == math.inf


HIDDEN, BULK, SEEDS = 1.5, (0.0, 0.5, 1.0), 300
MISSES_ALLOWED = 0.05 * SEEDS


def hiding(order):
    """Return a diagonal of 90 in which one element is larger than the three values of all others."""
    values = torch.tensor(BULK, dtype=torch.float64).repeat_interleave(30)[order]
    values[order.argmin()] = HIDDEN
    return values


def misses(found, bound):
    return sum(value + share < HIDDEN for value, share in zip(found, bound, strict=True))


def test_the_bound_of_random_starts_holds_for_19_of_20():
    """Seeds 0 to 299, three products: the bound is exact for this spectrum, so half of it is too small."""
    values = hiding(torch.arange(90))
    spectra = []
    for seed in range(SEEDS):
        start = torch.randn(90, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        spectra.append(lanczos(DenseOperator(torch.diag(values)), start, 3))
    found, bound = ([float(getattr(s, name)) for s in spectra] for name in ("largest", "unseen"))
    halves = [0.5 * x for x in bound]
    residuals = [float(s.residual) for s in spectra]
    print(
        f"misses: {misses(found, bound)}, half {misses(found, halves)}, residual {misses(found, residuals)}"
    )
    assert misses(found, bound) <= MISSES_ALLOWED < misses(found, halves)


@pytest.mark.parametrize("warm", [False, True])
def test_the_bound_of_readings_holds_for_19_of_20(warm):
    """Seeds 0 to 299: cold readings, and warm ones on another batch, whose largest eigenvalue is elsewhere."""
    found, bound, least = [], [], math.inf
    for seed in range(SEEDS):
        p = torch.zeros(90, dtype=torch.float64, requires_grad=True)
        batch = SimpleNamespace(values=hiding(torch.arange(90)))
        probe = fw.SharpnessProbe(
            torch.optim.SGD([p], lr=0.1),
            lambda: 0.5 * (batch.values * p * p).sum(),  # noqa: B023
            every=1,
            seed=seed,
            steps=3,
            max_products=3,
        )
        probe.measure()
        reading = probe.poll()
        if warm:
            # of no use: it is an eigenvector of the other batch
            probe._vectors[0] = torch.eye(90, dtype=torch.float64)[0]
            batch.values = hiding(torch.arange(89, -1, -1))
            probe.measure()
            reading = probe.poll()
        found.append(float(reading.value))
        bound.append(float(reading.err_krylov + reading.err_fd))
        least = min(least, float(reading.hi - reading.value - reading.err_krylov - reading.err_fd))
    halves = [0.5 * x for x in bound]
    print(f"warm {warm}: misses {misses(found, bound)}, half {misses(found, halves)}")
    assert misses(found, bound) <= MISSES_ALLOWED < misses(found, halves)
    assert least == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [False, True])
def test_warm_readings_are_true(name, autocast):
    """AdamW, another batch of 32 every 10 steps, seed 0: 25 warm readings each, 200 in all."""
    rows = run(name, fw.AdamW, autocast=autocast, readings=26)[1:]
    errors = torch.tensor([abs(r["value"] / r["truth"] - 1.0) for r in rows])
    flagged = sum(bool(set(r["flags"]) - {"audit"}) for r in rows)
    print(f"{name} {autocast}: median {errors.median():.1e}, largest {errors.max():.1e}, flagged {flagged}")
    assert sum(map(within, rows)) >= 0.95 * len(rows)
    assert errors.median() <= 0.03
    assert flagged <= 0.1 * len(rows)


def test_three_products_would_not_do():
    """The three products of earlier releases miss the largest eigenvalue by more than a twentieth, and say so."""
    rows = run("gelu", fw.AdamW, readings=16, steps=3, max_products=3)[1:]
    errors = torch.tensor([1.0 - r["value"] / r["truth"] for r in rows])
    print(f"largest error {errors.max():.2f}")
    assert errors.max() > 0.05
    assert all("unconverged" in r["flags"] for r in rows)
    assert all(map(within, rows))


def test_products_are_planned_where_the_host_may_not_look():
    """As on a GPU: most readings are converged, by fewer products than allowed, and none of them waits."""
    rows = run("tanh", fw.AdamW, readings=20, prepare=lambda probe: setattr(probe, "_looks", False))
    assert rows[0]["hvps"] == 24
    late = rows[10:]
    assert sum("unconverged" in r["flags"] for r in late) <= 2
    assert max(r["hvps"] for r in late) < 20
    assert all(map(within, rows))
    # ranks that measure together must make the same products
    rows = run(
        "tanh", fw.AdamW, readings=3, prepare=lambda probe: vars(probe).update(_looks=False, _together=True)
    )
    assert [r["hvps"] for r in rows] == [24, 25, 25]


def test_ranks_agree_when_to_stop(monkeypatch):
    """The bound that decides is the mean of all ranks, in case that they round differently."""
    shared = []
    original = fw.sharpness.probe.LossEvaluator.share
    monkeypatch.setattr(
        "fused_warmup.sharpness.probe.LossEvaluator.share",
        lambda self, *tensors: (shared.append(tensors), original(self, *tensors))[1],
    )
    run("tanh", fw.AdamW, readings=1)
    assert any(len(t) == 1 and t[0].shape == (2,) for t in shared)


# products


class Attention(nn.Module):
    """Attention whose double backward does not exist on the CPU."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.inner(x).unsqueeze(1).chunk(3, -1)
        return functional.scaled_dot_product_attention(q, k, v).mean((1, 2))


class Opaque(torch.autograd.Function):
    """A square whose backward pass keeps no graph, as of a kernel outside torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2.0 * grad * x.detach()


@pytest.mark.parametrize("kind", ["raises", "leaves out"])
def test_differences_where_double_backward_is_no_use(kind):
    """An operation without a second derivative, and one that leaves a part out; the choice is kept."""
    torch.manual_seed(0)
    if kind == "raises":
        model, x = Attention().double(), torch.randn(6, 4, 8, dtype=torch.float64)
    else:
        model, x = nn.Linear(8, 8).double(), torch.randn(6, 8, dtype=torch.float64)

    def loss():
        out = model(x)
        return ((out if kind == "raises" else Opaque.apply(out)) ** 2).sum()

    probe = fw.SharpnessProbe(torch.optim.SGD(model.parameters(), lr=0.1), loss, every=1)
    expected = fw.sharpness.top_eigenvalue(loss, model.parameters(), iterations=30)
    evaluations = []
    for _ in range(2):
        probe.measure()
        reading = probe.poll()
        evaluations.append(reading.cost - 2 * reading.hvps)
        assert reading.method == "difference"
        assert float(reading.value) == pytest.approx(float(expected.value), rel=0.05)
        assert not reading.flags - {"cold"}
    # the gradient for the next step, and a try or a comparison at the first reading
    assert evaluations[1] == 1 < evaluations[0]


def test_errors_of_a_closure_are_not_hidden():
    p = torch.ones(3, requires_grad=True)

    def broken():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fw.SharpnessProbe(fw.SGD([p], lr=0.1), broken).measure()


# what a reading names


def test_batches_are_named():
    """By the first tensor that the first module gets; None for what cannot be told."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    free = torch.randn(7, 3)
    closures = {
        7: lambda: model(free).square().mean(),
        5: lambda: functional.mse_loss(model(free[:5]), torch.zeros(5, 2)),
        None: lambda: (free @ model[0].weight.T).square().mean(),
    }
    for expected, loss in closures.items():
        probe = fw.SharpnessProbe(opt, loss)
        probe.measure()
        assert probe.poll().batch_size == expected
        assert fw.sharpness.preconditioned(loss, opt).batch_size == expected
    for loss in (
        lambda: model(free[:3]).square().mean() + model(free[3:]).square().mean(),
        lambda: model(input=free).square().mean(),
        lambda: model(free[0]).square().mean(),
    ):
        with contextlib.suppress(TypeError):
            assert fw.sharpness.preconditioned(loss, opt).batch_size is None


def test_flags_are_names():
    one, zero = torch.tensor(True), torch.tensor(False)
    flags = Flags({"rough": one, "cold": zero, "audit": False, "locked": True})
    assert "rough" in flags
    assert not {"cold", "audit", "unknown"} & flags
    assert set(flags) == {"rough", "locked"} == flags
    assert len(flags) == 2
    assert repr(flags) == "Flags(['rough', 'locked'])"
    assert not Flags({"rough": zero, "cold": False})
    assert Flags() == set()
    assert flags - {"rough"} == {"locked"}


def test_the_error_of_the_batch_is_that_of_the_best_direction_of_the_batch():
    """Batches with sharpness 3 along changing axes: an earlier vector has 1 on this one."""
    p = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    batch = SimpleNamespace(values=None)
    probe = fw.SharpnessProbe(
        torch.optim.SGD([p], lr=0.1), lambda: 0.5 * (batch.values * p * p).sum(), every=1, tolerance=1e-9
    )
    errors = []
    for i in range(4):
        batch.values = torch.ones(20, dtype=torch.float64)
        batch.values[i] = 3.0
        probe.measure()
        reading = probe.poll()
        errors.append(float(reading.err_batch))
        # bounds are those of the batch
        assert float(reading.lo) == pytest.approx(3.0, rel=1e-6)
        assert float(reading.hi) == pytest.approx(3.0, rel=1e-6)
    assert math.isnan(errors[0])
    assert errors[1:] == pytest.approx([2.0] * 3, rel=1e-3)
    assert (reading.lo_includes, reading.hi_includes) == (("err_fd",), ("err_krylov", "err_fd"))


def test_bad_arguments():
    opt = fw.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=r"SharpnessProbe: max_products must be >= 3, got 2\."):
        fw.SharpnessProbe(opt, max_products=2)
    with pytest.raises(ValueError, match=r"SharpnessProbe: tolerance must .*, got 0"):
        fw.SharpnessProbe(opt, tolerance=0)
