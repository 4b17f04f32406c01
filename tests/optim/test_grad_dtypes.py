"""Gradients of another dtype than that of their parameter, which changes from step to step.

Runs once more by CUDA on the host in ``test_cuda_on_host.py``, by Triton in ``interpreted.py``.
"""

import pytest
import torch
from cases import BY_NAME, THREE_SHAPES, assert_same_bits, every_backend, make_params, set_grads, tensors_of

backend = every_backend
OTHERS = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch forbids gradients of another dtype"
)
@pytest.mark.pairwise
@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-amsgrad", "lamb", "adamp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_that_change_dtype_and_back(name, dtype, clip, backend):
    check_changing_dtypes(
        name, dtype, clip, backend, [dtype, *(d for other in OTHERS for d in (other, dtype))]
    )


def check_changing_dtypes(name, dtype, clip, backend, seen):
    """Of numbers that all dtypes have, bit for bit what gradients of the parameter's dtype give; one of three changes."""
    runs = []
    for changes in (True, False):
        params = make_params(dtype, THREE_SHAPES)
        params[0].grad_dtype = None
        opt = BY_NAME[name].make(params, backend=backend, max_grad_norm=clip)
        for step, grad_dtype in enumerate(seen):
            set_grads(params, step)
            if changes:
                params[0].grad = params[0].grad.to(grad_dtype)
            opt.step()
        runs.append([*tensors_of(opt, params), opt.telemetry.rows()])
    for a, b in zip(*runs, strict=True):
        assert_same_bits("result", a, b)
