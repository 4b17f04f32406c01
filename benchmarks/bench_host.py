"""How much of the step is Python?"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fused_warmup.cli.bench.cases import HostCase, cases

from .common import race

CASES = [case for case in cases() if isinstance(case, HostCase)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_host(benchmark: BenchmarkFixture, case: HostCase) -> None:
    benchmark.group = f"host {case.tensors} tensors"
    race(benchmark, case, seconds=3.0)
