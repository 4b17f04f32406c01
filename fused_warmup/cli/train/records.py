"""What a training saves, and whether a file is that."""

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
    """Raised for a file that no training wrote."""


@dataclass(frozen=True)
class Kind:
    """What an entry must be.

    Attributes:
        words: The condition, for messages.
        test: Whether a value meets it.
    """

    words: str
    test: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """An entry that may be null or missing.

    Attributes:
        shape: What it is otherwise.
    """

    shape: Any


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that a float can hold."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1023)


TEXT = Kind("be a printable text", lambda x: isinstance(x, str) and x.isprintable())
COUNT = Kind("be an integer >= 0", lambda x: type(x) is int and 0 <= x < 2**63)
SOME = Kind("be an integer >= 1", lambda x: type(x) is int and 1 <= x < 2**63)
NUMBER = Kind("be a finite number", lambda x: _is_number(x) and math.isfinite(x))
SECONDS = Kind("be a number of seconds > 0", lambda x: _is_number(x) and 0 < x < math.inf)
# null stands for what JSON cannot say
LOSS = Kind("be a number or null", lambda x: x is None or _is_number(x))

_RUN = {
    "name": TEXT,
    "train_loss": LOSS,
    "validation": Maybe({"loss": LOSS, "accuracy": NUMBER}),
    "averaged": Maybe({"loss": LOSS, "accuracy": NUMBER}),
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
    "steps": SOME,
    "warmup": COUNT,
    "batch_size": SOME,
    "max_grad_norm": NUMBER,
}
_EDGE = {"step": SOME, "sharpness": LOSS, "preconditioned": LOSS, "threshold": LOSS}
_SEARCH = {
    "rates": [LOSS],
    "losses": [LOSS],
    **dict.fromkeys(("start", "critical", "initial"), LOSS),
    **dict.fromkeys(("critical_forwards", "initial_forwards"), COUNT),
    "target": NUMBER,
}
SHAPE = {
    "settings": _SETTINGS,
    "note": TEXT,
    "parameters": COUNT,
    "backend": TEXT,
    "ours": _RUN,
    "theirs": Maybe(_RUN),
    "max_loss_difference": LOSS,
    "edge": Maybe([_EDGE]),
    "search": Maybe(_SEARCH),
    "versions": {"torch": TEXT},
    "machine": {"cpu": TEXT, "threads": SOME},
}


def read(path: Path) -> tuple[Record, Columns]:
    """Return what a training saved.

    Args:
        path: The file ``<model>.json``; the telemetry is ``<model>.csv`` beside it.

    Returns:
        The record, and the columns of the telemetry by name.

    Raises:
        ForeignError: If the file is of another kind.
        ValueError: If a file is cut short, an entry is not what a training writes, or the two files do not
            belong together.
        OSError: If a file cannot be read.
    """
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ForeignError(f"report: {path} must be complete JSON, got: {error}.") from None
    kind = (record.get("format"), record.get("version")) if isinstance(record, dict) else record
    if kind != (FORMAT, VERSION):
        raise ForeignError(f"report: {path} must be of {(FORMAT, VERSION)}, got {reprlib.repr(kind)}.")
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
    """Yield the name of each list that must be as long as another, its length and that of the other."""
    if record["theirs"] is not None:
        yield "theirs.losses", len(record["theirs"]["losses"]), len(record["ours"]["losses"])
    if record["search"] is not None:
        yield "search.losses", len(record["search"]["losses"]), len(record["search"]["rates"])


def _require(path: Path, value: Any, shape: Any, name: str) -> None:
    """Raise for the first entry that is not of its shape; what may be missing becomes None."""
    if isinstance(shape, Maybe):
        if value is not None:
            _require(path, value, shape.shape, name)
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            _misfit(path, name, "be an object", value)
        for key, part in shape.items():
            inner = f"{name}.{key}" if name else key
            if isinstance(part, Maybe):
                value.setdefault(key)
            if key not in value:
                raise ValueError(f"report: {path} must be complete, got no {inner}.")
            _require(path, value[key], part, inner)
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            _misfit(path, name, "be a list with entries", value)
        for i, item in enumerate(value):
            _require(path, item, shape[0], f"{name}[{i}]")
    elif not shape.test(value):
        _misfit(path, name, shape.words, value)


def _misfit(path: Path, name: str, condition: str, value: Any) -> NoReturn:
    """Raise for an entry, by its name."""
    raise ValueError(f"report: {name} of {path} must {condition}, got {reprlib.repr(value)}.")
