"""Measurements of a probe one by one: audits, products, arguments, previous vectors, and errors of readings."""

import math

import pytest
import torch

import fused_warmup as fw
from fused_warmup.sharpness.lanczos import Spectrum
from fused_warmup.sharpness.probe import _larger


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
