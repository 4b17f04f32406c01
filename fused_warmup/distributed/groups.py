"""Detection of sharded parameters, and means over the processes."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def average(tensor: Tensor) -> None:
    """Replace a tensor by its mean over the default process group, if there is one; every rank calls this."""
    dist = torch.distributed
    if world_size() == 1:
        return
    # nccl takes only tensors on its own device
    shared = tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor.contiguous()
    dist.all_reduce(shared)
    tensor.copy_(shared / dist.get_world_size())


def world_size() -> int:
    """Return the number of processes of the default group, 1 without one."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(tensor: Tensor) -> bool:
    """Return whether other processes hold other parts of a tensor, so that a local norm is not its norm."""
    return _has_shards(tensor) and getattr(tensor, "device_mesh").size() > 1  # noqa: B009


def is_shard(param: Tensor) -> bool:
    """Return whether FSDP or tensor parallelism has cut a parameter, also if this process has all of it.

    A module of FSDP gathers the memory that it had at first, so that must not be replaced.
    """
    return _has_shards(param) or _has_flattened(param)


def _has_shards(tensor: Tensor) -> bool:
    """Return whether a mesh cuts a tensor in any of its dimensions."""
    return any(p.is_shard() for p in getattr(tensor, "placements", ()))


def _has_flattened(param: Tensor) -> bool:
    """Return whether FSDP1 has flattened a parameter."""
    return bool(getattr(param, "_fsdp_flattened", False))


def reshard(model: torch.nn.Module) -> None:
    """Let the modules of FSDP in a model drop what they have gathered, so that they gather it again."""
    # imported by whoever has made such a module
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
    modules = fsdp.FullyShardedDataParallel.fsdp_modules(model)
    if modules:
        # a root keeps what it has gathered in the forward until a backward, and has no public way to drop it
        from torch.distributed.fsdp._runtime_utils import _reshard

        for module in modules:
            handle = getattr(module, "_handle", None)
            if handle is not None:
                _reshard(module, handle, True)


def is_part(param: Tensor) -> bool:
    """Return whether other processes hold the rest of a parameter: a shard of a DTensor or of FSDP1.

    FSDP1 marks what it has flattened, the flat parameter and, with ``use_orig_params=True``, its pieces.
    """
    return is_sharded(param) or (_has_flattened(param) and world_size() > 1)


def is_flattened(param: Tensor) -> bool:
    """Return whether a parameter concatenates several of a model, whose layers cannot be told apart."""
    return bool(getattr(param, "_is_flat_param", False))


def built_by_zero() -> bool:
    """Return whether a ``ZeroRedundancyOptimizer`` constructs this optimizer for a part of the parameters."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if zero is None or world_size() == 1:
        return False
    frame = sys._getframe(1)
    while (
        frame is not None and frame.f_code is not zero.ZeroRedundancyOptimizer._init_local_optimizer.__code__
    ):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None
