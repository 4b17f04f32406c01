"""A measurement restores every bit, also after an exception, on the user's own model."""

import copy
import random
import types
import warnings

import numpy as np
import pytest
import torch
from cases import assert_same_bits
from torch import nn
from torch.nn import functional as F

import fused_warmup as fw
from fused_warmup.sharpness import (
    HessianOperator,
    PreconditionedOperator,
    critical_lr,
    directional,
    preconditioned,
    spectral_density,
    top_eigenvalue,
    trace,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Replacing(nn.Module):
    """Replaces one buffer by a new tensor at each pass, and counts in another one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.scale = self.scale * 1.001
        self.count += 1
        return x * self.scale


def noisy_model():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), Replacing(), nn.Linear(8, 3)
    )
    x, y = torch.randn(32, 6), torch.randint(3, (32,))

    def loss():
        shift = random.random() + np.random.rand() * 1e-3
        return F.cross_entropy(model(x) * (1 + 0.1 * shift), y)

    return model, loss


def record(model, opt, scaler=None):
    """Return the values that a measurement could change, and the identities of their objects."""
    params = list(model.parameters())
    values = {k: v.clone() for k, v in model.state_dict().items()}
    values |= {f"grad{i}": p.grad.clone() for i, p in enumerate(params) if p.grad is not None}
    for i, p in enumerate(params):
        values |= {
            f"state{i}.{k}": v.clone() for k, v in opt.state.get(p, {}).items() if isinstance(v, torch.Tensor)
        }
    values["torch"] = torch.get_rng_state()
    objects = [id(t) for t in (*params, *(p.grad for p in params), *model.buffers())]
    versions = [p._version for p in params]
    numpy = np.random.get_state()
    return values, (
        objects,
        versions,
        random.getstate(),
        numpy[1].tolist(),
        numpy[2:],
        scaler and scaler.state_dict(),
    )


def assert_unchanged(before, after):
    for (name, a), b in zip(before[0].items(), after[0].values(), strict=True):
        assert_same_bits(name, b, a)
    assert before[1] == after[1]


def columns(params):
    return torch.ones(sum(p.numel() for p in params), 3)


def value_of(value):
    return types.SimpleNamespace(value=value)


MEASURES = {
    "top": lambda loss, opt, ps: top_eigenvalue(loss, ps, iterations=4),
    "top-autograd": lambda loss, opt, ps: top_eigenvalue(loss, ps, iterations=4, method="autograd"),
    "preconditioned": lambda loss, opt, ps: preconditioned(loss, opt, iterations=4),
    "probe": lambda loss, opt, ps: fw.SharpnessProbe(opt, method="difference", directional=True).measure(
        loss
    ),
    "directional": lambda loss, opt, ps: [directional(loss, opt) for _ in range(3)][-1],
    "critical_lr": lambda loss, opt, ps: critical_lr(loss, opt),
    "trace": lambda loss, opt, ps: trace(HessianOperator(loss, ps), vectors=3),
    "density": lambda loss, opt, ps: value_of(spectral_density(HessianOperator(loss, ps), steps=2).largest),
    "product": lambda loss, opt, ps: value_of((PreconditionedOperator(loss, opt) @ columns(ps)).sum()),
    "initial_lr": lambda loss, opt, ps: fw.tuning.initial_lr(loss, opt, target=1.0),
}


@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize("name", MEASURES)
def test_bits(name, grads):
    """Parameters, buffers (changed and replaced), gradients, states, random numbers, version counters."""
    model, loss = noisy_model()
    opt = fw.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(3):
        opt.zero_grad()
        loss().backward()
        opt.step()
    if not grads:
        opt.zero_grad()
    before = record(model, opt, scaler)
    first = MEASURES[name](loss, opt, list(model.parameters()))
    assert_unchanged(before, record(model, opt, scaler))
    if name != "probe":
        second = MEASURES[name](loss, opt, list(model.parameters()))
        assert first.value == second.value


@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize("name", MEASURES)
def test_bits_after_an_exception(name, at):
    model, loss = noisy_model()
    opt = fw.Adam(model.parameters(), lr=1e-2)
    loss().backward()
    opt.step()
    calls = [0]

    def failing():
        calls[0] += 1
        value = loss()
        if calls[0] == at and not (name == "top-autograd" and at > 1):
            raise KeyError("from the closure")
        return value

    before = record(model, opt)
    if name == "top-autograd" and at > 1:
        MEASURES[name](failing, opt, list(model.parameters()))
    else:
        with pytest.raises(KeyError, match="from the closure"):
            MEASURES[name](failing, opt, list(model.parameters()))
    assert_unchanged(before, record(model, opt))


def test_between_forward_and_backward():
    """The graph of the user's step is still valid, and gives the same gradients."""
    model, loss = noisy_model()
    twin, other = copy.deepcopy(model), None
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    torch.manual_seed(0)
    value = F.cross_entropy(model(x), y)
    top_eigenvalue(loss, model.parameters(), iterations=3)
    value.backward()
    torch.manual_seed(0)
    other = F.cross_entropy(twin(x), y)
    other.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits("grad", p.grad, q.grad)


def test_dropout_is_the_same_in_every_evaluation():
    """With different masks at both ends the difference of gradients would be pure noise."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(50, dtype=torch.float64))
    loss = lambda: 0.5 * (F.dropout(w, 0.5) ** 2).sum()  # noqa: E731
    assert top_eigenvalue(loss, [w], iterations=5).value.item() == pytest.approx(4.0, rel=1e-6)


def test_inside_autocast():
    """Casts of parameters that an outer autocast caches do not become stale, inside or afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    loss = lambda: F.cross_entropy(model(x).float(), y)  # noqa: E731
    exact = top_eigenvalue(loss, model.parameters()).value.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        found = top_eigenvalue(loss, model.parameters()).value.item()
        assert_same_bits("output", model(x), before)
    assert found == pytest.approx(exact, rel=0.1)


def attention_loss():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
    head = nn.Linear(16, 5)
    x, y = torch.randn(8, 10, 16), torch.randint(5, (80,))
    return [*layer.parameters(), *head.parameters()], lambda: F.cross_entropy(head(layer(x)).flatten(0, 1), y)


def test_fused_attention():
    """The default works without double backward, and agrees with it under an attention that supports it."""
    params, loss = attention_loss()
    found = top_eigenvalue(loss, params, iterations=12).value.item()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = top_eigenvalue(loss, params, iterations=12, method="autograd").value.item()
    assert found == pytest.approx(exact, rel=2e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["wrapped", "in place", "function"])
def test_compiled(how):
    """A compiled model gives the plain one's result, its buffers are restored, and it compiles at most twice."""
    model, _ = noisy_model()
    model = nn.Sequential(model[0], model[1], model[3], model[5])
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    plain = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    expected = top_eigenvalue(plain, model.parameters()).value.item()
    if how == "wrapped":
        compiled = torch.compile(model, backend="aot_eager")
        loss = lambda: F.cross_entropy(compiled(x), y)  # noqa: E731
    elif how == "in place":
        model.compile(backend="aot_eager")
        loss = plain
    else:
        loss = torch.compile(plain, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        buffers = [b.clone() for b in model.buffers()]
        found = top_eigenvalue(loss, model.parameters()).value.item()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for _ in range(12):
            top_eigenvalue(loss, model.parameters(), iterations=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs
    assert found == pytest.approx(expected, rel=1e-3)
    for a, b in zip(model.buffers(), buffers, strict=True):
        assert_same_bits("buffer", a, b)
    torch._dynamo.reset()
