"""What all benchmarks share: a race whose rounds pytest-benchmark times."""

from __future__ import annotations

import gc
from dataclasses import asdict

from pytest_benchmark.fixture import BenchmarkFixture

from fused_warmup.cli.bench.cases import Case
from fused_warmup.cli.bench.timing import Race
from fused_warmup.cli.machine import describe


def race(benchmark: BenchmarkFixture, case: Case, seconds: float) -> None:
    """Time our step; the peers run, timed, in the setup of every round, so that the rounds interleave."""
    with case.watched():
        running = Race(*case.sides())
        rounds = running.warm_up(seconds)
        benchmark.pedantic(running.ours, setup=running.before_ours, rounds=rounds)
        result = running.result(benchmark.stats.stats.data)
    benchmark.extra_info.update(row=asdict(case.row(result)), machine=describe())
    # optimizers hold cycles, and the next case needs the memory
    del running
    gc.collect()
