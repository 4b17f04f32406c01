"""Steps that a CUDA graph records: what must stand before, what raises, and what survives.

There is no graph here: the table is mirrored as on a GPU, and a flag says that a capture is under way. Graphs
themselves are in test_gpu.py.
"""

import pytest
import torch
from cases import assert_same_bits, make_params, set_grads

import fused_warmup as fw
from fused_warmup.optim import base, session
from fused_warmup.plan import device_buffers, gradients, groups, plan

SHAPES = [(4, 5), (3,), (7,)]


class Capture:
    """Says that a graph is captured inside ``with``."""

    def __init__(self) -> None:
        self.active = False

    def __call__(self, device: torch.device) -> bool:
        return self.active

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *error: object) -> None:
        self.active = False


@pytest.fixture
def capture(monkeypatch):
    state = Capture()
    for module in (gradients, groups, base, session, device_buffers, plan):
        monkeypatch.setattr(module, "is_capturing", state)
    monkeypatch.setattr(device_buffers, "is_mirrored", lambda device: True)
    return state


def made(steps=1, **options):
    params = make_params(torch.float32, SHAPES)
    opt = fw.Adam(params, lr=0.1, **options)
    for step in range(steps):
        fill_grads(params, step)
        opt.step()
    return params, opt


def fill_grads(params, step):
    """New gradients in the memory of the old ones."""
    held = [p.grad for p in params]
    set_grads(params, step)
    for param, grad in zip(params, held, strict=True):
        if grad is not None:
            param.grad = grad.copy_(param.grad)


def test_mirrored_table_trains_the_same(capture):
    """Addresses, hyper-parameters and schedules reach the copies, whatever changes between steps."""
    schedule = fw.schedules.warmup(3).then(fw.schedules.cosine(1.0, 0.1, 4))
    results = []
    for mirrored in (True, False):
        device_buffers.is_mirrored = lambda device, mirrored=mirrored: mirrored
        params = make_params(torch.bfloat16)
        opt = fw.Adam(params, lr=0.1, schedule=schedule, max_grad_norm=1.0, average=fw.EMA(0.9), amsgrad=True)
        for step in range(8):
            set_grads(params, step)
            if step == 3:
                params[1].grad = None
                opt.param_groups[0]["lr"] = 0.2
            if step == 5:
                opt.param_groups[0]["schedule"] = fw.schedules.constant(0.5)
            opt.step()
        results.append((params, opt))
    (params, opt), (others, plain) = results
    assert opt.session.plan.buffers.mirrored
    assert not plain.session.plan.buffers.mirrored
    for p, q in zip(params, others, strict=True):
        assert_same_bits("param", p, q)
        for name in ("exp_avg", "exp_avg_sq", "average"):
            assert_same_bits(name, opt.state[p][name], plain.state[q][name])
    assert_same_bits("telemetry", opt.telemetry.rows(), plain.telemetry.rows())


def test_init_state_makes_every_state_and_no_step(capture):
    params = make_params(torch.float32, SHAPES)
    before = [p.detach().clone() for p in params]
    opt = fw.Adam(params, amsgrad=True, average=fw.EMA(0.9))
    params[0].grad = torch.ones_like(params[0])
    opt.init_state()
    for p, old in zip(params, before, strict=True):
        assert_same_bits("param", p.detach(), old)
        assert set(opt.state[p]) == {
            "step",
            "exp_avg",
            "exp_avg_sq",
            "max_exp_avg_sq",
            "average",
            "n_averaged",
        }
        assert int(opt.state[p]["step"]) == 0
        assert not opt.state[p]["exp_avg"].any()
        assert_same_bits("average", opt.state[p]["average"], old)
    assert len(opt.telemetry) == 0


def test_init_state_then_step_is_a_first_step():
    results = []
    for early in (True, False):
        params = make_params(torch.float32, SHAPES)
        opt = fw.GIAdam(params, lr=0.1, max_grad_norm=1.0)
        if early:
            opt.init_state()
        for step in range(3):
            set_grads(params, step)
            opt.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert_same_bits("param", p, q)


def test_a_step_is_captured_after_init_state(capture):
    params = make_params(torch.float32, SHAPES)
    set_grads(params, 0)
    opt = fw.Adam(params, lr=0.1)
    opt.init_state()
    states = [opt.state[p]["exp_avg"] for p in params]
    with capture:
        opt.step()
    assert [opt.state[p]["exp_avg"] for p in params] == states
    assert opt.session.captured == [opt.session.plan]


CHANGES = {
    "a gradient moved": (
        lambda params, opt: setattr(params[1], "grad", params[1].grad.clone()),
        r"gradients must stay where they were .* for parameter 1\. Make one step before the capture",
    ),
    "a gradient is missing": (
        lambda params, opt: setattr(params[2], "grad", None),
        r"gradients must stay where they were .* for parameter 2\. Make one step before the capture",
    ),
    "a new group": (
        lambda params, opt: opt.add_param_group({"params": make_params(torch.float32, [(2,)])}),
        r"states and table must stand before a graph is captured, .* Call init_state\(\)",
    ),
    "a new state": (
        lambda params, opt: opt.param_groups[0].update(amsgrad=True),
        r"hyper-parameters must stay as they were",
    ),
    "a new average": (
        lambda params, opt: setattr(opt, "average", fw.EMA(0.9)),
        r"states and table must stand before a graph is captured",
    ),
    "a parameter moved": (
        lambda params, opt: setattr(params[0], "data", params[0].data.clone()),
        r"states and table must stand before a graph is captured",
    ),
    "another learning rate": (
        lambda params, opt: opt.param_groups[0].update(lr=0.5),
        r"hyper-parameters must stay as they were",
    ),
}


@pytest.mark.parametrize("schedule", [fw.schedules.warmup(9), fw.AutoWU(40, 10)], ids=["fixed", "adaptive"])
def test_a_schedule_of_any_kind_is_captured_after_a_step(capture, schedule):
    params, opt = made(0, schedule=schedule)
    fill_grads(params, 0)
    opt.record_loss(1.0)
    opt.step()
    with capture:
        opt.step()
    assert [float(opt.state[p]["step"]) for p in params] == [2.0] * 3


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_replay_would_not_see_raises(capture, change):
    """Nothing is changed by the refused step, and the same step runs when no graph is captured."""
    params, opt = made(2)
    act, message = CHANGES[change]
    act(params, opt)
    before = [p.detach().clone() for p in params]
    with capture, pytest.raises(RuntimeError, match=f"Adam: {message}"):
        opt.step()
    for p, old in zip(params, before, strict=True):
        assert_same_bits("param", p.detach(), old)
    assert len(opt.telemetry) == 2
    assert int(opt.state[params[0]]["step"]) == 2
    opt.step()
    assert len(opt.telemetry) == 3


def test_a_first_step_cannot_be_captured(capture):
    params = make_params(torch.float32, SHAPES)
    set_grads(params, 0)
    opt = fw.Adam(params)
    with capture, pytest.raises(RuntimeError, match=r"Adam: states and table must stand .* init_state\(\)"):
        opt.step()
    assert not opt.state


def test_a_captured_table_outlives_eager_steps(capture):
    """An eager step with other gradients gets a table of its own; the captured one stays as it was."""
    params, opt = made(2)
    with capture:
        opt.step()
    captured = opt.session.plan
    kept = {name: tensor.clone() for name, tensor in captured.buffers.tensors.items()}
    set_grads(params, 5)
    opt.step()
    assert opt.session.plan is not captured
    for name in ("rows", "grads", "chunks", "hypers"):
        assert torch.equal(captured.buffers.tensors[name], kept[name])
    # both tables speak of the same states, counts and telemetry
    assert opt.session.plan.record == captured.record
    assert [r.states for r in opt.session.plan.rows] == [r.states for r in captured.rows]


def test_hyper_parameters_reach_a_captured_table(capture):
    _, opt = made(2)
    with capture:
        opt.step()
    column = opt.session.plan.buffers.tensors["hypers"]
    address, before = column.data_ptr(), column.clone()
    opt.param_groups[0]["lr"] = 0.25
    opt.update_captured()
    assert opt.session.plan.buffers.tensors["hypers"].data_ptr() == address
    assert column.view(torch.float64)[0] == 0.25
    assert before.view(torch.float64)[0] == 0.1


def test_nothing_is_sent_while_a_graph_is_captured(capture):
    """Kernels that take the settings by address would read memory that is long gone."""
    _, opt = made(2)
    opt.session.plan.step_column()
    opt.max_grad_norm = 1.0
    with capture:
        opt.session.prepare(None, None)
        with pytest.raises(
            RuntimeError, match="table must stay as it is while a graph is captured, got other step"
        ):
            opt.session.plan.step_column()


def test_a_longer_schedule_leaves_the_old_one_in_memory(capture):
    """A graph that was captured before still reads it."""
    _, opt = made(2, schedule=fw.schedules.constant(0.5))
    with capture:
        opt.step()
    column = opt.session.plan.buffers.tensors["segments"]
    opt.param_groups[0]["schedule"] = fw.schedules.warmup(3).then(fw.schedules.constant(1.0))
    opt.update_captured()
    assert opt.session.plan.buffers.tensors["segments"] is not column
    assert any(held is column for held in opt.session.plan.buffers._replaced)


def test_loading_fills_the_captured_buffers(capture):
    params, opt = made(2, average=fw.EMA(0.9))
    with capture:
        opt.step()
    captured = opt.session.plan
    other_params, other = made(5, average=fw.EMA(0.9))
    other.param_groups[0]["lr"] = 0.3
    addresses = {name: t.data_ptr() for name, t in captured.record.items()}
    states = [opt.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq", "average", "step")]
    opt.load_state_dict(other.state_dict())
    assert states == [
        opt.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq", "average", "step")
    ]
    assert {name: t.data_ptr() for name, t in captured.record.items()} == addresses
    assert opt.session.counters is captured.record["counters"]
    assert opt.telemetry.ring_buffer is captured.record["ring_buffer"]
    for p, q in zip(params, other_params, strict=True):
        assert_same_bits("exp_avg", opt.state[p]["exp_avg"], other.state[q]["exp_avg"])
    assert captured.buffers.tensors["hypers"].view(torch.float64)[0] == 0.3


def replay(opt):
    """What a replay does: the kernels run, and the host does not know."""
    opt.session.backend.step(opt.session.plan)


def test_replayed_steps_leave_rows():
    """History holds replayed steps between and after eager ones, each once and in order."""
    params, opt = made(2)
    plain_params, plain = made(2)
    for step in range(2, 30):
        for parameters in (params, plain_params):
            fill_grads(parameters, step)
        plain.step()
        if step % 3:
            opt.session.prepare(None, None)
            replay(opt)
        else:
            opt.step()
        if step == 11:
            assert opt.telemetry.latest()["step"] == 12
    assert_same_bits("history", opt.telemetry.rows(), plain.telemetry.rows())


@pytest.mark.parametrize("cls", [fw.Adam, fw.AdamP])
@pytest.mark.parametrize("radius", [None, 3.0])
def test_a_sphere_is_captured(capture, cls, radius):
    """From the first step on; the norm stays where the graph reads it, and another radius reaches it."""
    runs = []
    for replays in (True, False):
        params = make_params(torch.float32, SHAPES)
        groups = [
            {"params": params[:1]},
            {"params": params[1:], "projection": "sphere", "radius": radius},
        ]
        opt = cls(groups, lr=0.1, average=fw.EMA(0.9))
        set_grads(params, 0)
        opt.init_state()
        norm = opt.param_groups[1]["norm"]
        if replays:
            with capture:
                opt.step()
        else:
            opt.step()
        for step in range(1, 6):
            fill_grads(params, step)
            if step == 4:
                opt.param_groups[1]["radius"] = 5.0
                opt.update_captured()
            replay(opt) if replays else opt.step()
        assert opt.param_groups[1]["norm"] is norm
        assert float(norm) == 5.0
        runs.append([t for p in params for t in (p.detach(), *opt.state[p].values())])
    for a, b in zip(*runs, strict=True):
        assert_same_bits("result", a, b)


def test_of_many_replays_the_page_is_left():
    params, opt = made(3)
    fill_grads(params, 1)
    opt.session.prepare(None, None)
    for _ in range(2000):
        replay(opt)
    steps = opt.telemetry.history()["step"].tolist()
    assert steps == list(range(2003 - 1024 + 1, 2004))
    fill_grads(params, 2)
    opt.step()
    assert opt.telemetry.history()["step"].tolist() == [*steps, 2004]


def test_pages_are_copied_while_steps_go_on():
    """More steps than two pages hold, without one reading."""
    _, opt = made(2500)
    assert opt.telemetry.history()["step"].tolist() == list(range(1, 2501))
    assert len(opt.telemetry) == 2500
