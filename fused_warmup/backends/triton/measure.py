"""The measure stage: L1 norm, squared L2 norm and non-finite count of the gradients, chunk by chunk.

No mathematics here: ``reduce.py`` has it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import (
    VECTOR,
    arithmetic,
    grad_of,
    item_size,
    load_block,
    load_struct,
    store_struct,
)
from .reduce import SINGLE, accumulate, combine, fits_pairs, total, zero_norms, zero_part


@triton.jit
def measure_blocks(
    part, address, first, last, DTYPE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """Add the elements from first to last of a chunk, in whole aligned blocks or in masked ones."""
    lanes = tl.arange(0, BLOCK)
    sums = zero_norms(BLOCK, C, WHOLE)
    for done in range(first, last, BLOCK):
        here = address + done * item_size(DTYPE)
        grad = load_block(here, lanes, lanes < last - done, DTYPE, C, WHOLE)
        sums = accumulate(sums, grad, WHOLE)
    return combine(part, total(sums))


@triton.jit
def within_range(part, address, i, DTYPE: tl.constexpr, TAIL: tl.constexpr):
    """Return the sums over a chunk, taken again in double if pairs have not the range for them."""
    if arithmetic(DTYPE) == SINGLE:
        if not fits_pairs(part):
            # loaded again, so that the pass before need not keep them in registers
            step = load_struct(address, 0, "Step")
            chunk = load_struct(step.chunks, i, "Chunk")
            grad = tl.load(grad_of(step, chunk.row)) + chunk.offset * item_size(DTYPE)
            part = measure_blocks(zero_part(), grad, 0, chunk.count, DTYPE, tl.float64, TAIL, False)
    return part


@triton.jit
def measure_chunk(
    address, step, i, chunk, row, grad, GRAD_DTYPES: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
):
    """Store the sums of one chunk of a gradient."""
    # chunks of channels of odd lengths are not aligned
    aligned = (grad % VECTOR == 0) & (chunk.offset % VECTOR == 0)
    whole = tl.where(aligned, chunk.count // BLOCK * BLOCK, 0)
    part = zero_part()
    for k in tl.static_range(len(GRAD_DTYPES)):
        if (grad != 0) & (row.grad_dtype == GRAD_DTYPES[k]):
            here = grad + chunk.offset * item_size(GRAD_DTYPES[k])
            C: tl.constexpr = arithmetic(GRAD_DTYPES[k])
            part = measure_blocks(part, here, 0, whole, GRAD_DTYPES[k], C, BLOCK, True)
            part = measure_blocks(part, here, whole, chunk.count, GRAD_DTYPES[k], C, TAIL, False)
            part = within_range(part, address, i, GRAD_DTYPES[k], TAIL)
    store_struct(step.partials, i, part, "Partial")


@triton.jit
def measure_kernel(step, GRAD_DTYPES: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Store the sums of every chunk of the gradients."""
    address = step.to(tl.int64)
    step = load_struct(address, 0, "Step")
    for i in range(tl.program_id(0), step.n_chunks, tl.num_programs(0)):
        chunk = load_struct(step.chunks, i, "Chunk")
        row = load_struct(step.rows, chunk.row, "Row")
        grad = tl.load(grad_of(step, chunk.row))
        measure_chunk(address, step, i, chunk, row, grad, GRAD_DTYPES, BLOCK, TAIL)
