"""The decide stage: clipping, counters, learning rates, scalars and telemetry.

The statements of ``csrc/decide.h``. No mathematics here: the rules and schedules have it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...plan.structs import COUNT_LIMIT
from .memory import (
    Counters,
    PendingScalars,
    Rates,
    StepDecision,
    Telemetry,
    arrives_last,
    field,
    grad_of,
    load_struct,
    store_struct,
)
from .reduce import combine_all
from .rules import clip_coefficient, common_scalars, sphere_rate, start_exp_avg_sq
from .schedules import average_weight, is_averaged, multiplier
from .totals import combine_slots, flags_of, number_at

MAX_COUNT = tl.constexpr(float(COUNT_LIMIT))


@triton.jit
def decide(step, t, part, SPREAD: tl.constexpr):
    """The decision for all rows; ``t`` counts the updates made before this one."""
    grad_scale = tl.load(step.grad_scale.to(tl.pointer_type(tl.float32)), step.grad_scale != 0, 1.0)
    if SPREAD:
        # in any process
        found_inf = tl.load(number_at(flags_of(step)) + 1, step.found_inf != 0, 0.0)
    else:
        found_inf = tl.load(step.found_inf.to(tl.pointer_type(tl.float32)), step.found_inf != 0, 0.0)
    unscale = 1.0 / grad_scale.to(tl.float64)
    measured = step.measure != 0
    grad_norm = tl.where(measured, tl.sqrt(part.l2_sq) * unscale, float("nan"))
    skipped = (found_inf != 0.0) | ((step.skip_nonfinite != 0) & (part.nonfinite > 0))
    return StepDecision(
        t=t,
        grad_norm=grad_norm,
        grad_norm_l1=tl.where(measured, part.l1 * unscale, float("nan")),
        clip_coef=tl.where(step.clip != 0, clip_coefficient(grad_norm, step.max_grad_norm), 1.0),
        unscale=unscale,
        skipped=skipped.to(tl.int32),
    )


@triton.jit
def rates_of(step, h, t):
    """Learning rate and weight decay of a block of groups, after schedules."""
    lr = h.lr * multiplier(h.lr_segments, h.n_lr_segments, t)
    weight_decay = h.weight_decay * multiplier(h.decay_segments, h.n_decay_segments, t)
    return Rates(lr=lr, weight_decay=weight_decay)


@triton.jit
def set_rates(step, t, program, programs, LANES: tl.constexpr):
    """Write the rates of every group, shared among programs."""
    for start in range(program * LANES, step.n_groups, programs * LANES):
        group = start + tl.arange(0, LANES)
        known = group < step.n_groups
        rates = rates_of(step, load_struct(step.hypers, group, "Hyper", known), t)
        store_struct(step.rates, group, rates, "Rates", known)


@triton.jit
def updates_of(row, known):
    """Number of updates of rows: the exact count, unless other code has written the float of the state."""
    exact = tl.load(field(row.counters, 0, "RowCounters", "step"), known, 0)
    shown = tl.load(row.step.to(tl.pointer_type(tl.float32)), known, 0.0)
    written = (shown != exact.to(tl.float32)) & (shown >= 0.0) & (shown < MAX_COUNT)
    return tl.where(written, shown.to(tl.int64), exact)


@triton.jit
def count_average(step, decision, row, known):
    """Advance the average counter of every row that has an average, with or without a gradient."""
    kept = known & (row.average != 0)
    due = is_averaged(step.average_kind, step.average_start, step.average_every, decision.t + 1)
    count = row.n_averaged.to(tl.pointer_type(tl.int64))
    n_averaged = tl.load(count, kept, 0) + due.to(tl.int64)
    weight = tl.where(due, average_weight(step.average_kind, step.average_decay, n_averaged), 0.0)
    tl.store(count, n_averaged, kept)
    tl.store(field(row.counters, 0, "RowCounters", "average_weight"), weight, kept)


@triton.jit
def average_weight_of(row):
    """Weight of the parameter in its average at this step."""
    return tl.load(field(row.counters, 0, "RowCounters", "average_weight"))


@triton.jit
def sphere_rates(step, group, lr, exponent, active):
    """Learning rates of rows, converted for groups on a sphere."""
    sphere = load_struct(step.spheres, group, "Sphere", active)
    there = active & (sphere.norm != 0)
    norm = tl.load(sphere.norm.to(tl.pointer_type(tl.float64)), there, 1.0)
    return tl.where(there, sphere_rate(lr, norm, exponent), lr)


@triton.jit
def scalars_of_rows(step, decision, row, h, rates, effective_lr, updates, SCALARS: tl.constexpr):
    """Scalars of update number ``updates`` for one row or a block of rows."""
    s = common_scalars(h, rates, decision.clip_coef * decision.unscale)
    s = SCALARS(h, effective_lr, updates, s)
    clipped_norm = decision.grad_norm * decision.clip_coef
    return start_exp_avg_sq(h, updates, row.initialized, clipped_norm, step.init_norm_sq, s)


@triton.jit
def set_scalars(
    step,
    decision,
    SCALARS: tl.constexpr,
    LR_NORM_POWER: tl.constexpr,
    SPHERES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Count and prepare the update of every row with a gradient, shared among programs."""
    for start in range(tl.program_id(0) * LANES, step.n_rows, tl.num_programs(0) * LANES):
        i = start + tl.arange(0, LANES)
        known = i < step.n_rows
        active = known & (tl.load(grad_of(step, i), known, 0) != 0)
        row = load_struct(step.rows, i, "Row", known)
        count_average(step, decision, row, known)
        updates = updates_of(row, active) + 1
        tl.store(field(row.counters, 0, "RowCounters", "step"), updates, active)
        tl.store(row.step.to(tl.pointer_type(tl.float32)), updates.to(tl.float32), active)
        h = load_struct(step.hypers, row.group, "Hyper", active)
        # computed again, because other programs write those of the table
        rates = rates_of(step, h, decision.t)
        effective_lr = rates.lr
        if SPHERES:
            effective_lr = sphere_rates(step, row.group, effective_lr, LR_NORM_POWER(h, updates), active)
        s = scalars_of_rows(step, decision, row, h, rates, effective_lr, updates, SCALARS)
        store_struct(step.scalars, i, s, "Scalars", active)


@triton.jit
def first_rect(step, LANES: tl.constexpr):
    """Rectification of the first row that has a gradient; NaN without one."""
    start = step.n_rows * 0
    first = step.n_rows
    while (first == step.n_rows) & (start < step.n_rows):
        i = start + tl.arange(0, LANES)
        has_grad = tl.load(grad_of(step, i), i < step.n_rows, 0) != 0
        first = tl.min(tl.where(has_grad, i, step.n_rows))
        start += LANES
    return tl.load(field(step.scalars, first, "Scalars", "rect"), first < step.n_rows, float("nan"))


@triton.jit
def record(step, decision):
    """Write the telemetry row of this step, and advance the counters."""
    counters = load_struct(step.counters, 0, "Counters")
    pending_scalars = load_struct(step.pending_scalars, 0, "PendingScalars")
    # wait until all threads have read the values that one of them overwrites
    tl.debug_barrier()
    made = tl.where(decision.skipped != 0, decision.t, decision.t + 1)
    if step.telemetry_capacity > 0:
        line = Telemetry(
            step=made,
            lr=load_struct(step.rates, 0, "Rates").lr,
            grad_norm=decision.grad_norm,
            grad_norm_l1=decision.grad_norm_l1,
            clip_coef=decision.clip_coef,
            rect=decision.rect,
            skipped=decision.skipped,
            loss=pending_scalars.loss,
            sharpness=pending_scalars.sharpness,
        )
        place = counters.calls % step.telemetry_capacity
        store_struct(step.telemetry, place, line, "Telemetry")
    store_struct(
        step.pending_scalars, 0, PendingScalars(loss=float("nan"), sharpness=float("nan")), "PendingScalars"
    )
    store_struct(step.counters, 0, Counters(step=made, calls=counters.calls + 1), "Counters")


@triton.jit
def record_norms(step, decision, part):
    """Write the norms that the update has summed into the row that ``record`` wrote."""
    last = load_struct(step.counters, 0, "Counters").calls - 1
    line = last % step.telemetry_capacity
    tl.store(field(step.telemetry, line, "Telemetry", "grad_norm"), tl.sqrt(part.l2_sq) * decision.unscale)
    tl.store(field(step.telemetry, line, "Telemetry", "grad_norm_l1"), part.l1 * decision.unscale)


@triton.jit
def decide_kernel(
    step,
    SCALARS: tl.constexpr,
    LR_NORM_POWER: tl.constexpr,
    SPHERES: tl.constexpr,
    SPREAD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Run the decide stage; all programs make the same decision, and the last one to finish records it."""
    step = load_struct(step.to(tl.int64), 0, "Step")
    if SPREAD:
        part = combine_slots(step)
    else:
        part = combine_all(step.partials, tl.where(step.measure != 0, step.n_chunks, 0), LANES)
    decision = decide(step, load_struct(step.counters, 0, "Counters").step, part, SPREAD)
    set_rates(step, decision.t, tl.program_id(0), tl.num_programs(0), LANES)
    if decision.skipped == 0:
        set_scalars(step, decision, SCALARS, LR_NORM_POWER, SPHERES, LANES)
    if arrives_last(field(step.decision, 0, "StepDecision", "decided")):
        rect = decision.grad_norm * float("nan")
        if decision.skipped == 0:
            rect = first_rect(step, LANES)
        decided = StepDecision(decision, rect=rect)
        store_struct(step.decision, 0, decided, "StepDecision")
        record(step, decided)
