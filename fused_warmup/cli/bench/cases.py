"""Benchmark cases: our step and its baselines on identical tensors."""

from __future__ import annotations

import gc
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_warmup as fw

from ...plan.chunks import CHUNK
from ...reference.rounding import MODES, RESIDUES
from .ceiling import Pass, stream
from .timing import Comparison, Step, in_order, interleaved, nothing

# allocates the optimizer for some parameters and returns its step
StepFactory = Callable[[Sequence[nn.Parameter]], Step]
# our step, the peers by name, the untimed setup of every step, and the ceiling
Steps = tuple[Step, Mapping[str, Step], Step, Step | None]

# above this share of the machine used by other processes a ratio proves nothing
MAX_SHARE_OF_OTHERS = 0.1

_MAX_NORM = 1.0
_DECAY = 0.999


def bytes_moved(
    states: int,
    *,
    clip: bool = False,
    average: bool = False,
    layered: bool = False,
    itemsize: int = 4,
    residue: int = 0,
    state_size: int = 4,
) -> int:
    """Return the bytes per parameter that a step must move.

    Args:
        states: Number of states of the rule.
        clip: The norm reads the gradients once more.
        average: A float32 average is read and written.
        layered: The sums over a layer must be known before the parameter is written, so that a second pass
            reads the parameter and the states once more.
        itemsize: Bytes of a parameter and of its gradient.
        residue: Bytes of what a rounding mode keeps for each parameter.
        state_size: Bytes of an element of a state.

    Returns:
        Parameter, residue and states read and written, gradient read.
    """
    value, held = itemsize + residue, state_size * states
    return 2 * (value + held) + itemsize + itemsize * clip + 8 * average + (value + held) * layered


@dataclass(frozen=True)
class Columns:
    """What a step reads and writes besides parameters and gradients.

    Attributes:
        states: Number of states of the rule.
        clip: Whether the norm reads the gradients once more.
        average: Whether there is a float32 average.
        layered: Whether the rule needs sums over layers.
        residue: Dtype of what the rounding of 16-bit parameters keeps, or None.
        state_dtype: Dtype of the states.
    """

    states: int
    clip: bool = False
    average: bool = False
    layered: bool = False
    residue: torch.dtype | None = None
    state_dtype: torch.dtype = torch.float32

    def bytes_moved(self, numel: int, itemsize: int) -> int:
        """Return the bytes per parameter that the step must move in tensors of ``numel`` elements."""
        return bytes_moved(
            self.states,
            clip=self.clip,
            average=self.average,
            layered=self.layered and numel > CHUNK,
            itemsize=itemsize,
            residue=0 if self.residue is None else self.residue.itemsize,
            state_size=self.state_dtype.itemsize,
        )

    def passes(self, params: Sequence[Tensor]) -> list[Pass]:
        """Return the passes over the parameters, their gradients and new states, in the order of the step.

        A layer of one chunk is in the cache when its sums are known, so it is passed over once.
        """
        grads = [param.grad for param in params if param.grad is not None]
        states = [_like(params, self.state_dtype) for _ in range(self.states)]
        averages = [_like(params)] * self.average
        values = [params, *([] if self.residue is None else [_like(params, self.residue)])]
        passes = [Pass([], [grads])] if self.clip else []
        if self.layered and any(param.numel() > CHUNK for param in params):
            return [*passes, Pass(states, [*values, grads]), Pass([*values, *averages], states)]
        return [*passes, Pass([*values, *states, *averages], [grads])]


def _like(params: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return a tensor of a dtype for each parameter."""
    return [torch.zeros(param.shape, dtype=dtype) for param in params]


def ours(optimizer: type[fw.FusedOptimizer], **options: Any) -> StepFactory:
    """Return the factory of a step of this package."""
    return lambda params: optimizer(list(params), **options).step


def torch_step(optimizer: type[torch.optim.Optimizer], **options: Any) -> StepFactory:
    """Return the factory of a step of ``torch.optim``."""
    return lambda params: optimizer(params, **options).step


def clipped(factory: StepFactory) -> StepFactory:
    """Return the factory of a step that runs ``clip_grad_norm_`` first."""

    def make(params: Sequence[nn.Parameter]) -> Step:
        step = factory(params)
        return in_order(lambda: nn.utils.clip_grad_norm_(params, _MAX_NORM), step)

    return make


def averaged(factory: StepFactory) -> StepFactory:
    """Return the factory of a step that updates a moving average of the weights afterwards."""

    def make(params: Sequence[nn.Parameter]) -> Step:
        step, model = factory(params), nn.ParameterList(params)
        decay = get_ema_multi_avg_fn(_DECAY)  # type: ignore[no-untyped-call]
        average = AveragedModel(model, multi_avg_fn=decay)
        return in_order(step, lambda: average.update_parameters(model))

    return make


@dataclass(frozen=True)
class StepSpec:
    """One optimizer stage to benchmark, such as clipping and Adam.

    Attributes:
        name: Name in the tables.
        ours: Factory of our step.
        peers: Factories of the steps that a user would write today, by name.
        columns: What our step reads and writes.
        goals: Ratio to reach for each shape, or None without a goal.
        dtype: Type of parameters and gradients.
    """

    name: str
    ours: StepFactory
    peers: Mapping[str, StepFactory]
    columns: Columns
    goals: Mapping[str, float | None]
    dtype: torch.dtype = torch.float32


# number of tensors, elements per tensor
SHAPES = {"10x2M": (10, 2_000_000), "300x6667": (300, 6_667), "1000x20000": (1000, 20_000)}

_ADAM = torch_step(torch.optim.Adam, fused=True)
_EMA = fw.EMA(_DECAY)
_NO_GOAL: dict[str, float | None] = {"10x2M": None, "300x6667": None}

STEP_SPECS = (
    StepSpec(
        "Adam",
        ours(fw.Adam),
        {"Adam(fused=True)": _ADAM},
        Columns(2),
        {"10x2M": 1.1, "300x6667": 6.0, "1000x20000": 2.0},
    ),
    StepSpec(
        "clip+Adam",
        ours(fw.Adam, max_grad_norm=_MAX_NORM),
        {"clip_grad_norm_, Adam(fused=True)": clipped(_ADAM)},
        Columns(2, clip=True),
        {"10x2M": 1.45, "300x6667": 8.0},
    ),
    StepSpec(
        "RAdam",
        ours(fw.RAdam),
        {
            "RAdam(foreach=True)": torch_step(torch.optim.RAdam, foreach=True),
            "RAdam(foreach=False)": torch_step(torch.optim.RAdam, foreach=False),
        },
        Columns(2),
        {"10x2M": 3.5, "300x6667": 16.0},
    ),
    StepSpec(
        "Adam+EMA",
        ours(fw.Adam, average=_EMA),
        {"Adam(fused=True), AveragedModel": averaged(_ADAM)},
        Columns(2, average=True),
        {"10x2M": 1.15, "300x6667": 7.0},
    ),
    StepSpec(
        "clip+Adam+EMA",
        ours(fw.Adam, max_grad_norm=_MAX_NORM, average=_EMA),
        {"clip_grad_norm_, Adam(fused=True), AveragedModel": averaged(clipped(_ADAM))},
        Columns(2, clip=True, average=True),
        {"10x2M": 1.7, "300x6667": 8.0},
    ),
    StepSpec(
        "Adam, no telemetry",
        ours(fw.Adam, telemetry=False),
        {"Adam(fused=True)": _ADAM},
        Columns(2),
        _NO_GOAL,
    ),
    StepSpec(
        "AdamW",
        ours(fw.AdamW),
        {"AdamW(fused=True)": torch_step(torch.optim.AdamW, fused=True)},
        Columns(2),
        _NO_GOAL,
    ),
    StepSpec(
        "SGD momentum",
        ours(fw.SGD, momentum=0.9),
        {"SGD(momentum=0.9, fused=True)": torch_step(torch.optim.SGD, momentum=0.9, fused=True)},
        Columns(1),
        _NO_GOAL,
    ),
    StepSpec(
        "SGD",
        ours(fw.SGD),
        {"SGD(fused=True)": torch_step(torch.optim.SGD, fused=True)},
        Columns(0),
        _NO_GOAL,
    ),
    StepSpec(
        "Adam bfloat16",
        ours(fw.Adam),
        {"Adam(fused=True), states in bfloat16 too": _ADAM},
        Columns(2),
        {"10x2M": None},
        torch.bfloat16,
    ),
    *(
        StepSpec(
            f"Adam bfloat16, {mode}",
            ours(fw.Adam, param_rounding=mode),
            {"Adam(fused=True), states in bfloat16 too, to nearest": _ADAM},
            Columns(2, residue=RESIDUES[mode][1] if mode in RESIDUES else None),
            {"10x2M": None},
            torch.bfloat16,
        )
        for mode in MODES
        if mode != "nearest"
    ),
    *(
        StepSpec(
            f"Adam {name}, states bfloat16",
            ours(fw.Adam, param_rounding=mode, state_dtype=torch.bfloat16),
            {peer: _ADAM},
            Columns(2, state_dtype=torch.bfloat16),
            {"10x2M": None},
            dtype,
        )
        for name, dtype, mode, peer in (
            ("float32", torch.float32, "nearest", "Adam(fused=True), states in float32"),
            ("bfloat16, stochastic", torch.bfloat16, "stochastic", "Adam(fused=True), all of bfloat16"),
        )
    ),
)


@dataclass(frozen=True)
class Row:
    """One row of the tables; its fields are the keys of the JSON reports.

    Attributes:
        name: Names of the stage and the shape.
        peer: Name of the fastest peer.
        ours_ms: Median of our step, milliseconds.
        peer_ms: Median of the peer, milliseconds.
        ratio: ``peer_ms / ours_ms``.
        spread: Quartiles of the ratio taken round by round.
        goal: Ratio to reach, or None.
        gb_per_s: Bytes that our step must move / its time, 10^9 per second; None for host time.
        ceiling: Bytes per second of passes that only read and write as much, 10^9 per second.
        host_us: Microseconds of our step outside the compiled call, or None.
        others: Share of the machine's cores that other processes used meanwhile, or None.
    """

    name: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float
    spread: tuple[float, float]
    goal: float | None = None
    gb_per_s: float | None = None
    ceiling: float | None = None
    host_us: float | None = None
    others: float | None = None

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"``, ``"disturbed"`` by other processes, or ``""`` without a goal."""
        if self.goal is None:
            return ""
        # a peer with many parallel regions loses far more than we do when its threads must share their cores
        if self.others is not None and self.others > MAX_SHARE_OF_OTHERS:
            return "disturbed"
        return "met" if self.ratio >= self.goal else "missed"

    @property
    def of_ceiling(self) -> float | None:
        """Our bytes per second / those of the ceiling, or None if unknown."""
        return self.gb_per_s / self.ceiling if self.gb_per_s and self.ceiling else None


class BenchmarkCase(ABC):
    """A comparison of our step with its peers.

    Attributes:
        name: Name in the tables.
    """

    name: str

    @abstractmethod
    def steps(self) -> Steps:
        """Allocate tensors and optimizers; return our step, the peers, the setup and the ceiling."""

    @abstractmethod
    def monitored(self) -> AbstractContextManager[None]:
        """Take the extra measurements that ``row`` needs while the comparison runs inside the block."""

    @abstractmethod
    def row(self, result: Comparison) -> Row:
        """Return the table row of a comparison that ran inside ``monitored``."""


class ThroughputCase(BenchmarkCase):
    """Speed of one optimizer stage on tensors of one shape, in bytes per second.

    Args:
        spec: The optimizer stage.
        shape: Key of ``SHAPES``.
    """

    def __init__(self, spec: StepSpec, shape: str) -> None:
        self.spec, self.shape = spec, shape
        self.name = f"{spec.name} {shape}"

    def steps(self) -> Steps:
        """Allocate tensors and optimizers; return our step, the peers, the setup and the ceiling."""
        return self.steps_on(make_params(*SHAPES[self.shape], self.spec.dtype))

    def steps_on(self, params: Sequence[nn.Parameter]) -> Steps:
        """Return our step, the peers, the setup and the ceiling on some parameters."""
        peers = {name: make(params) for name, make in self.spec.peers.items()}
        return self.spec.ours(params), peers, nothing, stream(self.spec.columns.passes(params))

    def monitored(self) -> AbstractContextManager[None]:
        """Take no extra measurements."""
        return nullcontext()

    def row(self, result: Comparison) -> Row:
        """Return the table row of a comparison that ran inside ``monitored``."""
        count, numel = SHAPES[self.shape]
        n_bytes = self.spec.columns.bytes_moved(numel, self.spec.dtype.itemsize) * count * numel
        return replace(
            row_of(self.name, result),
            goal=self.spec.goals[self.shape],
            gb_per_s=n_bytes / result.ours / 1e9,
            ceiling=n_bytes / result.ceiling / 1e9 if result.ceiling else None,
        )


class HostCase(BenchmarkCase):
    """Python overhead: the step of many tiny tensors.

    Args:
        tensors: Number of tensors of 64 elements.
        groups: Number of parameter groups.
        fresh: Whether every step gets newly allocated gradients, as after ``zero_grad(set_to_none=True)``.
    """

    def __init__(self, tensors: int, groups: int, fresh: bool) -> None:
        self.tensors, self.groups, self.fresh = tensors, groups, fresh
        grads = "new gradients" if fresh else "kept gradients"
        plural = "s" if groups > 1 else ""
        self.name = f"host {tensors} tensors, {groups} group{plural}, {grads}"
        self._kernel_seconds: list[float] = []

    def steps(self) -> Steps:
        """Allocate tensors and optimizers; return our step, the peer, the untimed setup and no ceiling."""
        params = make_params(self.tensors, 64, torch.float32)
        size = self.tensors // self.groups

        def grouped() -> list[dict[str, Any]]:
            return [{"params": params[i : i + size]} for i in range(0, len(params), size)]

        peer = torch.optim.Adam(grouped(), fused=True)
        setup = (lambda: renew(params)) if self.fresh else nothing
        return fw.Adam(grouped()).step, {"Adam(fused=True)": peer.step}, setup, None

    @contextmanager
    def monitored(self) -> Iterator[None]:
        """Record the time of every compiled call inside the block."""
        from ... import _cpu

        inner, clock = _cpu.step, time.perf_counter

        def step(*arguments: int) -> None:
            begin = clock()
            inner(*arguments)
            self._kernel_seconds.append(clock() - begin)

        _cpu.step = step  # type: ignore[assignment]
        try:
            yield
        finally:
            _cpu.step = inner

    def row(self, result: Comparison) -> Row:
        """Return the table row of a comparison that ran inside ``monitored``."""
        kernels = self._kernel_seconds[-len(result.rounds) :]
        outside = [whole - inside for whole, inside in zip(result.rounds, kernels, strict=True)]
        return replace(row_of(self.name, result), host_us=statistics.median(outside) * 1e6)


def make_params(count: int, numel: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """Return parameters with gradients; the values are the same at every call."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(numel, generator=generator).to(dtype)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(numel, generator=generator).to(dtype)
    return params


def renew(params: Sequence[nn.Parameter]) -> None:
    """Give every parameter a copy of its gradient at a new address."""
    # the old gradients live until the new ones exist, so that no address stays the same
    for param, grad in zip(params, [param.grad.clone() for param in params], strict=True):  # type: ignore[union-attr]
        param.grad = grad


def row_of(name: str, result: Comparison) -> Row:
    """Return the row of a comparison, in milliseconds."""
    return Row(
        name,
        result.peer,
        ours_ms=result.ours * 1e3,
        peer_ms=result.theirs * 1e3,
        ratio=result.ratio,
        spread=result.spread,
        others=result.others,
    )


def cases(pattern: str = "") -> list[BenchmarkCase]:
    """Return the cases whose name contains a text; upper and lower case are the same."""
    every: list[BenchmarkCase] = []
    for spec in STEP_SPECS:
        every += [ThroughputCase(spec, shape) for shape in spec.goals]
    for tensors, groups in ((300, 1), (1000, 1), (300, 10), (300, 300)):
        every += [HostCase(tensors, groups, fresh) for fresh in (False, True)]
    return [case for case in every if pattern.lower() in case.name.lower()]


def run_case(case: BenchmarkCase, seconds: float) -> Row:
    """Run a case and free its tensors."""
    with case.monitored():
        result = interleaved(*case.steps(), seconds=seconds)
    # optimizers are in reference cycles
    gc.collect()
    return case.row(result)
