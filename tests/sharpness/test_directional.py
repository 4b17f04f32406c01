"""Directional sharpness: closed forms, real steps, kinks, rounding, and what a probe makes of it."""

import copy
import math
import random
import statistics

import numpy as np
import pytest
import torch
from cases import assert_same_bits
from dense import symmetric, tanh_model
from sharpness.test_sharpness_restore import noisy_model, record
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fused_warmup as fw
from benchmarks.readings import along
from fused_warmup.sharpness import directional, preconditioned, threshold
from fused_warmup.sharpness.directional_sharpness import secant
from fused_warmup.sharpness.hvp import Hessian
from fused_warmup.sharpness.operators import evaluator_of
from fused_warmup.sharpness.pending_step import PendingStep

OPTIMIZERS = {
    "sgd": lambda ps: fw.SGD(ps, lr=0.1, momentum=0.9),
    "nesterov": lambda ps: fw.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda ps: fw.Adam(ps, lr=1e-2, weight_decay=0.1, max_grad_norm=0.05),
    "adamw": lambda ps: fw.AdamW(ps, lr=1e-2, weight_decay=0.1, schedule=fw.schedules.warmup(20)),
    "amsgrad": lambda ps: fw.Adam(ps, lr=1e-2, amsgrad=True),
    "radam": lambda ps: fw.RAdam(ps, lr=1e-2),
    "giadam": lambda ps: fw.GIAdam(ps, lr=1e-2),
    "torch": lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1),
    "reference": lambda ps: fw.Adam(ps, lr=1e-2, backend="reference"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors]).double()


def gradient(loss, params):
    return flat(torch.autograd.grad(loss(), params))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("made", [0, 3])
def test_agrees_with_the_real_step(name, made):
    """The optimizer makes the step, and gradients at both ends give the numerator."""
    model, loss = tanh_model()
    params = list(model.parameters())
    opt = OPTIMIZERS[name](params)
    for _ in range(made):
        opt.zero_grad()
        loss().backward()
        opt.step()
    opt.zero_grad()
    loss().backward()
    found = directional(loss, opt).asdict()
    inverse = None
    if name not in ("sgd", "nesterov"):
        # a first moment of ones moves the parameters by lr / P
        pending = PendingStep("test", opt)
        inverse = flat(pending.inverse_preconditioners(pending.grads))
    edge = threshold(opt)
    decay = 0.1 if name in ("nesterov", "adam", "torch") else 0.0
    near, before = gradient(loss, params), flat(params)
    opt.step()
    moved = flat(params) - before
    weighted = moved if inverse is None else moved / inverse
    expected = ((gradient(loss, params) - near + decay * moved) @ moved / (weighted @ moved)).item()
    assert found["value"] == pytest.approx(expected, rel=1e-8)
    assert found["edge_ratio"] == pytest.approx(expected / edge, rel=1e-8)
    assert found["flags"] == []
    assert found["cost"] == 2
    assert found["step"] == made


def test_a_quotient_of_the_hessian():
    """On a quadratic it is the quotient along the gradient, and at most the largest eigenvalue."""
    matrix = symmetric([10.0, 3.0, 1.0, -2.0])
    p = torch.randn(4, dtype=torch.float64, requires_grad=True)
    opt = fw.SGD([p], lr=0.1)

    def loss():
        return 0.5 * p @ matrix @ p

    loss().backward()
    found = directional(loss, opt)
    expected = (p.grad @ matrix @ p.grad / (p.grad @ p.grad)).item()
    assert found.value.item() == pytest.approx(expected, rel=1e-10)
    assert found.value < 10.0
    # half of it is the loss that curvature adds
    gain = loss().item() - (0.1 * p.grad @ p.grad).item() + 0.5 * expected * (0.01 * p.grad @ p.grad).item()
    opt.step()
    assert loss().item() == pytest.approx(gain, rel=1e-10)


def test_kinks_count():
    """A step across the kink of ``3 |x|``: the Hessian is 0 on both sides, the step feels ``6 / |d|``."""
    x = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    opt = fw.SGD([x], lr=0.5)

    def loss():
        return 3.0 * (F.relu(x) + F.relu(-x)).sum()

    loss().backward()
    assert preconditioned(loss, opt, iterations=1, method="autograd").value.item() == 0.0
    found = directional(loss, opt).asdict()
    assert found["value"] == pytest.approx(6.0 / 1.5, rel=1e-12)
    assert found["edge_ratio"] == pytest.approx(6.0 / 1.5 / 4.0, rel=1e-12)
    # a shorter step does not reach it
    opt.param_groups[0]["lr"] = 0.1
    assert directional(loss, opt).value.item() == 0.0


def test_a_relu_network_trains_by_what_it_says():
    """Gradient descent at a large rate: it predicts the losses that the curvature at a point does not."""
    rows = along("relu", "SGD, 0.3", "one of 256", readings=10)
    *_, error, error_from_start = map(statistics.median, zip(*rows, strict=True))
    assert 2.0 * error < error_from_start


def test_ascent_is_descent_on_the_negative():
    model, loss = tanh_model()
    up = fw.Adam(model.parameters(), lr=1e-2, maximize=True)
    down = fw.Adam(model.parameters(), lr=1e-2)
    (-loss()).backward()
    expected = directional(lambda: -loss(), down).value.item()
    for p in model.parameters():
        p.grad.neg_()
    assert directional(loss, up).value.item() == pytest.approx(expected, rel=1e-12)


def test_gradients_of_the_closure():
    model, loss = tanh_model()
    opt = fw.Adam(model.parameters(), lr=1e-2)
    without = directional(loss, opt).value.item()
    loss().backward()
    assert directional(loss, opt).value.item() == without
    for p in model.parameters():
        p.grad.mul_(torch.rand_like(p))
    assert directional(loss, opt).value.item() != pytest.approx(without, rel=1e-3)
    assert directional(loss, opt, use_grad=False).value.item() == without


class ReadNumbers(TorchDispatchMode):
    """Counts the floating-point numbers that are read from tensors, for which a GPU makes the process wait."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_norm_of_the_gradients_is_computed_once(name):
    """No other floating-point number of a reading is read before the reading is."""
    model, loss = tanh_model()
    opt = OPTIMIZERS[name](model.parameters())
    loss().backward()
    with ReadNumbers() as read:
        directional(loss, opt)
    assert read.count == 1


def test_groups_with_rates_of_their_own():
    """A quotient over the threshold of each group: at 1 the curvature is what all of them just bear."""
    a, b = (torch.tensor([1.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    opt = fw.SGD([{"params": [a], "lr": 0.5}, {"params": [b], "lr": 0.1}], lr=1.0)

    def loss():
        # gradient descent at the edge in both coordinates
        return 0.5 * (4.0 * a * a + 20.0 * b * b).sum()

    loss().backward()
    assert directional(loss, opt).edge_ratio.item() == pytest.approx(1.0, rel=1e-12)
    # frozen, so that it neither moves nor counts
    opt.param_groups[0]["lr"] = 0.0
    found = directional(loss, opt)
    assert found.value.item() == pytest.approx(20.0, rel=1e-12)
    assert found.edge_ratio.item() == pytest.approx(1.0, rel=1e-12)


def test_no_step_has_no_curvature():
    model, loss = tanh_model()
    found = directional(loss, fw.Adam(model.parameters(), lr=0.0)).asdict()
    assert math.isnan(found["value"])
    assert "nonfinite" in found["flags"]


@pytest.mark.parametrize("make", [lambda ps, lr: fw.SGD(ps, lr=100 * lr), fw.AdamW], ids=["sgd", "adamw"])
def test_rounding_is_within_its_bound(make):
    """From steps that float32 resolves to steps that it does not, which are flagged."""
    rough = []
    for exponent in range(3, 9):
        model, loss = tanh_model(torch.float32)
        opt = make(model.parameters(), 10.0**-exponent)
        loss().backward()
        found = directional(loss, opt).asdict()
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            for p, q in zip(exact.parameters(), model.parameters(), strict=True):
                p.grad = q.grad.double()
        inputs = loss.__closure__
        assert inputs is not None
        x, y = (c.cell_contents for c in inputs if isinstance(c.cell_contents, torch.Tensor))
        wide = directional(
            lambda exact=exact, x=x, y=y: F.cross_entropy(exact(x.double()), y),
            make(exact.parameters(), 10.0**-exponent),
        )
        assert abs(found["value"] - wide.value.item()) <= found["err_fd"]
        rough.append("rough" in found["flags"])
    assert rough[0] is False
    assert rough[-1] is True


class LastDigit(torch.autograd.Function):
    """The identity, whose gradient of 1 is wrong by a last digit: up at the first pass, down at the next."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        LastDigit.passes += 1
        return torch.nextafter(grad, grad * (2.0 if LastDigit.passes % 2 else 0.0))


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "beside float64"])
def test_half_of_the_bound_would_not_hold(others):
    """The gradient is constant, so that all curvature is rounding: a last digit at each end."""
    LastDigit.passes = 0
    p = torch.zeros(1, requires_grad=True)
    # empty: vectors are in float64 then, and gradients still as they are
    wide = [torch.zeros(0, dtype=torch.float64, requires_grad=True) for _ in range(others)]
    opt = fw.SGD([p, *wide], lr=0.25)
    p.grad = torch.ones(1)
    for other in wide:
        other.grad = torch.zeros(0, dtype=torch.float64)
    found = directional(lambda: LastDigit.apply(p).sum(), opt).asdict()
    assert 0.5 * found["err_fd"] < found["value"] <= found["err_fd"]
    assert "rough" in found["flags"]


@pytest.mark.parametrize("mode", ["nearest", "kahan", "split", "master"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rounded_parameters_move_as_far_as_they_do(mode, backend):
    """The displacement is that between stored values, which rounding to 16 bits changes by a third here."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16))
    opt = fw.SGD([p], lr=2.0**-7, param_rounding=mode, backend=backend)
    scale = torch.tensor([1.0, 1.25, 3.0])

    def loss():
        return 0.5 * (scale * p.float().square()).sum()

    for _ in range(2):
        opt.zero_grad()
        loss().backward()
        opt.step()
    opt.zero_grad()
    loss().backward()
    before, near = p.detach().double(), p.grad.double()
    found = directional(loss, opt).value.item()
    opt.step()
    moved = p.detach().double() - before
    after = torch.autograd.grad(loss(), p)[0].double()
    assert moved.any()
    assert found == pytest.approx(((after - near) @ moved / (moved @ moved)).item(), rel=1e-12)


def test_a_probe_reads_it_too():
    """The same number as that of the function, beside the same reading and the same training."""
    trained = []
    for measured in (False, True):
        random.seed(0)
        np.random.seed(0)
        model, loss = noisy_model()
        opt = fw.AdamW(model.parameters(), lr=1e-2)
        probe = fw.SharpnessProbe(opt, every=2, directional=measured)
        readings = []
        for _ in range(5):
            opt.zero_grad()
            loss().backward()
            expected = directional(loss, opt).value.item()
            before = record(model, opt)
            if probe.measure(loss):
                reading = probe.poll().asdict()
                readings.append({k: v for k, v in reading.items() if k not in ("directional", "cost")})
                assert (
                    (reading["directional"] == expected) if measured else math.isnan(reading["directional"])
                )
            after = record(model, opt)
            assert before[1] == after[1]
            opt.step()
        trained.append((readings, model.state_dict()))
    assert len(trained[0][0]) == 3
    for a, b in zip(trained[0][0], trained[1][0], strict=True):
        assert repr(a) == repr(b)
    for (name, a), b in zip(trained[0][1].items(), trained[1][1].values(), strict=True):
        assert_same_bits(name, b, a)


def test_bad_input():
    model, loss = tanh_model()
    opt = fw.Adam(model.parameters(), lr=1e-2)
    with pytest.raises(TypeError, match="directional: loss_fn must be a function that returns the loss"):
        directional(None, opt)
    with pytest.raises(TypeError, match="directional: use_grad must be True or False, got 2"):
        directional(loss, opt, use_grad=2)
    with pytest.raises(TypeError, match="directional: reduce must be True or False, got 'yes'"):
        directional(loss, opt, reduce="yes")
    with pytest.raises(TypeError, match="SharpnessProbe: directional must be True or False, got 2"):
        fw.SharpnessProbe(opt, directional=2)
    with pytest.raises(TypeError, match="directional: optimizer"):
        directional(loss, fw.LAMB(model.parameters(), lr=1e-2))


def test_later_products_find_the_parameters_as_they_were():
    model, loss = tanh_model()
    pending = PendingStep("test", fw.Adam(model.parameters(), lr=1e-2))
    before = flat(model.parameters())
    with evaluator_of(pending, loss) as evaluator:
        secant(pending, Hessian(evaluator))
        assert_same_bits("parameters", flat(model.parameters()), before)
