"""One parameter with the tensors that belong to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import is_dense, local_tensor, work_format
from .table import MAX_STATES


@dataclass
class Row:
    """One parameter with the tensors that belong to it.

    Attributes:
        param: The parameter as the user gave it.
        state: What ``optimizer.state`` holds for it: the entries that the step writes, by name.
        states: What the rule keeps, in the order in which it takes them; laid out like the parameter.
        average: Weight average, or None.
        step: 0-dim int64, the number of updates this parameter has had.
        group: Index of its parameter group.
        initialized: Whether the second moment was prepared before the first step.
        index: Position among all parameters, for messages.
        local: The memory of the parameter on this device: the shard of a DTensor, else the parameter.
        work: What a kernel may update: the local tensor if it is dense, else a dense copy of it.
        channels: How many stretches of memory a rule may treat apart.
    """

    param: Tensor
    state: dict[str, Tensor]
    states: list[Tensor]
    average: Tensor | None
    step: Tensor
    group: int
    initialized: bool
    index: int
    local: Tensor
    work: Tensor
    channels: int = 1


def make_row(
    param: Tensor,
    local: Tensor,
    state: Mapping[str, Any],
    names: Sequence[str],
    *,
    averaged: bool,
    group: int,
    index: int,
    by_channel: bool,
) -> Row:
    """Return the row of a parameter, with a copy to work on where its layout is not that of a row."""
    kind = work_format(local, by_channel)
    in_place = is_dense(local) and kind is torch.preserve_format
    assert len(names) <= MAX_STATES
    written = {name: state[name] for name in (*names, "step", *(["average"] if averaged else []))}
    return Row(
        param=param,
        state=written,
        states=[local_tensor(state[name]) for name in names],
        average=local_tensor(state["average"]) if averaged else None,
        step=state["step"],
        group=group,
        initialized=bool(state.get("initialized", False)),
        index=index,
        local=local,
        work=local if in_place else torch.empty_like(local, memory_format=kind).copy_(local),
        channels=len(local) if by_channel and local.dim() > 1 and local.numel() else 1,
    )
