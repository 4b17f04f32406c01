"""Benchmark the Python overhead of a step."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fused_warmup.cli.bench.cases import HostCase, cases

from .common import run_interleaved

CASES = [case for case in cases() if isinstance(case, HostCase)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_host(benchmark: BenchmarkFixture, case: HostCase) -> None:
    benchmark.group = f"host {case.tensors} tensors"
    run_interleaved(benchmark, case, seconds=3.0)
