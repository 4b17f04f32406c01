"""Measure device and host time of the step on a GPU and write ``benchmarks/results/<gpu>.{json,md}``.

``make gpu`` runs it after the tests. The page is written after every case, the most important first, so that a
time limit cuts off the others only. ``--device cpu --quick`` exercises the same code without a GPU; its times
are meaningless, and it writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fused_warmup as fw
from benchmarks.common import RESULTS, slug, table
from fused_warmup.cli.bench.cases import StepFactory, averaged, clipped, ours, torch_step
from fused_warmup.cli.bench.timing import Step
from fused_warmup.cli.machine import versions
from fused_warmup.cli.traffic import gpt_shapes
from fused_warmup.plan.roofline import Device, find_device
from fused_warmup.plan.traffic import Traffic

MAX_NORM, DECAY = 1.0, 0.999
COPY_BYTES = 1 << 30
# rounds of a case: no fewer and no more than these, and none after so many seconds. On an H100 the rounds of 16
# cases took 0.2 to 2.1 seconds; the limit is for 10,000 tensors, whose peers take seconds on the host.
MIN_ROUNDS, MAX_ROUNDS, CASE_SECONDS = 5, 15, 3.0
# above so many tensors torch.compile takes minutes, and a capturable foreach step a second
MOST_COMPILED, MOST_CAPTURABLE = 200, 1_000


@dataclass(frozen=True)
class Workload:
    """Tensors of a benchmark: shapes, dtype, and whether each one has a parameter group of its own."""

    name: str
    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    grouped: bool = False

    def shrunk(self, shrink: int) -> Workload:
        """Return the workload with first dimensions divided by ``shrink``."""
        return replace(self, shapes=[(max(1, first // shrink), *rest) for first, *rest in self.shapes])

    def params(self, device: str) -> list[nn.Parameter]:
        """Allocate parameters and gradients."""
        params = []
        for shape in self.shapes:
            param = nn.Parameter(torch.randn(shape, device=device).to(self.dtype))
            param.grad = torch.randn_like(param)
            params.append(param)
        return params

    def groups(self, params: Sequence[nn.Parameter]) -> list[Any]:
        """Return the parameters, or their groups, as the first argument of an optimizer."""
        return [{"params": [p]} for p in params] if self.grouped else list(params)


WORKLOADS = (
    Workload("10 x 16M", [(16_000_000,)] * 10),
    Workload("GPT 124M, 148 tensors", gpt_shapes()),
    Workload("GPT 124M bf16, 148 tensors", gpt_shapes(), torch.bfloat16),
    Workload("300 x 6,667", [(6_667,)] * 300),
    Workload("10,000 x 64", [(64,)] * 10_000),
    Workload("10,000 x 64 bf16", [(64,)] * 10_000, torch.bfloat16),
    Workload("465 groups x 65,536", [(65_536,)] * 465, grouped=True),
)
# our class, torch's class or None, and whether torch has a fused kernel
OPTIMIZERS: dict[str, tuple[Any, Any, bool]] = {
    "Adam": (fw.Adam, torch.optim.Adam, True),
    "AdamW": (fw.AdamW, torch.optim.AdamW, True),
    "RAdam": (fw.RAdam, torch.optim.RAdam, False),
    "SGD": (partial(fw.SGD, momentum=0.9), partial(torch.optim.SGD, momentum=0.9), True),
    "LAMB": (fw.LAMB, None, False),
    "AdamP": (fw.AdamP, None, False),
}
MODES = ("step", "clip + step", "clip + step + EMA")
# the rows of all workloads, the most important first; AdamW for the peers that have nothing else, the others
# for their kernels. torch.compile takes longest, so AdamW comes last.
CASES = (
    ("Adam", "step"),
    ("Adam", "clip + step"),
    ("RAdam", "clip + step"),
    ("Adam", "clip + step + EMA"),
    ("LAMB", "step"),
    ("AdamP", "step"),
    ("SGD", "step"),
    ("AdamW", "step"),
)


@dataclass(frozen=True)
class Row:
    """Times of one implementation; the fields are the keys of the JSON report.

    Attributes:
        workload: Name of the tensors.
        optimizer: Name of the update rule.
        mode: Stages of the step, one of ``MODES``.
        side: Name of the implementation.
        device_us: Median microseconds of the device, queued behind other work, without waits for the host.
        replay_us: The same for a replay of the captured step; None where it cannot be captured.
        host_us: Median microseconds until the call returned.
        gb_per_s: Bytes that our step must move / device time, 10^9 per second; None for peers.
        of_copy: ``gb_per_s`` / bytes per second of a device copy; None for peers.
        ratio: Device time of the fastest peer / device time of our step; None without peers.
        host_ratio: Host time of the fastest peer / host time of our step; None without peers.
        predicted_us: Device time that the roofline model predicts, at the speed of a copy of this run; None for
            peers and for a GPU that the model does not have.
        of_predicted: ``device_us`` / ``predicted_us``.
    """

    workload: str
    optimizer: str
    mode: str
    side: str
    device_us: float
    replay_us: float | None
    host_us: float
    gb_per_s: float | None = None
    of_copy: float | None = None
    ratio: float | None = None
    host_ratio: float | None = None
    predicted_us: float | None = None
    of_predicted: float | None = None

    @property
    def name(self) -> str:
        """Workload, update rule and stages."""
        return f"{self.workload}: {self.optimizer}, {self.mode}"


@dataclass
class Side:
    """One implementation under test.

    Attributes:
        step: The step.
        capturable: Whether a CUDA graph can capture it.
        replay: The replay of the captured step, once there is one.
        device: Seconds of the step on the device, round by round.
        replayed: Seconds of the replay on the device.
        host: Seconds until the call returned.
    """

    step: Step
    capturable: bool
    replay: Step | None = None
    device: list[float] = field(default_factory=list)
    replayed: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def measure(self, clock: Clock) -> None:
        """Add one round."""
        self.host.append(clock.host(self.step))
        self.device.append(clock.device(self.step, self.host[-1]))
        if self.replay is not None:
            self.replayed.append(clock.device(self.replay, self.host[-1]))


class Clock:
    """Times of a step on the CPU, which are both device and host time."""

    def host(self, step: Step) -> float:
        """Return the seconds until the call returns."""
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def device(self, step: Step, host: float) -> float:
        """Return the seconds of the device, for a step whose call takes ``host`` seconds."""
        return self.host(step)


class DeviceClock(Clock):
    """Times of a step on a CUDA device."""

    # cycles of the busy kernel in a second; a lower clock only makes it last longer
    CYCLES = 2e9

    def host(self, step: Step) -> float:
        """Return the seconds until the call returns, on an idle device."""
        torch.cuda.synchronize()
        seconds = super().host(step)
        torch.cuda.synchronize()
        return seconds

    def device(self, step: Step, host: float) -> float:
        """Return the seconds between events around the step, all queued while the device is busy."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int((1.5 * host + 1e-4) * self.CYCLES))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def captured(step: Step) -> Step:
    """Capture a step in a CUDA graph and return its replay."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peers(workload: Workload, optimizer: str, mode: str) -> dict[str, tuple[StepFactory, bool]]:
    """Return the factories of the code that a user would write today, and whether it can be captured, by name."""
    _, theirs, has_fused = OPTIMIZERS[optimizer]
    if theirs is None:
        return {}
    options = {"capturable": True} if optimizer != "SGD" else {}
    factories = {"torch foreach": (torch_step(theirs, foreach=True), optimizer == "SGD")}
    if has_fused:
        factories["torch fused"] = torch_step(theirs, fused=True, **options), True
    elif torch.cuda.is_available() and len(workload.shapes) <= MOST_CAPTURABLE:
        factories["torch capturable"] = torch_step(theirs, foreach=True, **options), True
    if optimizer == "AdamW" and mode == "step":
        factories["optimi"] = optimi, False
        factories["torch compiled"] = compiled(theirs), False
    # torch's AveragedModel copies its count from the host
    return {
        name: (with_stages(make, workload, mode), can and "EMA" not in mode)
        for name, (make, can) in factories.items()
    }


def with_stages(factory: StepFactory, workload: Workload, mode: str) -> StepFactory:
    """Add clipping and averaging to a step of torch."""
    # both take the parameters of all groups together, the step in groups
    staged = grouped(factory, workload)
    if "clip" in mode:
        staged = clipped(staged)
    if "EMA" in mode:
        staged = averaged(staged)
    return staged


def grouped(factory: StepFactory, workload: Workload) -> StepFactory:
    """Return a factory that puts the parameters into the groups of the workload."""
    return lambda params: factory(workload.groups(params))


def optimi(params: Sequence[nn.Parameter]) -> Step:
    """Return a step of torch-optimi's AdamW; raises ImportError if it is not installed."""
    from optimi import AdamW

    return AdamW(params, lr=1e-3, triton=True).step


def compiled(optimizer: Callable[..., torch.optim.Optimizer]) -> StepFactory:
    """Return the factory of a compiled foreach step; it raises ImportError for many tensors."""

    def make(params: Sequence[Any]) -> Step:
        if len(params) > MOST_COMPILED:
            raise ImportError("compiling takes minutes for so many tensors")
        opt = optimizer(params, lr=torch.tensor(1e-3), foreach=True, capturable=True)
        return torch.compile(opt.step, fullgraph=False)

    return make


def options_of(mode: str) -> dict[str, Any]:
    """Return the options of our optimizer for some stages."""
    options: dict[str, Any] = {"max_grad_norm": MAX_NORM} if "clip" in mode else {}
    return options | ({"average": fw.EMA(DECAY)} if "EMA" in mode else {})


def traffic_of(workload: Workload, optimizer: str, mode: str) -> Traffic:
    """Return launches and bytes of our step, without its tensors."""
    param = nn.Parameter(torch.ones(8, dtype=workload.dtype))
    param.grad = torch.ones_like(param)
    opt = OPTIMIZERS[optimizer][0]([param], backend="reference", **options_of(mode))
    return opt.traffic().resized([math.prod(shape) for shape in workload.shapes])


def sides(
    workload: Workload, optimizer: str, mode: str, params: Sequence[nn.Parameter], backends: Sequence[str]
) -> dict[str, Side]:
    """Return our sides by backend and the peers' by name."""
    found: dict[str, Side] = {}
    kind = OPTIMIZERS[optimizer][0]
    for backend in backends:
        step = ours(kind, backend=backend, **options_of(mode))(workload.groups(params))
        found[backend] = Side(step, True)
    for name, (factory, capturable) in peers(workload, optimizer, mode).items():
        try:
            found[name] = Side(factory(params), capturable)
        except ImportError:
            continue
    return found


@dataclass(frozen=True)
class Setup:
    """What is measured on.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        backends: Our backends.
        copy: Speed of a copy, 10^9 bytes per second.
        gpu: The GPU in the roofline model at that speed, or None.
        quick: Whether tensors are a thousand times smaller.
    """

    device: str
    backends: Sequence[str]
    copy: float
    gpu: Device | None = None
    quick: bool = False


def measure(workload: Workload, optimizer: str, mode: str, setup: Setup) -> list[Row]:
    """Return the rows of all implementations on one workload."""
    workload = workload.shrunk(1000) if setup.quick else workload
    params = workload.params(setup.device)
    found = sides(workload, optimizer, mode, params, setup.backends)
    for name, side in list(found.items()):
        try:
            warm_up(side, setup.device)
        except Exception as error:
            # a peer that does not run here leaves the other rows; torch.compile needs a compiler of C
            if name in setup.backends:
                raise
            print(f"{name}: {error}".splitlines()[0], flush=True)
            del found[name]
    start = time.monotonic()
    for i in range(3 if setup.quick else MAX_ROUNDS):
        if i >= MIN_ROUNDS and time.monotonic() - start > CASE_SECONDS:
            break
        for side in found.values():
            side.measure(clock_of(setup.device))
    return rows_of(workload, optimizer, mode, found, setup)


def warm_up(side: Side, device: str) -> None:
    """Make the first steps of a side, and capture it if that is possible."""
    # RAdam is rectified from the sixth step on
    for _ in range(7):
        side.step()
    if side.capturable and device == "cuda":
        side.replay = captured(side.step)


def rows_of(
    workload: Workload, optimizer: str, mode: str, found: Mapping[str, Side], setup: Setup
) -> list[Row]:
    """Return the rows of sides that were measured."""
    traffic = traffic_of(workload, optimizer, mode)
    n_bytes = traffic.read + traffic.written
    device = {name: statistics.median(side.device) for name, side in found.items()}
    host = {name: statistics.median(side.host) for name, side in found.items()}
    peer_names = [name for name in found if name not in setup.backends]
    rows = []
    for name, side in found.items():
        replay = statistics.median(side.replayed) * 1e6 if side.replayed else None
        row = Row(workload.name, optimizer, mode, name, device[name] * 1e6, replay, host[name] * 1e6)
        if name in setup.backends:
            speed = n_bytes / device[name] / 1e9
            row = replace(row, gb_per_s=speed, of_copy=speed / setup.copy)
            if peer_names:
                fastest, first = (min(times[peer] for peer in peer_names) for times in (device, host))
                row = replace(row, ratio=fastest / device[name], host_ratio=first / host[name])
            if setup.gpu is not None:
                predicted = traffic.predict(setup.gpu).us
                row = replace(row, predicted_us=predicted, of_predicted=row.device_us / predicted)
        rows.append(row)
    return rows


def clock_of(device: str) -> Clock:
    """Return the clock for tensors on a device."""
    return DeviceClock() if device == "cuda" else Clock()


def copy_speed(device: str, n_bytes: int) -> float:
    """Return the speed of a copy on the device in 10^9 bytes per second, read and written."""
    a = torch.ones(n_bytes // 4, device=device)
    b = torch.empty_like(a)
    clock = clock_of(device)
    seconds = statistics.median(clock.device(lambda: b.copy_(a), 1e-3) for _ in range(20))
    return 2 * n_bytes / seconds / 1e9


def machine(device: str, copy: float, backends: Sequence[str]) -> dict[str, Any]:
    """Describe the machine: versions, speed of a copy, backends, GPU and driver."""
    found: dict[str, Any] = {
        "versions": versions(),
        "copy_gb_per_s": round(copy, 1),
        "backends": list(backends),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "sms": properties.multi_processor_count}
        found |= {"memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        found["driver"] = driver()
    return found


def driver() -> str:
    """Return the version of the NVIDIA kernel driver, or ``"unknown"``."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return driver_version(text)


def driver_version(text: str) -> str:
    """Return the version in what the kernel driver says of itself, or ``"unknown"``."""
    match = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", text)
    return match.group(1) if match else "unknown"


HEADINGS = [
    *("work", "side", "device, µs", "replay, µs", "host, µs"),
    *("GB/s", "of copy", "device ratio", "host ratio", "predicted, µs", "measured / predicted"),
]


def to_markdown(rows: Sequence[Row], where: dict[str, Any]) -> str:
    """Return the results page with every row, slower ones included."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def cells(r: Row) -> list[str]:
        return [
            r.name,
            r.side,
            cell(r.device_us, ".1f"),
            cell(r.replay_us, ".1f"),
            cell(r.host_us, ".1f"),
            cell(r.gb_per_s, ".0f"),
            cell(r.of_copy, ".2f"),
            cell(r.ratio, ".2f"),
            cell(r.host_ratio, ".2f"),
            cell(r.predicted_us, ".1f"),
            cell(r.of_predicted, ".2f"),
        ]

    named = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return "\n".join((
        f"# {where.get('gpu', 'no GPU')}",
        "",
        f"Driver {where.get('driver')}, CUDA {where.get('cuda')}, {where.get('sms')} multiprocessors, "
        f"{where.get('memory_gib')} GiB; {named}.",
        f"Copy of {COPY_BYTES >> 20} MiB on the device: {where['copy_gb_per_s']} GB/s read and written.",
        "",
        "Device: time between events around the step, queued while the device was busy, so that it never waited",
        "for the host. Replay: the same for a replay of the captured step. Host: time until the call returned.",
        "Medians of interleaved rounds in one process. GB/s: bytes that our step must move / device time.",
        "Ratio: time of the fastest peer / time of our step; above 1 our step is faster.",
        "Predicted: device time from the roofline model of docs/roofline.md at the speed of the copy above.",
        "",
        f"Tests: {where.get('tests') or 'not run'}.",
        "",
        *table(HEADINGS, [cells(row) for row in rows]),
        "",
        *misses(rows),
        *([f"Left out: {'; '.join(where['left_out'])}.", ""] if where.get("left_out") else []),
    ))


def misses(rows: Sequence[Row]) -> list[str]:
    """Return the lines that name the rows whose time is not within a tenth of the prediction."""
    missed = [row for row in rows if row.of_predicted and not 0.9 <= row.of_predicted <= 1.1]
    if not missed:
        return []
    head = "Missed by more than a tenth of the prediction; each must be explained in docs/roofline.md:"
    named = [f"- {row.name}, {row.side}: {row.of_predicted:.2f} of the prediction" for row in missed]
    return [head, "", *named, ""]


def main(arguments: Sequence[str]) -> int:
    """Measure the selected rows; write the results page only if all of them were selected."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tensors a thousand times smaller, few rounds")
    parser.add_argument("--filter", default="", help="only rows whose name matches this expression")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop starting rows after so long")
    parser.add_argument("--tests", default="", help="outcome of the tests, for the page")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: a CUDA device must be there, got none.", file=sys.stderr)
        return 1
    wanted = ("cuda", "triton") if options.device == "cuda" else ("cpu", "reference")
    backends = [name for name in wanted if name in fw.available_backends()]
    copy = copy_speed(options.device, COPY_BYTES >> (10 if options.quick else 0))
    where = machine(options.device, copy, backends) | {"tests": options.tests}
    setup = Setup(options.device, backends, copy, known_gpu(where, copy), options.quick)
    keep = options.device == "cuda" and not options.quick and not options.filter
    rows: list[Row] = []
    for found, left_out in run_cases(setup, options.filter, options.seconds):
        rows += found
        where["left_out"] = left_out
        print("\n".join(map(str, found)), flush=True)
        if keep:
            write_results(rows, where)
    if not keep:
        print(to_markdown(rows, where))
    return 0


def known_gpu(where: dict[str, Any], copy: float) -> Device | None:
    """Return the GPU of the roofline model at a measured speed of a copy; None if the model lacks it."""
    try:
        return replace(find_device(where.get("gpu", "")), copy=copy)
    except ValueError:
        return None


def run_cases(setup: Setup, pattern: str, seconds: float) -> Iterator[tuple[list[Row], list[str]]]:
    """Yield the rows of each case, and what is left out so far: all later cases, in the end those cut off."""
    start = time.monotonic()
    cases = [
        (f"{workload.name}: {optimizer}, {mode}", workload, optimizer, mode)
        for (optimizer, mode), workload in itertools.product(CASES, WORKLOADS)
    ]
    cases = [case for case in cases if re.search(pattern, case[0])]
    failed: list[str] = []
    for i, (name, workload, optimizer, mode) in enumerate(cases):
        if time.monotonic() - start > seconds:
            break
        found: list[Row] = []
        try:
            found = measure(workload, optimizer, mode, setup)
        except RuntimeError as error:
            failed.append(f"{name}: {error}".splitlines()[0])
            print(failed[-1], flush=True)
        gc.collect()
        yield found, failed + [later[0] for later in cases[i + 1 :]]


def write_results(rows: Sequence[Row], where: dict[str, Any]) -> None:
    """Write the results of a GPU as JSON and as a Markdown page."""
    RESULTS.mkdir(exist_ok=True)
    page = {"machine": where, "rows": [asdict(row) for row in rows]}
    stem = slug(where["gpu"])
    (RESULTS / f"{stem}.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{stem}.md").write_text(to_markdown(rows, where), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
