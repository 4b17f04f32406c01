"""The step in plain PyTorch: measure, decide, update; the statements of ``csrc/decide.h``.

It reads its counters on the host, so that on an accelerator it waits for the device: use it for tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plan.structs import COUNT_LIMIT
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

        grad_norm_l1, grad_norm = _norms([grad for *_, grad in active])
        grad_scale, found_inf = (None if s is None else float(s) for s in plan.scaling)
        unscale = 1.0 if grad_scale is None else 1.0 / grad_scale
        grad_norm, grad_norm_l1 = grad_norm * unscale, grad_norm_l1 * unscale
        skipped = bool(found_inf) or (
            settings.skip_nonfinite and any(not bool(grad.isfinite().all()) for *_, grad in active)
        )
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

        rect = math.nan
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
            arithmetic = torch.float64 if row.work.dtype == torch.float64 else torch.float32
            param, grad = row.work.to(arithmetic), grad.to(arithmetic)
            if plan.rule in RULES:
                param, states = RULES[plan.rule].update(param, grad, row.states, s)
            else:
                param, states = _update_layer(LAYER_RULES[plan.rule], param, grad, row.states, h, s)
            row.work.copy_(param)
            for state, new in zip(row.states, states, strict=True):
                state.copy_(new)
        for g, h in enumerate(plan.groups.hypers) if not skipped else ():
            norm = plan.groups.norms[g]
            # a table without rows has no norm for a sphere that was asked for later
            if h.sphere and norm is not None:
                _rescale([row for row in plan.rows if row.group == g], h.radius, norm)
        kind, decay, start, every = plan.average
        averaged = not skipped and is_averaged(kind, start, every, t + 1)
        for row in plan.rows if averaged else ():
            if row.average is not None:
                row.n_averaged += 1
                weight = average_weight(kind, decay, int(row.n_averaged))
                row.average.copy_(average_update(row.average, row.work.to(row.average.dtype), weight))

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


def _rescale(rows: Sequence[Any], radius: float, norm: Tensor) -> None:
    """Rescale the parameters of a group to their sphere, and store their norm."""
    sum_sq = sum((float(row.work.to(torch.float64).square().sum()) for row in rows), 0.0)
    radius = radius if radius > 0.0 else float(norm)
    factor = sphere_factor(radius, sum_sq)
    for row in rows:
        arithmetic = torch.float64 if row.work.dtype == torch.float64 else torch.float32
        row.work.copy_(rescale(row.work.to(arithmetic), factor))
    norm.fill_(radius)


def _update_layer(
    rule: type[LayerRule], param: Tensor, grad: Tensor, state: list[Tensor], h: Any, s: Scalars
) -> tuple[Tensor, list[Tensor]]:
    """Return the new parameter and states of a rule that needs sums over the layer."""
    states = rule.update_moments(param, grad, state, s)
    update = rule.direction(param, grad, states, s)
    products = rule.reductions(param.to(torch.float64), grad.to(torch.float64), update.to(torch.float64), s)
    channels = len(param) if rule.projects and param.dim() > 1 and param.numel() else 1
    sums = torch.stack([x.reshape(channels, -1).sum(1) for x in products], dim=1)
    projection_coef = _reduce_layer(rule, param, sums, h, s).to(param.dtype)
    return rule.apply(param, update, projection_coef, s), states


def _reduce_layer(rule: type[LayerRule], param: Tensor, sums: Tensor, h: Any, s: Scalars) -> Tensor:
    """Turn the sums of a layer into its scalars and projection coefficients.

    Args:
        rule: The rule.
        param: The parameter.
        sums: Sums of products, float64 of shape ``[channels, products]``.
        h: Hyper-parameters.
        s: Scalars to change.

    Returns:
        The coefficient of every channel, float64 in a shape that broadcasts to the parameter.
    """
    channels, layer, size = sums.tolist(), sums.sum(0).tolist(), param.numel()
    view = projection_view(
        rule.projects and param.dim() > 1,
        all(rule.scale_invariant(h, channel, size // len(channels)) for channel in channels),
        rule.scale_invariant(h, layer, size),
    )
    rule.layer_scalars(h, layer, view != NO_VIEW, s)
    coefs = torch.tensor(
        [coef_in_view(rule, view, h, channel, layer) for channel in channels],
        dtype=torch.float64,
        device=param.device,
    )
    return coefs.reshape(-1, *[1] * (param.dim() - 1)) if param.dim() > 1 else coefs.sum()


def _norms(grads: list[Tensor]) -> tuple[float, float]:
    """Return the L1 and L2 norm over all gradients, summed in double precision."""
    l1 = sum((float(grad.to(torch.float64).abs().sum()) for grad in grads), 0.0)
    l2_sq = sum((float(grad.to(torch.float64).square().sum()) for grad in grads), 0.0)
    return l1, math.sqrt(l2_sq)
