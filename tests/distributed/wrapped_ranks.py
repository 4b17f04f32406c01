"""Training of wrapped models in every process of a group against one model that has all the data."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fused_warmup as fw

from .spread_ranks import distance

STEPS = 4
OPTIONS = {
    "clip": {"max_grad_norm": 0.05},
    "skip": {"nonfinite": "skip", "average": fw.EMA(0.8)},
    "sphere": {"projection": "sphere"},
    "random": {"exp_avg_sq_init": "random", "max_grad_norm": 0.05},
    "schedule": {"schedule": fw.schedules.warmup(3)},
}


def made(dtype):
    """Return a model whose tensors two or three processes cannot share evenly, and some not at all."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), nn.LayerNorm(3)).to(dtype)


def ddp(model, mesh):
    return nn.parallel.DistributedDataParallel(model), model.parameters(), {}


def fsdp1(model, mesh):
    wrapped = FSDP(model, device_id=torch.device("cpu"), use_orig_params=True)
    return wrapped, wrapped.parameters(), {"process_group": dist.group.WORLD}


def fsdp2(model, mesh, **options):
    fully_shard(model[0], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options), model.parameters(), {}


def fsdp2_bf16(model, mesh):
    return fsdp2(model, mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def tp(model, mesh):
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model, model.parameters(), {}


def two_d(model, mesh):
    data, tensor = mesh["data"], mesh["tensor"]
    parallelize_module(model, tensor, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=data), model.parameters(), {}


WRAPS = {
    "ddp": ddp,
    "zero": ddp,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "fsdp2-bf16": fsdp2_bf16,
    "tp": tp,
    "2-D": two_d,
}


def train(model, opt, inputs, break_at=None, breaks=True, given=None):
    """Make some steps; where it ``breaks``, the first gradient is not finite at one of them.

    ``given`` yields gradients that replace those of the model. Returns those of all steps, whole.
    """
    found = []
    for step, x in enumerate(inputs):
        opt.zero_grad()
        model(x).square().mean().backward()
        if given is not None:
            for p, grad in zip(model.parameters(), given[step], strict=True):
                p.grad.copy_(grad)
        if all(isinstance(p.grad, DTensor) for p in model.parameters()):
            found.append([p.grad.full_tensor().clone() for p in model.parameters()])
        if step == break_at:
            grad = next(p.grad for p in model.parameters() if p.grad is not None)
            grad = grad.to_local() if isinstance(grad, DTensor) else grad
            if breaks and grad.numel():
                grad.view(-1)[0] = math.nan
        opt.step()
    return found


def values(model, wrapped):
    """Return all parameters whole."""
    if isinstance(wrapped, FSDP):
        with FSDP.summon_full_params(wrapped, writeback=False):
            return [p.detach().clone() for p in model.parameters()]
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def compare(name, make, option):
    """Return the relative distance of parameters and norms between a wrapped model and one process."""
    world, dtype = dist.get_world_size(), torch.float32 if name == "fsdp2-bf16" else torch.float64
    settings = {"lr": 0.05, **OPTIONS[option]}
    torch.manual_seed(1)
    inputs = torch.randn(STEPS, 12, 5, dtype=dtype)
    break_at = 2 if option == "skip" else None
    mesh = init_device_mesh("cpu", (world,))
    if name == "2-D":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    whole, model = made(dtype), made(dtype)
    wrapped, params, more = WRAPS[name](model, mesh)
    # processes seeded apart
    torch.manual_seed(5 + dist.get_rank())
    opt = (
        ZeroRedundancyOptimizer(params, make, **settings)
        if name == "zero"
        else make(params, **settings, **more)
    )
    # one process has the element, or all have it
    breaks = dist.get_rank() == 0 or name in ("ddp", "zero")
    parts = {"tp": 1, "2-D": 2}.get(name, world)
    index = {"tp": 0, "2-D": dist.get_rank() // (world // 2)}.get(name, dist.get_rank())
    grads = train(wrapped, opt, inputs.chunk(parts, 1)[index] if parts > 1 else inputs, break_at, breaks)
    own = opt.optim if name == "zero" else opt
    torch.manual_seed(0)
    alone = make(whole.parameters(), **settings)
    if "exp_avg_sq_init" in settings:
        alone.session.seed = own.session.seed
    # forward passes in 16 bits round otherwise
    train(whole, alone, inputs, break_at, given=grads if name == "fsdp2-bf16" else None)
    pairs = list(zip(values(whole, whole), values(model, wrapped), strict=True))
    pairs += [
        tuple(o.telemetry.history()[column] for o in (alone, own)) for column in ("grad_norm", "skipped")
    ]
    return max(distance(a, b) for a, b in pairs)
