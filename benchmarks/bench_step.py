"""How much faster is the step than the torch code it replaces, and how close to the memory?"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fused_warmup.cli.bench.cases import Case, HostCase, cases

from .common import race

CASES = [case for case in cases() if not isinstance(case, HostCase)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark: BenchmarkFixture, case: Case) -> None:
    benchmark.group = case.shape
    race(benchmark, case, seconds=5.0)
