"""Checks that the state dicts of learning-rate controllers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .. import _checks as check


def checked_state(owner: str, state_dict: Mapping[str, Any], keys: Iterable[str], version: int) -> None:
    """Raise ``ValueError`` if keys are missing or the version is another one.

    Args:
        owner: Name of the class, for the message.
        state_dict: What is to be loaded.
        keys: Keys that it must have besides ``version``.
        version: Version that it must have.
    """
    missing = sorted({"version", *keys} - set(state_dict))
    if missing:
        check.fail(owner, "state_dict", "have the keys " + ", ".join(missing), sorted(state_dict))
    if state_dict["version"] != version:
        check.fail(owner, "state_dict['version']", f"be {version}", state_dict["version"])
