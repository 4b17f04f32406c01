"""Per-step telemetry: a ring buffer on the device, its last rows on the host, and a CSV file on request."""

from __future__ import annotations

import atexit
import csv
import os
import warnings
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ..plan.structs import COUNTERS, PENDING_SCALARS, TELEMETRY

_CAPACITY = 1024
# 72 bytes each, together 1.2 MB: every step of most fine-tunings, and enough of a long run for a chart
_KEPT = 16_384
_CALLS = COUNTERS.index("calls")
_STEP, _SKIPPED = TELEMETRY.index("step"), TELEMETRY.index("skipped")


class Telemetry:
    """Record of one row per call of ``step()``, written by the decide stage.

    Rows are written to a ring buffer on the device. A full buffer is copied to the host without waiting for
    the device; ``latest``, ``history``, ``len`` and ``to_csv`` wait. The host keeps the last 16,384 rows, and
    a state dict the last 1,024, which a resumed run begins with; both keep all of them if the optimizer was
    made with ``telemetry="all"``. ``stream_to`` writes all of them to a file, and ``dropped`` counts those
    that are missing here.

    Columns, all float64:

    * ``step``: updates made so far, this one included (a skipped one is not).
    * ``lr``: learning rate really applied to the first parameter group.
    * ``grad_norm``, ``grad_norm_l1``: L2 and L1 norm of all gradients as they came, before clipping.
    * ``clip_coef``: factor applied to the gradients, 1 without clipping.
    * ``rect``: rectification of RAdam for the first parameter that has a gradient; 0 while it is not
      rectified, 1 for rules without one, NaN when nothing was updated.
    * ``skipped``: 1 if a non-finite gradient made the step do nothing.
    * ``loss``: what ``record_loss`` was given since the step before; NaN without one.
    * ``sharpness``: what ``record_sharpness`` was given since the step before, as a ``SharpnessProbe`` does;
      NaN without one.
    """

    # on the class, because an object whose construction failed is deleted too
    _stream: _CsvStream | None = None
    # the ring buffer that was read last, and its numbers if it is on the CPU
    _view: tuple[Tensor | None, np.ndarray | None] = (None, None)

    def __init__(self, enabled: bool = True, keep_all: bool = False) -> None:
        self.enabled, self._keep_all = enabled, keep_all
        self.ring_buffer: Tensor | None = None
        self.pending_scalars: Tensor | None = None
        self._counters: Tensor | None = None
        self._rows = _KeptRows(None if keep_all else _KEPT)
        # copies of the ring buffer under way, oldest first
        self._copies: deque[_Copy] = deque()
        # count of calls up to which rows were taken, and eager steps since the last copy
        self._calls = 0
        self._uncopied = 0
        # rows that were loaded, which the ring buffer lacks
        self._loaded = 0

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and deepcopy, without file and view; waits for the device."""
        self._collect()
        return {name: value for name, value in self.__dict__.items() if name not in ("_stream", "_view")}

    def __del__(self) -> None:
        """Complete the file."""
        self._complete_file()

    def allocate(self, device: torch.device, counters: Tensor | None = None) -> None:
        """Allocate the ring buffer and the pending scalars on a device, unless they are there."""
        if self.pending_scalars is None or self.pending_scalars.device != device:
            self.pending_scalars = torch.full(
                (len(PENDING_SCALARS),), torch.nan, dtype=torch.float64, device=device
            )
        if self.enabled and (self.ring_buffer is None or self.ring_buffer.device != device):
            ring_buffer = torch.zeros(_CAPACITY, len(TELEMETRY), dtype=torch.float64, device=device)
            self.ring_buffer = (
                ring_buffer if self.ring_buffer is None else ring_buffer.copy_(self.ring_buffer)
            )
        if counters is not None:
            self._counters = counters

    def advance(self) -> None:
        """Note that the device has written one more row."""
        if self.ring_buffer is None or self._counters is None:
            return
        self._uncopied += 1
        if self._uncopied == _CAPACITY:
            self._uncopied = 0
            self._copies.append(_Copy(self.ring_buffer, self._counters))
            self._take_copies()

    def record(self, name: str, value: Tensor | float) -> None:
        """Write a loss or sharpness into the next row, without waiting for the device."""
        assert self.pending_scalars is not None
        slot = self.pending_scalars[PENDING_SCALARS.index(name)]
        if isinstance(value, Tensor):
            slot.copy_(value.detach().reshape(()), non_blocking=True)
        else:
            slot.fill_(value)

    def __len__(self) -> int:
        """Return the number of kept rows; waits for the device."""
        if self._stream is not None:
            self._collect()
        return self._rows.length_after(min(self._wait() - self._calls, _CAPACITY))

    @property
    def dropped(self) -> int:
        """Number of updates whose rows are not kept; waits for the device.

        Rows are missing if the run is longer than the record, if it was resumed from a state dict that has
        the last rows only, or none, or if a CUDA graph was replayed too often between two calls. Skipped
        steps are not counted.
        """
        rows = self.rows()
        updates = int(rows[-1, _STEP]) if len(rows) else 0
        return max(0, updates - int((rows[:, _SKIPPED] == 0.0).sum()))

    def rows(self) -> Tensor:
        """Return the kept rows on the CPU, float64 of shape ``[steps, columns]``; waits for the device.

        Steps that a CUDA graph replays leave rows too. The buffer holds the last 1,024 of them; older rows
        are lost if more steps are replayed between two calls.
        """
        self._collect()
        return self._rows.last(None)

    def kept_rows(self) -> Tensor:
        """Return the rows that go into a state dict; waits for the device."""
        if self.ring_buffer is not None and self._stream is None and not self._keep_all:
            calls = self._wait()
            if not self._loaded or calls - self._loaded >= _CAPACITY:
                rows = _between(self._numbers(), max(0, calls - _CAPACITY), calls)
                return torch.from_numpy(rows.copy())
        self._collect()
        return self._rows.last(None if self._keep_all else _CAPACITY)

    def _numbers(self) -> np.ndarray:
        """Return the ring buffer on the host; on the CPU always the same view of it."""
        ring_buffer, (viewed, view) = self.ring_buffer, self._view
        assert ring_buffer is not None
        if view is None or viewed is not ring_buffer:
            view = _on_host(ring_buffer)
            if ring_buffer.device.type == "cpu":
                self._view = (ring_buffer, view)
        return view

    def _wait(self) -> int:
        """Wait for the device, take the rows of the copies, and return the count of calls."""
        if self.ring_buffer is None or self._counters is None:
            return self._calls
        if self.ring_buffer.is_cuda:
            torch.cuda.synchronize(self.ring_buffer.device)
        self._take_copies()
        calls: int = self._counters.tolist()[_CALLS]
        return calls

    def _collect(self) -> None:
        """Take all rows from the device; waits for it."""
        calls = self._wait()
        if self.ring_buffer is not None and calls > self._calls:
            self._take(_on_host(self.ring_buffer), calls)
        self._uncopied = 0

    def _take_copies(self) -> None:
        """Take the rows of the copies that are complete."""
        while self._copies and self._copies[0].is_complete():
            copy = self._copies.popleft()
            self._take(_on_host(copy.ring_buffer), copy.counters.tolist()[_CALLS])

    def _take(self, ring_buffer: np.ndarray, calls: int) -> None:
        """Keep and write the rows of a ring buffer on the host that were not taken before."""
        first = max(self._calls, calls - _CAPACITY)
        rows = _between(ring_buffer, first, calls)
        self._calls = calls
        self._rows.append(rows)
        self._write(rows)

    def load_rows(self, rows: Tensor) -> int:
        """Replace all rows by those of another record.

        Returns:
            The count of calls with which the next row follows them.
        """
        if self._stream is not None:
            self._collect()
        loaded = _on_host(rows.detach().to(torch.float64))
        self._rows = _KeptRows(None if self._keep_all else _KEPT)
        self._rows.append(loaded)
        self._copies.clear()
        self._uncopied = 0
        self._calls = self._loaded = len(rows)
        self._write(loaded, later=True)
        return self._calls

    def history(self) -> dict[str, Tensor]:
        """Return every column as a float64 CPU tensor of shape ``[len(self)]``; waits for the device."""
        return dict(zip(TELEMETRY, self.rows().T.contiguous(), strict=True))

    def latest(self) -> dict[str, float]:
        """Return the last row by column name; waits for the device.

        Raises:
            RuntimeError: If there is no row yet, or telemetry is off.
        """
        if self._stream is not None:
            self._collect()
        calls = self._wait()
        if self.ring_buffer is not None and calls > self._calls:
            # this row alone: copying the buffer takes ten times as long
            row = self.ring_buffer[(calls - 1) % _CAPACITY]
        elif self._rows.length_after(0):
            row = self._rows.last(1)[0]
        else:
            raise RuntimeError(
                "Telemetry: latest() must follow a step made with telemetry=True, got no rows."
            )
        return dict(zip(TELEMETRY, row.tolist(), strict=True))

    def to_csv(self, path: str | Path) -> None:
        """Write the kept rows to a CSV file with a header line; waits for the device.

        Args:
            path: File to write; numbers are written so that reading gives the same float64.
        """
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(TELEMETRY)
            writer.writerows(self.rows().tolist())

    def stream_to(self, path: str | Path | None) -> None:
        """Append every row, from the kept ones on, to a CSV file in the format of ``to_csv``.

        Steps do not wait for the device: they write full ring buffers that were copied. This method, every
        method that waits, ``state_dict()``, the deletion of the optimizer and the exit of the interpreter
        write the other rows. Copies of the optimizer do not stream.

        A file with the same columns is continued, so that a resumed run may call this before or after
        ``load_state_dict()``. Loaded rows up to the last step of the file are not repeated. Steps that are
        made again, because the file goes on after the checkpoint, are appended: the last row of a step
        counts, also for ``fw.tuning.refine_schedule``. An incomplete last line is removed.

        If the file cannot be written later, a warning says so and streaming ends.

        Args:
            path: File to write, by one process; None ends the streaming.

        Raises:
            RuntimeError: If telemetry is off.
            TypeError: If the path is not a path.
            ValueError: If the file exists and is not such a record.
            OSError: If the file cannot be opened. The stream stays what it was after any error.
        """
        if path is not None and not self.enabled:
            raise RuntimeError(
                "Telemetry: stream_to() needs an optimizer made with telemetry=True, got False."
            )
        if path is not None and not isinstance(path, (str, os.PathLike)):
            check.fail("Telemetry", "path", "be a path or None", path, error=TypeError)
        self._collect()
        stream = None if path is None else _CsvStream(Path(path))
        if self._stream is not None:
            self._stream.close()
        self._stream = stream
        if stream is not None:
            _STREAMING.add(self)
            self._write(_on_host(self._rows.last(None)), later=True)

    def _complete_file(self) -> None:
        """Write the last rows and close the file, in the process that opened it."""
        # a forked process cannot read a GPU
        if self._stream is not None and self._stream.is_owned():
            self.stream_to(None)

    def _write(self, rows: np.ndarray, *, later: bool = False) -> None:
        """Append rows to the file, if there is one; only those after its last step if ``later``."""
        stream = self._stream
        if stream is None:
            return
        if later:
            rows = rows[rows[:, _STEP] > stream.last_step]
        try:
            stream.write(rows)
        except OSError as error:
            # a step is no place to raise for a full disk
            self._stream = None
            stream.close()
            warnings.warn(f"Telemetry: rows are no longer streamed to {stream.path}: {error}.", stacklevel=2)


# records with a file, which the exit of the interpreter completes
_STREAMING: weakref.WeakSet[Telemetry] = weakref.WeakSet()


@atexit.register
def _complete_files() -> None:
    """Complete the files of all records."""
    for telemetry in list(_STREAMING):
        telemetry._complete_file()


def _on_host(tensor: Tensor) -> np.ndarray:
    """Return the numbers of a tensor, which share its memory if it is on the CPU."""
    values: np.ndarray = (tensor if tensor.device.type == "cpu" else tensor.cpu()).numpy()
    return values


def _between(ring_buffer: np.ndarray, first: int, end: int) -> np.ndarray:
    """Return the rows of a ring buffer from one count of calls to another, as a view where they adjoin."""
    begin = first % _CAPACITY
    beyond = begin + end - first - _CAPACITY
    if beyond <= 0:
        return ring_buffer[begin : begin + end - first]
    return np.concatenate([ring_buffer[begin:], ring_buffer[:beyond]])


class _KeptRows:
    """The last rows on the host, in a circular buffer that grows up to a limit.

    Args:
        limit: Number of rows to keep; None keeps all.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit, self.added = limit, 0
        self.buffer = np.zeros((0, len(TELEMETRY)))

    def length_after(self, more: int) -> int:
        """Return the number of rows after some more."""
        return self.added + more if self.limit is None else min(self.added + more, self.limit)

    def append(self, rows: np.ndarray) -> None:
        """Add rows; the oldest give way."""
        rows = rows[-self.limit :] if self.limit is not None else rows
        wanted = self.length_after(len(rows))
        if wanted > len(self.buffer):
            size = max(wanted, 2 * len(self.buffer))
            size = size if self.limit is None else min(size, self.limit)
            grown = np.zeros((size, len(TELEMETRY)))
            grown[: self.added] = self.buffer[: self.added]
            self.buffer = grown
        self.buffer[self._places(self.added, self.added + len(rows))] = rows
        self.added += len(rows)

    def last(self, count: int | None) -> Tensor:
        """Return a copy of the last rows, or of all with None."""
        count = self.length_after(0) if count is None else min(count, self.length_after(0))
        return torch.from_numpy(self.buffer[self._places(self.added - count, self.added)])

    def _places(self, first: int, end: int) -> np.ndarray:
        """Return the places of rows in the buffer."""
        places: np.ndarray = np.arange(first, end) % max(1, len(self.buffer))
        return places


class _Copy:
    """A copy of the ring buffer to the host, made without waiting.

    Attributes:
        ring_buffer: The copy; the device may still be writing it.
        counters: Counters at the time of the copy.
    """

    def __init__(self, ring_buffer: Tensor, counters: Tensor) -> None:
        self.ring_buffer, self.counters = _copied(ring_buffer), _copied(counters)
        self._event: torch.cuda.Event | None = None
        if ring_buffer.is_cuda:
            self._event = torch.cuda.current_stream(ring_buffer.device).record_event()

    def is_complete(self) -> bool:
        """Return whether the device has written the copy; does not wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]


class _CsvStream:
    """A CSV file that rows are appended to.

    Args:
        path: The file; one that exists is continued.

    Attributes:
        last_step: ``step`` of its last row; -1 without one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._process = path, os.getpid()
        # with one character per byte, lengths of lines are those in the file
        self._file = path.open("a+", newline="", encoding="latin-1")
        self._writer = csv.writer(self._file)
        try:
            self.last_step = self._read_end()
        except BaseException:
            self.close()
            raise

    def _read_end(self) -> float:
        """Return the step of the last row, after checking or writing the header line."""
        file = self._file
        file.seek(0)
        header = file.readline()
        if not header:
            self._writer.writerow(TELEMETRY)
            file.flush()
            return -1.0
        if header.rstrip("\r\n") != ",".join(TELEMETRY) or not header.endswith("\n"):
            self._fail("have the columns of a telemetry or be a new file", header)
        lines = deque(file, maxlen=2)
        incomplete = lines.pop() if lines and not lines[-1].endswith("\n") else ""
        last_step = self._step_of(lines[-1]) if lines else -1.0
        file.truncate(file.seek(0, os.SEEK_END) - len(incomplete))
        return last_step

    def _step_of(self, line: str) -> float:
        """Return the step of a row."""
        try:
            return [float(field) for field in line.split(",")][_STEP]
        except ValueError:
            self._fail("end with a row of numbers", line)

    def _fail(self, condition: str, line: str) -> NoReturn:
        """Raise ``ValueError`` for a line."""
        check.fail("Telemetry", "path", condition, str(self.path), f"It has the line {line[:200]!r}.")

    def is_owned(self) -> bool:
        """Return whether this process opened the file, rather than the one that forked it."""
        return os.getpid() == self._process

    def write(self, rows: np.ndarray) -> None:
        """Append rows and flush the file, in the process that opened it."""
        if len(rows) and self.is_owned():
            self._writer.writerows(rows.tolist())
            self._file.flush()
            self.last_step = float(rows[-1, _STEP])

    def close(self) -> None:
        """Close the file, also if its last rows cannot be written."""
        with suppress(OSError):
            self._file.close()


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy on the host without waiting; the device may still be writing it."""
    pinned = tensor.device.type != "cpu"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return copy.copy_(tensor, non_blocking=pinned)
