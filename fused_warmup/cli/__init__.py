"""The command ``fused-warmup``: doctor, bench, train, refine and report."""

from __future__ import annotations

import sys

from .extras import EXTRAS, missing_extra


def main() -> None:
    """Run the command line, or exit with installation advice if the extra ``cli`` is not installed."""
    try:
        from .group import cli
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        sys.exit(missing_extra(error.name))
    cli(prog_name="fused-warmup")
