"""Output files of a command: checked before its work, and never equal to its input."""

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
    """A click parameter type for ``Path`` that rejects NUL characters."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert the value to a path."""
        if "\0" in str(value):
            self.fail(f"must not have the character NUL in it, got {str(value)!r}.", param, ctx)
        return super().convert(value, param, ctx)


PATH = PathType(path_type=Path)


@contextmanager
def checked_output(owner: str, option: str, path: Path | None, *others: Path | None) -> Iterator[None]:
    """Check that a file can be written before the block; remove it afterwards if the block left it empty.

    An existing file keeps its contents until the block writes it.

    Args:
        owner: Name for messages.
        option: Option that gave the path, for messages.
        path: The file; None does nothing.
        others: Input and other outputs, which must be different files.

    Yields:
        Nothing.

    Raises:
        ValueError: If the file cannot be written, or is one of the others.
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
        # opening a pipe or a device would block, or reach its reader
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
    """Return whether two paths are the same file, symbolic and hard links included."""
    if os.path.realpath(path) == os.path.realpath(other):
        # a terminal or the null device may be input and output at once
        return path.is_file() or not path.exists()
    with suppress(OSError):
        return path.is_file() and os.path.samefile(path, other)
    return False


@contextmanager
def created_folder(owner: str, option: str, folder: Path) -> Iterator[None]:
    """Create a folder before the block, and remove it afterwards if it is empty.

    Args:
        owner: Name for messages.
        option: Option that gave the path, for messages.
        folder: The folder; its parents are created too.

    Yields:
        Nothing.

    Raises:
        ValueError: If the folder cannot be created.
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
    """Remove the empty ones of nested folders, innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def ignored_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C while the block writes results."""
    # signal handlers can only be set in the main thread, which also receives the interrupts
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def picture_format(owner: str, option: str, path: Path) -> str:
    """Return the image format of a file name; PNG if it has no extension.

    Args:
        owner: Name for messages.
        option: Option that gave the path, for messages.
        path: The file.

    Returns:
        The format in matplotlib's spelling.

    Raises:
        ValueError: If matplotlib does not support the format.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    extension = path.suffix.lstrip(".").lower() or "png"
    supported = sorted(FigureCanvasBase.get_supported_filetypes())
    return check.one_of(owner, f"the end of {option}", extension, supported)


def write_picture(figure: Any, path: Path, kind: str = "png", **options: Any) -> None:
    """Draw a figure in memory, then write the file."""
    # an error while drawing must not touch the file
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=100, **options)
    path.write_bytes(drawn.getvalue())
