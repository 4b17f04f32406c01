"""Norms of the gradients and sums over channels; the statements of ``csrc/reduce.h``."""

from __future__ import annotations

import triton
import triton.language as tl

from ...plan.chunks import PIECE as _PIECE
from .memory import VECTOR, Partial, load_struct

PIECE = tl.constexpr(_PIECE)
# elements of 16 bits that fill a vector, a multiple of what longer elements need
GRAIN = tl.constexpr(8)
# numbers of this type are summed in pairs
SINGLE = tl.constexpr(tl.float32)


@triton.jit
def zero_pair(LANES: tl.constexpr):
    """A pair of zero for every lane, see ``FloatPair`` in ``csrc/reduce.h``."""
    return tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)


@triton.jit
def replace_sum(pair, rounded, a, b):
    """Replace the sums by those that the products ``a * b`` have been added to, and keep the errors."""
    added = rounded - pair[0]
    old = rounded - added
    return rounded, pair[1] + (tl.fma(a, b, -added) + (pair[0] - old))


@triton.jit
def add_square(pair, x):
    """Add squares to the sums of a pair."""
    return replace_sum(pair, tl.fma(x, x, pair[0]), x, x)


@triton.jit
def add(pair, x):
    """Add numbers to the sums of a pair."""
    return replace_sum(pair, pair[0] + x, x, 1.0)


@triton.jit
def value(pair):
    """Sums of a pair in double."""
    return pair[0].to(tl.float64) + pair[1].to(tl.float64)


@triton.jit
def fits_pairs(part):
    """Return whether pairs have the range for the norms of a chunk; a sum that overflowed is not a number."""
    # what underflows, or is flushed to zero, takes less than 2^-28 of such a sum away
    return (part.l2_sq >= 2.0**-80) | (part.l1 == 0.0)


@triton.jit
def zero_lanes(LANES: tl.constexpr):
    """Partial sums of zero for every lane."""
    zero = tl.zeros((LANES,), tl.float64)
    return Partial(l1=zero, l2_sq=zero, nonfinite=tl.zeros((LANES,), tl.int64))


@triton.jit
def zero_norms(BLOCK: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr):
    """Norm sums of zero for every lane of a block: pairs for float32 gradients, else in double."""
    if C == SINGLE:
        # threads hold four neighbours of whole blocks only, and must not exchange the others
        LANES: tl.constexpr = BLOCK // 4 if WHOLE else BLOCK
        return zero_pair(LANES), zero_pair(LANES)
    else:
        return zero_lanes(BLOCK // 4)


@triton.jit
def zero_part():
    """A partial sum of zero."""
    zero = tl.full((), 0.0, tl.float64)
    return Partial(l1=zero, l2_sq=zero, nonfinite=tl.full((), 0, tl.int64))


@triton.jit
def fours(x):
    """Four neighbours each: one thread holds them, so this needs no exchange between threads."""
    even, odd = tl.split(tl.reshape(x, (x.numel // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def sum_fours(x):
    """Sum four neighbours each."""
    return tl.sum(tl.reshape(x, (x.numel // 4, 4)), axis=1)


@triton.jit
def norm_terms(x):
    """Terms of the L1 norm and of the squared L2 norm."""
    return tl.abs(x), x * x


@triton.jit
def accumulate(sums, grad, WHOLE: tl.constexpr):
    """Add a block of gradients to the sums of its lanes, in pairs or in double."""
    if grad.dtype == SINGLE:
        l1, l2_sq = sums
        if WHOLE:
            l1 = add(l1, sum_fours(tl.abs(grad)))
            neighbours = fours(grad)
            for k in tl.static_range(4):
                l2_sq = add_square(l2_sq, neighbours[k])
        else:
            l1 = add(l1, tl.abs(grad))
            l2_sq = add_square(l2_sq, grad)
        return l1, l2_sq
    else:
        l1, l2_sq = norm_terms(grad)
        return Partial(
            l1=sums.l1 + sum_fours(l1),
            l2_sq=sums.l2_sq + sum_fours(l2_sq),
            nonfinite=sums.nonfinite + sum_fours(tl.where(tl.abs(grad) < float("inf"), 0, 1)),
        )


@triton.jit
def combine(a, b):
    """Add two partial sums."""
    return Partial(l1=a.l1 + b.l1, l2_sq=a.l2_sq + b.l2_sq, nonfinite=a.nonfinite + b.nonfinite)


@triton.jit
def total(sums):
    """Sum over the lanes; a sum over elements that are not finite is not in the range of pairs."""
    if len(sums) == 2:
        none = tl.full((), 0, tl.int64)
        return Partial(l1=tl.sum(value(sums[0])), l2_sq=tl.sum(value(sums[1])), nonfinite=none)
    else:
        return Partial(l1=tl.sum(sums.l1), l2_sq=tl.sum(sums.l2_sq), nonfinite=tl.sum(sums.nonfinite))


@triton.jit
def combine_all(partials, count, LANES: tl.constexpr):
    """Add all partial sums in an order that depends only on their number."""
    sums = zero_lanes(LANES)
    for start in range(0, count, LANES):
        i = start + tl.arange(0, LANES)
        sums = combine(sums, load_struct(partials, i, "Partial", i < count))
    return total(sums)


@triton.jit
def first_piece(row, chunk):
    """Index of the first piece of a chunk."""
    each = tl.cdiv(row.channel_size, PIECE)
    channel = chunk.offset // row.channel_size
    return row.first_piece + channel * each + (chunk.offset - channel * row.channel_size) // PIECE


@triton.jit
def channel_part(row, chunk):
    """Number of elements of a channel in one chunk."""
    return tl.minimum(row.channel_size, chunk.count.to(tl.int64)).to(tl.int32)


@triton.jit
def count_pieces(chunk, part):
    """Number of pieces in a chunk of channel parts of length ``part``."""
    return chunk.count // part * tl.cdiv(part, PIECE)


@triton.jit
def tile_places(i, column, part, count, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Offsets of a tile of pieces in their chunk, and the mask of its elements."""
    of_channel = tl.cdiv(part, PIECE)
    channel = i // of_channel
    skipped = (i - channel * of_channel) * PIECE
    begin = channel * part + skipped
    length = tl.where(i < count, tl.minimum(part - skipped, PIECE), 0)
    if ALIGNED:
        begin = tl.multiple_of(begin, GRAIN)
        length = tl.multiple_of(length, GRAIN)
    columns = column + tl.arange(0, COLUMNS)
    return begin[:, None] + columns[None, :], columns[None, :] < length[:, None]


@triton.jit
def vector_part(addresses, chunk, part):
    """Return how many elements of a channel part, from its first on, may be read as vectors."""
    aligned = (addresses % VECTOR == 0) & (chunk.offset % GRAIN == 0)
    # behind a part of an odd length, the next one is not aligned
    aligned = aligned & ((part % GRAIN == 0) | (part == chunk.count))
    return tl.where(aligned, part // GRAIN * GRAIN, 0)


@triton.jit
def add_products(sums, products, mask):
    """Add the products of a tile to the sums of ``zero_products``."""
    added = ()
    for k in tl.static_range(len(sums)):
        x = tl.where(mask, products[k], 0.0)
        if x.shape[1] > sums[k].shape[1]:
            x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 4)), axis=2)
        added = added + (sums[k] + x,)
    return added


@triton.jit
def zero_products(PIECES: tl.constexpr, COLUMNS: tl.constexpr, N_SUMS: tl.constexpr, ALIGNED: tl.constexpr):
    """Sums of zero for every thread of a tile."""
    # threads hold four neighbours of aligned tiles only, and must not exchange the others
    LANES: tl.constexpr = COLUMNS // 4 if ALIGNED else COLUMNS
    sums = ()
    for _ in tl.static_range(N_SUMS):
        sums = sums + (tl.zeros((PIECES, LANES), tl.float64),)
    return sums


@triton.jit
def load_sums(column, index, known, N_SUMS: tl.constexpr):
    """Load the sums of pieces or chunks; zeros where the mask is off."""
    sums = ()
    for k in tl.static_range(N_SUMS):
        at = (column + (index * N_SUMS + k) * 8).to(tl.pointer_type(tl.float64))
        sums = sums + (tl.load(at, known, 0.0),)
    return sums


@triton.jit
def add_sums(a, b):
    """Add the sums of two parts."""
    added = ()
    for k in tl.static_range(len(a)):
        added = added + (a[k] + b[k],)
    return added


@triton.jit
def zero_sums(LANES: tl.constexpr, N_SUMS: tl.constexpr):
    """Sums of zero for every lane."""
    sums = ()
    for _ in tl.static_range(N_SUMS):
        sums = sums + (tl.zeros((LANES,), tl.float64),)
    return sums


@triton.jit
def combine_sums(column, first, each, known, LANES: tl.constexpr, N_SUMS: tl.constexpr):
    """Add up ``each`` consecutive sums of a column from ``first`` on."""
    sums = zero_sums(LANES, N_SUMS)
    for j in range(0, each):
        sums = add_sums(sums, load_sums(column, first + j, known, N_SUMS))
    return sums
