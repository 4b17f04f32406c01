"""Conversion of recorded losses: Python and numpy numbers, and tensors of one element."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ..distributed.groups import whole


def checked_loss(owner: str, name: str, loss: Any, *, returned: bool = False) -> Tensor | float:
    """Return a loss as a float or a 0-dim tensor without a graph; waits for nothing.

    Args:
        owner: Name of the caller, for messages.
        name: The argument.
        loss: A number of Python or numpy, an array or a tensor with one element, of any shape, real dtype and
            device. NaN and infinity are numbers.
        returned: Whether the argument is a function that has returned this.

    Raises:
        TypeError: If it is something else, a bool for example.
        ValueError: If it has several elements or none.
    """
    if isinstance(loss, Tensor):
        is_number = not (loss.is_complex() or loss.dtype == torch.bool or loss.is_quantized or loss.is_meta)
    elif isinstance(loss, (np.ndarray, np.generic)):
        is_number = loss.dtype.kind in "iuf"
    else:
        is_number = hasattr(type(loss), "__float__") and not isinstance(loss, bool)
    verb = "return" if returned else "be"
    if not is_number:
        check.fail(owner, name, f"{verb} a number or a tensor with one element", loss, error=TypeError)
    if isinstance(loss, (Tensor, np.ndarray)) and math.prod(loss.shape) != 1:
        condition = "return a loss with one element" if returned else "have one element"
        check.fail(owner, name, condition, tuple(loss.shape))
    if isinstance(loss, Tensor):
        # every rank has the same DTensor and makes this call
        full = whole(loss)
        return (full if full.layout == torch.strided else full.to_dense()).detach().reshape(())
    try:
        return float(loss.item() if isinstance(loss, np.ndarray) else loss)
    except OverflowError:
        return math.inf if loss > 0 else -math.inf
    except (TypeError, ValueError):
        check.fail(owner, name, f"{verb} a number or a tensor with one element", loss, error=TypeError)


def loss_value(owner: str, name: str, loss: Any, *, returned: bool = False) -> float:
    """Return a loss as a float, see ``checked_loss``; waits for the device of a tensor."""
    return float(checked_loss(owner, name, loss, returned=returned))


def reported_loss(loss: Any) -> Tensor | float | None:
    """Return the loss in the result of a training closure: the mean if it has several elements.

    None where it is no number, for a closure may return whatever torch's optimizers let it return.
    """
    if isinstance(loss, Tensor) and loss.numel() > 1 and not loss.is_complex() and not loss.is_meta:
        return loss.detach().double().mean()
    try:
        return checked_loss("closure", "loss", loss)
    except (TypeError, ValueError):
        return None
