"""Matrices of Hessians over two processes against one process that has everything."""

import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.slow

# of both ranks and of the one process
MODEL = """
import fused_warmup as fw
from fused_warmup.sharpness import HessianOperator, PreconditionedOperator, spectral_density, trace

def made(hidden=7):
    torch.manual_seed(3)
    layers = [torch.nn.Linear(6, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 2)]
    model = torch.nn.Sequential(*layers).double()
    return model, torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "placements") else tensor

def measure(model, run, x, y, method="difference", **options):
    loss_fn = lambda: torch.nn.functional.mse_loss(run(x), y)
    params, found = list(model.parameters()), []
    opt = fw.Adam(params, lr=1e-2, weight_decay=0.1)
    loss_fn().backward()
    opt.step()
    opt.zero_grad()
    before = [whole(p.detach()).clone() for p in params]
    torch.manual_seed(5)
    for operator in (
        HessianOperator(loss_fn, params, method=method, **options),
        PreconditionedOperator(loss_fn, opt, method=method, **options),
    ):
        matrix = torch.randn(operator.shape[0], 2, dtype=torch.float64)
        found += (operator @ matrix).flatten().tolist()
        # the parameters as a vector, with their placements
        listed = operator @ [p.detach() for p in params]
        assert [getattr(a, "placements", None) for a in listed] == [getattr(p, "placements", None) for p in params]
        found += torch.cat([whole(t).reshape(-1) for t in listed]).tolist()
        estimate = trace(operator, vectors=2, seed=1)
        density = spectral_density(operator, steps=3, vectors=1)
        found += [estimate.value, estimate.standard_error, density.largest, density.smallest]
        found += density.weights.flatten().tolist()
    assert all(torch.equal(a, whole(p.detach())) for a, p in zip(before, params))
    return found
"""
RUN = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

def show(found):
    print(*(v.hex() for v in found))

mesh = init_device_mesh("cpu", (2,))
for method in ("difference", "autograd"):
    model, x, y = made()
    run = torch.nn.parallel.DistributedDataParallel(model)
    show(measure(model, run, x.chunk(2)[rank], y.chunk(2)[rank], method, reduce=True))
model, x, y = made()
fully_shard(model[0], mesh=mesh)
fully_shard(model, mesh=mesh)
show(measure(model, model, x.chunk(2)[rank], y.chunk(2)[rank]))
model, x, y = made(8)
parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
show(measure(model, model, x, y))

def message(of):
    try:
        of()
    except ValueError as error:
        print(str(error).replace(" ", "_"))

params = list(model.parameters())
message(lambda: HessianOperator(lambda: 0, params, method="autograd"))
operator = HessianOperator(lambda: 0, params)
message(lambda: operator @ [torch.zeros(p.shape) for p in params])
message(lambda: operator @ params[1].detach())
dist.destroy_process_group()
"""


def test_matrices_are_those_of_one_process(tmp_path):
    first, second = run_ranks(tmp_path, MODEL + RUN)
    assert first == second
    words = iter(first)
    scope = {"torch": torch}
    exec(MODEL, scope)
    for hidden, methods in ((7, ("difference", "autograd", "difference")), (8, ("difference",))):
        for method in methods:
            model, x, y = scope["made"](hidden)
            wanted = scope["measure"](model, model, x, y, method)
            found = [float.fromhex(next(words)) for _ in wanted]
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7), (hidden, method)
    refused = [word.replace("_", " ") for word in words]
    assert refused[0] == (
        "HessianOperator: method must be 'difference' for DTensors, got 'autograd'. FSDP2 has no double backward."
    )
    assert refused[1].startswith("HessianOperator: v[0] must have the placements (Shard(dim=0),), got None")
    assert refused[2].startswith(
        "HessianOperator: v must be a plain tensor of shape (74,) or (74, k), got (8,)"
    )
    assert len(refused) == 3
