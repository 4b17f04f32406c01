"""Settings of an optimizer that change between steps: the norm to clip to, and when to skip."""

import math

import pytest
import torch
from cases import every_backend
from torch.nn import Parameter

import fused_warmup as fw

backend = every_backend


def test_settings_that_change_while_norms_are_measured_anyway(backend):
    """Another norm to clip to, and skipping besides."""
    param = Parameter(torch.zeros(1, dtype=torch.float64))
    opt = fw.SGD([param], lr=1.0, max_grad_norm=1.0, backend=backend)
    moved = []
    for clip, policy, grad in (
        (1.0, "propagate", 8.0),
        (2.0, "propagate", 8.0),
        (2.0, "skip", math.inf),
        (3.0, "skip", 8.0),
    ):
        opt.max_grad_norm, opt.nonfinite = clip, policy
        before = param.detach().clone()
        param.grad = torch.full((1,), grad, dtype=torch.float64)
        opt.step()
        moved.append(float(before - param.detach()))
    assert moved == pytest.approx([1.0, 2.0, 0.0, 3.0], rel=1e-6)
