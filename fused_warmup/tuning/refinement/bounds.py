"""Bounds on the last iterate of SGD, to rank schedules.

``f`` is convex, ``distance`` that of the start from a minimum, and norms are L2 norms of the gradients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ... import _checks as check


def last_iterate_bound(rates: Any, norms: Any, distance: float = 1.0) -> float:
    """Return a bound on ``f(x_T) - f*`` for SGD with any learning rates.

    Args:
        rates: Learning rates of all steps, each > 0; numbers of shape ``[steps]``. A last rate of 0 makes the
            bound infinite, so leave it out.
        norms: Norms of the gradients, or one norm for all steps.
        distance: Distance of the start from the minimum, > 0.

    Returns:
        The bound, in units of ``f``.

    Raises:
        ValueError: If a rate or norm is out of range, or there are more of one than of the other.

    Source: Defazio et al. 2023, arXiv:2310.07831, the bound for arbitrary schedules.
    """
    start, rest = _parts("last_iterate_bound", rates, norms, distance)
    return start + rest


def best_scale(rates: Any, norms: Any, distance: float = 1.0) -> float:
    """Return the factor of the rates that minimises ``last_iterate_bound``.

    Args:
        rates: As for ``last_iterate_bound``.
        norms: As for ``last_iterate_bound``.
        distance: As for ``last_iterate_bound``.

    Returns:
        The factor; the minimum is ``last_iterate_bound(factor * rates, ...)``.
    """
    start, rest = _parts("best_scale", rates, norms, distance)
    # the bound at a multiple c is start / c + rest * c
    return math.sqrt(start / rest)


def best_rates(norms: Any, distance: float = 1.0) -> np.ndarray:
    """Return the learning rates that minimise ``last_iterate_bound``.

    The bound is convex in the rates, and each of its terms couples only two adjacent sums of rates from the
    end, so one backward and one forward pass find the minimum exactly.

    Args:
        norms: Norms of the gradients, each > 0; numbers of shape ``[steps]``. Recorded norms must be smoothed
            first: ``refinement(...).smoothed``.
        distance: Distance of the start from the minimum, > 0; it scales all rates.

    Returns:
        Rates, float64 of ``[steps]``. The last one belongs to the last iterate, which makes no step, and is
        larger than those before it: leave it out of a schedule.

    Raises:
        ValueError: If a norm is out of range.

    Example:
        >>> rates = fw.tuning.best_rates(fw.tuning.refinement(opt.telemetry, "sgd").smoothed)[:-1]
        >>> s = fw.schedules.table(rates / rates.max())

    Source: the bound is that of Defazio et al. 2023, arXiv:2310.07831, whose code minimises it by L-BFGS;
    the closed form is ours.
    """
    owner = "best_rates"
    found = _positive(owner, "norms", norms)
    unit = float(found.max())
    squares = np.square(found / unit).tolist()
    # cost times the sum of the rates from step t on is the minimum of the terms of these steps
    cost = squares[-1]
    ratios = []
    for square in squares[-2::-1]:
        ratio = math.sqrt(1.0 + cost / square)
        ratios.append((ratio, cost / square / (1.0 + ratio)))
        cost *= 2.0 / (1.0 + ratio)
    left = check.number(owner, "distance", distance, ends="()") / (unit * math.sqrt(cost))
    rates = []
    for ratio, excess in reversed(ratios):
        left /= ratio
        rates.append(left * excess)
    return np.array([*rates, left])


def refined_bound(norms: Any, distance: float = 1.0) -> float:
    """Return ``distance / sqrt(sum(norms ** -2))``, the bound of the schedule refined with power 2.

    Args:
        norms: Norms of the gradients, each > 0; numbers of shape ``[steps]``.
        distance: Distance of the start from the minimum, > 0.

    Returns:
        The bound, in units of ``f``. The bound of a tuned linear decay has the root mean square of the norms
        instead of their harmonic one.

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
    """Return the term of the bound that falls with the scale of the rates, and the term that grows."""
    lam = _positive(owner, "rates", rates)
    g = _positive(owner, "norms", norms if np.ndim(norms) else np.full(len(lam), norms))
    if len(g) != len(lam):
        check.fail(owner, "norms", f"be as many as the rates, {len(lam)}", len(g))
    tails = np.cumsum(lam[::-1])[::-1]
    # the paper's lam / (tail after it * tail) is a difference of 1 / tail, so that the sum telescopes
    noise = float((np.square(lam * g)[:-1] / tails[1:]).sum() + lam[-1] * np.square(g[-1]))
    start = check.number(owner, "distance", distance, ends="()") ** 2 / (2.0 * float(tails[0]))
    return start, 0.5 * noise


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
