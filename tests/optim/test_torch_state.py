"""What torch's own tests ask of states: their files, entries of the user, and values that come from outside."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, SCHEDULES, Case, assert_same_bits, through_file
from peers import (
    CLASSES,
    TORCH_CASES,
    assert_same_params,
    each_backend,
    each_case,
    each_class,
    each_torch_case,
    members,
    peer_of,
    small,
    snapshot,
    walk,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import fused_warmup as fw

pytestmark = pytest.mark.pairwise


def moments(opt: Optimizer, param: Tensor) -> list[str]:
    """Return the names of the states that are shaped like the parameter."""
    return [name for name, value in opt.state[param].items() if name != "step" and isinstance(value, Tensor)]


# what a state dict holds


@each_torch_case
@each_backend
@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
def test_the_structure_is_that_of_torch(case: Case, backend: str, named: bool) -> None:
    """Ours may keep a count where torch keeps none, and more hyper-parameters."""

    def saved(make: Callable[[Any], Optimizer]) -> dict[str, Any]:
        params = small(torch.float32)
        given = [(f"layer.{i}", p) for i, p in enumerate(params)] if named else params
        opt = make([{"params": given[1:], "lr": 0.5}, {"params": given[:1]}])
        walk(opt, range(3))
        return opt.state_dict()

    mine = saved(lambda groups: case.make(groups, backend=backend))
    theirs = saved(lambda groups: peer_of(case, groups))
    assert list(theirs) == list(mine)[:2] == ["state", "param_groups"]
    assert list(mine["state"]) == [0, 1, 2]
    assert set(theirs["state"]) <= set(mine["state"])
    for key, entries in mine["state"].items():
        wanted = theirs["state"].get(key, {})
        assert set(wanted) <= set(entries) <= {*wanted, "step"}
        for name, value in wanted.items():
            assert (entries[name].dtype, entries[name].shape) == (value.dtype, value.shape)
            assert type(entries[name]) is Tensor
            torch.testing.assert_close(entries[name], value, rtol=4e-6, atol=4e-6)
    for got, wanted in zip(mine["param_groups"], theirs["param_groups"], strict=True):
        assert set(wanted) <= set(got)
        assert {k: got[k] for k in ("params", "lr")} == {k: wanted[k] for k in ("params", "lr")}
        assert got.get("param_names") == wanted.get("param_names")


@each_class
def test_names_of_parameters_travel_as_in_torch(case: Case) -> None:
    """Those of the file win; without any, those of the optimizer stay."""

    def names(make: Callable[[Any], Optimizer]) -> list[Any]:
        params, seen = small(), []
        given = {end: make([(f"{end}{i}", p) for i, p in enumerate(params)]) for end in "ab"}
        given["plain"] = make(params)
        for source, target in (("a", "b"), ("plain", "b"), ("b", "plain")):
            opt = given[target]
            opt.load_state_dict(given[source].state_dict())
            seen += [opt.param_groups[0].get("param_names"), opt.state_dict()["param_groups"][0]["params"]]
        return seen

    wanted = names(lambda params: torch.optim.SGD(params, lr=0.1))
    assert wanted[0] == ["a0", "a1", "a2"]
    assert names(case.make) == wanted


def foreign_entries() -> dict[str, Any]:
    """Return entries that no rule knows."""
    return {
        "my_tensor": torch.arange(3.0, dtype=torch.float64),
        "my_half": torch.arange(3.0, dtype=torch.float16),
        "my_count": torch.tensor(5),
        "my_flags": torch.tensor([True, False]),
        "my_int": 3,
        "my_float": 0.5,
        "my_none": None,
        "my_dict": {
            "inner": torch.ones(2, dtype=torch.float64),
            "step": torch.tensor(2),
            "n": 1,
            "d": {"e": 2},
        },
        "my_list": [torch.ones(1, dtype=torch.float64), 2, [3]],
        "my_tuple": (1, torch.tensor(2)),
    }


def kinds(value: Any) -> Any:
    """Return a value with the types and dtypes of all its parts."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: kinds(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [kinds(part) for part in value]
    return type(value).__name__, value


COPIES: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda saved: saved,
    "deepcopy": copy.deepcopy,
    "pickle": lambda saved: pickle.loads(pickle.dumps(saved)),
    "file": through_file,
}


@each_class
@each_backend
@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("as it is", torch.float32),
        ("deepcopy", torch.float64),
        ("pickle", torch.bfloat16),
        ("file", torch.float16),
    ],
)
def test_entries_that_nobody_knows_are_carried_as_in_torch(
    case: Case, backend: str, how: str, dtype: torch.dtype
) -> None:
    """Into the file, and out of it into a fresh optimizer whose parameters have another dtype."""

    def carried(make: Callable[[Any], Optimizer]) -> Any:
        first = make(small(torch.float32))
        walk(first, range(2))
        first.state[members(first)[1]].update(foreign_entries())
        first.state["global"] = {"of all": [1, torch.ones(1)]}
        first.param_groups[0]["my_option"] = [1, {"a": 2}]
        walk(first, range(2, 3))
        saved = COPIES[how](first.state_dict())
        second = make(small(dtype))
        second.load_state_dict(saved)
        walk(second, range(3, 5))
        third = second.state_dict()
        mine = [second.state[p] for p in members(second)]
        seen = [
            saved["state"][1],
            *mine,
            third["state"][1],
            {"global": saved["state"]["global"]},
            {"global": second.state["global"]},
            {"global": third["state"]["global"]},
            {"my_option": second.param_groups[0]["my_option"]},
        ]
        return [
            {k: kinds(v) for k, v in entries.items() if k.startswith(("my_", "global"))} for entries in seen
        ]

    wanted = carried(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    # as torch casts: what has a floating-point parameter gets its dtype, whatever it had, a "step" excepted
    assert wanted[2]["my_count"] == (str(dtype), 5.0)
    assert wanted[2]["my_dict"]["step"] == ("torch.int64", 2)
    assert carried(lambda params: case.make(params, backend=backend)) == wanted


@each_class
@each_backend
def test_entries_of_the_optimizer_are_not_those_of_the_file(case: Case, backend: str) -> None:
    """As in torch, what was loaded replaces what was there."""

    def left(opt: Optimizer) -> Any:
        walk(opt, range(2))
        saved = copy.deepcopy(opt.state_dict())
        opt.state[members(opt)[0]]["my_int"] = 3
        opt.state["global"] = 1
        opt.load_state_dict(saved)
        return "my_int" in opt.state[members(opt)[0]], "global" in opt.state

    assert left(torch.optim.Adam(small())) == left(case.make(small(), backend=backend)) == (False, False)


@each_class
@each_backend
def test_groups_share_nothing_with_what_was_loaded(case: Case, backend: str) -> None:
    opt = case.make(small(), backend=backend, lr=torch.tensor(0.1))
    walk(opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    group = saved["param_groups"][0]
    group["my_list"], group["my_tensor"] = [1, [2]], torch.ones(2)
    if "betas" in group:
        group["betas"] = [0.5, 0.75]
    held = copy.deepcopy(saved)
    opt.load_state_dict(saved)
    before = snapshot(opt)
    assert before[1][0]["my_list"] == [1, [2]]
    group["my_list"][1].append(3)
    group["my_tensor"].zero_()
    group["lr"].fill_(7.0)
    group["params"].append(5)
    if "betas" in group:
        group["betas"][0] = 0.25
    assert snapshot(opt) == before
    copies = [[nn.Parameter(p.detach().clone()) for p in members(opt)] for _ in range(2)]
    other, again = (case.make(params, backend=backend) for params in copies)
    other.load_state_dict(held)
    ours = other.param_groups[0]
    ours["my_list"][1].append(3)
    ours["my_tensor"].zero_()
    ours["lr"].fill_(7.0)
    if "betas" in ours:
        ours["betas"][0] = 0.25
    walk(other, range(2, 4))
    again.load_state_dict(held)
    assert snapshot(again) == before


# loading


@each_torch_case
@each_backend
@pytest.mark.parametrize("how", ["own method", "method of the base class"])
@pytest.mark.parametrize(("dtype", "fresh"), [(torch.float64, True), (torch.float32, False)])
def test_states_of_torch_load_and_go_back(
    case: Case, backend: str, how: str, dtype: torch.dtype, fresh: bool
) -> None:
    """Saved in float32; three steps there, three here, three there: as torch alone."""
    there, here, back = small(torch.float32), small(dtype), small(dtype)
    source = peer_of(case, there)
    walk(source, range(3))
    opt, last = case.make(here, backend=backend), peer_of(case, back)
    if not fresh:
        walk(opt, range(20, 22))
    for params in (here, back):
        for p, value in zip(params, there, strict=True):
            p.data.copy_(value)
    saved = copy.deepcopy(source.state_dict())
    last.load_state_dict(copy.deepcopy(saved))
    if how == "own method":
        opt.load_state_dict(saved)
    else:
        Optimizer.load_state_dict(opt, saved)
    for one in (opt, last):
        walk(one, range(3, 6))
    assert_same_params(here, back)
    # back to torch, whose parameters are here now
    home = peer_of(case, here)
    home.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one in (home, last):
        walk(one, range(6, 9))
    assert_same_params(here, back)


@each_case
@each_backend
def test_the_method_of_the_base_class_loads_all_of_it(case: Case, backend: str) -> None:
    """Wrappers call it. Counters and schedules then go on, too, as after our own."""
    options = {"schedule": SCHEDULES["warmup_linear"], "backend": backend}
    first = case.make(small(), **options)
    walk(first, range(3))
    saved = copy.deepcopy(first.state_dict())
    results = []
    for method in (type(first).load_state_dict, Optimizer.load_state_dict):
        params = [nn.Parameter(p.detach().clone()) for p in members(first)]
        opt = case.make(params, **options)
        method(opt, copy.deepcopy(saved))
        walk(opt, range(3, 6))
        results.append((snapshot(opt), params, opt.telemetry.latest()["lr"], opt.telemetry.latest()["step"]))
    own, base = results
    assert base[2:] == own[2:]
    assert base[2] == pytest.approx(1e-2 * SCHEDULES["warmup_linear"](5))
    assert base[0][0] == own[0][0]
    for p, q in zip(base[1], own[1], strict=True):
        assert_same_bits("parameter", p, q)


@each_torch_case
@each_backend
def test_counts_may_be_numbers_in_the_file(case: Case, backend: str) -> None:
    """Whatever an old file holds: what is loaded goes on as torch's optimizer that was not stopped."""
    here, there = small(), small()
    source, opt = peer_of(case, there), case.make(here, backend=backend)
    walk(source, range(3))
    saved = copy.deepcopy(source.state_dict())
    for entries in saved["state"].values():
        if "step" in entries:
            entries["step"] = float(entries["step"])
    opt.load_state_dict(saved)
    for mine, theirs in zip(here, there, strict=True):
        mine.data.copy_(theirs)
    for one in (source, opt):
        walk(one, range(3, 5))
    assert_same_params(here, there)


@each_torch_case
@each_backend
def test_older_files_lack_options(case: Case, backend: str) -> None:
    """As after an update of torch, which fills in what a file does not say."""
    here, there = small(), small()
    source, opt = peer_of(case, there), case.make(here, backend=backend)
    walk(source, range(2))
    saved = copy.deepcopy(source.state_dict())
    for group in saved["param_groups"]:
        # options that came late, where they were not used
        for key in ("maximize", "nesterov", "amsgrad", "decoupled_weight_decay", "foreach", "fused"):
            if not group.get(key):
                group.pop(key, None)
    for p, value in zip(here, there, strict=True):
        p.data.copy_(value)
    for one in (source, opt):
        one.load_state_dict(copy.deepcopy(saved))
        walk(one, range(2, 4))
    assert_same_params(here, there)
    assert set(opt.defaults) <= set(opt.param_groups[0])


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a group less": lambda saved: saved["param_groups"].pop(),
    "a group more": lambda saved: saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0])),
    "a parameter less": lambda saved: saved["param_groups"][1]["params"].pop(),
    "a parameter more": lambda saved: saved["param_groups"][0]["params"].append(3),
}


@each_class
@each_backend
@pytest.mark.parametrize("base", [False, True], ids=["own", "base"])
@pytest.mark.parametrize("kind", list(WRONG))
def test_what_does_not_match_changes_nothing(case: Case, backend: str, kind: str, base: bool) -> None:
    params = small()
    opt = case.make([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], backend=backend)
    walk(opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    walk(opt, range(2, 4))
    saved["param_groups"][0]["lr"] = 0.25
    WRONG[kind](saved)
    before = snapshot(opt), copy.deepcopy(saved)
    with pytest.raises(ValueError, match=r"state.dict"):
        Optimizer.load_state_dict(opt, saved) if base else opt.load_state_dict(saved)
    assert snapshot(opt) == before[0]
    assert repr(saved) == repr(before[1])


@each_case
@each_backend
@pytest.mark.parametrize("target", ["itself", "another"])
def test_a_live_state_dict_is_of_one_time(case: Case, backend: str, target: str) -> None:
    """Steps after ``state_dict()`` show in all of it, as in torch, or in none: counts belong to their moments."""
    opt = case.make(small(), backend=backend)

    def entries(of: Optimizer) -> list[Any]:
        return [{k: kinds(v)[1] for k, v in of.state[p].items()} for p in members(of)]

    walk(opt, range(3))
    saved, then = opt.state_dict(), entries(opt)
    walk(opt, range(3, 7))
    now = entries(opt)
    assert then != now
    other = opt if target == "itself" else case.make(small(), backend=backend)
    other.load_state_dict(saved)
    assert entries(other) in (then, now)
    assert other.telemetry.latest()["step"] in (3, 7)
    if target == "itself" and entries(other) == now:
        walk(other, range(7, 9))
        alone = case.make(small(), backend=backend)
        walk(alone, range(9))
        assert_same_params(members(other), members(alone))


@each_case
@each_backend
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "file"])
def test_a_copy_of_a_state_dict_stays_what_it_was(case: Case, backend: str, how: str) -> None:
    opt = case.make(small(), backend=backend)
    walk(opt, range(3))
    saved, then = COPIES[how](opt.state_dict()), snapshot(opt)
    at = [p.detach().clone() for p in members(opt)]
    walk(opt, range(3, 5))
    later = snapshot(opt), [p.detach().clone() for p in members(opt)]
    for p, value in zip(members(opt), at, strict=True):
        p.data.copy_(value)
    opt.load_state_dict(saved)
    assert snapshot(opt)[0] == then[0]
    walk(opt, range(3, 5))
    assert snapshot(opt)[0] == later[0][0]
    for p, value in zip(members(opt), later[1], strict=True):
        assert_same_bits("parameter", p, value)


@each_class
@each_backend
def test_loading_a_state_dict_leaves_it_alone(case: Case, backend: str) -> None:
    first, second = (case.make(small(), backend=backend) for _ in range(2))
    walk(first, range(3))
    saved = copy.deepcopy(first.state_dict())
    known = repr(saved)
    second.load_state_dict(saved)
    walk(second, range(3, 6))
    assert repr(saved) == known


# states that the user puts there


STEPS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.tensor(7.0),
    "int64": lambda: torch.tensor(7),
    "int32": lambda: torch.tensor(7, dtype=torch.int32),
    "uint8": lambda: torch.tensor(7, dtype=torch.uint8),
    "float64": lambda: torch.tensor(7.0, dtype=torch.float64),
    "float16": lambda: torch.tensor(7.0, dtype=torch.float16),
    "one element": lambda: torch.tensor([7.0]),
    "one element of int64": lambda: torch.tensor([7]),
    "an element of a column": lambda: torch.full((3, 4), 7.0)[:, 1][2],
    "a parameter": lambda: nn.Parameter(torch.tensor(7.0)),
    "int": lambda: 7,
    "float": lambda: 7.0,
    "numpy float": lambda: np.float32(7),
    "numpy int": lambda: np.int64(7),
    "numpy array": lambda: np.array(7),
}


def edited(opt: Optimizer, edit: Callable[[Optimizer, Tensor], None]) -> Optimizer:
    """Train, change the state of every parameter, and train on."""
    walk(opt, range(3))
    for param in members(opt):
        edit(opt, param)
    walk(opt, range(3, 6))
    return opt


def fill_step(opt: Optimizer, param: Tensor) -> None:
    if "step" in opt.state[param]:
        opt.state[param]["step"].fill_(7)


@each_class
@each_backend
@pytest.mark.parametrize("form", list(STEPS))
def test_a_count_of_any_form(case: Case, backend: str, form: str) -> None:
    def put(opt: Optimizer, param: Tensor) -> None:
        opt.state[param]["step"] = STEPS[form]()

    here, there = small(), small()
    opt = edited(case.make(here, backend=backend), put)
    edited(peer_of(case, there), fill_step)
    assert_same_params(here, there)
    assert [int(opt.state[p]["step"]) for p in here] == [10, 10, 10]
    assert [float(entries["step"]) for entries in opt.state_dict()["state"].values()] == [10.0, 10.0, 10.0]


def value_of(name: str, param: Tensor) -> Tensor:
    """Return a moment that every dtype holds exactly, positive where it is of squares."""
    n = torch.arange(1, param.numel() + 1, dtype=torch.float32).reshape(param.shape)
    return n / 4 if name.endswith("exp_avg_sq") else (n % 3 - 1) / 8


def every_second(value: Tensor) -> Tensor:
    wide = torch.full((*value.shape, 2), 99.0)
    wide[..., 1] = value
    return wide[..., 1]


def late_in_memory(value: Tensor) -> Tensor:
    flat = torch.full((value.numel() + 5,), 99.0)
    flat[3 : 3 + value.numel()] = value.flatten()
    return flat[3 : 3 + value.numel()].view(value.shape)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda value: value,
    "float64": lambda value: value.double(),
    "bfloat16": lambda value: value.bfloat16(),
    "float16": lambda value: value.half(),
    "transposed": lambda value: value.t().contiguous().t() if value.dim() == 2 else value,
    "every second element": every_second,
    "late in memory": late_in_memory,
    "a parameter": nn.Parameter,
    "with a gradient": lambda value: value.requires_grad_(),
    "with a history": lambda value: value.requires_grad_() * 1.0,
}


# every class, and every state that a class may keep
KEEPING = [case for case in CASES if case in CLASSES or case.options.get("amsgrad")]


@pytest.mark.parametrize("case", KEEPING, ids=lambda case: case.name)
@each_backend
@pytest.mark.parametrize("form", list(FORMS))
def test_moments_of_any_form(case: Case, backend: str, form: str) -> None:
    def put(opt: Optimizer, param: Tensor) -> None:
        for name in moments(opt, param):
            opt.state[param][name] = FORMS[form](value_of(name, param))

    def fill(opt: Optimizer, param: Tensor) -> None:
        for name in moments(opt, param):
            opt.state[param][name].copy_(value_of(name, param))

    here, there = small(torch.float32), small(torch.float32)
    edited(case.make(here, backend=backend), put)
    edited(peer_of(case, there), fill)
    assert_same_params(here, there)


GUARDED_STEPS = [torch.float32, torch.int32, torch.int64, torch.float16, torch.uint8]


@each_class
@each_backend
@pytest.mark.parametrize("dtype", GUARDED_STEPS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
def test_nothing_beside_a_count_is_written(
    case: Case, backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """A count of four bytes lies between others: kernels count in eight."""
    param, same = small(shapes=[(5,)]), small(shapes=[(5,)])
    opt, peer = case.make(param, backend=backend), case.make(same, backend=backend)
    for one in (opt, peer):
        walk(one, range(3))
    buffer = torch.full((16,), 77, dtype=dtype)
    buffer[7] = 3
    opt.state[param[0]]["step"] = buffer[7:8].view(shape)
    for one in (opt, peer):
        walk(one, range(3, 6))
    assert [int(n) for i, n in enumerate(buffer) if i != 7] == [77] * 15
    assert int(opt.state[param[0]]["step"]) == 6
    assert_same_bits("parameter", param[0], same[0])


@each_class
@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_nothing_beside_a_moment_is_written(
    case: Case, backend: str, dtype: torch.dtype, stride: int
) -> None:
    param = small(torch.float32, shapes=[(5,)])
    opt = case.make(param, backend=backend)
    walk(opt, range(2))
    for name in moments(opt, param[0]):
        buffer = torch.full((64,), 77.0, dtype=dtype)
        own = range(16, 16 + 5 * stride, stride)
        view = buffer[own.start : own.stop : stride]
        view.copy_(value_of(name, param[0]))
        opt.state[param[0]][name] = view
        walk(opt, range(2, 4))
        assert [float(x) for i, x in enumerate(buffer) if i not in own] == [77.0] * 59


BAD_STEPS: dict[str, Callable[[], Any]] = {
    "on meta": lambda: torch.tensor(3.0, device="meta"),
    "two elements": lambda: torch.tensor([3.0, 3.0]),
    "no elements": lambda: torch.zeros(0),
    "negative": lambda: torch.tensor(-1.0),
    "a negative int": lambda: -1,
    "NaN": lambda: torch.tensor(float("nan")),
    "NaN as a float": lambda: float("nan"),
    "infinite": lambda: float("inf"),
    "too large": lambda: 1e30,
    "fractional": lambda: torch.tensor(2.5),
    "a fractional float": lambda: 2.5,
    "complex": lambda: torch.tensor(3.0 + 0.0j),
    "a complex number": lambda: 3j,
    "sparse": lambda: torch.tensor([3.0]).to_sparse(),
    "a string": lambda: "3",
}
BAD_MOMENTS: dict[str, Callable[[Tensor], Any]] = {
    "on meta": lambda value: value.to("meta"),
    "of another shape": lambda value: value.new_zeros(3, 2),
    "of as many elements": lambda value: value.reshape(-1),
    "0-dim": lambda value: value.new_zeros(()),
    "complex": lambda value: value.to(torch.complex64),
    "sparse": lambda value: value.to_sparse(),
    "a string": lambda value: "zeros",
    "a number": lambda value: 0.0,
    "a list": lambda value: value.tolist(),
}


def refuses(case: Case, backend: str, put: Callable[[dict[str, Any]], str]) -> None:
    """Put a bad entry into the state of the second parameter: a step must name it and change nothing."""
    params, same = small(), small()
    opt, peer = case.make(params, backend=backend), case.make(same, backend=backend)
    for one in (opt, peer):
        walk(one, range(2))
    good = dict(opt.state[params[1]])
    name = put(opt.state[params[1]])
    before = snapshot(opt), [p.detach().clone() for p in params]
    with pytest.raises((ValueError, TypeError), match=rf"(?s)^{case.cls.__name__}: .*\b{re.escape(name)}\b"):
        walk(opt, range(2, 3))
    assert repr(snapshot(opt)) == repr(before[0])
    assert all(torch.equal(p, old) for p, old in zip(params, before[1], strict=True))
    opt.state[params[1]].update(good)
    for one in (opt, peer):
        walk(one, range(2, 4))
    assert snapshot(opt)[0] == snapshot(peer)[0]
    for p, q in zip(params, same, strict=True):
        assert_same_bits("parameter", p, q)


@each_class
@each_backend
@pytest.mark.parametrize("kind", list(BAD_STEPS))
def test_a_count_that_is_none_is_named(case: Case, backend: str, kind: str) -> None:
    def put(entries: dict[str, Any]) -> str:
        entries["step"] = BAD_STEPS[kind]()
        return "step"

    refuses(case, backend, put)


@each_class
@each_backend
@pytest.mark.parametrize("kind", list(BAD_MOMENTS))
def test_a_moment_that_is_none_is_named(case: Case, backend: str, kind: str) -> None:
    def put(entries: dict[str, Any]) -> str:
        name = next(key for key in ("exp_avg_sq", "momentum_buffer") if key in entries)
        entries[name] = BAD_MOMENTS[kind](entries[name])
        return name

    refuses(case, backend, put)


@each_torch_case
@each_backend
def test_states_may_be_handed_over_by_hand(case: Case, backend: str) -> None:
    """The states of torch's optimizer, put into ours one by one, before its first step."""
    there, here = small(), small()
    source, opt = peer_of(case, there), case.make(here, backend=backend)
    walk(source, range(4))
    for mine, theirs in zip(here, there, strict=True):
        mine.data.copy_(theirs)
        opt.state[mine] = {key: copy.deepcopy(value) for key, value in source.state[theirs].items()}
    for one in (source, opt):
        walk(one, range(4, 8))
    assert_same_params(here, there)


def test_some_case_keeps_every_state_of_torch() -> None:
    """Else the tests above would compare nothing."""
    kept = set()
    for case in TORCH_CASES:
        opt = case.make(small())
        walk(opt, range(2))
        kept.update(opt.state[members(opt)[0]])
    assert kept == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}


@pytest.mark.parametrize("cls", ["SGD", "Adam"])
def test_a_parameter_object_that_was_replaced(cls: str) -> None:
    """``state_dict()`` works where torch keeps no state of it, and raises as torch does where it keeps one."""
    found = []
    for module in (torch.optim, fw):
        old, new = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        opt = getattr(module, cls)([old], lr=0.1)
        old.grad, new.grad = torch.ones(3), torch.ones(3)
        opt.step()
        opt.param_groups[0]["params"] = [new]
        for _ in range(2):
            try:
                found.append(opt.state_dict()["param_groups"][0]["params"])
            except KeyError:
                found.append(KeyError)
            opt.step()
    assert found == (found[:2] * 2)
    assert found[0] == ([0] if cls == "SGD" else KeyError)
