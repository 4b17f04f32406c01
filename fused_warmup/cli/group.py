"""The group of commands: each module is imported when its command runs, and an error is one line."""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import Any

import click

from .. import __version__
from . import EXTRAS, missing
from .words import complain

# the help stands here, so that listing the commands imports none of them
COMMANDS = {
    "doctor": "Show versions, the machine and which backends work.",
    "bench": "Measure the step against the torch lines it replaces.",
    "train": "Train a small model beside the torch lines it replaces.",
    "refine": "Refine a schedule from the gradient norms of an earlier run.",
    "report": "Redraw the chart and the table of a saved training.",
}

# 128 and the number of the signal
INTERRUPTED = 130


class OneLineError(click.ClickException):
    """An error of the user, shown as one line on stderr; the exit code is 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Print the message alone."""
        complain(self.message)


def sentence_of(command: str | None, error: Exception) -> str:
    """Return an error of a command as one sentence; those of this package are one."""
    if isinstance(error, click.ClickException):
        return f"fused-warmup: {error.format_message()}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS:
        return missing(error.name)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{command}: {error.filename} must be accessible, got: {error.strerror}."
    text = str(error)
    ours = isinstance(error, (ValueError, TypeError, RuntimeError)) and re.match(r"[\w-]+: ", text)
    return text if ours else f"{command}: {type(error).__name__}{': ' * bool(text)}{text}"


class LazyGroup(click.Group):
    """A group whose commands live in modules of the same name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands whose modules this installation has."""
        return [name for name in COMMANDS if importlib.util.find_spec(f"{__package__}.{name}")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command, or return None for an unknown one."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = getattr(importlib.import_module(f"{__package__}.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; whatever goes wrong becomes one line, and an interrupt the exit code of shells."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, OneLineError, BrokenPipeError):
            raise
        except (KeyboardInterrupt, click.Abort):
            complain("fused-warmup: interrupted.")
            ctx.exit(INTERRUPTED)
        except Exception as error:
            raise OneLineError(sentence_of(ctx.invoked_subcommand, error)) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fused-warmup")
def cli() -> None:
    """The optimizer stage of a PyTorch training step in one call, and the warmup it needs."""
