"""How much faster are LAMB, AdamP and SGDP than the packages that have them, on matrices?"""

import adamp
import pytest
import pytorch_optimizer
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import fused_warmup as fw
from fused_warmup.cli.bench.cases import SHAPES, Case, Sides, Work, make_params, ours, torch_step
from fused_warmup.cli.bench.timing import nothing

from .common import race

# rows of the matrices, so that AdamP has channels to look at
ROWS = {"10x2M": 2000, "300x6667": 59}
DECAY = {"weight_decay": 0.01}
MOMENTUM = {"lr": 0.1, "momentum": 0.9, **DECAY}
# both parts of the update read parameter and states
WORKS = (
    Work(
        "LAMB",
        ours(fw.LAMB, **DECAY),
        {"pytorch_optimizer.Lamb": torch_step(pytorch_optimizer.Lamb, **DECAY)},
        40,
        {"10x2M": 4.0, "300x6667": 10.0},
    ),
    Work(
        "AdamP",
        ours(fw.AdamP, **DECAY),
        {
            "adamp.AdamP": torch_step(adamp.AdamP, **DECAY),
            "pytorch_optimizer.AdamP": torch_step(pytorch_optimizer.AdamP, **DECAY),
        },
        40,
        {"10x2M": 4.0, "300x6667": 10.0},
    ),
    Work(
        "SGDP",
        ours(fw.SGDP, **MOMENTUM),
        {"adamp.SGDP": torch_step(adamp.SGDP, **MOMENTUM)},
        28,
        {"10x2M": None, "300x6667": None},
    ),
)


class MatrixCase(Case):
    """A work on matrices of as many elements."""

    def sides(self) -> Sides:
        """Allocate matrices and optimizers; return our step and the peers."""
        params = make_params(*SHAPES[self.shape], self.work.dtype)
        matrices = [nn.Parameter(p.detach().view(ROWS[self.shape], -1)) for p in params]
        for matrix, param in zip(matrices, params, strict=True):
            matrix.grad = param.grad.view_as(matrix)
        peers = {name: make(matrices) for name, make in self.work.peers.items()}
        return self.work.ours(matrices), peers, nothing


CASES = [MatrixCase(work, shape) for work in WORKS for shape in work.goals]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layers(benchmark: BenchmarkFixture, case: Case) -> None:
    benchmark.group = case.shape
    race(benchmark, case, seconds=5.0)
