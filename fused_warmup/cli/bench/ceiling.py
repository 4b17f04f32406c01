"""The ceiling of a step: passes over memory that read and write as much, and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ...backends.threads import threads_for
from ...plan.address_cache import addresses_of
from ...plan.chunks import chunks
from .timing import Step, in_order

# one tensor for each parameter
Column = Sequence[Tensor]


class Pass(NamedTuple):
    """Columns that a step goes through at the same time.

    Attributes:
        rewritten: Columns that are read and written.
        read: Columns that are only read.
    """

    rewritten: Sequence[Column]
    read: Sequence[Column]

    @property
    def columns(self) -> list[Column]:
        """All columns, rewritten ones first."""
        return [*self.rewritten, *self.read]

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written."""
        return sum(t.nbytes for column in (*self.rewritten, *self.columns) for t in column)


def stream(passes: Sequence[Pass]) -> Step:
    """Return a step that makes the passes; every byte keeps its value.

    Chunks, their order and the threads are those of the CPU backend: the last pass begins at the end, where
    the one before it stopped.
    """
    return in_order(*(_stream(part, backwards=part is passes[-1]) for part in passes))


def _stream(part: Pass, backwards: bool) -> Step:
    """Return a step that makes one pass."""
    from ... import _cpu

    columns = part.columns
    sizes = [tensor.numel() for tensor in columns[0]]
    table = np.array([addresses_of(column) for column in columns], np.uint64).T.copy()
    pieces = chunks(sizes, sizes)
    item_sizes = [column[0].element_size() for column in columns]
    isa, threads = len(_cpu.instruction_sets()) - 1, threads_for(sum(sizes))

    # the pass is held for the memory of its tensors
    def run(held: Pass = part) -> None:
        _cpu.stream(
            isa,
            table.ctypes.data,
            pieces.ctypes.data,
            len(pieces),
            item_sizes,
            len(held.rewritten),
            backwards,
            threads,
        )

    return run
