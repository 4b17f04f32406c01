"""Packed table of one optimizer: the memory that a step reads and writes.

Static columns are built once. A step reads the addresses of the gradients again and compares those of the
parameters, because a training loop may move either.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from .address_cache import AddressCache, addresses_of, select_reader
from .chunks import PIECE, chunks
from .device_buffers import DeviceBuffers
from .gradients import GradientTable
from .groups import GroupTable
from .hyper import AverageSettings, Settings
from .rows import Row
from .spec import RuleSpec
from .step_struct import StepStruct
from .structs import AVERAGE_KINDS, DTYPES, STRUCTS
from .tensors import local_tensor, local_tensors
from .tracked_states import TrackedState


class Plan:
    """Packed table of one optimizer: rows, chunks, groups and the settings of a step.

    Backends read either the Python side (``rows``, ``groups``, ``settings``) or the packed side, whose
    address is ``address``. Where the tensors are on another device, so are the ``buffers`` of the packed
    side; a captured graph reads them, so they stay where they are.

    Args:
        owner: Name of the optimizer class, for messages.
        spec: The update rule.
        rows: Parameters that have a state, in the order of the groups.
        members: Parameters of each group.
        state: State of the optimizer by parameter.
        norms: Norm of each group that is kept on a sphere, 0-dim float64 on the device; None for others.
        average: Average that the rows keep.
        record: Device tensors ``counters``, ``pending_scalars`` and ``ring_buffer`` (or None).
        device: Where the tensors are.
        is_split: Whether other processes hold other parts of the model, and so of its norms.

    Attributes:
        groups: Hyper-parameters of the groups.
        gradients: Gradients of the step.
        scaling: ``grad_scale`` and ``found_inf`` of a ``GradScaler``, or None each.
        has_float64: Whether any parameter is float64.
        is_tracked: Whether the dictionaries of all states note accesses.
        numel: Number of elements of all rows.
        address: Address of the ``Step`` struct on the host.
    """

    def __init__(
        self,
        owner: str,
        spec: RuleSpec,
        rows: list[Row],
        members: list[list[Tensor]],
        state: Mapping[Tensor, dict[str, Any]],
        norms: list[Tensor | None],
        average: AverageSettings,
        record: Mapping[str, Tensor | None],
        device: torch.device,
        *,
        is_split: bool = False,
    ) -> None:
        self.owner, self.spec, self.rule, self.rows = owner, spec, spec.name, rows
        self.is_split, self.device, self.record = is_split, device, record
        self.buffers = DeviceBuffers(device)
        self.settings, self.average = Settings(), average
        self.scaling: tuple[Tensor | None, Tensor | None] = (None, None)
        self.numel = sum(row.work.numel() for row in rows)
        self.has_float64 = any(row.work.dtype == torch.float64 for row in rows)
        self._watch(members, state)
        self._pack(norms)

    def _watch(self, members: list[list[Tensor]], state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Record the groups, states and addresses of the table, to compare them later."""
        make_signatures, self._groups_unchanged, self._states_unchanged = select_reader()
        self._make_signatures = make_signatures
        self._members, self._params = members, [row.param for row in self.rows]
        known = set(map(id, self._params))
        self._waiting = [p for group in members for p in group if id(p) not in known]
        self._shards = [row for row in self.rows if row.local is not row.param]
        self._strided = [row for row in self.rows if row.work is not row.local]
        self._state, self._n_states = state, len(state)
        self._own = [state[row.param] for row in self.rows]
        self._dicts = [own for own, row in zip(self._own, self.rows, strict=True) for _ in row.state]
        # a dictionary of the user notes no access
        self.is_tracked = all(isinstance(own, TrackedState) for own in self._own)
        self._names = [name for row in self.rows for name in row.state]
        self._objects = [value for row in self.rows for value in row.state.values()]
        local = local_tensors(self._objects)
        self._param_addresses = AddressCache(make_signatures, [row.local for row in self.rows])
        self._state_addresses = AddressCache(make_signatures, local)
        # references to each state: one in the optimizer's dictionary, the others in this package
        self._holders = Counter(map(id, [*self._objects, *self._objects, *local, *_held(self.rows)]))

    def _pack(self, norms: list[Tensor | None]) -> None:
        """Fill the columns that change only when the set of tensors does."""
        self._columns = _pack_rows(self.rows)
        self._kinds: tuple[tuple[int, int, int], ...] | None = None
        self._chunks = chunks(self._columns["numel"], self._columns["channel_size"])
        self._step = StepStruct()
        self.address = self._step.address
        channels = self._columns["numel"] // np.maximum(self._columns["channel_size"], 1)
        pieces = channels * -(-self._columns["channel_size"] // PIECE)
        self._columns["first_piece"] = np.cumsum(pieces) - pieces
        n_pieces = int(pieces.sum()) if self.spec.is_layerwise else 0
        kind, decay, start, every = self.average
        ring_buffer, doubles = self.record["ring_buffer"], np.dtype(np.float64)
        rows = self.buffers.upload("rows", self._columns)
        self.gradients = GradientTable(
            self.owner,
            self.rows,
            self._columns,
            self.buffers,
            self._make_signatures,
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
            decision=allocate("decision", STRUCTS["StepDecision"], 1),
            counters=self.record["counters"],
            pending_scalars=self.record["pending_scalars"],
            telemetry=ring_buffer,
        )
        self._step.set(
            n_rows=len(self.rows),
            n_chunks=self.n_chunks,
            telemetry_capacity=0 if ring_buffer is None else len(ring_buffer),
            average_kind=AVERAGE_KINDS[kind],
            average_decay=decay,
            average_start=start,
            average_every=every,
        )
        chunk_groups = self._columns["group"][self._chunks["row"]]
        self.groups = GroupTable(self.owner, norms, chunk_groups, self.buffers, self._step)

    @property
    def n_chunks(self) -> int:
        """Number of chunks of all tensors."""
        return len(self._chunks)

    @property
    def kinds(self) -> tuple[tuple[int, int, int], ...]:
        """Combinations of dtype, dtype of the gradient and number of states that rows of the table have."""
        if self._kinds is None:
            found = np.unique(self._columns[["dtype", "grad_dtype", "n_states"]])
            self._kinds = tuple((int(a), int(b), int(c)) for a, b, c in found)
        return self._kinds

    def step_column(self) -> Tensor:
        """Return the ``Step`` struct on the device, for kernels that take its address."""
        if self._step.is_stale:
            self.buffers.upload("step", self._step.array)
            self._step.is_stale = False
        return self.buffers.tensors["step"]

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
        if check_owners and not self._has_owners():
            return False
        if not self._is_valid(groups, check_states):
            return False
        recast = self.gradients.refresh()
        if recast:
            self._kinds = None
        if self.buffers.mirrored and not self.gradients.compare(recast):
            self.release()
            return False
        for row in self._strided:
            row.work.copy_(row.local.detach())
        return True

    def _has_owners(self) -> bool:
        """Return whether ``optimizer.state`` still has the same dictionary for each parameter."""
        return self._states_unchanged([self._state] * len(self._own), self._params, self._own)

    def _is_valid(self, groups: Sequence[Mapping[str, Any]], check_states: bool) -> bool:
        """Return whether the table still matches the groups, states and addresses."""
        states = not check_states or (
            len(self._state) == self._n_states
            and self._states_unchanged(self._dicts, self._names, self._objects)
            and self._state_addresses.is_valid()
        )
        return (
            states
            and self._groups_unchanged(groups, self._members)
            and not (self.groups.has_spheres and self.groups.norms_moved(groups))
            and not (self._shards and any(local_tensor(row.param) is not row.local for row in self._shards))
            and self._param_addresses.is_valid()
            and not (self._waiting and any(param.grad is not None for param in self._waiting))
        )

    def has_shared_states(self) -> bool:
        """Return whether code outside of the package holds a state, and so may move it at any time."""
        # an object that only a list holds shows how many references the call itself adds
        (own,) = [sys.getrefcount(value) - 1 for value in [object()]]
        for value in self._objects:  # noqa: SIM110
            if sys.getrefcount(value) - own > self._holders[id(value)]:
                return True
        return False

    def scale(self, grad_scale: Tensor | None, found_inf: Tensor | float | None) -> None:
        """Set the tensors of a ``GradScaler``: 0-dim float32 on the device of the parameters.

        Args:
            grad_scale: Factor by which the gradients were multiplied.
            found_inf: Nothing is updated where it is not 0; a plain 0 if there was no gradient to check.

        Raises:
            ValueError: If one has another dtype, another device or more than one element.
        """
        if isinstance(found_inf, (int, float)):
            found_inf = torch.full((), found_inf, device=self.device) if found_inf else None
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
        present = self.gradients.present
        hypers = self.groups.hypers
        return [
            row.param
            for row, has_grad in zip(self.rows, present, strict=True)
            if has_grad or hypers[row.group].sphere
        ]


def _pack_rows(rows: Sequence[Row]) -> np.ndarray:
    """Return the column ``Row`` of the table."""
    columns = np.zeros(len(rows), STRUCTS["Row"])
    if not rows:
        return columns
    columns["param"] = addresses_of([row.work for row in rows])
    for k, name in enumerate(("state0", "state1", "state2")):
        columns[name] = addresses_of([row.states[k] if k < len(row.states) else None for row in rows])
    columns["average"] = addresses_of([row.average for row in rows])
    columns["counters"] = addresses_of([row.counters.record for row in rows])
    columns["step_float"] = addresses_of([row.counters.step_float for row in rows])
    columns["numel"] = [row.work.numel() for row in rows]
    columns["group"] = [row.group for row in rows]
    columns["dtype"] = columns["grad_dtype"] = [DTYPES[row.work.dtype] for row in rows]
    columns["n_states"] = [len(row.states) for row in rows]
    columns["initialized"] = [row.initialized for row in rows]
    columns["projects"] = [row.work.dim() > 1 for row in rows]
    columns["channel_size"] = columns["numel"] // [row.channels for row in rows]
    # an average of an empty tensor has no address, but counts its values all the same
    empty = [row.average is not None and not row.average.numel() for row in rows]
    columns["average"][empty] = 1
    return columns


def _held(rows: Iterable[Row]) -> list[Tensor | None]:
    """Return the tensors of states that rows hold, one entry per reference."""
    held: list[Tensor | None] = []
    for row in rows:
        held += [*row.state.values(), *row.states, row.average, row.counters.step, row.counters.n_averaged]
    return held
