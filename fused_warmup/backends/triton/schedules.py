"""Schedules inside Triton kernels, for a block of groups; the statements of ``csrc/schedules.h``."""

from __future__ import annotations

import triton
import triton.language as tl

from ...plan.structs import AVERAGE_KINDS
from ...schedules import SEGMENT_KINDS
from .memory import load_struct

WARMUP = tl.constexpr(SEGMENT_KINDS.index("warmup"))
CONSTANT = tl.constexpr(SEGMENT_KINDS.index("constant"))
COSINE = tl.constexpr(SEGMENT_KINDS.index("cosine"))
EXPONENTIAL = tl.constexpr(SEGMENT_KINDS.index("exponential"))
POLYNOMIAL = tl.constexpr(SEGMENT_KINDS.index("polynomial"))
INVERSE_SQRT = tl.constexpr(SEGMENT_KINDS.index("inverse_sqrt"))
TABLE = tl.constexpr(SEGMENT_KINDS.index("table"))
AVERAGE_NONE = tl.constexpr(AVERAGE_KINDS[None])
AVERAGE_SWA = tl.constexpr(AVERAGE_KINDS["SWA"])


@triton.jit
def power(x, y):
    """``x**y`` for x >= 0 and finite y."""
    positive = x > 0.0
    value = tl.exp(y * tl.log(tl.where(positive, x, 1.0)))
    return tl.where(positive | (y == 0.0), value, 0.0)


@triton.jit
def segment_value(segment, t):
    """Multiplier of a segment at its own step ``t >= 0``; after the segment its end value is kept."""
    start = segment.start
    end = segment.end
    shape = segment.shape
    kind = segment.kind
    # all kinds are computed: replace divisors that may be 0 where the result is unused
    inverse_sqrt = start / tl.sqrt(1.0 + t.to(tl.float64) / tl.where(kind == INVERSE_SQRT, shape, 1.0))
    t = tl.where(kind == WARMUP, t + 1, t)
    over = (segment.steps > 0) & (t >= segment.steps)
    t = tl.where(over, segment.steps, t)
    x = tl.where(segment.steps > 0, t.to(tl.float64) / tl.maximum(segment.steps, 1).to(tl.float64), 0.0)
    value = start + (end - start) * x
    value = tl.where(kind == CONSTANT, start, value)
    value = tl.where(
        kind == COSINE, start + (end - start) * (0.5 * (1.0 - tl.cos(3.141592653589793 * x))), value
    )
    ratio = tl.where(kind == EXPONENTIAL, end, 1.0) / tl.where(kind == EXPONENTIAL, start, 1.0)
    value = tl.where(kind == EXPONENTIAL, start * power(ratio, x), value)
    value = tl.where(kind == POLYNOMIAL, start + (end - start) * (1.0 - power(1.0 - x, shape)), value)
    listed = (kind == TABLE) & ~over
    place = (segment.table + t * 8).to(tl.pointer_type(tl.float64))
    value = tl.where(listed, tl.load(place, mask=listed, other=0.0), value)
    return tl.where(kind == INVERSE_SQRT, inverse_sqrt, tl.where(over, end, value))


@triton.jit
def multiplier(segments, count, t):
    """Multiplier at step ``t`` of chains of segments; an empty chain is the constant 1."""
    i = tl.zeros_like(count)
    for j in range(1, tl.max(count)):
        begun = j < count
        begin = load_struct(segments, j, "Segment", begun).begin
        i = tl.where(begun & (t >= begin), j, i)
    segment = load_struct(segments, i, "Segment", count > 0)
    return tl.where(count == 0, 1.0, segment_value(segment, t - segment.begin))


@triton.jit
def is_averaged(kind, start, every, step):
    """Return whether update number ``step`` enters the average."""
    return (kind != AVERAGE_NONE) & (step >= start) & ((step - start) % every == 0)


@triton.jit
def average_weight(kind, decay, n_averaged):
    """Weight of the parameter in its average, which it enters as value number ``n_averaged``."""
    n = tl.maximum(n_averaged, 1)
    ema = tl.where(n_averaged == 1, 1.0, 1.0 - decay)
    return tl.where(kind == AVERAGE_SWA, 1.0 / n.to(tl.float64), ema)
