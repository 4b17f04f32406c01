"""Bounds on the last iterate of SGD, for ranking schedules.

``f`` is convex, ``distance`` is that of the start from a minimum, and norms are L2 norms of the gradients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import _checks as check


def last_iterate_bound(rates: Any, norms: Any, distance: float = 1.0) -> float:
    """Return a bound on ``f(x_T) - f*`` for SGD with any learning rates.

    Args:
        rates: Learning rates of all steps, each > 0; numbers of shape ``[steps]``. A last rate of 0 makes the
            bound infinite, so leave it out.
        norms: Norms of the gradients, or one for all steps.
        distance: Distance of the start from the minimum, > 0.

    Returns:
        The bound, in units of ``f``.

    Raises:
        ValueError: If a rate or norm is out of range, or their numbers differ.

    Source: Defazio et al. 2023, arXiv:2310.07831, the bound for arbitrary schedules.
    """
    start, rest = _parts("last_iterate_bound", rates, norms, distance)
    return start + rest


def best_scale(rates: Any, norms: Any, distance: float = 1.0) -> float:
    """Return the multiple of the rates at which ``last_iterate_bound`` is smallest.

    Args:
        rates: As for ``last_iterate_bound``.
        norms: As for ``last_iterate_bound``.
        distance: As for ``last_iterate_bound``.

    Returns:
        The factor; the bound there is ``last_iterate_bound(factor * rates, ...)``.
    """
    start, rest = _parts("best_scale", rates, norms, distance)
    # the bound at a multiple c is start / c + rest * c
    return math.sqrt(start / rest)


def refined_bound(norms: Any, distance: float = 1.0) -> float:
    """Return ``distance / sqrt(sum(norms ** -2))``, the bound of the schedule refined for norms and power 2.

    Args:
        norms: Norms of the gradients, each > 0; numbers of shape ``[steps]``.
        distance: Distance of the start from the minimum, > 0.

    Returns:
        The bound, in units of ``f``. A linear decay tuned to the same norms has the root mean square of the
        norms in place of their harmonic one.

    Raises:
        ValueError: If a norm is out of range.

    Source: Defazio et al. 2023, arXiv:2310.07831, theorem 3.
    """
    owner = "refined_bound"
    found = _positive(owner, "norms", norms)
    least = found.min()
    scaled = float(np.square(least / found).sum())
    return check.number(owner, "distance", distance, ends="()") * float(least) / math.sqrt(scaled)


def _parts(owner: str, rates: Any, norms: Any, distance: float) -> tuple[float, float]:
    """Return the part of the bound that falls with the scale of the rates, and the one that grows."""
    lam = _positive(owner, "rates", rates)
    g = _positive(owner, "norms", norms if np.ndim(norms) else np.full(len(lam), norms))
    if len(g) != len(lam):
        check.fail(owner, "norms", f"be as many as the rates, {len(lam)}", len(g))
    tails = np.cumsum(lam[::-1])[::-1]
    noise = np.cumsum(np.square(lam * g)[::-1])[::-1]
    inner = float((lam[:-1] / (tails[1:] * tails[:-1]) * noise[:-1]).sum())
    start = check.number(owner, "distance", distance, ends="()") ** 2 / (2.0 * float(tails[0]))
    return start, float(noise[0]) / (2.0 * float(tails[0])) + 0.5 * inner


def _positive(owner: str, name: str, values: Any) -> np.ndarray:
    """Return a float64 array of ``[n]`` whose entries are positive and finite."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        check.fail(owner, name, "be numbers", values, error=TypeError)
    if array.ndim != 1 or not len(array):
        check.fail(owner, name, "have the shape [steps]", array.shape)
    bad = np.flatnonzero(~((array > 0.0) & np.isfinite(array)))
    if len(bad):
        check.fail(owner, f"{name}[{bad[0]}]", "be finite and > 0", float(array[bad[0]]))
    return array
