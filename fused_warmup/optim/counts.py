"""Counts of updates and of averaged values, which the kernels write into the states of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plan.device_buffers import send
from ..plan.rows import Row
from ..plan.structs import ROW_COUNTERS


class Counts:
    """Counts of the parameters that have states.

    The state of a parameter has its count as torch keeps it, a float32; ``exact`` goes on beyond 2**24. Other
    code may write the float, and the next step goes on from there.

    Attributes:
        steps: Entry ``step`` of the state of each parameter, 0-dim float32, by the identity of the parameter.
        n_averaged: Entry ``n_averaged`` of those that have an average, 0-dim int64.
        exact: The struct ``RowCounters`` of each row of the table, int64 of ``[rows, 2]`` on the device; None
            before the first step.
    """

    def __init__(self) -> None:
        self.steps: dict[int, Tensor] = {}
        self.n_averaged: dict[int, Tensor] = {}
        self.exact: Tensor | None = None
        # held, so that an identity stays that of its parameter
        self._params: dict[int, Tensor] = {}
        # a view of the exact counts, and those that it belongs to
        self._made: Tensor | None = None
        self._made_of: Tensor | None = None
        self._slots: dict[int, int] = {}

    @property
    def made(self) -> Tensor | None:
        """Exact number of updates of each row, int64 of ``[rows]``, in the memory where the kernels count."""
        if self._made_of is not self.exact:
            self._made_of = self.exact
            self._made = None if self.exact is None else self.exact.select(1, 0)
        return self._made

    def arrange(self, rows: Sequence[Row], device: torch.device) -> None:
        """Bring the exact counts into the order of the rows; nothing waits."""
        held, slots = self.exact, np.array([self._slot(row) for row in rows], np.int64)
        kept = np.flatnonzero(slots >= 0)
        # captured graphs count there too
        stays = held is not None and held.device == device and len(held) == len(rows)
        if not stays or (slots[kept] != kept).any():
            fresh = torch.zeros(len(rows), len(ROW_COUNTERS), dtype=torch.int64, device=device)
            if held is not None and len(kept):
                found = held.to(device).index_select(0, send(slots[kept], device))
                fresh.index_copy_(0, send(kept, device), found)
            self.exact = fresh
        for counts in (self.steps, self.n_averaged, self._params, self._slots):
            counts.clear()
        self.enter(rows, range(len(rows)))

    def _slot(self, row: Row) -> int:
        """Return the position of the exact count of a row, -1 if it has none."""
        key = id(row.param)
        known = row.step is not None and self.steps.get(key) is row.step
        return self._slots.get(key, -1) if known else -1

    def enter(self, rows: Sequence[Row], positions: Sequence[int]) -> None:
        """Take over the counts of those rows that have states.

        Args:
            rows: The rows.
            positions: Their positions in the table.
        """
        for row, position in zip(rows, positions, strict=True):
            if row.step is not None:
                self._enter(row.param, row.step, row.n_averaged, position)

    def _enter(self, param: Tensor, step: Tensor, n_averaged: Tensor | None, slot: int) -> None:
        key = id(param)
        self._params[key], self.steps[key], self._slots[key] = param, step, slot
        if n_averaged is not None:
            self.n_averaged[key] = n_averaged

    def set_exact(self, made: Mapping[int, int]) -> None:
        """Set exact counts, by the position of the row."""
        if made:
            assert self.exact is not None
            places, values = (np.array(list(x), np.int64) for x in (made.keys(), made.values()))
            device = self.exact.device
            self.exact[:, 0].index_copy_(0, send(places, device), send(values, device))

    def select(self, params: Sequence[Tensor]) -> tuple[list[int], Tensor]:
        """Return the positions of the parameters that have counts, and the exact counts, int64 of ``[n]``."""
        slots = [self._slots.get(id(param), -1) for param in params]
        found = [i for i, slot in enumerate(slots) if slot >= 0]
        if self.exact is None:
            return [], torch.zeros(0, dtype=torch.int64)
        places = send(np.array([slots[i] for i in found], np.int64), self.exact.device)
        return found, self.exact[:, 0].index_select(0, places)

    def load(
        self, params: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Any]], made: Sequence[int]
    ) -> None:
        """Replace all counts by those of loaded states.

        Args:
            params: The parameters.
            states: States by parameter.
            made: Exact number of updates of each.
        """
        device = params[0].device if params else torch.device("cpu")
        exact = np.zeros((len(made), len(ROW_COUNTERS)), np.int64)
        exact[:, 0] = made
        self.__init__()  # type: ignore[misc]
        self.exact = send(exact, device)
        for slot, param in enumerate(params):
            self._enter(param, states[param]["step"], states[param].get("n_averaged"), slot)

    def __getstate__(self) -> dict[str, Any]:
        """Return the counts by parameter: an identity means nothing elsewhere."""
        keys = list(self._params)
        held = [(self._params[k], self.steps[k], self.n_averaged.get(k), self._slots[k]) for k in keys]
        return {"exact": self.exact, "held": held}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore the counts."""
        self.__init__()  # type: ignore[misc]
        self.exact = state["exact"]
        for held in state["held"]:
            self._enter(*held)
