"""Benchmark LAMB, AdamP and SGDP on matrices against the packages that have them."""

import adamp
import pytest
import pytorch_optimizer
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import fused_warmup as fw
from fused_warmup.cli.bench.cases import (
    SHAPES,
    Columns,
    Steps,
    StepSpec,
    ThroughputCase,
    make_params,
    ours,
    torch_step,
)

from .common import run_interleaved

# rows of the matrices; AdamP projects by channels, so it needs more than one dimension
ROWS = {"10x2M": 2000, "300x6667": 59}
DECAY = {"weight_decay": 0.01}
MOMENTUM = {"lr": 0.1, "momentum": 0.9, **DECAY}
MOMENTS, BUFFER = Columns(2, layered=True), Columns(1, layered=True)
STEP_SPECS = (
    StepSpec(
        "LAMB",
        ours(fw.LAMB, **DECAY),
        {"pytorch_optimizer.Lamb": torch_step(pytorch_optimizer.Lamb, **DECAY)},
        MOMENTS,
        {"10x2M": 4.0, "300x6667": 10.0},
    ),
    StepSpec(
        "AdamP",
        ours(fw.AdamP, **DECAY),
        {
            "adamp.AdamP": torch_step(adamp.AdamP, **DECAY),
            "pytorch_optimizer.AdamP": torch_step(pytorch_optimizer.AdamP, **DECAY),
        },
        MOMENTS,
        {"10x2M": 4.0, "300x6667": 10.0},
    ),
    StepSpec(
        "SGDP",
        ours(fw.SGDP, **MOMENTUM),
        {"adamp.SGDP": torch_step(adamp.SGDP, **MOMENTUM)},
        BUFFER,
        {"10x2M": None, "300x6667": None},
    ),
)


class MatrixCase(ThroughputCase):
    """A throughput case whose tensors are matrices with the same number of elements."""

    def steps(self) -> Steps:
        """Allocate matrices and optimizers; return our step, the peers, the setup and the ceiling."""
        params = make_params(*SHAPES[self.shape], self.spec.dtype)
        matrices = [nn.Parameter(p.detach().view(ROWS[self.shape], -1)) for p in params]
        for matrix, param in zip(matrices, params, strict=True):
            matrix.grad = param.grad.view_as(matrix)
        return self.steps_on(matrices)


CASES = [MatrixCase(spec, shape) for spec in STEP_SPECS for shape in spec.goals]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layers(benchmark: BenchmarkFixture, case: MatrixCase) -> None:
    benchmark.group = case.shape
    run_interleaved(benchmark, case, seconds=5.0)
