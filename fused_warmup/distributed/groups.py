"""Detection of sharded parameters, and numbers that all processes share."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def average(tensor: Tensor, group: Any = None) -> None:
    """Replace a tensor by its mean over a process group, of which every rank calls this.

    Args:
        tensor: Tensor that is written.
        group: The group; None for the default one, if there is one.
    """
    dist = torch.distributed
    if world_size() == 1:
        return
    # nccl takes only tensors on its own device
    on_device = dist.get_backend(group) == "nccl" and not tensor.is_cuda
    shared = tensor.cuda() if on_device else tensor.contiguous()
    dist.all_reduce(shared, group=group)
    tensor.copy_(shared / dist.get_world_size(group))


def shared_seed() -> int:
    """Return a random number of torch's generator, that of the first process of the default group.

    Every process calls this. It waits for the number.
    """
    dist = torch.distributed
    seed = torch.randint(1 << 62, ())
    if world_size() > 1:
        # nccl takes only tensors on its own device
        shared = seed.cuda() if dist.get_backend() == "nccl" else seed
        dist.broadcast(shared, 0)
        seed = shared
    return int(seed)


def sum_over(number: float, process_group: Any, device: torch.device) -> float:
    """Return the sum of a number over the processes of a group, each of which calls this; waits for it."""
    total = torch.tensor([number], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total, group=process_group)
    return float(total)


def world_size() -> int:
    """Return the number of processes of the default group, 1 without one."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shard_dim(placement: Any) -> int | None:
    """Return the dimension of a tensor that a placement cuts, None if it cuts none.

    The strided shards of FSDP over tensor parallelism are no ``Shard`` in some versions of torch.
    """
    return None if placement.is_replicate() or placement.is_partial() else int(placement.dim)


def is_partial(param: Tensor) -> bool:
    """Return whether the processes of a mesh hold terms of a tensor, which is their sum."""
    return any(p.is_partial() for p in getattr(param, "placements", ()))


def is_distributed(tensor: Tensor) -> bool:
    """Return whether a tensor is placed on a mesh, whole or in parts."""
    return hasattr(tensor, "placements")


def is_shard(param: Tensor) -> bool:
    """Return whether FSDP or tensor parallelism has cut a parameter, also if this process has all of it.

    A module of FSDP gathers the memory that it had at first, so that must not be replaced.
    """
    return _has_shards(param) or _has_flattened(param)


def _has_shards(tensor: Tensor) -> bool:
    """Return whether a mesh cuts a tensor in any of its dimensions."""
    return any(shard_dim(p) is not None for p in getattr(tensor, "placements", ()))


def _has_flattened(param: Tensor) -> bool:
    """Return whether FSDP1 has flattened a parameter."""
    return bool(getattr(param, "_fsdp_flattened", False))


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that all processes have as a distributed one with the placements of another.

    A plain ``like`` gets the tensor as it is. No message is sent.
    """
    placements = getattr(like, "placements", None)
    if placements is None:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = getattr(like, "device_mesh")  # noqa: B009
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * len(placements), run_check=False)
    found: Tensor = whole.redistribute(placements=placements)
    return found


def from_part(part: Tensor, like: Tensor) -> Tensor:
    """Return the tensor whose part in this process is given, with the placements of another.

    A plain ``like`` gets the part as it is. No message is sent.
    """
    placements = getattr(like, "placements", None)
    if placements is None:
        return part
    from torch.distributed.tensor import DTensor

    mesh = getattr(like, "device_mesh")  # noqa: B009
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which this process may have a part; all processes call this."""
    found: Tensor = tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
    return found


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


def is_fsdp2(module: torch.nn.Module) -> bool:
    """Return whether a module is one of FSDP2, which ``fully_shard`` returns."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def computes_in_16_bits(module: Any) -> bool:
    """Return whether a module of FSDP2 gathers its parameters in 16 bits."""
    # torch has no public way to read the policy
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    dtype = getattr(getattr(state, "_mp_policy", None), "param_dtype", None)
    return dtype is not None and dtype.itemsize == 2


def is_flattened_part(param: Tensor) -> bool:
    """Return whether other processes hold the rest of what FSDP1 has flattened.

    FSDP1 marks the flat parameter and, with ``use_orig_params=True``, its pieces; a mark names no process.
    """
    return _has_flattened(param) and world_size() > 1


def is_flattened(param: Tensor) -> bool:
    """Return whether a parameter concatenates several of a model, whose layers cannot be told apart."""
    return bool(getattr(param, "_is_flat_param", False))


def zero_group() -> Any:
    """Return the process group of a ``ZeroRedundancyOptimizer`` that constructs this optimizer, else None."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if zero is None or world_size() == 1:
        return None
    frame = sys._getframe(1)
    while (
        frame is not None and frame.f_code is not zero.ZeroRedundancyOptimizer._init_local_optimizer.__code__
    ):
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else frame.f_locals["self"].process_group
