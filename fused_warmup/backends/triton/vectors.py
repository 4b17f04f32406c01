"""The vector operations of a sharpness measurement, one launch each: the statements of ``csrc/vectors.h``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...plan.structs import DTYPES as CODES
from ...plan.structs import ROUNDINGS
from ...plan.vector_tables import OPERATIONS
from .memory import (
    VECTOR,
    arithmetic,
    arrives_last,
    item_size,
    load_block,
    load_stored,
    load_struct,
    narrow,
    store_block,
    widen,
)
from .reduce import sum_fours
from .rounding import residue_size, residue_type, value_with

PERTURB = tl.constexpr(OPERATIONS.index("perturb"))
FINISH = tl.constexpr(OPERATIONS.index("finish"))
COMBINE = tl.constexpr(OPERATIONS.index("combine"))
# another pass: products of a vector that has been written with further basis vectors
PRODUCTS = tl.constexpr(len(OPERATIONS))
# basis vectors that one pass takes products with, as many as a warm start has
HELD = tl.constexpr(4)
# codes of the rounding modes that keep a residue
FIRST_RESIDUE, LAST_RESIDUE = tl.constexpr(ROUNDINGS["kahan"]), tl.constexpr(ROUNDINGS["master"])
_SIXTEEN_BITS = tuple(code for dtype, code in CODES.items() if dtype.itemsize == 2)


@triton.constexpr_function
def is_rounded(dtype: int) -> bool:
    """Return whether parameters of a dtype code have 16 bits."""
    return dtype in _SIXTEEN_BITS


@triton.constexpr_function
def is_mode_of(rounding: int, dtype: int) -> bool:
    """Return whether parameters of a 16-bit dtype code can be rounded in a mode."""
    return rounding != ROUNDINGS["split"] or dtype == CODES[torch.bfloat16]


@triton.jit
def load_value(param, tensor, own, lanes, mask, DTYPE: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr):
    """Value of a block of a snapshot, with the residue of its rounding mode."""
    value = param
    if is_rounded(DTYPE):
        value = value.to(tl.float32)
        own_mask = None if WHOLE else mask
        for ROUNDING in tl.static_range(FIRST_RESIDUE, LAST_RESIDUE + 1):
            if is_mode_of(ROUNDING, DTYPE):
                if tensor.rounding == ROUNDING:
                    at = tensor.residue + own * residue_size(ROUNDING)
                    residue = load_stored(at, lanes, own_mask, residue_type(ROUNDING), WHOLE)
                    value = value_with(narrow(value, DTYPE), residue, DTYPE, ROUNDING)
        value = value.to(C)
    return value


@triton.jit
def displaced(value, size, scale, v):
    """Value of a parameter after a step of length ``size``."""
    return tl.fma(size, scale * v, value)


@triton.jit
def stored(value, DTYPE: tl.constexpr, C: tl.constexpr):
    """Round a value to the dtype of its parameter."""
    if is_rounded(DTYPE):
        value = value.to(tl.float32)
    return widen(narrow(value, DTYPE), DTYPE).to(C)


@triton.jit
def moved(value, size, scale, v, DTYPE: tl.constexpr, C: tl.constexpr):
    """Distance of a rounded parameter between the two ends of a difference."""
    ahead = stored(displaced(value, size, scale, v), DTYPE, C)
    behind = stored(displaced(value, -size, scale, v), DTYPE, C)
    return ahead - behind


@triton.jit
def product_sum(sums, a, b):
    """Add the products of two blocks, in double precision."""
    return sums + sum_fours(a.to(tl.float64) * b.to(tl.float64))


@triton.jit
def factor(call, i):
    """Load factor number ``i`` of an operation."""
    return tl.load((call.factors + i * 8).to(tl.pointer_type(tl.float64)))


@triton.jit
def load_or(
    column,
    place,
    lanes,
    mask,
    other,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Load a block of a tensor, or a constant block if the tensor is not given."""
    value = tl.full(lanes.shape, other, C)
    if column != 0:
        value = load_block(column + place * item_size(DTYPE), lanes, mask, DTYPE, C, WHOLE)
    return value


@triton.jit
def walk(
    call,
    tensor,
    chunk,
    basis,
    n_basis,
    first,
    last,
    OPERATION: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Apply one operation to the elements from first to last of a chunk; returns the sums."""
    C: tl.constexpr = arithmetic(WIDE)
    size_of_c: tl.constexpr = item_size(WIDE)
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK // 4,), tl.float64)
    s0, s1, s2, s3, moved_sq, moved_by = zero, zero, zero, zero, zero, zero
    size = factor(call, 0).to(C)
    for done in range(first, last, BLOCK):
        own = chunk.offset + done
        place = tensor.offset + own
        mask = lanes < last - done
        scale = tl.full((BLOCK,), 1.0, C)
        if OPERATION != PRODUCTS:
            scale = load_or(call.scale, place, lanes, mask, 1.0, WIDE, C, WHOLE)
        out = tl.zeros((BLOCK,), C)
        if OPERATION <= FINISH:
            here = tensor.param + own * item_size(DTYPE)
            value = load_block(tensor.snapshot + own * item_size(DTYPE), lanes, mask, DTYPE, C, WHOLE)
            v = load_block(
                basis + (place + (n_basis - 1) * call.stride) * size_of_c, lanes, mask, WIDE, C, WHOLE
            )
        if OPERATION == PERTURB:
            value = load_value(value, tensor, own, lanes, mask, DTYPE, C, WHOLE)
            value = displaced(value, size, scale, v)
            if is_rounded(DTYPE):
                value = value.to(tl.float32)
            store_block(here, lanes, mask, narrow(value, DTYPE), DTYPE, WHOLE)
        if OPERATION == FINISH:
            out = load_or(tensor.plus, own, lanes, mask, 0.0, DTYPE, C, WHOLE)
            out -= load_or(tensor.minus, own, lanes, mask, 0.0, DTYPE, C, WHOLE)
            if call.narrow != 0:
                start = load_value(value, tensor, own, lanes, mask, DTYPE, C, WHOLE)
                way = moved(start, size, scale, v, DTYPE, C)
                # masked elements are zeros, which do not move
                moved_sq = product_sum(moved_sq, way, way)
                moved_by = product_sum(moved_by, way, out)
            if is_rounded(DTYPE):
                value = value.to(tl.float32)
            store_block(here, lanes, mask, narrow(value, DTYPE), DTYPE, WHOLE)
            out = out * scale
            store_block(call.out + place * size_of_c, lanes, mask, out, WIDE, WHOLE)
        if OPERATION == COMBINE:
            if call.fresh == 0:
                out = load_block(call.out + place * size_of_c, lanes, mask, WIDE, C, WHOLE) * size
            for b in range(0, n_basis):
                there = basis + (place + b * call.stride) * size_of_c
                out = tl.fma(factor(call, b + 1).to(C), load_block(there, lanes, mask, WIDE, C, WHOLE), out)
            store_block(call.out + place * size_of_c, lanes, mask, out, WIDE, WHOLE)
            moved_sq = product_sum(moved_sq, out, out)
            if call.scale != 0:
                moved_by = product_sum(moved_by, scale * out, scale * out)
        if OPERATION == PRODUCTS:
            out = load_block(call.out + place * size_of_c, lanes, mask, WIDE, C, WHOLE)
        if OPERATION != PERTURB:
            there = basis + place * size_of_c
            step = call.stride * size_of_c
            if n_basis > 0:
                s0 = product_sum(s0, load_block(there, lanes, mask, WIDE, C, WHOLE), out)
            if n_basis > 1:
                s1 = product_sum(s1, load_block(there + step, lanes, mask, WIDE, C, WHOLE), out)
            if n_basis > 2:
                s2 = product_sum(s2, load_block(there + 2 * step, lanes, mask, WIDE, C, WHOLE), out)
            if n_basis > 3:
                s3 = product_sum(s3, load_block(there + 3 * step, lanes, mask, WIDE, C, WHOLE), out)
    return tl.sum(s0), tl.sum(s1), tl.sum(s2), tl.sum(s3), tl.sum(moved_sq), tl.sum(moved_by)


@triton.jit
def walk_chunk(
    call,
    tensor,
    chunk,
    basis,
    n_basis,
    whole,
    OPERATION: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Apply one operation to a chunk: whole blocks up to ``whole``, then the rest; returns the sums."""
    a = walk(call, tensor, chunk, basis, n_basis, 0, whole, OPERATION, DTYPE, WIDE, BLOCK, True)
    b = walk(call, tensor, chunk, basis, n_basis, whole, chunk.count, OPERATION, DTYPE, WIDE, TAIL, False)
    totals = ()
    for k in tl.static_range(HELD + 2):
        totals = totals + (a[k] + b[k],)
    return totals


@triton.jit
def store_sums(line, sums, done, n_basis):
    """Write up to four products of a chunk, after the first ``done``."""
    for k in tl.static_range(HELD):
        tl.store((line + (done + k) * 8).to(tl.pointer_type(tl.float64)), sums[k], done + k < n_basis)


@triton.jit
def sum_chunks(call, k, width, LANES: tl.constexpr):
    """Sum number ``k`` over all chunks."""
    total = tl.zeros((LANES,), tl.float64)
    for start in range(0, call.n_chunks, LANES):
        i = start + tl.arange(0, LANES)
        place = (call.partials + (i.to(tl.int64) * width + k) * 8).to(tl.pointer_type(tl.float64))
        total += tl.load(place, i < call.n_chunks, 0.0)
    return tl.sum(total)


@triton.jit
def vector_kernel(
    call,
    OPERATION: tl.constexpr,
    KINDS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
):
    """Apply one operation to all chunks; the last program to finish adds up the sums of the chunks."""
    call = load_struct(call.to(tl.int64), 0, "VectorOp")
    width = call.n_basis + 2
    size_of_c: tl.constexpr = item_size(WIDE)
    for i in range(tl.program_id(0), call.n_chunks, tl.num_programs(0)):
        chunk = load_struct(call.chunks, i, "Chunk")
        tensor = load_struct(call.slices, chunk.row, "TensorSlice")
        addresses = (
            tensor.param | tensor.snapshot | tensor.plus | tensor.minus | call.basis | call.scale | call.out
        )
        addresses = addresses | tensor.residue | (tensor.offset * size_of_c)
        if call.n_basis > 1:
            addresses = addresses | (call.stride * size_of_c)
        whole = tl.where(addresses % VECTOR == 0, chunk.count // BLOCK * BLOCK, 0)
        line = call.partials + i * width * 8
        for k in tl.static_range(len(KINDS)):
            if tensor.dtype == KINDS[k]:
                sums = walk_chunk(
                    call,
                    tensor,
                    chunk,
                    call.basis,
                    call.n_basis,
                    whole,
                    OPERATION,
                    KINDS[k],
                    WIDE,
                    BLOCK,
                    TAIL,
                )
                if OPERATION != PERTURB:
                    store_sums(line, sums, 0, call.n_basis)
                    for n in tl.static_range(2):
                        place = line + (call.n_basis + n) * 8
                        tl.store(place.to(tl.pointer_type(tl.float64)), sums[HELD + n])
        if OPERATION != PERTURB:
            for done in range(HELD, call.n_basis, HELD):
                # other threads of this program wrote the vector
                tl.debug_barrier()
                basis = call.basis + done * call.stride * size_of_c
                sums = walk_chunk(
                    call, tensor, chunk, basis, call.n_basis - done, whole, PRODUCTS, WIDE, WIDE, BLOCK, TAIL
                )
                store_sums(line, sums, done, call.n_basis)
    if OPERATION != PERTURB:
        if arrives_last(call.finished.to(tl.pointer_type(tl.int32))):
            for k in range(0, width):
                tl.store(
                    (call.sums + k * 8).to(tl.pointer_type(tl.float64)), sum_chunks(call, k, width, LANES)
                )
            tl.store(call.finished.to(tl.pointer_type(tl.int32)), 0)
