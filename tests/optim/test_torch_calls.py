"""What torch's own tests ask of every optimizer, asked of ours: closures, hooks, copies and the representation."""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import inspect
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, assert_same_bits
from peers import (
    CLASSES,
    compare_with_torch,
    each_backend,
    each_case,
    each_class,
    each_torch_case,
    each_torch_class,
    members,
    small,
    snapshot,
    two_groups,
    walk,
)
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fused_warmup as fw

pytestmark = pytest.mark.pairwise

# closures


CLOSURE_RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "a loss": lambda loss: loss,
    "a loss with a history": lambda loss: loss.clone(),
    "a loss per element": lambda loss: loss.expand(3),
    "no elements": lambda loss: loss.new_zeros(0),
    "an int": lambda loss: 7,
    "a float": lambda loss: 0.25,
    "a bool": lambda loss: True,
    "a numpy float32": lambda loss: np.float32(2.5),
    "a numpy float64": lambda loss: np.float64(2.5),
    "an array": lambda loss: np.ones(3),
    "an integer tensor": lambda loss: torch.tensor(3),
    "a complex number": lambda loss: 1j,
    "a complex tensor": lambda loss: torch.tensor(1j),
    "a meta tensor": lambda loss: torch.ones((), device="meta"),
    "nothing": lambda loss: None,
    "a pair": lambda loss: (loss, "more"),
    "a dict": lambda loss: {"loss": loss},
    "a string": lambda loss: "done",
}


@each_class
@each_backend
@pytest.mark.parametrize("kind", list(CLOSURE_RESULTS))
def test_closures_may_return_anything(case: Case, backend: str, kind: str) -> None:
    """A closure is called once, with gradients on; what it returns comes back; the step is that without it."""
    here, there = small(shapes=[(3,)]), small(shapes=[(3,)])
    opt, plain = case.make(here, backend=backend), case.make(there, backend=backend)
    returned = []

    def closure() -> Any:
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = here[0].square().sum()
        loss.backward()
        returned.append(CLOSURE_RESULTS[kind](loss))
        return returned[-1]

    for count, step in enumerate((lambda: opt.step(closure), lambda: opt.step(closure=closure)), 1):
        with torch.no_grad():
            got = step()
            assert not torch.is_grad_enabled()
        assert len(returned) == count
        assert got is returned[-1]
        plain.zero_grad()
        there[0].square().sum().backward()
        assert plain.step() is None
    assert_same_bits("parameter", here[0], there[0])


# hooks


def step_hook(log: list[Any], name: str) -> Callable[..., None]:
    """Return a hook that notes its name and the first parameter."""

    def hook(opt: Optimizer, args: Any, kwargs: Any) -> None:
        # the optimizer itself is the first of the arguments
        log.append((name, args[0] is opt, len(args), sorted(kwargs), float(members(opt)[0].detach()[0]) != 1))

    return hook


def hooked_steps(opt: Optimizer) -> list[Any]:
    """Make steps with hooks of the optimizer and of all optimizers, some of them removed on the way."""
    log: list[Any] = []
    members(opt)[0].data.fill_(1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(register_optimizer_step_post_hook(step_hook(log, "all: after")))
        stack.enter_context(register_optimizer_step_pre_hook(step_hook(log, "all: before")))
        stack.enter_context(opt.register_step_post_hook(step_hook(log, "after")))
        first = opt.register_step_pre_hook(step_hook(log, "before"))
        second = opt.register_step_pre_hook(step_hook(log, "before, too"))
        walk(opt, [0])
        log.append("positional")
        opt.step(lambda: None)
        log.append("keyword")
        opt.step(closure=lambda: None)
        first.remove()
        log.append("one removed")
        opt.step()
        second.remove()
        log.append("both removed")
        opt.step()
    log.append("all removed")
    opt.step()
    return log


@each_class
def test_step_hooks_run_as_in_torch(case: Case) -> None:
    wanted = hooked_steps(torch.optim.SGD(small(), lr=0.1))
    assert wanted[:2] == [("all: before", True, 1, [], False), ("before", True, 1, [], False)]
    assert hooked_steps(case.make(small())) == wanted


REGISTERS: dict[str, Callable[[Optimizer, Callable[..., Any]], Any]] = {
    "before": lambda opt, hook: opt.register_step_pre_hook(hook),
    "after": lambda opt, hook: opt.register_step_post_hook(hook),
    "all: before": lambda opt, hook: register_optimizer_step_pre_hook(hook),
    "all: after": lambda opt, hook: register_optimizer_step_post_hook(hook),
}


@each_class
@pytest.mark.parametrize("kind", REGISTERS)
def test_one_step_hook_alone_runs(case: Case, kind: str) -> None:
    """No other hook and no profiler makes the step look for it."""
    log: list[Any] = []
    opt = case.make(small())
    walk(opt, [0])
    with REGISTERS[kind](opt, step_hook(log, kind)):
        opt.step()
    opt.step()
    assert [name for name, *_ in log] == [kind]


@each_class
@pytest.mark.parametrize("profile", [torch.profiler.profile, torch.autograd.profiler.profile])
def test_profilers_see_steps_without_hooks(case: Case, profile: Callable[[], Any]) -> None:
    opt = case.make(small())
    walk(opt, [0])
    with profile() as trace:
        opt.step()
        opt.zero_grad()
    opt.step()
    opt.zero_grad()
    counts = {event.key: event.count for event in trace.key_averages()}
    for method in ("step", "zero_grad"):
        assert counts[f"Optimizer.{method}#{type(opt).__name__}.{method}"] == 1


@each_class
def test_no_range_is_entered_for_a_profiler_that_does_not_run(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A range takes as long as the rest of a step where tensors are few."""
    entered = []
    record = torch.autograd.profiler.record_function
    monkeypatch.setattr(record, "__enter__", lambda self: entered.append(self.name))
    monkeypatch.setattr(record, "__exit__", lambda self, *_: None)
    opt = case.make(small())
    walk(opt, [0, 1])
    opt.zero_grad()
    assert not [name for name in entered if name.startswith("Optimizer.")]


@each_class
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_let_go_or_filled_with_zeros(case: Case, set_to_none: bool) -> None:
    """Also those of groups that were added, and not what is no longer a parameter of the optimizer."""
    params, added, gone = small(), torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    opt = case.make([*params, gone])
    opt.add_param_group({"params": [added]})
    opt.param_groups[0]["params"].pop()
    for param in (*params[1:], added, gone):
        param.grad = torch.ones_like(param)
    held = added.grad
    opt.zero_grad(set_to_none)
    assert params[0].grad is None
    assert float(gone.grad.sum()) == 2.0
    if set_to_none:
        assert all(param.grad is None for param in (*params, added))
    else:
        assert added.grad is held
        assert all(float(param.grad.abs().sum()) == 0.0 for param in (*params[1:], added))


def replaced_arguments(opt: Optimizer) -> Any:
    calls = []

    def swap(_: Optimizer, args: Any, kwargs: Any) -> Any:
        return (args[0], lambda: calls.append("other") or "other"), {}

    with opt.register_step_pre_hook(swap):
        result = opt.step(lambda: calls.append("own") or "own")
    with (
        opt.register_step_pre_hook(lambda *_: "neither"),
        pytest.raises(RuntimeError, match="must return None or a tuple"),
    ):
        opt.step()
    return result, calls


@each_class
def test_step_hooks_may_replace_the_arguments(case: Case) -> None:
    assert replaced_arguments(torch.optim.SGD(small(), lr=0.1)) == ("other", ["other"])
    assert replaced_arguments(case.make(small())) == ("other", ["other"])


def dict_hooks(opt: Optimizer) -> Any:
    """Register hooks around state dicts and return what they saw, and what they left."""
    log: list[Any] = []

    def after_saving(_: Optimizer, saved: dict[str, Any]) -> None:
        log.append(("saved", "ran" in saved["state"], "mark" in saved))
        saved["mark"] = 1

    def replace_saved(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        log.append(("replaced", "ran" in saved["state"], "mark" in saved))
        return {**saved, "replaced": True}

    def before_loading(_: Optimizer, saved: dict[str, Any]) -> None:
        log.append(("loading", saved["param_groups"][0]["lr"]))
        # the dict of the caller must not see this, nor the rate
        saved["seen"] = True

    def replace_loaded(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        other = copy.deepcopy(saved)
        other["param_groups"][0]["lr"] = 0.003
        log.append(("loaded instead", "seen" in saved))
        return other

    def after_loading(opt: Optimizer) -> None:
        log.append(("loaded", opt.param_groups[0]["lr"]))
        opt.state["loaded"] = True

    opt.register_state_dict_pre_hook(lambda o: log.append("second"))
    opt.register_state_dict_pre_hook(lambda o: o.state.__setitem__("ran", True), prepend=True)
    opt.register_state_dict_pre_hook(lambda o: log.append(("first", "ran" in o.state)), prepend=True)
    handle = opt.register_state_dict_post_hook(replace_saved)
    opt.register_state_dict_post_hook(after_saving, prepend=True)
    opt.register_load_state_dict_pre_hook(replace_loaded)
    opt.register_load_state_dict_pre_hook(before_loading, prepend=True)
    opt.register_load_state_dict_post_hook(lambda o: log.append(("last", "loaded" in o.state)))
    opt.register_load_state_dict_post_hook(after_loading, prepend=True)
    walk(opt, range(2))
    saved = opt.state_dict()
    handle.remove()
    again = opt.state_dict()
    opt.load_state_dict(saved)
    walk(opt, range(2, 4))
    strange = {key: value for key, value in opt.state_dict()["state"].items() if not isinstance(key, int)}
    kept = [(key, saved.get(key), again.get(key)) for key in ("mark", "replaced", "seen")]
    return log, strange, kept, saved["param_groups"][0]["lr"], opt.param_groups[0]["lr"]


@each_class
@each_backend
def test_hooks_of_state_dicts_run_as_in_torch(case: Case, backend: str) -> None:
    """Also those that leave an entry in ``state`` whose key is no parameter."""
    wanted = dict_hooks(torch.optim.SGD(small(), lr=1e-2, momentum=0.9))
    assert wanted[1] == {"ran": True, "loaded": True}
    assert wanted[-1] == 0.003
    assert dict_hooks(case.make(small(), backend=backend)) == wanted


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
}


# a function of the module, so that an optimizer that kept it could be pickled
HOOKED: list[str] = []


def note(*_: Any) -> None:
    HOOKED.append("called")


@each_class
@pytest.mark.parametrize("how", list(COPIES))
def test_hooks_stay_with_the_original(case: Case, how: str) -> None:
    def calls(opt: Optimizer) -> list[int]:
        opt.register_step_pre_hook(note)
        opt.register_step_post_hook(note)
        opt.register_state_dict_pre_hook(note)
        opt.register_state_dict_post_hook(note)
        opt.register_load_state_dict_pre_hook(note)
        opt.register_load_state_dict_post_hook(note)
        counts = []
        for one in (COPIES[how](opt), opt):
            HOOKED.clear()
            walk(one, range(1))
            one.load_state_dict(one.state_dict())
            counts.append(len(HOOKED))
        return counts

    assert calls(torch.optim.SGD(small(), lr=0.1)) == calls(case.make(small())) == [0, 6]


def test_subclasses_are_hooked_as_in_torch() -> None:
    """A step that calls that of its base."""

    def calls(base: Any) -> int:
        class Mine(base):
            def step(self, closure: Any = None) -> Any:
                return super().step(closure)

        base(small())
        opt, log = Mine(small()), []
        opt.register_step_pre_hook(lambda *_: log.append("called"))
        walk(opt, range(2))
        return len(log)

    assert calls(fw.Adam) == calls(torch.optim.Adam)


@each_class
def test_the_step_is_wrapped_as_in_torch(case: Case) -> None:
    mine, theirs = case.make(small()), torch.optim.Adam(small())
    for opt in (mine, theirs):
        assert type(opt).step.hooked
        assert type(opt).step.__wrapped__.__name__ == "step"
        assert list(inspect.signature(opt.step).parameters) == ["closure"]
    assert mine._zero_grad_profile_name == f"Optimizer.zero_grad#{case.cls.__name__}.zero_grad"


# copies


@each_torch_case
@each_backend
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
def test_a_shallow_copy_shares_what_it_shares_in_torch(case: Case, backend: str, steps: int) -> None:
    def scenario(opt: Optimizer, _: Any) -> Any:
        walk(opt, range(steps))
        other = copy.copy(opt)
        walk(other, range(3, 5))
        walk(opt, range(5, 6))
        other.param_groups[0]["lr"] = 0.5
        walk(opt, range(6, 8))
        return (
            other.state is opt.state,
            other.param_groups is opt.param_groups,
            other.defaults is opt.defaults,
        )

    compare_with_torch(case, backend, scenario)


@each_case
@each_backend
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_deep_copies_go_on_alone(case: Case, backend: str, how: str) -> None:
    opt = case.make(small(), backend=backend)
    walk(opt, range(3))
    opt.state["mark"] = {"of": [1, 2]}
    other = COPIES[how](opt)
    assert {key for key in vars(other) if key[0] != "_"} == {key for key in vars(opt) if key[0] != "_"}
    assert not {id(p) for p in members(opt)} & {id(p) for p in members(other)}
    before = snapshot(opt), [p.detach().clone() for p in members(opt)]
    walk(other, range(3, 6))
    assert snapshot(opt) == before[0]
    assert all(torch.equal(p, old) for p, old in zip(members(opt), before[1], strict=True))
    walk(opt, range(3, 6))
    assert snapshot(opt) == snapshot(other)
    assert other.state["mark"] == {"of": [1, 2]}
    for p, q in zip(members(opt), members(other), strict=True):
        assert_same_bits("parameter", p, q)


@each_case
def test_the_representation_has_every_line_of_torch(case: Case) -> None:
    params = small()
    opt = case.make(two_groups(params))
    text = repr(opt)
    assert text.startswith(f"{case.cls.__name__} (")
    assert "Parameter Group 1" in text
    assert "lr: 0.02" in text
    if case.torch_cls is not None:
        # 0 and 0.0 are one number
        mine, theirs = (
            re.sub(r"(: \d+)\.0$", r"\1", repr(o), flags=re.MULTILINE).splitlines()
            for o in (opt, case.make_torch(two_groups(params)))
        )
        assert not [line for line in theirs[1:] if line not in mine]
    walk(opt, range(2))
    assert "Parameter Group 1" in repr(opt)


@each_class
@each_backend
def test_an_optimizer_goes_with_its_last_reference(case: Case, backend: str) -> None:
    """No circle of references keeps states alive until the collector comes."""
    opt = case.make(small(), backend=backend)
    walk(opt, range(2))
    gone = [weakref.ref(opt), *(weakref.ref(t) for t in opt.state[members(opt)[0]].values())]
    assert len(gone) > 1
    gc.disable()
    try:
        del opt
        assert [ref() for ref in gone] == [None] * len(gone)
    finally:
        gc.enable()


@each_torch_class
@each_backend
def test_states_that_are_thrown_away_start_again(case: Case, backend: str) -> None:
    def throw(how: Callable[[Optimizer], Any]) -> None:
        def scenario(opt: Optimizer, _: Any) -> None:
            walk(opt, range(3))
            how(opt)
            walk(opt, range(3, 6))

        compare_with_torch(case, backend, scenario)

    throw(lambda opt: opt.state.clear())
    throw(lambda opt: setattr(opt, "state", collections.defaultdict(dict)))
    throw(lambda opt: opt.state.pop(members(opt)[0]))
    throw(lambda opt: opt.state[members(opt)[1]].clear())


def test_the_cases_cover_every_class() -> None:
    assert {case.cls for case in CLASSES} == {case.cls for case in CASES}
    assert {case.cls.__name__ for case in CLASSES} == {
        name
        for name in fw.__all__
        if inspect.isclass(getattr(fw, name)) and issubclass(getattr(fw, name), fw.FusedOptimizer)
    } - {"FusedOptimizer"}
