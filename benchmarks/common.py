"""Shared helpers of the benchmarks: interleaved rounds under pytest-benchmark, and result files."""

from __future__ import annotations

import gc
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fused_warmup.cli.bench.cases import BenchmarkCase
from fused_warmup.cli.bench.timing import InterleavedTimer
from fused_warmup.cli.machine import describe

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

RESULTS = Path(__file__).resolve().parent / "results"


def run_interleaved(benchmark: BenchmarkFixture, case: BenchmarkCase, seconds: float) -> None:
    """Time our step with pytest-benchmark; the setup of every round runs and times the peers."""
    with case.monitored():
        timer = InterleavedTimer(*case.steps())
        rounds = timer.warm_up(seconds)
        benchmark.pedantic(timer.ours, setup=timer.run_peers, rounds=rounds)
        result = timer.compare(benchmark.stats.stats.data)
    benchmark.extra_info.update(row=asdict(case.row(result)), machine=describe())
    # optimizers are in reference cycles, and the next case needs the memory
    del timer
    gc.collect()


def slug(machine: str) -> str:
    """Return the name of a machine as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]
