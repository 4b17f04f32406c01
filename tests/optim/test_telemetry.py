"""The record of the steps: fields, pages, files, and that keeping it changes nothing."""

import csv
import math

import pytest
import torch
from cases import BACKENDS, assert_same_bits, make_params, set_grads

import fused_warmup as fw
from fused_warmup import schedules
from fused_warmup.plan.structs import TELEMETRY


@pytest.mark.parametrize("backend", BACKENDS)
def test_fields(backend):
    params = make_params(torch.float32, [(7, 3), (), (0,), (40_000,)])
    opt = fw.RAdam(params, lr=0.5, schedule=schedules.warmup(4), max_grad_norm=1.5, backend=backend)
    for step in range(8):
        set_grads(params, step)
        if step != 3:
            opt.record_loss(torch.tensor(float(step), requires_grad=True) if step % 2 else float(step))
        opt.step()
    history = opt.telemetry.history()
    assert tuple(history) == TELEMETRY
    assert all(value.dtype == torch.float64 and value.shape == (8,) for value in history.values())
    assert history["step"].tolist() == list(range(1, 9))
    assert history["lr"].tolist() == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5]
    grads = [p.grad.double() for p in params]
    assert history["grad_norm"][-1].item() == pytest.approx(
        math.sqrt(sum(float(g.square().sum()) for g in grads))
    )
    assert history["grad_norm_l1"][-1].item() == pytest.approx(sum(float(g.abs().sum()) for g in grads))
    expected = (1.5 / (history["grad_norm"] + 1e-6)).clamp(max=1.0)
    assert torch.allclose(history["clip_coef"], expected, rtol=1e-15, atol=0)
    assert history["rect"][:5].tolist() == [0.0] * 5
    assert history["rect"][5].item() == pytest.approx(0.025821, abs=1e-6)
    assert history["loss"][:3].tolist() == [0.0, 1.0, 2.0]
    assert math.isnan(history["loss"][3])
    assert history["sharpness"].isnan().all()
    assert not history["skipped"].any()
    assert opt.telemetry.latest() == {name: value[-1].item() for name, value in history.items()} | {
        "sharpness": pytest.approx(math.nan, nan_ok=True)
    }


@pytest.mark.parametrize("steps", [0, 1, 1023, 1024, 1025, 2048, 2500])
def test_pages(steps):
    """The history is whole when pages fill, at every boundary."""
    x = torch.nn.Parameter(torch.zeros(1))
    opt = fw.SGD([x], lr=0.1)
    x.grad = torch.zeros(1)
    for step in range(steps):
        opt.record_loss(float(step))
        opt.step()
    history = opt.telemetry.history()
    assert len(opt.telemetry) == steps
    assert history["loss"].tolist() == list(range(steps))
    assert history["step"].tolist() == list(range(1, steps + 1))
    if steps:
        assert opt.telemetry.latest()["loss"] == steps - 1
    else:
        with pytest.raises(RuntimeError, match="must follow a step"):
            opt.telemetry.latest()


def test_csv(tmp_path):
    params = make_params(torch.float32, [(5,)])
    opt = fw.Adam(params)
    for step in range(3):
        set_grads(params, step)
        opt.step()
    opt.telemetry.to_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(TELEMETRY)
    history = opt.telemetry.history()
    assert [float(row["grad_norm"]) for row in rows] == history["grad_norm"].tolist()


@pytest.mark.parametrize("clip", [None, 0.5])
def test_off_changes_nothing_else(clip):
    a, b = make_params(torch.float32), make_params(torch.float32)
    on, off = (fw.Adam(p, max_grad_norm=clip, telemetry=t) for p, t in ((a, True), (b, False)))
    for step in range(5):
        for params, opt in ((a, on), (b, off)):
            set_grads(params, step)
            opt.record_loss(1.0)
            opt.step()
    for p, q in zip(a, b, strict=True):
        assert_same_bits("param", p, q)
    assert len(off.telemetry) == 0
    assert off.telemetry.history()["lr"].shape == (0,)
    assert off.get_last_lr() == on.get_last_lr()


def test_loss_of_the_closure_is_recorded():
    x = torch.nn.Parameter(torch.tensor([3.0]))
    opt = fw.SGD([x], lr=0.1)

    def closure():
        opt.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 9.0
    assert opt.telemetry.latest()["loss"] == 9.0


def test_step_without_any_gradient_counts():
    """Schedules move on, as they do with a torch scheduler; no parameter does."""
    x = torch.nn.Parameter(torch.ones(2))
    opt = fw.Adam([x], schedule=schedules.linear(1.0, 0.0, 4), lr=1.0)
    opt.step()
    opt.step()
    assert opt.telemetry.history()["lr"].tolist() == [1.0, 0.75]
    assert opt.telemetry.history()["grad_norm"].tolist() == [0.0, 0.0]
    assert x.tolist() == [1.0, 1.0]
    assert not opt.state


def test_looking_at_every_step_keeps_few_tensors():
    """And looking again without a step between keeps none."""
    x = torch.nn.Parameter(torch.zeros(3))
    opt = fw.SGD([x])
    for step in range(1, 2101):
        x.grad = torch.ones(3)
        opt.step()
        assert opt.telemetry.latest()["step"] == opt.telemetry.latest()["step"] == step
    assert len(opt.telemetry._rows) < 1025
    assert opt.telemetry.history()["step"].tolist() == list(range(1, 2101))
    before = len(opt.telemetry._rows)
    opt.telemetry.latest()
    assert len(opt.telemetry._rows) == before
