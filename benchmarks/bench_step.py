"""Benchmark the step against the torch code it replaces and against the memory bandwidth."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fused_warmup.cli.bench.cases import ThroughputCase, cases

from .common import run_interleaved

CASES = [case for case in cases() if isinstance(case, ThroughputCase)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark: BenchmarkFixture, case: ThroughputCase) -> None:
    benchmark.group = case.shape
    run_interleaved(benchmark, case, seconds=5.0)
