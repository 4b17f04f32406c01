"""The projections of AdamP and SGDP where a gradient has no direction.

Runs once more by Triton in ``interpreted.py``.
"""

import pytest
import torch
from cases import every_backend
from torch.nn import Parameter

import fused_warmup as fw

backend = every_backend


@pytest.mark.parametrize("cls", [fw.AdamP, fw.SGDP])
def test_a_gradient_of_zeros_is_at_right_angles_to_everything(cls, backend):
    """``eps`` stands in for its norm, so that the layer decays as one whose scale does not matter."""
    param = Parameter(torch.ones(2, 3, dtype=torch.float64))
    opt = cls([param], lr=0.1, weight_decay=0.1, wd_ratio=0.5, backend=backend)
    param.grad = torch.zeros(2, 3, dtype=torch.float64)
    opt.step()
    torch.testing.assert_close(param.detach(), torch.full_like(param, 0.995), rtol=1e-15, atol=0.0)
