"""Hyper-parameters of the groups: what a change of them costs, and that it acts in the next step.

Some tests run once more by CUDA on the host in ``test_cuda_on_host.py``, by Triton in ``interpreted.py``.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import BACKENDS, every_backend, make_params, set_grads, tensors_of
from torch.optim import lr_scheduler

import fused_warmup as fw
from fused_warmup import schedules
from fused_warmup.optim import session
from fused_warmup.plan import device_buffers, groups

backend = every_backend
N = 6
# numbers that float32 holds exactly
LR, OTHER_LR = 0.125, 0.0625
BETAS, OTHER_BETAS = (0.875, 0.96875), (0.75, 0.9375)

# the same number in the kinds that users give
NUMBERS = {
    "float": float,
    "tensor": torch.tensor,
    "float64 tensor": lambda x: torch.tensor(x, dtype=torch.float64),
    "tensor of one": lambda x: torch.tensor([x]),
    "numpy": np.float32,
    "numpy float64": np.float64,
    "array": np.array,
    "fraction": Fraction,
}
PAIRS = {
    "tuple": tuple,
    "list": list,
    "tensors": lambda pair: tuple(map(torch.tensor, pair)),
    "list of tensors": lambda pair: list(map(torch.tensor, pair)),
    "numpy": lambda pair: tuple(map(np.float32, pair)),
    "tensor": torch.tensor,
    "array": np.array,
}
# each option with a value in some kind, made from a number or a pair
GIVEN = {
    **{("lr", kind): (make, LR, OTHER_LR) for kind, make in NUMBERS.items()},
    **{("weight_decay", kind): (make, 0.25, 0.5) for kind, make in NUMBERS.items()},
    **{("eps", kind): (make, 0.25, 0.5) for kind, make in NUMBERS.items()},
    **{("betas", kind): (make, BETAS, OTHER_BETAS) for kind, make in PAIRS.items()},
    ("amsgrad", "0 or 1"): (int, False, False),
    ("maximize", "0 or 1"): (int, False, True),
    ("maximize", "numpy"): (np.bool_, False, True),
}
given = pytest.mark.parametrize(("key", "kind"), list(GIVEN), ids=lambda x: x.replace(" ", "-"))


class Counts:
    """Groups that were validated, rows that were packed and columns that were sent since ``clear``."""

    def __init__(self):
        self.clear()

    def clear(self):
        self.made, self.packed, self.sent = 0, 0, []


@pytest.fixture
def counts(monkeypatch):
    """Counts of a table that is mirrored, as on a GPU."""
    counts = Counts()
    real_make, real_pack, reupload = (
        session.make_hyper,
        groups.pack_rows,
        device_buffers.DeviceBuffers.reupload,
    )

    def make(*args):
        counts.made += 1
        return real_make(*args)

    def pack(hypers, places, segments):
        counts.packed += len(hypers)
        return real_pack(hypers, places, segments)

    def send(self, name):
        counts.sent.append(name)
        reupload(self, name)

    monkeypatch.setattr(session, "make_hyper", make)
    monkeypatch.setattr(groups, "pack_rows", pack)
    monkeypatch.setattr(device_buffers.DeviceBuffers, "reupload", send)
    monkeypatch.setattr(device_buffers, "is_mirrored", lambda device: True)
    return counts


def made(cls=fw.Adam, options=lambda: {}, **common):
    """An optimizer of one small tensor per group after a step."""
    params = make_params(torch.float64, [(3,)] * N)
    opt = cls([{"params": [p], **options()} for p in params], **common)
    step(opt, 0)
    return opt


def step(opt, number):
    held = {p: p.grad for p in opt.session.params}
    set_grads(list(held), number)
    for param, grad in held.items():
        if grad is not None:
            param.grad = grad.copy_(param.grad)
    opt.step()


def costs(counts, opt, change=lambda t: None):
    """Return validated groups, packed rows and columns sent, besides the step, in each of three steps."""
    found = []
    for t in range(3):
        counts.clear()
        change(t)
        step(opt, 1 + t)
        sent = [name for name in counts.sent if name in ("hypers", "segments", "values", "spheres")]
        found.append((counts.made, counts.packed, sent))
    return found


NOTHING = [(0, 0, [])] * 3


@given
def test_values_that_stay_cost_nothing(counts, key, kind):
    make, start, _ = GIVEN[key, kind]
    opt = made(options=lambda: {key: make(start)})
    assert costs(counts, opt) == NOTHING


def test_a_tensor_shared_by_all_groups_costs_nothing(counts):
    assert costs(counts, made(lr=torch.tensor(LR))) == NOTHING


@given
def test_equal_values_in_new_objects_cost_nothing(counts, key, kind):
    make, start, _ = GIVEN[key, kind]
    opt = made(options=lambda: {key: make(start)})

    def renew(t):
        for group in opt.param_groups:
            group[key] = make(start)

    assert costs(counts, opt, renew) == NOTHING


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("which", [[2], range(N)], ids=["one", "all"])
def test_learning_rates_alone_are_not_validated_with_their_group(counts, kind, which):
    opt = made(options=lambda: {"lr": NUMBERS[kind](LR)})

    def change(t):
        for g in which:
            opt.param_groups[g]["lr"] = NUMBERS[kind](LR / 2**t / 2)

    assert costs(counts, opt, change) == [(0, 0, ["hypers"])] * 3
    assert opt.get_last_lr() == [LR / 8 if g in which else LR for g in range(N)]


@pytest.mark.parametrize("kind", ["tensor", "float64 tensor", "array"])
@pytest.mark.parametrize("which", [[2], range(N)], ids=["one", "all"])
def test_learning_rates_written_in_place(counts, kind, which):
    opt = made(options=lambda: {"lr": NUMBERS[kind](LR)})

    def change(t):
        for g in which:
            opt.param_groups[g]["lr"][...] = LR / 2**t / 2

    assert costs(counts, opt, change) == [(0, 0, ["hypers"])] * 3
    assert opt.get_last_lr() == [LR / 8 if g in which else LR for g in range(N)]


@pytest.mark.parametrize("key", ["weight_decay", "betas", "eps"])
@pytest.mark.parametrize("which", [[2], [0, 5], range(N)], ids=["one", "two", "all"])
def test_a_change_costs_the_groups_that_changed(counts, key, which):
    opt = made(schedule=schedules.warmup(4))

    def change(t):
        for g in which:
            opt.param_groups[g][key] = (0.5, 0.9 - t / 10) if key == "betas" else 0.25 + t

    assert costs(counts, opt, change) == [(len(which), len(which), ["hypers"])] * 3


def test_a_change_of_rates_in_some_groups_and_decay_in_others(counts):
    opt = made(lr=LR)

    def change(t):
        opt.param_groups[1]["lr"] = LR / (2 + t)
        opt.param_groups[4]["weight_decay"] = 0.25 + t

    assert costs(counts, opt, change) == [(1, 1, ["hypers"])] * 3
    assert opt.get_last_lr()[1] == LR / 4
    assert opt.session.plan.groups.rates[4].tolist() == [LR, 2.25]


def test_segments_are_packed_again_when_a_schedule_changed(counts):
    opt = made(schedule=schedules.warmup(4))

    def change(t):
        if t == 1:
            opt.param_groups[2]["schedule"] = schedules.constant(0.5)

    # hyper-parameters hold the addresses of the segments
    sent = ["segments", "hypers"]
    (first, second, third) = costs(counts, opt, change)
    assert (first, third) == ((0, 0, []),) * 2
    assert second[0] == 1
    assert [name for name in second[2] if name in sent] == sent
    assert [rate / 1e-3 for rate in opt.get_last_lr()] == [1.0, 1.0, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("cls", [fw.Adam, fw.SGD], ids=lambda cls: cls.__name__)
def test_schedulers_cost_the_values_that_they_change(counts, cls):
    """Cyclic momentum changes the betas or momentum of every group at every step."""
    opt = made(cls, **({"momentum": 0.9} if cls is fw.SGD else {}))
    rates = lr_scheduler.LambdaLR(opt, lambda t: 1 / (t + 1))
    step(opt, 9)
    assert costs(counts, opt, lambda t: rates.step()) == [(0, 0, ["hypers"])] * 3
    cycle = lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20)
    step(opt, 9)
    assert costs(counts, opt, lambda t: cycle.step()) == [(N, N, ["hypers"])] * 3


def test_spheres_are_sent_when_one_changed(counts):
    opt = made(projection="sphere", radius=2.0)

    def change(t):
        opt.param_groups[3]["eps" if t < 2 else "radius"] = 3.0 + t

    assert costs(counts, opt, change) == [(1, 1, ["hypers"])] * 2 + [(1, 1, ["hypers", "spheres"])]
    assert float(opt.param_groups[3]["norm"]) == 5.0


@pytest.mark.parametrize("backend", BACKENDS)
@given
def test_a_change_acts_in_the_next_step(key, kind, backend):
    """As in torch with plain values: the old value replaced, or written in place where its kind can be."""
    make, start, end = GIVEN[key, kind]
    params = make_params(torch.float64, [(4,), (2, 3)])
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = fw.Adam([{"params": [p], key: make(start)} for p in params], backend=backend)
    theirs = torch.optim.Adam([{"params": [p], key: start} for p in twins])
    values = [start, start, end, start, start, end]
    for t, value in enumerate(values):
        for opt in (ours, theirs):
            set_grads([p for group in opt.param_groups for p in group["params"]], t)
        if t > 0:
            held = ours.param_groups[1][key]
            in_place = t in (1, 2, 5) and write(held, value)
            if not in_place:
                ours.param_groups[1][key] = make(value)
            theirs.param_groups[1][key] = value
        ours.step()
        theirs.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q)


def write(held, value):
    """Write a value in place; return False for kinds that are replaced."""
    if isinstance(held, torch.Tensor):
        with torch.no_grad():
            held.copy_(torch.tensor(value).reshape(held.shape))
    elif isinstance(held, np.ndarray):
        held[...] = value
    elif isinstance(held, (list, tuple)) and isinstance(held[0], torch.Tensor):
        for one, x in zip(held, value, strict=True):
            one.fill_(x)
    elif isinstance(held, list):
        held[:] = value
    else:
        return False
    return True


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_value_is_named_at_each_step_and_changes_nothing(backend):
    """Of a tensor of many elements, which compares with nothing, as of a plain number."""
    params = make_params(torch.float64, [(3,), (3,)])
    opt = fw.Adam([{"params": [p]} for p in params], backend=backend)
    set_grads(params, 0)
    opt.step()
    before = [p.detach().clone() for p in params]
    for key, bad in (("lr", torch.ones(3)), ("eps", np.ones(3)), ("betas", torch.ones(2)), ("lr", -1.0)):
        good = opt.param_groups[1][key]
        opt.param_groups[0]["weight_decay"] = 0.5
        opt.param_groups[1][key] = bad
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=f"Adam: {key}"):
                opt.step()
        opt.param_groups[1][key] = good
        opt.param_groups[0]["weight_decay"] = 0.0
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    opt.step()
    assert not torch.equal(params[0], before[0])


# pairs whose numbers can be written in place
WRITABLE_PAIRS = {
    "tensors in a tuple": lambda: (torch.tensor(0.9), torch.tensor(0.99)),
    "arrays in a tuple": lambda: (np.array(0.9), np.array(0.99)),
    "tensors in a list": lambda: [torch.tensor(0.9), torch.tensor(0.99)],
}


@pytest.mark.parametrize("pair", WRITABLE_PAIRS)
@pytest.mark.parametrize("which", [0, 1])
def test_betas_written_in_place_inside_their_pair(pair, which, backend):
    """The next step takes them, as it would take another pair."""
    params = make_params(torch.float64, [(5,), (5,)])
    written, replaced = (
        fw.Adam([p], lr=0.1, betas=betas, backend=backend)
        for p, betas in zip(params, (WRITABLE_PAIRS[pair](), (0.9, 0.99)), strict=True)
    )
    for step in range(4):
        if step == 2:
            held = written.param_groups[0]["betas"][which]
            held.fill(0.5) if isinstance(held, np.ndarray) else held.fill_(0.5)
            replaced.param_groups[0]["betas"] = (0.5, 0.99) if which == 0 else (0.9, 0.5)
        set_grads(params, step)
        params[1].grad = params[0].grad.clone()
        written.step()
        replaced.step()
    for a, b in zip(tensors_of(written, params[:1])[1:], tensors_of(replaced, params[1:])[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)


def test_steps_without_any_group(backend):
    """They change nothing, as in torch; there is no rate to report, and the group that comes back goes on."""
    params = make_params(torch.float64, [(5,), (5,)])
    params[1].data.copy_(params[0])
    opt, other = fw.SGD(params[:1], lr=0.1, backend=backend), torch.optim.SGD(params[1:], lr=0.1)
    for both in (opt, other):
        held = both.param_groups
        for empty in (False, True, False, True):
            both.param_groups = [] if empty else held
            set_grads([p for g in both.param_groups for p in g["params"]], 0)
            both.step()
    torch.testing.assert_close(*params)
    assert np.array_equal(opt.telemetry.history()["lr"], [0.1, np.nan, 0.1, np.nan], equal_nan=True)
    assert opt.get_last_lr() == []
