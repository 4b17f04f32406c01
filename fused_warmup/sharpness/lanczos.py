"""Both ends of a spectrum by Lanczos, with every scalar on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .vectors import Direction, Product, Vectors

_SWEEPS = 8


@dataclass
class Spectrum:
    """Result of a Lanczos run: 0-dim float64 tensors on the device, NaN if a product was not finite.

    Attributes:
        largest: Largest Ritz value: a lower bound on the largest eigenvalue.
        smallest: Smallest Ritz value.
        residual: Distance from ``largest`` within which there is an eigenvalue, not always the largest one.
        first: Rayleigh quotient of the start vector.
        asymmetry: Largest asymmetry among products of basis vectors. Products of an exact Hessian are
            symmetric, so this measures their noise.
        vector: Ritz vector of ``largest``, of unit length, ``[n]``.
    """

    largest: Tensor
    smallest: Tensor
    residual: Tensor
    first: Tensor
    asymmetry: Tensor
    vector: Tensor


@dataclass
class Tridiagonal:
    """Projection of an operator on a Krylov space, with its basis; float64 on the device.

    Attributes:
        matrix: ``[m, m]``.
        alive: Whether a row lies inside the space, bool of ``[m]``. Rows after its end are not coupled to
            others, and their eigenvalues lie below all others.
        remainder: Coupling of the last row to the rest, 0-dim.
        first: Rayleigh quotient of the start vector.
        asymmetry: As in ``Spectrum``.
        basis: Vectors, not normalised, ``[m, n]``.
        inverses: Their inverse norms, ``[m]``.
    """

    matrix: Tensor
    alive: Tensor
    remainder: Tensor
    first: Tensor
    asymmetry: Tensor
    basis: Tensor
    inverses: Tensor


class Symmetric(Protocol):
    """A symmetric operator ``A``.

    Attributes:
        vectors: Operations on its vectors.
        scale: Diagonal ``C``, ``[n]``, or None; directions for ``product`` carry the lengths ``|C v|``.
    """

    vectors: Vectors
    scale: Tensor | None

    def product(self, direction: Direction, out: Tensor, times: float = 1.0) -> Product:
        """Write ``A v`` into ``out``, up to a factor; see ``Hessian.product``."""
        ...


def start_direction(vectors: Vectors, basis: Tensor, scale: Tensor | None) -> Direction:
    """Return the only vector of a basis as a direction, one of length 0 for a zero vector."""
    one = vectors.number(1.0)
    _, squares = vectors.combine(basis[0], one, basis[:0], one[None][:0], scale)
    lengths = (torch.where(squares[0] == 0.0, 0.0, length) for length in _lengths(squares, scale))
    return Direction(basis, *lengths)


def _lengths(squares: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the inverse norm of a vector and the length of ``C`` times its unit vector."""
    inverse = squares[0].rsqrt()
    return inverse, torch.ones_like(inverse) if scale is None else squares[1].sqrt() * inverse


def tridiagonalize(operator: Symmetric, start: Tensor, steps: int) -> Tridiagonal:
    """Project an operator on the space of ``start, A start, ..., A**(steps - 1) start``.

    The basis is fully orthogonalised. Its vectors are not normalised; their inverse norms are kept beside
    them.

    Args:
        operator: ``A``.
        start: Vector of ``[n]``, not zero.
        steps: Number of products; no more than ``n`` are made.

    Returns:
        The projection. If the Krylov space is exhausted early (the zero matrix, for example), the rows of
        later iterations are not alive.
    """
    vectors, scale = operator.vectors, operator.scale
    steps = min(steps, vectors.length)
    basis = vectors.basis(steps + 1)
    basis[0].copy_(start)
    direction = start_direction(vectors, basis[:1], scale)
    one = vectors.number(1.0)
    size = noise = vectors.number(0.0)
    alive = torch.ones((), dtype=torch.bool, device=start.device)
    inverses: list[Tensor] = []
    alives: list[Tensor] = []
    diagonal: list[Tensor] = []
    below: list[Tensor] = []
    for j in range(steps):
        inverses.append(direction.inverse)
        alives.append(alive)
        known, w = basis[: j + 1], basis[j + 1]
        factor, dots, alpha = operator.product(direction, w)
        diagonal.append(alpha)
        inverse_norms = torch.stack(inverses)
        overlaps = factor * inverse_norms * dots
        # orthogonalised twice: rounding of large components survives the first pass
        dots, _ = vectors.combine(w, factor, known, -inverse_norms * overlaps, None)
        _, squares = vectors.combine(w, one, known, -inverse_norms * inverse_norms * dots, scale)
        beta = squares[0].sqrt()
        if below:
            noise = torch.maximum(noise, torch.where(alive, _asymmetry(overlaps, below[-1]), 0.0))
        size = torch.maximum(size, torch.maximum(alpha.abs(), beta))
        # negated, so that NaN continues and reaches the result
        alive = alive & ~(beta <= 16.0 * torch.finfo(start.dtype).eps * size)
        below.append(torch.where(alive, beta, 0.0))
        inverse, length = _lengths(squares, scale)
        direction = Direction(
            basis[: j + 2], torch.where(alive, inverse, 0.0), torch.where(alive, length, 0.0)
        )
    live = torch.stack(alives)
    entries = torch.where(live, torch.stack(diagonal), -3.0 * size - 1.0)
    matrix = _tridiagonal(entries, torch.stack(below)[:-1])
    return Tridiagonal(matrix, live, below[-1], diagonal[0], noise, basis[:steps], torch.stack(inverses))


def lanczos(operator: Symmetric, start: Tensor, steps: int) -> Spectrum:
    """Return both ends of the spectrum of an operator on a Krylov space; see ``tridiagonalize``."""
    found = tridiagonalize(operator, start, steps)
    finite = found.matrix.isfinite().all()
    values, ritz = eigh(torch.where(finite, found.matrix, 0.0))
    nan = torch.full_like(found.first, torch.nan)
    weights = ritz[:, -1]
    vector = operator.vectors.basis(1)[0]
    operator.vectors.combine(vector, None, found.basis, found.inverses * weights, None)
    return Spectrum(
        largest=torch.where(finite, values[-1], nan),
        smallest=torch.where(finite, values.gather(0, (~found.alive).sum()[None])[0], nan),
        residual=torch.where(finite, found.remainder * weights[-1].abs(), nan),
        first=found.first,
        asymmetry=torch.where(finite, found.asymmetry, nan),
        vector=vector,
    )


def _asymmetry(overlaps: Tensor, beta: Tensor) -> Tensor:
    """Return the distance of the overlaps with earlier vectors from their exact values, 0, ..., 0, beta."""
    *far, near = overlaps[:-1].unbind()
    distance: Tensor = torch.stack([near - beta, *far]).norm()
    return distance


def _tridiagonal(diagonal: Tensor, side: Tensor) -> Tensor:
    return torch.diag(diagonal) + torch.diag(side, 1) + torch.diag(side, -1)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, ascending, and eigenvectors of a small symmetric matrix without a wait."""
    return torch.linalg.eigh(matrix) if matrix.device.type == "cpu" else jacobi(matrix)


def jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors like ``eigh``, by Jacobi rotations of disjoint pairs of rows.

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
    place = torch.arange(n // 2, device=a.device)
    for _ in range(_SWEEPS):
        # a round-robin tournament: in round r, r plays the last row, and r + k plays r - k
        for r in range(n - 1):
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
