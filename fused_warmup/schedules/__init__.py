"""Learning-rate schedules: as data, and driven by recorded losses."""

from .segments import (
    SEGMENT_KINDS,
    Schedule,
    Segment,
    constant,
    cosine,
    exponential,
    from_dict,
    from_json,
    inverse_sqrt,
    linear,
    parallel_warmup,
    polynomial,
    table,
    warmup,
)

__all__ = [
    "SEGMENT_KINDS",
    "Schedule",
    "Segment",
    "constant",
    "cosine",
    "exponential",
    "from_dict",
    "from_json",
    "inverse_sqrt",
    "linear",
    "parallel_warmup",
    "polynomial",
    "table",
    "warmup",
]
