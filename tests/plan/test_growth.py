"""Cost that grows with the work: rows that are filled, states that are checked and bytes that are written, counted.

Times are in ``benchmarks/results/growth.md``. Some tests run once more by CUDA on the host in ``test_cuda_on_host.py``.
"""

import copy
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from cases import BACKENDS, CASES, assert_same_bits, every_backend, make_params, set_grads

import fused_warmup as fw
from fused_warmup.optim import groups as group_rooms
from fused_warmup.optim import session as sessions
from fused_warmup.plan import address_cache, build, device_buffers
from fused_warmup.plan import plan as plans

# experts of several dtypes, one of two chunks, and one whose channels are sorted apart in memory
SHAPES = [(4, 5), (3,), (33000,), (2, 3, 5), (0, 2), ()]
# which experts have a gradient at each step: some for the first time, some again, one never
ROUTES = [[2], [], [0, 2], [4, 5], [0], [1, 2, 5], [0, 1, 2, 4, 5]]

backends = pytest.mark.parametrize("backend", BACKENDS)
backend = every_backend


@contextmanager
def counting(monkeypatch, owner, *names):
    """The number of calls of functions of a module inside the block, by name."""
    calls = dict.fromkeys(names, 0)
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(owner, name, counted(calls, name, getattr(owner, name)))
        yield calls


def counted(calls, name, function):
    def count(*args, **options):
        calls[name] += 1
        return function(*args, **options)

    return count


def experts():
    params = make_params(torch.float32, SHAPES)
    params[1].data = params[1].data.bfloat16()
    params[3].data = params[3].data.transpose(0, 2).contiguous().transpose(0, 2)
    return params


def route(params, step):
    set_grads(params, step)
    for i, param in enumerate(params):
        if i not in ROUTES[step]:
            param.grad = None


def check_late_gradients(case, backend, **options):
    """Experts that come one by one end with the bits of an optimizer that had a state for all of them."""
    here, there = experts(), experts()
    late, early = (case.make(params, backend=backend, **options) for params in (here, there))
    set_grads(there, 0)
    early.init_state()
    for step in range(len(ROUTES)):
        for params, opt in ((here, late), (there, early)):
            route(params, step)
            opt.step()
        for p, q in zip(here, there, strict=True):
            assert_same_bits("parameter", p, q)
            own, all_of_it = late.state.get(p, {}), early.state[q]
            for name, state in own.items():
                assert_same_bits(name, state, all_of_it[name])
    assert late.state[here[2]]["step"] == 4
    assert here[3] not in late.state
    for name, column in late.telemetry.history().items():
        assert_same_bits(name, column, early.telemetry.history()[name])


@pytest.mark.pairwise
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@backends
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_experts_that_come_late(case, backend, max_grad_norm):
    check_late_gradients(case, backend, max_grad_norm=max_grad_norm)


@pytest.mark.parametrize("name", ["adam", "lamb", "adamp"])
def test_experts_that_come_one_by_one(backend, name):
    """On backends that have no memory of their own for a row without states."""
    case = next(case for case in CASES if case.name == name)
    check_late_gradients(case, backend, max_grad_norm=0.5)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_first_gradient_fills_its_row_alone(monkeypatch, mirrored):
    monkeypatch.setattr(device_buffers, "is_mirrored", lambda device: mirrored)
    params = make_params(torch.float32, [(3,)] * 40)
    opt = fw.Adam(params)
    for param in params[::2]:
        param.grad = torch.ones(3)
    opt.step()
    plan, sent = opt.session.plan, []
    send = device_buffers.send
    monkeypatch.setattr(
        device_buffers, "send", lambda array, device: sent.append(array.nbytes) or send(array, device)
    )
    with counting(monkeypatch, build, "allocate_state", "find_rows", "checked_counts") as calls:
        for i in range(5):
            params[2 * i + 1].grad = torch.ones(3)
            opt.step()
    assert calls == {"allocate_state": 5, "find_rows": 0, "checked_counts": 0}
    assert opt.session.plan is plan
    assert sum(sent) == (5 * (plan._columns.itemsize + 8) if mirrored else 0)
    assert [int(opt.state[p]["step"]) for p in params if p in opt.state] == [
        *[6, 5, 6, 4, 6, 3, 6, 2, 6, 1],
        *[6] * 15,
    ]


@backends
@pytest.mark.parametrize("what", ["parameter", "state"])
def test_what_moved_is_followed_without_a_rebuild(monkeypatch, backend, what):
    (here, opt), (there, twin) = (
        (params, fw.Adam(params, lr=0.1, backend=backend)) for params in (experts(), experts())
    )
    for step in range(3):
        for params, each in ((here, opt), (there, twin)):
            set_grads(params, step)
            each.step()
        plan = opt.session.plan
        moved = here[2] if what == "parameter" else opt.state[here[2]]["exp_avg"]
        moved.data = moved.detach().clone()
        del moved
    for params, each in ((here, opt), (there, twin)):
        set_grads(params, 3)
        each.step()
    assert opt.session.plan is plan
    for p, q in zip(here, there, strict=True):
        assert_same_bits("parameter", p, q)


@backends
def test_a_new_group_makes_its_own_rows_and_hyper_parameters(monkeypatch, backend):
    params = make_params(torch.float32, [(3,)] * 30)
    set_grads(params, 0)
    opt = fw.Adam([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(params[:20])], backend=backend)
    opt.step()
    with (
        counting(monkeypatch, build, "allocate_state", "checked_counts") as calls,
        counting(monkeypatch, sessions, "make_hyper") as made,
    ):
        for param in params[20:]:
            opt.add_param_group({"params": [param], "lr": 0.5})
            opt.step()
    assert calls == {"allocate_state": 10, "checked_counts": 0}
    assert made == {"make_hyper": 10}
    assert [int(opt.state[p]["step"]) for p in params] == [11] * 20 + list(range(10, 0, -1))


@backends
@pytest.mark.parametrize("average", [None, fw.EMA(0.9)])
def test_the_step_after_a_load_checks_no_state_again(monkeypatch, backend, average):
    params = experts()
    opt = fw.Adam(params, backend=backend, average=average)
    set_grads(params, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    opt.step()
    opt.load_state_dict(saved)
    with counting(monkeypatch, build, "allocate_state", "checked_counts", "checked_state") as calls:
        opt.step()
    assert calls == {"allocate_state": 0, "checked_counts": 0, "checked_state": 0}
    assert [int(opt.state[p]["step"]) for p in params] == [2] * len(params)


@backends
def test_states_that_were_replaced_after_a_load_are_used(backend):
    """Taken over from the table before are only states that the optimizer still has."""
    (here, opt), (there, twin) = (
        (p, fw.SGD(p, lr=0.1, momentum=0.9, backend=backend)) for p in (experts(), experts())
    )
    for params, each in ((here, opt), (there, twin)):
        set_grads(params, 0)
        each.step()
        each.load_state_dict(each.state_dict())
    for state in twin.state.values():
        state["momentum_buffer"].fill_(2.0)
    opt.state = {
        p: {**s, "momentum_buffer": torch.full_like(s["momentum_buffer"], 2.0)} for p, s in opt.state.items()
    }
    for each in (opt, twin):
        each.step()
    for p, q in zip(here, there, strict=True):
        assert_same_bits("parameter", p, q)


def bytes_of(cls, n, **options):
    params = make_params(torch.float32, [(3,)] * n)
    set_grads(params, 0)
    opt = cls(params, **options)
    opt.step()
    return len(pickle.dumps(opt))


def test_a_pickle_grows_as_that_of_torch():
    """Telemetry is a constant; a tensor that were a view of a buffer of all would be written with all of it."""
    ours, theirs = ([bytes_of(cls, n) for n in (200, 400, 800)] for cls in (fw.Adam, torch.optim.Adam))
    for a, b, c, d in zip(ours, ours[1:], theirs, theirs[1:], strict=False):
        assert b - a <= 1.2 * (d - c)


def test_frozen_parameters_cost_no_chunk_and_train_once_they_have_a_gradient():
    params = make_params(torch.float32, [(3,), (4,), (5,)])
    params[1].requires_grad_(False)
    opt = fw.SGD(params, lr=1.0)
    params[0].grad = torch.ones(3)
    opt.step()
    assert [row.index for row in opt.session.plan.rows] == [0, 2]
    before = params[1].clone()
    params[1].grad = torch.ones(4)
    opt.step()
    assert torch.equal(params[1], before - 1.0)
    assert [row.index for row in opt.session.plan.rows] == [0, 1, 2]


def test_a_parameter_that_no_backend_takes_is_refused_with_its_first_gradient_only():
    whole, odd = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    opt = fw.Adam([whole, odd])
    whole.grad = torch.ones(3)
    odd.data = torch.ones(3, dtype=torch.complex64)
    opt.step()
    assert int(opt.state[whole]["step"]) == 1
    odd.grad = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"parameter 1 .*must be float32"):
        opt.step()
    assert int(opt.state[whole]["step"]) == 1
    assert group_rooms.unique_params("Adam", [whole, odd]) == [whole, odd]


# parameters without a gradient that a step must find where they are
MOVED = {
    "alone": {},
    "averaged": {"average": fw.EMA(0.5)},
    "on a sphere": {"projection": "sphere"},
}


@backends
@pytest.mark.parametrize("reader", ["compiled", "python"])
@pytest.mark.parametrize("options", MOVED)
def test_parameters_that_moved_while_they_had_no_gradient(monkeypatch, backend, reader, options):
    """One takes the memory that another has left; the twins stay in place."""
    if reader == "python":
        monkeypatch.setattr(plans, "select_reader", lambda: address_cache.PYTHON_READER)
    both = []
    for _ in range(2):
        params = make_params(torch.float32, [(5,), (5,), (5,)])
        opt = fw.Adam(params, lr=0.1, backend=backend, **MOVED[options])
        set_grads(params, 0)
        opt.step()
        both.append((params, opt))
    moved = both[0][0]
    old = moved[1].data
    moved[1].data = old.clone()
    old.copy_(moved[0].data)
    moved[0].data = old
    for given in ([2], [0], [0, 2], [1], [0, 1, 2]):
        for params, opt in both:
            set_grads(params, len(given))
            for i in {0, 1, 2} - set(given):
                params[i].grad = None
            opt.step()
        for p, q in zip(*(params for params, _ in both), strict=True):
            assert_same_bits("parameter", p, q)
        if options == "averaged":
            for p, q in zip(*(params for params, _ in both), strict=True):
                averages = both[0][1].state[p]["average"], both[1][1].state[q]["average"]
                assert_same_bits("average", *averages)


@pytest.mark.parametrize("reader", ["compiled", "python"])
def test_parameters_without_a_gradient_are_not_read(reader):
    readers = {"compiled": address_cache.select_reader(), "python": address_cache.PYTHON_READER}
    tensors = [torch.zeros(2) for _ in range(3)]
    cache = address_cache.AddressCache(readers[reader].signatures, tensors)
    tensors[1].data = torch.zeros(2)
    among = np.array([1, 0, 1], np.uint64)
    assert cache.find_moved(among.ctypes.data).tolist() == []
    assert cache.find_moved().tolist() == [1]
    cache.accept()
    tensors[2].data, tensors[1].data = tensors[1].data, torch.zeros(2)
    assert cache.find_moved(among.ctypes.data).tolist() == [1, 2]


@backends
def test_a_parameter_of_another_dtype_with_its_gradient(backend):
    params = make_params(torch.float32, [(5,), (5,)])
    opt = fw.SGD(params, lr=0.5, backend=backend)
    set_grads(params, 0)
    opt.step()
    params[0].data = torch.ones(5, dtype=torch.float64)
    params[0].grad = torch.ones(5, dtype=torch.float64)
    opt.step()
    assert params[0].dtype is torch.float64
    assert params[0].tolist() == [0.5] * 5
