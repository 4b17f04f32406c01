"""Both ends of a spectrum by Lanczos, with every scalar on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .vectors import Vectors

_SWEEPS = 8


@dataclass
class Spectrum:
    """What Lanczos found; 0-dim float64 tensors on the device, NaN if a product was not finite.

    Attributes:
        largest: Largest Ritz value, which no eigenvalue is above in the space that was searched.
        smallest: Smallest Ritz value.
        residual: Distance from ``largest`` within which there is an eigenvalue, not always the largest one.
        first: Rayleigh quotient of the start vector.
        asymmetry: By how much products of basis vectors were not symmetric, which those of a Hessian are: the
            noise of its products.
        vector: Ritz vector of ``largest``, of unit length, ``[n]``.
    """

    largest: Tensor
    smallest: Tensor
    residual: Tensor
    first: Tensor
    asymmetry: Tensor
    vector: Tensor


class Symmetric(Protocol):
    """A symmetric operator ``A``.

    Attributes:
        vectors: Operations on the vectors that it takes.
        scale: Diagonal ``C`` whose products with unit vectors it wants the length of, ``[n]``, or None.
    """

    vectors: Vectors
    scale: Tensor | None

    def product(
        self, basis: Tensor, out: Tensor, inverse: Tensor, length: Tensor, times: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write ``A v`` into ``out``, up to a factor; see ``Hessian.product``."""
        ...


def lengths(squares: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return one over the length of a vector, and the length of ``C`` times its unit vector."""
    inverse = squares[0].rsqrt()
    return inverse, torch.ones_like(inverse) if scale is None else squares[1].sqrt() * inverse


def lanczos(operator: Symmetric, start: Tensor, steps: int) -> Spectrum:
    """Search the space of ``start, A start, ..., A**(steps - 1) start``, fully orthogonalised.

    Basis vectors are not of unit length: one over their lengths is kept beside them.

    Args:
        operator: ``A``.
        start: Vector of ``[n]``, not zero.
        steps: Number of products; no more than ``n`` are made.

    Returns:
        Both ends of the spectrum. Where the space is exhausted before, as for the zero matrix, the products
        made in vain leave no trace.
    """
    vectors, scale = operator.vectors, operator.scale
    steps = min(steps, start.numel())
    basis = vectors.basis(steps + 1)
    basis[0].copy_(start)
    zero, one = vectors.number(0.0), vectors.number(1.0)
    _, squares = vectors.combine(basis[0], one, basis[:0], zero[None][:0], scale)
    inverse, length = lengths(squares, scale)
    inverses: list[Tensor] = []
    alive = torch.ones((), dtype=torch.bool, device=start.device)
    diagonal: list[Tensor] = []
    below: list[Tensor] = []
    lives: list[Tensor] = []
    size = noise = zero
    for j in range(steps):
        inverses.append(inverse)
        lives.append(alive)
        known, w = basis[: j + 1], basis[j + 1]
        factor, products, alpha = operator.product(known, w, inverse, length)
        diagonal.append(alpha)
        shares = torch.stack(inverses)
        overlaps = factor * shares * products
        # twice, because the first time leaves what rounding left of the large parts
        products, _ = vectors.combine(w, factor, known, -shares * overlaps, None)
        _, squares = vectors.combine(w, one, known, -shares * shares * products, scale)
        beta = squares[0].sqrt()
        if below:
            *far, near = overlaps[:-1]
            odd = torch.stack([near - below[-1], *far]).norm()
            noise = torch.maximum(noise, torch.where(alive, odd, 0.0))
        size = torch.maximum(size, torch.maximum(alpha.abs(), beta))
        # NaN compares false and so goes on, to be seen in the result
        alive = alive & ~(beta <= 16.0 * torch.finfo(start.dtype).eps * size)
        below.append(torch.where(alive, beta, 0.0))
        inverse, length = (torch.where(alive, x, 0.0) for x in lengths(squares, scale))
    live = torch.stack(lives)
    # rows after the end of the space lie below all eigenvalues
    entries = torch.where(live, torch.stack(diagonal), -3.0 * size - 1.0)
    side = torch.stack(below)[:-1]
    matrix = torch.diag(entries) + torch.diag(side, 1) + torch.diag(side, -1)
    finite = matrix.isfinite().all()
    values, ritz = eigh(torch.where(finite, matrix, 0.0))
    nan = torch.full_like(size, torch.nan)
    weights = ritz[:, -1]
    vector = vectors.basis(1)[0]
    vectors.combine(vector, None, basis[:steps], torch.stack(inverses) * weights, None)
    return Spectrum(
        largest=torch.where(finite, values[-1], nan),
        smallest=torch.where(finite, values.gather(0, (~live).sum()[None])[0], nan),
        residual=torch.where(finite, below[-1] * weights[-1].abs(), nan),
        first=diagonal[0],
        asymmetry=torch.where(finite, noise, nan),
        vector=vector,
    )


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, ascending, and eigenvectors of a small symmetric matrix without a wait."""
    return torch.linalg.eigh(matrix) if matrix.device.type == "cpu" else jacobi(matrix)


def jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``eigh`` by Jacobi rotations, half of the rows against the other half at once.

    Args:
        matrix: Symmetric, ``[m, m]``.

    Returns:
        Eigenvalues of ``[m]``, ascending, and eigenvectors of ``[m, m]`` in columns.

    Source: Golub & Van Loan, Matrix Computations, section 8.5.
    """
    m = len(matrix)
    n = m + m % 2
    a = torch.nn.functional.pad(matrix, (0, n - m, 0, n - m))
    vectors = torch.eye(n, dtype=a.dtype, device=a.device)
    # round r of a tournament: r against the last, then one place up against one place down
    place = torch.arange(n // 2, device=a.device)
    for r in [r for _ in range(_SWEEPS) for r in range(n - 1)]:
        p = (r + place) % (n - 1)
        q = torch.where(place == 0, n - 1, (r - place) % (n - 1))
        half = (a[q, q] - a[p, p]) / (2.0 * a[p, q])
        tangent = torch.copysign(1.0 / (half.abs() + (1.0 + half * half).sqrt()), half)
        tangent = torch.where(a[p, q] == 0.0, 0.0, tangent)
        cosine = (1.0 + tangent * tangent).rsqrt()
        turn = torch.eye(n, dtype=a.dtype, device=a.device)
        turn[p, p] = turn[q, q] = cosine
        turn[p, q], turn[q, p] = tangent * cosine, -tangent * cosine
        a = turn.T @ a @ turn
        vectors = vectors @ turn
    values, order = torch.diagonal(a)[:m].sort()
    return values, vectors[:m, :m][:, order]
