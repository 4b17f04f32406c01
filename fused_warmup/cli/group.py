"""The command group: imports a command when it runs and reports each error as one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .. import __version__
from .errors import OneLineError, error_message
from .words import print_error


def _doctor() -> click.Command:
    """Import ``fused-warmup doctor``."""
    from .doctor import doctor

    return doctor


def _bench() -> click.Command:
    """Import ``fused-warmup bench``."""
    from .bench.command import bench

    return bench


def _train() -> click.Command:
    """Import ``fused-warmup train``."""
    from .train.command import train

    return train


def _refine() -> click.Command:
    """Import ``fused-warmup refine``."""
    from .refine import refine

    return refine


def _report() -> click.Command:
    """Import ``fused-warmup report``."""
    from .train.report import report

    return report


# the help texts are repeated here so that listing the commands imports none of them
COMMANDS: dict[str, tuple[str, Callable[[], click.Command]]] = {
    "doctor": ("Show versions, the machine and which backends work.", _doctor),
    "bench": ("Measure the step against the torch lines it replaces.", _bench),
    "train": ("Train a small model beside the torch lines it replaces.", _train),
    "refine": ("Refine a schedule from the gradient norms of an earlier run.", _refine),
    "report": ("Redraw the chart and the table of a saved training.", _report),
}

# 128 plus the signal number of an interrupt
INTERRUPTED = 130


class LazyGroup(click.Group):
    """A click group that imports each command on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or return None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        _, load = COMMANDS[cmd_name]
        return load()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (text, _) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; turn errors into one line, and an interrupt into the exit code of shells."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, OneLineError, BrokenPipeError):
            raise
        except (KeyboardInterrupt, click.Abort):
            print_error("fused-warmup: interrupted.")
            ctx.exit(INTERRUPTED)
        except Exception as error:
            raise OneLineError(error_message(ctx.invoked_subcommand, error)) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fused-warmup")
def cli() -> None:
    """The optimizer stage of a PyTorch training step in one call, and the warmup it needs."""
