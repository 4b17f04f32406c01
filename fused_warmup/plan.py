"""The tensor table: which memory a step reads and writes. The only file that calls ``data_ptr()``.

Static columns are built once; a step re-reads the addresses of the gradients and compares those of the
parameters, because a training loop may move either.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import averaging
from .averaging import Average
from .table import DTYPES, MAX_STATES, RATES, STRUCTS, Hyper, chunks, pack_hypers


@dataclass
class Row:
    """One parameter with the tensors that belong to it.

    Attributes:
        param: The parameter as the user gave it.
        states: What the rule keeps, in the order in which it takes them; laid out like the parameter.
        average: Weight average, or None.
        step: 0-dim int64, the number of updates this parameter has had.
        group: Index of its parameter group.
        initialized: Whether the second moment was prepared before the first step.
        index: Position among all parameters, for messages.
        local: The memory of the parameter on this device: the shard of a DTensor, else the parameter.
        work: What a kernel may update: the local tensor if it is dense, else a dense copy of it.
    """

    param: Tensor
    states: list[Tensor]
    average: Tensor | None
    step: Tensor
    group: int
    initialized: bool
    index: int
    local: Tensor
    work: Tensor


@dataclass
class Settings:
    """What is set once for the whole optimizer."""

    max_grad_norm: float | None
    skip_nonfinite: bool
    average: Average | None
    telemetry: bool


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of arithmetic and states beside parameters of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(index: int, tensor: Tensor) -> str:
    """Return how an error names a parameter."""
    return f"parameter {index} (shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device})"


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies in this process: the shard of a DTensor, else the tensor."""
    return getattr(tensor, "_local_tensor", tensor) if type(tensor) is not Tensor else tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((t, n) for t, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory."""
    reach = 1
    for stride, size in sorted((t, n) for t, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride < reach:
            return tensor.numel() > 1
        reach = stride * (size - 1) + reach
    return False


def check_param(owner: str, index: int, param: Tensor, device: torch.device | None) -> Tensor:
    """Return the local memory of a parameter that a backend can update.

    Raises:
        TypeError: If the parameter is fake, sparse, complex, quantised or of an integer dtype.
        ValueError: If it has no memory, overlaps itself or lies on another device than ``device``.
    """
    name = f"{owner}: {describe(index, param)}"
    local = local_tensor(param)
    if _is_fake(local):
        raise TypeError(
            f"{name} must hold data, got a FakeTensor; keep step() out of torch.compile and export."
        )
    if local.layout != torch.strided:
        raise TypeError(
            f"{name} must be dense, got layout {local.layout}; torch.optim.SparseAdam takes sparse ones."
        )
    if local.dtype not in DTYPES:
        hint = "; give torch.view_as_real of it." if local.is_complex() else "."
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {local.dtype}{hint}")
    if local.is_meta:
        raise ValueError(f"{name} must hold data, got a meta tensor; materialise the model first.")
    if device is not None and local.device != device:
        raise ValueError(
            f"{name} must be on one device with the others, got {local.device}, expected {device}."
        )
    if overlaps_itself(local):
        raise ValueError(f"{name} must not overlap itself, got strides {local.stride()}; clone it.")
    if local.numel() and local.data_ptr() == 0:
        raise ValueError(f"{name} must hold data, got a null address.")
    return local


def check_grad(owner: str, index: int, local: Tensor, grad: Tensor) -> Tensor:
    """Return the local memory of a gradient that fits its parameter.

    Raises:
        TypeError: If the gradient is fake, sparse or of an unsupported dtype.
        ValueError: If it has no memory, another shape or another device than its parameter.
    """
    name = f"{owner}: the gradient of {describe(index, local)}"
    grad = local_tensor(grad)
    if _is_fake(grad):
        raise TypeError(
            f"{name} must hold data, got a FakeTensor; keep step() out of torch.compile and export."
        )
    if grad.layout != torch.strided:
        raise TypeError(
            f"{name} must be dense, got layout {grad.layout}; torch.optim.SparseAdam takes sparse ones."
        )
    if grad.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {grad.dtype}.")
    if grad.device != local.device:
        raise ValueError(f"{name} must be on {local.device}, got {grad.device}.")
    if grad.shape != local.shape:
        raise ValueError(f"{name} must have its shape, got {tuple(grad.shape)}.")
    if grad.numel() and grad.data_ptr() == 0:
        raise ValueError(f"{name} must hold data, got a null address.")
    return grad


def check_disjoint(owner: str, indexed: Sequence[tuple[int, Tensor]]) -> None:
    """Raise if two dense parameters share memory.

    Raises:
        ValueError: If they do; both are named.
    """
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), i)
        for i, t in indexed
        if t.numel() and is_dense(t)
    )
    for (_, end, i), (begin, _, j) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(
                f"{owner}: parameters must not share memory, got {min(i, j)} and {max(i, j)} over the "
                "same addresses; give the tensor that both are views of."
            )


def _is_fake(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or isinstance(getattr(tensor, "data", None), FakeTensor)


class Plan:
    """The table of one optimizer: rows, chunks, groups and the settings of a step.

    Backends read either the Python side (``rows``, ``hypers``, ``settings``) or the packed side, whose
    address is ``address``.

    Args:
        owner: Name of the optimizer class, for messages.
        rule: Name of the update rule.
        rows: Parameters that have a state, in the order of the groups.
        waiting: Parameters that have none yet, because no gradient of theirs was seen.
        settings: What is set once for the whole optimizer.
        record: Device tensors ``counters``, ``slots`` and ``page`` (or None).
    """

    def __init__(
        self,
        owner: str,
        rule: str,
        rows: list[Row],
        waiting: list[Tensor],
        settings: Settings,
        record: Mapping[str, Tensor | None],
    ) -> None:
        self.owner, self.rule, self.rows, self.settings = owner, rule, rows, settings
        self.record = record
        self.hypers: list[Hyper] = []
        self.grads: list[Tensor | None] = []
        self.rates = torch.empty(0)
        self.average = averaging.settings(settings.average)
        self.init_norm_sq = 1.0
        self.measure = False
        self.numel = sum(row.work.numel() for row in rows)
        self._waiting = waiting
        self._params = [row.param for row in rows]
        self._locals = [row.local for row in rows]
        self._addresses = [t.data_ptr() for t in self._locals]
        self._forms = [(row.work.stride(), row.work.dtype, row.work.numel()) for row in rows]
        self._strided = [row for row in rows if row.work is not row.local]
        self._special = {i for i, row in enumerate(rows) if row.work is not row.param or not row.work.numel()}
        self._grad_addresses: list[int] = []
        self._cast: list[int] = []
        self._signatures: list[tuple[Any, ...]] = []
        self._pack_rows()

    # the packed side

    def _pack_rows(self) -> None:
        """Fill the columns that change only when the set of tensors does."""
        n = len(self.rows)
        table = np.zeros(n, STRUCTS["Row"])
        for packed, row in zip(table, self.rows, strict=True):
            states = [state.data_ptr() for state in map(local_tensor, row.states)]
            for name, address in zip(("state0", "state1", "state2"), states, strict=False):
                packed[name] = address
            packed["param"] = row.work.data_ptr()
            packed["average"] = 0 if row.average is None else local_tensor(row.average).data_ptr()
            packed["step"] = row.step.data_ptr()
            packed["numel"] = row.work.numel()
            packed["group"] = row.group
            packed["dtype"] = packed["grad_dtype"] = DTYPES[row.work.dtype]
            packed["n_states"] = len(states)
            packed["initialized"] = row.initialized
        self._table = table
        self._grads = np.zeros(n, np.uint64)
        self._chunks = chunks([row.work.numel() for row in self.rows])
        self._scalars = np.zeros(n, STRUCTS["Scalars"])
        self._partials = np.zeros(len(self._chunks), STRUCTS["Partial"])
        self._step = np.zeros(1, STRUCTS["Step"])
        kind, decay, start, every = self.average
        page = self.record["page"]
        self._set(
            rows=self._table,
            grads=self._grads,
            chunks=self._chunks,
            scalars=self._scalars,
            partials=self._partials,
            counters=self.record["counters"],
            slots=self.record["slots"],
            telemetry=page,
            n_rows=n,
            n_chunks=len(self._chunks),
            telemetry_capacity=0 if page is None else len(page),
            average_kind={None: 0, "EMA": 1, "SWA": 2}[kind],
            average_decay=decay,
            average_start=start,
            average_every=every,
            skip_nonfinite=self.settings.skip_nonfinite,
        )
        self.address: int = self._step.ctypes.data

    def _set(self, **fields: Any) -> None:
        """Write fields of the Step struct; arrays and tensors by their address."""
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                value = value.ctypes.data
            elif isinstance(value, Tensor):
                value = value.data_ptr()
            self._step[name] = 0 if value is None else value

    def _pack_hypers(self) -> None:
        """Fill the columns of the groups and the segments of their schedules."""
        self._hypers, self._segments, self._values = pack_hypers(self.hypers)
        self.rates = torch.zeros(len(self.hypers), len(RATES), dtype=torch.float64)
        self._set(
            hypers=self._hypers,
            segments=self._segments,
            values=self._values,
            rates=self.rates,
            n_groups=len(self.hypers),
        )

    # once per step

    def refresh(self) -> bool:
        """Read the addresses of parameters and gradients again.

        Returns:
            False if the table no longer describes the parameters and must be built again.

        Raises:
            TypeError: If a gradient has a kind or dtype that no backend takes.
            ValueError: If a gradient does not fit its parameter.
        """
        if [t.data_ptr() for t in self._locals] != self._addresses:
            return False
        for param in self._waiting:
            if param.grad is not None:
                return False
        grads = [param.grad for param in self._params]
        addresses = []
        odd = list(self._special)
        for i, (grad, form) in enumerate(zip(grads, self._forms, strict=True)):
            if grad is None:
                addresses.append(0)
            elif type(grad) is Tensor and (grad.stride(), grad.dtype, grad.numel()) == form:
                addresses.append(grad.data_ptr())
            else:
                addresses.append(0)
                odd.append(i)
        for i in self._cast:
            self._table["grad_dtype"][i] = self._table["dtype"][i]
        adopted = [(i, self._adopt(i, grad)) for i in odd if (grad := grads[i]) is not None]
        for i, grad in adopted:
            grads[i] = grad
            # an empty tensor has no address, but it has a gradient
            addresses[i] = grad.data_ptr() or 1
            self._table["grad_dtype"][i] = DTYPES[grad.dtype]
        self._cast = [i for i, grad in adopted if grad.dtype != self.rows[i].work.dtype]
        self.grads = grads
        if addresses != self._grad_addresses:
            self._grads[:] = addresses
            self._grad_addresses = addresses
        for row in self._strided:
            row.work.copy_(row.local)
        return True

    def _adopt(self, i: int, grad: Tensor) -> Tensor:
        """Return a gradient of an unusual form in the layout of its row, copied where it must be."""
        row = self.rows[i]
        grad = check_grad(self.owner, row.index, row.local, grad)
        dtype = grad.dtype if grad.dtype in (row.work.dtype, torch.float32) else compute_dtype(row.work.dtype)
        if grad.stride() == row.work.stride() and grad.dtype == dtype:
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
        """
        read = itemgetter(*keys)
        signatures = [read(group) for group in groups]
        if signatures == self._signatures and not any(isinstance(s[0], Tensor) for s in signatures):
            return False
        old = self._signatures
        hypers = [
            self.hypers[i] if i < len(old) and old[i] == s and not isinstance(s[0], Tensor) else make(group)
            for i, (s, group) in enumerate(zip(signatures, groups, strict=True))
        ]
        only_lr = len(old) == len(signatures) and all(
            a[1:] == b[1:] for a, b in zip(old, signatures, strict=True)
        )
        self.hypers, self._signatures = hypers, signatures
        if only_lr:
            self._hypers["lr"] = [h.lr for h in hypers]
        else:
            self._pack_hypers()
        return not only_lr

    def prepare(self, max_grad_norm: float | None, measure: bool, init_norm_sq: float) -> None:
        """Set what may change from step to step without touching the table."""
        self.settings.max_grad_norm, self.measure, self.init_norm_sq = max_grad_norm, measure, init_norm_sq
        now = (max_grad_norm, measure, init_norm_sq)
        if now != getattr(self, "_prepared", None):
            self._prepared = now
            self._set(
                clip=max_grad_norm is not None,
                max_grad_norm=max_grad_norm or 0.0,
                measure=measure,
                init_norm_sq=init_norm_sq,
            )

    def finish(self) -> None:
        """Write dense copies back to strided views and let go of the gradients."""
        with torch.no_grad():
            for row in self._strided:
                row.local.copy_(row.work)
        self.grads = []


def make_row(
    param: Tensor,
    local: Tensor,
    states: Sequence[Tensor],
    average: Tensor | None,
    step: Tensor,
    *,
    group: int,
    initialized: bool,
    index: int,
) -> Row:
    """Return the row of a parameter, with a dense copy to work on where the parameter is a strided view."""
    assert len(states) <= MAX_STATES
    work = local if is_dense(local) else torch.empty_like(local).copy_(local)
    return Row(param, list(states), average, step, group, initialized, index, local, work)


def state_like(param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros in the layout that the row of ``param`` has and in the dtype of its arithmetic."""
    return torch.zeros_like(
        param, dtype=dtype or compute_dtype(param.dtype), memory_format=torch.preserve_format
    )
