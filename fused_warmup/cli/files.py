"""Files that a command writes: tried before its work, and never its input."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from .. import _checks as check


class PathType(click.Path):
    """A path, as a ``Path``; a character that no system takes is an error of the user."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value as a path."""
        if "\0" in str(value):
            self.fail(f"must not have the character NUL in it, got {str(value)!r}.", param, ctx)
        return super().convert(value, param, ctx)


PATH = PathType(path_type=Path)


@contextmanager
def tried(owner: str, option: str, path: Path | None, *others: Path | None) -> Iterator[None]:
    """Try to write a file before the block, and leave none that the block did not write.

    What a file held stays in it until it is written.

    Args:
        owner: Name for messages.
        option: Where the path comes from, for messages.
        path: The file; None does nothing.
        others: Input and other outputs, which it must not be.

    Yields:
        Nothing.

    Raises:
        ValueError: If it cannot be written, or is one of the others.
    """
    if path is None:
        yield
        return
    for other in others:
        if other is not None and _same(path, other):
            check.fail(owner, option, f"be another file than {other}", str(path))
    target = Path(os.path.realpath(path))
    try:
        made = not target.exists()
        # a pipe or a device would take the trial for its data
        if made or target.is_file() or target.is_dir():
            target.open("ab").close()
    except OSError as error:
        check.fail(owner, option, f"be a file that can be written: {error.strerror}", str(path))
    try:
        yield
    finally:
        with suppress(OSError):
            if made and target.stat().st_size == 0:
                target.unlink()


def _same(path: Path, other: Path) -> bool:
    """Return whether two paths are one file, by whichever links."""
    if os.path.realpath(path) == os.path.realpath(other):
        # a terminal or the null device can be both
        return path.is_file() or not path.exists()
    with suppress(OSError):
        return path.is_file() and os.path.samefile(path, other)
    return False


@contextmanager
def folder_of(owner: str, option: str, folder: Path) -> Iterator[None]:
    """Make a folder before the block, and take it away again if the block leaves it empty.

    Args:
        owner: Name for messages.
        option: Where the path comes from, for messages.
        folder: The folder; its parents are made too.

    Yields:
        Nothing.

    Raises:
        ValueError: If it cannot be made.
    """
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(made)
        check.fail(owner, option, f"be a folder or a name that is free: {error.strerror}", str(folder))
    try:
        yield
    finally:
        _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the inner one first; one that is not empty stays, and with it those around it."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no interrupt end the block: it writes what would be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def picture_kind(owner: str, option: str, path: Path | None) -> str:
    """Return the kind of picture that the end of a name stands for; PNG for a name without an end.

    Args:
        owner: Name for messages.
        option: Where the path comes from, for messages.
        path: The file, or None.

    Returns:
        The kind, as matplotlib calls it.

    Raises:
        ValueError: If matplotlib writes no such pictures.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kind = path.suffix.lstrip(".").lower() if path is not None else ""
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    return check.one_of(owner, f"the end of {option}", kind or "png", known)


def write_picture(figure: Any, path: Path, kind: str = "png", **options: Any) -> None:
    """Write a figure; a file is only touched by one that can be drawn."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=100, **options)
    path.write_bytes(drawn.getvalue())
