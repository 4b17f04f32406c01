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
from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from lockstep import (
    AVERAGES,
    COPIES,
    EDITS,
    GRADIENTS,
    INDEX,
    MOST_PARAMS,
    OWN_EDITS,
    OWN_GRADIENTS,
    SCHEDULES,
    SPHERE,
    Machine,
    of_machine,
    operation,
    spec_of,
)
from lockstep_sides import DTYPES, LAYOUTS, MOMENTS, Side, Spec, give_gradient, normal, synchronize

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


@pytest.fixture(autouse=True)
def same_sequences(monkeypatch):
    """Hypothesis draws from the constants of modules, and so other values where others have been imported."""
    monkeypatch.setattr(providers.HypothesisProvider, "_local_constants", Constants())
    providers.CONSTANTS_CACHE.cache.clear()
    yield
    providers.CONSTANTS_CACHE.cache.clear()


class Lockstep(Machine):
    """Operations that torch's optimizers know."""

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

    @operation(g=INDEX, factor=st.sampled_from([0.25, 0.5]), kinds=of_machine("gradients"))
    def write_into_values(self, g: int, factor: float, kinds: list[str]) -> None:
        """A learning rate that is a tensor and betas that are a list show no new object.

        A rate of 0 is left out: a first step of it with gradients of 0 allocates the states, and counts for torch only.
        """
        for side in self.sides:
            group = self.group(side, g)
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64)
            group |= {"betas": list(group["betas"])} if "betas" in group else {}
        self.advance(kinds)
        for side in self.sides:
            group = self.group(side, g)
            group["lr"].mul_(factor)
            if "betas" in group:
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

    @operation(i=INDEX, factor=st.sampled_from([0.5, 2.0]), kinds=of_machine("gradients"))
    def move_a_held_state(self, i: int, factor: float, kinds: list[str]) -> None:
        """The optimizer cannot note it, for nothing is read from ``opt.state``."""
        for side in self.sides:
            state = side.states(self.index(i))
            side.held = next((state[key] for key in MOMENTS if state.get(key) is not None), None)
        self.advance(kinds)
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
        self.set("max_grad_norm", limit)

    @precondition(lambda self: self.sides[0].settings["average"] is not None)
    @operation(average=st.sampled_from([fw.EMA(0.5), fw.EMA(0.9), fw.SWA(1)]))
    def change_average(self, average: Any) -> None:
        self.set("average", average)

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
    def begin_or_end_average(self, average: Any) -> None:
        self.set("average", average)

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
        self.set("nonfinite", nonfinite)

    @operation(unscales=st.booleans())
    def change_unscale_grads(self, unscales: bool) -> None:
        self.set("unscale_grads", unscales)

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
        # states that were not looked at have the roundings of the old dtype, which may be coarser
        for side in self.sides[1:]:
            synchronize(self.sides[0], side, states=True)
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
