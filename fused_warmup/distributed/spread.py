"""The processes that have other parts of a parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .groups import is_distributed, is_flattened_part, shard_dim

# a process group of torch.distributed, which not every build of torch has
Group = Any


@dataclass(frozen=True)
class Spread:
    """State over which processes a parameter is spread, and where the part of this process lies in it.

    Attributes:
        groups: Process groups over which gradients of other elements are spread, in an order that all
            processes share; their parts of the norm are added up.
        layer_groups: Those over which the elements of the same tensor are spread.
        numel: Elements of the whole tensor.
        channels: Indices of its first dimension, or 1 for a rule that does not treat them separately.
        first_channel: The first index of its first dimension in this process.
        is_cut: Whether other processes have parts of the channels, rather than other channels.
        is_known: False if other processes have other parts, and which is not to be found out.
    """

    groups: tuple[Group, ...] = ()
    layer_groups: tuple[Group, ...] = ()
    numel: int = 0
    channels: int = 1
    first_channel: int = 0
    is_cut: bool = False
    is_known: bool = True


def spread_of(
    param: Tensor, by_channel: bool, process_group: Group | None = None, *, is_zero: bool = False
) -> Spread:
    """Return how a parameter is spread.

    Args:
        param: The parameter.
        by_channel: Whether the rule sums over channels.
        process_group: Processes that plain tensors are spread over, or None.
        is_zero: Whether those are whole tensors, as under ZeRO, or parts of tensors.

    Returns:
        The processes and the place.
    """
    whole = Spread(numel=param.numel(), channels=_channels(param, by_channel))
    placements = getattr(param, "placements", None)
    if placements is None:
        return _plain(param, whole, process_group, is_zero)
    mesh = getattr(param, "device_mesh")  # noqa: B009
    cuts = _cuts(param)
    groups = tuple(mesh.get_group(i) for i, _ in cuts)
    return Spread(
        groups,
        groups,
        whole.numel,
        whole.channels,
        _first_index(len(param), mesh, [i for i, dim in cuts if dim == 0]) if param.dim() else 0,
        whole.channels > 1 and any(dim != 0 for _, dim in cuts),
    )


def _cuts(param: Tensor) -> list[tuple[int, int]]:
    """Return the mesh dimensions that cut a distributed parameter, each with the dimension that it cuts."""
    mesh, placements = getattr(param, "device_mesh"), getattr(param, "placements")  # noqa: B009
    dims = [(i, shard_dim(p)) for i, p in enumerate(placements)]
    return [(i, dim % param.dim()) for i, dim in dims if dim is not None and mesh.size(i) > 1]


def place_of(param: Tensor) -> tuple[int, int, int]:
    """Return where the elements of a parameter in this process lie in the whole tensor.

    Args:
        param: The parameter.

    Returns:
        Number of the first element, elements of a run, which follow one another in the whole tensor, and
        elements from the beginning of a run to that of the next.
    """
    if not is_distributed(param):
        return 0, param.numel(), param.numel()
    mesh, local = getattr(param, "device_mesh"), getattr(param, "_local_tensor")  # noqa: B009
    cuts, first = _cuts(param), 0
    for dim in {dim for _, dim in cuts}:
        index = _first_index(param.shape[dim], mesh, [i for i, d in cuts if d == dim])
        first += index * math.prod(param.shape[dim + 1 :])
    last = max((dim for _, dim in cuts), default=0)
    if last == 0:
        return first, local.numel(), local.numel()
    return first, math.prod(local.shape[last:]), math.prod(param.shape[last:])


def elements_of(param: Tensor) -> Tensor:
    """Return the numbers in the whole tensor of the elements here, int64 in the order of memory."""
    first, run, stride = place_of(param)
    here = torch.arange(getattr(param, "_local_tensor", param).numel())
    return first + here // max(run, 1) * stride + here % max(run, 1)


def _plain(param: Tensor, whole: Spread, process_group: Group | None, is_zero: bool) -> Spread:
    """Return the spread of a tensor of no mesh."""
    if process_group is not None and torch.distributed.get_world_size(process_group) > 1:
        groups = (process_group,)
        return Spread(groups, () if is_zero else groups, whole.numel, whole.channels)
    known = process_group is not None or not (is_zero or is_flattened_part(param))
    return Spread((), (), whole.numel, whole.channels, is_known=known)


def _channels(param: Tensor, by_channel: bool) -> int:
    """Return the number of channels of a whole tensor, 1 if the rule does not treat them separately."""
    return len(param) if by_channel and param.dim() > 1 and param.numel() else 1


def _first_index(size: int, mesh: Any, dims: list[int]) -> int:
    """Return the first index here of a dimension that mesh dimensions cut, one after the other."""
    first, end = 0, size
    for i in dims:
        each = -(-(end - first) // mesh.size(i))
        first = min(first + each * mesh.get_local_rank(i), end)
        end = min(first + each, end)
    return first


def has_strided_rows(param: Tensor) -> bool:
    """Return whether the indices of the first dimension in this process do not follow one another."""
    return any(shard_dim(p) == 0 and hasattr(p, "split_factor") for p in getattr(param, "placements", ()))
