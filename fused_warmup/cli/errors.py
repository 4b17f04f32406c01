"""Errors of the commands, each reported as one line on stderr."""

from __future__ import annotations

import re
from typing import Any

import click

from .extras import EXTRAS, missing_extra
from .words import print_error


class OneLineError(click.ClickException):
    """An error of the user, shown as one line on stderr; the exit code is 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Print the message without click's usage lines."""
        print_error(self.message)


def error_message(command: str | None, error: Exception) -> str:
    """Return the one-line message for an error of a command."""
    if isinstance(error, click.ClickException):
        return f"fused-warmup: {error.format_message()}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS:
        return missing_extra(error.name)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{command}: {error.filename} must be accessible, got: {error.strerror}."
    text = str(error)
    # errors of this package name their owner already
    if isinstance(error, (ValueError, TypeError, RuntimeError)) and re.match(r"[\w-]+: ", text):
        return text
    kind = type(error).__name__
    return f"{command}: {kind}: {text}" if text else f"{command}: {kind}"
