"""Random tensors, layouts, groups and options: the compiled backend against the reference, byte by byte."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fused_warmup as fw
from fused_warmup.plan.tensors import compute_dtype

CPU_MISSING = "cpu" not in fw.available_backends()
pytestmark = pytest.mark.skipif(CPU_MISSING, reason="the extension fused_warmup._cpu is not built")

COMMON = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)

# Both backends make the same operations in the same order, but a compiler may turn the division of a vector
# or a sum of products into another correctly rounded form, and the norms are summed in another order. So a
# result in the type of the arithmetic may be off by a few roundings, and a 16-bit parameter, rounded from
# such a float32, by the one step of its own type that separates two neighbours.
ULPS = {torch.float32: 4.0, torch.float64: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}
# sums of at most 1e5 doubles, in two orders
NORM_RTOL = 1e-12
# but for the magnitudes, of which a lane adds at most 16 in float32 before it goes on in double
L1_RTOL = 16 * 2.0**-24
MARGIN = 64
SENTINEL = 0xA5

# around a block of the kernel (512), a chunk (32768), a vector, and nothing at all
LARGE = [(32767,), (32768,), (32769,), (181, 181)]
SHAPES = [
    (),
    (0,),
    (1,),
    (7,),
    (63,),
    (511,),
    (512,),
    (513,),
    (1, 1),
    (3, 5),
    (0, 4),
    (19, 27),
    (2, 3, 5),
    (4, 1, 6),
    (8, 8, 8),
    (3, 0, 2),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GRADS = ["like", "contiguous", "transposed", "expanded", "strided", "none"]


@dataclass(frozen=True)
class Layout:
    """Where a tensor lies in a longer stretch of memory."""

    order: str = "rows"
    gap: str = "dense"
    offset: int = 0

    def strides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the strides for a shape, innermost dimension chosen by ``order``, spread by ``gap``."""
        dims = list(range(len(shape)))
        if self.order == "columns":
            dims.reverse()
        elif self.order == "channels_last" and len(shape) > 2:
            dims = [0, *dims[2:], 1]
        strides, reach = [0] * len(shape), 2 if self.gap == "every second" else 1
        for position, dim in enumerate(reversed(dims)):
            strides[dim] = reach
            reach *= max(1, shape[dim])
            if position == 0 and self.gap == "padded rows":
                reach += 3
        return tuple(strides)


@dataclass(frozen=True)
class Spec:
    """One parameter and the kinds of its gradients, step by step."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    grads: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """An optimizer over groups of parameters."""

    name: str
    options: dict[str, Any]
    groups: list[tuple[dict[str, Any], list[Spec]]]
    poison: tuple[str | None, ...]


@dataclass
class Guarded:
    """A view into memory of which every other byte holds a sentinel."""

    flat: torch.Tensor
    view: torch.Tensor
    outside: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Mark what does not belong to the view."""
        self.outside = torch.ones(self.flat.numel(), dtype=torch.bool)
        self.outside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(False)

    def bytes_outside(self) -> torch.Tensor:
        """Return the bytes that nobody may write."""
        return self.flat[self.outside].view(torch.uint8)


def guarded(values: torch.Tensor, layout: Layout) -> Guarded:
    """Put values into a view with the given layout, with margins around it."""
    strides = layout.strides(tuple(values.shape))
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) if values.numel() else 0
    size = MARGIN + layout.offset + span + MARGIN
    flat = torch.full((size * values.element_size(),), SENTINEL, dtype=torch.uint8).view(values.dtype)
    view = flat.as_strided(tuple(values.shape), strides, MARGIN + layout.offset)
    view.copy_(values)
    return Guarded(flat, view)


def gradient(spec: Spec, kind: str, generator: torch.Generator) -> torch.Tensor | None:
    """Return a gradient of one kind; the values do not depend on the layout."""
    values = torch.randn(spec.shape, generator=generator, dtype=torch.float64).to(spec.dtype)
    if kind == "none":
        return None
    if kind == "expanded":
        first = values.flatten()[:1] if values.numel() else values.new_ones(1)
        return first.clone().expand(spec.shape) if spec.shape else first.clone()[0]
    layout = {
        "like": spec.layout,
        "contiguous": Layout(),
        "transposed": Layout("columns"),
        "strided": Layout(gap="every second", offset=3),
    }[kind]
    return guarded(values, layout).view


@dataclass
class Outcome:
    """Everything that a run left behind."""

    params: list[torch.Tensor]
    states: list[dict[str, Any]]
    history: dict[str, torch.Tensor]
    decayed: list[float]
    seen: list[float]


def train(problem: Problem, backend: str) -> Outcome:
    """Run a problem on one backend, checking after each step what must not be written."""
    generator = torch.Generator().manual_seed(0)
    groups, owners, decayed = [], [], []
    for options, specs in problem.groups:
        params = []
        for spec in specs:
            values = torch.randn(spec.shape, generator=generator, dtype=torch.float64).to(spec.dtype)
            guard = guarded(values, spec.layout)
            guard.view.requires_grad_()
            params.append(guard.view)
            owners.append((spec, guard, guard.bytes_outside().clone()))
            coupled = not {**problem.options, **options}.get("decoupled_weight_decay", False)
            decayed.append(options.get("weight_decay", 0.0) if coupled else 0.0)
        groups.append({"params": params, **options})
    opt = getattr(fw, problem.name)(groups, backend=backend, **problem.options)
    seen = [0.0] * len(owners)
    for i, poison in enumerate(problem.poison):
        given_grads = []
        for spec, guard, _ in owners:
            grad = gradient(spec, spec.grads[i], generator)
            if poison is not None and grad is not None and grad.numel() and spec.grads[i] != "expanded":
                grad.as_strided((1,), (1,), grad.storage_offset()).fill_(float(poison))
                poison = None
            guard.view.grad = grad
            given_grads.append((grad, None if grad is None else grad.clone()))
        seen = [
            max(largest(grad) + decay * largest(guard.view), before)
            for (_, guard, _), (grad, _), decay, before in zip(
                owners, given_grads, decayed, seen, strict=True
            )
        ]
        opt.step()
        for (_, guard, before), (grad, copy) in zip(owners, given_grads, strict=True):
            assert torch.equal(guard.bytes_outside(), before), "the step wrote outside a view"
            if grad is not None:
                assert torch.equal(grad.nan_to_num(7.0), copy.nan_to_num(7.0)), "the step wrote a gradient"
    params = [guard.view.detach() for _, guard, _ in owners]
    states = [dict(opt.state.get(guard.view, {})) for _, guard, _ in owners]
    return Outcome(params, states, opt.telemetry.history(), decayed, seen)


def largest(tensor: torch.Tensor | None) -> float:
    """Return the largest finite magnitude, 0 if there is none."""
    if tensor is None or not tensor.numel():
        return 0.0
    return float(tensor.detach().double().abs().nan_to_num(0.0, 0.0, 0.0).max())


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, ulps: float, label: str, scale: float = 1e-30
) -> None:
    """Compare up to a number of roundings at the largest element or ``scale``, NaN and infinities exactly."""
    assert actual.shape == expected.shape, label
    assert actual.dtype == expected.dtype, label
    assert torch.equal(actual.isnan(), expected.isnan()), label
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), label
    a, b = actual[finite].double(), expected[finite].double()
    if a.numel():
        worst = float((a - b).abs().max()) / max(float(b.abs().max()), scale)
        assert worst <= ulps * torch.finfo(expected.dtype).eps, (label, worst)


def assert_same_training(problem: Problem) -> None:
    """Compare parameters, every state, averages and telemetry of the two backends."""
    actual, expected = train(problem, "cpu"), train(problem, "reference")
    rows = zip(
        actual.params,
        expected.params,
        actual.states,
        expected.states,
        expected.decayed,
        expected.seen,
        strict=True,
    )
    # the clip coefficient is a quotient by a norm: what its roundings changed, the gradients inherit
    coefs = actual.history["clip_coef"], expected.history["clip_coef"]
    inherited = float((coefs[0] - coefs[1]).abs().div(coefs[1]).nan_to_num(0.0).max())
    for i, (param, param_ref, state, state_ref, decay, seen) in enumerate(rows):
        inexact = 4.0 * inherited / torch.finfo(compute_dtype(param.dtype)).eps
        ulps = ULPS[param.dtype] + (inexact if param.dtype.itemsize > 2 else 0.0)
        assert_close(param, param_ref, ulps, f"parameter {i}")
        assert state.keys() == state_ref.keys()
        for key, value in state_ref.items():
            if key in ("step", "n_averaged"):
                assert int(state[key]) == int(value), f"{key} of parameter {i}"
                continue
            # coupled decay brings the rounding of the parameter into the gradient
            eps = torch.finfo(value.dtype).eps
            fed_back = decay * torch.finfo(param.dtype).eps / eps
            own = ulps * torch.finfo(param.dtype).eps / eps if key == "average" else ULPS[value.dtype]
            # gradient and decay may cancel: the roundings are those of the terms, not of their sum
            scale = {"average": 1e-30, "exp_avg": seen, "momentum_buffer": seen}.get(key, seen**2)
            assert_close(state[key], value, own + inexact + 4.0 * fed_back, f"{key} of parameter {i}", scale)
    assert actual.history.keys() == expected.history.keys()
    for key, value in expected.history.items():
        torch.testing.assert_close(
            actual.history[key],
            value,
            rtol=L1_RTOL if key == "grad_norm_l1" else NORM_RTOL,
            atol=0.0,
            equal_nan=True,
            msg=key,
        )


RATES = st.sampled_from([1e-3, 0.03])
DECAYS = st.sampled_from([0.0, 0.1])
BETAS = st.sampled_from([(0.9, 0.999), (0.8, 0.9), (0.0, 0.5), (0.95, 0.0)])
HYPERS = {
    "Adam": {
        "lr": RATES,
        "betas": BETAS,
        "weight_decay": DECAYS,
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
        "decoupled_weight_decay": st.booleans(),
        "eps": st.sampled_from([1e-8, 1e-3]),
    },
    "GIAdam": {
        "lr": RATES,
        "betas": BETAS,
        "weight_decay": DECAYS,
        "maximize": st.booleans(),
        "decoupled_weight_decay": st.booleans(),
        "exp_avg_sq_init_scale": st.sampled_from([1.0, 0.25]),
    },
    "RAdam": {
        "lr": RATES,
        "betas": st.sampled_from([(0.9, 0.999), (0.8, 0.95), (0.9, 0.6)]),
        "weight_decay": DECAYS,
        "maximize": st.booleans(),
        "decoupled_weight_decay": st.booleans(),
        "rho_threshold": st.sampled_from([4.0, 5.0]),
        "unrectified": st.sampled_from(["momentum", "skip"]),
    },
    "SGD": {
        "lr": RATES,
        "weight_decay": DECAYS,
        "momentum": st.sampled_from([0.0, 0.9]),
        "dampening": st.sampled_from([0.0, 0.3]),
        "maximize": st.booleans(),
    },
}
AVERAGES = [None, fw.EMA(0.9), fw.EMA(0.9, every=2), fw.SWA(1), fw.SWA(2, every=3)]
SCHEDULES = [None, fw.schedules.warmup(3).then(fw.schedules.cosine(1.0, 0.0, 4))]
STEPS = 6

DENSE = st.builds(
    Layout, st.sampled_from(["rows", "columns", "channels_last"]), st.just("dense"), st.integers(0, 7)
)
STRIDED = st.builds(
    Layout,
    st.sampled_from(["rows", "columns", "channels_last"]),
    st.sampled_from(["every second", "padded rows"]),
    st.integers(0, 7),
)


@st.composite
def problems(draw: st.DrawFn, name: str, layouts: st.SearchStrategy[Layout]) -> Problem:
    """Draw an optimizer with its groups; one parameter may be larger than a chunk."""
    steps = draw(st.integers(1, STEPS))
    rest = st.sampled_from(DTYPES), layouts, st.tuples(*[st.sampled_from(GRADS)] * steps)
    spec = st.builds(Spec, st.sampled_from(SHAPES), *rest)
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        options = draw(st.fixed_dictionaries({}, optional=HYPERS[name]))
        options["schedule"] = draw(st.sampled_from(SCHEDULES))
        groups.append((options, draw(st.lists(spec, min_size=1, max_size=3))))
    if draw(st.sampled_from([False, False, True])):
        groups[0][1].append(draw(st.builds(Spec, st.sampled_from(LARGE), *rest)))
    options = {
        "lr": 0.01,
        "average": draw(st.sampled_from(AVERAGES)),
        "max_grad_norm": draw(st.sampled_from([None, None, 0.5, 1e6])),
        "nonfinite": draw(st.sampled_from(["propagate", "skip"])),
        "weight_decay_schedule": draw(st.sampled_from(SCHEDULES)),
    }
    poison = draw(st.sampled_from([None, None, "nan", "inf", "-inf"]))
    when = draw(st.integers(0, steps - 1))
    return Problem(name, options, groups, tuple(poison if i == when else None for i in range(steps)))


@pytest.mark.parametrize("name", list(HYPERS))
def test_dense_tensors_train_as_the_reference_does(name: str) -> None:
    @settings(COMMON, max_examples=40)
    @given(problems(name, DENSE))
    def check(problem: Problem) -> None:
        assert_same_training(problem)

    check()


@pytest.mark.parametrize("name", list(HYPERS))
def test_strided_views_train_as_the_reference_does(name: str) -> None:
    @settings(COMMON, max_examples=20)
    @given(problems(name, STRIDED))
    def check(problem: Problem) -> None:
        assert_same_training(problem)

    check()


@pytest.mark.parametrize("gap", ["dense", "every second", "padded rows"])
@pytest.mark.parametrize("name", list(HYPERS))
def test_the_layout_of_memory_does_not_change_a_bit(name: str, gap: str) -> None:
    layouts = st.builds(
        Layout, st.sampled_from(["rows", "columns", "channels_last"]), st.just(gap), st.integers(0, 7)
    )

    @settings(COMMON, max_examples=15)
    @given(
        st.sampled_from([s for s in SHAPES + LARGE if math.prod(s)]),
        st.sampled_from(DTYPES),
        layouts,
        st.booleans(),
    )
    def check(shape: tuple[int, ...], dtype: torch.dtype, layout: Layout, decay: bool) -> None:
        options = {"lr": 0.03, "weight_decay": 0.1 if decay else 0.0}
        left = Problem(name, options, [({}, [Spec(shape, dtype, layout, ("like",) * 3)])], (None,) * 3)
        right = Problem(name, options, [({}, [Spec(shape, dtype, Layout(), ("like",) * 3)])], (None,) * 3)
        a, b = train(left, "cpu"), train(right, "cpu")
        assert torch.equal(a.params[0], b.params[0])
        for key, value in b.states[0].items():
            assert torch.equal(a.states[0][key], value), key

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 511, 512, 513, 32767, 32768, 32769, 65537])
def test_kernels_stay_inside_states_and_averages(size: int, dtype: torch.dtype) -> None:
    param = torch.ones(size, dtype=dtype, requires_grad=True)
    opt = fw.Adam([param], lr=0.1, amsgrad=True, average=fw.EMA(0.5), backend="cpu")
    param.grad = torch.ones_like(param)
    opt.step()
    guards = {}
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "average"):
        guards[key] = guarded(opt.state[param][key], Layout(offset=1))
        opt.state[param][key] = guards[key].view
    opt.session.reset()
    before = {key: guard.bytes_outside().clone() for key, guard in guards.items()}
    moved = {key: guard.view.clone() for key, guard in guards.items()}
    param.grad = torch.full_like(param, 2.0)
    opt.step()
    for key, guard in guards.items():
        assert torch.equal(guard.bytes_outside(), before[key]), key
        assert not torch.any(guard.view == moved[key]), f"{key} was not written everywhere"
