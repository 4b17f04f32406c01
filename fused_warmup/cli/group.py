"""The group of commands: each module is imported when its command runs, and an error is one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from .. import __version__
from . import EXTRAS, missing
from .words import complain


def _doctor() -> click.Command:
    from .doctor import doctor

    return doctor


def _bench() -> click.Command:
    from .bench.command import bench

    return bench


def _train() -> click.Command:
    from .train.command import train

    return train


def _refine() -> click.Command:
    from .refine import refine

    return refine


def _report() -> click.Command:
    from .train.report import report

    return report


# the help stands here, so that listing the commands imports none of them
COMMANDS: dict[str, tuple[str, Callable[[], click.Command]]] = {
    "doctor": ("Show versions, the machine and which backends work.", _doctor),
    "bench": ("Measure the step against the torch lines it replaces.", _bench),
    "train": ("Train a small model beside the torch lines it replaces.", _train),
    "refine": ("Refine a schedule from the gradient norms of an earlier run.", _refine),
    "report": ("Redraw the chart and the table of a saved training.", _report),
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
    """A group that imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command, or return None for an unknown one."""
        return COMMANDS[cmd_name][1]() if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, sentence) for name, (sentence, _) in COMMANDS.items()])

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
