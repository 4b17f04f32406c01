"""Measurements of 16-bit parameters begin at their exact values: those that ``param_rounding`` keeps in residues."""

import math

import pytest
import torch
from cases import assert_same_bits
from torch.nn import Parameter

import fused_warmup as fw
from fused_warmup.plan.residues import residue_of
from fused_warmup.reference.rounding import RESIDUES, load
from fused_warmup.sharpness import critical_lr, preconditioned
from fused_warmup.sharpness.line_search import Line
from fused_warmup.sharpness.operators import evaluator_of
from fused_warmup.sharpness.pending_step import PendingStep
from fused_warmup.sharpness.vectors import FusedVectors, Vectors

OPTIMIZERS = {
    "adamw": lambda params, **options: fw.AdamW(params, lr=3e-3, weight_decay=0.1, **options),
    # the decay is a part of the gradient
    "adam": lambda params, **options: fw.Adam(params, lr=3e-3, weight_decay=0.1, **options),
    "sgd": lambda params, **options: fw.SGD(params, lr=3e-2, momentum=0.9, weight_decay=0.1, **options),
}

each_mode = pytest.mark.parametrize("mode", RESIDUES)
each_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])


def matrices(dtype=torch.bfloat16):
    """Two layers, one of them transposed in memory."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(64, 8, generator=generator) / 3.0
    second = torch.randn(32, 64, generator=generator) / 8.0
    return [Parameter(first.to(dtype)), Parameter(second.to(dtype).t())]


def network(params):
    """Return the loss of a network of two layers, computed in float32, and a list of all parameters it has seen."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 8, generator=generator), torch.randn(16, 32, generator=generator)
    seen = []

    def loss():
        seen.append([p.detach().clone() for p in params])
        first, second = (p.float() for p in params)
        return ((x @ first.t()).tanh() @ second - y).square().mean()

    return loss, seen


def trained(mode, backend="cpu", make=OPTIMIZERS["adamw"], steps=5):
    """Return parameters after some steps with a gradient for the next one, their optimizer, and the loss."""
    params = matrices()
    opt = make(params, param_rounding=mode, backend=backend)
    loss, seen = network(params)
    for step in range(steps + 1):
        opt.zero_grad()
        loss().backward()
        if step < steps:
            opt.step()
    seen.clear()
    return params, opt, loss, seen


def exact(opt, p, mode):
    """The float32 value of a parameter."""
    return load(mode, p.detach(), opt.state[p][RESIDUES[mode][0]])


def stored(opt, params):
    """Copies of parameters, gradients and all states."""
    tensors = [t for p in params for t in (p.detach(), p.grad)]
    tensors += [v for p in params for v in opt.state[p].values() if isinstance(v, torch.Tensor)]
    return [t.clone() for t in tensors]


def in_float32(params, opt, mode, make):
    """Return float32 parameters of the exact values, and their optimizer with the states of another one."""
    wide = [Parameter(exact(opt, p, mode)) for p in params]
    other = make(wide, backend="reference")
    for p, q in zip(params, wide, strict=True):
        q.grad = p.grad.float()
    other.step()
    for p, q in zip(params, wide, strict=True):
        q.detach().copy_(exact(opt, p, mode))
        for name, state in other.state[q].items():
            if isinstance(state, torch.Tensor):
                state.copy_(opt.state[p][name])
    return wide, other


@each_backend
@each_mode
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_line_is_that_of_a_float32_model_rounded(mode, backend, name):
    params, opt, loss, seen = trained(mode, backend, OPTIMIZERS[name])
    wide, other = in_float32(params, opt, mode, OPTIMIZERS[name])
    pending, expected = PendingStep("test", opt), PendingStep("test", other)
    directions = expected.directions(expected.grads_of(None))
    for a, b in zip(pending.directions(pending.grads_of(None)), directions, strict=True):
        assert_same_bits("direction", a, b)
    before = stored(opt, params)
    rates = (0.0, 2.0**-9, 2.0**-6)
    with evaluator_of(pending, loss) as evaluator:
        assert isinstance(evaluator.vectors, FusedVectors) == (backend == "cpu")
        line = Line(evaluator, pending)
        losses = [line.start, *(line.loss(rate) for rate in rates[1:])]
    assert len(seen) == len(rates)
    for rate, found, points in zip(rates, losses, seen, strict=True):
        rounded = [(q.detach() - rate * d).bfloat16() for q, d in zip(wide, directions, strict=True)]
        for a, b in zip(points, rounded, strict=True):
            assert_same_bits(f"rate {rate}", a, b)
        assert found == network([Parameter(p) for p in rounded])[0]().item()
    # from the stored values the line leads elsewhere
    for p, q, d in zip(params, seen[1], directions, strict=True):
        assert not torch.equal(q, (p.detach().float() - rates[1] * d).bfloat16())
    for a, b in zip(before, stored(opt, params), strict=True):
        assert_same_bits("restored", b, a)


@each_backend
@each_mode
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_preconditioner_is_that_of_a_float32_model(mode, backend, name):
    params, opt, loss, _ = trained(mode, backend, OPTIMIZERS[name])
    _, other = in_float32(params, opt, mode, OPTIMIZERS[name])
    pending, expected = PendingStep("test", opt), PendingStep("test", other)
    wanted = expected.inverse_preconditioners(expected.grads)
    found = pending.inverse_preconditioners(pending.grads)
    for a, b in zip(found, wanted, strict=True):
        assert_same_bits("1/P", a, b)
    with evaluator_of(pending, loss) as evaluator:
        kernels = pending.preconditioner(evaluator.vectors)
    assert (kernels is None) == (backend == "reference")
    if kernels is not None and kernels.scale is not None:
        for a, b in zip(evaluator.vectors.split(kernels.scale), wanted, strict=True):
            torch.testing.assert_close(a, b.sqrt(), rtol=2e-6, atol=0.0)


@each_backend
@each_mode
def test_both_ends_of_a_difference_start_at_the_exact_values(mode, backend, monkeypatch):
    params, opt, loss, seen = trained(mode, backend)
    before = stored(opt, params)
    asked = []
    for kind in (Vectors, FusedVectors):

        def perturb(self, vector, scale, size, real=kind.perturb):
            step = [
                part.clone() for part in self.split((vector if scale is None else scale * vector).double())
            ]
            asked.append([part * size.to(self.dtype).double() for part in step])
            real(self, vector, scale, size)

        monkeypatch.setattr(kind, "perturb", perturb)
    probe = fw.SharpnessProbe(opt, loss, method="difference", steps=10)
    assert probe.measure()
    assert math.isfinite(probe.poll().value)
    assert len(asked) >= 20
    # the preconditioner may need an evaluation of the loss at the parameters
    points = seen[len(seen) - len(asked) :]
    differ = 0
    for steps, found in zip(asked, points, strict=True):
        for p, step, x in zip(params, steps, found, strict=True):
            assert (x != (exact(opt, p, mode).double() + step).bfloat16()).double().mean() < 1e-3
            differ += int((x != (p.detach().double() + step).bfloat16()).sum())
    assert differ > 0.01 * len(points) * sum(p.numel() for p in params)
    for a, b in zip(before, stored(opt, params), strict=True):
        assert_same_bits("restored", b, a)


@each_backend
@each_mode
def test_everything_is_restored_after_an_exception(mode, backend):
    params, opt, loss, seen = trained(mode, backend)
    before = stored(opt, params)

    def failing():
        if len(seen) == 3:
            raise KeyError("seen")
        return loss()

    for measure in (critical_lr, preconditioned):
        seen.clear()
        with pytest.raises(KeyError, match="seen"):
            measure(failing, opt)
        for a, b in zip(before, stored(opt, params), strict=True):
            assert_same_bits("restored", b, a)


@each_backend
@each_mode
def test_a_measurement_changes_no_later_step(mode, backend):
    runs = [trained(mode, backend) for _ in range(2)]
    for k, (params, opt, loss, _) in enumerate(runs):
        if k:
            preconditioned(loss, opt)
            critical_lr(loss, opt)
        opt.step()
        opt.zero_grad()
        loss().backward()
        opt.step()
        runs[k] = stored(opt, params)
    for a, b in zip(*runs, strict=True):
        assert_same_bits("next step", b, a)


@each_backend
@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
def test_what_has_no_residue_starts_as_it_is_stored(mode, backend):
    params, opt, loss, seen = trained(mode, backend)
    pending = PendingStep("test", opt)
    assert pending.residues == [None, None]
    directions = pending.directions(pending.grads_of(None))
    with evaluator_of(pending, loss) as evaluator:
        Line(evaluator, pending).loss(2.0**-9)
    for points, rate in zip(seen, (0.0, 2.0**-9), strict=True):
        for p, d, x in zip(params, directions, points, strict=True):
            assert_same_bits(f"rate {rate}", x, (p.detach().float() - rate * d).bfloat16())


def test_a_residue_of_another_mode_counts_until_the_next_step_converts_it():
    params, opt, _, _ = trained("master")
    values = [exact(opt, p, "master") for p in params]
    opt.param_groups[0]["param_rounding"] = "split"
    for residue, value in zip(PendingStep("test", opt).residues, values, strict=True):
        assert residue.mode == "master"
        assert_same_bits("value", residue.tensor, value)
    opt.param_groups[0]["param_rounding"] = "nearest"
    assert PendingStep("test", opt).residues == [None, None]


@pytest.mark.parametrize(
    "master", [torch.randn(4, 6), torch.randn(6, 4).double().t()], ids=["layout", "dtype"]
)
def test_residues_are_read_in_the_form_of_their_parameter(master):
    """As a loaded state may hold them: of another layout or dtype."""
    local = torch.randn(6, 4).bfloat16().t()
    mode, found = residue_of({"master_param": master}, "master", local)
    assert (mode, found.dtype, found.stride()) == ("master", torch.float32, local.stride())
    assert_same_bits("residue", found, master.float())
    assert residue_of({"master_param": found}, "master", local).tensor.data_ptr() == found.data_ptr()
    assert residue_of({"master_param": master}, "master", local.float()) is None
    assert residue_of({"exp_avg": master}, "master", local) is None
    assert residue_of(None, "master", local) is None


@each_backend
@each_mode
def test_init_from_gradients_decays_the_exact_value(mode, backend):
    """Residues that are not zero before the first step, as of a float32 model whose states are given."""
    params = matrices()
    opt = fw.Adam(params, weight_decay=0.5, exp_avg_sq_init="grad", param_rounding=mode, backend=backend)
    opt.init_state()
    for p in params:
        p.grad = torch.full_like(p, 2.0**-6)
        residue = opt.state[p][RESIDUES[mode][0]]
        ulp = (
            torch.nextafter(p.detach().abs(), torch.full_like(p, torch.inf)).float()
            - p.detach().abs().float()
        )
        residue.copy_({"kahan": ulp / 4.0, "master": p.detach() + ulp / 4.0}.get(mode, torch.tensor(0x4000)))
    values = [exact(opt, p, mode) for p in params]
    assert all((v != p).all() for v, p in zip(values, params, strict=True))
    opt.init_from_gradients()
    for p, value in zip(params, values, strict=True):
        expected = (2.0**-6 + 0.5 * value).square()
        torch.testing.assert_close(opt.state[p]["exp_avg_sq"], expected, rtol=1e-6, atol=0.0)
        assert not torch.allclose(expected, (2.0**-6 + 0.5 * p.float()).square(), rtol=1e-5)
