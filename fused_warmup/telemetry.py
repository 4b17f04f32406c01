"""The record that the step keeps on the device, and the one place that copies it to the host."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from .table import SLOTS, TELEMETRY

_PAGE = 1024


class Telemetry:
    """One row per call of ``step()``, written by the decide stage.

    The rows collect in a page on the device. A full page is copied to the host without waiting for it;
    ``latest``, ``history`` and ``to_csv`` are what waits.

    Columns, all float64:

    * ``step``: updates made so far, this one included (a skipped one is not).
    * ``lr``: learning rate really applied to the first parameter group.
    * ``grad_norm``, ``grad_norm_l1``: L2 and L1 norm of all gradients as they came, before clipping.
    * ``clip_coef``: factor applied to the gradients, 1 without clipping.
    * ``rect``: rectification of RAdam for the first parameter that has a gradient; 0 while it is not
      rectified, 1 for rules without one, NaN when nothing was updated.
    * ``skipped``: 1 if a non-finite gradient made the step do nothing.
    * ``loss``: what ``record_loss`` was given since the step before; NaN without one.
    * ``sharpness``: the last sharpness reading; NaN without one.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.page: Tensor | None = None
        self.slots: Tensor | None = None
        self._pages: list[Tensor] = []
        self._rows = 0

    def allocate(self, device: torch.device) -> None:
        """Make the page and the slots on the device of the parameters; nothing if they are there."""
        if self.slots is None or self.slots.device != device:
            self.slots = torch.full((len(SLOTS),), torch.nan, dtype=torch.float64, device=device)
        if self.enabled and (self.page is None or self.page.device != device):
            page = torch.zeros(_PAGE, len(TELEMETRY), dtype=torch.float64, device=device)
            self.page = page if self.page is None else page.copy_(self.page)

    def advance(self) -> None:
        """Note that the device has written one more row."""
        if self.page is None:
            return
        self._rows += 1
        if self._rows % _PAGE == 0:
            pinned = self.page.is_cuda
            copy = torch.empty(self.page.shape, dtype=self.page.dtype, device="cpu", pin_memory=pinned)
            self._pages.append(copy.copy_(self.page, non_blocking=pinned))

    def record_loss(self, loss: Tensor | float) -> None:
        """Leave the loss for the next row; nothing waits."""
        assert self.slots is not None
        slot = self.slots[SLOTS.index("loss")]
        if isinstance(loss, Tensor):
            slot.copy_(loss.detach().reshape(()), non_blocking=True)
        else:
            slot.fill_(loss)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._rows

    def rows(self) -> Tensor:
        """Return all rows on the CPU, float64 of shape ``[len(self), columns]``; waits for the device."""
        tail = self._tail()
        if tail.is_cuda:
            torch.cuda.synchronize(tail.device)
        return torch.cat([*self._pages, tail.cpu()])

    def load_rows(self, rows: Tensor) -> None:
        """Take over the rows of another record, as the start of this one."""
        rows = rows.to("cpu", torch.float64, copy=True)
        pages = [rows[i : i + _PAGE] for i in range(0, len(rows), _PAGE)]
        device = self.page.device if self.page is not None else torch.device("cpu")
        self.page = torch.zeros(_PAGE, len(TELEMETRY), dtype=torch.float64, device=device)
        if pages:
            self.page[: len(pages[-1])] = pages[-1].to(device)
        self._pages = pages[: len(rows) // _PAGE]
        self._rows = len(rows)

    def history(self) -> dict[str, Tensor]:
        """Return every column as a float64 CPU tensor of shape ``[len(self)]``; waits for the device."""
        return dict(zip(TELEMETRY, self.rows().T.contiguous(), strict=True))

    def latest(self) -> dict[str, float]:
        """Return the last row by column name; waits for the device.

        Raises:
            RuntimeError: If there is no row yet, or telemetry is off.
        """
        if self._rows == 0:
            raise RuntimeError(
                "Telemetry: latest() must follow a step made with telemetry=True, got no rows."
            )
        assert self.page is not None
        return dict(zip(TELEMETRY, self.page[(self._rows - 1) % _PAGE].tolist(), strict=True))

    def to_csv(self, path: str | Path) -> None:
        """Write all rows to a CSV file with a header line; waits for the device.

        Args:
            path: File to write; numbers are written so that reading gives the same float64.
        """
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(TELEMETRY)
            writer.writerows(self.rows().tolist())

    def _tail(self) -> Tensor:
        """Return the rows that no finished page holds yet, where they are."""
        if self.page is None:
            return torch.empty(0, len(TELEMETRY), dtype=torch.float64, device="cpu")
        return self.page[: self._rows % _PAGE]
