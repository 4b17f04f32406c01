"""Structs of ``csrc/table.h`` as numpy dtypes, with the same fields in the same order."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch

from ..reference import rules
from ..reference.rounding import MODES

MAX_STATES = 3
# counts are below this
COUNT_LIMIT = 2**62

# codes of enum DType
DTYPES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
}
INIT_KINDS = {"zeros": 0, "grad": 1, "random": 2}
# bits of enum Stage
MEASURE_STAGE, UPDATE_STAGE, LAYER_STAGE, FINISH_STAGE, ALL_STAGES = 1, 2, 4, 8, 15
ROUNDINGS = {mode: code for code, mode in enumerate(MODES)}
AVERAGE_KINDS = {None: 0, "EMA": 1, "SWA": 2}


def _fields_of(cls: type) -> list[tuple[str, str]]:
    """Return the fields of a dataclass of the rules as those of a struct."""
    return [(field.name, "f8" if field.type == "float" else "i4") for field in fields(cls)]


_FIELDS: dict[str, list[tuple[str, str]]] = {
    "Row": [
        *((name, "u8") for name in ("param", "state0", "state1", "state2", "average", "counters")),
        ("numel", "i8"),
        *((name, "i4") for name in ("group", "dtype", "grad_dtype", "n_states", "initialized", "projects")),
        ("channel_size", "i8"),
        ("first_piece", "i8"),
        ("step", "u8"),
        ("n_averaged", "u8"),
        ("first_chunk", "i8"),
        ("n_chunks", "i8"),
        *((name, "u8") for name in ("residue", "seed")),
        *((name, "i8") for name in ("first_element", "run", "run_stride")),
        *((name, "i4") for name in ("rounding", "number", "state_dtype", "reserved")),
    ],
    "Spread": [
        *((name, "i8") for name in ("numel", "channels", "first_channel", "first_total")),
        *((name, "i4") for name in ("slot", "is_cut")),
    ],
    "Chunk": [("offset", "i8"), ("count", "i4"), ("row", "i4")],
    "Hyper": [
        *_fields_of(rules.Hyper),
        *((name, "i4") for name in ("n_lr_segments", "n_decay_segments", "reserved")),
        ("lr_segments", "u8"),
        ("decay_segments", "u8"),
    ],
    "Segment": [
        ("begin", "i8"),
        ("steps", "i8"),
        ("start", "f8"),
        ("end", "f8"),
        ("shape", "f8"),
        ("table", "u8"),
        ("kind", "i4"),
        ("reserved", "i4"),
    ],
    "Rates": [("lr", "f8"), ("weight_decay", "f8")],
    "Scalars": _fields_of(rules.Scalars),
    "LayerProjection": [("coef", "f8"), ("view", "i4"), ("reserved", "i4")],
    "Sphere": [
        ("norm", "u8"),
        *((name, "f8") for name in ("radius", "factor")),
        *((name, "i8") for name in ("first_chunk", "n_chunks")),
    ],
    "Partial": [("l1", "f8"), ("l2_sq", "f8"), ("nonfinite", "i8")],
    "Counters": [("step", "i8"), ("calls", "i8")],
    "RowCounters": [("step", "i8"), ("average_weight", "f8")],
    "PendingScalars": [("loss", "f8"), ("sharpness", "f8")],
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
    "StepDecision": [
        ("t", "i8"),
        *((name, "f8") for name in ("grad_norm", "grad_norm_l1", "clip_coef", "unscale", "rect")),
        ("skipped", "i4"),
        ("finished", "i4"),
        *((name, "i4") for name in ("decided", "summed")),
    ],
    "Step": [
        *(
            (name, "u8")
            for name in (
                "rows",
                "grads",
                "chunks",
                "hypers",
                "rates",
                "scalars",
                "partials",
                "counters",
                "pending_scalars",
                "telemetry",
            )
        ),
        *((name, "i8") for name in ("n_rows", "n_chunks", "n_groups", "telemetry_capacity")),
        *((name, "f8") for name in ("max_grad_norm", "init_norm_sq", "average_decay")),
        *((name, "i8") for name in ("average_start", "average_every")),
        *((name, "i4") for name in ("average_kind", "skip_nonfinite", "measure", "clip")),
        *((name, "u8") for name in ("decision", "grad_scale", "found_inf", "sums", "projection_coefs")),
        *((name, "u8") for name in ("chunk_sums", "layer_projections")),
        *((name, "u8") for name in ("spheres", "squares", "tile_partials")),
        *((name, "i8") for name in ("n_tiles", "block_threads")),
        *((name, "u8") for name in ("totals", "spreads")),
        ("n_slots", "i8"),
    ],
    "TensorExtent": [
        ("address", "u8"),
        *((name, "i8") for name in ("numel", "reach")),
        *((name, "i4") for name in ("dtype", "ndim", "device_type", "device_id")),
    ],
    "TensorSlice": [
        *((name, "u8") for name in ("param", "snapshot", "plus", "minus")),
        ("offset", "i8"),
        *((name, "i4") for name in ("dtype", "rounding")),
        ("residue", "u8"),
    ],
    "VectorOp": [
        *((name, "u8") for name in ("slices", "chunks", "partials", "sums", "basis")),
        *((name, "u8") for name in ("out", "scale", "factors", "finished")),
        *((name, "i8") for name in ("n_chunks", "stride")),
        *((name, "i4") for name in ("n_basis", "doubles", "fresh", "narrow")),
    ],
    "PreconditionerOp": [
        *((name, "u8") for name in ("offsets", "thresholds", "l2_sq", "scale", "scaled", "rates")),
        *((name, "i4") for name in ("doubles", "reserved")),
    ],
}

STRUCTS: dict[str, np.dtype] = {name: np.dtype(fields) for name, fields in _FIELDS.items()}

COUNTERS = STRUCTS["Counters"].names or ()
ROW_COUNTERS = STRUCTS["RowCounters"].names or ()
PENDING_SCALARS = STRUCTS["PendingScalars"].names or ()
RATES = STRUCTS["Rates"].names or ()
TELEMETRY = STRUCTS["Telemetry"].names or ()
