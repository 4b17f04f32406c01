"""Sums that processes add up, where rows are spread over several; places as in ``csrc/totals.h``.

No mathematics here: the rules have it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import Partial, field, load_struct
from .reduce import combine, total, zero_lanes


@triton.jit
def number_at(address):
    """Pointer to a double."""
    return address.to(tl.pointer_type(tl.float64))


@triton.jit
def squares_of_group(step, group):
    """Address of the squares of the parameters of a group, by slot."""
    return step.totals + group * step.n_slots * 8


@triton.jit
def norms_of_slot(step, slot):
    """Address of the magnitudes and the squares of the gradients of a slot."""
    return squares_of_group(step, step.n_groups) + 2 * slot * 8


@triton.jit
def flags_of(step):
    """Address of the numbers of non-finite elements and of overflows."""
    return norms_of_slot(step, step.n_slots)


@triton.jit
def sums_of_layer(step, spread):
    """Address of the sums of a layer."""
    return flags_of(step) + (2 + spread.first_total) * 8


@triton.jit
def combine_slots(step):
    """Sums over the gradients of all processes."""
    l1 = tl.full((), 0.0, tl.float64)
    l2_sq = tl.full((), 0.0, tl.float64)
    for slot in range(0, step.n_slots):
        norms = number_at(norms_of_slot(step, slot))
        l1 += tl.load(norms)
        l2_sq += tl.load(norms + 1)
    return Partial(l1=l1, l2_sq=l2_sq, nonfinite=tl.load(number_at(flags_of(step))).to(tl.int64))


@triton.jit
def combine_squares(step, group):
    """Sum of squares of all parameters of a group in all processes."""
    sum_sq = tl.full((), 0.0, tl.float64)
    for slot in range(0, step.n_slots):
        sum_sq += tl.load(number_at(squares_of_group(step, group)) + slot)
    return sum_sq


@triton.jit
def in_slot(step, chunk, known, slot):
    """Mask of the chunks whose rows are in a slot."""
    row = tl.load(field(step.chunks, chunk, "Chunk", "row"), known, 0)
    return known & (tl.load(field(step.spreads, row, "Spread", "slot"), known, -1) == slot)


@triton.jit
def fold_norms(step, count, LANES: tl.constexpr):
    """Write the sums over the gradients in ``count`` chunks, by slot, and what a GradScaler has found."""
    nonfinite = tl.full((), 0, tl.int64)
    for slot in range(0, step.n_slots):
        sums = zero_lanes(LANES)
        for start in range(0, count, LANES):
            i = start + tl.arange(0, LANES)
            sums = combine(sums, load_struct(step.partials, i, "Partial", in_slot(step, i, i < count, slot)))
        part = total(sums)
        norms = number_at(norms_of_slot(step, slot))
        tl.store(norms, part.l1)
        tl.store(norms + 1, part.l2_sq)
        nonfinite += part.nonfinite
    flags = number_at(flags_of(step))
    found_inf = tl.load(step.found_inf.to(tl.pointer_type(tl.float32)), step.found_inf != 0, 0.0)
    tl.store(flags, nonfinite.to(tl.float64))
    tl.store(flags + 1, (found_inf != 0.0).to(tl.float64))


@triton.jit
def fold_squares(step, LANES: tl.constexpr):
    """Write the squares of the parameters of groups on a sphere, by slot."""
    for group in range(0, step.n_groups):
        sphere = load_struct(step.spheres, group, "Sphere")
        for slot in range(0, step.n_slots):
            sum_sq = tl.zeros((LANES,), tl.float64)
            for start in range(0, tl.where(sphere.norm != 0, sphere.n_chunks, 0), LANES):
                i = start + tl.arange(0, LANES)
                chunk = sphere.first_chunk + i
                own = in_slot(step, chunk, i < sphere.n_chunks, slot)
                sum_sq += tl.load(number_at(step.squares) + chunk, own, 0.0)
            tl.store(number_at(squares_of_group(step, group)) + slot, tl.sum(sum_sq))


@triton.jit
def fold_kernel(
    step, MEASURED: tl.constexpr, NORMS: tl.constexpr, SQUARES: tl.constexpr, LANES: tl.constexpr
):
    """Add up, in one program, what the next stage needs of all processes.

    ``MEASURED`` is whether this comes before the decision, which may skip the step.
    """
    step = load_struct(step.to(tl.int64), 0, "Step")
    skipped = tl.full((), 0, tl.int32)
    if not MEASURED:
        skipped = tl.load(field(step.decision, 0, "StepDecision", "skipped"))
    if skipped == 0:
        if NORMS:
            # without norms of their own, partials are those of an earlier step
            fold_norms(step, tl.where(MEASURED & (step.measure == 0), 0, step.n_chunks), LANES)
        if SQUARES:
            fold_squares(step, LANES)
