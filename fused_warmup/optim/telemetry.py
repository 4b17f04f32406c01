"""Per-step telemetry: a ring buffer on the device, copied to the host on request."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from ..plan.structs import COUNTERS, PENDING_SCALARS, TELEMETRY

_CAPACITY = 1024


class Telemetry:
    """Record of one row per call of ``step()``, written by the decide stage.

    Rows are written to a ring buffer on the device. A full buffer is copied to the host without waiting for
    the device; ``latest``, ``history`` and ``to_csv`` wait. A state dict holds the last 1,024 rows, which a
    resumed run begins with, or all of them if the optimizer was made with ``telemetry="all"``.

    Columns, all float64:

    * ``step``: updates made so far, this one included (a skipped one is not).
    * ``lr``: learning rate really applied to the first parameter group.
    * ``grad_norm``, ``grad_norm_l1``: L2 and L1 norm of all gradients as they came, before clipping.
    * ``clip_coef``: factor applied to the gradients, 1 without clipping.
    * ``rect``: rectification of RAdam for the first parameter that has a gradient; 0 while it is not
      rectified, 1 for rules without one, NaN when nothing was updated.
    * ``skipped``: 1 if a non-finite gradient made the step do nothing.
    * ``loss``: what ``record_loss`` was given since the step before; NaN without one.
    * ``sharpness``: what ``record_sharpness`` was given since the step before, as a ``SharpnessProbe`` does;
      NaN without one.
    """

    def __init__(self, enabled: bool = True, keep_all: bool = False) -> None:
        self.enabled, self._keep_all = enabled, keep_all
        self.ring_buffer: Tensor | None = None
        self.pending_scalars: Tensor | None = None
        self._counters: Tensor | None = None
        # rows on the host, then copies of the ring buffer under way with the counts at the time of each
        self._rows: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._calls = 0
        self._uncopied = 0

    def allocate(self, device: torch.device, counters: Tensor | None = None) -> None:
        """Allocate the ring buffer and the pending scalars on a device, unless they are there."""
        if self.pending_scalars is None or self.pending_scalars.device != device:
            self.pending_scalars = torch.full(
                (len(PENDING_SCALARS),), torch.nan, dtype=torch.float64, device=device
            )
        if self.enabled and (self.ring_buffer is None or self.ring_buffer.device != device):
            ring_buffer = torch.zeros(_CAPACITY, len(TELEMETRY), dtype=torch.float64, device=device)
            self.ring_buffer = (
                ring_buffer if self.ring_buffer is None else ring_buffer.copy_(self.ring_buffer)
            )
        if counters is not None:
            self._counters = counters

    def advance(self) -> None:
        """Note that the device has written one more row."""
        if self.ring_buffer is None or self._counters is None:
            return
        self._uncopied += 1
        if self._uncopied == _CAPACITY:
            self._copies.append((_copied(self.ring_buffer), _copied(self._counters)))
            self._uncopied = 0

    def record(self, name: str, value: Tensor | float) -> None:
        """Write a loss or sharpness into the next row, without waiting for the device."""
        assert self.pending_scalars is not None
        slot = self.pending_scalars[PENDING_SCALARS.index(name)]
        if isinstance(value, Tensor):
            slot.copy_(value.detach().reshape(()), non_blocking=True)
        else:
            slot.fill_(value)

    def __len__(self) -> int:
        """Return the number of rows; waits for the device."""
        self._collect()
        return sum(map(len, self._rows))

    def rows(self) -> Tensor:
        """Return all rows on the CPU, float64 of shape ``[steps, columns]``; waits for the device.

        Steps that a CUDA graph replays leave rows too. The buffer holds the last 1,024 of them; older rows
        are lost if more steps are replayed between two calls.
        """
        self._collect()
        self._join()
        return self._rows[0].clone()

    def kept_rows(self) -> Tensor:
        """Return the rows that go into a state dict; waits for the device."""
        rows = self.rows()
        return rows if self._keep_all else rows[-_CAPACITY:].clone()

    def _collect(self) -> None:
        """Copy the new rows from the device; waits for it."""
        if self.ring_buffer is None or self._counters is None:
            return
        if self.ring_buffer.is_cuda:
            torch.cuda.synchronize(self.ring_buffer.device)
        found = [
            self._new_rows(*copy) for copy in (*self._copies, (self.ring_buffer.cpu(), self._counters.cpu()))
        ]
        self._rows += [rows for rows in found if len(rows)]
        self._copies, self._uncopied = [], 0
        # joined now and then, so that reading at every step does not collect a tensor each
        if len(self._rows) > _CAPACITY:
            self._join()

    def _join(self) -> None:
        """Concatenate all row blocks."""
        empty = torch.empty(0, len(TELEMETRY), dtype=torch.float64, device="cpu")
        self._rows = [torch.cat([empty, *self._rows])]

    def _new_rows(self, ring_buffer: Tensor, counters: Tensor) -> Tensor:
        """Return the rows of a copy of the ring buffer that are not in earlier copies."""
        calls = int(counters[COUNTERS.index("calls")])
        new = range(max(self._calls, calls - _CAPACITY), calls)
        self._calls = calls
        return ring_buffer[[call % _CAPACITY for call in new]]

    def load_rows(self, rows: Tensor) -> int:
        """Replace all rows by those of another record.

        Returns:
            The count of calls with which the next row follows them.
        """
        self._rows = [rows.to("cpu", torch.float64, copy=True)]
        self._copies, self._uncopied = [], 0
        self._calls = len(rows)
        return self._calls

    def history(self) -> dict[str, Tensor]:
        """Return every column as a float64 CPU tensor of shape ``[len(self)]``; waits for the device."""
        return dict(zip(TELEMETRY, self.rows().T.contiguous(), strict=True))

    def latest(self) -> dict[str, float]:
        """Return the last row by column name; waits for the device.

        Raises:
            RuntimeError: If there is no row yet, or telemetry is off.
        """
        self._collect()
        rows = next((block for block in reversed(self._rows) if len(block)), None)
        if rows is None:
            raise RuntimeError(
                "Telemetry: latest() must follow a step made with telemetry=True, got no rows."
            )
        return dict(zip(TELEMETRY, rows[-1].tolist(), strict=True))

    def to_csv(self, path: str | Path) -> None:
        """Write all rows to a CSV file with a header line; waits for the device.

        Args:
            path: File to write; numbers are written so that reading gives the same float64.
        """
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(TELEMETRY)
            writer.writerows(self.rows().tolist())


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy on the host without waiting; the device may still be writing it."""
    pinned = tensor.device.type != "cpu"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return copy.copy_(tensor, non_blocking=pinned)
