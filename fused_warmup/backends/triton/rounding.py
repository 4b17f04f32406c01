"""Rounding of 16-bit parameters and states, and residues; the statements of ``csrc/rounding.h``.

A parameter is loaded as the value before an update and stored as the value after it, in the way of its mode,
which is part of its kind and so a constant of the kernel; so is the dtype of its states. The modes are
described in ``reference/rounding.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...plan.structs import DTYPES, ROUNDINGS
from ...reference.rounding import ROUNDS as _ROUNDS
from ...reference.rounding import SPHERE_PASS as _SPHERE_PASS
from ...reference.rounding import STATE_PASSES as _STATE_PASSES
from ...reference.rounding import UPDATE_PASS as _UPDATE_PASS
from .memory import (
    VECTOR,
    item_size,
    load_stored,
    load_struct,
    load_tile,
    narrow,
    storage,
    store_stored,
    store_tile,
    widen,
)

NEAREST, STOCHASTIC = tl.constexpr(ROUNDINGS["nearest"]), tl.constexpr(ROUNDINGS["stochastic"])
KAHAN, SPLIT = tl.constexpr(ROUNDINGS["kahan"]), tl.constexpr(ROUNDINGS["split"])
MASTER = tl.constexpr(ROUNDINGS["master"])
UPDATE_PASS, SPHERE_PASS = tl.constexpr(_UPDATE_PASS), tl.constexpr(_SPHERE_PASS)
# of the first state; those of the others follow
STATE_PASS = tl.constexpr(_STATE_PASSES[0])
ROUNDS = tl.constexpr(_ROUNDS)
BFLOAT16 = tl.constexpr(DTYPES[torch.bfloat16])
# elements that share the four words of one counter, 16 bits each
DRAWN = tl.constexpr(8)

_RESIDUES = {ROUNDINGS["kahan"]: tl.uint16, ROUNDINGS["split"]: tl.int16, ROUNDINGS["master"]: tl.float32}


@triton.constexpr_function
def has_residue(rounding: int) -> bool:
    """Whether a rounding mode keeps a residue."""
    return rounding in _RESIDUES


@triton.constexpr_function
def residue_type(rounding: int) -> Any:
    """Type in memory of the residues of a rounding mode."""
    return _RESIDUES[rounding]


@triton.constexpr_function
def residue_size(rounding: int) -> int:
    """Size of a residue in bytes."""
    return int(_RESIDUES[rounding].primitive_bitwidth // 8)


@triton.constexpr_function
def draws_bits(rounding: int) -> bool:
    """Whether a rounding mode needs random bits."""
    return rounding in (ROUNDINGS["stochastic"], ROUNDINGS["kahan"])


@triton.constexpr_function
def are_rounded(kinds: Any) -> bool:
    """Whether parameters of any kind are rounded in another mode than to nearest; the mode ends a kind."""
    return any(kind[-1] != ROUNDINGS["nearest"] for kind in kinds)


@triton.constexpr_function
def have_rounded_states(kinds: Any) -> bool:
    """Whether rows of any of ``Plan.kinds`` have states that are rounded."""
    return any(kind[3] == DTYPES[torch.bfloat16] for kind in kinds)


@triton.constexpr_function
def rounds_anything(kinds: Any) -> bool:
    """Whether an update rounds parameters or states of any of ``Plan.kinds``, other than to nearest."""
    return any(kind[3] == DTYPES[torch.bfloat16] or kind[4] != ROUNDINGS["nearest"] for kind in kinds)


@triton.jit
def is_of_kind(row, KINDS: tl.constexpr, k: tl.constexpr):
    """Return whether a row is of one of ``Plan.kinds``."""
    kind = (row.dtype == KINDS[k][0]) & (row.grad_dtype == KINDS[k][1]) & (row.n_states == KINDS[k][2])
    if are_rounded(KINDS):
        kind = kind & (row.rounding == KINDS[k][4])
    if have_rounded_states(KINDS):
        kind = kind & (row.state_dtype == KINDS[k][3])
    return kind


@triton.jit
def vector_alignment(row, ROUNDED: tl.constexpr):
    """Return a number that is a multiple of ``VECTOR`` where rounding allows whole blocks.

    There the residue is aligned, and the elements of a vector share a counter.
    """
    if ROUNDED:
        runs = tl.where(row.run == row.numel, 0, row.run | row.run_stride)
        return row.residue | (row.first_element | runs) * (VECTOR // DRAWN)
    else:
        return 0


# random bits


@triton.jit
def number_of(row, i):
    """Return the numbers of elements of a row in the whole tensor."""
    number = i
    if row.run != row.numel:
        # exact below 2**53, and a division of 64-bit integers would take 20 more registers
        index = (i.to(tl.float64) / row.run.to(tl.float64)).to(tl.int64)
        number = index * row.run_stride + (i - index * row.run)
    return row.first_element + number


@triton.jit
def draw(row, t, number, STAGE: tl.constexpr):
    """Return the four words that an element of the whole tensor shares with its neighbours.

    ``t`` counts the updates made before this one.
    """
    block = number // DRAWN
    # the bits below the number of the pass are those of the element
    a, b = block.to(tl.uint32), (block >> 32).to(tl.uint32) | (STAGE << 28)
    c, d = row.number.to(tl.uint32), t.to(tl.uint32)
    k, m = row.seed.to(tl.uint32), (row.seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        first, second = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, c = (second >> 32).to(tl.uint32) ^ b ^ k, (first >> 32).to(tl.uint32) ^ d ^ m
        b, d = second.to(tl.uint32), first.to(tl.uint32)
        k += 0x9E3779B9
        m += 0xBB67AE85
    return a, b, c, d


@triton.jit
def bits_of_elements(row, t, number, STAGE: tl.constexpr):
    """Return 16 random bits for each of any elements of the whole tensor."""
    a, b, c, d = draw(row, t, number, STAGE)
    place = number % DRAWN
    word = tl.where(place < 4, tl.where(place < 2, a, b), tl.where(place < 6, c, d))
    return (word >> (place % 2 * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def every_eighth(x):
    """Return every eighth element: one thread holds its neighbours, so this needs no exchange."""
    x, _ = tl.split(tl.reshape(x, (x.numel // 8, 2, 2, 2)))
    x, _ = tl.split(x)
    x, _ = tl.split(x)
    return x


@triton.jit
def bits_of_vectors(row, t, number, lanes, STAGE: tl.constexpr):
    """Return 16 random bits for each element of a whole block, from one draw for eight neighbours."""
    a, b, c, d = draw(row, t, number, STAGE)
    # the last dimension of a join is the one that was joined: first the high bit of the number of a word
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), lanes.shape)


@triton.jit
def drawn_numbers(row, place, lanes, ALIGNED: tl.constexpr):
    """Return the numbers of the elements of a block for which bits are drawn: each, or every eighth."""
    if ALIGNED:
        return number_of(row, place + every_eighth(lanes))
    else:
        return number_of(row, place + lanes)


@triton.jit
def drawn_bits(row, t, number, lanes, STAGE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return 16 random bits for each element of a block, see ``drawn_numbers``."""
    if ALIGNED:
        return bits_of_vectors(row, t, number, lanes, STAGE)
    else:
        return bits_of_elements(row, t, number, STAGE)


@triton.jit
def bits_of_block(key, place, lanes, STAGE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return 16 random bits for each element of a block that begins at ``place`` in a row.

    The key is the column of rows, the index of the row, and the number of updates made before this one.
    """
    rows, index, t = key
    # loaded again, so that a loop over blocks need not keep the keys of all rounds in registers
    row = load_struct(rows, index, "Row")
    return drawn_bits(row, t, drawn_numbers(row, place, lanes, ALIGNED), lanes, STAGE, ALIGNED)


# rounding


@triton.jit
def round_stochastically(x, bits, DTYPE: tl.constexpr):
    """Round float32 numbers up in magnitude with the probability of the fraction that is dropped.

    Beyond the largest finite number the result is the nearest one.
    """
    pattern = x.to(tl.uint32, bitcast=True)
    magnitude = pattern & 0x7FFFFFFF
    nearest = narrow(x, DTYPE)
    if DTYPE == BFLOAT16:
        return tl.where(magnitude < 0x7F7F0000, ((pattern + bits) >> 16).to(tl.uint16), nearest)
    else:
        is_small = magnitude < 0x38800000
        # in units of 2**-40, of which the smallest float16 has 2**16
        units = tl.where(is_small, magnitude, 0).to(tl.float32, bitcast=True) * 2.0**40
        small = (units.to(tl.int32).to(tl.uint32) + bits) >> 16
        normal = (magnitude - 0x38000000 + (bits & 0x1FFF)) >> 13
        rounded = tl.where(is_small, small, normal) | ((pattern & 0x80000000) >> 16)
        finite = rounded.to(tl.uint16).to(tl.float16, bitcast=True)
        return tl.where(magnitude < 0x477FE000, finite, nearest)


@triton.jit
def number(stored, DTYPE: tl.constexpr):
    """Convert stored elements of 16 bits to float32."""
    return widen(stored, DTYPE).to(tl.float32)


@triton.jit
def rounds_to(value, stored, DTYPE: tl.constexpr):
    """Return whether a value rounds to a parameter, to the bit."""
    return narrow(value, DTYPE).to(tl.uint16, bitcast=True) == stored.to(tl.uint16, bitcast=True)


@triton.jit
def checked_value(value, stored, DTYPE: tl.constexpr):
    """Return a value, or the parameter if it was written from outside: if the value rounds to another."""
    plain = number(stored, DTYPE)
    if DTYPE == BFLOAT16:
        holds = number(narrow(value, DTYPE), DTYPE) == plain
    else:
        # by bits, because not every GPU compares float16; the signs of zeros need not agree
        rounded, own = narrow(value, DTYPE).to(tl.uint16, bitcast=True), stored.to(tl.uint16, bitcast=True)
        holds = (rounded == own) | (((rounded | own) & 0x7FFF) == 0)
    return tl.where(holds, value, plain)


@triton.jit
def compensation_of(value, stored, bits, DTYPE: tl.constexpr):
    """Return what a rounded parameter lacks of its value, a bfloat16.

    It is rounded stochastically, so that updates below its own last digit are not lost either, unless the sum
    would round to another parameter.
    """
    plain = number(stored, DTYPE)
    lacking = tl.where(tl.abs(plain) < float("inf"), value - plain, 0.0)
    rounded = round_stochastically(lacking, bits, BFLOAT16)
    fits = rounds_to(plain + number(rounded, BFLOAT16), stored, DTYPE)
    truncated = (lacking.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
    return tl.where(fits, rounded, truncated)


@triton.jit
def load_split(stored, remainder):
    """Join a bfloat16 and the 16 bits below it."""
    # nothing rounds to 0 from below
    own = tl.where(((stored & 0x7FFF) == 0) & (remainder < 0), 0, remainder.to(tl.int32))
    return ((stored.to(tl.uint32) << 16) + own.to(tl.uint32)).to(tl.float32, bitcast=True)


@triton.jit
def store_split(value):
    """Return the bfloat16 nearest to a float32, halves away from 0, and the bits that it lacks."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x8000) >> 16
    is_nan = value != value
    remainder = tl.where(is_nan, 0, bits - (rounded << 16))
    return tl.where(is_nan, 0x7FC0, rounded).to(tl.uint16), remainder.to(tl.int16)


@triton.jit
def value_with(stored, residue, DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """Return the value of a parameter and its residue."""
    if ROUNDING == KAHAN:
        return checked_value(number(stored, DTYPE) + number(residue, BFLOAT16), stored, DTYPE)
    elif ROUNDING == SPLIT:
        return load_split(stored, residue)
    else:
        return checked_value(residue, stored, DTYPE)


@triton.jit
def round_value(value, bits, DTYPE: tl.constexpr, ROUNDING: tl.constexpr, C: tl.constexpr):
    """Return a value as it is stored: the parameter, its residue if the mode keeps one, and their value."""
    if ROUNDING == SPLIT:
        stored, residue = store_split(value)
        return stored, residue, value
    elif ROUNDING == MASTER:
        return narrow(value, DTYPE), value, value
    elif ROUNDING == KAHAN:
        stored = narrow(value, DTYPE)
        residue = compensation_of(value, stored, bits, DTYPE)
        return stored, residue, number(stored, DTYPE) + number(residue, BFLOAT16)
    elif ROUNDING == STOCHASTIC:
        stored = round_stochastically(value, bits, DTYPE)
        return stored, 0, number(stored, DTYPE)
    else:
        stored = narrow(value, DTYPE)
        return stored, 0, widen(stored, DTYPE).to(C)


# blocks


@triton.jit
def load_param(
    row,
    place,
    lanes,
    mask,
    DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    C: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Load a block of the values of a parameter; without a mask all of it."""
    at = row.param + place * item_size(DTYPE)
    stored = load_stored(at, lanes, mask, storage(DTYPE), ALIGNED)
    if has_residue(ROUNDING):
        at = row.residue + place * residue_size(ROUNDING)
        residue = load_stored(at, lanes, mask, residue_type(ROUNDING), ALIGNED)
        return value_with(stored, residue, DTYPE, ROUNDING)
    else:
        return widen(stored, DTYPE).to(C)


@triton.jit
def store_param(
    row,
    key,
    place,
    lanes,
    mask,
    value,
    DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    STAGE: tl.constexpr,
    C: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write a block of the values of a parameter, see ``load_param``; returns them as they are stored."""
    bits = 0
    if draws_bits(ROUNDING):
        bits = bits_of_block(key, place, lanes, STAGE, ALIGNED)
    stored, residue, value = round_value(value, bits, DTYPE, ROUNDING, C)
    store_stored(row.param + place * item_size(DTYPE), lanes, mask, stored, storage(DTYPE), ALIGNED)
    if has_residue(ROUNDING):
        at = row.residue + place * residue_size(ROUNDING)
        store_stored(at, lanes, mask, residue, residue_type(ROUNDING), ALIGNED)
    return value


@triton.jit
def load_states(
    row,
    place,
    lanes,
    mask,
    N_STATES: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    C: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Load a block of each state in the type of the arithmetic; without a mask all of it."""
    states = (row.state0, row.state1, row.state2)
    values = ()
    for j in tl.static_range(N_STATES):
        at = states[j] + place * item_size(STATE_DTYPE)
        values = values + (load_tile(at, lanes, mask, STATE_DTYPE, C, ALIGNED),)
    return values


@triton.jit
def state_bits(key, place, lanes, N_STATES: tl.constexpr, STATE_DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the random bits for a block of each state, see ``bits_of_block``; none if no state is rounded.

    They are drawn before the block is loaded, while the registers that it takes are free.
    """
    bits = ()
    if STATE_DTYPE == BFLOAT16:
        rows, index, t = key
        row = load_struct(rows, index, "Row")
        numbers = drawn_numbers(row, place, lanes, ALIGNED)
        for j in tl.static_range(N_STATES):
            bits = bits + (drawn_bits(row, t, numbers, lanes, STATE_PASS + j, ALIGNED),)
    return bits


@triton.jit
def store_states(
    row,
    bits,
    place,
    lanes,
    mask,
    values,
    N_STATES: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write a block of each state, see ``load_states``; returns the values as they are stored.

    The bits are those of ``state_bits``.
    """
    states = (row.state0, row.state1, row.state2)
    kept = ()
    for j in tl.static_range(N_STATES):
        at = states[j] + place * item_size(STATE_DTYPE)
        if STATE_DTYPE == BFLOAT16:
            stored = round_stochastically(values[j], bits[j], STATE_DTYPE)
            store_tile(at, lanes, mask, stored, STATE_DTYPE, ALIGNED)
            kept = kept + (number(stored, STATE_DTYPE),)
        else:
            store_tile(at, lanes, mask, values[j], STATE_DTYPE, ALIGNED)
            kept = kept + (values[j],)
    return kept
