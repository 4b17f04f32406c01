"""What is compared: the steps of both sides, on the same parameters and gradients."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_warmup as fw

from .timing import Comparison, Step, in_order, interleaved, nothing, stream, stream_seconds

Maker = Callable[[Sequence[nn.Parameter]], Step]
# our step, the peers by name, and what every step needs
Sides = tuple[Step, Mapping[str, Step], Step]

# above this share of the machine used by other processes a ratio proves nothing
QUIET = 0.1
STREAM = "a.mul_(c) on as many bytes"

_MAX_NORM = 1.0
_DECAY = 0.999


def bytes_moved(states: int, *, clip: bool = False, average: bool = False, itemsize: int = 4) -> int:
    """Return the bytes per parameter that a step must move.

    Args:
        states: Number of float32 states of the rule.
        clip: The norm reads the gradients once more.
        average: A float32 average is read and written.
        itemsize: Bytes of a parameter and of its gradient.

    Returns:
        Parameter and states read and written, gradient read.
    """
    return 3 * itemsize + 8 * states + itemsize * clip + 8 * average


def ours(optimizer: type[fw.FusedOptimizer], **options: Any) -> Maker:
    """Return the maker of a step of ours."""
    return lambda params: optimizer(list(params), **options).step


def torch_step(optimizer: type[torch.optim.Optimizer], **options: Any) -> Maker:
    """Return the maker of a step of ``torch.optim``."""
    return lambda params: optimizer(params, **options).step


def clipped(maker: Maker) -> Maker:
    """Put ``clip_grad_norm_`` before a step."""

    def make(params: Sequence[nn.Parameter]) -> Step:
        step = maker(params)
        return in_order(lambda: nn.utils.clip_grad_norm_(params, _MAX_NORM), step)

    return make


def averaged(maker: Maker) -> Maker:
    """Put the update of a moving average after a step."""

    def make(params: Sequence[nn.Parameter]) -> Step:
        step, model = maker(params), nn.ParameterList(params)
        decay = get_ema_multi_avg_fn(_DECAY)  # type: ignore[no-untyped-call]
        average = AveragedModel(model, multi_avg_fn=decay)
        return in_order(step, lambda: average.update_parameters(model))

    return make


@dataclass(frozen=True)
class Work:
    """Something that a training step does, on our side and on that of the peers.

    Attributes:
        name: What the tables call it.
        ours: Makes our step.
        peers: Make the steps that a user would write today, by name.
        bytes_moved: Bytes per parameter that our step must move.
        goals: The ratio to reach for each shape; None where there is no goal.
        dtype: Of parameters and gradients.
    """

    name: str
    ours: Maker
    peers: Mapping[str, Maker]
    bytes_moved: int
    goals: Mapping[str, float | None]
    dtype: torch.dtype = torch.float32


# number of tensors, elements of each
SHAPES = {"10x2M": (10, 2_000_000), "300x6667": (300, 6_667), "1000x20000": (1000, 20_000)}

_ADAM = torch_step(torch.optim.Adam, fused=True)
_EMA = fw.EMA(_DECAY)
_NO_GOAL: dict[str, float | None] = {"10x2M": None, "300x6667": None}

WORKS = (
    Work(
        "Adam",
        ours(fw.Adam),
        {"Adam(fused=True)": _ADAM},
        bytes_moved(2),
        {"10x2M": 1.1, "300x6667": 6.0, "1000x20000": 2.0},
    ),
    Work(
        "clip+Adam",
        ours(fw.Adam, max_grad_norm=_MAX_NORM),
        {"clip_grad_norm_, Adam(fused=True)": clipped(_ADAM)},
        bytes_moved(2, clip=True),
        {"10x2M": 1.45, "300x6667": 8.0},
    ),
    Work(
        "RAdam",
        ours(fw.RAdam),
        {
            "RAdam(foreach=True)": torch_step(torch.optim.RAdam, foreach=True),
            "RAdam(foreach=False)": torch_step(torch.optim.RAdam, foreach=False),
        },
        bytes_moved(2),
        {"10x2M": 3.5, "300x6667": 16.0},
    ),
    Work(
        "Adam bytes/s",
        ours(fw.Adam),
        {STREAM: lambda params: stream(bytes_moved(2) * _numel(params))},
        bytes_moved(2),
        {"10x2M": 1.2},
    ),
    Work(
        "Adam+EMA",
        ours(fw.Adam, average=_EMA),
        {"Adam(fused=True), AveragedModel": averaged(_ADAM)},
        bytes_moved(2, average=True),
        {"10x2M": 1.15, "300x6667": 7.0},
    ),
    Work(
        "clip+Adam+EMA",
        ours(fw.Adam, max_grad_norm=_MAX_NORM, average=_EMA),
        {"clip_grad_norm_, Adam(fused=True), AveragedModel": averaged(clipped(_ADAM))},
        bytes_moved(2, clip=True, average=True),
        {"10x2M": 1.7, "300x6667": 8.0},
    ),
    Work(
        "Adam, no telemetry",
        ours(fw.Adam, telemetry=False),
        {"Adam(fused=True)": _ADAM},
        bytes_moved(2),
        _NO_GOAL,
    ),
    Work(
        "AdamW",
        ours(fw.AdamW),
        {"AdamW(fused=True)": torch_step(torch.optim.AdamW, fused=True)},
        bytes_moved(2),
        _NO_GOAL,
    ),
    Work(
        "SGD momentum",
        ours(fw.SGD, momentum=0.9),
        {"SGD(momentum=0.9, fused=True)": torch_step(torch.optim.SGD, momentum=0.9, fused=True)},
        bytes_moved(1),
        _NO_GOAL,
    ),
    Work(
        "SGD",
        ours(fw.SGD),
        {"SGD(fused=True)": torch_step(torch.optim.SGD, fused=True)},
        bytes_moved(0),
        _NO_GOAL,
    ),
    Work(
        "Adam bfloat16",
        ours(fw.Adam),
        {"Adam(fused=True), states in bfloat16 too": _ADAM},
        bytes_moved(2, itemsize=2),
        {"10x2M": None},
        torch.bfloat16,
    ),
)


def _numel(params: Sequence[Tensor]) -> int:
    return sum(param.numel() for param in params)


@dataclass(frozen=True)
class Row:
    """One line of the tables.

    Attributes:
        name: The work and the shape.
        peer: What it is compared with.
        ours_ms: Median of our step, milliseconds.
        peer_ms: Median of the peer.
        ratio: ``peer_ms / ours_ms``.
        spread: Quartiles of the ratio taken round by round.
        goal: The ratio to reach, or None.
        gb_per_s: Bytes that our step must move / its time, 10^9 per second; None where time is not bytes.
        ceiling: The same of ``a.mul_(c)`` on as many bytes.
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
        """``"met"``, ``"missed"``, ``"disturbed"`` by other processes, or nothing if there is no goal."""
        if self.goal is None:
            return ""
        # a peer with many parallel regions loses far more than we do when its threads must share their cores
        if self.others is not None and self.others > QUIET:
            return "disturbed"
        return "met" if self.ratio >= self.goal else "missed"

    @property
    def of_ceiling(self) -> float | None:
        """Our bytes per second / those of the ceiling."""
        return self.gb_per_s / self.ceiling if self.gb_per_s and self.ceiling else None


class Case:
    """A work on a shape.

    Args:
        work: The work.
        shape: Key of ``SHAPES``.
    """

    def __init__(self, work: Work, shape: str) -> None:
        self.work, self.shape = work, shape
        self.name = f"{work.name} {shape}"

    def sides(self) -> Sides:
        """Allocate tensors and optimizers; return our step, the peers and what every step needs."""
        params = make_params(*SHAPES[self.shape], self.work.dtype)
        peers = {name: make(params) for name, make in self.work.peers.items()}
        return self.work.ours(params), peers, nothing

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Time the ceiling before and after the block."""
        self._passes = stream_seconds(self._bytes())
        yield
        self._passes += stream_seconds(self._bytes())

    def row(self, result: Comparison) -> Row:
        """Return the line of a race that ran inside ``watched``."""
        # the race itself is the better measurement of the ceiling where it is the peer
        passing = result.theirs if result.peer == STREAM else statistics.median(self._passes)
        ours, ceiling = (self._bytes() / seconds / 1e9 for seconds in (result.ours, passing))
        goal = self.work.goals[self.shape]
        return replace(_row(self.name, result), goal=goal, gb_per_s=ours, ceiling=ceiling)

    def _bytes(self) -> int:
        count, numel = SHAPES[self.shape]
        return self.work.bytes_moved * count * numel


class HostCase(Case):
    """The step of many tiny tensors, where the time is that of Python.

    Args:
        tensors: Number of tensors of 64 elements.
        groups: Number of parameter groups.
        fresh: Every step finds newly allocated gradients, as after ``zero_grad(set_to_none=True)``.
    """

    def __init__(self, tensors: int, groups: int, fresh: bool) -> None:
        self.tensors, self.groups, self.fresh = tensors, groups, fresh
        grads = "new gradients" if fresh else "kept gradients"
        self.name = f"host {tensors} tensors, {groups} group{'s' * (groups > 1)}, {grads}"
        self._inside: list[float] = []

    def sides(self) -> Sides:
        """Allocate tensors and optimizers; return our step, the peer and what renews the gradients."""
        params = make_params(self.tensors, 64, torch.float32)
        size = self.tensors // self.groups

        def grouped() -> list[dict[str, Any]]:
            return [{"params": params[i : i + size]} for i in range(0, len(params), size)]

        peer = torch.optim.Adam(grouped(), fused=True)
        before = (lambda: renew(params)) if self.fresh else nothing
        return fw.Adam(grouped()).step, {"Adam(fused=True)": peer.step}, before

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Note the time of every compiled call inside the block."""
        from ... import _cpu

        inner, clock = _cpu.step, time.perf_counter

        def step(isa: int, rule: int, address: int, threads: int) -> None:
            begin = clock()
            inner(isa, rule, address, threads)
            self._inside.append(clock() - begin)

        _cpu.step = step
        try:
            yield
        finally:
            _cpu.step = inner

    def row(self, result: Comparison) -> Row:
        """Return the line of a race that ran inside ``watched``."""
        inside = self._inside[-len(result.rounds) :]
        host = statistics.median(a - b for a, b in zip(result.rounds, inside, strict=True))
        return replace(_row(self.name, result), host_us=host * 1e6)


def make_params(count: int, numel: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """Return parameters with gradients, the same at every call."""
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


def _row(name: str, result: Comparison) -> Row:
    times = result.ours * 1e3, result.theirs * 1e3
    return Row(name, result.peer, *times, result.ratio, result.spread, others=result.others)


def cases(pattern: str = "") -> list[Case]:
    """Return the cases whose name contains a text, in any case of letters."""
    hosts = ((300, 1), (1000, 1), (300, 10), (300, 300))
    every = [Case(work, shape) for work in WORKS for shape in work.goals]
    every += [HostCase(tensors, groups, fresh) for tensors, groups in hosts for fresh in (False, True)]
    return [case for case in every if pattern.lower() in case.name.lower()]


def run_case(case: Case, seconds: float) -> Row:
    """Run a case; its tensors are gone when it returns."""
    with case.watched():
        result = interleaved(*case.sides(), seconds=seconds)
    # optimizers hold cycles
    gc.collect()
    return case.row(result)
