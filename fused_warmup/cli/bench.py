"""Timings of our step against the torch code it replaces; every figure is a ratio within one process.

Both sides work on the same parameters and gradients with the same number of threads. Rounds interleave, and
before every timed step one streaming pass sweeps the caches, as a backward pass would; the time of that pass
is the memory ceiling which the step is held against.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_warmup as fw

Step = Callable[[], object]
Maker = Callable[[Sequence[nn.Parameter]], Step]

_MAX_NORM = 1.0
_DECAY = 0.999
# RAdam is rectified from the sixth step on
_WARM_UP = 6
_ROUNDS = (7, 300)
# above this share of the machine used by other processes a ratio proves nothing
_QUIET = 0.1

Sides = tuple[Step, Mapping[str, Step], Step]


# timing


@dataclass(frozen=True)
class Timing:
    """Seconds of one side.

    Attributes:
        low: First quartile.
        median: Median.
        high: Third quartile.
    """

    low: float
    median: float
    high: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        """Return the quartiles of at least two repetitions."""
        return Timing(*statistics.quantiles(seconds, n=4, method="inclusive"))


@dataclass(frozen=True)
class Comparison:
    """What one race gave.

    Attributes:
        ours: Our step.
        peer: Name of the fastest peer.
        theirs: Its step.
        ratio: Median of theirs / median of ours; above 1 we are faster.
        spread: Quartiles of the ratio taken round by round.
        between: What ran before every step.
        rounds: Seconds of our step, round by round.
        others: Share of the machine's cores that other processes used meanwhile, or None.
    """

    ours: Timing
    peer: str
    theirs: Timing
    ratio: float
    spread: tuple[float, float]
    between: Timing
    rounds: tuple[float, ...]
    others: float | None


class Race:
    """Interleaved repetitions of our step and its peers.

    Args:
        ours: Our step.
        peers: Steps to compare with, by name; the fastest counts.
        between: Runs before every step, timed by itself.
        clock: Seconds from an arbitrary origin.
    """

    def __init__(
        self,
        ours: Step,
        peers: Mapping[str, Step],
        between: Step = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.ours, self.peers, self.between, self._clock = ours, peers, between, clock
        self._times: dict[str, list[float]] = {name: [] for name in ("", *peers)}
        self._usage = _usage()

    def before_ours(self) -> None:
        """Make all of a round but our own step."""
        for name, peer in self.peers.items():
            self._times[""].append(self.timed(self.between))
            self._times[name].append(self.timed(peer))
        self._times[""].append(self.timed(self.between))

    def timed(self, function: Step) -> float:
        """Return the seconds that one call takes."""
        begin = self._clock()
        function()
        return self._clock() - begin

    def warm_up(self, seconds: float) -> int:
        """Make the rounds that do not count.

        Args:
            seconds: How long the race may take.

        Returns:
            The number of rounds that fit.
        """
        took = [self.timed(_in_order(self.before_ours, self.ours)) for _ in range(_WARM_UP)]
        for times in self._times.values():
            times.clear()
        self._usage = _usage()
        low, high = _ROUNDS
        return max(low, min(high, int(seconds / max(statistics.median(took), 1e-9))))

    def result(self, ours: Sequence[float]) -> Comparison:
        """Compare.

        Args:
            ours: Seconds of our step in every round since the warm-up.

        Returns:
            The comparison with the fastest peer.
        """
        peer = min(self.peers, key=lambda name: statistics.median(self._times[name]))
        theirs = self._times[peer]
        by_round = Timing.of([b / a for a, b in zip(ours, theirs, strict=True)])
        return Comparison(
            ours=Timing.of(ours),
            peer=peer,
            theirs=Timing.of(theirs),
            ratio=statistics.median(theirs) / statistics.median(ours),
            spread=(by_round.low, by_round.high),
            between=Timing.of(self._times[""]),
            rounds=tuple(ours),
            others=_others(self._usage, _usage()),
        )


def _in_order(*steps: Step) -> Step:
    def run() -> None:
        for step in steps:
            step()

    return run


def _usage() -> tuple[float, float, float] | None:
    """Return seconds of all cores, busy ones among them, and those of this process; None where unknown."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        per_second = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / per_second, (sum(ticks) - ticks[3] - ticks[4]) / per_second, time.process_time()
    return None


def _others(
    before: tuple[float, float, float] | None, after: tuple[float, float, float] | None
) -> float | None:
    if before is None or after is None or after[0] <= before[0]:
        return None
    cores, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (busy - own) / cores)


def interleaved(
    ours: Step,
    theirs: Mapping[str, Step],
    between: Step = lambda: None,
    *,
    rounds: int | None = None,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Compare our step with its peers, warmed up, in rounds that interleave.

    Args:
        ours: Our step.
        theirs: Steps to compare with, by name.
        between: Runs before every step.
        rounds: Number of rounds, >= 2; None makes as many as fit into ``seconds``.
        seconds: How long it may take.
        clock: Seconds from an arbitrary origin.

    Returns:
        Medians, quartiles and the ratio to the fastest peer.
    """
    race = Race(ours, theirs, between, clock)
    fitting = race.warm_up(seconds)
    times = []
    for _ in range(rounds or fitting):
        race.before_ours()
        times.append(race.timed(ours))
    return race.result(times)


def stream(n_bytes: int) -> Step:
    """Return the ceiling: a pass that reads and writes ``n_bytes`` in total."""
    a = torch.ones(n_bytes // 8)
    # a factor of 1 keeps the values normal for ever; the memory traffic is the same
    return lambda: a.mul_(1.0)


# the sides of a comparison


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
        return _in_order(lambda: nn.utils.clip_grad_norm_(params, _MAX_NORM), step)

    return make


def averaged(maker: Maker) -> Maker:
    """Put the update of a moving average after a step."""

    def make(params: Sequence[nn.Parameter]) -> Step:
        step, model = maker(params), nn.ParameterList(params)
        decay = get_ema_multi_avg_fn(_DECAY)  # type: ignore[no-untyped-call]
        average = AveragedModel(model, multi_avg_fn=decay)
        return _in_order(step, lambda: average.update_parameters(model))

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
        {"a.mul_(c) on as many bytes": lambda params: stream(bytes_moved(2) * _numel(params))},
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


# rows


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
        if self.others is not None and self.others > _QUIET:
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
        """Allocate tensors and optimizers; return our step, the peers and what runs between."""
        params = make_params(*SHAPES[self.shape], self.work.dtype)
        peers = {name: make(params) for name, make in self.work.peers.items()}
        return self.work.ours(params), peers, stream(self._bytes())

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the steps run."""
        return contextlib.nullcontext()

    def row(self, result: Comparison) -> Row:
        """Return the line of a finished race."""
        ours, ceiling = (self._bytes() / timing.median / 1e9 for timing in (result.ours, result.between))
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
        between = (lambda: _renew(params)) if self.fresh else (lambda: None)
        return fw.Adam(grouped()).step, {"Adam(fused=True)": peer.step}, between

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Note the time of every compiled call inside the block."""
        from .. import _cpu

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
        """Return the line of a finished race that ran inside ``watched``."""
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


def _renew(params: Sequence[nn.Parameter]) -> None:
    # the old gradients live until the new ones exist, so that no address stays the same
    for param, grad in zip(params, [param.grad.clone() for param in params], strict=True):  # type: ignore[union-attr]
        param.grad = grad


def _row(name: str, result: Comparison) -> Row:
    times = result.ours.median * 1e3, result.theirs.median * 1e3
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
        row = case.row(interleaved(*case.sides(), seconds=seconds))
    # optimizers hold cycles
    gc.collect()
    return row


# reports


def machine() -> dict[str, Any]:
    """Return what the numbers depend on besides the code."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    from .. import _cpu

    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _cpu.instruction_sets()[-1],
        "versions": {
            "fused_warmup": fw.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def to_json(rows: Sequence[Row], where: Mapping[str, Any]) -> str:
    """Return machine and rows as JSON, one row a line."""
    lines = [json.dumps({**_rounded(asdict(row)), "verdict": row.verdict}) for row in rows]
    return '{"machine": ' + json.dumps(where) + ',\n"rows": [\n' + ",\n".join(lines) + "\n]}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


HEADINGS = (
    "work",
    "compared with",
    "ours, ms",
    "peer, ms",
    "ratio",
    "quartiles",
    "goal",
    "",
    "GB/s",
    "of ceiling",
    "host, µs",
    "others",
)


def cells(row: Row) -> tuple[str, ...]:
    """Return the cells of a row under ``HEADINGS``."""
    return (
        row.name,
        row.peer,
        f"{row.ours_ms:.3g}",
        f"{row.peer_ms:.3g}",
        f"{row.ratio:.2f}×",
        f"{row.spread[0]:.2f}–{row.spread[1]:.2f}",
        "" if row.goal is None else f"≥ {row.goal:g}×",
        row.verdict,
        "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}",
        "" if row.of_ceiling is None else f"{row.of_ceiling:.2f}×",
        "" if row.host_us is None else f"{row.host_us:.0f}",
        "" if row.others is None else f"{row.others:.0%}",
    )


def to_markdown(rows: Sequence[Row], where: Mapping[str, Any]) -> str:
    """Return a page with every row, lost ones included."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    words = ("met", "missed", "disturbed")
    verdicts = {word: [row.name for row in rows if row.verdict == word] for word in words}
    return "\n".join((
        f"# {where['cpu']}, {where['threads']} threads",
        "",
        f"{where['cores']} cores, {where['instruction_set']} kernels; {versions}.",
        "",
        "Ratio: median time of the peer / median time of ours, above 1 we are faster; rounds interleave,",
        "and a streaming pass sweeps the caches before every step. Quartiles: of the ratio taken round by",
        "round. GB/s: bytes that our step must move / its time. Of ceiling: that / the same of `a.mul_(c)`",
        "on as many bytes. Host: our step outside the compiled call, 64 elements per tensor. Others: share",
        f"of the cores that other processes used; above {_QUIET:.0%} a goal is neither met nor missed.",
        "",
        *(f"- Goals {word}: {len(names)}. {', '.join(names)}" for word, names in verdicts.items()),
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
        "",
    ))


def print_table(console: Console, rows: Sequence[Row], where: Mapping[str, Any]) -> None:
    """Print the rows."""
    table = Table(title=f"{where['cpu']}, {where['threads']} threads, torch {where['versions']['torch']}")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*cells(row), style="red" if row.verdict == "missed" else None)
    console.print(table)


# the command


@click.command("bench")
@click.option("--quick", is_flag=True, help="A few rounds of everything: rough ratios in seconds.")
@click.option("--filter", "pattern", default="", metavar="TEXT", help="Only rows whose name contains TEXT.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows here.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of both sides.")
def bench(quick: bool, pattern: str, path: Path | None, threads: int | None) -> None:
    """Compare our step with the torch code it replaces, on this machine."""
    if "cpu" not in fw.available_backends():
        raise click.ClickException('backend "cpu" must be built, got none; see fused-warmup doctor.')
    if threads is not None:
        torch.set_num_threads(threads)
    seconds = 0.2 if quick else 4.0
    console = Console()
    chosen = cases(pattern)
    if not chosen:
        names = ", ".join(case.name for case in cases())
        raise click.BadParameter(f"must occur in the name of a row, got {pattern!r}. Rows: {names}.")
    rows = []
    with console.status("") as status:
        for case in chosen:
            status.update(case.name)
            rows.append(run_case(case, seconds))
    print_table(console, rows, machine())
    if path is not None:
        path.write_text(to_json(rows, machine()))
