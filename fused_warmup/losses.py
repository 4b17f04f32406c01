"""What a training loop reports of a step: numbers of every kind that people have, as tensors or floats."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from . import _checks as check


def _is_number(value: Any) -> bool:
    """Whether a value is a real number, or an array of one."""
    if isinstance(value, (bool, np.bool_, str, bytes)):
        return False
    if isinstance(value, (np.ndarray, np.generic)):
        return value.size == 1 and value.dtype.kind in "iuf"
    return hasattr(value, "__float__") and not isinstance(value, complex)


def as_number(owner: str, name: str, value: Any) -> Tensor | float:
    """Return a tensor of one real element as it is, and any other number as a float.

    Raises:
        ValueError: If a tensor has another number of elements.
        TypeError: If it is neither a tensor of real numbers nor a number.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            check.fail(owner, name, "have one element", tuple(value.shape))
        if value.is_complex():
            check.fail(owner, name, "be real", value.dtype, error=TypeError)
        return value
    if not _is_number(value):
        check.fail(owner, name, "be a tensor or a number", value, error=TypeError)
    return float(value.item() if isinstance(value, np.ndarray) else value)


def reported(loss: Any) -> Tensor | float | None:
    """Return what a closure's result says about the loss, the mean of several elements, None for nothing."""
    if isinstance(loss, Tensor):
        if loss.is_complex() or loss.is_meta or not loss.numel():
            return None
        return loss.detach() if loss.numel() == 1 else loss.detach().double().mean()
    return float(np.asarray(loss).item()) if _is_number(loss) else None
