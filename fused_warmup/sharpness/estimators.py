"""Stochastic estimators of the trace and the spectral density of a Hessian."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _checks as check
from .hessian_operator import CurvatureOperator
from .lanczos import tridiagonalize
from .operators import Operator, random_signs
from .result import SpectralDensity, TraceEstimate

# factor of the finite-difference step for traces in 16 bits
_TIMES = 8.0


def trace(operator: CurvatureOperator, *, vectors: int = 32, seed: int = 0) -> TraceEstimate:
    """Estimate the trace of a Hessian, and restore all state.

    It is the mean of ``z' H z`` over vectors ``z`` of random signs, which is unbiased: its variance is
    ``2 / vectors`` times the sum of the squares of all entries off the diagonal.

    Args:
        operator: A ``HessianOperator`` or ``PreconditionedOperator``.
        vectors: Number of random vectors; one product each.
        seed: Seed of the vectors.

    Returns:
        The estimate with its standard error; waits for the device.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range.

    Source: Hutchinson 1989, doi:10.1080/03610918908812806.
    """
    owner = "trace"
    count, seed = check.whole(owner, "vectors", vectors, 1), check.whole(owner, "seed", seed)
    with _checked(owner, operator).measure() as measured:
        quotients = [_quotient(measured, z) for z in _start_vectors(measured, count, seed)]
        cost = measured.evaluator.evaluations
    samples = operator.shape[0] * torch.stack(quotients).cpu()
    error = samples.std().item() / math.sqrt(count) if count > 1 else math.nan
    return TraceEstimate(samples.mean().item(), error, count, cost)


def spectral_density(
    operator: CurvatureOperator, *, steps: int = 32, vectors: int = 4, seed: int = 0
) -> SpectralDensity:
    """Estimate the distribution of the eigenvalues of a Hessian, and restore all state.

    Stochastic Lanczos quadrature: each start vector ``z`` of random signs gives ``steps`` Ritz values, and
    weights with which they reproduce ``z' H**k z / n`` up to ``k = 2 steps - 1``. Lanczos keeps one vector
    per step, ``steps + 1`` times the memory of the parameters. With the seed of ``trace`` the vectors are the
    same, and so is the mean.

    Args:
        operator: A ``HessianOperator`` or ``PreconditionedOperator``.
        steps: Products for each start vector.
        vectors: Number of start vectors.
        seed: Seed of the vectors.

    Returns:
        Ritz values and weights; waits for the device.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range.

    Source: Ghorbani et al. 2019, arXiv:1901.10159; Golub & Welsch 1969 for the weights.
    """
    owner = "spectral_density"
    steps, count = check.whole(owner, "steps", steps, 1), check.whole(owner, "vectors", vectors, 1)
    seed = check.whole(owner, "seed", seed)
    with _checked(owner, operator).measure() as measured:
        rules = [_quadrature(measured, z, steps) for z in _start_vectors(measured, count, seed)]
        cost = measured.evaluator.evaluations
    nodes, weights = (torch.stack(rows) for rows in zip(*rules, strict=True))
    return SpectralDensity(nodes, weights / count, operator.shape[0], nodes.numel(), cost)


def _checked(owner: str, operator: CurvatureOperator) -> CurvatureOperator:
    if not isinstance(operator, CurvatureOperator):
        condition = "be a HessianOperator or PreconditionedOperator"
        check.fail(owner, "operator", condition, type(operator).__name__, error=TypeError)
    return operator


def _start_vectors(operator: Operator, count: int, seed: int) -> Iterator[Tensor]:
    """Yield vectors of random signs, one after the other, to hold only one of them."""
    generator = torch.Generator(operator.evaluator.device).manual_seed(seed)
    for _ in range(count):
        yield random_signs(operator.evaluator, generator)


def _quotient(operator: Operator, vector: Tensor) -> Tensor:
    """Return the Rayleigh quotient of a vector of random signs, 0-dim."""
    # along random vectors the loss is far closer to quadratic than along the top one, so that long steps cost
    # nothing; in 16 bits the rounding of short ones biased traces by up to a quarter
    times = _TIMES if operator.in_16_bits else 1.0
    found = operator.quotient(vector, times)
    if operator.in_16_bits and times == 1.0:
        # the first evaluation has shown it
        return operator.quotient(vector, _TIMES)
    return found


def _quadrature(operator: Operator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the Ritz values of a Krylov space and their weights, which add up to 1, on the host.

    Where the space ends early, the largest value is repeated with a weight of 0.
    """
    found = tridiagonalize(operator, start, steps)
    matrix, alive = found.matrix.cpu(), int(torch.stack(found.alives).sum())
    nodes, weights = torch.full_like(matrix[0], torch.nan), torch.zeros_like(matrix[0])
    if not matrix.isfinite().all():
        return nodes, weights + torch.nan
    values, vectors = torch.linalg.eigh(matrix[:alive, :alive])
    weights[:alive] = vectors[0].square()
    nodes[:alive], nodes[alive:] = values, values[-1]
    return nodes, weights
