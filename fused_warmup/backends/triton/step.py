"""The update of element-wise rules, one launch over the chunks of all tensors.

Every kernel of a step takes the address of the Step struct and no other argument, so that nothing is
recompiled when addresses, step counts or hyper-parameters change. No mathematics here: the rules have it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...plan.chunks import TILE_BYTES as _TILE_BYTES
from ...plan.structs import DTYPES
from .decide import average_weight_of, record_norms
from .measure import within_range
from .memory import (
    VECTOR,
    Chunk,
    Partial,
    arithmetic,
    arrives_last,
    average_dtype,
    field,
    grad_of,
    item_size,
    load_block,
    load_struct,
    scalars_of,
    store_block,
    store_struct,
)
from .reduce import accumulate, combine, combine_all, sum_fours, total, zero_norms, zero_part
from .rounding import (
    UPDATE_PASS,
    is_of_kind,
    load_param,
    load_states,
    rounds_anything,
    state_bits,
    store_param,
    store_states,
    vector_alignment,
)
from .rules import average_update
from .sphere import finish_spheres, is_on_sphere, store_sum_sq
from .totals import combine_slots

TILE_BYTES = tl.constexpr(_TILE_BYTES)
FLOAT32, FLOAT64 = tl.constexpr(DTYPES[torch.float32]), tl.constexpr(DTYPES[torch.float64])


@triton.jit
def update_blocks(
    part,
    sum_sq,
    on_sphere,
    row,
    key,
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
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    AVERAGE: tl.constexpr,
    SPHERES: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Update the elements from first to last of a chunk, in whole or masked blocks."""
    C: tl.constexpr = arithmetic(DTYPE)
    AVERAGE_DTYPE: tl.constexpr = average_dtype(DTYPE)
    lanes = tl.arange(0, BLOCK)
    # the type of the gradient and not of the arithmetic, as in the measure stage
    NORM: tl.constexpr = arithmetic(GRAD_DTYPE)
    sums = zero_norms(BLOCK, NORM, WHOLE)
    own_sum_sq = tl.zeros((BLOCK // 4,), tl.float64)
    for done in range(first, last, BLOCK):
        place = chunk.offset + done
        mask = lanes < last - done
        own = None if WHOLE else mask
        param = load_param(row, place, lanes, own, DTYPE, ROUNDING, C, WHOLE)
        if grad != 0:
            bits = state_bits(key, place, lanes, N_STATES, STATE_DTYPE, WHOLE)
            g = load_block(grad + place * item_size(GRAD_DTYPE), lanes, mask, GRAD_DTYPE, C, WHOLE)
            state = load_states(row, place, lanes, own, N_STATES, STATE_DTYPE, C, WHOLE)
            if ACCUMULATE:
                sums = accumulate(sums, g.to(NORM), WHOLE)
            param, state = UPDATE(param, g, state, s)
            store_states(row, bits, place, lanes, own, state, N_STATES, STATE_DTYPE, WHOLE)
            # the average is of the parameter as it is stored
            param = store_param(row, key, place, lanes, own, param, DTYPE, ROUNDING, UPDATE_PASS, C, WHOLE)
        if SPHERES:
            if on_sphere:
                x = tl.where(mask, param, 0.0).to(tl.float64)
                own_sum_sq += sum_fours(x * x)
        if AVERAGE:
            if weight > 0.0:
                at = row.average + place * item_size(AVERAGE_DTYPE)
                average = load_block(at, lanes, mask, AVERAGE_DTYPE, C, WHOLE)
                store_block(at, lanes, mask, average_update(average, param, weight), AVERAGE_DTYPE, WHOLE)
    if ACCUMULATE:
        part = combine(part, total(sums))
    if SPHERES:
        sum_sq += tl.sum(own_sum_sq)
    return part, sum_sq


@triton.jit
def tile_of(step, chunk, dtype, index):
    """Begin and length of a tile in a chunk of elements of a dtype code; the length is 0 past the end."""
    size = tl.where(dtype == FLOAT64, TILE_BYTES // 8, TILE_BYTES // 2)
    size = tl.where(dtype == FLOAT32, TILE_BYTES // 4, size)
    begin = index.to(tl.int32) * size
    return begin, tl.maximum(tl.minimum(chunk.count - begin, size), 0)


@triton.jit
def update_kernel(
    step,
    UPDATE: tl.constexpr,
    KINDS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    AVERAGE: tl.constexpr,
    SPHERES: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
):
    """Update and average every chunk or tile, the last chunk first: its gradient is still in the cache.

    Programs that run together take neighbouring tiles, and so memory that lies together. Sums go by whole
    chunks, because a program takes as long for a sum as for a tile.
    """
    address = step.to(tl.int64)
    step = load_struct(address, 0, "Step")
    decision = load_struct(step.decision, 0, "StepDecision")
    tiles = step.n_tiles if TILED else 1
    if decision.skipped == 0:
        for n in range(tl.program_id(0), step.n_chunks * tiles, tl.num_programs(0)):
            # loaded again where rounding needs the registers
            own = load_struct(address, 0, "Step") if rounds_anything(KINDS) else step
            i = step.n_chunks - 1 - n // tiles
            chunk = load_struct(own.chunks, i, "Chunk")
            row = load_struct(own.rows, chunk.row, "Row")
            if TILED:
                begin, count = tile_of(own, chunk, row.dtype, n % tiles)
                chunk = Chunk(chunk, offset=chunk.offset + begin, count=count)
            grad = tl.load(grad_of(own, chunk.row))
            all_scalars = load_struct(own.scalars, chunk.row, "Scalars")
            addresses = row.param | grad | row.state0 | row.state1 | row.state2 | row.average
            addresses = addresses | vector_alignment(row, rounds_anything(KINDS))
            key = (own.rows, chunk.row, decision.t)
            whole = tl.where(addresses % VECTOR == 0, chunk.count // BLOCK * BLOCK, 0)
            part = zero_part()
            sum_sq = tl.full((), 0.0, tl.float64)
            average_weight = average_weight_of(row)
            wanted = grad != 0
            on_sphere = False
            if SPHERES:
                # parameters of a group on a sphere are averaged later, in rescale_kernel
                on_sphere = is_on_sphere(own, row.group)
                average_weight = tl.where(on_sphere, 0.0, average_weight)
                wanted = wanted | on_sphere
            if AVERAGE:
                wanted = wanted | (average_weight > 0.0)
            for k in tl.static_range(len(KINDS)):
                if wanted & is_of_kind(row, KINDS, k):
                    s = scalars_of(all_scalars, arithmetic(KINDS[k][0]))
                    weight = average_weight.to(arithmetic(KINDS[k][0]))
                    part, sum_sq = update_blocks(
                        part, sum_sq, on_sphere, row, key, grad, chunk, s, weight, 0, whole,
                        UPDATE, KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], KINDS[k][4], ACCUMULATE,
                        AVERAGE, SPHERES, BLOCK, True,
                    )  # fmt: skip
                    part, sum_sq = update_blocks(
                        part, sum_sq, on_sphere, row, key, grad, chunk, s, weight, whole,
                        chunk.count, UPDATE, KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], KINDS[k][4],
                        ACCUMULATE, AVERAGE, SPHERES, TAIL, False,
                    )  # fmt: skip
                    if ACCUMULATE:
                        part = within_range(part, address, i, KINDS[k][1], TAIL)
            if ACCUMULATE:
                # the non-finite count is unused here, so it is not stored
                store_struct(own.partials, i, Partial(part, nonfinite=0), "Partial")
            if SPHERES:
                if on_sphere:
                    store_sum_sq(own, i, sum_sq)
        if SPHERES:
            if arrives_last(field(step.decision, 0, "StepDecision", "finished")):
                finish_spheres(step, False, LANES)


@triton.jit
def finish_kernel(
    step, ACCUMULATE: tl.constexpr, SPHERES: tl.constexpr, SPREAD: tl.constexpr, LANES: tl.constexpr
):
    """Record the norms that an update has summed, in one program.

    Where rows are spread over processes it also sets the factors of groups on a sphere once more.

    A launch of its own, because a program of the update that waited for its writes to be seen by others would
    keep its place from the next one.
    """
    step = load_struct(step.to(tl.int64), 0, "Step")
    decision = load_struct(step.decision, 0, "StepDecision")
    if decision.skipped == 0:
        if ACCUMULATE:
            if SPREAD:
                record_norms(step, decision, combine_slots(step))
            else:
                record_norms(step, decision, combine_all(step.partials, step.n_chunks, LANES))
        if SPHERES:
            finish_spheres(step, SPREAD, LANES)
