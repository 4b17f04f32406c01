"""Values of 16-bit parameters with the residues that their rounding mode keeps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _checks as check
from ..plan.residues import residue_of, value_of
from ..plan.tensors import compute_dtype, local_tensor
from ..plan.tracked_states import peek
from ..reference.rounding import RESIDUES, Rounding, mode_for, store
from .session import Session


def exact_values(session: Session) -> list[Tensor]:
    """Return copies of all parameters with their residues, float32 or float64."""
    values = []
    for group in session.param_groups:
        for param in group["params"]:
            local, own = local_tensor(param).detach(), peek(session.state, param)
            value = torch.empty_like(param, dtype=compute_dtype(param.dtype), requires_grad=False)
            local_tensor(value).copy_(value_of(local, residue_of(own, group["param_rounding"], local)))
            values.append(value)
    return values


def checked_values(session: Session, values: Iterable[Tensor]) -> list[Tensor]:
    """Return new values of all parameters as a list.

    Raises:
        TypeError: If one is no tensor of real numbers.
        ValueError: If there are not as many as parameters, or one has another shape or other placements.
    """
    name, params, found = "values", session.params, list(values)
    if len(found) != len(params):
        check.fail(session.owner, name, f"be {len(params)} tensors", len(found))
    for i, (value, param) in enumerate(zip(found, params, strict=True)):
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.dtype == torch.bool):
            got = value.dtype if isinstance(value, Tensor) else value
            check.fail(session.owner, f"{name}[{i}]", "be a tensor of real numbers", got, error=TypeError)
        if value.shape != param.shape:
            condition = f"have the shape {tuple(param.shape)} of its parameter"
            check.fail(session.owner, f"{name}[{i}]", condition, tuple(value.shape))
        if getattr(value, "placements", None) != getattr(param, "placements", None):
            condition = "be placed as its parameter is"
            check.fail(session.owner, f"{name}[{i}]", condition, getattr(value, "placements", None))
    return found


def set_values(session: Session, values: Iterable[Tensor]) -> None:
    """Write new values to all parameters and to the residues that stand in the states."""
    rounded = iter(values)
    for group in session.param_groups:
        for param in group["params"]:
            local = local_tensor(param)
            value = local_tensor(next(rounded)).detach().to(local.device)
            mode = mode_for(group["param_rounding"], param.dtype)
            own = peek(session.state, param) or {}
            name = RESIDUES[mode][0] if mode in RESIDUES else None
            residue = None if name is None else dict.get(own, name)
            if residue is None:
                local.copy_(value)
                continue
            nearest, lacking = store(value.to(torch.float32), param.dtype, Rounding(mode))
            local.copy_(nearest)
            assert lacking is not None
            local_tensor(residue).copy_(lacking)
