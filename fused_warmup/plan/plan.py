"""The tensor table: which memory a step reads and writes. The only file that calls ``data_ptr()``.

Static columns are built once; a step re-reads the addresses of the gradients and compares those of the
parameters, because a training loop may move either.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ..reference.rules import LAYER_RULES
from ..schedules import Schedule
from ..schedules.adaptive import AdaptiveSchedule
from . import tensors
from .address_cache import AddressCache, TensorSignatures, groups_unchanged, states_unchanged
from .chunks import PIECE, chunks
from .device_buffers import DeviceBuffers, is_capturing
from .hyper import AverageSettings, Hyper, Settings, pack_hypers
from .rows import Row
from .structs import AVERAGE_KINDS, DTYPES, RATES, STRUCTS
from .tensors import check_grad, compute_dtype, describe, local_tensor, same_layout


def _is_frozen(value: Any) -> bool:
    """Whether a hyper-parameter can change only by being replaced."""
    if isinstance(value, tuple):
        return all(map(_is_frozen, value))
    # a live schedule says when it has changed
    return value is None or isinstance(value, (bool, int, float, str, Schedule, AdaptiveSchedule))


def address_of(tensor: Tensor | None) -> int:
    """Return where a tensor lies, 0 for None; for tables of tensors that were made for them."""
    return 0 if tensor is None else tensor.data_ptr()


class PythonSignatures:
    """TensorSignatures without the extension, or for a torch without the DLPack exchange API."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = [torch.empty_like(t, device="meta", requires_grad=False) for t in tensors]
        self._kinds = [(t.dtype, t.device, t.layout) for t in tensors]
        self._types = [(Tensor, type(t)) for t in tensors]
        self._kept: list[Tensor] = []

    def read(self, tensors: list[Any], out: int, grads: bool = False) -> list[int]:
        """Write where tensors of these forms lie, see ``TensorSignatures``."""
        addresses = np.ctypeslib.as_array(ctypes.cast(out, ctypes.POINTER(ctypes.c_uint64)), (len(tensors),))
        odd = []
        for i, (t, form) in enumerate(zip(tensors, self._tensors, strict=True)):
            addresses[i] = 0
            t = t.grad if grads else t
            if t is None:
                continue
            known = type(t) in self._types[i] and (t.dtype, t.device, t.layout) == self._kinds[i]
            if known and same_layout(t, form):
                addresses[i] = t.data_ptr() if t.numel() else 1
            if not addresses[i]:
                odd.append(i)
            elif grads:
                self._kept.append(t)
        return odd

    def release(self) -> None:
        """Let go of the gradients."""
        self._kept = []


def select_reader() -> tuple[Callable[..., Any], Callable[..., bool], Callable[..., bool]]:
    """Return ``TensorSignatures``, ``groups_unchanged`` and ``states_unchanged``, compiled where that is possible."""
    try:
        from .. import _cpu
    except ImportError:
        return PythonSignatures, groups_unchanged, states_unchanged
    exchange = hasattr(Tensor, "__dlpack_c_exchange_api__")
    forms = partial(_cpu.TensorSignatures, Tensor) if exchange else PythonSignatures
    return forms, _cpu.groups_unchanged, _cpu.states_unchanged


class Plan:
    """The table of one optimizer: rows, chunks, groups and the settings of a step.

    Backends read either the Python side (``rows``, ``hypers``, ``settings``) or the packed side, whose
    address is ``address``. Where the tensors are on another device, so are the ``columns`` of the packed
    side; a captured graph reads them, so they stay where they are.

    Args:
        owner: Name of the optimizer class, for messages.
        rule: Name of the update rule.
        rows: Parameters that have a state, in the order of the groups.
        groups: Parameter groups of the optimizer.
        state: State of the optimizer by parameter.
        norms: Norm of each group that is kept on a sphere, 0-dim float64 on the device; None for others.
        average: What average the rows keep.
        record: Device tensors ``counters``, ``pending_scalars`` and ``ring_buffer`` (or None).
        device: Where the tensors are.
        takes_sparse: Whether sparse gradients are made dense, or refused.
        is_split: Whether other processes hold other parts of the model, and so of its norms.

    Attributes:
        scaling: ``grad_scale`` and ``found_inf`` of a ``GradScaler``, or None each.
        fresh_grads: Whether addresses of gradients changed since they were last sent to the device.
        random_start: Whether a first update may need the norm of all gradients; the host does not know when.
        has_float64: Whether any parameter is float64.
        has_spheres: Whether any group is kept on a sphere.
    """

    def __init__(
        self,
        owner: str,
        rule: str,
        rows: list[Row],
        groups: list[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        norms: list[Tensor | None],
        average: AverageSettings,
        record: Mapping[str, Tensor | None],
        device: torch.device,
        *,
        takes_sparse: bool = False,
        is_split: bool = False,
    ) -> None:
        self.owner, self.rule, self.rows = owner, rule, rows
        self._takes_sparse, self.is_split = takes_sparse, is_split
        self.device, self.buffers = device, DeviceBuffers(device)
        self.fresh_grads = self.random_start = self.has_spheres = False
        self.settings = Settings()
        self.record, self.norms = record, norms
        self.hypers: list[Hyper] = []
        self.rates = torch.empty(0, device=device)
        self.average = average
        self.numel = sum(row.work.numel() for row in rows)
        self.has_float64 = any(row.work.dtype == torch.float64 for row in rows)
        self._state, self._n_states = state, len(state)
        self._members = [list(group["params"]) for group in groups]
        self._params = [row.param for row in rows]
        known = set(map(id, self._params))
        self._waiting = [p for members in self._members for p in members if id(p) not in known]
        self._shards = [row for row in rows if row.local is not row.param]
        self._dicts = [state[row.param] for row in rows for _ in row.state]
        self._names = [name for row in rows for name in row.state]
        self._objects = [value for row in rows for value in row.state.values()]
        forms, self._same_members, self._same_entries = select_reader()
        self._param_addresses = AddressCache(forms, [row.local for row in rows])
        self._state_addresses = AddressCache(forms, [local_tensor(t) for t in self._objects])
        self._grad_signatures: TensorSignatures = forms([row.work for row in rows])
        self._strided = [row for row in rows if row.work is not row.local]
        self._cast: dict[int, torch.dtype] = {}
        self._adopted: dict[int, Tensor] = {}
        self.scaling: tuple[Tensor | None, Tensor | None] = (None, None)
        self._signatures: list[tuple[Any, ...] | None] = []
        self._pack_rows()

    # the packed side

    def _pack_rows(self) -> None:
        """Fill the columns that change only when the set of tensors does."""
        n = len(self.rows)
        table = np.zeros(n, STRUCTS["Row"])
        for packed, row in zip(table, self.rows, strict=True):
            states = [state.data_ptr() for state in row.states]
            for name, address in zip(("state0", "state1", "state2"), states, strict=False):
                packed[name] = address
            packed["param"] = row.work.data_ptr()
            if row.average is not None:
                # an empty one has no address, but counts its values all the same
                packed["average"] = row.average.data_ptr() if row.average.numel() else 1
            packed["counters"] = row.counters.record.data_ptr()
            packed["step_float"] = row.counters.step_float.data_ptr()
            packed["numel"] = row.work.numel()
            packed["group"] = row.group
            packed["dtype"] = packed["grad_dtype"] = DTYPES[row.work.dtype]
            packed["n_states"] = len(states)
            packed["initialized"] = row.initialized
        sizes = table["numel"]
        table["projects"] = [row.work.dim() > 1 for row in self.rows]
        table["channel_size"] = sizes // [row.channels for row in self.rows] if n else 0
        pieces = sizes // np.maximum(table["channel_size"], 1) * -(-table["channel_size"] // PIECE)
        table["first_piece"] = np.cumsum(pieces) - pieces
        n_sums = LAYER_RULES[self.rule].n_sums if self.rule in LAYER_RULES else 0
        n_pieces = int(pieces.sum()) if n_sums else 0
        self._table = table
        self._kinds: tuple[tuple[int, int, int], ...] | None = None
        self._grads = np.zeros(n, np.uint64)
        self._grads_out = self._grads.ctypes.data
        # what the device has, where that is another copy
        self._sent_grads = self._grads.copy()
        self._chunks = chunks(sizes, table["channel_size"])
        self._step = np.zeros(1, STRUCTS["Step"])
        self._stale_step = True
        kind, decay, start, every = self.average
        ring_buffer = self.record["ring_buffer"]
        self._set(
            rows=self.buffers.upload("rows", self._table),
            grads=self.buffers.upload("grads", self._grads),
            chunks=self.buffers.upload("chunks", self._chunks),
            scalars=self.buffers.allocate("scalars", STRUCTS["Scalars"], n),
            partials=self.buffers.allocate("partials", STRUCTS["Partial"], len(self._chunks)),
            sums=self.buffers.allocate("sums", np.dtype(np.float64), n_pieces * n_sums),
            projection_coefs=self.buffers.allocate("projection_coefs", np.dtype(np.float64), n_pieces),
            decision=self.buffers.allocate("decision", STRUCTS["StepDecision"], 1),
            counters=self.record["counters"],
            pending_scalars=self.record["pending_scalars"],
            telemetry=ring_buffer,
            n_rows=n,
            n_chunks=len(self._chunks),
            telemetry_capacity=0 if ring_buffer is None else len(ring_buffer),
            average_kind=AVERAGE_KINDS[kind],
            average_decay=decay,
            average_start=start,
            average_every=every,
        )
        self.address: int = self._step.ctypes.data

    def _set(self, **fields: Any) -> None:
        """Write fields of the Step struct; tensors by their address."""
        for name, value in fields.items():
            if value is None or isinstance(value, Tensor):
                value = address_of(value)
            self._step[name] = value
        self._stale_step = True

    def _pack_hypers(self) -> None:
        """Fill the columns of the groups and the segments of their schedules."""
        self.random_start = any(h.init == "random" for h in self.hypers)
        self._hypers, segments, values = pack_hypers(self.hypers)
        if len(self.rates) != len(self.hypers):
            self.rates = torch.zeros(len(self.hypers), len(RATES), dtype=torch.float64, device=self.device)
        self._set(
            hypers=self.buffers.upload("hypers", self._hypers),
            segments=self.buffers.upload("segments", segments),
            values=self.buffers.upload("values", values),
            rates=self.rates,
            n_groups=len(self.hypers),
        )
        self._pack_spheres()

    def _pack_spheres(self) -> None:
        """Fill the column of the spheres if there are any; rows, and so their chunks, come group by group."""
        self.has_spheres = any(h.sphere for h in self.hypers)
        if not self.has_spheres:
            self._set(spheres=0, squares=0)
            return
        table = np.zeros(len(self.hypers), STRUCTS["Sphere"])
        table["norm"] = [
            address_of(norm) if h.sphere else 0 for norm, h in zip(self.norms, self.hypers, strict=True)
        ]
        table["radius"] = [h.radius for h in self.hypers]
        of_chunk = self._table["group"][self._chunks["row"]]
        groups = np.arange(len(self.hypers))
        table["first_chunk"] = np.searchsorted(of_chunk, groups)
        table["n_chunks"] = np.searchsorted(of_chunk, groups, "right") - table["first_chunk"]
        self._spheres = table
        if "squares" not in self.buffers.tensors:
            self.buffers.allocate("squares", np.dtype(np.float64), len(self._chunks))
        self._set(spheres=self.buffers.upload("spheres", table), squares=self.buffers.tensors["squares"])

    @property
    def n_chunks(self) -> int:
        """Number of chunks of all tensors."""
        return len(self._chunks)

    @property
    def kinds(self) -> tuple[tuple[int, int, int], ...]:
        """Combinations of dtype, dtype of the gradient and number of states that rows of the table have."""
        if self._kinds is None:
            found = np.unique(self._table[["dtype", "grad_dtype", "n_states"]])
            self._kinds = tuple((int(a), int(b), int(c)) for a, b, c in found)
        return self._kinds

    def step_column(self) -> Tensor:
        """Return the Step struct on the device, for kernels that take its address."""
        if self._stale_step:
            self.buffers.upload("step", self._step)
            self._stale_step = False
        return self.buffers.tensors["step"]

    @property
    def grads_address(self) -> int:
        """Address of the addresses of the gradients on the host, uint64 of ``[rows]``."""
        return self._grads_out

    def upload_grads(self) -> None:
        """Send the addresses of the gradients to the device."""
        self.buffers.reupload("grads")
        self.sent_grads()

    def sent_grads(self) -> None:
        """Note that the device has the addresses of the gradients."""
        if self.fresh_grads:
            self._sent_grads[:] = self._grads
            self.fresh_grads = False

    # once per step

    def refresh(self, groups: Sequence[Mapping[str, Any]], exposed: bool) -> bool:
        """Read the addresses of parameters and gradients again.

        Args:
            groups: Parameter groups of the optimizer as they are now.
            exposed: Whether somebody else may have the states, which must then be looked at too.

        Returns:
            False if the table no longer describes the parameters and must be built again.

        Raises:
            TypeError: If a gradient has a kind or dtype that no backend takes.
            ValueError: If a gradient does not fit its parameter.
        """
        if not self._holds(groups, exposed):
            return False
        odd = self._grad_signatures.read(self._params, self._grads_out, True)
        self._adopted = {i: self._adopt(i, self._params[i].grad) for i in odd}
        for i, grad in self._adopted.items():
            self._grads[i] = grad.data_ptr() if grad.numel() else 1
            if self._grads[i] == 0:
                name = describe(self.rows[i].index, self.rows[i].local)
                check.fail(self.owner, f"the gradient of {name}", "hold data", "a null address")
        kinds = {i: g.dtype for i, g in self._adopted.items() if g.dtype != self.rows[i].work.dtype}
        recast = kinds != self._cast
        if recast:
            self._table["grad_dtype"] = self._table["dtype"]
            for i, dtype in kinds.items():
                self._table["grad_dtype"][i] = DTYPES[dtype]
            self._cast, self._kinds = kinds, None
        if self.buffers.mirrored and not self._place_grads(recast):
            self.release()
            return False
        for row in self._strided:
            row.work.copy_(row.local.detach())
        return True

    def _place_grads(self, recast: bool) -> bool:
        """Find out whether the device has this step's gradients in its table.

        Args:
            recast: Whether a gradient has another dtype than at the step before.

        Returns:
            False if a captured graph reads the table, which must then stay as it is.

        Raises:
            RuntimeError: If the gradients are not those of the step before while a graph is captured.
        """
        changed = np.flatnonzero(self._grads != self._sent_grads)
        self.fresh_grads = bool(len(changed))
        if not len(changed) and not recast:
            return True
        if is_capturing(self.device):
            index = self.rows[int(changed[0])].index if len(changed) else "of another dtype"
            self.release()
            raise RuntimeError(
                f"{self.owner}: gradients must stay where they were at the step before while a graph is "
                f"captured, got another or no gradient for parameter {index}. Make one step before the "
                "capture with the gradients that the graph will write, and keep them: "
                "zero_grad(set_to_none=False)."
            )
        if recast and not self.buffers.captured:
            self.buffers.reupload("rows")
        return not self.buffers.captured

    def _holds(self, groups: Sequence[Mapping[str, Any]], exposed: bool) -> bool:
        """Whether groups, states and addresses are still those that the table was built from."""
        states = not exposed or (
            len(self._state) == self._n_states
            and self._same_entries(self._dicts, self._names, self._objects)
            and self._state_addresses.is_valid()
        )
        return (
            states
            and self._same_members(groups, self._members)
            and not (self.has_spheres and self._norms_moved(groups))
            and all(local_tensor(row.param) is row.local for row in self._shards)
            and self._param_addresses.is_valid()
            and all(param.grad is None for param in self._waiting)
        )

    def _norms_moved(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a group has another norm than the one in the table; a fresh one is not there yet."""
        known = zip(groups, self.norms, strict=True)
        return any(group.get("norm", norm) is not norm for group, norm in known)

    def gradients_are_zero(self) -> bool:
        """Whether there are gradients and all of them are 0; waits for the device."""
        found = [grad for grad in self.grads if grad is not None]
        return bool(found) and not any(bool(local_tensor(grad).any()) for grad in found)

    @torch.no_grad()
    def unscale_grads(self) -> None:
        """Divide ``.grad`` by the scale of a ``GradScaler``, as torch's optimizers leave it."""
        scale = self.scaling[0]
        grads = [local_tensor(p.grad) for p in self._params if p.grad is not None]
        if scale is not None and grads:
            torch._foreach_mul_(grads, scale.double().reciprocal().float().reshape(()))

    @property
    def grads(self) -> list[Tensor | None]:
        """The gradients of this step in the layouts of the rows, or None."""
        grads = [param.grad for param in self._params]
        return [self._adopted.get(i, grad) for i, grad in enumerate(grads)]

    def grad_sizes(self) -> list[int]:
        """Return the bytes of a gradient element, row by row, as the kernels read it."""
        return [self._cast.get(i, row.work.dtype).itemsize for i, row in enumerate(self.rows)]

    def _adopt(self, i: int, grad: Tensor | None) -> Tensor:
        """Return a gradient of an unusual form in the layout of its row, copied where it must be."""
        row = self.rows[i]
        assert grad is not None
        grad = check_grad(self.owner, row.index, row.local, grad, self._takes_sparse).detach()
        dtype = grad.dtype if grad.dtype in (row.work.dtype, torch.float32) else compute_dtype(row.work.dtype)
        if same_layout(grad, row.work) and grad.dtype == dtype:
            return grad
        return torch.empty_like(row.work, dtype=dtype).copy_(grad)

    def refresh_groups(
        self,
        groups: Sequence[Mapping[str, Any]],
        keys: Sequence[str],
        make: Callable[[Mapping[str, Any]], Hyper],
    ) -> bool:
        """Take over hyper-parameters that changed since the last step.

        Args:
            groups: Parameter groups of the optimizer.
            keys: Keys that matter, ``"lr"`` first.
            make: Validates a group; raises for bad values.

        Returns:
            True if anything but learning rates changed.

        Raises:
            RuntimeError: If they changed while a graph is captured.
        """
        read = itemgetter(*keys)
        signatures = [read(group) for group in groups]
        try:
            if signatures == self._signatures:
                return False
            old = self._signatures if len(self._signatures) == len(groups) else [None] * len(groups)
            same = [a == b for a, b in zip(signatures, old, strict=True)]
            only_lr = [b is not None and a[1:] == b[1:] for a, b in zip(signatures, old, strict=True)]
        except (RuntimeError, ValueError):
            # somebody put a tensor or array of many elements there: make() will name it
            same = only_lr = [False] * len(groups)
        if is_capturing(self.device) and self._signatures:
            raise RuntimeError(
                f"{self.owner}: hyper-parameters must stay as they were at the step before while a graph is "
                "captured, got other ones. A schedule moves on the device."
            )
        hypers = list(self.hypers) if len(self.hypers) == len(groups) else [Hyper(0.0)] * len(groups)
        rates = {}
        for i, group in enumerate(groups):
            if only_lr[i] and not same[i]:
                rates[i] = check.number(self.owner, "lr", group["lr"])
            elif not same[i]:
                hypers[i] = make(group)
        # nothing is taken over before all of it is valid
        for i, lr in rates.items():
            hypers[i].lr = lr
        self.hypers = hypers
        # what can be written in place is read again at every step
        self._signatures = [s if all(map(_is_frozen, s)) else None for s in signatures]
        if all(only_lr):
            self._hypers["lr"] = [h.lr for h in hypers]
            self.buffers.reupload("hypers")
        else:
            self._pack_hypers()
        return not all(only_lr)

    def forget_groups(self) -> None:
        """Read all hyper-parameters again at the next step: a schedule has changed by itself."""
        self._signatures = [None] * len(self._signatures)

    def scale(self, grad_scale: Tensor | None, found_inf: Tensor | float | None) -> None:
        """Take over what a ``GradScaler`` leaves: 0-dim float32 tensors on the device of the parameters.

        Args:
            grad_scale: The gradients came multiplied by it.
            found_inf: Nothing is updated where it is not 0; a plain 0 where there was no gradient to look at.

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
        self._set(grad_scale=grad_scale, found_inf=found_inf)

    def prepare(self, settings: Settings) -> None:
        """Take over what may change from step to step without touching the table."""
        if settings == self.settings:
            return
        self.settings = settings
        self._set(
            clip=settings.max_grad_norm is not None,
            max_grad_norm=settings.max_grad_norm or 0.0,
            skip_nonfinite=settings.skip_nonfinite,
            measure=settings.measure,
            init_norm_sq=settings.init_norm_sq,
        )

    def release(self) -> None:
        """Let go of the gradients."""
        self._adopted = {}
        self._grad_signatures.release()

    def finish(self) -> list[Tensor]:
        """Write dense copies back to strided views and let go of the gradients.

        Returns:
            The parameters that the step may have changed.
        """
        if self._strided:
            with torch.no_grad():
                for row in self._strided:
                    row.local.copy_(row.work)
        self.release()
        if self._grads.all():
            return self._params
        moved = [bool(a) or self.hypers[r.group].sphere for a, r in zip(self._grads, self.rows, strict=True)]
        return [param for param, changed in zip(self._params, moved, strict=True) if changed]


def check_disjoint(owner: str, indexed: Sequence[tuple[int, Tensor]]) -> None:
    """Raise ``ValueError`` if two parameters share memory."""
    tensors.check_disjoint(owner, [(index, t, t.data_ptr()) for index, t in indexed])
