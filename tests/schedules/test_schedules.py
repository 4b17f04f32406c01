"""Schedules: values, joins, files, and the same training as LambdaLR."""

import math

import numpy as np
import pytest
import torch
from cases import BACKENDS, SCHEDULES, assert_same_bits, make_params, set_grads

import fused_warmup as fw
from fused_warmup import schedules as fs


def test_values_by_hand():
    assert fs.warmup(4).values(6).tolist() == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert fs.warmup(1)(0) == 1.0
    assert fs.warmup(2, 0.5).values(3).tolist() == [0.75, 1.0, 1.0]
    assert fs.constant(0.5, 2).values(4).tolist() == [0.5] * 4
    assert fs.linear(1.0, 0.0, 4).values(6).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert fs.cosine(1.0, 0.0, 2).values(3).tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-16)
    assert fs.exponential(1.0, 100.0, 2).values(4).tolist() == pytest.approx([1, 10, 100, 100])
    assert fs.polynomial(1.0, 0.0, 4, 2.0).values(5).tolist() == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    assert fs.inverse_sqrt(3.0)(9) == 0.5
    assert fs.table([3.0, 1.0, 2.0]).values(5).tolist() == [3.0, 1.0, 2.0, 2.0, 2.0]


def test_warmup_steps_of_the_paper():
    """The first update uses a T-th of the rate, update T the full rate, and T + 1 holds it."""
    s = fs.warmup(1000)
    assert [s(0), s(999), s(1000), s(5000)] == [1e-3, 1.0, 1.0, 1.0]


def test_join():
    s = fs.warmup(2).then(fs.constant(1.0, 3)).then(fs.linear(1.0, 0.0, 2))
    assert s.values(9).tolist() == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert len(s) == 7
    assert bool(fs.constant())
    with pytest.raises(TypeError, match="one that ends"):
        len(fs.constant())
    with pytest.raises(TypeError, match="one that ends"):
        len(fs.warmup(2).then(fs.inverse_sqrt(2.0)))


def test_torch_schedulers_agree():
    """Our polynomial and cosine equal those of torch."""
    for ours, make in [
        (fs.polynomial(1.0, 0.0, 10, 3.0), lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 10, 3.0)),
        (fs.cosine(1.0, 0.0, 10), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)),
    ]:
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make(opt)
        for t in range(11):
            assert ours(t) == pytest.approx(opt.param_groups[0]["lr"], abs=1e-12)
            opt.step()
            scheduler.step()


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "none"])
def test_json_round_trip(name):
    s = SCHEDULES[name]
    again = fs.from_json(s.to_json())
    assert again == s
    assert hash(again) == hash(s)
    assert again.values(100).tolist() == s.values(100).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "none"])
def test_lambda_lr_trains_the_same(name, backend):
    """``LambdaLR(opt, s)`` and ``schedule=s`` train the same, and the telemetry records the rate."""
    s = SCHEDULES[name]
    a, b = make_params(torch.float32, [(33,)]), make_params(torch.float32, [(33,)])
    fused = fw.Adam(a, lr=0.3, schedule=s, backend=backend)
    plain = fw.Adam(b, lr=0.3, backend=backend)
    scheduler = torch.optim.lr_scheduler.LambdaLR(plain, s)
    for step in range(80):
        for params, opt in ((a, fused), (b, plain)):
            set_grads(params, step)
            opt.step()
        assert fused.get_last_lr() == pytest.approx(plain.get_last_lr(), rel=1e-15)
        scheduler.step()
    expected = 0.3 * s.values(80)
    np.testing.assert_allclose(fused.telemetry.history()["lr"].numpy(), expected, rtol=1e-15)
    assert torch.allclose(a[0], b[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_drift_over_ten_thousand_steps(backend):
    """The schedule depends on the step count alone: after 10,000 steps it equals the closed form, without drift."""
    x = torch.nn.Parameter(torch.zeros(1))
    s = fs.warmup(300).then(fs.cosine(1.0, 0.0, 9_700))
    opt = fw.SGD([x], lr=0.1, schedule=s, backend=backend)
    x.grad = torch.zeros(1)
    for _ in range(10_000 if backend != "reference" else 500):
        opt.step()
    lr = opt.telemetry.history()["lr"]
    t = torch.arange(len(lr), dtype=torch.float64)
    closed = torch.where(t < 300, (t + 1) / 300, 0.5 * (1 + torch.cos(math.pi * (t - 300) / 9_700)))
    assert torch.allclose(lr, 0.1 * closed, rtol=0, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_have_their_own_schedules(backend):
    params = make_params(torch.float64, [(5,), (5,), (5,)])
    groups = [
        {"params": params[:1], "lr": 1.0, "schedule": fs.linear(1.0, 0.0, 4)},
        {"params": params[1:2], "lr": 2.0, "schedule": fs.table([0.5, 0.25])},
        {"params": params[2:], "lr": 3.0},
    ]
    opt = fw.SGD(groups, lr=9.0, backend=backend)
    seen = []
    for step in range(4):
        set_grads(params, step)
        before = [p.detach().clone() for p in params]
        opt.step()
        seen.append(opt.get_last_lr())
        for p, old, lr in zip(params, before, seen[-1], strict=True):
            assert torch.allclose(p, old - lr * p.grad, rtol=1e-14, atol=1e-14)
    assert seen == [[1.0, 1.0, 3.0], [0.75, 0.5, 3.0], [0.5, 0.5, 3.0], [0.25, 0.5, 3.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_decay_schedule(backend):
    """Decoupled: the decay of a step is lr(t) * wd(t) * param; coupled: g + wd(t) * param."""
    for decoupled in (True, False):
        x = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        opt = fw.Adam([x], lr=0.5, weight_decay=0.1, decoupled_weight_decay=decoupled,
                      weight_decay_schedule=fs.table([1.0, 0.0]), schedule=fs.constant(0.5), backend=backend)  # fmt: skip
        x.grad = torch.zeros_like(x)
        opt.step()
        if decoupled:
            assert x.item() == pytest.approx(2.0 * (1 - 0.25 * 0.1), rel=1e-15)
            opt.step()
            assert x.item() == pytest.approx(2.0 * (1 - 0.25 * 0.1), rel=1e-15)
        else:
            assert opt.state[x]["exp_avg"].item() == pytest.approx(0.1 * 0.2, rel=1e-14)
            opt.step()
            assert opt.state[x]["exp_avg"].item() == pytest.approx(0.9 * 0.1 * 0.2, rel=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_schedule_or_rate_takes_effect(backend):
    x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = fw.SGD([x], lr=1.0, backend=backend)
    rates = []
    for change in (
        {},
        {"lr": 0.5},
        {"schedule": fs.constant(0.5)},
        {"lr": torch.tensor(2.0)},
        {"schedule": None},
    ):
        opt.param_groups[0].update(change)
        x.grad = torch.ones_like(x)
        opt.step()
        rates.append(opt.get_last_lr()[0])
    opt.param_groups[0]["lr"].fill_(4.0)
    opt.step()
    assert [*rates, opt.get_last_lr()[0]] == [1.0, 0.5, 0.25, 1.0, 2.0, 4.0]


def test_plot_draws_the_values():
    axes = fs.warmup(4).then(fs.linear(1.0, 0.0, 6)).plot()
    assert axes.lines[0].get_ydata().tolist() == fs.warmup(4).then(fs.linear(1.0, 0.0, 6)).values(11).tolist()
    assert fs.constant().plot(3, ax=axes) is axes


def test_same_bits_from_one_schedule_object_or_two():
    a, b = make_params(torch.float32, [(9,)] * 2), make_params(torch.float32, [(9,)] * 2)
    one = fs.warmup(3).then(fs.cosine(1.0, 0.0, 9))
    opts = []
    for params, other in ((a, one), (b, fs.from_json(one.to_json()))):
        groups = [{"params": [params[0]], "schedule": one}, {"params": [params[1]], "schedule": other}]
        opts.append(fw.Adam(groups))
    for step in range(12):
        for params, opt in zip((a, b), opts, strict=True):
            set_grads(params, step)
            opt.step()
    for p, q in zip(a, b, strict=True):
        assert_same_bits("param", p, q)
