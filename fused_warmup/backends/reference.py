"""The step in plain PyTorch: measure, decide, update; the statements of ``csrc/decide.h``.

It reads its counters on the host, so that on an accelerator it waits for the device: use it for tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distributed.spread import elements_of
from ..plan.structs import COUNT_LIMIT
from ..plan.tensors import compute_dtype
from ..reference.rounding import SIXTEEN_BITS, SPHERE_PASS, STATE_PASSES, UPDATE_PASS, Rounding, store
from ..reference.rules import (
    LAYER_RULES,
    NO_VIEW,
    RULES,
    LayerRule,
    Scalars,
    average_update,
    clip_coefficient,
    coef_in_view,
    common_scalars,
    projection_view,
    rescale,
    sphere_factor,
    sphere_rate,
    start_exp_avg_sq,
)
from ..reference.schedules import average_weight, is_averaged, multiplier


class ReferenceBackend:
    """Runs a plan with the rules of ``reference/rules.py`` on any device."""

    name = "reference"
    max_inline_pointers = 0
    max_captured_pointers = 0

    def prepare(self, plan: Any) -> None:
        """Do nothing: there are no kernels to load."""

    @torch.no_grad()
    def step(self, plan: Any) -> None:
        """Make one step.

        Args:
            plan: A refreshed ``fused_warmup.plan.Plan``.
        """
        rule = RULES.get(plan.rule) or LAYER_RULES[plan.rule]
        counters, settings = plan.record["counters"], plan.settings
        active = [
            (i, row, grad)
            for i, (row, grad) in enumerate(zip(plan.rows, plan.gradients.tensors, strict=True))
            if grad is not None
        ]
        exact_counts = plan.record["row_counters"]
        t = int(counters[0])

        grad_norm_l1, grad_norm, nonfinite, found_inf = _sum_gradients(plan, active)
        grad_scale = None if plan.scaling[0] is None else float(plan.scaling[0])
        unscale = 1.0 if grad_scale is None else 1.0 / grad_scale
        grad_norm, grad_norm_l1 = grad_norm * unscale, grad_norm_l1 * unscale
        skipped = found_inf or (settings.skip_nonfinite and nonfinite > 0)
        if skipped and not settings.measure:
            # the other backends sum the norms in the update, which a skipped step does not run
            grad_norm = grad_norm_l1 = math.nan
        clip_coef = 1.0
        if settings.max_grad_norm is not None:
            clip_coef = clip_coefficient(grad_norm, settings.max_grad_norm)

        for rates, h in zip(plan.groups.rates, plan.groups.hypers, strict=True):
            rates[0] = h.lr * multiplier(h.schedule.segments if h.schedule else (), t)
            decay_segments = h.weight_decay_schedule.segments if h.weight_decay_schedule else ()
            rates[1] = h.weight_decay * multiplier(decay_segments, t)

        rect, proposals = math.nan, []
        for i, row, grad in active if not skipped else ():
            step, h = _count_update(row.step, exact_counts[i]), plan.groups.hypers[row.group]
            effective_lr, weight_decay = plan.groups.rates[row.group].tolist()
            if h.sphere:
                effective_lr = sphere_rate(
                    effective_lr, float(plan.groups.norms[row.group]), rule.lr_norm_power(h, step)
                )
            s = common_scalars(h, effective_lr, weight_decay, clip_coef * unscale)
            rule.scalars(h, effective_lr, step, s)
            if row.work.numel():
                # else the random start may be that of no element, whose norm is 0
                start_exp_avg_sq(h, step, row.initialized, grad_norm * clip_coef, settings.init_norm_sq, s)
            rect = s.rect if math.isnan(rect) else rect
            param = _value_of(row)
            grad = grad.to(param.dtype)
            states = _states_of(row)
            if plan.rule in RULES:
                param, states = RULES[plan.rule].update(param, grad, states, s)
                _store(plan, row, param, UPDATE_PASS)
                _store_states(plan, row, states)
            else:
                layered = LAYER_RULES[plan.rule]
                _store_states(plan, row, layered.update_moments(param, grad, states, s))
                # from the moments as they are stored
                proposal = _propose(layered, param, grad, _states_of(row), s)
                proposals.append((i, row, h, s, proposal))
        if plan.rule in LAYER_RULES and not skipped:
            _apply(plan, LAYER_RULES[plan.rule], proposals)
        for g, h in enumerate(plan.groups.hypers) if not skipped else ():
            norm = plan.groups.norms[g]
            # a table without rows has no norm for a sphere that was asked for later
            if h.sphere and norm is not None:
                _rescale(plan, g, h.radius, norm)
        kind, decay, start, every = plan.average
        averaged = not skipped and is_averaged(kind, start, every, t + 1)
        for row in plan.rows if averaged else ():
            if row.average is not None:
                row.n_averaged += 1
                weight = average_weight(kind, decay, int(row.n_averaged))
                row.average.copy_(average_update(row.average, _value_of(row), weight))

        if not skipped:
            counters[0] = t + 1
        ring_buffer, pending_scalars = plan.record["ring_buffer"], plan.record["pending_scalars"]
        if ring_buffer is not None:
            line = [
                float(counters[0]),
                float(plan.groups.rates[0, 0]) if len(plan.groups.rates) else math.nan,
                grad_norm,
                grad_norm_l1,
                clip_coef,
                rect,
            ]
            line += [float(skipped), *pending_scalars.tolist()]
            ring_buffer[int(counters[1]) % len(ring_buffer)] = torch.tensor(
                line, dtype=torch.float64, device=ring_buffer.device
            )
        pending_scalars.fill_(math.nan)
        counters[1] += 1


def _value_of(row: Any) -> Tensor:
    """Return the value of the parameter of a row in the dtype of the arithmetic."""
    value: Tensor = row.value
    return value.to(compute_dtype(row.work.dtype))


def _states_of(row: Any) -> list[Tensor]:
    """Return the states of a row in the dtype of the arithmetic."""
    return [state.to(compute_dtype(row.work.dtype)) for state in row.states]


def _store_states(plan: Any, row: Any, states: Sequence[Tensor]) -> None:
    """Write the states of a row, rounded stochastically where they have 16 bits."""
    for state, new, stage in zip(row.states, states, STATE_PASSES, strict=False):
        if row.state_dtype is not None:
            new, _ = store(new, row.state_dtype, _rounding(plan, row, "stochastic", stage))
        state.copy_(new)


def _rounding(plan: Any, row: Any, mode: str, stage: int) -> Rounding:
    """Return how a pass of this step rounds a row."""
    seed, t = plan.groups.hypers[row.group].rounding_seed, int(plan.record["counters"][0])
    return Rounding(mode, seed, row.index, t, elements_of(row.param), stage)


def _store(plan: Any, row: Any, value: Tensor, stage: int) -> None:
    """Write the value of the parameter of a row, rounded as its group asks."""
    if row.work.dtype not in SIXTEEN_BITS:
        row.work.copy_(value)
        return
    param, residue = store(value, row.work.dtype, _rounding(plan, row, row.rounding, stage))
    row.work.copy_(param)
    if residue is not None:
        row.residue.copy_(residue)


def _count_update(step: Tensor, counters: Tensor) -> int:
    """Count one more update of a row and return how many there are.

    Args:
        step: The count in the state, 0-dim float32.
        counters: The row of the struct ``RowCounters``, which has the exact count.
    """
    updates, shown = int(counters[0]), float(step)
    # other code may have written the float of the state
    if shown != float(np.float32(updates)) and 0.0 <= shown < COUNT_LIMIT:
        updates = int(shown)
    counters[0] = updates + 1
    step.fill_(updates + 1)
    return updates + 1


def _rescale(plan: Any, group: int, radius: float, norm: Tensor) -> None:
    """Rescale the parameters of a group to their sphere, and store their norm."""
    rows = [(i, row) for i, row in enumerate(plan.rows) if row.group == group]
    squares = [float(_value_of(row).to(torch.float64).square().sum()) for _, row in rows]
    reduction = plan.reduction
    if reduction is not None:
        reduction.squares.zero_()
        for (i, _), square in zip(rows, squares, strict=True):
            reduction.squares[group, reduction.slots[i]] += square
        reduction.add_up(squares=True)
        squares = reduction.squares[group].tolist()
    radius = radius if radius > 0.0 else float(norm)
    factor = sphere_factor(radius, sum(squares, 0.0))
    for _, row in rows:
        _store(plan, row, rescale(_value_of(row), factor), SPHERE_PASS)
    norm.fill_(radius)


class _Proposal(NamedTuple):
    """The update of a layer before it is scaled or projected, and its sums.

    Attributes:
        param: The parameter in the dtype of the arithmetic.
        update: The direction of its update.
        sums: Sums of products, float64 of ``[channels, products]``.
    """

    param: Tensor
    update: Tensor
    sums: Tensor


def _propose(
    rule: type[LayerRule], param: Tensor, grad: Tensor, states: list[Tensor], s: Scalars
) -> _Proposal:
    """Return the update of a rule that needs sums over the layer, from its new states."""
    update = rule.direction(param, grad, states, s)
    products = rule.reductions(param.to(torch.float64), grad.to(torch.float64), update.to(torch.float64), s)
    channels = len(param) if rule.projects and param.dim() > 1 and param.numel() else 1
    sums = torch.stack([x.reshape(channels, -1).sum(1) for x in products], dim=1)
    return _Proposal(param, update, sums)


def _apply(plan: Any, rule: type[LayerRule], proposals: Sequence[tuple[int, Any, Any, Scalars, Any]]) -> None:
    """Scale and project the updates of layers, and make them."""
    reduction = plan.reduction
    if reduction is not None:
        reduction.layers.zero_()
        for i, _, h, _, proposal in proposals:
            _write_sums(rule, reduction, i, plan.spreads[i], h, proposal)
        reduction.add_up(layers=True)
    for i, row, h, s, proposal in proposals:
        param, sums = proposal.param, proposal.sums
        if reduction is None:
            found = sums, sums.sum(0), _count_failed(rule, h, sums, param.numel() // len(sums))
        else:
            found = _read_sums(rule, reduction, i, plan.spreads[i], h, sums)
        size = param.numel() if reduction is None else plan.spreads[i].numel
        projection_coef = _reduce_layer(rule, param, *found, size, h, s).to(param.dtype)
        _store(plan, row, rule.apply(param, proposal.update, projection_coef, s), UPDATE_PASS)


def _read_sums(
    rule: type[LayerRule], reduction: Any, row: int, spread: Any, h: Any, sums: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Return the sums over the channels here and over the layer, and the number of channels that failed.

    Args:
        rule: The rule.
        reduction: The sums of all processes.
        row: Position of the row.
        spread: How it is spread.
        h: Hyper-parameters.
        sums: Sums of this process, float64 of ``[channels, products]``.
    """
    totals = reduction.layers[int(reduction.first_totals[row]) :]
    if not spread.is_cut:
        return sums, totals[: rule.n_sums], int(totals[rule.n_sums])
    whole = totals[: spread.channels * rule.n_sums].view(-1, rule.n_sums)
    failed = _count_failed(rule, h, whole, spread.numel // spread.channels)
    return whole[spread.first_channel :][: len(sums)], whole.sum(0), failed


def _write_sums(
    rule: type[LayerRule], reduction: Any, row: int, spread: Any, h: Any, proposal: _Proposal
) -> None:
    """Write the sums of this process over a layer where the processes add them up."""
    sums, first = proposal.sums, int(reduction.first_totals[row])
    if not proposal.param.numel():
        return
    if spread.is_cut:
        begin = first + spread.first_channel * rule.n_sums
        reduction.layers[begin : begin + sums.numel()] = sums.reshape(-1)
    else:
        reduction.layers[first : first + rule.n_sums] = sums.sum(0)
        failed = _count_failed(rule, h, sums, spread.numel // spread.channels)
        reduction.layers[first + rule.n_sums] = failed


def _count_failed(rule: type[LayerRule], h: Any, channels: Tensor, channel_size: int) -> int:
    """Return the number of channels that are not scale-invariant."""
    return sum(not rule.scale_invariant(h, channel, channel_size) for channel in channels.tolist())


def _reduce_layer(
    rule: type[LayerRule],
    param: Tensor,
    channels: Tensor,
    layer: Tensor,
    failed: int,
    size: int,
    h: Any,
    s: Scalars,
) -> Tensor:
    """Turn the sums of a layer into its scalars and projection coefficients.

    Args:
        rule: The rule.
        param: The parameter.
        channels: Sums over its channels, float64 of shape ``[channels, products]``.
        layer: Sums over the whole layer, float64 of shape ``[products]``.
        failed: Number of channels of the layer that are not scale-invariant.
        size: Number of elements of the layer.
        h: Hyper-parameters.
        s: Scalars to change.

    Returns:
        The coefficient of every channel, float64 in a shape that broadcasts to the parameter.
    """
    totals = layer.tolist()
    view = projection_view(
        rule.projects and param.dim() > 1, failed == 0, rule.scale_invariant(h, totals, size)
    )
    rule.layer_scalars(h, totals, view != NO_VIEW, s)
    coefs = torch.tensor(
        [coef_in_view(rule, view, h, channel, totals) for channel in channels.tolist()],
        dtype=torch.float64,
        device=param.device,
    )
    return coefs.reshape(-1, *[1] * (param.dim() - 1)) if param.dim() > 1 else coefs.sum()


def _sum_gradients(plan: Any, active: Sequence[tuple[int, Any, Tensor]]) -> tuple[float, float, float, bool]:
    """Return L1 and L2 norm of all gradients, the number of their non-finite elements, and ``found_inf``."""
    doubles = [(i, grad.to(torch.float64)) for i, _, grad in active]
    l1 = [float(grad.abs().sum()) for _, grad in doubles]
    l2_sq = [float(grad.square().sum()) for _, grad in doubles]
    nonfinite = float(sum(int((~grad.isfinite()).sum()) for _, grad in doubles))
    found_inf = plan.scaling[1] is not None and float(plan.scaling[1]) != 0.0
    reduction = plan.reduction
    if reduction is not None:
        reduction.norms.zero_()
        for (i, _), *sums in zip(doubles, l1, l2_sq, strict=True):
            reduction.norms[reduction.slots[i]] += reduction.norms.new_tensor(sums)
        reduction.flags[0], reduction.flags[1] = nonfinite, float(found_inf)
        reduction.add_up(norms=True)
        l1, l2_sq = reduction.norms.t().tolist()
        nonfinite, found_inf = reduction.flags[0].item(), bool(reduction.flags[1] != 0.0)
    return sum(l1, 0.0), math.sqrt(sum(l2_sq, 0.0)), nonfinite, found_inf
