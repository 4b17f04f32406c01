"""The structs of ``csrc/table.h`` as numpy dtypes, field by field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .schedules import SEGMENT_KINDS, Schedule

MAX_STATES = 3

# codes of enum DType
DTYPES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
}
INIT_KINDS = {"zeros": 0, "grad": 1, "random": 2}
AVERAGE_KINDS = {None: 0, "EMA": 1, "SWA": 2}
# elements of one chunk: a hundred kilobytes or so of each stream, and enough chunks to share among threads
CHUNK = 1 << 15
# elements of a channel that are summed at a time
PIECE = 1 << 11
# elements that fill vectors of every kind, so that a chunk of whole channels ends where vectors do if it can
_ALIGNED = 16

_FIELDS: dict[str, list[tuple[str, str]]] = {
    "Row": [
        *((name, "u8") for name in ("param", "state0", "state1", "state2", "average", "counters")),
        ("numel", "i8"),
        *((name, "i4") for name in ("group", "dtype", "grad_dtype", "n_states", "initialized", "projects")),
        ("channel_size", "i8"),
        ("first_piece", "i8"),
        ("step_float", "u8"),
    ],
    "Chunk": [("offset", "i8"), ("count", "i4"), ("row", "i4")],
    "Hyper": [
        *(
            (name, "f8")
            for name in (
                "lr",
                "weight_decay",
                "beta1",
                "beta2",
                "eps",
                "momentum",
                "dampening",
                "rho_threshold",
                "init_scale",
                "delta",
                "wd_ratio",
                "min_norm",
                "max_norm",
                "trust_clip",
            )
        ),
        *(
            (name, "i4")
            for name in (
                "init",
                "decoupled",
                "maximize",
                "nesterov",
                "skip_unrectified",
                "bias_correction",
                "grad_averaging",
                "adapts",
                "decays_update",
                "lr_segment",
                "lr_segments",
                "decay_segment",
                "decay_segments",
                "reserved",
            )
        ),
    ],
    "Segment": [
        ("begin", "i8"),
        ("steps", "i8"),
        ("start", "f8"),
        ("end", "f8"),
        ("shape", "f8"),
        ("kind", "i4"),
        ("first_value", "i4"),
    ],
    "Rates": [("lr", "f8"), ("weight_decay", "f8")],
    "Scalars": [
        (name, "f8")
        for name in (
            "grad_scale",
            "weight_decay",
            "decay",
            "exp_avg_weight",
            "exp_avg_sq_weight",
            "step_size",
            "denom_scale",
            "eps",
            "momentum",
            "one_minus_dampening",
            "rect",
            "init_grad",
            "init_state",
            "nesterov",
            "moment_scale",
            "grad_gain",
            "update_decay",
        )
    ],
    "Sphere": [
        ("norm", "u8"),
        *((name, "f8") for name in ("radius", "factor")),
        *((name, "i8") for name in ("first_chunk", "n_chunks")),
    ],
    "Partial": [("l1", "f8"), ("l2_sq", "f8"), ("nonfinite", "i8")],
    "Counters": [("step", "i8"), ("calls", "i8")],
    "RowCounters": [("step", "i8"), ("n_averaged", "i8"), ("average_weight", "f8")],
    "Slots": [("loss", "f8"), ("sharpness", "f8")],
    "Telemetry": [
        (name, "f8")
        for name in (
            "step",
            "lr",
            "grad_norm",
            "grad_norm_l1",
            "clip_coef",
            "rect",
            "skipped",
            "loss",
            "sharpness",
        )
    ],
    "Verdict": [
        ("t", "i8"),
        *((name, "f8") for name in ("grad_norm", "grad_norm_l1", "clip_coef", "unscale", "rect")),
        ("skipped", "i4"),
        ("finished_blocks", "i4"),
    ],
    "Step": [
        *(
            (name, "u8")
            for name in (
                "rows",
                "grads",
                "chunks",
                "hypers",
                "segments",
                "values",
                "rates",
                "scalars",
                "partials",
                "counters",
                "slots",
                "telemetry",
            )
        ),
        *((name, "i8") for name in ("n_rows", "n_chunks", "n_groups", "telemetry_capacity")),
        *((name, "f8") for name in ("max_grad_norm", "init_norm_sq", "average_decay")),
        *((name, "i8") for name in ("average_start", "average_every")),
        *((name, "i4") for name in ("average_kind", "skip_nonfinite", "measure", "clip")),
        *((name, "u8") for name in ("verdict", "grad_scale", "found_inf", "sums", "radials")),
        *((name, "u8") for name in ("spheres", "squares")),
    ],
    "Span": [
        *((name, "u8") for name in ("param", "snapshot", "plus", "minus")),
        ("offset", "i8"),
        *((name, "i4") for name in ("dtype", "reserved")),
    ],
    "Algebra": [
        *((name, "u8") for name in ("spans", "chunks", "partials", "sums", "basis")),
        *((name, "u8") for name in ("out", "scale", "factors", "finished")),
        *((name, "i8") for name in ("n_chunks", "stride")),
        *((name, "i4") for name in ("n_basis", "doubles", "fresh", "narrow")),
    ],
    "Response": [
        *((name, "u8") for name in ("offsets", "edges", "l2_sq", "scale", "folded", "rates")),
        *((name, "i4") for name in ("doubles", "reserved")),
    ],
}

STRUCTS: dict[str, np.dtype] = {name: np.dtype(fields) for name, fields in _FIELDS.items()}

COUNTERS = STRUCTS["Counters"].names or ()
SLOTS = STRUCTS["Slots"].names or ()
RATES = STRUCTS["Rates"].names or ()
TELEMETRY = STRUCTS["Telemetry"].names or ()


@dataclass
class Hyper:
    """Hyper-parameters of one parameter group after validation; rates are per step, before schedules."""

    lr: float
    weight_decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    rho_threshold: float = 0.0
    init_scale: float = 1.0
    delta: float = 0.0
    wd_ratio: float = 0.0
    min_norm: float = 0.0
    max_norm: float = math.inf
    trust_clip: float = math.inf
    init: str = "zeros"
    decoupled: bool = False
    maximize: bool = False
    nesterov: bool = False
    skip_unrectified: bool = False
    bias_correction: bool = True
    grad_averaging: bool = True
    adapts: bool = True
    decays_update: bool = False
    sphere: bool = False
    radius: float = 0.0
    schedule: Schedule | None = None
    weight_decay_schedule: Schedule | None = None


@dataclass(frozen=True)
class Settings:
    """What holds for the whole optimizer at one step.

    Attributes:
        max_grad_norm: Norm to clip to, or None.
        skip_nonfinite: Leave everything as it is when a gradient is not finite.
        measure: Whether the update must know the norms beforehand.
        init_norm_sq: Squared norm of the random start of the second moments.
    """

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    measure: bool = False
    init_norm_sq: float = 0.0


def pack_hypers(hypers: Sequence[Hyper]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the columns Hyper, Segment and values of the groups; each schedule is packed once."""
    segments: list[tuple[float, ...]] = []
    values: list[float] = []
    places: dict[Schedule, tuple[int, int]] = {}

    def place(schedule: Schedule | None) -> tuple[int, int]:
        if schedule is None:
            return 0, 0
        if schedule not in places:
            places[schedule] = len(segments), len(schedule.segments)
            begin = 0
            for s in schedule.segments:
                kind = SEGMENT_KINDS.index(s.kind)
                segments.append((begin, s.steps or 0, s.start, s.end, s.shape, kind, len(values)))
                values.extend(s.values)
                begin += s.steps or 0
        return places[schedule]

    table = np.zeros(len(hypers), STRUCTS["Hyper"])
    plain = [
        name for name in STRUCTS["Hyper"].names or () if name in Hyper.__dataclass_fields__ and name != "init"
    ]
    for packed, h in zip(table, hypers, strict=True):
        for name in plain:
            packed[name] = getattr(h, name)
        packed["init"] = INIT_KINDS[h.init]
        packed["lr_segment"], packed["lr_segments"] = place(h.schedule)
        packed["decay_segment"], packed["decay_segments"] = place(h.weight_decay_schedule)
    return table, np.array(segments, STRUCTS["Segment"]), np.array(values, np.float64)


def chunks(sizes: Sequence[int] | np.ndarray, channel_sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the column Chunk: rows cut into pieces, in order.

    Args:
        sizes: Elements of each row.
        channel_sizes: Elements of each channel of a row. Channels of up to ``CHUNK`` elements are not cut,
            others are cut every ``CHUNK`` elements.
    """
    size, channel = np.asarray(sizes, np.int64), np.maximum(np.asarray(channel_sizes, np.int64), 1)
    whole = np.maximum(CHUNK // channel, 1)
    grain = _ALIGNED // np.gcd(channel, _ALIGNED)
    whole = np.where(whole >= grain, whole - whole % grain, whole)
    # what is cut together, and the chunks of it
    span = np.where(channel > CHUNK, channel, whole * channel)
    each = -(-span // CHUNK)
    counts = size // span * each + -(-(size % span) // CHUNK)
    row = np.repeat(np.arange(len(size)), counts)
    index = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = index // each[row] * span[row]
    column = np.zeros(len(row), STRUCTS["Chunk"])
    column["row"], column["offset"] = row, begin + index % each[row] * CHUNK
    column["count"] = np.minimum(np.minimum(begin + span[row], size[row]) - column["offset"], CHUNK)
    return column
