"""The value of a parameter: as it is stored, or with the residue that an optimizer keeps beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.rounding import MODE_OF_RESIDUE, RESIDUES, load, mode_for
from .tensors import local_tensor, same_layout


class Residue(NamedTuple):
    """What a rounded parameter lacks of its value.

    Attributes:
        mode: The rounding mode that keeps it, one of ``reference.rounding.RESIDUES``.
        tensor: In the form of that mode, of the shape and layout of the parameter.
    """

    mode: str
    tensor: Tensor


def value_of(stored: Tensor, residue: Residue | None) -> Tensor:
    """Return the value of a parameter: float32 with a residue, else the tensor as it is stored."""
    return stored if residue is None else load(residue.mode, stored, residue.tensor)


def residue_of(own: dict[str, Any] | None, mode: str, local: Tensor) -> Residue | None:
    """Return the residue with which the next step reads a parameter, or None.

    Args:
        own: State of the parameter, or None.
        mode: Rounding mode of its group.
        local: The part of the parameter in this process.
    """
    mode = mode_for(mode, local.dtype)
    if own is None or mode not in RESIDUES:
        return None
    # the next step converts a residue of another mode
    names = (RESIDUES[mode][0], *MODE_OF_RESIDUE)
    name = next((name for name in names if dict.get(own, name) is not None), None)
    if name is None:
        return None
    mode = MODE_OF_RESIDUE[name]
    held, dtype = local_tensor(own[name].detach()), RESIDUES[mode][1]
    if held.dtype != dtype or held.device != local.device or not same_layout(held, local):
        held = torch.empty_like(local, dtype=dtype, requires_grad=False).copy_(held)
    return Residue(mode, held)
