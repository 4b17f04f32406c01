"""Per-parameter record: the parameter, its states and its counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .structs import STRUCTS
from .tensors import is_dense, local_tensor, local_tensors, work_format

_FIELDS: tuple[str, ...] = STRUCTS["RowCounters"].names or ()


class RowCounters:
    """Counts of one parameter, in memory of their own that the kernels write.

    Args:
        device: Where the parameter is.
        step: Updates that it has had.
        n_averaged: Values in its average.

    Attributes:
        record: The memory, int64 of ``[3]``: the struct ``RowCounters`` of the table.
        step: 0-dim int64, the number of updates that the parameter has had.
        n_averaged: 0-dim int64, the number of values in its average.
        step_float: ``step`` as torch keeps it in a state dict, 0-dim float32. It has memory of its own, for
            torch cannot save one that is seen as two dtypes.
    """

    def __init__(self, device: torch.device, step: int = 0, n_averaged: int = 0) -> None:
        self.record = torch.zeros(len(_FIELDS), dtype=torch.int64, device=device)
        self.step = self.record[_FIELDS.index("step")]
        self.n_averaged = self.record[_FIELDS.index("n_averaged")]
        self.step_float = torch.zeros((), dtype=torch.float32, device=device)
        self._version = 0
        if step or n_averaged:
            self.set(step, n_averaged)

    def set(self, step: int, n_averaged: int) -> None:
        """Write both counts; nothing waits."""
        self.step.fill_(step)
        self.n_averaged.fill_(n_averaged)
        self.settle()

    def settle(self) -> None:
        """Bring ``step_float`` to a count that was written in place; kernels change no version."""
        if self.record._version != self._version:
            self.step_float.copy_(self.step)
            self._version = self.record._version

    def count_update(self) -> int:
        """Count one more update and return how many there are; waits for the device."""
        self.step += 1
        self.settle()
        return int(self.step)

    def count_average(self) -> int:
        """Count one more value in the average and return how many there are; waits for the device."""
        self.n_averaged += 1
        return int(self.n_averaged)


@dataclass(frozen=True)
class Member:
    """Parameter that takes part in a step.

    Attributes:
        index: Position among all parameters, for messages.
        group: Index of its group.
        param: The parameter.
        local: Its memory in this process.
        state: Its entry in ``optimizer.state``; empty if there is none.
    """

    index: int
    group: int
    param: Tensor
    local: Tensor
    state: Mapping[str, Any]


@dataclass
class Row:
    """Record of one parameter with the tensors that belong to it.

    Attributes:
        param: The parameter as the user gave it.
        state: Entries of ``optimizer.state`` that the step writes, by name.
        states: States of the rule in the order in which it takes them; laid out like the parameter.
        average: Weight average, or None.
        counters: Its counts on the device.
        group: Index of its parameter group.
        initialized: Whether the second moment was prepared before the first step.
        index: Position among all parameters, for messages.
        local: The memory of the parameter on this device: the shard of a DTensor, else the parameter.
        work: Tensor that kernels update: the local tensor if it is dense, else a dense copy of it.
        channels: Number of stretches of memory that a rule may treat separately.
    """

    param: Tensor
    state: dict[str, Tensor]
    states: list[Tensor]
    average: Tensor | None
    counters: RowCounters
    group: int
    initialized: bool
    index: int
    local: Tensor
    work: Tensor
    channels: int = 1


def make_row(
    member: Member,
    state: Mapping[str, Any],
    names: Sequence[str],
    counters: RowCounters,
    *,
    averaged: bool,
    by_channel: bool,
) -> Row:
    """Return the row of a parameter, with a dense copy to work on if its layout is not that of a row."""
    local = member.local
    kind = work_format(local, by_channel)
    in_place = is_dense(local) and kind is torch.preserve_format
    written = (*names, "step", *(["average", "n_averaged"] if averaged else []))
    return Row(
        param=member.param,
        state={name: state[name] for name in written},
        states=local_tensors([state[name] for name in names]),
        average=local_tensor(state["average"]) if averaged else None,
        counters=counters,
        group=member.group,
        initialized=bool(state.get("initialized", False)),
        index=member.index,
        local=local,
        work=local if in_place else torch.empty_like(local, memory_format=kind).copy_(local),
        channels=len(local) if by_channel and local.dim() > 1 and local.numel() else 1,
    )
