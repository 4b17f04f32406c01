"""Device and host time of the step on a GPU: writes ``benchmarks/results/<gpu>.{json,md}``.

``make gpu`` runs it after the tests. ``--device cpu --quick`` runs the same code without a GPU and writes
nothing: its times mean nothing either.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fused_warmup as fw
from fused_warmup.cli.bench.cases import Maker, averaged, clipped, ours, torch_step
from fused_warmup.cli.bench.timing import Step
from fused_warmup.cli.machine import versions

RESULTS = Path(__file__).resolve().parent / "results"
MAX_NORM, DECAY = 1.0, 0.999
COPY_BYTES = 1 << 30


def gpt_sizes() -> list[int]:
    """Return the elements of the 148 tensors of a 124M GPT."""
    d = 768
    layer = [d, d, 3 * d * d, 3 * d, d * d, d, d, d, 4 * d * d, 4 * d, 4 * d * d, d]
    return [50257 * d, 1024 * d, *(layer * 12), d, d]


@dataclass(frozen=True)
class Workload:
    """Tensors to step on: their sizes, the dtype, and one group each or one for all."""

    name: str
    sizes: Sequence[int]
    dtype: torch.dtype = torch.float32
    grouped: bool = False

    def params(self, device: str, shrink: int) -> list[nn.Parameter]:
        """Allocate parameters and gradients."""
        params = []
        for size in self.sizes:
            param = nn.Parameter(torch.randn(max(1, size // shrink), device=device).to(self.dtype))
            param.grad = torch.randn_like(param)
            params.append(param)
        return params

    def split(self, params: Sequence[nn.Parameter]) -> list[Any]:
        """Return what an optimizer takes."""
        return [{"params": [p]} for p in params] if self.grouped else list(params)


WORKLOADS = (
    Workload("10 x 16M", [16_000_000] * 10),
    Workload("GPT 124M, 148 tensors", gpt_sizes()),
    Workload("GPT 124M bf16, 148 tensors", gpt_sizes(), torch.bfloat16),
    Workload("300 x 6,667", [6_667] * 300),
    Workload("10,000 x 64", [64] * 10_000),
    Workload("10,000 x 64 bf16", [64] * 10_000, torch.bfloat16),
    Workload("465 groups x 65,536", [65_536] * 465, grouped=True),
)
OPTIMIZERS: dict[str, tuple[type[fw.FusedOptimizer], type[torch.optim.Optimizer], bool]] = {
    # name: ours, torch's, whether torch has a fused one
    "Adam": (fw.Adam, torch.optim.Adam, True),
    "AdamW": (fw.AdamW, torch.optim.AdamW, True),
    "RAdam": (fw.RAdam, torch.optim.RAdam, False),
    "SGD": (partial(fw.SGD, momentum=0.9), partial(torch.optim.SGD, momentum=0.9), True),
}
MODES = ("step", "clip + step", "clip + step + EMA", "captured step")


@dataclass(frozen=True)
class Row:
    """One measured side.

    Attributes:
        workload: Tensors.
        optimizer: Rule.
        mode: What was done.
        side: Whose code.
        device_us: Median microseconds between events around it on an idle device.
        host_us: Median microseconds until the call returned.
        gb_per_s: Bytes of the ledger / device time, 10^9 per second; None for peers.
        of_copy: That / the bytes per second of a device copy.
        ratio: Device time of the fastest peer / that of this side; None for peers or without one.
        host_ratio: The same of host time.
    """

    workload: str
    optimizer: str
    mode: str
    side: str
    device_us: float
    host_us: float
    gb_per_s: float | None = None
    of_copy: float | None = None
    ratio: float | None = None
    host_ratio: float | None = None


def event_times(step: Step) -> tuple[float, float]:
    """Return seconds on the device and on the host."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    start = time.perf_counter()
    step()
    host = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, host


def clock_times(step: Step) -> tuple[float, float]:
    """Return the same seconds twice, where there are no events."""
    start = time.perf_counter()
    step()
    took = time.perf_counter() - start
    return took, took


def captured(step: Step) -> Step:
    """Return a replay of a step that was made once."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peers(workload: Workload, optimizer: str, mode: str) -> dict[str, Maker]:
    """Return the torch code that a user would write today, by name."""
    _, theirs, has_fused = OPTIMIZERS[optimizer]
    options = {"capturable": True} if mode == "captured step" and optimizer != "SGD" else {}
    makers = {"torch foreach": torch_step(theirs, foreach=True, **options)}
    if has_fused:
        makers["torch fused"] = torch_step(theirs, fused=True, **options)
    if optimizer == "AdamW" and mode == "step":
        makers["optimi"] = optimi
        makers["torch compiled"] = compiled(theirs)
    # clipping and averaging are over all groups
    makers = {name: split(maker, workload) for name, maker in makers.items()}
    if "clip" in mode:
        makers = {name: clipped(maker) for name, maker in makers.items()}
    return {name: averaged(maker) for name, maker in makers.items()} if "EMA" in mode else makers


def split(maker: Maker, workload: Workload) -> Maker:
    """Give the maker the parameters in the groups of the workload."""
    return lambda params: maker(workload.split(params))


def optimi(params: Sequence[nn.Parameter]) -> Step:
    """Return a step of torch-optimi's AdamW; ImportError where it is not installed."""
    from optimi import AdamW

    return AdamW(params, lr=1e-3, triton=True).step


def compiled(optimizer: Callable[..., torch.optim.Optimizer]) -> Maker:
    """Return the maker of a compiled foreach step; only worth its minutes for few tensors."""

    def make(params: Sequence[Any]) -> Step:
        if len(params) > 200:
            raise ImportError("compiling takes minutes for so many tensors")
        opt = optimizer(params, lr=torch.tensor(1e-3), foreach=True, capturable=True)
        return torch.compile(opt.step, fullgraph=False)

    return make


def sides(
    workload: Workload, optimizer: str, mode: str, params: Sequence[nn.Parameter], backends: Sequence[str]
) -> tuple[dict[str, Step], int]:
    """Return the steps by name, ours first, and the bytes that ours must move."""
    options: dict[str, Any] = {"max_grad_norm": MAX_NORM} if "clip" in mode else {}
    if "EMA" in mode:
        options["average"] = fw.EMA(DECAY)
    steps: dict[str, Step] = {}
    ledger = OPTIMIZERS[optimizer][0](workload.split(params), backend=backends[0], **options).traffic()
    for backend in backends:
        steps[backend] = ours(OPTIMIZERS[optimizer][0], backend=backend, **options)(workload.split(params))
    for name, maker in peers(workload, optimizer, mode).items():
        try:
            steps[name] = maker(params)
        except ImportError:
            continue
    return steps, ledger.read + ledger.written


def race(steps: dict[str, Step], times: Callable[[Step], tuple[float, float]], rounds: int) -> dict[str, Any]:
    """Return the medians of device and host seconds of interleaved rounds, by name."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(times(step))
    return {name: [statistics.median(column) for column in zip(*pairs)] for name, pairs in found.items()}  # noqa: B905


def measure(
    workload: Workload,
    optimizer: str,
    mode: str,
    device: str,
    backends: Sequence[str],
    quick: bool,
    copy: float,
) -> Iterator[Row]:
    """Race all sides on one workload."""
    params = workload.params(device, 1000 if quick else 1)
    steps, n_bytes = sides(workload, optimizer, mode, params, backends)
    for step in steps.values():
        # RAdam is rectified from the sixth step on
        for _ in range(7):
            step()
    if mode == "captured step":
        steps = {name: captured(step) for name, step in steps.items()}
    found = race(steps, event_times if device == "cuda" else clock_times, 3 if quick else 15)
    best = [min(found[name][i] for name in steps if name not in backends) for i in range(2)]
    for name, (on_device, on_host) in found.items():
        row = Row(workload.name, optimizer, mode, name, on_device * 1e6, on_host * 1e6)
        if name in backends:
            speed = n_bytes / on_device / 1e9
            row = Row(
                *list(asdict(row).values())[:6], speed, speed / copy, best[0] / on_device, best[1] / on_host
            )
        yield row


def copy_speed(device: str, times: Callable[[Step], tuple[float, float]], n_bytes: int) -> float:
    """Return 10^9 bytes per second, read and written, of a copy on the device."""
    a = torch.ones(n_bytes // 4, device=device)
    b = torch.empty_like(a)
    seconds = statistics.median(times(lambda: b.copy_(a))[0] for _ in range(20))
    return 2 * n_bytes / seconds / 1e9


def machine(device: str, copy: float, backends: Sequence[str]) -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
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
    """Return the version of the kernel driver, as the system knows it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    match = re.search(r"Kernel Module\D*([\d.]+)", text)
    return match.group(1) if match else "unknown"


HEADINGS = ("work", "side", "device, µs", "host, µs", "GB/s", "of copy", "device ratio", "host ratio")


def to_markdown(rows: Sequence[Row], where: dict[str, Any]) -> str:
    """Return a page with every row, lost ones included."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    named = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return "\n".join((
        f"# {where.get('gpu', 'no GPU')}",
        "",
        f"Driver {where.get('driver')}, CUDA {where.get('cuda')}, {where.get('sms')} multiprocessors, "
        f"{where.get('memory_gib')} GiB; {named}.",
        f"Copy of {COPY_BYTES >> 20} MiB on the device: {where['copy_gb_per_s']} GB/s read and written.",
        "",
        "Device: time between events around the step on an idle device. Host: until the call returned.",
        "Medians of interleaved rounds in one process. GB/s: bytes of the ledger over device time. Ratio:",
        "time of the fastest peer over ours, above 1 we are faster.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *(
            f"| {r.workload}: {r.optimizer}, {r.mode} | {r.side} | {r.device_us:.1f} | {r.host_us:.1f} | "
            f"{cell(r.gb_per_s, '.0f')} | {cell(r.of_copy, '.2f')} | {cell(r.ratio, '.2f')} | "
            f"{cell(r.host_ratio, '.2f')} |"
            for r in rows
        ),
        "",
    ))


def main(arguments: Sequence[str]) -> int:
    """Measure everything that the options leave, and write the page if they leave all of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tensors a thousand times smaller, few rounds")
    parser.add_argument("--filter", default="", help="only rows whose name contains this")
    parser.add_argument("--seconds", type=float, default=240.0, help="stop starting rows after so long")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: a CUDA device must be there, got none.", file=sys.stderr)
        return 1
    wanted = ("cuda", "triton") if options.device == "cuda" else ("cpu", "reference")
    backends = [name for name in wanted if name in fw.available_backends()]
    times = event_times if options.device == "cuda" else clock_times
    copy = copy_speed(options.device, times, COPY_BYTES >> (10 if options.quick else 0))
    modes = MODES if options.device == "cuda" else MODES[:-1]
    rows: list[Row] = []
    left_out = []
    start = time.monotonic()
    for workload in WORKLOADS:
        for optimizer in OPTIMIZERS:
            for mode in modes:
                name = f"{workload.name}: {optimizer}, {mode}"
                if options.filter not in name:
                    continue
                if time.monotonic() - start > options.seconds:
                    left_out.append(name)
                    continue
                rows += measure(workload, optimizer, mode, options.device, backends, options.quick, copy)
                print("\n".join(map(str, rows[-5:])), flush=True)
                gc.collect()
    where = machine(options.device, copy, backends) | {"left_out": left_out}
    if options.device == "cuda" and not options.quick and not options.filter:
        slug = re.sub(r"[^a-z0-9]+", "-", where["gpu"].lower()).strip("-")
        RESULTS.mkdir(exist_ok=True)
        page = {"machine": where, "rows": [asdict(row) for row in rows]}
        (RESULTS / f"{slug}.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
        (RESULTS / f"{slug}.md").write_text(to_markdown(rows, where), encoding="utf-8")
    else:
        print(to_markdown(rows, where))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
