"""Exact Gaussian-process regression of the losses of a warmup, to test whether they have passed a minimum.

``y_i ~ N(c + f(x_i), noise)`` with ``f ~ GP(0, scale * exp(-(x - x')^2 / (2 * 0.2^2)))``, float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...reference import rules

LENGTH = 0.2
# added to the variance of a difference, in squared units of the losses
_JITTER = 1e-4
_GRID = 500
_MOST_POINTS = 500
# the largest probability that an earlier loss was lower, and the place of the minimum in [0, 1]
Vote = tuple[float, float]


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the prior correlations of ``f`` between two sets of places, float64 of ``[len(a), len(b)]``."""
    return torch.exp(-0.5 * ((a[:, None] - b[None, :]) / LENGTH).square())


def likelihood(
    x: Tensor, y: Tensor, scale: float, noise: float, mean: float
) -> tuple[float, tuple[float, float, float]]:
    """Return the negative logarithm of the marginal likelihood, and its gradient.

    Args:
        x: Places, float64 of ``[n]``.
        y: Values, float64 of ``[n]``.
        scale: Variance of ``f``.
        noise: Variance of the noise.
        mean: The constant ``c``.

    Returns:
        The value in nats, and its derivatives by ``scale``, ``noise`` and ``mean``.
    """
    shape = correlation(x, x)
    factor = torch.linalg.cholesky(scale * shape + noise * _identity(x))
    inverse = torch.cholesky_inverse(factor)
    weights = inverse @ (y - mean)
    value = 0.5 * (y - mean) @ weights + factor.diagonal().log().sum() + 0.5 * len(x) * math.log(2 * math.pi)
    by_scale = 0.5 * ((inverse * shape).sum() - weights @ shape @ weights)
    by_noise = 0.5 * (inverse.trace() - weights @ weights)
    return float(value), (float(by_scale), float(by_noise), -float(weights.sum()))


def posterior(
    x: Tensor, y: Tensor, scale: float, noise: float, mean: float, at: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return posterior mean, variance and covariance with the last point of ``c + f`` at ``at``.

    Returns:
        Three tensors, float64 of ``[len(at)]``. The last point is the present end of the warmup.
    """
    factor = torch.linalg.cholesky(scale * correlation(x, x) + noise * _identity(x))
    weights = torch.cholesky_solve((y - mean)[:, None], factor)[:, 0]
    cross = scale * correlation(x, at)
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    covariance = scale * correlation(at, at[-1:])[:, 0] - half.T @ half[:, -1]
    return mean + cross.T @ weights, scale - half.square().sum(0), covariance


def past_minimum(mean: Tensor, variance: Tensor, covariance: Tensor) -> float:
    """Return max over earlier points of P(loss there < loss at the last point)."""
    difference = mean[-1] - mean[:-1]
    spread = variance[:-1] + variance[-1] - 2.0 * covariance[:-1] + _JITTER
    return float(torch.special.ndtr(difference / spread.sqrt()).max())


def _vote(x: Tensor, y: Tensor, scale: float, noise: float, mean: float, end: float = 1.0) -> Vote:
    """Return the vote of a fitted process, with the place of its minimum up to ``end``."""
    grid = torch.linspace(0.0, 1.0, _GRID, dtype=torch.float64, device="cpu")
    expected, variance, covariance = posterior(x, y, scale, noise, mean, grid)
    lowest = int(expected[grid <= end].argmin())
    return past_minimum(expected, variance, covariance), float(grid[lowest])


class ScaleFree:
    """Default test of a warmup: invariant to the scale of the losses, without random numbers or state.

    Losses are cut off ten robust deviations above their median, averaged to at most 500 and standardised. The
    marginal likelihood is maximised over scale, mean and noise, the latter on a grid.
    """

    def votes(self, losses: Tensor) -> list[Vote]:
        """Return one vote.

        Args:
            losses: All losses so far, float64 of ``[n]``; the places of non-finite ones are left empty.
        """
        x, y = _condensed(losses)
        spread = float(y.std()) if len(y) > 3 else 0.0
        if not 0.0 < spread < math.inf:
            return [(0.0, 0.0)]
        y = (y - y.mean()) / spread
        scale, noise, mean = _most_likely(x, y)
        return [_vote(x, y, scale, noise, mean, float(x[-1]))]

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept an empty state."""


def _condensed(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return places and values of the finite losses, with neighbours averaged to at most 500 points."""
    finite = losses.isfinite()
    places = torch.arange(len(losses), dtype=torch.float64, device="cpu")[finite] / len(losses)
    values = losses[finite]
    if not len(values):
        return places, values
    middle = values.median()
    deviation = 1.4826 * (values - middle).abs().median()
    if deviation > 0.0:
        values = values.clamp(max=float(middle + 10.0 * deviation))
    size = -(-len(values) // _MOST_POINTS)
    if size == 1:
        return places, values
    block = torch.arange(len(values), device="cpu") // size
    count = block.bincount()
    return block.bincount(places) / count, block.bincount(values) / count


def _most_likely(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Return the maximum-likelihood scale, noise and mean; in the eigenbasis each ratio costs O(n)."""
    values, basis = torch.linalg.eigh(correlation(x, x))
    ratios = torch.logspace(-4.0, 4.0, 161, dtype=torch.float64, device="cpu")
    diagonal = values.clamp(min=0.0) + ratios[:, None]
    ones, z = basis.sum(0), basis.T @ y
    means = (ones * z / diagonal).sum(1) / (ones.square() / diagonal).sum(1)
    scales = ((z - ones * means[:, None]).square() / diagonal).mean(1)
    best = int((len(y) * scales.log() + diagonal.log().sum(1)).argmin())
    scale = float(scales[best])
    return scale, scale * float(ratios[best]), float(means[best])


class Parity:
    """Test of the authors' code: constants for losses of order 1, a hundred steps of Adam per test.

    Scale, noise and the moments of Adam carry over to the next test. The fit draws a random sample of more
    than 100 losses, each of the five votes one of more than 500.
    """

    _FITTED, _STEPS, _VOTES, _LEAST_NOISE = 100, 100, 5, 1e-4
    _HYPER = rules.Hyper(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8)

    def __init__(self) -> None:
        # scale = softplus(0), noise = 1e-3, mean; the first two are stored as softplus's arguments
        self._raw = _vector(0.0, math.log(math.expm1(1e-3 - self._LEAST_NOISE)), 0.0)
        self._moments = [torch.zeros_like(self._raw), torch.zeros_like(self._raw)]
        self._steps = 0
        self._generator = torch.Generator("cpu").manual_seed(0)

    @property
    def fitted(self) -> tuple[float, float, float]:
        """Scale, noise and mean."""
        scale, noise = torch.nn.functional.softplus(self._raw[:2]).tolist()
        return scale, noise + self._LEAST_NOISE, float(self._raw[2])

    def votes(self, losses: Tensor) -> list[Vote]:
        """Fit and return five votes, see ``ScaleFree.votes``; all of them negative if no loss is finite."""
        finite = losses.isfinite()
        x = torch.arange(len(losses), dtype=torch.float64, device="cpu")[finite] / len(losses)
        y = losses[finite]
        if not len(y):
            return [(0.0, 1.0)] * self._VOTES
        self._raw[2] = y.mean()
        self._fit(*self._sample(x, y, self._FITTED))
        return [_vote(*self._sample(x, y, _MOST_POINTS), *self.fitted) for _ in range(self._VOTES)]

    def _sample(self, x: Tensor, y: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Return a random sample of at most ``most`` points, in order."""
        if len(x) <= most:
            return x, y
        drawn = torch.ones(len(x), device="cpu").multinomial(most, generator=self._generator).sort().values
        return x[drawn], y[drawn]

    def _fit(self, x: Tensor, y: Tensor) -> None:
        """Minimise the negative log-likelihood by steps of Adam."""
        for _ in range(self._STEPS):
            self._steps += 1
            _, gradient = likelihood(x, y, *self.fitted)
            slope = torch.cat([self._raw[:2].sigmoid(), _vector(1.0)])
            grad = _vector(*gradient) * slope / len(x)
            scalars = rules.common_scalars(self._HYPER, self._HYPER.lr, 0.0, 1.0)
            rules.Adam.scalars(self._HYPER, self._HYPER.lr, self._steps, scalars)
            self._raw, self._moments = rules.Adam.update(self._raw, grad, self._moments, scalars)

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, moments and the state of the random generator."""
        fitted = torch.stack([self._raw, *self._moments])
        return {"fitted": fitted, "steps": self._steps, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a result of ``state_dict``."""
        self._raw, *self._moments = state["fitted"].to("cpu", torch.float64, copy=True)
        self._steps = state["steps"]
        self._generator.set_state(state["generator"].cpu())


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: matrices are small, and more threads may change the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _identity(x: Tensor) -> Tensor:
    return torch.eye(len(x), dtype=torch.float64, device="cpu")
