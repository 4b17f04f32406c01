"""The stages of a step as Triton kernels: measure, decide, update, the statements of ``csrc/decide.h``.

Every kernel takes the address of the Step struct and no other argument, so that nothing is compiled again
when addresses, step counts or hyper-parameters change. No mathematics here: the rules and schedules have it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...plan.structs import INIT_KINDS
from .memory import (
    VECTOR,
    Chunk,
    Counters,
    Hyper,
    Partial,
    PendingScalars,
    Rates,
    Row,
    RowCounters,
    Scalars,
    Sphere,
    Step,
    StepDecision,
    Telemetry,
    arithmetic,
    field,
    item_size,
    load_block,
    load_struct,
    narrow,
    state_dtype,
    store_block,
    store_struct,
    widen,
)
from .rules import average_update, common_scalars, rescale, sphere_factor, sphere_rate
from .schedules import average_weight, is_averaged, multiplier

INIT_GRAD = tl.constexpr(INIT_KINDS["grad"])
INIT_RANDOM = tl.constexpr(INIT_KINDS["random"])

# norms: the statements of csrc/reduce.h


@triton.jit
def no_sums(LANES: tl.constexpr):
    """Sums of nothing."""
    zero = tl.zeros((LANES,), tl.float64)
    return Partial(l1=zero, l2_sq=zero, nonfinite=tl.zeros((LANES,), tl.int64))


@triton.jit
def no_part():
    """The partial sum of nothing."""
    zero = tl.full((), 0.0, tl.float64)
    return Partial(l1=zero, l2_sq=zero, nonfinite=tl.full((), 0, tl.int64))


@triton.jit
def in_fours(x):
    """Sums of four neighbours: they are in one thread, which therefore need not wait for others."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 4, 4)), axis=1)


@triton.jit
def accumulate(sums, grad):
    """Add a block of gradients."""
    x = grad.to(tl.float64)
    return Partial(
        l1=sums.l1 + in_fours(tl.abs(x)),
        l2_sq=sums.l2_sq + in_fours(x * x),
        nonfinite=sums.nonfinite + in_fours(tl.where(tl.abs(x) < float("inf"), 0, 1)),
    )


@triton.jit
def combine(a, b):
    """Sum of two partial sums."""
    return Partial(l1=a.l1 + b.l1, l2_sq=a.l2_sq + b.l2_sq, nonfinite=a.nonfinite + b.nonfinite)


@triton.jit
def total(sums):
    """One sum of many."""
    return Partial(l1=tl.sum(sums.l1), l2_sq=tl.sum(sums.l2_sq), nonfinite=tl.sum(sums.nonfinite))


@triton.jit
def combine_all(partials, count, LANES: tl.constexpr):
    """Sum of the partial sums, in an order that depends on their number only."""
    sums = no_sums(LANES)
    for start in range(0, count, LANES):
        i = start + tl.arange(0, LANES)
        sums = combine(sums, load_struct(partials, i, Partial, i < count))
    return total(sums)


@triton.jit
def grad_of(step, row):
    """Addresses of gradients."""
    return (step.grads + row * 8).to(tl.pointer_type(tl.int64))


# measure


@triton.jit
def measure_blocks(part, address, first, last, DTYPE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Add the elements from first to last of a chunk, in whole and aligned blocks or others."""
    lanes = tl.arange(0, BLOCK)
    sums = no_sums(BLOCK // 4)
    for done in range(first, last, BLOCK):
        here = address + done * item_size(DTYPE)
        sums = accumulate(sums, load_block(here, lanes, lanes < last - done, DTYPE, arithmetic(DTYPE), WHOLE))
    return combine(part, total(sums))


@triton.jit
def measure_chunk(
    step, i, chunk, row, grad, GRAD_DTYPES: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
):
    """Sums of one chunk of gradients."""
    # chunks of channels of odd lengths do not begin where vectors do
    aligned = (grad % VECTOR == 0) & (chunk.offset % VECTOR == 0)
    whole = tl.where(aligned, chunk.count // BLOCK * BLOCK, 0)
    part = no_part()
    for k in tl.static_range(len(GRAD_DTYPES)):
        if (grad != 0) & (row.grad_dtype == GRAD_DTYPES[k]):
            here = grad + chunk.offset * item_size(GRAD_DTYPES[k])
            part = measure_blocks(part, here, 0, whole, GRAD_DTYPES[k], BLOCK, True)
            part = measure_blocks(part, here, whole, chunk.count, GRAD_DTYPES[k], TAIL, False)
    store_struct(step.partials, i, part, Partial)


@triton.jit
def measure_kernel(step, GRAD_DTYPES: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Sums of every chunk of gradients."""
    step = load_struct(step.to(tl.int64), 0, Step)
    for i in range(tl.program_id(0), step.n_chunks, tl.num_programs(0)):
        chunk = load_struct(step.chunks, i, Chunk)
        row = load_struct(step.rows, chunk.row, Row)
        grad = tl.load(grad_of(step, chunk.row))
        measure_chunk(step, i, chunk, row, grad, GRAD_DTYPES, BLOCK, TAIL)


# decide: the statements of csrc/decide.h


@triton.jit
def decide(step, t, part):
    """What holds for all rows; t is the number of updates made before this one."""
    grad_scale = tl.load(step.grad_scale.to(tl.pointer_type(tl.float32)), step.grad_scale != 0, 1.0)
    found_inf = tl.load(step.found_inf.to(tl.pointer_type(tl.float32)), step.found_inf != 0, 0.0)
    unscale = 1.0 / grad_scale.to(tl.float64)
    measured = step.measure != 0
    grad_norm = tl.where(measured, tl.sqrt(part.l2_sq) * unscale, float("nan"))
    skipped = (found_inf != 0.0) | ((step.skip_nonfinite != 0) & (part.nonfinite > 0))
    # a NaN ratio stays, as in torch.nn.utils.clip_grad_norm_
    ratio = tl.where(step.clip != 0, step.max_grad_norm / (grad_norm + 1e-6), 1.0)
    return StepDecision(
        t=t,
        grad_norm=grad_norm,
        grad_norm_l1=tl.where(measured, part.l1 * unscale, float("nan")),
        clip_coef=tl.where(ratio >= 1.0, 1.0, ratio),
        unscale=unscale,
        skipped=skipped.to(tl.int32),
    )


@triton.jit
def set_rates(step, t, LANES: tl.constexpr):
    """What the schedules give every group."""
    for start in range(0, step.n_groups, LANES):
        group = start + tl.arange(0, LANES)
        known = group < step.n_groups
        h = load_struct(step.hypers, group, Hyper, known)
        lr = h.lr * multiplier(step.segments, h.lr_segment, h.lr_segments, step.table_values, t)
        weight_decay = h.weight_decay * multiplier(
            step.segments, h.decay_segment, h.decay_segments, step.table_values, t
        )
        rates = Rates(lr=lr, weight_decay=weight_decay)
        store_struct(step.rates, group, rates, Rates, known)


@triton.jit
def updates_of(row):
    """Updates that a row has had."""
    return tl.load(field(row.counters, 0, RowCounters, "step"))


@triton.jit
def count_average(step, decision, row, known):
    """Count one more value in the average of every row that keeps one, whether or not it has a gradient."""
    kept = known & (row.average != 0)
    due = is_averaged(step.average_kind, step.average_start, step.average_every, decision.t + 1)
    n_averaged = tl.load(field(row.counters, 0, RowCounters, "n_averaged"), kept, 0) + due.to(tl.int64)
    weight = tl.where(due, average_weight(step.average_kind, step.average_decay, n_averaged), 0.0)
    tl.store(field(row.counters, 0, RowCounters, "n_averaged"), n_averaged, kept)
    tl.store(field(row.counters, 0, RowCounters, "average_weight"), weight, kept)


@triton.jit
def average_weight_of(row):
    """Weight of a row in its average at this step."""
    return tl.load(field(row.counters, 0, RowCounters, "average_weight"))


@triton.jit
def rates_on_spheres(step, group, lr, exponent, active):
    """Learning rates of rows as their rule takes them."""
    sphere = load_struct(step.spheres, group, Sphere, active)
    there = active & (sphere.norm != 0)
    norm = tl.load(sphere.norm.to(tl.pointer_type(tl.float64)), there, 1.0)
    return tl.where(there, sphere_rate(lr, norm, exponent), lr)


@triton.jit
def scalars_of_rows(step, decision, row, h, rates, effective_lr, updates, SCALARS: tl.constexpr):
    """What the update of a number needs, of one row or a block of them."""
    s = common_scalars(h, rates, decision.clip_coef * decision.unscale)
    s = SCALARS(h, effective_lr, updates, s)
    fresh = (updates == 1) & (row.initialized == 0)
    norm = decision.grad_norm * decision.clip_coef
    start_sq = h.init_scale * norm * norm / step.init_norm_sq
    return Scalars(
        s,
        exp_avg_sq_from_grad=tl.where(fresh & (h.init == INIT_GRAD), h.init_scale, 0.0),
        exp_avg_sq_scale=tl.where(fresh & (h.init == INIT_RANDOM), start_sq, 1.0),
    )


@triton.jit
def set_scalars(
    step,
    decision,
    SCALARS: tl.constexpr,
    SPHERE_EXPONENT: tl.constexpr,
    SPHERES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Count the update of every row that has a gradient, and prepare it; returns the first rectification."""
    first = decision.grad_norm * float("nan")
    for start in range(0, step.n_rows, LANES):
        i = start + tl.arange(0, LANES)
        known = i < step.n_rows
        active = known & (tl.load(grad_of(step, i), known, 0) != 0)
        row = load_struct(step.rows, i, Row, known)
        count_average(step, decision, row, known)
        counter = field(row.counters, 0, RowCounters, "step")
        updates = tl.load(counter, active, 0) + 1
        tl.store(counter, updates, active)
        tl.store(row.step_float.to(tl.pointer_type(tl.float32)), updates.to(tl.float32), active)
        h = load_struct(step.hypers, row.group, Hyper, active)
        rates = load_struct(step.rates, row.group, Rates, active)
        effective_lr = rates.lr
        if SPHERES:
            effective_lr = rates_on_spheres(
                step, row.group, effective_lr, SPHERE_EXPONENT(h, updates), active
            )
        s = scalars_of_rows(step, decision, row, h, rates, effective_lr, updates, SCALARS)
        store_struct(step.scalars, i, s, Scalars, active)
        leader = tl.min(tl.where(active, i, step.n_rows))
        rect = tl.sum(tl.where(i == leader, s.rect, 0.0))
        first = tl.where((first != first) & (leader < step.n_rows), rect, first)
    return first


@triton.jit
def record(step, decision):
    """The telemetry row of this step, and the counts of the next."""
    counters = load_struct(step.counters, 0, Counters)
    pending_scalars = load_struct(step.pending_scalars, 0, PendingScalars)
    # other threads may still read what one of them is about to write
    tl.debug_barrier()
    made = tl.where(decision.skipped != 0, decision.t, decision.t + 1)
    if step.telemetry_capacity > 0:
        line = Telemetry(
            step=made,
            lr=load_struct(step.rates, 0, Rates).lr,
            grad_norm=decision.grad_norm,
            grad_norm_l1=decision.grad_norm_l1,
            clip_coef=decision.clip_coef,
            rect=decision.rect,
            skipped=decision.skipped,
            loss=pending_scalars.loss,
            sharpness=pending_scalars.sharpness,
        )
        place = counters.calls % step.telemetry_capacity
        store_struct(step.telemetry, place, line, Telemetry)
    store_struct(
        step.pending_scalars, 0, PendingScalars(loss=float("nan"), sharpness=float("nan")), PendingScalars
    )
    store_struct(step.counters, 0, Counters(step=made, calls=counters.calls + 1), Counters)


@triton.jit
def decide_kernel(
    step,
    SCALARS: tl.constexpr,
    SPHERE_EXPONENT: tl.constexpr,
    SPHERES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Clipping, policy, rates, scalars, telemetry and counters, by one program."""
    step = load_struct(step.to(tl.int64), 0, Step)
    count = tl.where(step.measure != 0, step.n_chunks, 0)
    decision = decide(
        step, load_struct(step.counters, 0, Counters).step, combine_all(step.partials, count, LANES)
    )
    set_rates(step, decision.t, LANES)
    # the rates of a group are read by other threads than wrote them
    tl.debug_barrier()
    rect = decision.grad_norm * float("nan")
    if decision.skipped == 0:
        rect = set_scalars(step, decision, SCALARS, SPHERE_EXPONENT, SPHERES, LANES)
    decision = StepDecision(decision, rect=rect)
    store_struct(step.decision, 0, decision, StepDecision)
    record(step, decision)


# update


@triton.jit
def scalars_of(s, C: tl.constexpr):
    """The scalars of one row, rounded once to the type of the arithmetic."""
    rounded = ()
    for i in tl.static_range(len(s)):
        rounded = rounded + (s[i].to(C),)
    return Scalars(*rounded)


@triton.jit
def is_on_sphere(step, group):
    """Whether a group is kept on a sphere; there are some."""
    return tl.load(field(step.spheres, group, Sphere, "norm")) != 0


@triton.jit
def keep_squares(step, i, squares):
    """The squares of the parameters of one chunk."""
    tl.store((step.squares + i * 8).to(tl.pointer_type(tl.float64)), squares)


@triton.jit
def arrives_last(step):
    """Whether this program is the last to arrive, which sees what all threads of all of them wrote."""
    tl.debug_barrier()
    finished = tl.atomic_add(field(step.decision, 0, StepDecision, "finished_blocks"), 1)
    return finished == tl.num_programs(0) - 1


@triton.jit
def finish_spheres(step, LANES: tl.constexpr):
    """From the squares of every group on a sphere to what brings it there."""
    for group in range(0, step.n_groups):
        sphere = load_struct(step.spheres, group, Sphere)
        if sphere.norm != 0:
            squares = tl.zeros((LANES,), tl.float64)
            for start in range(0, sphere.n_chunks, LANES):
                i = start + tl.arange(0, LANES)
                at = (step.squares + (sphere.first_chunk + i) * 8).to(tl.pointer_type(tl.float64))
                squares += tl.load(at, i < sphere.n_chunks, 0.0, cache_modifier=".cg")
            held = sphere.norm.to(tl.pointer_type(tl.float64))
            norm = tl.load(held)
            # other threads may still read what one of them is about to write
            tl.debug_barrier()
            radius = tl.where(sphere.radius > 0.0, sphere.radius, norm)
            factor = sphere_factor(radius, tl.sum(squares))
            tl.store(field(step.spheres, group, Sphere, "factor"), factor)
            tl.store(held, radius)


@triton.jit
def update_blocks(
    part,
    squares,
    on_sphere,
    row,
    grad,
    chunk,
    s,
    weight,
    first,
    last,
    UPDATE: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    N_STATES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    AVERAGE: tl.constexpr,
    SPHERES: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Update some blocks of a chunk, whole and aligned ones or others."""
    C: tl.constexpr = arithmetic(DTYPE)
    STATE_DTYPE: tl.constexpr = state_dtype(DTYPE)
    states = (row.state0, row.state1, row.state2)
    lanes = tl.arange(0, BLOCK)
    sums = no_sums(BLOCK // 4)
    own_squares = tl.zeros((BLOCK // 4,), tl.float64)
    for done in range(first, last, BLOCK):
        place = chunk.offset + done
        mask = lanes < last - done
        here = row.param + place * item_size(DTYPE)
        param = load_block(here, lanes, mask, DTYPE, C, WHOLE)
        if grad != 0:
            g = load_block(grad + place * item_size(GRAD_DTYPE), lanes, mask, GRAD_DTYPE, C, WHOLE)
            state = ()
            for j in tl.static_range(N_STATES):
                at = states[j] + place * item_size(STATE_DTYPE)
                state = state + (load_block(at, lanes, mask, STATE_DTYPE, C, WHOLE),)
            if ACCUMULATE:
                sums = accumulate(sums, g)
            param, state = UPDATE(param, g, state, s)
            for j in tl.static_range(N_STATES):
                at = states[j] + place * item_size(STATE_DTYPE)
                store_block(at, lanes, mask, state[j], STATE_DTYPE, WHOLE)
            stored = narrow(param, DTYPE)
            store_block(here, lanes, mask, stored, DTYPE, WHOLE)
            # the average is of the parameter as it is stored
            param = widen(stored, DTYPE).to(C)
        if SPHERES:
            if on_sphere:
                x = tl.where(mask, param, 0.0).to(tl.float64)
                own_squares += in_fours(x * x)
        if AVERAGE:
            if weight > 0.0:
                at = row.average + place * item_size(STATE_DTYPE)
                average = load_block(at, lanes, mask, STATE_DTYPE, C, WHOLE)
                store_block(at, lanes, mask, average_update(average, param, weight), STATE_DTYPE, WHOLE)
    if ACCUMULATE:
        part = combine(part, total(sums))
    if SPHERES:
        squares += tl.sum(own_squares)
    return part, squares


@triton.jit
def update_kernel(
    step,
    UPDATE: tl.constexpr,
    KINDS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    AVERAGE: tl.constexpr,
    SPHERES: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
):
    """Update and average every chunk, the last one first: gradients measured last are still in the cache."""
    step = load_struct(step.to(tl.int64), 0, Step)
    decision = load_struct(step.decision, 0, StepDecision)
    if decision.skipped == 0:
        for n in range(tl.program_id(0), step.n_chunks, tl.num_programs(0)):
            i = step.n_chunks - 1 - n
            chunk = load_struct(step.chunks, i, Chunk)
            row = load_struct(step.rows, chunk.row, Row)
            grad = tl.load(grad_of(step, chunk.row))
            all_scalars = load_struct(step.scalars, chunk.row, Scalars)
            addresses = row.param | grad | row.state0 | row.state1 | row.state2 | row.average
            whole = tl.where(addresses % VECTOR == 0, chunk.count // BLOCK * BLOCK, 0)
            part = no_part()
            squares = tl.full((), 0.0, tl.float64)
            average_weight = average_weight_of(row)
            wanted = grad != 0
            on_sphere = False
            if SPHERES:
                # averaged when it is back there
                on_sphere = is_on_sphere(step, row.group)
                average_weight = tl.where(on_sphere, 0.0, average_weight)
                wanted = wanted | on_sphere
            if AVERAGE:
                wanted = wanted | (average_weight > 0.0)
            for k in tl.static_range(len(KINDS)):
                kind = (row.dtype == KINDS[k][0]) & (row.n_states == KINDS[k][2])
                if wanted & kind & (row.grad_dtype == KINDS[k][1]):
                    s = scalars_of(all_scalars, arithmetic(KINDS[k][0]))
                    weight = average_weight.to(arithmetic(KINDS[k][0]))
                    part, squares = update_blocks(
                        part, squares, on_sphere, row, grad, chunk, s, weight, 0, whole, UPDATE,
                        KINDS[k][0], KINDS[k][1], KINDS[k][2], ACCUMULATE, AVERAGE, SPHERES, BLOCK, True,
                    )  # fmt: skip
                    part, squares = update_blocks(
                        part, squares, on_sphere, row, grad, chunk, s, weight, whole, chunk.count, UPDATE,
                        KINDS[k][0], KINDS[k][1], KINDS[k][2], ACCUMULATE, AVERAGE, SPHERES, TAIL, False,
                    )  # fmt: skip
            if ACCUMULATE:
                # nobody asks for the count any more, so it is not made
                store_struct(step.partials, i, Partial(part, nonfinite=0), Partial)
            if SPHERES:
                if on_sphere:
                    keep_squares(step, i, squares)
        if ACCUMULATE or SPHERES:
            if arrives_last(step):
                if ACCUMULATE:
                    record_norms(step, decision, combine_all(step.partials, step.n_chunks, LANES))
                if SPHERES:
                    finish_spheres(step, LANES)


@triton.jit
def record_norms(step, decision, part):
    """The norms that the update added up, into the row that decide wrote."""
    last = load_struct(step.counters, 0, Counters).calls - 1
    line = last % step.telemetry_capacity
    tl.store(field(step.telemetry, line, Telemetry, "grad_norm"), tl.sqrt(part.l2_sq) * decision.unscale)
    tl.store(field(step.telemetry, line, Telemetry, "grad_norm_l1"), part.l1 * decision.unscale)


# rescale


@triton.jit
def rescale_blocks(
    row,
    chunk,
    factor,
    weight,
    first,
    last,
    DTYPE: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Rescale and average some blocks of a chunk, whole and aligned ones or others."""
    C: tl.constexpr = arithmetic(DTYPE)
    STATE_DTYPE: tl.constexpr = state_dtype(DTYPE)
    lanes = tl.arange(0, BLOCK)
    for done in range(first, last, BLOCK):
        mask = lanes < last - done
        here = row.param + (chunk.offset + done) * item_size(DTYPE)
        param = load_block(here, lanes, mask, DTYPE, C, WHOLE)
        stored = narrow(rescale(param, factor), DTYPE)
        store_block(here, lanes, mask, stored, DTYPE, WHOLE)
        if AVERAGE:
            if weight > 0.0:
                at = row.average + (chunk.offset + done) * item_size(STATE_DTYPE)
                average = load_block(at, lanes, mask, STATE_DTYPE, C, WHOLE)
                average = average_update(average, widen(stored, DTYPE).to(C), weight)
                store_block(at, lanes, mask, average, STATE_DTYPE, WHOLE)


@triton.jit
def rescale_kernel(
    step, PARAM_DTYPES: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
):
    """Every chunk of a group on a sphere once more, when the update has found the factors."""
    step = load_struct(step.to(tl.int64), 0, Step)
    decision = load_struct(step.decision, 0, StepDecision)
    if decision.skipped == 0:
        for i in range(tl.program_id(0), step.n_chunks, tl.num_programs(0)):
            chunk = load_struct(step.chunks, i, Chunk)
            row = load_struct(step.rows, chunk.row, Row)
            sphere = load_struct(step.spheres, row.group, Sphere)
            aligned = ((row.param | row.average) % VECTOR == 0) & (chunk.offset % VECTOR == 0)
            whole = tl.where(aligned, chunk.count // BLOCK * BLOCK, 0)
            for k in tl.static_range(len(PARAM_DTYPES)):
                if (sphere.norm != 0) & (row.dtype == PARAM_DTYPES[k]):
                    factor = sphere.factor.to(arithmetic(PARAM_DTYPES[k]))
                    weight = average_weight_of(row).to(arithmetic(PARAM_DTYPES[k]))
                    rescale_blocks(
                        row, chunk, factor, weight, 0, whole, PARAM_DTYPES[k], AVERAGE, BLOCK, True
                    )
                    rescale_blocks(
                        row, chunk, factor, weight, whole, chunk.count, PARAM_DTYPES[k], AVERAGE, TAIL, False
                    )
