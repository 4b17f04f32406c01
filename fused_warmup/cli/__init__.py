"""The command ``fused-warmup``: doctor, bench, train, refine and report."""

from __future__ import annotations

import sys

EXTRAS = {"click", "matplotlib", "rich", "sklearn"}


def missing(name: str | None) -> str:
    """Return the sentence for a package that an extra brings."""
    return f"fused-warmup: {name} is not installed; pip install 'fused-warmup[cli,plot,data]'."


def main() -> None:
    """Run the command line; without the extra ``cli`` say how to get it."""
    try:
        from .group import cli
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        sys.exit(missing(error.name))
    cli(prog_name="fused-warmup")
