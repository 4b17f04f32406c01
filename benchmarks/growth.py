"""Measure how every operation grows with tensors and groups, and write ``benchmarks/results/growth.md``.

``python -m benchmarks.growth`` compares ``fw.Adam`` with the fused and the foreach form of ``torch.optim.Adam``:
interleaved lives of the three in one process, processor time of one thread. ``--quick`` takes few sizes and writes
nothing.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fused_warmup as fw
from benchmarks.common import RESULTS, table
from fused_warmup.cli.bench.timing import timed
from fused_warmup.cli.machine import describe

ELEMENTS = 8
TENSORS = (1, 10, 100, 1_000, 10_000, 100_000)
GROUPS = (1, 10, 100, 1_000, 10_000)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "ours": lambda params: fw.Adam(params, backend="cpu"),
    "fused": lambda params: torch.optim.Adam(params, fused=True),
    "foreach": lambda params: torch.optim.Adam(params, foreach=True),
}
MEASURES = (
    "constructor",
    "first step",
    "kept gradients",
    "new gradients",
    "a tenth missing",
    "one first gradient",
    "after add_param_group",
    "state_dict",
    "load_state_dict, step",
    "pickle.dumps",
    "pickle, bytes",
)
# seconds beyond which a cell is left out, and the sizes that exponents are fitted to
LIMIT, FITTED_FROM = 60.0, 100
# seconds for all lives of one size, and how many of them count at most
BUDGET, MOST_LIVES = 40.0, 25
# tensors, those that a step draws, and steps
EXPERTS = (3_072, 64, 100)

# values by size, optimizer and measure; None where a cell was left out
Found = dict[int, dict[str, dict[str, float | None]]]


def cpu_timed(function: Callable[[], object]) -> float:
    """Return the processor seconds of a call."""
    return timed(function, time.process_time)


def make_params(n: int) -> list[nn.Parameter]:
    """Return parameters with gradients."""
    params = [nn.Parameter(torch.randn(ELEMENTS)) for _ in range(n)]
    give_gradients(params)
    return params


def give_gradients(params: list[nn.Parameter]) -> None:
    """Give new gradients in new memory."""
    for param in params:
        param.grad = torch.randn(ELEMENTS)


def live(name: str, n: int, per_group: bool, left_out: set[str]) -> Iterator[tuple[str, float]]:
    """Train one optimizer through all operations, and yield each measure with its value."""
    params = make_params(n + 1)
    # a late parameter beside the others, which the first gradient makes known
    late = params.pop()
    late.grad = None
    members = [{"params": [p]} for p in params] if per_group else [{"params": params}]
    members[-1]["params"] = [*members[-1]["params"], late]
    made: list[torch.optim.Optimizer] = []
    yield "constructor", cpu_timed(lambda: made.append(OPTIMIZERS[name](members)))
    opt = made[0]
    yield "first step", cpu_timed(opt.step)
    yield "kept gradients", statistics.median(cpu_timed(opt.step) for _ in range(3))
    give_gradients(params)
    yield "new gradients", cpu_timed(opt.step)
    for param in params[::10]:
        param.grad = None
    yield "a tenth missing", cpu_timed(opt.step)
    give_gradients(params)
    opt.step()
    give_gradients([late])
    yield "one first gradient", cpu_timed(opt.step)
    opt.add_param_group({"params": make_params(1)})
    yield "after add_param_group", cpu_timed(opt.step)
    kept: list[dict] = []
    yield "state_dict", cpu_timed(lambda: kept.append(opt.state_dict()))
    if "load_state_dict, step" not in left_out:
        yield "load_state_dict, step", cpu_timed(lambda: (opt.load_state_dict(kept[0]), opt.step()))
    dumped: list[bytes] = []
    yield "pickle.dumps", cpu_timed(lambda: dumped.append(pickle.dumps(opt)))
    yield "pickle, bytes", float(len(dumped[0]))


def would_take(found: Found, n: int, name: str, measure: str) -> float:
    """Return the seconds that a measure takes at a size, extrapolated from the two sizes before."""
    known = [(m, found[m][name][measure]) for m in sorted(found) if m < n][-2:]
    if len(known) < 2 or any(value is None for _, value in known):
        return math.inf if known and known[-1][1] is None else 0.0
    (m0, t0), (m1, t1) = known
    exponent = math.log(max(t1, 1e-9) / max(t0, 1e-9)) / math.log(m1 / m0)
    # what grows faster than in proportion has a quadratic part, which prevails later
    return float(t1 * (n / m1) ** (2.0 if exponent > 1.3 else max(exponent, 1.0)))


def measure(sizes: tuple[int, ...], *, per_group: bool, budget: float) -> Found:
    """Return medians of all measures by size and optimizer."""
    found: Found = {}
    for n in sizes:
        # of torch's optimizers: ours has every cell
        left_out: dict[str, set[str]] = {name: set() for name in OPTIMIZERS}
        for name in list(OPTIMIZERS)[1:]:
            slow = [m for m in MEASURES if would_take(found, n, name, m) > LIMIT]
            left_out[name].update(m for m in slow if not m.endswith("bytes"))
        values: dict[str, dict[str, list[float]]] = {name: {m: [] for m in MEASURES} for name in OPTIMIZERS}
        begin, lives = time.perf_counter(), 0
        # the first life does not count where there is time for another
        while lives < 1 or (lives <= MOST_LIVES and time.perf_counter() - begin < budget):
            for name in OPTIMIZERS:
                if "constructor" in left_out[name]:
                    continue
                gc.collect()
                for key, value in live(name, n, per_group, left_out[name]):
                    values[name][key].append(value)
            lives += 1
        found[n] = {
            name: {m: statistics.median(own[1:] or own) if own else None for m, own in by_measure.items()}
            for name, by_measure in values.items()
        }
        print(f"{n} {'groups' if per_group else 'tensors'}: {max(1, lives - 1)} lives", file=sys.stderr)
    return found


def exponent(found: Found, name: str, measure: str) -> float | None:
    """Return the exponent of the growth over the larger sizes, by least squares of logarithms."""
    known = [(n, found[n][name][measure]) for n in found if n >= FITTED_FROM]
    points = [(math.log(n), math.log(value)) for n, value in known if value]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else None


def route(steps: int, experts: int, drawn: int) -> list[list[int]]:
    """Return the experts of each step, drawn with Zipf's weights in a random order of the experts."""
    rng = np.random.default_rng(0)
    weights = rng.permutation(1.0 / np.arange(1, experts + 1))
    p = weights / weights.sum()
    return [rng.choice(experts, drawn, replace=False, p=p).tolist() for _ in range(steps)]


def mixture_of_experts(experts: int, drawn: int, steps: int) -> dict[str, float]:
    """Return the seconds of all steps of a mixture of experts, most of which get their first gradient late."""
    made = {name: make_params(experts) for name in OPTIMIZERS}
    for params in made.values():
        for param in params:
            param.grad = None
    opts = {name: OPTIMIZERS[name](params) for name, params in made.items()}
    total = dict.fromkeys(OPTIMIZERS, 0.0)
    for chosen in route(steps, experts, drawn):
        for name, opt in opts.items():
            opt.zero_grad()
            give_gradients([made[name][k] for k in chosen])
            total[name] += cpu_timed(opt.step)
    return total


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def print_memory(name: str, n: int) -> None:
    """Print by how many bytes per tensor the process grows with constructor, step and states."""
    torch.set_num_threads(1)
    warm = OPTIMIZERS[name](make_params(1))
    warm.step()
    params = make_params(n)
    gc.collect()
    before = resident()
    opt = OPTIMIZERS[name](params)
    opt.step()
    gc.collect()
    print((resident() - before) / n)


def memory(n: int) -> dict[str, float]:
    """Return the bytes per tensor by optimizer, each in a process of its own."""
    found = {}
    for name in OPTIMIZERS:
        command = [sys.executable, "-m", "benchmarks.growth", "--memory", name, str(n)]
        root = Path(__file__).resolve().parent.parent
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        found[name] = float(run.stdout)
    return found


def number(value: float | None) -> str:
    """Return a number with three digits, or a dash for a cell that was left out."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def growth_rows(found: Found) -> list[list[str]]:
    """Return the table rows of all measures: ours, then each peer over ours."""
    rows = []
    for key in MEASURES:
        is_time = not key.endswith("bytes")
        cells = [found[n]["ours"][key] for n in found]
        shown = [number(None if cell is None else cell * (1e3 if is_time else 1.0)) for cell in cells]
        label = f"{key}, ms" if is_time else key
        rows.append([label, *shown, number(exponent(found, "ours", key))])
        for name in list(OPTIMIZERS)[1:]:
            theirs = [found[n][name][key] for n in found]
            ratios = [a / b if a and b else None for a, b in zip(theirs, cells, strict=True)]
            shown = ["–" if ratio is None else f"{number(ratio)}×" for ratio in ratios]
            rows.append([f"{name} / ours", *shown, number(exponent(found, name, key))])
    return rows


def to_markdown(
    where: dict,
    tensors: Found,
    groups: Found,
    totals: dict[str, float],
    per_tensor: dict[int, dict[str, float]],
) -> str:
    """Return the results page."""
    names = list(OPTIMIZERS)
    return "\n".join([
        f"# Growth with tensors and groups: {where['cpu']}, 1 thread",
        "",
        ", ".join(f"{name} {version}" for name, version in where["versions"].items()) + ".",
        "",
        f"`fw.Adam` against `torch.optim.Adam(fused=True)` and `(foreach=True)` on tensors of {ELEMENTS} elements. Processor",
        "time; medians of interleaved lives in one process, each of which runs through all rows. A ratio above 1 means that",
        "ours is faster, or smaller. The last column is the exponent of the growth of the optimizer in that row, fitted to",
        f"the sizes from {FITTED_FROM} on. Cells with a dash are left out: by the growth over the two sizes before, one call",
        f"would take more than {LIMIT:.0f} seconds.",
        "",
        "- One first gradient: the step in which one more parameter gets its first gradient.",
        "- A tenth missing: a step with `grad` None for a tenth of the parameters.",
        "- `load_state_dict`, step: the load and the next step.",
        "",
        "## Tensors in one group",
        "",
        *table(["tensors", *(f"{n:,}" for n in tensors), "exponent"], growth_rows(tensors)),
        "",
        "## Groups of one tensor",
        "",
        *table(["groups", *(f"{n:,}" for n in groups), "exponent"], growth_rows(groups)),
        "",
        "## Mixture of experts",
        "",
        f"{EXPERTS[0]:,} tensors of {ELEMENTS} elements. Each of {EXPERTS[2]} steps has gradients of {EXPERTS[1]}, drawn by",
        "Zipf's law, so that new ones get their first gradient until the end.",
        "",
        *table(
            ["optimizer", "all steps, ms", "over ours"],
            [[name, number(1e3 * totals[name]), f"{totals[name] / totals['ours']:.2f}×"] for name in names],
        ),
        "",
        "## Memory",
        "",
        "Growth of the resident memory of a process over constructor and first step, in bytes per tensor; it includes the",
        "states themselves.",
        "",
        *table(
            ["tensors", *names],
            [[f"{n:,}", *(number(found[name]) for name in names)] for n, found in per_tensor.items()],
        ),
        "",
    ])


def build_page(
    tensors: tuple[int, ...],
    groups: tuple[int, ...],
    sizes: tuple[int, ...],
    budget: float,
) -> str:
    """Measure everything at the given sizes and return the results page."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return to_markdown(
            describe(),
            measure(tensors, per_group=False, budget=budget),
            measure(groups, per_group=True, budget=budget),
            mixture_of_experts(*EXPERTS),
            {n: memory(n) for n in sizes},
        )
    finally:
        torch.set_num_threads(threads)


def main() -> int:
    """Run the benchmark and write the results page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", nargs=2, metavar=("OPTIMIZER", "TENSORS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory(arguments.memory[0], int(arguments.memory[1]))
        return 0
    if arguments.quick:
        print(build_page(TENSORS[:4], GROUPS[:3], (10_000,), 1.0))
        return 0
    text = build_page(TENSORS, GROUPS, (10_000, 100_000), BUDGET)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "growth.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
