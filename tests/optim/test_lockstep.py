"""Random sequences of operations on one optimizer, in lockstep on the compiled backend, the reference and torch.

Whatever a user does to an optimizer between steps, the next step must take note of it. Each rule below is one
operation, done on every side alike; after each of them parameters, states, counts, averages and telemetry are
compared. ``Lockstep`` has the operations that torch's optimizers know too, ``OwnLockstep`` those of our options.

``make test`` runs the same short sequences each time. ``FUZZ_EXAMPLES=20000`` runs that many of each test, longer
ones and others at each call; a failure is printed as the shortest program that fails.
"""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lockstep import (
    DTYPES,
    LAYOUTS,
    MOMENTS,
    SHAPES,
    Comparison,
    Side,
    Spec,
    check_last_row,
    compare_with_torch,
    give_gradient,
    normal,
    synchronize,
    through_file,
)

import fused_warmup as fw

pytestmark = [
    pytest.mark.skipif(
        "cpu" not in fw.available_backends(), reason="the extension fused_warmup._cpu is not built"
    ),
    pytest.mark.slow,
]

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SETTINGS = settings(
    derandomize=not EXAMPLES,
    max_examples=EXAMPLES or 14,
    stateful_step_count=60 if EXAMPLES else 20,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
MOST_PARAMS = 7

ALWAYS = [
    {"lr": 1e-3},
    {"lr": 0.03},
    {"lr": torch.tensor(0.02, dtype=torch.float64)},
    {"weight_decay": 0.0},
    {"weight_decay": 0.093},
    {"maximize": True},
    {"maximize": False},
]
MEANS = [{"betas": (0.9, 0.999)}, {"betas": [0.8, 0.9]}, {"betas": (0.0, 0.5)}, {"eps": 1e-8}, {"eps": 1e-3}]
DECOUPLED = [{"decoupled_weight_decay": True}, {"decoupled_weight_decay": False}]
AMSGRAD = [{"amsgrad": True}, {"amsgrad": False}]
MOMENTUM = [
    {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.3, "nesterov": False},
]
PROJECTED = [{"delta": 0.0}, {"delta": 0.1}, {"delta": 1e3}, {"wd_ratio": 0.5}, {"nesterov": True}]
# edits of a group, of which those of torch come first
EDITS: dict[str, list[dict[str, Any]]] = {
    "Adam": [*ALWAYS, *MEANS, *DECOUPLED],
    "AdamW": [*ALWAYS, *MEANS],
    "RAdam": [*ALWAYS, *MEANS, {"betas": (0.8, 0.95)}, *DECOUPLED],
    "SGD": [*ALWAYS, *MOMENTUM],
    "GIAdam": [*ALWAYS, *MEANS, *DECOUPLED, *AMSGRAD, {"exp_avg_sq_init_scale": 0.25}],
    "LAMB": [
        *ALWAYS,
        *MEANS,
        {"bias_correction": False},
        {"grad_averaging": False},
        {"trust_clip": 1.0},
        {"always_adapt": True},
        {"norm_clip": (0.5, 20.0)},
        {"decay_mode": "gradient"},
        {"decay_mode": "decoupled"},
    ],
    "AdamP": [*ALWAYS, *MEANS, *PROJECTED],
    "SGDP": [*ALWAYS, *MOMENTUM, *PROJECTED],
}
OWN_EDITS: dict[str, list[dict[str, Any]]] = {
    "Adam": [
        *AMSGRAD,
        {"exp_avg_sq_init": "grad"},
        {"exp_avg_sq_init_scale": 0.25},
    ],
    "RAdam": [{"rho_threshold": 4.0}, {"unrectified": "skip"}, {"unrectified": "momentum"}],
}
# of a first group, and without empty parameters: where none that starts at random has an element, or where init_state()
# came before the edit, the squares that were drawn sum to 0, the reference divides by it and the kernels make NaN
RANDOM = {"exp_avg_sq_init": "random"}
SPHERE = [
    {"projection": "sphere", "radius": None, "weight_decay": 0.0},
    {"projection": "sphere", "radius": 3.0, "weight_decay": 0.0},
    {"projection": None, "radius": None},
]
SCHEDULES = [
    None,
    fw.schedules.warmup(3).then(fw.schedules.cosine(1.0, 0.1, 4)),
    fw.schedules.table([0.1, 0.9, 0.3]).then(fw.schedules.constant(0.25)),
]
AVERAGES = [None, fw.EMA(0.9), fw.EMA(0.8, every=2), fw.SWA(1), fw.SWA(2, every=3)]
GRADIENTS = ["new", "kept", "left", "none", "zero", "columns", "every second", "expanded"]
OWN_GRADIENTS = [*GRADIENTS, "other dtype", "sparse"]
COPIES: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda saved: saved,
    "deepcopy": copy.deepcopy,
    "file": through_file,
}

INDEX = st.integers(0, MOST_PARAMS - 1)


def of_machine(name: str) -> st.SearchStrategy[Any]:
    """Return the strategy that the machine has under a name."""
    return st.runner().flatmap(lambda machine: getattr(machine, name))


def spec_of(dtypes: Sequence[torch.dtype]) -> st.SearchStrategy[Spec]:
    return st.builds(Spec, st.sampled_from(SHAPES), st.sampled_from(dtypes), st.sampled_from(list(LAYOUTS)))


def operation(**arguments: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """Make a rule of a method; a step follows, with gradients of the kinds ``then``, unless there are none."""

    def decorate(method: Callable[..., None]) -> Any:
        def operate(self: Lockstep, then: list[str], **drawn: Any) -> None:
            self.agreed = False
            method(self, **drawn)
            if then:
                self.advance(then)

        operate.__name__ = method.__name__
        return rule(then=st.just([]) | of_machine("gradients"), **arguments)(operate)

    return decorate


class Lockstep(RuleBasedStateMachine):
    """Operations that torch's optimizers know.

    Args:
        name: Name of the optimizer class.
    """

    backends: tuple[str, ...] = ("cpu", "reference", "torch")
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    kinds: tuple[str, ...] = tuple(GRADIENTS)
    averages: tuple[Any, ...] = (None, fw.EMA(0.9), fw.SWA(1))
    poisons: tuple[float, ...] = (float("nan"),)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.clock, self.agreed = name, 0, False
        self.sides: list[Side] = []

    # what the rules draw from

    @property
    def spec(self) -> st.SearchStrategy[Spec]:
        return spec_of(self.dtypes)

    @property
    def specs(self) -> st.SearchStrategy[list[Spec]]:
        return st.lists(self.spec, min_size=1, max_size=4)

    @property
    def gradients(self) -> st.SearchStrategy[list[str]]:
        return st.lists(st.sampled_from(self.kinds), min_size=1, max_size=5)

    @property
    def edits(self) -> st.SearchStrategy[dict[str, Any]]:
        return st.sampled_from(EDITS[self.name])

    @property
    def starts(self) -> st.SearchStrategy[dict[str, Any]]:
        """Edits of the first group before it has states."""
        return self.edits

    # the sides

    @initialize(
        specs=of_machine("specs"),
        first=st.integers(0, 3),
        hyper=st.lists(of_machine("starts"), max_size=4),
        average=of_machine("averages_drawn"),
        limit=st.sampled_from([None, None, 0.5, 1e6]),
        looks=st.sampled_from([True, True, False]),
    )
    def begin(
        self, specs: list[Spec], first: int, hyper: list[dict], average: Any, limit: float | None, looks: bool
    ) -> None:
        # states that nobody reads are not compared by the steps: where this does not look, they are compared at
        # the end only
        self.looks = looks
        if RANDOM in hyper:
            specs = [spec for spec in specs if 0 not in spec.shape] or [Spec((7,), self.dtypes[0], "rows")]
        for backend in self.backends:
            params = [spec.make(i) for i, spec in enumerate(specs)]
            options = {"average": average, "max_grad_norm": limit}
            side = Side(backend, self.name, params, options)
            groups = [{"params": params[:first], **self.merged(hyper)}, {"params": params[first:]}]
            side.opt = side.make([group for group in groups if group["params"]])
            self.sides.append(side)
        self.comparison = Comparison(self.sides[0], self.sides[1])

    @property
    def averages_drawn(self) -> st.SearchStrategy[Any]:
        return st.sampled_from(self.averages)

    def merged(self, edits: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the values of edits for one side, tensors and lists of their own."""
        merged: dict[str, Any] = {}
        for edit in edits:
            merged |= self.completed(edit)
        return copy.deepcopy(merged)

    def completed(self, edit: dict[str, Any]) -> dict[str, Any]:
        return edit

    @property
    def ours(self) -> list[Side]:
        return self.sides[:2]

    @property
    def limit(self) -> float | None:
        return self.sides[0].settings["max_grad_norm"]

    def each(self, operate: Callable[[Side], Any], *, may_warn: bool = False) -> None:
        """Do something on every side: with the same random numbers, and the same warnings on both of ours."""
        said = []
        for side in self.sides:
            torch.manual_seed(self.clock)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                operate(side)
            said.append([str(warning.message) for warning in caught])
        assert said[0] == said[1]
        assert may_warn or not said[0]

    def index(self, i: int) -> int:
        return i % len(self.sides[0].params)

    def group(self, side: Side, g: int) -> dict[str, Any]:
        return side.groups[g % len(side.groups)]

    def give(self, kinds: list[str], scale: float = 1.0) -> None:
        """Set gradients; the kinds are repeated over the parameters."""
        self.clock += 1
        for i, param in enumerate(self.sides[0].params):
            kind = kinds[i % len(kinds)]
            if kind == "sparse" and (self.name != "SGD" or not param.dim()):
                kind = "new"
            values = normal(param.shape, 1000 * self.clock + i) * scale
            for side in self.sides:
                give_gradient(side.params[i], kind, values)

    def advance(self, kinds: list[str], scale: float = 1.0) -> None:
        """Make one step with gradients of some kinds."""
        self.give(kinds, scale)
        self.step(scale=scale)

    def step(self, closure: Callable[[Side], Any] | None = None, scale: float = 1.0) -> None:
        """Make one step with the gradients as they are."""
        self.comparison.note_gradients(scale)
        grads = [p.grad for group in self.ours[0].groups for p in group["params"] if p.grad is not None]
        norm = sum(float(grad.to_dense().double().square().sum()) for grad in grads) ** 0.5 / scale
        self.each(lambda side: side.step(None if closure is None else partial(closure, side)))
        for side in self.ours:
            check_last_row(side, norm)
        self.comparison.note_clipping()

    @invariant()
    def sides_agree(self) -> None:
        self.compare(states=self.looks)
        for side in self.sides[1:]:
            synchronize(self.sides[0], side, states=self.looks)
        self.agreed = True

    def compare(self, *, states: bool) -> None:
        self.comparison.params()
        if states:
            self.comparison.states()
            self.comparison.groups()
            self.comparison.telemetry()
        for side in self.sides[2:]:
            compare_with_torch(self.sides[0], side, states=states)

    def teardown(self) -> None:
        # after a failure there is nothing more to say
        if self.agreed:
            self.compare(states=True)

    # steps

    @rule(kinds=of_machine("gradients"))
    def step_with(self, kinds: list[str]) -> None:
        self.agreed = False
        self.advance(kinds)

    @operation()
    def step_again(self) -> None:
        self.step()

    @operation(kinds=of_machine("gradients"))
    def step_with_closure(self, kinds: list[str]) -> None:
        def closure(side: Side) -> torch.Tensor:
            side.opt.zero_grad()
            for i, param in enumerate(side.params):
                give_gradient(param, kinds[i % len(kinds)], normal(param.shape, 1000 * self.clock + i))
            return torch.tensor(float(self.clock))

        self.clock += 1
        kinds = [kind if kind in GRADIENTS else "new" for kind in kinds]
        # the same gradients beforehand, of which the norm is known
        for side in self.sides:
            closure(side)
        self.step(closure)

    @operation(kinds=of_machine("gradients"))
    def step_with_hooks(self, kinds: list[str]) -> None:
        def negate(opt: torch.optim.Optimizer, *arguments: Any) -> None:
            for param in (param for group in opt.param_groups for param in group["params"]):
                param.grad = None if param.grad is None else -param.grad

        opts = [side.opt for side in self.sides]
        hooks = [opt.register_step_pre_hook(negate) for opt in opts]
        hooks += [opt.register_step_post_hook(negate) for opt in opts]
        self.advance(kinds)
        for hook in hooks:
            hook.remove()

    @precondition(lambda self: self.may_poison())
    @operation(i=INDEX, poison=of_machine("poisons_drawn"))
    def step_with_nonfinite_gradient(self, i: int, poison: float) -> None:
        """Make a step and repair its result, because from a parameter that is NaN our moments become NaN too."""
        self.give(["new"])
        for side in self.sides:
            side.params[self.index(i)].grad.flatten()[:1] = poison
        self.step()
        self.compare(states=True)
        for side in self.sides:
            state = side.states(self.index(i))
            tensors = [state.get(key) for key in (*MOMENTS, "average")]
            for tensor in (side.params[self.index(i)].data, *tensors):
                if tensor is not None:
                    tensor.nan_to_num_(0.0, 0.0, 0.0)

    @property
    def poisons_drawn(self) -> st.SearchStrategy[float]:
        return st.sampled_from(self.poisons)

    def may_poison(self) -> bool:
        """Return whether one bad element stays alone."""
        return self.limit is None

    @operation(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        self.each(lambda side: side.opt.zero_grad(set_to_none=to_none))

    # parameters and groups

    @operation(i=INDEX)
    def toggle_requires_grad(self, i: int) -> None:
        for side in self.sides:
            param = side.params[self.index(i)]
            param.requires_grad_(not param.requires_grad)

    @precondition(lambda self: len(self.sides[0].params) < MOST_PARAMS)
    @operation(spec=of_machine("spec"), hyper=st.lists(of_machine("edits"), max_size=3))
    def add_group(self, spec: Spec, hyper: list[dict[str, Any]]) -> None:
        def add(side: Side) -> None:
            side.saved = None
            side.params = [*side.params, spec.make(len(side.params))]
            side.opt.add_param_group({"params": side.params[-1:], **self.merged(hyper)})

        self.each(add)

    @operation(g=INDEX, edit=of_machine("edits"))
    def edit_group(self, g: int, edit: dict[str, Any]) -> None:
        for side in self.sides:
            self.group(side, g).update(self.merged([edit]))

    @operation(g=INDEX, factor=st.sampled_from([0.0, 0.5, 1.0]))
    def write_into_values(self, g: int, factor: float) -> None:
        for side in self.sides:
            group = self.group(side, g)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].mul_(factor)
            if isinstance(group.get("betas"), list):
                group["betas"][0] *= factor

    @operation(g=INDEX, turned=st.booleans())
    def replace_list_of_params(self, g: int, turned: bool) -> None:
        for side in self.sides:
            side.saved = None
            group = self.group(side, g)
            group["params"] = group["params"][::-1] if turned else list(group["params"])

    @operation(g=INDEX)
    def turn_params_in_place(self, g: int) -> None:
        for side in self.sides:
            side.saved = None
            self.group(side, g)["params"].reverse()

    @operation(turned=st.booleans())
    def replace_groups(self, turned: bool) -> None:
        for side in self.sides:
            side.saved = None
            side.opt.param_groups = [dict(group) for group in side.groups[:: -1 if turned else 1]]

    @operation(g=INDEX, kinds=of_machine("gradients"))
    def leave_out_a_parameter(self, g: int, kinds: list[str]) -> None:
        for side in self.sides:
            group = self.group(side, g)
            group["params"], side.left_out = group["params"][1:], group["params"]
        self.advance(kinds)
        for side in self.sides:
            self.group(side, g)["params"] = side.left_out

    @operation(i=INDEX, how=st.sampled_from(["moved", "scaled", "new", *LAYOUTS]))
    def change_data(self, i: int, how: str) -> None:
        self.clock += 1
        for side in self.sides:
            param = side.params[self.index(i)]
            if how == "scaled":
                param.data.mul_(0.5)
            elif how == "new":
                param.data = normal(param.shape, self.clock).to(param.dtype)
            else:
                param.data = LAYOUTS[how](param.data) if how in LAYOUTS else param.data.clone()

    # states

    @operation(i=INDEX, how=st.sampled_from(["cloned", "scaled", "columns", "every second"]))
    def change_states(self, i: int, how: str) -> None:
        for side in self.sides:
            state = side.states(self.index(i))
            for key in [key for key in MOMENTS if state.get(key) is not None]:
                if how == "scaled":
                    state[key].mul_(0.5)
                else:
                    state[key] = LAYOUTS[how](state[key]) if how in LAYOUTS else state[key].clone()

    @operation(i=INDEX, n=st.integers(0, 40), how=st.sampled_from(["fill", "int", "float32", "int64"]))
    def change_count(self, i: int, n: int, how: str) -> None:
        """The count of a parameter, in place or replaced; torch's is float32."""
        if self.name == "SGD" and len(self.sides) > 2:
            return
        for side in self.sides:
            state = side.states(self.index(i))
            if "step" not in state:
                continue
            if how == "fill":
                state["step"].fill_(n)
            elif how == "int" and side.is_ours:
                state["step"] = n
            else:
                dtype = torch.int64 if how == "int64" and side.is_ours else torch.float32
                state["step"] = torch.tensor(n, dtype=dtype)

    @operation(i=INDEX)
    def hold_a_state(self, i: int) -> None:
        for side in self.sides:
            state = side.states(self.index(i))
            side.held = next((state[key] for key in MOMENTS if state.get(key) is not None), None)

    @operation(factor=st.sampled_from([0.5, 2.0]))
    def move_what_is_held(self, factor: float) -> None:
        for side in self.sides:
            if side.held is not None:
                side.held.data = side.held.data * factor

    @operation(i=INDEX, whole=st.booleans())
    def delete_states(self, i: int, whole: bool) -> None:
        for side in self.sides:
            if whole:
                side.opt.state.clear()
            else:
                side.opt.state.pop(side.params[self.index(i)], None)

    @operation(i=INDEX)
    def keep_entries_of_the_user(self, i: int) -> None:
        if all(side.states(self.index(i)) for side in self.sides):
            for side in self.sides:
                state = side.states(self.index(i))
                state["mine"], state["my_count"] = torch.arange(3.0), [self.clock, {"a": None}]

    @operation()
    def replace_states_by_plain_ones(self) -> None:
        for side in self.sides:
            plain = {param: dict(state) for param, state in side.opt.state.items()}
            side.opt.state = defaultdict(dict, plain)

    @operation(how=st.sampled_from(list(COPIES)), fresh=st.booleans())
    def save_and_load(self, how: str, fresh: bool) -> None:
        def reload(side: Side) -> None:
            saved = COPIES[how](side.opt.state_dict())
            if fresh:
                side.renew()
            side.opt.load_state_dict(saved)

        self.each(reload, may_warn=True)

    @operation()
    def save(self) -> None:
        for side in self.sides:
            side.saved = copy.deepcopy(side.opt.state_dict())

    @precondition(lambda self: self.sides[0].saved is not None)
    @operation(fresh=st.booleans())
    def load_what_was_saved(self, fresh: bool) -> None:
        def load(side: Side) -> None:
            if fresh:
                side.renew()
            # torch's optimizer takes the tensors of a state dict, not their values
            side.opt.load_state_dict(copy.deepcopy(side.saved))

        self.each(load, may_warn=True)

    @precondition(lambda self: len(self.sides) > 2)
    @operation(how=st.sampled_from(["deepcopy", "file"]), fresh=st.booleans())
    def exchange_states_with_torch(self, how: str, fresh: bool) -> None:
        saved = [COPIES[how](side.opt.state_dict()) for side in self.sides]
        sources = iter([saved[2], saved[2], saved[0]])

        def load(side: Side) -> None:
            if fresh:
                side.renew()
            side.opt.load_state_dict(next(sources))

        self.each(load)

    @operation(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy_optimizer(self, how: str) -> None:
        copied = copy.deepcopy if how == "deepcopy" else lambda both: pickle.loads(pickle.dumps(both))
        self.each(lambda side: side.copy_by(copied))

    # options

    @operation(limit=st.sampled_from([None, 0.5, 3.0, 1e6]))
    def change_max_grad_norm(self, limit: float | None) -> None:
        for side in self.sides:
            side.set("max_grad_norm", limit)

    @operation()
    def read(self) -> None:
        """Everything that a user may print."""
        for side in self.ours:
            repr(side.opt)
            side.opt.get_last_lr()
            side.opt.traffic()
            side.opt.telemetry.history()
        self.comparison.telemetry()


class OwnLockstep(Lockstep):
    """The options that only our optimizers have, and dtypes for which torch keeps other states."""

    backends = ("cpu", "reference")
    dtypes = tuple(DTYPES)
    kinds = tuple(OWN_GRADIENTS)
    averages = tuple(AVERAGES)
    poisons = (float("nan"), float("inf"), -float("inf"))

    @property
    def spec(self) -> st.SearchStrategy[Spec]:
        # all dtypes of a group on a sphere would inherit the roundings of its 16-bit parameters
        dtypes = [self.sides[0].params[0].dtype] if self.has_spheres else self.dtypes
        return spec_of(dtypes)

    @property
    def specs(self) -> st.SearchStrategy[list[Spec]]:
        return st.sampled_from([DTYPES, DTYPES, DTYPES[:1], DTYPES[1:2]]).flatmap(
            lambda dtypes: st.lists(spec_of(dtypes), min_size=1, max_size=4)
        )

    @property
    def edits(self) -> st.SearchStrategy[dict[str, Any]]:
        own = OWN_EDITS.get(self.name, [])
        return st.sampled_from([*EDITS[self.name], *own, *(SPHERE if self.has_spheres else [])])

    @property
    def starts(self) -> st.SearchStrategy[dict[str, Any]]:
        return self.edits | st.just(RANDOM) if self.name == "Adam" else self.edits

    @property
    def has_spheres(self) -> bool:
        return len(dtypes := {p.dtype for side in self.sides for p in side.params}) == 1 and (
            dtypes.pop().itemsize > 2
        )

    def completed(self, edit: dict[str, Any]) -> dict[str, Any]:
        return {"projection": None, "radius": None, **edit} if edit.get("weight_decay") else edit

    def may_poison(self) -> bool:
        skips = self.ours[0].opt.nonfinite == "skip"
        apart = not self.ours[0].opt.spec.is_layerwise and not self.has_spheres
        return skips or (self.limit is None and apart)

    # steps

    @operation(
        kinds=st.lists(st.sampled_from(["new", "none", "zero", "columns"]), min_size=1, max_size=5),
        scale=st.sampled_from([1.0, 4.0, 1024.0]),
        found=st.sampled_from([0.0, 0.0, 1.0, None]),
    )
    def step_under_a_scaler(self, kinds: list[str], scale: float, found: float | None) -> None:
        for side in self.sides:
            side.opt.grad_scale = torch.tensor(scale)
            side.opt.found_inf = 0.0 if found is None else torch.tensor(found)
        self.advance(kinds, scale)
        for side in self.sides:
            del side.opt.grad_scale, side.opt.found_inf

    @operation(g=INDEX, bad=st.sampled_from([{"lr": -1.0}, {"maximize": "yes"}, {"weight_decay": None}]))
    def try_a_step_that_is_refused(self, g: int, bad: dict[str, Any]) -> None:
        def refuse(side: Side) -> None:
            group = self.group(side, g)
            kept = {key: group[key] for key in bad}
            group.update(bad)
            with pytest.raises((ValueError, TypeError), match=rf"^{self.name}: {next(iter(bad))} must"):
                side.opt.step()
            group.update(kept)

        self.each(refuse)

    @operation()
    def init_state(self) -> None:
        self.each(lambda side: side.opt.init_state())

    @precondition(lambda self: hasattr(self.sides[0].opt, "init_from_gradients"))
    @operation()
    def init_from_gradients(self) -> None:
        said = []

        def start(side: Side) -> None:
            try:
                side.opt.init_from_gradients()
                said.append("")
            except (RuntimeError, ValueError) as error:
                said.append(str(error))

        self.give(["new"])
        self.comparison.note_gradients(1.0)
        self.each(start)
        assert said[0] == said[1]

    @operation(value=st.sampled_from([0.5, 3, torch.tensor(2.0), torch.tensor([[1.5]])]))
    def record(self, value: Any) -> None:
        for side in self.sides:
            side.opt.record_loss(value)
            side.opt.record_sharpness(value)

    # averages

    @precondition(lambda self: self.sides[0].settings["average"] is not None)
    @operation(raises=st.booleans())
    def evaluate_with_averages(self, raises: bool) -> None:
        def evaluate(side: Side) -> None:
            with side.opt.averaged_parameters():
                side.evaluated = [p.detach().clone() for p in side.params]
                with pytest.raises(RuntimeError, match="averaged_parameters"):
                    side.opt.step()
                assert not raises

        for side in self.sides:
            try:
                evaluate(side)
            except AssertionError:
                assert raises
        self.comparison.evaluated()

    @operation(average=of_machine("averages_drawn"))
    def change_average(self, average: Any) -> None:
        for side in self.sides:
            side.set("average", average)

    @operation(i=INDEX, how=st.sampled_from(["replaced", "written", "deleted", "count"]), n=st.integers(0, 9))
    def change_kept_average(self, i: int, how: str, n: int) -> None:
        for side in self.sides:
            state = side.states(self.index(i))
            if "average" not in state:
                continue
            if how == "replaced":
                state["average"] = state["average"].clone()
            elif how == "written":
                state["average"].mul_(0.5)
            elif how == "deleted":
                del state["average"]
            else:
                state["n_averaged"] = torch.tensor(float(n))

    # options

    @operation(nonfinite=st.sampled_from(["propagate", "skip"]))
    def change_nonfinite(self, nonfinite: str) -> None:
        for side in self.sides:
            side.set("nonfinite", nonfinite)

    @operation(unscales=st.booleans())
    def change_unscale_grads(self, unscales: bool) -> None:
        for side in self.sides:
            side.set("unscale_grads", unscales)

    @operation(g=INDEX, key=st.sampled_from(["schedule", "weight_decay_schedule"]), n=st.integers(0, 2))
    def change_schedule(self, g: int, key: str, n: int) -> None:
        for side in self.sides:
            self.group(side, g)[key] = SCHEDULES[n]

    @operation()
    def set_the_backend_again(self) -> None:
        for side in self.sides:
            side.opt.backend = side.backend

    @precondition(lambda self: not self.has_spheres)
    @operation(i=INDEX, dtype=st.sampled_from(DTYPES))
    def change_dtype(self, i: int, dtype: torch.dtype) -> None:
        for side in self.sides:
            param = side.params[self.index(i)]
            param.grad = None
            param.data = param.data.to(dtype)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam", "SGD"])
def test_sequences_train_as_torch_does(name: str) -> None:
    run_state_machine_as_test(partial(Lockstep, name), settings=SETTINGS)


@pytest.mark.parametrize("name", list(EDITS))
def test_sequences_train_as_the_reference_does(name: str) -> None:
    run_state_machine_as_test(partial(OwnLockstep, name), settings=SETTINGS)
