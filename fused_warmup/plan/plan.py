"""Packed table of one optimizer: the memory that a step reads and writes.

Static columns are built once. A step reads the addresses of the gradients again and compares those of the
parameters, because a training loop may move either. The row of a parameter that had no gradient when the
table was built is filled when the first one comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ..distributed.reduction import Reduction, make_reduction
from ..distributed.spread import Spread, place_of
from ..reference.rounding import SIXTEEN_BITS
from .address_cache import AddressCache, address_of, addresses_of, select_reader
from .captured import CapturedArguments
from .chunks import BLOCK_THREADS, PIECE, TILE_BYTES, chunks, threads_for
from .device_buffers import DeviceBuffers, is_capturing
from .gradients import GradientTable
from .groups import GroupReadings, GroupTable
from .hyper import AverageSettings, Hyper, Settings
from .overlaps import check_disjoint
from .rows import Row
from .spec import RuleSpec
from .state_cache import StateCache
from .step_struct import StepStruct
from .structs import (
    ALL_STAGES,
    AVERAGE_KINDS,
    DTYPES,
    LAYER_STAGE,
    MEASURE_STAGE,
    ROUNDINGS,
    STRUCTS,
    UPDATE_STAGE,
)
from .tensors import local_tensor


class Plan:
    """Packed table of one optimizer: rows, chunks, groups and the settings of a step.

    Backends read either the Python side (``rows``, ``groups``, ``settings``) or the packed side, whose
    address is ``address``. Where the tensors are on another device, so are the ``buffers`` of the packed
    side; a captured graph reads them, so they stay where they are.

    Args:
        owner: Name of the optimizer class, for messages.
        spec: The update rule.
        rows: Parameters that have or may get a state, in the order of the groups.
        reaches: Bytes from the first to the last element of each row, int64 of ``[rows]``.
        waiting: Other parameters; one with a gradient makes the table invalid.
        members: Parameters of each group.
        names: Names of the states that each group keeps.
        state: State of the optimizer by parameter.
        readings: Hyper-parameters of the groups.
        norms: Norm of each group that is kept on a sphere, 0-dim float64 on the device; None for others.
        average: Average that the rows keep.
        record: Device tensors ``row_counters``, ``counters``, ``pending_scalars``, ``rates`` and
            ``ring_buffer``, which may be None.
        device: Where the tensors are.
        spreads: How each row is spread over processes; nothing if there are no others.

    Attributes:
        groups: Hyper-parameters of the groups.
        gradients: Gradients of the step.
        states: States of the rows.
        indices: Position of each row among all parameters.
        arrivals: Positions of rows without states that have a gradient now, int64; ``fill`` takes them in.
        n_tiles: Most tiles that a chunk has; 1 for rules that sum over layers.
        spreads: As given.
        reduction: Sums that processes add up; None if no row is spread over several.
        scaling: ``grad_scale`` and ``found_inf`` of a ``GradScaler``, or None each.
        has_all_kinds: Whether any parameter is float64, or it or its states are rounded in another mode than
            to nearest.
        numel: Number of elements of the rows that have states.
        address: Address of the ``Step`` struct on the host.
    """

    def __init__(
        self,
        owner: str,
        spec: RuleSpec,
        rows: list[Row],
        reaches: np.ndarray,
        waiting: list[Tensor],
        members: list[list[Tensor]],
        names: Sequence[tuple[str, ...]],
        state: Mapping[Tensor, dict[str, Any]],
        readings: GroupReadings,
        norms: list[Tensor | None],
        average: AverageSettings,
        record: Mapping[str, Tensor | None],
        device: torch.device,
        *,
        spreads: Sequence[Spread] = (),
    ) -> None:
        self.owner, self.spec, self.rule, self.rows = owner, spec, spec.name, rows
        self.device, self.record, self.spreads = device, record, spreads
        self.buffers = DeviceBuffers(device)
        self.settings, self.average = Settings(), average
        self.scaling: tuple[Tensor | None, Tensor | None] = (None, None)
        self.numel, self.arrivals = 0, np.zeros(0, np.int64)
        self._reader = select_reader()
        self._members, self._waiting, self._reaches = members, waiting, reaches
        self._params = [row.param for row in rows]
        self.indices = [row.index for row in rows]
        self._shards = [row for row in rows if row.local is not row.param]
        self._strided = [row for row in rows if row.work is not row.local]
        self._param_cache = AddressCache(self._reader.signatures, [row.local for row in rows])
        self.states = StateCache(state, names, self._reader)
        self._reserved = np.ones(len(rows), bool)
        extents = self._reader.extents([row.work for row in rows])
        self._columns = _pack_rows(rows, extents, self._param_cache.addresses, [len(own) for own in names])
        self._pack_rounding(readings.hypers)
        is_float64 = self._columns["dtype"] == DTYPES[torch.float64]
        self.has_all_kinds = bool((is_float64 | self._are_rounded()).any())
        self._enter([i for i, row in enumerate(rows) if not row.is_reserved])
        self._pack(readings, norms)

    def _pack(self, readings: GroupReadings, norms: list[Tensor | None]) -> None:
        """Fill the columns that change only when the set of tensors does."""
        counters = self.record["row_counters"]
        size = STRUCTS["RowCounters"].itemsize
        self._columns["counters"] = address_of(counters) + size * np.arange(len(self.rows), dtype=np.uint64)
        self._kinds: tuple[tuple[int, ...], ...] | None = None
        self._chunks = chunks(self._columns["numel"], self._columns["channel_size"])
        self._step = StepStruct()
        self.address = self._step.address
        self._captured_step: Tensor | None = None
        self._captures: CapturedArguments | None = None
        if self.buffers.mirrored:
            size = self._step.array.nbytes + 8 * len(self.rows)
            self._captures = CapturedArguments(self.owner, size, self.device)
        channels = self._columns["numel"] // np.maximum(self._columns["channel_size"], 1)
        pieces = channels * -(-self._columns["channel_size"] // PIECE)
        self._columns["first_piece"] = np.cumsum(pieces) - pieces
        n_chunks = np.bincount(self._chunks["row"], minlength=len(self.rows))
        self._columns["n_chunks"], self._columns["first_chunk"] = n_chunks, np.cumsum(n_chunks) - n_chunks
        layers = len(self.rows) if self.spec.is_layerwise else 0
        n_pieces, n_parts = (int(pieces.sum()), self.n_chunks) if layers else (0, 0)
        item_sizes = np.array([dtype.itemsize for dtype in DTYPES])[self._columns["dtype"]]
        longest = (self._chunks["count"] * item_sizes[self._chunks["row"]]).max(initial=1)
        self.n_tiles = 1 if self.spec.is_layerwise else -(-int(longest) // TILE_BYTES)
        kind, decay, start, every = self.average
        ring_buffer, doubles = self.record["ring_buffer"], np.dtype(np.float64)
        rows = self.buffers.upload("rows", self._columns)
        self.gradients = GradientTable(
            self.owner,
            self.rows,
            self._columns,
            self.buffers,
            self._reader.signatures,
            takes_sparse=self.spec.takes_sparse,
        )
        allocate = self.buffers.allocate
        self._step.point_to(
            rows=rows,
            grads=self.gradients.column,
            chunks=self.buffers.upload("chunks", self._chunks),
            scalars=allocate("scalars", STRUCTS["Scalars"], len(self.rows)),
            partials=allocate("partials", STRUCTS["Partial"], self.n_chunks),
            sums=allocate("sums", doubles, n_pieces * self.spec.n_sums),
            projection_coefs=allocate("projection_coefs", doubles, n_pieces),
            chunk_sums=allocate("chunk_sums", doubles, n_parts * (self.spec.n_sums + 1)),
            layer_projections=allocate("layer_projections", STRUCTS["LayerProjection"], layers),
            decision=allocate("decision", STRUCTS["StepDecision"], 1),
            tile_partials=allocate("tile_partials", STRUCTS["Partial"], self.n_chunks * self.n_tiles),
            counters=self.record["counters"],
            pending_scalars=self.record["pending_scalars"],
            telemetry=ring_buffer,
        )
        self._step.set(
            n_rows=len(self.rows),
            n_chunks=self.n_chunks,
            n_tiles=self.n_tiles,
            block_threads=BLOCK_THREADS if self.spec.is_layerwise else threads_for(int(longest)),
            telemetry_capacity=0 if ring_buffer is None else len(ring_buffer),
            average_kind=AVERAGE_KINDS[kind],
            average_decay=decay,
            average_start=start,
            average_every=every,
        )
        chunk_groups = self._columns["group"][self._chunks["row"]]
        rates = self.record["rates"]
        assert rates is not None
        self.groups = GroupTable(self.owner, readings, norms, rates, chunk_groups, self.buffers, self._step)
        self.reduction = self._pack_spreads()

    def _pack_spreads(self) -> Reduction | None:
        """Fill the columns of the rows that are spread over processes, if there are any."""
        n_sums = self.spec.n_sums if self.spec.is_layerwise else 0
        reduction = make_reduction(self.spreads, len(self.groups.hypers), n_sums, self.device)
        if reduction is None:
            return None
        column = np.zeros(len(self.rows), STRUCTS["Spread"])
        for name in ("numel", "channels", "first_channel", "is_cut"):
            column[name] = [getattr(spread, name) for spread in self.spreads]
        column["slot"], column["first_total"] = reduction.slots, reduction.first_totals
        self._step.point_to(totals=reduction.totals, spreads=self.buffers.upload("spreads", column))
        self._step.set(n_slots=reduction.n_slots)
        return reduction

    @property
    def n_chunks(self) -> int:
        """Number of chunks of all tensors."""
        return len(self._chunks)

    @property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """Combinations of dtypes of parameter and gradient, number and dtype of states, and rounding mode."""
        if self._kinds is None:
            found = np.unique(self._columns[["dtype", "grad_dtype", "n_states", "state_dtype", "rounding"]])
            self._kinds = tuple(tuple(map(int, kind)) for kind in found)
        return self._kinds

    def step_column(self) -> Tensor:
        """Return the ``Step`` struct on the device, for kernels that take its address."""
        if self._captured_step is not None:
            return self._captured_step
        if self._step.is_stale:
            self.buffers.upload("step", self._step.array)
            self._step.is_stale = False
        return self.buffers.tensors["step"]

    @contextmanager
    def captured_arguments(self, max_pointers: int) -> Iterator[None]:
        """Give the launches inside a copy of the struct and of the gradient addresses, for a captured graph.

        Each replay writes the copy before it is read, so that graphs and eager steps do not disturb each
        other.

        Args:
            max_pointers: Most gradient addresses that the backend passes in the arguments of a captured
                launch; more are copied from memory of the host.
        """
        assert self._captures is not None
        array, n_rows = self._step.array, len(self.rows)
        grads, is_stale = array["grads"].copy(), self.gradients.is_stale
        # from the memory pool of the graph, which may use it again once the launches have read it
        column = torch.empty(array.nbytes + 8 * n_rows, dtype=torch.uint8, device=self.device)
        array["grads"] = address_of(column) + array.nbytes
        try:
            self.gradients.is_stale = n_rows <= max_pointers
            if not self.gradients.is_stale:
                data = np.concatenate([array.view(np.uint8), self.gradients.addresses.view(np.uint8)])
                column.copy_(self._captures.hold(data), non_blocking=True)
            self._captured_step = column[: array.nbytes]
            yield
        finally:
            array["grads"], self.gradients.is_stale, self._captured_step = grads, is_stale, None

    # when rows get states

    def fill(self, positions: Sequence[int]) -> None:
        """Enter the states of rows that have just got them.

        Args:
            positions: Positions of the rows.
        """
        self._enter(positions)
        self.arrivals = self.arrivals[:0]
        self.buffers.rewrite("rows", positions)

    def _enter(self, positions: Sequence[int]) -> None:
        """Write the states of rows into the columns."""
        rows = [self.rows[i] for i in positions]
        known = len(self.states)
        self.states.add(rows, positions)
        self.states.fill(self._columns, known)
        self._columns["initialized"][positions] = [row.initialized for row in rows]
        self._reserved[positions] = False
        self._has_reserved = bool(self._reserved.any())
        self.numel += int(self._columns["numel"][positions].sum())

    def is_current(
        self, groups: Sequence[Mapping[str, Any]], *, check_states: bool, check_owners: bool
    ) -> bool:
        """Return whether groups and states hold the parameters and tensors of the table.

        Args:
            groups: Parameter groups of the optimizer as they are now.
            check_states: Whether the states may have been replaced.
            check_owners: Whether the dictionaries of states may have been replaced.
        """
        return (
            self._reader.groups_unchanged(groups, self._members)
            and not (check_owners and not self.states.has_owners())
            and not (check_states and not self.states.has_objects())
        )

    def valid_rows(self, state: Mapping[Tensor, Any]) -> dict[int, Row]:
        """Return the rows whose states another table can take over, by the identity of the parameter."""
        if self._has_other_shards() or self._param_cache.find_moved() is None:
            return {}
        return self.states.valid_rows(state)

    def keeps(self, n_states: Sequence[int]) -> bool:
        """Return whether the rows of each group keep, or will keep, so many states, and round as it asks."""
        columns, hypers = self._columns, self.groups.hypers
        seeds = np.array([h.rounding_seed for h in hypers], np.uint64)[columns["group"]]
        return bool(
            (columns["n_states"] == np.array(n_states)[columns["group"]]).all()
            and (columns["rounding"] == self._roundings(hypers)).all()
            and (columns["state_dtype"] == self._state_dtypes(hypers)).all()
            and (seeds == columns["seed"])[self._are_rounded()].all()
        )

    def _roundings(self, hypers: Sequence[Hyper]) -> np.ndarray:
        """Return the rounding mode that each row has by the hyper-parameters of its group, int64."""
        codes = np.array([ROUNDINGS[h.param_rounding] for h in hypers], np.int64)[self._columns["group"]]
        has_16_bits = np.isin(self._columns["dtype"], [DTYPES[dtype] for dtype in SIXTEEN_BITS])
        rounded: np.ndarray = codes * has_16_bits
        return rounded

    def _state_dtypes(self, hypers: Sequence[Hyper]) -> np.ndarray:
        """Return the dtype that the states of each row have by the hyper-parameters of its group, int64."""
        codes = np.array([DTYPES[h.state_dtype] for h in hypers], np.int64)[self._columns["group"]]
        is_float64 = (self._columns["dtype"] == DTYPES[torch.float64]) & (codes == DTYPES[torch.float32])
        dtypes: np.ndarray = np.where(is_float64, DTYPES[torch.float64], codes)
        return dtypes

    def _are_rounded(self) -> np.ndarray:
        """Return which rows are rounded, or have states that are, in another mode than to nearest, bool."""
        columns = self._columns
        rounded: np.ndarray = (columns["rounding"] != 0) | (columns["state_dtype"] == DTYPES[torch.bfloat16])
        return rounded

    def _pack_rounding(self, hypers: Sequence[Hyper]) -> None:
        """Fill the columns that rounding needs, for the rows that are not rounded to nearest."""
        columns = self._columns
        columns["state_dtype"] = self._state_dtypes(hypers)
        if not any(h.rounds for h in hypers):
            return
        columns["rounding"] = self._roundings(hypers)
        columns["seed"] = np.array([h.rounding_seed for h in hypers], np.uint64)[columns["group"]]
        columns["number"] = self.indices
        for i in map(int, np.flatnonzero(self._are_rounded())):
            place = place_of(self.rows[i].param)
            columns[["first_element", "run", "run_stride"]][i] = place

    # once per step

    def refresh(
        self, groups: Sequence[Mapping[str, Any]], *, check_states: bool, check_owners: bool = False
    ) -> bool:
        """Read the addresses of parameters and gradients again.

        Args:
            groups: Parameter groups of the optimizer as they are now.
            check_states: Whether the states may have been replaced or moved, and must be compared too.
            check_owners: Whether the dictionaries of states may have been replaced.

        Returns:
            False if the table no longer describes the parameters and must be built again.

        Raises:
            TypeError: If a gradient has a kind or dtype that no backend takes.
            ValueError: If a gradient does not fit its parameter.
        """
        if check_owners and not self.states.has_owners():
            return False
        if check_states and not self.states.has_objects():
            return False
        if not self._is_valid(groups):
            return False
        self.gradients.read()
        if not self._follow_moves(check_states):
            self.release()
            return False
        recast = self.gradients.adopt()
        if recast:
            self._kinds = None
        if self.buffers.mirrored and not self.gradients.compare(recast):
            self.release()
            return False
        if self._captures is not None and not is_capturing(self.device):
            self._captures.reserve()
        if self._has_reserved:
            self.arrivals = np.flatnonzero(self.gradients.present & self._reserved)
        for row in self._strided:
            row.work.copy_(row.local.detach())
        return True

    def _is_valid(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the table still matches the groups and the set of parameters."""
        return (
            self._reader.groups_unchanged(groups, self._members)
            and not (self.groups.has_spheres and self.groups.norms_moved(groups))
            and not self._has_other_shards()
            and not (self._waiting and self._reader.any_gradient(self._waiting))
        )

    def _has_other_shards(self) -> bool:
        """Return whether a distributed parameter has another local tensor."""
        return any(local_tensor(row.param) is not row.local for row in self._shards)

    def _follow_moves(self, check_states: bool) -> bool:
        """Update the addresses of parameters and states that have moved; return False if one has changed."""
        # an average and a norm on a sphere take all parameters, others are left alone without a gradient
        every = check_states or self.gradients.odd or self.average.kind is not None or self.groups.has_spheres
        moved = self._param_cache.find_moved(0 if every else self.gradients.address)
        states_moved = self.states.find_moved() if check_states else False
        if moved is None or states_moved is None:
            return False
        if not (len(moved) or states_moved):
            return True
        if self.buffers.captured or is_capturing(self.device):
            return False
        if len(moved):
            check_disjoint(self.owner, self.rows, self._param_cache.now, self._reaches)
            self._param_cache.accept()
            self._columns["param"] = _work_addresses(self.rows, self._param_cache.addresses)
        if states_moved:
            self.states.accept_moves(self._columns)
        self.buffers.reupload("rows")
        return True

    def exchanges(self) -> list[tuple[int, dict[str, bool]]]:
        """Return the stages of the next step after which processes add sums up, and which sums."""
        if self.reduction is None:
            return []
        measures, layers, squares = self.settings.measure, self.spec.is_layerwise, self.groups.has_spheres
        # without a measure stage the update sums the norms, for the telemetry alone
        norms = self.record["ring_buffer"] is not None and not measures
        found: list[tuple[int, dict[str, bool]]] = []
        if measures or self.scaling[1] is not None:
            found.append((MEASURE_STAGE, {"norms": True}))
        if layers or norms or squares:
            parts = {"norms": norms, "layers": layers, "squares": squares and not layers}
            found.append((UPDATE_STAGE, parts))
        if layers and squares:
            found.append((LAYER_STAGE, {"squares": True}))
        return found

    def stages(self) -> Iterator[int]:
        """Yield the stages that a backend runs together; sums of all processes are added up between them."""
        if self.reduction is None:
            yield ALL_STAGES
            return
        left = ALL_STAGES & ~MEASURE_STAGE
        for stage, parts in self.exchanges():
            yield stage
            self.reduction.add_up(**parts)
            left &= ~stage
        yield left

    def has_zero_gradients(self) -> bool:
        """Return whether all gradients are zero, in all processes that parameters are spread over."""
        zero = self.gradients.are_zero()
        return zero if self.reduction is None else not self.reduction.any(not zero)

    def scale(self, grad_scale: Tensor | None, found_inf: Tensor | float | None) -> None:
        """Set the tensors of a ``GradScaler``: 0-dim float32 on the device of the parameters.

        Args:
            grad_scale: Factor by which the gradients were multiplied.
            found_inf: Nothing is updated where it is not 0; a plain 0 if there was no gradient to check.

        Raises:
            ValueError: If one has another dtype, another device or more than one element.
        """
        if isinstance(found_inf, (int, float)):
            # other processes may have found some
            some = found_inf or self.reduction is not None
            found_inf = torch.full((), float(found_inf), device=self.device) if some else None
        if grad_scale is self.scaling[0] and found_inf is self.scaling[1]:
            return
        for name, tensor in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if tensor is None:
                continue
            kind = (tensor.numel(), tensor.dtype, tensor.device)
            if kind != (1, torch.float32, self.device):
                condition = f"be one float32 on {self.device}"
                value = f"{kind[0]} of {kind[1]} on {kind[2]}"
                check.fail(self.owner, name, condition, value)
        # held, because the step reads them after the caller may have dropped them
        self.scaling = (grad_scale, found_inf)
        self._step.point_to(grad_scale=grad_scale, found_inf=found_inf)

    def prepare(self, settings: Settings) -> None:
        """Set the per-step settings, which leave the table as it is."""
        if settings == self.settings:
            return
        self.settings = settings
        self._step.set(
            clip=settings.max_grad_norm is not None,
            max_grad_norm=settings.max_grad_norm or 0.0,
            skip_nonfinite=settings.skip_nonfinite,
            measure=settings.measure,
            init_norm_sq=settings.init_norm_sq,
        )

    def release(self) -> None:
        """Let go of the gradients."""
        self.gradients.release()

    def finish(self) -> list[Tensor]:
        """Write dense copies back to strided views and let go of the gradients.

        Returns:
            The parameters that the step may have changed.
        """
        if self._strided:
            with torch.no_grad():
                for row in self._strided:
                    row.local.copy_(row.work)
        self.gradients.release()
        if self.gradients.is_complete:
            return self._params
        changed = self.gradients.present
        if self.groups.has_spheres:
            changed |= np.array([h.sphere for h in self.groups.hypers])[self._columns["group"]]
        return list(compress(self._params, changed))


def _work_addresses(rows: Sequence[Row], addresses: np.ndarray) -> np.ndarray:
    """Return the addresses of the tensors that kernels update, given those of the parameters."""
    copies = [i for i, row in enumerate(rows) if row.work is not row.local]
    found: np.ndarray = addresses.copy()
    found[copies] = addresses_of([rows[i].work for i in copies])
    return found


def _pack_rows(
    rows: Sequence[Row], extents: np.ndarray, addresses: np.ndarray, n_states: Sequence[int]
) -> np.ndarray:
    """Return the column ``Row`` of the table without the states.

    Args:
        rows: The rows.
        extents: Extents of the tensors that kernels update.
        addresses: Addresses of their parameters.
        n_states: Number of states that each group keeps.
    """
    columns = np.zeros(len(rows), STRUCTS["Row"])
    columns["param"] = _work_addresses(rows, addresses)
    columns["group"] = [row.group for row in rows]
    columns["n_states"] = np.array(n_states, np.int32)[columns["group"]]
    columns["numel"], columns["dtype"], columns["projects"] = (
        extents["numel"],
        extents["dtype"],
        extents["ndim"] > 1,
    )
    for i in map(int, np.flatnonzero(extents["dtype"] < 0)):
        work = rows[i].work
        columns[["numel", "dtype", "projects"]][i] = (work.numel(), DTYPES[work.dtype], work.dim() > 1)
    columns["grad_dtype"] = columns["dtype"]
    columns["channel_size"] = columns["numel"] // np.array([row.channels for row in rows], np.int64)
    return columns
