"""Public means change neither the speed nor the meaning of later steps: states that are read, options in any order."""

import copy
import gc
import pickle
from collections import defaultdict

import pytest
import torch
from cases import BACKENDS, CASES, assert_same_bits, make_params, set_grads

import fused_warmup as fw
from fused_warmup.plan import plan as plan_module
from fused_warmup.plan.address_cache import PYTHON_READER
from fused_warmup.plan.spec import RuleSpec
from fused_warmup.reference import rules

SHAPES = [(3,), (2, 3, 5), ()]


def made(case=None, steps=2, **options):
    params = make_params(torch.float32, SHAPES)
    opt = fw.Adam(params, **options) if case is None else case.make(params, **options)
    for step in range(steps):
        set_grads(params, step)
        opt.step()
    return params, opt


def checks(opt):
    """How many of the next steps compare all states."""
    plan, count = opt.session.plan, []
    states = plan.states
    compare = states.find_moved
    states.find_moved = lambda: count.append(1) or compare()
    for _ in range(4):
        opt.step()
        assert opt.session.plan is plan
    del states.find_moved
    return len(count)


# what a user may read, and what is held of it afterwards
READS = {
    "nothing": lambda opt, p: None,
    "state": lambda opt, p: opt.state and None,
    "a state": lambda opt, p: opt.state[p]["step"] is None or None,
    "items": lambda opt, p: [key for key, _ in opt.state[p].items()],
    "a copy": lambda opt, p: copy.deepcopy(opt.state[p]),
    "state_dict": lambda opt, p: opt.state_dict() and None,
    "base class": lambda opt, p: torch.optim.Optimizer.state_dict(opt) and None,
    "a kept outer dictionary": lambda opt, p: opt.state,
    "kept views": lambda opt, p: (opt.state.keys(), opt.state.values(), opt.state.items()),
    "all values": lambda opt, p: [state["step"].item() for state in opt.state.values()] and None,
    "pickle": lambda opt, p: pickle.dumps(opt),
    "deepcopy": lambda opt, p: copy.deepcopy(opt),
    "repr": lambda opt, p: repr(opt),
    "traffic": lambda opt, p: opt.traffic(),
    "rates": lambda opt, p: opt.get_last_lr(),
    "telemetry": lambda opt, p: opt.telemetry.latest(),
    "groups": lambda opt, p: [dict(group) for group in opt.param_groups],
    "averages": lambda opt, p: averages(opt),
}


def averages(opt):
    with opt.averaged_parameters():
        pass


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("adam-amsgrad", "sgd-momentum", "adamp", "lamb")],
    ids=lambda c: c.name,
)
def test_a_look_at_the_states_costs_one_comparison(case, read):
    params, opt = made(case, average=fw.EMA(0.9))
    kept = READS[read](opt, params[0])
    assert checks(opt) <= 1
    assert checks(opt) == 0
    del kept


HELD = {
    "dictionary": lambda opt, p: opt.state[p],
    "copy of the outer dictionary": lambda opt, p: opt.state.copy(),
    "iterator": lambda opt, p: [it := iter(opt.state.values()), next(it)][0],
    "tensor": lambda opt, p: opt.state[p]["exp_avg"],
    "count": lambda opt, p: opt.state[p]["step"],
    "state_dict": lambda opt, p: opt.state_dict(),
    "values": lambda opt, p: list(opt.state[p].values()),
    "plain dictionary": lambda opt, p: dict(opt.state[p]),
    "union": lambda opt, p: opt.state[p] | {},
    "get": lambda opt, p: opt.state[p].get("exp_avg_sq"),
    "average": lambda opt, p: opt.state[p]["average"],
}


@pytest.mark.parametrize("what", HELD)
def test_states_are_compared_as_long_as_somebody_holds_one(what):
    """Whoever holds a tensor may move it at any time."""
    params, opt = made(average=fw.EMA(0.9))
    held = HELD[what](opt, params[0])
    assert checks(opt) == 4
    del held
    gc.collect()
    checks(opt)
    assert checks(opt) == 0


# the same through a dictionary that was read long before
FROM_KEPT = {
    "item": lambda state: state["exp_avg"],
    "dict": lambda state: dict(state),
    "unpacked": lambda state: {**state},
    "values": lambda state: list(state.values()),
    "items": lambda state: list(state.items()),
    "get": lambda state: state.get("exp_avg"),
    "copy": lambda state: state.copy(),
    "default": lambda state: state.setdefault("exp_avg", None),
}


@pytest.mark.parametrize("how", FROM_KEPT)
@pytest.mark.parametrize("outer", [False, True])
def test_a_dictionary_that_was_read_before_hands_out_states(how, outer):
    params, opt = made()
    states, state = opt.state, None if outer else opt.state[params[0]]
    checks(opt)
    # the dictionary of a parameter may be changed at any time
    assert checks(opt) == (0 if outer else 4)
    held = FROM_KEPT[how](dict(states)[params[0]] if outer else state)
    del state
    assert checks(opt) == 4
    del held
    checks(opt)
    assert checks(opt) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("later", [0, 3])
def test_a_state_that_was_moved_through_a_held_tensor_is_used(backend, later):
    (here, opt), (there, twin) = made(backend=backend), made(backend=backend)
    held = opt.state[here[1]]["exp_avg"]
    for step in range(later):
        for params, each in ((here, opt), (there, twin)):
            set_grads(params, step)
            each.step()
    held.data = torch.full_like(held, 2.0)
    twin.state[there[1]]["exp_avg"] = torch.full_like(held, 2.0)
    for params, each in ((here, opt), (there, twin)):
        set_grads(params, 9)
        each.step()
    for p, q in zip(here, there, strict=True):
        assert_same_bits("parameter", p, q)
    assert held.flatten()[0] != 2.0


# each way to put another tensor in the place of a state
REPLACED = {
    "item": lambda state, new: state.__setitem__("exp_avg", new),
    "update": lambda state, new: state.update(exp_avg=new),
    "union": lambda state, new: state.__ior__({"exp_avg": new}),
    "pop": lambda state, new: (state.pop("exp_avg"), state.setdefault("exp_avg", new)),
    "clear": lambda state, new: [state.clear, state.update({**state, "exp_avg": new})],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", REPLACED)
def test_a_state_that_was_replaced_is_used(how, backend):
    params, opt = made(backend=backend)
    new = torch.full_like(opt.state[params[0]]["exp_avg"], 2.0)
    REPLACED[how](opt.state[params[0]], new)
    set_grads(params, 5)
    opt.step()
    assert opt.state[params[0]]["exp_avg"] is new
    assert (new != 2.0).all()


READERS = {"compiled": plan_module.select_reader(), "python": PYTHON_READER}


@pytest.fixture(params=READERS)
def reader(request, monkeypatch):
    """Take one of the readers for the plans of a test."""
    monkeypatch.setattr(plan_module, "select_reader", lambda: READERS[request.param])


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", REPLACED)
def test_a_state_that_was_replaced_in_a_held_dictionary_is_used(how, backend):
    params, opt = made(backend=backend)
    held = opt.state_dict()["state"][0]
    assert held is opt.state[params[0]]
    assert checks(opt) == 4
    new = torch.full_like(held["exp_avg"], 2.0)
    REPLACED[how](held, new)
    opt.step()
    assert held["exp_avg"] is new
    assert (new != 2.0).all()


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_was_deleted_from_a_held_dictionary_starts_again(backend):
    params, opt = made(backend=backend, betas=(0.5, 0.999))
    held = opt.state[params[0]]
    checks(opt)
    del held["exp_avg"]
    opt.step()
    assert torch.equal(held["exp_avg"], 0.5 * params[0].grad)


VIEWS = {
    "values": lambda values, items: next(iter(values)),
    "values reversed": lambda values, items: [*reversed(values)][-1],
    "items": lambda values, items: next(iter(items))[1],
    "items reversed": lambda values, items: [*reversed(items)][-1][1],
}


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("how", VIEWS)
def test_a_view_that_was_made_before_hands_out_states(how):
    params, opt = made()
    views = opt.state.values(), opt.state.items()
    checks(opt)
    assert checks(opt) == 0
    new = torch.full_like(params[0], 2.0).detach()
    VIEWS[how](*views)["exp_avg"] = new
    opt.step()
    assert opt.state[params[0]]["exp_avg"] is new
    assert (new != 2.0).all()


def test_an_iterator_hands_out_states_between_steps():
    params, opt = made()
    iterator = iter(opt.state.items())
    for _ in params:
        opt.step()
        opt.step()
        _, state = next(iterator)
        state["exp_avg"] = new = torch.full_like(state["exp_avg"], 2.0)
        del state
        opt.step()
        assert (new != 2.0).all()


def test_a_plain_dictionary_of_the_user_is_compared_at_each_step():
    """It notes nothing, so nothing may be taken for granted."""
    params, opt = made()
    mine = dict(opt.state[params[0]])
    opt.state[params[0]] = mine
    opt.step()
    assert opt.state[params[0]] is mine
    assert checks(opt) == 4
    mine["exp_avg"] = torch.full_like(mine["exp_avg"], 3.0)
    opt.step()
    assert opt.state[params[0]]["exp_avg"] is mine["exp_avg"]
    assert (mine["exp_avg"] != 3.0).all()


def test_a_state_that_came_before_the_first_gradient_is_saved_as_in_torch():
    params = make_params(torch.float32, SHAPES)
    opt = fw.Adam(params)
    set_grads(params[:2], 0)
    opt.step()
    opt.step()
    opt.state[params[2]] = {**opt.state[params[1]], "step": 7}
    step = opt.state_dict()["state"][2]["step"]
    assert (step, step.dtype) == (7, torch.float32)


def test_states_are_dictionaries_as_in_torch():
    params, opt = made()
    assert isinstance(opt.state, defaultdict)
    assert isinstance(opt.state[params[0]], dict)
    for state in (
        pickle.loads(pickle.dumps(opt.state[params[0]])),
        copy.copy(opt.state[params[0]]),
        opt.state[params[0]].copy(),
    ):
        assert type(state) is dict
        assert state.keys() == opt.state[params[0]].keys()
    assert type(copy.copy(opt.state)) is defaultdict
    plain = dict(opt.state)
    for both in (opt.state | {"mine": 1}, {"mine": 1} | opt.state):
        assert type(both) in (dict, defaultdict)
        assert both == {**plain, "mine": 1}
    assert list(opt.state.values()) == list(plain.values())
    assert list(opt.state.items()) == list(plain.items())
    assert len(opt.state.values()) == len(opt.state.items()) == len(plain)
    assert (params[0], plain[params[0]]) in opt.state.items()
    assert ("missing", 1) not in opt.state.items()
    assert opt.state.keys() == plain.keys()
    assert opt.state["global"] == {}
    loaded = pickle.loads(pickle.dumps(opt))
    assert all(type(state) is dict for state in (*loaded.state.values(), *opt.state.values()))


@pytest.mark.parametrize("betas", [[0.9, 0.999], (0.9, 0.999)])
def test_a_list_of_betas_is_packed_once(betas):
    _, opt = made(betas=betas)
    packed = opt.session.plan.groups._packed
    opt.step()
    assert opt.session.plan.groups._packed is packed
    if isinstance(betas, list):
        opt.param_groups[0]["betas"][0] = 0.5
        opt.step()
        assert opt.session.plan.groups.hypers[0].beta1 == 0.5


class Reversed(fw.FusedOptimizer):
    """Adam whose hyper-parameters come in another order, lr last."""

    spec = fw.Adam.spec

    def __init__(self, params, betas=(0.9, 0.999), **options):
        defaults = dict(reversed(fw.Adam(make_params(torch.float32, [(1,)])).defaults.items()))
        own = {key: defaults[key] for key in defaults if key in fw.Adam.__init__.__code__.co_varnames}
        super().__init__(params, {**own, "betas": betas}, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults_may_come_in_any_order(backend):
    """A change of betas is noticed, whatever is first."""
    here, there = (make_params(torch.float32, SHAPES) for _ in range(2))
    opts = Reversed(here, backend=backend), fw.Adam(there, backend=backend)
    assert next(iter(opts[0].defaults)) != "lr"
    for step in range(4):
        for params, opt in zip((here, there), opts, strict=True):
            set_grads(params, step)
            if step % 2 == 0:
                opt.param_groups[0]["betas"] = (0.9 - 0.1 * step, 0.999)
            opt.param_groups[0]["lr"] = 1e-3 * (step + 1)
            opt.step()
            assert opt.session.plan.groups.hypers[0].lr == 1e-3 * (step + 1)
            assert opt.get_last_lr() == [1e-3 * (step + 1)]
    for p, q in zip(here, there, strict=True):
        assert_same_bits("parameter", p, q)


# specs


def test_what_a_rule_does_not_state_raises_by_name():
    _, opt = made(next(c for c in CASES if c.name == "lamb"))
    for name in ("is_preconditioned", "second_moment_index"):
        with pytest.raises(TypeError, match="LAMB"):
            getattr(opt.spec, name)
    for name in ("stability_threshold", "early_stability_threshold"):
        with pytest.raises(
            TypeError, match=f"LAMB: the class in reference/rules.py must state {name}, got nothing"
        ):
            getattr(opt.spec, name)(opt.session.plan.groups.hypers[0])
    with pytest.raises(TypeError, match="threshold: optimizer must have a known rule, got 'LAMB'"):
        fw.sharpness.threshold(opt)


BAD_SPECS = {
    "a scalar state": (
        {"scalar_states": ("mu_product",)},
        r"Adam: scalar_states must be empty, got \('mu_product',\)",
    ),
    "too few states": ({"states": ("exp_avg",)}, "Adam: states must be the 3 of the rule"),
    "another second moment": ({"second_moment": "v"}, "Adam: v must be one of the states"),
    "another buffer": ({"first_gradient": "v"}, "Adam: v must be one of the states"),
}


@pytest.mark.parametrize("bad", BAD_SPECS)
def test_specs_that_do_not_fit_the_rule(bad):
    changes, message = BAD_SPECS[bad]
    fields = {"rule": rules.Adam, "states": fw.Adam.spec.states, "hyper": fw.Adam.spec.hyper, **changes}
    with pytest.raises(TypeError, match=message):
        RuleSpec(**fields)


def test_a_class_without_a_spec():
    class Nameless(fw.FusedOptimizer):
        pass

    with pytest.raises(
        TypeError, match="Nameless: a subclass of FusedOptimizer must declare spec, a RuleSpec"
    ):
        Nameless(make_params(torch.float32, [(2,)]), {"lr": 0.1})
