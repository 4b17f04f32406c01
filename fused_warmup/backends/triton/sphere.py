"""Groups on a sphere: the sums of squares of their parameters, and the pass that rescales and averages them.

No mathematics here: the rules have it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decide import average_weight_of
from .memory import (
    VECTOR,
    arithmetic,
    average_dtype,
    field,
    item_size,
    load_struct,
    load_tile,
    store_tile,
)
from .rounding import SPHERE_PASS, are_rounded, load_param, store_param, vector_alignment
from .rules import average_update, rescale, sphere_factor
from .totals import combine_squares


@triton.jit
def is_on_sphere(step, group):
    """Return whether a group is on a sphere; only called if some group is."""
    return tl.load(field(step.spheres, group, "Sphere", "norm")) != 0


@triton.jit
def store_sum_sq(step, i, sum_sq):
    """Store the sum of squares of the parameters of one chunk."""
    tl.store((step.squares + i * 8).to(tl.pointer_type(tl.float64)), sum_sq)


@triton.jit
def finish_spheres(step, SPREAD: tl.constexpr, LANES: tl.constexpr):
    """Set the rescale factor of every group on a sphere, and its stored norm."""
    for group in range(0, step.n_groups):
        sphere = load_struct(step.spheres, group, "Sphere")
        if sphere.norm != 0:
            sum_sq = tl.zeros((LANES,), tl.float64)
            for start in range(0, sphere.n_chunks, LANES):
                i = start + tl.arange(0, LANES)
                at = (step.squares + (sphere.first_chunk + i) * 8).to(tl.pointer_type(tl.float64))
                sum_sq += tl.load(at, i < sphere.n_chunks, 0.0, cache_modifier=".cg")
            held = sphere.norm.to(tl.pointer_type(tl.float64))
            norm = tl.load(held)
            # wait until all threads have read the values that one of them overwrites
            tl.debug_barrier()
            radius = tl.where(sphere.radius > 0.0, sphere.radius, norm)
            if SPREAD:
                whole = combine_squares(step, group)
            else:
                whole = tl.sum(sum_sq)
            factor = sphere_factor(radius, whole)
            tl.store(field(step.spheres, group, "Sphere", "factor"), factor)
            tl.store(held, radius)


@triton.jit
def rescale_blocks(
    row,
    key,
    chunk,
    factor,
    weight,
    first,
    last,
    DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Rescale and average the elements from first to last of a chunk, in whole or masked blocks."""
    C: tl.constexpr = arithmetic(DTYPE)
    AVERAGE_DTYPE: tl.constexpr = average_dtype(DTYPE)
    lanes = tl.arange(0, BLOCK)
    for done in range(first, last, BLOCK):
        mask = None if WHOLE else lanes < last - done
        place = chunk.offset + done
        param = rescale(load_param(row, place, lanes, mask, DTYPE, ROUNDING, C, WHOLE), factor)
        param = store_param(row, key, place, lanes, mask, param, DTYPE, ROUNDING, SPHERE_PASS, C, WHOLE)
        if AVERAGE:
            if weight > 0.0:
                at = row.average + place * item_size(AVERAGE_DTYPE)
                average = load_tile(at, lanes, mask, AVERAGE_DTYPE, C, WHOLE)
                average = average_update(average, param, weight)
                store_tile(at, lanes, mask, average, AVERAGE_DTYPE, WHOLE)


@triton.jit
def rescale_kernel(
    step, PARAM_KINDS: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
):
    """Rescale and average every chunk of the groups on a sphere."""
    step = load_struct(step.to(tl.int64), 0, "Step")
    decision = load_struct(step.decision, 0, "StepDecision")
    if decision.skipped == 0:
        for i in range(tl.program_id(0), step.n_chunks, tl.num_programs(0)):
            chunk = load_struct(step.chunks, i, "Chunk")
            row = load_struct(step.rows, chunk.row, "Row")
            sphere = load_struct(step.spheres, row.group, "Sphere")
            key = (step.rows, chunk.row, decision.t)
            addresses = row.param | row.average | vector_alignment(row, are_rounded(PARAM_KINDS))
            aligned = (addresses % VECTOR == 0) & (chunk.offset % VECTOR == 0)
            whole = tl.where(aligned, chunk.count // BLOCK * BLOCK, 0)
            for k in tl.static_range(len(PARAM_KINDS)):
                kind = row.dtype == PARAM_KINDS[k][0]
                if are_rounded(PARAM_KINDS):
                    kind = kind & (row.rounding == PARAM_KINDS[k][1])
                if (sphere.norm != 0) & kind:
                    factor = sphere.factor.to(arithmetic(PARAM_KINDS[k][0]))
                    weight = average_weight_of(row).to(arithmetic(PARAM_KINDS[k][0]))
                    rescale_blocks(
                        row, key, chunk, factor, weight, 0, whole, PARAM_KINDS[k][0], PARAM_KINDS[k][1],
                        AVERAGE, BLOCK, True,
                    )  # fmt: skip
                    rescale_blocks(
                        row, key, chunk, factor, weight, whole, chunk.count, PARAM_KINDS[k][0],
                        PARAM_KINDS[k][1], AVERAGE, TAIL, False,
                    )  # fmt: skip
