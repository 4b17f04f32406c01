"""File format of a saved training: reading and validation."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ...tuning.refinement.csv_table import read_csv

FORMAT = "fused_warmup.train"
VERSION = 1

Record = dict[str, Any]
Columns = dict[str, list[float]]

COLUMNS = ("lr", "grad_norm", "clip_coef")


class ForeignError(ValueError):
    """Raised for a file that is not a saved training."""


@dataclass(frozen=True)
class Condition:
    """A condition on an entry.

    Attributes:
        text: The condition as text, for messages.
        holds: Returns whether a value meets it.
    """

    text: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class OptionalEntry:
    """An entry that may be null or missing.

    Attributes:
        shape: Shape of the entry if it is present.
    """

    shape: Any


def _is_number(value: Any) -> bool:
    """Return whether a value is a float, or an integer in the range of floats."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1023)


TEXT = Condition("be a printable text", lambda x: isinstance(x, str) and x.isprintable())
COUNT = Condition("be an integer >= 0", lambda x: type(x) is int and 0 <= x < 2**63)
POSITIVE = Condition("be an integer >= 1", lambda x: type(x) is int and 1 <= x < 2**63)
NUMBER = Condition("be a finite number", lambda x: _is_number(x) and math.isfinite(x))
SECONDS = Condition("be a number of seconds > 0", lambda x: _is_number(x) and 0 < x < math.inf)
# JSON has no NaN and no infinities; null stands for them
LOSS = Condition("be a number or null", lambda x: x is None or _is_number(x))
NAMES = Condition("be a list of printable texts", lambda x: isinstance(x, list) and all(map(TEXT.holds, x)))

_RUN = {
    "name": TEXT,
    "train_loss": LOSS,
    "validation": OptionalEntry({"loss": LOSS, "accuracy": NUMBER}),
    "averaged": OptionalEntry({"loss": LOSS, "accuracy": NUMBER}),
    "stage_seconds": SECONDS,
    "stage_median": SECONDS,
    "step_seconds": SECONDS,
    "losses": [LOSS],
}
_SETTINGS = {
    "model": TEXT,
    "optimizer": TEXT,
    "schedule": TEXT,
    "lr": NUMBER,
    "steps": POSITIVE,
    "warmup": COUNT,
    "batch_size": POSITIVE,
    # records of older versions lack them
    "dtype": OptionalEntry(TEXT),
    "param_rounding": OptionalEntry(TEXT),
    "state_dtype": OptionalEntry(TEXT),
    "max_grad_norm": NUMBER,
}
_EDGE = {
    "step": POSITIVE,
    "sharpness": LOSS,
    "preconditioned": LOSS,
    "threshold": LOSS,
    # records of older versions lack them
    **{
        f"{name}_{part}": OptionalEntry(NAMES if part == "flags" else LOSS)
        for name in ("sharpness", "preconditioned")
        for part in ("lo", "hi", "flags")
    },
}
_SEARCH = {
    "rates": [LOSS],
    "losses": [LOSS],
    "start": LOSS,
    "critical": LOSS,
    "critical_forwards": COUNT,
    "initial": LOSS,
    "initial_forwards": COUNT,
    "target": NUMBER,
}
# a dictionary describes an object, a list an array of equal entries
SHAPE = {
    "settings": _SETTINGS,
    "note": TEXT,
    "parameters": COUNT,
    "backend": TEXT,
    "ours": _RUN,
    "theirs": OptionalEntry(_RUN),
    "max_loss_difference": LOSS,
    "edge": OptionalEntry([_EDGE]),
    "search": OptionalEntry(_SEARCH),
    "versions": {"torch": TEXT},
    "machine": {"cpu": TEXT, "threads": POSITIVE},
}


def read(path: Path) -> tuple[Record, Columns]:
    """Read and validate a saved training.

    Args:
        path: The file ``<model>.json``; the telemetry is ``<model>.csv`` beside it.

    Returns:
        The record, and the columns of the telemetry by name.

    Raises:
        ForeignError: If the file is not a saved training.
        ValueError: If a file is truncated, an entry is invalid, or the two files do not belong together.
        OSError: If a file cannot be read.
    """
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ForeignError(f"report: {path} must be complete JSON, got: {error}.") from None
    found = (record.get("format"), record.get("version")) if isinstance(record, dict) else record
    if found != (FORMAT, VERSION):
        raise ForeignError(f"report: {path} must be of {(FORMAT, VERSION)}, got {reprlib.repr(found)}.")
    _require(path, record, SHAPE, "")
    for name, got, length in _lengths(record):
        if got != length:
            raise ValueError(f"report: {name} of {path} must have {length} entries, got {got}.")
    table = path.with_suffix(".csv")
    telemetry = read_csv("report", table, COLUMNS)
    steps, rows = len(record["ours"]["losses"]), len(telemetry.rows)
    if rows != steps:
        raise ValueError(f"report: {table} must have {steps} rows, as many as {path}, got {rows}.")
    return record, {name: telemetry.numbers(name) for name in COLUMNS}


def _lengths(record: Record) -> Iterator[tuple[str, int, int]]:
    """Yield name, length and required length of each list that must be as long as another one."""
    if record["theirs"] is not None:
        yield "theirs.losses", len(record["theirs"]["losses"]), len(record["ours"]["losses"])
    if record["search"] is not None:
        yield "search.losses", len(record["search"]["losses"]), len(record["search"]["rates"])


def _require(path: Path, value: Any, shape: Any, name: str) -> None:
    """Raise for the first invalid entry; set missing optional entries to None."""
    if isinstance(shape, OptionalEntry):
        if value is not None:
            _require(path, value, shape.shape, name)
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            _fail(path, name, "be an object", value)
        for key, part in shape.items():
            inner = f"{name}.{key}" if name else key
            if isinstance(part, OptionalEntry):
                value.setdefault(key)
            if key not in value:
                raise ValueError(f"report: {path} must be complete, got no {inner}.")
            _require(path, value[key], part, inner)
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            _fail(path, name, "be a list with entries", value)
        for i, item in enumerate(value):
            _require(path, item, shape[0], f"{name}[{i}]")
    elif not shape.holds(value):
        _fail(path, name, shape.text, value)


def _fail(path: Path, name: str, condition: str, value: Any) -> NoReturn:
    """Raise for an invalid entry."""
    raise ValueError(f"report: {name} of {path} must {condition}, got {reprlib.repr(value)}.")
