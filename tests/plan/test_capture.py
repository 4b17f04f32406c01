"""Steps that a CUDA graph records: what must stand before, what raises, and what survives.

The table is mirrored as on a GPU, a flag says that a capture is under way, and ``graphs.py`` records and replays
what a CUDA graph would. Graphs of a device are in test_gpu.py.
"""

import copy
import warnings

import cuda_on_host
import pytest
import torch
from cases import assert_same_bits, make_params, set_grads
from graphs import ASKING, Capture, Recorder

import fused_warmup as fw
from fused_warmup.backends.native import CpuBackend, CudaBackend
from fused_warmup.optim import session
from fused_warmup.plan import captured, device_buffers

SHAPES = [(4, 5), (3,), (7,)]


@pytest.fixture
def capture(monkeypatch):
    state = Capture()
    for module in ASKING:
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


def test_eager_steps_leave_a_captured_table_as_it_is(capture):
    """Also with other gradients, whose addresses are not those of the graph."""
    params, opt = made(2)
    with capture:
        opt.step()
    table = opt.session.plan
    kept = {name: tensor.clone() for name, tensor in table.buffers.tensors.items()}
    set_grads(params, 5)
    opt.step()
    assert opt.session.plan is table
    for name in ("rows", "chunks", "hypers"):
        assert torch.equal(table.buffers.tensors[name], kept[name])


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


# graphs: a replay reads the arguments of its launches, and the memory that they point to


@pytest.fixture(params=["cpu", "cuda", "cuda, addresses copied"])
def recorder(request, capture, monkeypatch):
    """Records the launches of every optimizer that is made."""
    recorder = Recorder(capture)
    if request.param == "cpu":
        backend = CpuBackend()
        monkeypatch.setattr(backend, "_cpu", recorder.compiled(backend._cpu))
    else:
        most = {} if request.param == "cuda" else {"MAX_CAPTURED_POINTERS": 2}
        backend = CudaBackend(recorder.compiled(cuda_on_host.cached(), **most))
    monkeypatch.setattr(session, "resolve", lambda name, device: backend)
    return recorder


class Training:
    """A small network, its optimizer and batches in the same memory."""

    def __init__(self, make=fw.Adam, **options):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
        self.x, self.y = torch.zeros(5, 4), torch.zeros(5, 2)
        self.opt = make(self.model.parameters(), **{"lr": 0.1, **options})

    def load(self, step):
        generator = torch.Generator().manual_seed(step)
        self.x.copy_(torch.randn(5, 4, generator=generator))
        self.y.copy_(torch.randn(5, 2, generator=generator))

    def backward(self):
        loss = (self.model(self.x) - self.y).square().mean()
        loss.backward()

    def step(self, step):
        """As a loop without graphs does."""
        self.load(step)
        self.opt.zero_grad(set_to_none=True)
        self.backward()
        self.opt.step()

    def captured(self, recorder):
        """Record as torch's documentation does: gradients are allocated while the graph is captured."""
        self.opt.zero_grad(set_to_none=True)
        with recorder.graph() as graph:
            self.backward()
            self.opt.step()
        return graph

    def replay(self, graph, step):
        self.load(step)
        graph.replay()


def assert_same_training(a, b):
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert_same_bits("param", p, q)
        for name, value in a.opt.state[p].items():
            assert_same_bits(name, value, b.opt.state[q][name])
    assert_same_bits("telemetry", a.opt.telemetry.rows(), b.opt.telemetry.rows())
    assert a.opt.get_last_lr() == b.opt.get_last_lr()


@pytest.mark.parametrize("make", [fw.Adam, fw.LAMB])
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.5, "average": fw.EMA(0.9)}], ids=["plain", "clip"]
)
def test_the_pattern_of_torch(recorder, make, options):
    """Eager steps, a capture that allocates its gradients, replays, eager steps between them."""
    eager, training = Training(make, **options), Training(make, **options)
    for step in range(3):
        training.step(step)
    graph = training.captured(recorder)
    for step in range(3, 12):
        training.step(step) if step in (6, 7) else training.replay(graph, step)
    for step in range(12):
        eager.step(step)
    assert_same_training(training, eager)


def test_several_graphs_with_gradients_of_their_own(recorder):
    eager, training = Training(), Training()
    training.step(0)
    graphs = [training.captured(recorder) for _ in range(3)]
    for step in range(1, 10):
        training.replay(graphs[step % 3], step)
        eager.step(step - 1)
    eager.step(9)
    assert_same_training(training, eager)


def test_a_graph_of_some_gradients(recorder):
    """A parameter without a gradient at the capture stays as it is in replays."""
    eager, training = Training(), Training()
    for one in (eager, training):
        one.step(0)
        one.model[0].requires_grad_(False)
    graph = training.captured(recorder)
    for step in range(1, 4):
        training.replay(graph, step)
        eager.step(step)
    assert_same_training(training, eager)


def test_gradients_that_moved_before_the_capture(recorder):
    eager, training = Training(), Training()
    training.step(0)
    for p in training.model.parameters():
        p.grad = p.grad.clone()
    with recorder.graph() as graph:
        training.opt.zero_grad(set_to_none=False)
        training.backward()
        training.opt.step()
    for step in range(1, 4):
        training.replay(graph, step)
    for step in range(4):
        eager.step(step)
    assert_same_training(training, eager)


LATER_SCHEDULES = {
    "more segments": (
        fw.schedules.constant(0.5),
        fw.schedules.warmup(3).then(fw.schedules.constant(1.0)),
    ),
    "fewer segments": (
        fw.schedules.warmup(3).then(fw.schedules.cosine(1.0, 0.5, 9)),
        fw.schedules.constant(0.25),
    ),
    "none": (fw.schedules.constant(0.5), None),
    "the first one": (None, fw.schedules.warmup(20)),
    "a table": (fw.schedules.constant(0.5), fw.schedules.table([0.1 * i for i in range(99)])),
    "another table": (fw.schedules.table([0.5, 0.25]), fw.schedules.table([0.1 * i for i in range(99)])),
}


@pytest.mark.parametrize("how", ["groups", "loaded"])
@pytest.mark.parametrize("change", LATER_SCHEDULES)
def test_a_graph_follows_another_schedule(recorder, change, how):
    """Of the learning rate and the weight decay, whatever the number of their segments."""
    first, second = LATER_SCHEDULES[change]
    options = {"schedule": first, "weight_decay_schedule": first, "weight_decay": 0.1}
    eager, training = Training(fw.AdamW, **options), Training(fw.AdamW, **options)
    training.step(0)
    eager.step(0)
    graph = training.captured(recorder)
    for step in range(1, 4):
        training.replay(graph, step)
        eager.step(step)
    for one in (eager, training):
        one.opt.zero_grad(set_to_none=True)
        later = {"schedule": second, "weight_decay_schedule": second}
        if how == "groups":
            one.opt.param_groups[0].update(later)
        else:
            saved = copy.deepcopy(one.opt.state_dict())
            saved["param_groups"][0].update(later)
            with warnings.catch_warnings():
                # of the other schedule
                warnings.simplefilter("ignore")
                one.opt.load_state_dict(saved)
    if how == "groups":
        training.opt.update_captured()
    for step in range(4, 9):
        training.replay(graph, step)
        eager.step(step)
    assert_same_training(training, eager)


OTHERS = {
    "a group": lambda opt: opt.add_param_group({"params": make_params(torch.float32, [(2,)])}),
    "a state": lambda opt: opt.param_groups[0].update(amsgrad=True),
    "a sphere": lambda opt: opt.param_groups[0].update(projection="sphere"),
    "a norm to clip to": lambda opt: setattr(opt, "max_grad_norm", 1e-3),
    "a policy": lambda opt: setattr(opt, "nonfinite", "skip"),
    "an average": lambda opt: setattr(opt, "average", fw.EMA(0.5)),
}


@pytest.mark.parametrize("change", OTHERS)
def test_a_graph_goes_on_as_captured(recorder, change):
    """What a replay cannot follow changes nothing in it, and is said."""
    eager, training = Training(max_grad_norm=1.0), Training(max_grad_norm=1.0)
    training.step(0)
    graph = training.captured(recorder)
    saved = training.opt.state_dict()
    OTHERS[change](training.opt)
    message = r"Adam: {} must find the groups, states, projection, .* of the graph captured last, got others"
    with pytest.raises(RuntimeError, match=message.format(r"update_captured\(\)")):
        training.opt.update_captured()
    if change in ("a norm to clip to", "a policy", "an average"):
        with pytest.warns(UserWarning, match=message.format("load_state_dict")):
            training.opt.load_state_dict(saved)
    for step in range(1, 5):
        training.replay(graph, step)
    for step in range(5):
        eager.step(step)
    for p, q in zip(training.model.parameters(), eager.model.parameters(), strict=True):
        assert_same_bits("param", p, q)


def test_eager_steps_with_other_options_leave_the_graph_alone(recorder):
    """An eager step in between that does not clip, and replays that do."""
    eager, training = Training(max_grad_norm=0.1), Training(max_grad_norm=0.1)
    training.step(0)
    eager.step(0)
    graph = training.captured(recorder)
    for step in range(1, 7):
        norm = 0.1 if step % 2 else None
        eager.opt.max_grad_norm = norm
        eager.step(step)
        if step % 2:
            training.replay(graph, step)
        else:
            training.opt.max_grad_norm = norm
            training.step(step)
    assert_same_training(training, eager)


def test_captures_that_follow_one_another(recorder):
    """The bytes of each are held for its replays; eager steps and init_state() make room."""
    training = Training()
    training.step(0)
    copied = training.opt.session.backend.max_captured_pointers < 4
    graphs = [training.captured(recorder) for _ in range(captured.ROOM)]
    if copied:
        with pytest.raises(RuntimeError, match="at most 8 graphs must be captured without an eager step"):
            training.captured(recorder)
    training.step(1)
    graphs += [training.captured(recorder) for _ in range(2)]
    eager = Training()
    for step in range(2):
        eager.step(step)
    for step, graph in enumerate(graphs, 2):
        training.replay(graph, step)
        eager.step(step)
    assert_same_training(training, eager)


def test_gradients_of_another_dtype_are_not_captured(capture):
    """The refused step changes nothing, and the next eager step reads them as they are."""
    runs = []
    for refused in (True, False):
        params = make_params(torch.bfloat16, SHAPES)
        opt = fw.Adam(params, lr=0.1)
        set_grads(params, 0)
        opt.step()
        for p in params:
            p.grad_dtype = None
            p.grad = p.grad.float()
        if refused:
            with (
                capture,
                pytest.raises(RuntimeError, match="Adam: gradients must have the dtypes of the step before"),
            ):
                opt.step()
        opt.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert_same_bits("param", p, q)
