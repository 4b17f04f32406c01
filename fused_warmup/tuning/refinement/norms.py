"""Read recorded gradient norms from a telemetry, a CSV file or numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import _checks as check
from ...optim.telemetry import Telemetry
from .csv_table import read_csv

# first column in exports of experiment trackers
_STEPS = ("step", "_step")
# columns of a telemetry that tell whether it is complete
_RECORD = ("step", "skipped")
COLUMNS = {"sgd": "grad_norm", "adam": "grad_norm_l1"}


def read_norms(owner: str, source: Any, kind: str, column: str | None = None) -> np.ndarray:
    """Return one norm per step; rows of steps that were skipped are left out.

    If there are columns ``step`` and ``skipped``, as in a telemetry, every step must have a row. Of a step
    that a resumed run made again, the last row is taken.

    Args:
        owner: Name of the caller, for error messages.
        source: ``Telemetry``, its ``history()``, the path of a CSV file, or numbers of shape ``[steps]``.
        kind: ``"sgd"`` takes the L2 norm of a telemetry, ``"adam"`` the L1 norm.
        column: Name of another column to take.

    Returns:
        float64 array of ``[steps]``; entries may be zero or not finite.

    Raises:
        TypeError: If the source has another type.
        ValueError: If a column or the row of a step is missing, the file was cut short or is ambiguous, or a
            norm is negative.
        OSError: If the file cannot be read.
    """
    wanted = COLUMNS[check.one_of(owner, "kind", kind, tuple(COLUMNS))] if column is None else column
    if isinstance(source, Telemetry):
        source = source.history()
    if isinstance(source, (str, Path)):
        source = _read_csv(owner, Path(source), wanted, named=column is not None)
    if isinstance(source, Mapping):
        if wanted not in source:
            check.fail(owner, "norms", f"have the column {wanted!r}", list(source))
        norms = _array(owner, source[wanted])
        skipped = _array(owner, source["skipped"]) if "skipped" in source else np.zeros(len(norms))
        norms = norms[skipped == 0.0]
        if all(name in source for name in _RECORD):
            norms = norms[_last_rows(owner, _array(owner, source["step"])[skipped == 0.0])]
    else:
        norms = _array(owner, source)
    if norms.ndim != 1 or len(norms) < 2:
        check.fail(owner, "norms", "hold one number per step, of two steps at least", norms.shape)
    negative = np.flatnonzero(norms < 0.0)
    if len(negative):
        check.fail(owner, f"norms[{negative[0]}]", "be >= 0", float(norms[negative[0]]))
    if not np.isfinite(norms).any():
        check.fail(owner, "norms", "have an entry that is finite", "none")
    return norms


def _last_rows(owner: str, steps: np.ndarray) -> np.ndarray:
    """Return whether each row is the last one of its step; raise if a step has none."""
    smallest_from = np.minimum.accumulate(steps[::-1])[::-1]
    last = steps < np.append(smallest_from[1:], np.inf)
    rows = int(last.sum())
    if rows and steps[-1] > rows:
        check.fail(
            owner,
            "norms",
            f"have rows of all {int(steps[-1])} updates of the run",
            rows,
            'Make the optimizer with telemetry="all", or call opt.telemetry.stream_to(path) before the run '
            "and pass that path. The norms of a part of a run may be passed as numbers.",
        )
    return last


def _array(owner: str, numbers: Any) -> np.ndarray:
    """Return numbers as a float64 array."""
    if isinstance(numbers, torch.Tensor):
        numbers = numbers.detach().to("cpu", torch.float64).numpy()
    try:
        return np.asarray(numbers, dtype=np.float64)
    except (TypeError, ValueError):
        check.fail(owner, "norms", "be numbers, a telemetry or a path", numbers, error=TypeError)


def _read_csv(owner: str, path: Path, wanted: str, *, named: bool) -> dict[str, list[float]]:
    """Return the wanted column of a file with a header line, and ``step`` and ``skipped`` of a telemetry.

    A file without the wanted column may have a single column, or a column of steps followed by the norms.
    """
    table = read_csv(owner, path, (wanted,))
    header = table.header
    take = wanted.strip()
    if wanted not in header and not named:
        if len(header) == 1:
            take = header[0]
        elif header[0].lower() in _STEPS:
            take = header[1]
        if _is_number(take):
            table.fail(table.header_line, "have the names of the columns", header)
    columns = {wanted: table.numbers(take, "Name the one to take.")}
    if "skipped" in header:
        columns |= {name: table.numbers(name) for name in _RECORD if name in header}
    return columns


def _is_number(text: str) -> bool:
    """Return whether a column name is a number, as in a file without a header line."""
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True
