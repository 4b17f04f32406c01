"""Argument checks: each returns the value or raises an error with owner, argument, condition and value."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

_T = TypeVar("_T")


def fail(
    owner: str, name: str, condition: str, value: object, hint: str = "", error: type[Exception] = ValueError
) -> NoReturn:
    """Raise ``<owner>: <name> must <condition>, got <value>.``, followed by an optional hint."""
    message = f"{owner}: {name} must {condition}, got {value!r}."
    raise error(f"{message} {hint}" if hint else message)


def on_host(value: torch.Tensor | np.ndarray, otherwise: Any) -> Any:
    """Return the numbers of a tensor or array on the host, ``otherwise`` for a tensor on another device."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if value.device.type != "cpu":
        return otherwise
    return value.item() if value.numel() == 1 else value.tolist()


def number(
    owner: str, name: str, value: Any, low: float = 0.0, high: float = math.inf, *, ends: str = "[)"
) -> float:
    """Return ``value`` as a finite float in an interval with the brackets ``ends``."""
    # most values, at every step of a schedule; an end that is 0 is a usual value and finite
    if type(value) is float and (low < value < high or (value == low == 0.0 and ends[0] == "[")):
        return value
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = on_host(value, value)
    if isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, torch.Tensor):
        fail(owner, name, "be a number", value, error=TypeError)
    try:
        x = float(value)
    except (TypeError, ValueError):
        fail(owner, name, "be a number", value, error=TypeError)
    except OverflowError:
        x = math.inf
    above = x >= low if ends[0] == "[" else x > low
    below = x <= high if ends[1] == "]" else x < high
    if not (above and below and math.isfinite(x)):
        if high != math.inf:
            condition = f"lie in {ends[0]}{low:g}, {high:g}{ends[1]}"
        else:
            condition = f"be finite and {'>=' if ends[0] == '[' else '>'} {low:g}"
        fail(owner, name, condition, value)
    return x


def whole(owner: str, name: str, value: Any, low: int = 0, high: int = 2**62 - 1) -> int:
    """Return ``value`` as an int from ``low`` to ``high``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        fail(owner, name, "be an integer", value, error=TypeError)
    n = int(value.__index__())
    if not low <= n <= high:
        fail(owner, name, f"be >= {low}" if n < low else f"be <= {high}", value)
    return n


def flag(owner: str, name: str, value: Any) -> bool:
    """Return ``value`` as a bool; the integers 0 and 1 are allowed."""
    if value is True or value is False:
        return value
    if not isinstance(value, (bool, int, np.bool_, np.integer)) or value not in (0, 1):
        fail(owner, name, "be True or False", value, error=TypeError)
    return bool(value)


def one_of(owner: str, name: str, value: Any, allowed: Collection[_T]) -> _T:
    """Return ``value`` if it is one of the allowed strings, or other constants of one type."""
    kind = type(next(iter(allowed)))
    if not isinstance(value, kind) or value not in allowed:
        fail(owner, name, "be one of " + ", ".join(map(repr, allowed)), value)
    return value


def betas(owner: str, value: Any) -> tuple[float, float]:
    """Return the two decay rates of the exponential averages, each in [0, 1)."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        value = value.tolist()
    is_sequence = isinstance(value, (tuple, list)) or (
        isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    )
    if not is_sequence or len(value) != 2:
        fail(owner, "betas", "be a pair of numbers", value, error=TypeError)
    return number(owner, "betas[0]", value[0], 0.0, 1.0), number(owner, "betas[1]", value[1], 0.0, 1.0)


def state_dict(owner: str, value: Mapping[str, Any], keys: Iterable[str], version: int) -> None:
    """Raise ``ValueError`` if a state dict lacks ``version`` or one of ``keys``, or has another version."""
    missing = sorted({"version", *keys} - set(value))
    if missing:
        fail(owner, "state_dict", "have the keys " + ", ".join(missing), sorted(value))
    if value["version"] != version:
        fail(owner, "state_dict['version']", f"be {version}", value["version"])
