"""What a GradScaler leaves to an optimizer: a scale of the gradients, and a decision to skip the step.

Some tests run once more by CUDA on the host in ``test_cuda_on_host.py``, by Triton in ``interpreted.py``.
"""

import pytest
import torch
from cases import BY_NAME, THREE_SHAPES, every_backend, make_params, set_grads
from torch.nn import Parameter

import fused_warmup as fw

backend = every_backend


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "adamp"])
def test_norms_of_scaled_gradients(name, clip, backend):
    """Both norms are those of the gradients without the scale, whoever added them up."""
    params = make_params(torch.float32, THREE_SHAPES)
    opt = BY_NAME[name].make(params, backend=backend, max_grad_norm=clip)
    set_grads(params, 0, scale=1024.0)
    opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    opt.step()
    flat = torch.cat([p.grad.double().flatten() for p in params]) / 1024.0
    line = opt.telemetry.latest()
    assert line["grad_norm"] == pytest.approx(float(flat.norm()), rel=1e-12)
    assert line["grad_norm_l1"] == pytest.approx(float(flat.abs().sum()), rel=1e-6)


def test_a_scale_and_a_decision_are_read_anew_one_by_one(backend):
    """Another tensor of the one beside the same tensor of the other."""
    param = Parameter(torch.zeros(3))
    opt = fw.SGD([param], lr=1.0, backend=backend)
    scales, verdicts = ([torch.tensor(x) for x in pair] for pair in ((2.0, 4.0), (0.0, 1.0)))
    moved = []
    for scale, found in ((0, 0), (1, 0), (1, 1), (1, 0), (0, 0)):
        param.grad = torch.full((3,), 8.0)
        opt.grad_scale, opt.found_inf = scales[scale], verdicts[found]
        before = float(param.detach()[0])
        opt.step()
        moved.append(before - float(param.detach()[0]))
    assert moved == [4.0, 2.0, 0.0, 2.0, 4.0]
