"""Optional dependencies of the command line; this module imports none of them."""

from __future__ import annotations

EXTRAS = {"click", "matplotlib", "rich", "sklearn"}


def missing_extra(name: str | None) -> str:
    """Return the message for a package of an extra that is not installed."""
    return f"fused-warmup: {name} is not installed; pip install 'fused-warmup[cli,plot,data]'."
