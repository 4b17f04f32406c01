"""Checks and conversion of states, counts and norms that were set from outside, by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .structs import COUNT_LIMIT
from .tensors import is_fake, local_tensor


def _unreadable(tensor: Tensor) -> str:
    """Return why the values of a tensor cannot be read, or nothing."""
    local = local_tensor(tensor)
    if is_fake(local):
        return "a FakeTensor"
    if local.is_meta:
        return "a meta tensor"
    if local.layout != torch.strided:
        return f"layout {local.layout}"
    return str(local.dtype) if local.is_complex() or local.is_quantized else ""


def _scalar(owner: str, name: str, condition: str, value: Any) -> float | int:
    """Return the one real number that a tensor, an array or a number is."""
    if isinstance(value, Tensor):
        reason = _unreadable(value)
        if reason:
            check.fail(owner, name, condition, reason, error=TypeError)
        if value.numel() != 1:
            check.fail(owner, name, condition, f"shape {tuple(value.shape)}")
        value = local_tensor(value).item()
    if isinstance(value, (str, bytes, complex)) or not hasattr(value, "__float__"):
        check.fail(owner, name, condition, value, error=TypeError)
    if hasattr(value, "__index__"):
        return int(value.__index__())
    try:
        return float(value)
    except (TypeError, ValueError):
        check.fail(owner, name, condition, value, error=TypeError)


def whole_count(owner: str, name: str, value: Any) -> int:
    """Return a count from an int, a float, or a tensor or array with one element.

    Raises:
        TypeError: If it is no real number.
        ValueError: If it is negative, not whole or not finite.
    """
    condition = "be a whole number >= 0"
    count = _scalar(owner, name, condition, value)
    if not 0 <= count < COUNT_LIMIT or count != int(count):
        check.fail(owner, name, condition, count)
    return int(count)


def checked_norm(owner: str, name: str, value: Any, device: torch.device) -> Tensor:
    """Return the norm of a group as kernels read it: 0-dim float64 on a device, itself if it is that.

    Raises:
        TypeError: If it is no real number.
        ValueError: If it is negative or not finite.
    """
    readable = type(value) is Tensor and not _unreadable(value)
    if readable and (value.shape, value.dtype, value.device) == (torch.Size(), torch.float64, device):
        return value  # type: ignore[no-any-return]
    condition = "be a number >= 0"
    norm = float(_scalar(owner, name, condition, value))
    if not 0.0 <= norm < math.inf:
        check.fail(owner, name, condition, norm)
    return torch.tensor(norm, dtype=torch.float64, device=device)


def checked_state(owner: str, index: int, key: str, value: Any, param: Tensor) -> Tensor:
    """Return a state of a parameter that can be copied into the form that kernels read.

    Args:
        owner: Name of the optimizer class.
        index: Position of the parameter.
        key: Name of the state.
        value: The state; real numbers of any dtype, device and layout in memory.
        param: The parameter.

    Raises:
        TypeError: If it is no tensor, or one whose values cannot be read.
        ValueError: If it has another shape than the parameter, or lies on other processes.
    """
    name = f"state[{key!r}] of parameter {index}"
    if not isinstance(value, Tensor):
        check.fail(owner, name, "be a tensor", value, error=TypeError)
    reason = _unreadable(value)
    if reason:
        check.fail(owner, name, "be a dense tensor of real numbers", reason, error=TypeError)
    if value.shape != param.shape:
        shape = tuple(value.shape)
        check.fail(owner, f"parameter {index}", f"keep the shape {shape} of {key}", tuple(param.shape))
    if hasattr(value, "placements") != hasattr(param, "placements"):
        check.fail(owner, name, f"be a {type(param).__name__} as its parameter is", type(value).__name__)
    return value
