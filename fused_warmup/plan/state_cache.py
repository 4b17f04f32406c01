"""States of the rows as they were when the table was packed, to notice that one was replaced or moved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..reference.rounding import RESIDUES
from .address_cache import AddressCache, TensorReader
from .rows import Row
from .structs import MAX_STATES
from .tensors import local_tensors
from .tracked_states import peek

# references to a state: in the optimizer's dictionary, in its row and in three lists
_OWN_REFERENCES = 5
# references to a count: one more, by which the optimizer tells it from one that was put in its place
_COUNT_REFERENCES = 6
# references to the dictionary of a row: in the optimizer's, in two lists, and one more for each of its states
_DICT_REFERENCES = 3
# references to a distributed tensor, whose local part the row has: in the dictionary and in two lists
_WHOLE_REFERENCES = 3


class StateCache:
    """Objects and addresses of all states that the table points to, in the order in which rows got them.

    Args:
        state: State of the optimizer by parameter.
        names: Names of the states that each group keeps.
        reader: Reads many tensors at once.
    """

    def __init__(
        self, state: Mapping[Tensor, dict[str, Any]], names: Sequence[tuple[str, ...]], reader: TensorReader
    ) -> None:
        self._state, self._reader, self._length = state, reader, len(state)
        self._written = names
        # names of all states of a row, by group, rounding mode and whether it has an average
        self._all_names: dict[tuple[int, str, bool], tuple[str, ...]] = {}
        # one entry for each row
        self._kept: list[Row] = []
        self._params: list[Tensor] = []
        self._own: list[dict[str, Any]] = []
        # one entry for each state of each row
        self._dicts: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._objects: list[Any] = []
        # dictionaries by the number of states
        self._sized: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        # states of which the row has all of the memory, and others
        self._plain: list[Any] = []
        self._counts: list[Any] = []
        self._wholes: list[Any] = []
        self._cache = AddressCache(reader.signatures, [])
        self._rows = np.zeros(0, np.int64)
        self._places = np.zeros(0, np.int64)
        self._n_states = np.zeros(0, np.int64)
        self._has_average = np.zeros(0, bool)
        self._has_residue = np.zeros(0, bool)

    def add(self, rows: Sequence[Row], positions: Sequence[int]) -> None:
        """Add the states of rows.

        Args:
            rows: The rows.
            positions: Positions of these rows in the table.
        """
        objects: list[Any] = []
        places: list[int] = []
        state, dicts, names, plain = self._state, self._dicts, self._names, self._plain
        for row in rows:
            own = peek(state, row.param)
            assert own is not None
            averaged = row.average is not None
            kind = (row.group, row.rounding, averaged)
            keys = self._all_names.get(kind) or self._names_of(kind)
            counts = (row.step, row.n_averaged) if averaged else (row.step,)
            if row.local is row.param:
                states = row.states
                if averaged or row.residue is not None:
                    states = [*states, *(x for x in (row.residue, row.average) if x is not None)]
                plain += states
            else:
                states = [dict.__getitem__(own, key) for key in keys[: len(keys) - len(counts)]]
                self._wholes += states
            places.append(len(names))
            self._own.append(own)
            self._sized[len(keys)].append(own)
            dicts += [own] * len(keys)
            names += keys
            self._counts += counts
            objects += states
            objects += counts
        self._kept += rows
        self._params += [row.param for row in rows]
        self._objects += objects
        self._cache.extend(local_tensors(objects) if self._wholes else objects)
        self._rows = _appended(self._rows, positions)
        self._places = _appended(self._places, places)
        self._n_states = _appended(self._n_states, [len(row.states) for row in rows])
        self._has_average = _appended(self._has_average, [row.average is not None for row in rows])
        self._has_residue = _appended(self._has_residue, [row.residue is not None for row in rows])
        self._length = len(self._state)

    def _names_of(self, kind: tuple[int, str, bool]) -> tuple[str, ...]:
        """Return the names of all states of rows of a group, rounding mode, and with an average or not."""
        group, rounding, averaged = kind
        residue = (RESIDUES[rounding][0],) if rounding in RESIDUES else ()
        ends = ("average", "step", "n_averaged") if averaged else ("step",)
        names = self._all_names[kind] = (*self._written[group], *residue, *ends)
        return names

    def fill(self, columns: np.ndarray, first: int = 0) -> None:
        """Write the addresses of states and counts into the column ``Row``.

        Args:
            columns: The column.
            first: Rows that were added before this one are left out.
        """
        rows, places, n_states = self._rows[first:], self._places[first:], self._n_states[first:]
        addresses, averaged = self._cache.addresses, self._has_average[first:]
        for k in range(MAX_STATES):
            kept = n_states > k
            columns[f"state{k}"][rows[kept]] = addresses[places[kept] + k]
        ends, kept = places + n_states, self._has_residue[first:]
        columns["residue"][rows[kept]] = addresses[ends[kept]]
        ends = ends + kept
        columns["step"][rows] = addresses[ends + averaged]
        columns["average"][rows[averaged]] = addresses[ends[averaged]]
        columns["n_averaged"][rows[averaged]] = addresses[ends[averaged] + 2]

    def __len__(self) -> int:
        """Return the number of rows with states."""
        return len(self._own)

    def has_owners(self) -> bool:
        """Return whether ``optimizer.state`` still has the same dictionary for each parameter."""
        return self._reader.states_unchanged([self._state] * len(self._own), self._params, self._own)

    def has_objects(self) -> bool:
        """Return whether the dictionaries still hold the same states."""
        return len(self._state) == self._length and self._reader.states_unchanged(
            self._dicts, self._names, self._objects
        )

    def valid_rows(self, state: Mapping[Tensor, Any]) -> dict[int, Row]:
        """Return the rows, by the identity of the parameter, if ``state`` still holds their states."""
        if state is not self._state or self.find_moved() is None:
            return {}
        if not (self.has_owners() and self.has_objects()):
            return {}
        for row, own in zip(self._kept, self._own, strict=True):
            row.initialized = bool(dict.get(own, "initialized", False))
        return {id(row.param): row for row in self._kept}

    def find_moved(self) -> bool | None:
        """Return whether a state has another address; None if a dtype, shape or stride changed."""
        moved = self._cache.find_moved()
        return None if moved is None else len(moved) > 0

    def accept_moves(self, columns: np.ndarray) -> None:
        """Write the addresses that ``find_moved`` has read into the column ``Row``."""
        self._cache.accept()
        self.fill(columns)

    def has_shared(self) -> bool:
        """Return whether code outside of the package holds a state or the dictionary of a parameter.

        It may replace or move states at any time.
        """
        beyond = self._reader.referenced_beyond
        return (
            any(beyond(own, _DICT_REFERENCES + n) for n, own in self._sized.items())
            or beyond(self._plain, _OWN_REFERENCES)
            or beyond(self._counts, _COUNT_REFERENCES)
            or beyond(self._wholes, _WHOLE_REFERENCES)
        )


def _appended(array: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Return an array with more values at its end."""
    more = np.array(values, array.dtype)
    return np.concatenate([array, more]) if len(array) else more
