"""Means over a group of processes."""

from __future__ import annotations

import torch
from torch import Tensor


def average(tensor: Tensor) -> None:
    """Replace a tensor by its mean over the default process group, where there is one; all ranks call it."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    # nccl takes tensors of its own device only
    shared = tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor.contiguous()
    dist.all_reduce(shared)
    tensor.copy_(shared / dist.get_world_size())
