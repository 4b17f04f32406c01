"""Groups on a sphere: validation of the options, and the norm before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check

PROJECTIONS = ("sphere",)
# elements that one thread sums, so that the result does not depend on the number of threads
_RUN = 1 << 12


def sphere_options(owner: str, group: Mapping[str, Any], weight_decay: float) -> tuple[bool, float]:
    """Return whether a group is kept on a sphere, and the norm to keep; 0 keeps the norm that it has.

    Raises:
        ValueError: If an option is out of range, or the group decays.
        TypeError: If ``radius`` is no number.
    """
    projection, radius = group["projection"], group["radius"]
    if projection is not None and projection not in PROJECTIONS:
        check.fail(owner, "projection", "be 'sphere' or None", projection)
    if radius is not None:
        radius = check.number(owner, "radius", radius, ends="()")
    if projection is None and radius is not None:
        check.fail(owner, "radius", "be None without a projection", radius, "Set projection='sphere'.")
    if projection is not None and weight_decay != 0.0:
        hint = "On a sphere decay has nothing to shrink."
        check.fail(owner, "weight_decay", "be 0 beside projection='sphere'", weight_decay, hint)
    return projection is not None, radius or 0.0


@torch.no_grad()
def norm_of(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the norm of all elements, 0-dim float64; the same bits for any number of threads."""
    norms = [_norm(t.detach().reshape(-1)) for t in tensors]
    return _norm(torch.stack([torch.zeros((), dtype=torch.float64, device=device), *norms]))


def _norm(values: Tensor) -> Tensor:
    """Return the norm of a vector, combined from the norms of runs that no two threads share."""
    if len(values) <= _RUN:
        norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
        return norm
    whole = len(values) // _RUN * _RUN
    runs = torch.linalg.vector_norm(values[:whole].view(-1, _RUN), dim=1, dtype=torch.float64)
    return _norm(torch.cat([runs, _norm(values[whole:]).reshape(1)]))
