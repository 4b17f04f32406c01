"""The frame of a lockstep: sides made alike, changed alike, and compared after each operation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from cases import through_file
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lockstep_sides import (
    LAYOUTS,
    SHAPES,
    Comparison,
    Side,
    Spec,
    check_last_row,
    compare_with_torch,
    give_gradient,
    normal,
    synchronize,
)

import fused_warmup as fw

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
        {"exp_avg_sq_init": "random"},
        {"exp_avg_sq_init_scale": 0.25},
    ],
    "RAdam": [{"rho_threshold": 4.0}, {"unrectified": "skip"}, {"unrectified": "momentum"}],
}
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
        def operate(self: Machine, then: list[str], **drawn: Any) -> None:
            self.agreed = False
            method(self, **drawn)
            if then:
                self.advance(then)

        operate.__name__ = method.__name__
        return rule(then=st.just([]) | of_machine("gradients"), **arguments)(operate)

    return decorate


class Machine(RuleBasedStateMachine):
    """Sides of one optimizer, and the steps and comparisons that rules of a subclass share.

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
        """Edits of the first group before it has states; torch's Adam cannot turn ``amsgrad`` on later."""
        return self.edits | st.just({"amsgrad": True}) if self.name in ("Adam", "AdamW") else self.edits

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

    def set(self, name: str, value: Any) -> None:
        """Change an option of the whole optimizer."""
        for side in self.sides:
            side.set(name, value)

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
