"""The preconditioner of the next step, one launch: the statements of ``csrc/preconditioner.h``."""

from __future__ import annotations

import triton
import triton.language as tl

from .decide import decide, rates_of, scalars_of_rows, set_rates, updates_of
from .memory import (
    VECTOR,
    Partial,
    Rates,
    Scalars,
    Step,
    arithmetic,
    grad_of,
    item_size,
    load_block,
    load_struct,
    scalars_of,
    store_block,
)
from .rounding import are_rounded, is_of_kind, load_param, load_states, vector_alignment
from .rules import inverse_preconditioner, root


@triton.jit
def as_numbers(s):
    """Convert the scalars that no rule set, which are Python numbers, to device numbers."""
    zero = tl.full((), 0.0, tl.float64)
    numbers = ()
    for i in tl.static_range(len(s)):
        numbers = numbers + (s[i] + zero,)
    return Scalars(*numbers)


@triton.jit
def preconditioner_blocks(
    call,
    row,
    grad,
    chunk,
    place,
    s,
    factor,
    first,
    last,
    UPDATE: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    N_STATES: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Compute the elements from first to last of a chunk, in whole or masked blocks."""
    C: tl.constexpr = arithmetic(DTYPE)
    lanes = tl.arange(0, BLOCK)
    for done in range(first, last, BLOCK):
        own = chunk.offset + done
        there = (place + own) * item_size(WIDE)
        mask = lanes < last - done
        inside = None if WHOLE else mask
        param = load_param(row, own, lanes, inside, DTYPE, ROUNDING, C, WHOLE)
        g = load_block(grad + own * item_size(GRAD_DTYPE), lanes, mask, GRAD_DTYPE, C, WHOLE)
        state = load_states(row, own, lanes, inside, N_STATES, STATE_DTYPE, C, WHOLE)
        inverse = inverse_preconditioner(param, g, state, s, UPDATE)
        if call.scale != 0:
            store_block(call.scale + there, lanes, mask, root(inverse).to(arithmetic(WIDE)), WIDE, WHOLE)
        if call.scaled != 0:
            scaled = root(inverse * factor).to(arithmetic(WIDE))
            store_block(call.scaled + there, lanes, mask, scaled, WIDE, WHOLE)


@triton.jit
def preconditioner_kernel(
    step,
    call,
    SCALARS: tl.constexpr,
    UPDATE: tl.constexpr,
    KINDS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
):
    """Compute every chunk of the measured rows; the table of the step is only read."""
    step = load_struct(step.to(tl.int64), 0, "Step")
    call = load_struct(call.to(tl.int64), 0, "PreconditionerOp")
    t = load_struct(step.counters, 0, "Counters").step
    l2_sq = tl.load(call.l2_sq.to(tl.pointer_type(tl.float64)))
    part = Partial(l1=l2_sq * 0.0, l2_sq=l2_sq, nonfinite=tl.full((), 0, tl.int64))
    decision = decide(step, t, part, False)
    # for the caller: programs cannot wait for each other, so each computes the rates of its rows itself
    if tl.program_id(0) == 0:
        set_rates(Step(step, rates=call.rates), t, 0, 1, LANES)
    for i in range(tl.program_id(0), step.n_chunks, tl.num_programs(0)):
        chunk = load_struct(step.chunks, i, "Chunk")
        place = tl.load((call.offsets + chunk.row * 8).to(tl.pointer_type(tl.int64)))
        if place >= 0:
            row = load_struct(step.rows, chunk.row, "Row")
            grad = tl.load(grad_of(step, chunk.row))
            # chains of segments belong to a block of groups, here to a block of one
            group = row.group + tl.arange(0, 1)
            rates = rates_of(step, load_struct(step.hypers, group, "Hyper", group >= 0), t)
            h = load_struct(step.hypers, row.group, "Hyper")
            threshold = tl.load((call.thresholds + chunk.row * 8).to(tl.pointer_type(tl.float64)))
            factor = tl.sum(rates.lr, 0) / threshold
            updates = updates_of(row, True) + 1
            # learning rate 1, because the preconditioner does not contain the rate
            rates = Rates(lr=tl.full((), 1.0, tl.float64), weight_decay=tl.sum(rates.weight_decay, 0))
            all_scalars = as_numbers(
                scalars_of_rows(step, decision, row, h, rates, rates.lr, updates, SCALARS)
            )
            addresses = row.param | grad | row.state0 | row.state1 | row.state2 | call.scale | call.scaled
            addresses = addresses | (place * item_size(WIDE)) | vector_alignment(row, are_rounded(KINDS))
            whole = tl.where(addresses % VECTOR == 0, chunk.count // BLOCK * BLOCK, 0)
            for k in tl.static_range(len(KINDS)):
                if is_of_kind(row, KINDS, k):
                    s = scalars_of(all_scalars, arithmetic(KINDS[k][0]))
                    own_factor = factor.to(arithmetic(KINDS[k][0]))
                    preconditioner_blocks(
                        call, row, grad, chunk, place, s, own_factor, 0, whole,
                        UPDATE, KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], KINDS[k][4], WIDE, BLOCK,
                        True,
                    )  # fmt: skip
                    preconditioner_blocks(
                        call, row, grad, chunk, place, s, own_factor, whole, chunk.count,
                        UPDATE, KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], KINDS[k][4], WIDE, TAIL,
                        False,
                    )  # fmt: skip
