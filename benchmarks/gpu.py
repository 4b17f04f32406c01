"""Measure device and host time of the step on a GPU and write ``benchmarks/results/<gpu>.{json,md}``.

``make gpu`` runs it after the tests. ``--device cpu --quick`` exercises the same code without a GPU; its times
are meaningless, and it writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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

MAX_NORM, DECAY = 1.0, 0.999
COPY_BYTES = 1 << 30


Shapes = Sequence[tuple[int, ...]]


def gpt_shapes() -> Shapes:
    """Return the shapes of the 148 tensors of a 124M GPT."""
    d = 768
    layer = [
        (d,),
        (d,),
        (3 * d, d),
        (3 * d,),
        (d, d),
        (d,),
        (d,),
        (d,),
        (4 * d, d),
        (4 * d,),
        (d, 4 * d),
        (d,),
    ]
    return [(50257, d), (1024, d), *(layer * 12), (d,), (d,)]


@dataclass(frozen=True)
class Workload:
    """Tensors of a benchmark: shapes, dtype, and whether each one has a parameter group of its own."""

    name: str
    shapes: Shapes
    dtype: torch.dtype = torch.float32
    grouped: bool = False

    def params(self, device: str, shrink: int) -> list[nn.Parameter]:
        """Allocate parameters and gradients, with first dimensions divided by ``shrink``."""
        params = []
        for first, *rest in self.shapes:
            shape = (max(1, first // shrink), *rest)
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
# the rows of each workload: AdamW for the peers that have nothing else, the others for their kernels
CASES = (
    ("Adam", "step"),
    ("Adam", "clip + step"),
    ("Adam", "clip + step + EMA"),
    ("AdamW", "step"),
    ("LAMB", "step"),
    ("AdamP", "step"),
    ("RAdam", "clip + step"),
    ("SGD", "step"),
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
    elif torch.cuda.is_available():
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
        if len(params) > 200:
            raise ImportError("compiling takes minutes for so many tensors")
        opt = optimizer(params, lr=torch.tensor(1e-3), foreach=True, capturable=True)
        return torch.compile(opt.step, fullgraph=False)

    return make


def sides(
    workload: Workload, optimizer: str, mode: str, params: Sequence[nn.Parameter], backends: Sequence[str]
) -> tuple[dict[str, Side], int]:
    """Return our sides by backend and the peers' by name, and the bytes that our step must move."""
    options: dict[str, Any] = {"max_grad_norm": MAX_NORM} if "clip" in mode else {}
    if "EMA" in mode:
        options["average"] = fw.EMA(DECAY)
    found: dict[str, Side] = {}
    kind = OPTIMIZERS[optimizer][0]
    traffic = kind(workload.groups(params), backend=backends[0], **options).traffic()
    for backend in backends:
        found[backend] = Side(ours(kind, backend=backend, **options)(workload.groups(params)), True)
    for name, (factory, capturable) in peers(workload, optimizer, mode).items():
        try:
            found[name] = Side(factory(params), capturable)
        except ImportError:
            continue
    return found, traffic.read + traffic.written


def measure(
    workload: Workload,
    optimizer: str,
    mode: str,
    device: str,
    backends: Sequence[str],
    quick: bool,
    copy: float,
) -> Iterator[Row]:
    """Yield the rows of all implementations on one workload."""
    params = workload.params(device, 1000 if quick else 1)
    found, n_bytes = sides(workload, optimizer, mode, params, backends)
    for side in found.values():
        # RAdam is rectified from the sixth step on
        for _ in range(7):
            side.step()
        if side.capturable and device == "cuda":
            side.replay = captured(side.step)
    for _ in range(3 if quick else 15):
        for side in found.values():
            side.measure(clock_of(device))
    peer_sides = [side for name, side in found.items() if name not in backends]
    for name, side in found.items():
        seconds, host = statistics.median(side.device), statistics.median(side.host)
        replay = statistics.median(side.replayed) * 1e6 if side.replayed else None
        row = Row(workload.name, optimizer, mode, name, seconds * 1e6, replay, host * 1e6)
        if name in backends:
            speed = n_bytes / seconds / 1e9
            row = replace(row, gb_per_s=speed, of_copy=speed / copy)
            if peer_sides:
                row = replace(
                    row,
                    ratio=min(statistics.median(peer.device) for peer in peer_sides) / seconds,
                    host_ratio=min(statistics.median(peer.host) for peer in peer_sides) / host,
                )
        yield row


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
    match = re.search(r"Kernel Module\D*([\d.]+)", text)
    return match.group(1) if match else "unknown"


HEADINGS = [
    *("work", "side", "device, µs", "replay, µs", "host, µs"),
    *("GB/s", "of copy", "device ratio", "host ratio"),
]


def to_markdown(rows: Sequence[Row], where: dict[str, Any]) -> str:
    """Return the results page with every row, slower ones included."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def cells(r: Row) -> list[str]:
        return [
            f"{r.workload}: {r.optimizer}, {r.mode}",
            r.side,
            cell(r.device_us, ".1f"),
            cell(r.replay_us, ".1f"),
            cell(r.host_us, ".1f"),
            cell(r.gb_per_s, ".0f"),
            cell(r.of_copy, ".2f"),
            cell(r.ratio, ".2f"),
            cell(r.host_ratio, ".2f"),
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
        "",
        *table(HEADINGS, [cells(row) for row in rows]),
        "",
    ))


def main(arguments: Sequence[str]) -> int:
    """Measure the selected rows; write the results page only if all of them were selected."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tensors a thousand times smaller, few rounds")
    parser.add_argument("--filter", default="", help="only rows whose name matches this expression")
    parser.add_argument("--seconds", type=float, default=240.0, help="stop starting rows after so long")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: a CUDA device must be there, got none.", file=sys.stderr)
        return 1
    wanted = ("cuda", "triton") if options.device == "cuda" else ("cpu", "reference")
    backends = [name for name in wanted if name in fw.available_backends()]
    copy = copy_speed(options.device, COPY_BYTES >> (10 if options.quick else 0))
    rows: list[Row] = []
    left_out = []
    start = time.monotonic()
    for workload, (optimizer, mode) in itertools.product(WORKLOADS, CASES):
        name = f"{workload.name}: {optimizer}, {mode}"
        if not re.search(options.filter, name):
            continue
        if time.monotonic() - start > options.seconds:
            left_out.append(name)
            continue
        try:
            found = list(measure(workload, optimizer, mode, options.device, backends, options.quick, copy))
        except RuntimeError as error:
            left_out.append(f"{name}: {error}")
            print(left_out[-1], flush=True)
            continue
        rows += found
        print("\n".join(map(str, found)), flush=True)
        gc.collect()
    where = machine(options.device, copy, backends) | {"left_out": left_out}
    if options.device == "cuda" and not options.quick and not options.filter:
        write_results(rows, where)
    else:
        print(to_markdown(rows, where))
    return 0


def write_results(rows: Sequence[Row], where: dict[str, Any]) -> None:
    """Write the results of a GPU as JSON and as a Markdown page."""
    RESULTS.mkdir(exist_ok=True)
    page = {"machine": where, "rows": [asdict(row) for row in rows]}
    stem = slug(where["gpu"])
    (RESULTS / f"{stem}.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{stem}.md").write_text(to_markdown(rows, where), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
