"""Per-parameter record: the parameter, its states and its counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .residues import Residue, value_of
from .tensors import is_dense, work_format


@dataclass(slots=True)
class Row:
    """Record of one parameter with the tensors that belong to it.

    A parameter that requires a gradient has a row before its first one comes, so that its place in the table,
    and with it the order of all sums, does not depend on when that is.

    Attributes:
        param: The parameter as the user gave it.
        group: Index of its parameter group.
        index: Position among all parameters, for messages.
        local: The memory of the parameter on this device: the shard of a DTensor, else the parameter.
        work: Tensor that kernels update: the local tensor if it is dense, else a dense copy of it.
        channels: Number of stretches of memory that a rule may treat separately.
        states: States of the rule in the order in which it takes them; laid out like the parameter.
        step: Number of updates that it has had, 0-dim float32 as in torch; None before its first gradient.
            Like all states it has memory of its own, so that a pickle of it is small.
        average: Weight average, or None.
        n_averaged: Number of values in its average, 0-dim int64; None without an average.
        initialized: Whether the second moment was prepared before the first step.
        rounding: How the parameter is rounded, one of ``reference.rounding.MODES``.
        residue: What the rounded parameter lacks of its value, in the form of that mode, or None.
        state_dtype: Dtype of states that are rounded; None where they have that of the arithmetic.
    """

    param: Tensor
    group: int
    index: int
    local: Tensor
    work: Tensor
    channels: int = 1
    states: list[Tensor] | tuple[()] = ()
    step: Tensor | None = None
    average: Tensor | None = None
    n_averaged: Tensor | None = None
    initialized: bool = False
    rounding: str = "nearest"
    residue: Tensor | None = None
    state_dtype: torch.dtype | None = None

    @property
    def is_reserved(self) -> bool:
        """Whether the parameter has no states yet."""
        return self.step is None

    @property
    def value(self) -> Tensor:
        """The value of the parameter in this process, as ``residues.value_of`` returns it."""
        return value_of(self.work, None if self.residue is None else Residue(self.rounding, self.residue))


def make_row(param: Tensor, group: int, index: int, local: Tensor, by_channel: bool) -> Row:
    """Return the row of a parameter, with a dense copy to work on if its layout is not that of a row."""
    kind = work_format(local, by_channel)
    in_place = is_dense(local) and kind is torch.preserve_format
    work = local if in_place else torch.empty_like(local, memory_format=kind).copy_(local)
    return Row(param, group, index, local, work, channels_of(local, by_channel))


def channels_of(local: Tensor, by_channel: bool) -> int:
    """Return the number of output channels of a parameter, if the rule treats them separately."""
    return len(local) if by_channel and local.dim() > 1 and local.numel() else 1
