"""Build the rows of a plan: checks of all tensors, and allocation of the states that are missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ..distributed.groups import is_distributed, is_flattened, is_partial, placed, world_size
from ..distributed.spread import Spread, has_strided_rows, spread_of
from ..reference.rounding import MODE_OF_RESIDUE, RESIDUES, Rounding, mode_for, store
from . import tensors
from .address_cache import TensorReader, address_of
from .hyper import AverageSettings, Hyper
from .overlaps import check_disjoint, reach_of
from .residues import residue_of, value_of
from .rows import Row, channels_of, make_row
from .spec import RuleSpec
from .state_checks import checked_state, whole_count
from .tracked_states import peek

_UNKNOWN = "A process sees its part of the sums only; give process_group=, that of the wrapper."


def check_known(owner: str, max_grad_norm: float | None, nonfinite: str) -> None:
    """Raise ``ValueError`` for settings that need the norm of gradients that unknown processes have."""
    if max_grad_norm is not None or nonfinite == "skip":
        condition = "be (None, 'propagate') beside parameters that other processes have parts of"
        check.fail(owner, "(max_grad_norm, nonfinite)", condition, (max_grad_norm, nonfinite), _UNKNOWN)


def check_spreads(
    owner: str,
    spec: RuleSpec,
    members: Iterable[tuple[int, Tensor, Hyper]],
    max_grad_norm: float | None,
    nonfinite: str,
    process_group: Any,
    *,
    is_zero: bool,
) -> list[Spread]:
    """Return how parameters are spread over processes.

    Args:
        owner: Name of the optimizer class.
        spec: The update rule.
        members: Position, parameter and hyper-parameters of each.
        max_grad_norm: Norm to clip to, or None.
        nonfinite: Policy for gradients that are not finite.
        process_group: Processes that plain parameters are spread over, or None.
        is_zero: Whether those are whole tensors, as under ZeRO, or parts of tensors.

    Returns:
        One for each; nothing if there are no other processes.

    Raises:
        ValueError: If a sum is needed over parts that other processes hold and that it cannot have.
    """
    spreads: list[Spread] = []
    processes = world_size() > 1
    if not (processes or spec.is_layerwise):
        return spreads
    for index, param, hyper in members:
        name = f"parameter {index}"
        if spec.is_layerwise and is_flattened(param):
            hint = "This rule needs sums over each layer; give use_orig_params=True."
            check.fail(owner, name, "be one layer", f"several in one of shape {tuple(param.shape)}", hint)
        if not processes:
            continue
        if is_partial(param):
            check.fail(owner, name, "be placed by Shard or Replicate", str(getattr(param, "placements", ())))
        spread = spread_of(param, spec.by_channel, process_group, is_zero=is_zero)
        spreads.append(spread)
        if not spread.is_known:
            check_known(owner, max_grad_norm, nonfinite)
            if hyper.sphere:
                condition = "be None beside parameters that other processes have parts of"
                check.fail(owner, "projection", condition, "sphere", _UNKNOWN)
            if hyper.init == "random":
                condition = "be 'zeros' or 'grad' beside parameters that other processes have parts of"
                check.fail(owner, "exp_avg_sq_init", condition, "random", _UNKNOWN)
            if spec.is_layerwise and not is_zero:
                check.fail(owner, name, "have its process group", tuple(param.shape), _UNKNOWN)
        if spec.by_channel and spread.layer_groups and not is_distributed(param):
            hint = "This rule needs sums over each channel; fully_shard of FSDP2 keeps them apart."
            check.fail(owner, name, "have its channels", f"a part of shape {tuple(param.shape)}", hint)
        if spread.is_cut and has_strided_rows(param):
            hint = "This rule needs sums over each channel."
            placements = str(getattr(param, "placements", ()))
            check.fail(owner, name, "have channels that are cut or strided, not both", placements, hint)
    return spreads


class Found(NamedTuple):
    """Parameters of an optimizer, sorted by what the table does with them.

    Attributes:
        rows: Parameters that have or may get a state, in the order of the groups.
        reaches: Bytes from the first element of each row to the end of its last, int64 of ``[rows]``.
        active: Positions among the rows of those that have or get a state now.
        waiting: Parameters without a row: frozen ones, and ones that no backend takes. The table is built
            again when one of them gets a gradient.
    """

    rows: list[Row]
    reaches: np.ndarray
    active: list[int]
    waiting: list[Tensor]


def find_rows(
    owner: str,
    spec: RuleSpec,
    groups: Sequence[Mapping[str, Any]],
    hypers: Sequence[Hyper],
    names: Sequence[Sequence[str]],
    state: Mapping[Tensor, Mapping[str, Any]],
    known: Mapping[int, Row],
    reader: TensorReader,
    *,
    every: bool,
) -> Found:
    """Return the rows of the table after checking every parameter and gradient; new rows are without states.

    Args:
        owner: Name of the optimizer class.
        spec: The update rule.
        groups: Parameter groups.
        hypers: Hyper-parameters of each group.
        names: Names of the states that each group keeps.
        state: States by parameter; not changed.
        known: Rows with states that are still valid, by the identity of the parameter; they are taken over.
        reader: Reads many tensors at once.
        every: Give all parameters that require a gradient a state, also those without one.

    Raises:
        TypeError: If a parameter or gradient is of a kind that no backend takes.
        ValueError: If one does not fit, or two parameters share memory.
    """
    params = [param for group in groups for param in group["params"]]
    places = [g for g, group in enumerate(groups) for _ in group["params"]]
    extents = reader.extents(params)
    due = _find_due(params, places, hypers, state, known, every)
    first = due.index(True) if True in due else 0
    is_usual = _like(extents, first)
    usual = is_usual.tolist()
    by_channel = spec.by_channel
    device = tensors.check_param(owner, first, params[first], None).device if True in due else None
    rows: list[Row] = []
    active: list[int] = []
    waiting: list[Tensor] = []
    for index, param in enumerate(params):
        if not (due[index] or param.requires_grad):
            waiting.append(param)
            continue
        taken, hyper = known.get(id(param)), hypers[places[index]]
        rounding, state_dtype = hyper.param_rounding, None
        if hyper.rounds:
            check_rounding(owner, index, param, hyper)
            rounding, state_dtype = mode_for(rounding, param.dtype), hyper.rounded_state_dtype
        if (
            taken is not None
            and taken.rounding == rounding
            and taken.state_dtype == state_dtype
            and len(taken.states) == len(names[places[index]])
        ):
            row = taken
            row.group, row.index = places[index], index
        elif usual[index]:
            row = Row(param, places[index], index, param, param)
            if by_channel:
                row.channels = channels_of(param, True)
        else:
            try:
                local = tensors.check_param(owner, index, param, device)
            except (TypeError, ValueError):
                if due[index]:
                    raise
                waiting.append(param)
                continue
            device = local.device if device is None else device
            row = make_row(param, places[index], index, local, by_channel)
        row.rounding, row.state_dtype = rounding, state_dtype
        if due[index]:
            active.append(len(rows))
        rows.append(row)
    _check_grads(owner, spec, rows, reader)
    return Found(rows, _check_memory(owner, rows, extents, is_usual), active, waiting)


def _find_due(
    params: Sequence[Tensor],
    places: Sequence[int],
    hypers: Sequence[Hyper],
    state: Mapping[Tensor, Mapping[str, Any]],
    known: Mapping[int, Row],
    every: bool,
) -> list[bool]:
    """Return which parameters have a state or must get one now."""
    due = [param.grad is not None for param in params]
    # parameters without a gradient still count towards the norm of a sphere
    wanted = [every or hyper.sphere for hyper in hypers]
    if any(wanted):
        due = [d or (wanted[g] and p.requires_grad) for d, g, p in zip(due, places, params, strict=True)]
    if state and not all(due):
        due = [
            d or id(p) in known or "step" in (peek(state, p) or ()) for d, p in zip(due, params, strict=True)
        ]
    return due


def _like(extents: np.ndarray, first: int) -> np.ndarray:
    """Return which tensors are plain ones on the device of one of them, bool of ``[tensors]``."""
    if not len(extents):
        return np.zeros(0, bool)
    there: np.ndarray = extents["dtype"] >= 0
    for name in ("device_type", "device_id"):
        there &= extents[name] == extents[first][name]
    return there


def _check_grads(owner: str, spec: RuleSpec, rows: Sequence[Row], reader: TensorReader) -> None:
    """Raise for a gradient that does not fit its parameter."""
    params = [row.param for row in rows]
    signatures, out = reader.signatures([row.local for row in rows]), np.zeros(len(rows), np.uint64)
    odd = signatures.read(params, out.ctypes.data, True)
    signatures.release()
    for row in (rows[i] for i in odd):
        assert row.param.grad is not None
        tensors.check_grad(owner, row.index, row.param, row.local, row.param.grad, spec.takes_sparse)


def _check_memory(owner: str, rows: Sequence[Row], extents: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Return the reaches of all rows; raise if two parameters share memory."""
    if len(rows) < len(extents):
        indices = [row.index for row in rows]
        extents, usual = extents[indices], usual[indices]
    addresses: np.ndarray = extents["address"].copy()
    reaches: np.ndarray = extents["reach"].copy()
    for k in () if usual.all() else np.flatnonzero(~usual).tolist():
        addresses[k], reaches[k] = address_of(rows[k].local), reach_of(rows[k].local)
    check_disjoint(owner, rows, addresses, reaches)
    return reaches


def check_states(owner: str, row: Row, own: dict[str, Any], names: Sequence[str]) -> None:
    """Raise for a state of a parameter that cannot be copied into the form that kernels read."""
    for key in (*names, *MODE_OF_RESIDUE, "average"):
        state = dict.get(own, key)
        if state is not None:
            checked_state(owner, row.index, key, state, row.param)


def checked_counts(
    owner: str,
    spec: RuleSpec,
    row: Row,
    own: dict[str, Any],
    step: Tensor | None,
    n_averaged: Tensor | None,
    average: AverageSettings,
    calls: int,
) -> tuple[int, int] | None:
    """Return the counts of a parameter that came from elsewhere, None if those of the kernels are in place.

    Args:
        owner: Name of the optimizer class.
        spec: The update rule.
        row: The parameter.
        own: Its entry in ``optimizer.state``.
        step: Number of updates that the kernels write, or None.
        n_averaged: Number of averaged values that the kernels write, or None.
        average: Average that is kept.
        calls: Updates that the optimizer has made.

    Returns:
        Updates made and values in the average.

    Raises:
        TypeError: If a count is no real number.
        ValueError: If one is negative or not whole.
    """
    found, averaged = dict.get(own, "step"), dict.get(own, "n_averaged")
    if found is None:
        # torch's SGD keeps no count; with a buffer the first step is over
        return int(spec.has_first_gradient(own)), 0
    if found is step and step.device == row.local.device and (averaged is None or averaged is n_averaged):
        return None
    made = whole_count(owner, f"state['step'] of parameter {row.index}", found)
    if averaged is not None:
        return made, whole_count(owner, f"state['n_averaged'] of parameter {row.index}", averaged)
    if dict.get(own, "average") is None:
        return made, 0
    # an average without a count was there from the first step on
    return made, average.due_count(max(made, calls))


def allocate_state(
    spec: RuleSpec, row: Row, names: Sequence[str], own: dict[str, Any], zero: Tensor, *, averaged: bool
) -> dict[str, Any]:
    """Allocate the missing states of a row, convert those that came from elsewhere, and enter all of them.

    Args:
        spec: The update rule.
        row: The row, whose states are set; its counts are kept if it has them.
        names: Names of the states that its group keeps.
        own: Its entry in ``optimizer.state``; not changed.
        zero: 0-dim float32 on the device.
        averaged: Whether an average is kept.

    Returns:
        The states by name, as they belong into ``optimizer.state``.
    """
    param = row.param
    if row.step is None:
        row.step = torch.zeros_like(zero)
    elif spec.first_gradient in names and not spec.has_first_gradient(own):
        # torch starts a buffer that comes late with the gradient itself, as at a first step
        row.step.zero_()
    # the usual case at a usual cost
    plain = row.work is param and param.dtype is torch.float32 and row.state_dtype is None
    if plain and not own and not averaged:
        row.states = [torch.zeros_like(param) for _ in names]
        entries: dict[str, Any] = dict(zip(names, row.states, strict=True))
        entries["step"] = row.step
        return entries
    entries = {name: _state(spec, row, dict.get(own, name), row.state_dtype) for name in names}
    row.states = tensors.local_tensors(list(entries.values()))
    row.initialized = bool(dict.get(own, "initialized", False))
    if row.rounding in RESIDUES:
        name, _ = RESIDUES[row.rounding]
        entries[name] = _residue(spec, row, own)
        row.residue = tensors.local_tensor(entries[name])
    entries["step"] = row.step
    if averaged:
        average = dict.get(own, "average")
        entries["average"] = _state(spec, row, average)
        if row.n_averaged is None:
            row.n_averaged = torch.zeros_like(zero, dtype=torch.int64)
        if average is None:
            entries["average"].copy_(param)
            row.n_averaged.zero_()
        row.average, entries["n_averaged"] = tensors.local_tensor(entries["average"]), row.n_averaged
    return entries


def _state(spec: RuleSpec, row: Row, state: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Return a state in the form that kernels read: as it is, converted, or zeros for None.

    Its dtype is by default that of the arithmetic.
    """
    if state is None:
        return tensors.state_like(row.param, spec.by_channel, dtype)
    if tensors.fits(state, row.local, spec.by_channel, dtype):
        return state
    # the parameter or the states got another dtype or layout since, or the state came from elsewhere
    return tensors.state_like(row.param, spec.by_channel, dtype).copy_(state)


def _residue(spec: RuleSpec, row: Row, own: dict[str, Any]) -> Tensor:
    """Return the residue that the rounding mode of a row keeps.

    One of another mode is converted: the parameter keeps its value as exactly as the new mode can hold it.
    """
    name, dtype = RESIDUES[row.rounding]
    held: Tensor | None = dict.get(own, name)
    if held is not None and tensors.fits(held, row.local, spec.by_channel, dtype):
        return held
    found = residue_of(own, row.rounding, row.local)
    value = value_of(row.local.detach(), found).to(torch.float32)
    param, lacking = store(value, row.local.dtype, Rounding(row.rounding))
    row.local.copy_(param)
    assert lacking is not None
    residue = tensors.state_like(row.param, spec.by_channel, dtype)
    tensors.local_tensor(residue).copy_(lacking)
    return residue


def check_rounding(owner: str, index: int, param: Tensor, hyper: Hyper) -> None:
    """Raise ``ValueError`` if a parameter of this dtype, or its states, cannot be rounded as a group asks."""
    if hyper.param_rounding == "split" and param.dtype == torch.float16:
        hint = "float16 and 16 more bits are no float32; use 'kahan' or 'master'."
        name = f"param_rounding of parameter {index} (torch.float16)"
        check.fail(owner, name, "be another mode than that of bfloat16", hyper.param_rounding, hint)
    if hyper.rounded_state_dtype is not None and param.dtype == torch.float64:
        name = f"state_dtype of parameter {index} (torch.float64)"
        check.fail(owner, name, "be torch.float32", hyper.state_dtype, "Its states are float64 then.")


def draw_second_moment(second_moment: Tensor, seed: int) -> float:
    """Fill a second moment with squares of normal numbers and return their sum over all processes.

    The numbers are drawn on the host, so that their norm is known without waiting for the device, and for the
    whole of a distributed tensor, so that they are the same in any number of processes.

    Args:
        second_moment: The state.
        seed: Seed of its numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(second_moment.shape, dtype=torch.float64, generator=generator).square()
    total = float(noise.sum())
    pinned = second_moment.is_cuda and type(second_moment) is Tensor
    second_moment.copy_(noise.pin_memory() if pinned else placed(noise, second_moment), non_blocking=pinned)
    return total
