"""Both ends of a spectrum by Lanczos, with every scalar on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .vectors import Direction, Product, Vectors

_SWEEPS = 8
# share of random starts that may have a smaller component along the top vector than assumed
_MISSED = 0.05
# exponent of the smallest distance, over the size of the matrix, that is told from 0
_FINEST = -20


@dataclass
class Spectrum:
    """Result of a Lanczos run: 0-dim float64 tensors on the device, NaN if a product was not finite.

    Attributes:
        largest: Largest Ritz value: a lower bound on the largest eigenvalue.
        smallest: Smallest Ritz value.
        residual: Distance from ``largest`` within which there is an eigenvalue, not always the largest one.
        unseen: Distance above ``largest`` beyond which there is no eigenvalue, for 19 of 20 random starts.
        asymmetry: Largest asymmetry among products of basis vectors. Products of an exact Hessian are
            symmetric, so this measures their noise.
        vector: Ritz vector of ``largest``, of unit length, ``[n]``.
    """

    largest: Tensor
    smallest: Tensor
    residual: Tensor
    unseen: Tensor
    asymmetry: Tensor
    vector: Tensor


@dataclass
class Tridiagonal:
    """Projection of an operator on a Krylov space, with its basis; float64 on the device.

    Attributes:
        diagonal: ``m`` numbers, 0-dim; the first is the Rayleigh quotient of the start vector.
        below: Entries beside them, with the one after the last row; 0 where the space has ended.
        alives: Whether each row lies inside the space, 0-dim bools.
        size: Largest magnitude among the numbers, 0-dim.
        asymmetry: As in ``Spectrum``.
        basis: Vectors, not normalised, ``[m, n]``.
        inverses: Their inverse norms, 0-dim.
    """

    diagonal: list[Tensor]
    below: list[Tensor]
    alives: list[Tensor]
    size: Tensor
    asymmetry: Tensor
    basis: Tensor
    inverses: list[Tensor]

    @property
    def matrix(self) -> Tensor:
        """The matrix, ``[m, m]``; rows after the end of the space have eigenvalues below all others."""
        entries = torch.where(torch.stack(self.alives), torch.stack(self.diagonal), -3.0 * self.size - 1.0)
        return _tridiagonal(entries, torch.stack(self.below)[:-1])

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Ritz values, ascending, their vectors in columns, and whether all entries are finite."""
        matrix = self.matrix
        finite = matrix.isfinite().all() & self.below[-1].isfinite()
        return *eigh(torch.where(finite, matrix, 0.0)), finite

    def unseen(self, largest: Tensor, overlap: Tensor | float) -> Tensor:
        """Return the distance above the largest Ritz value without eigenvalues; see the function."""
        return unseen(largest, self.diagonal, self.below, self.size, overlap)


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


def tridiagonalize(
    operator: Symmetric,
    start: Tensor,
    steps: int,
    *,
    least: int = 1,
    enough: Callable[[Tridiagonal], bool] | None = None,
) -> Tridiagonal:
    """Project an operator on the space of ``start, A start, ..., A**(steps - 1) start``.

    The basis is fully orthogonalised. Its vectors are not normalised; their inverse norms are kept beside
    them.

    Args:
        operator: ``A``.
        start: Vector of ``[n]``, not zero.
        steps: Number of products; no more than ``n`` are made.
        least: Products before ``enough`` is asked.
        enough: Gets the projection so far and returns whether it suffices.

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
        found = Tridiagonal(diagonal, below, alives, size, noise, basis[: j + 1], inverses)
        if enough is not None and least <= j + 1 < steps and enough(found):
            break
        inverse, length = _lengths(squares, scale)
        direction = Direction(
            basis[: j + 2], torch.where(alive, inverse, 0.0), torch.where(alive, length, 0.0)
        )
    return found


def lanczos(
    operator: Symmetric,
    start: Tensor,
    steps: int,
    *,
    overlap: Tensor | float | None = None,
    least: int = 1,
    enough: Callable[[Tensor, Tensor], bool] | None = None,
) -> Spectrum:
    """Return both ends of the spectrum of an operator on a Krylov space; see ``tridiagonalize``.

    Args:
        operator: ``A``.
        start: Vector of ``[n]``, not zero.
        steps: Number of products; no more than ``n`` are made.
        overlap: As for ``unseen``; by default that of a normally distributed start, see ``random_overlap``.
        least: Products before ``enough`` is asked.
        enough: Gets ``largest`` and ``unseen`` of the products so far and returns whether they suffice.
    """
    share = random_overlap(operator.vectors.length) if overlap is None else overlap

    def suffices(so_far: Tridiagonal) -> bool:
        assert enough is not None
        values, _, finite = so_far.ritz()
        return not finite or enough(values[-1], so_far.unseen(values[-1], share))

    found = tridiagonalize(operator, start, steps, least=least, enough=None if enough is None else suffices)
    values, ritz, finite = found.ritz()
    nan = torch.full_like(found.size, torch.nan)
    weights = ritz[:, -1]
    vector = operator.vectors.basis(1)[0]
    operator.vectors.combine(vector, None, found.basis, torch.stack(found.inverses) * weights, None)
    ended = (~torch.stack(found.alives)).sum()
    return Spectrum(
        largest=torch.where(finite, values[-1], nan),
        smallest=torch.where(finite, values.gather(0, ended[None])[0], nan),
        residual=torch.where(finite, found.below[-1] * weights[-1].abs(), nan),
        unseen=torch.where(finite, found.unseen(values[-1], share), nan),
        asymmetry=torch.where(finite, found.asymmetry, nan),
        vector=vector,
    )


def random_overlap(length: int) -> float:
    """Return what a random unit vector's component along a fixed direction exceeds in 19 of 20 draws.

    Args:
        length: Elements ``n`` of the vector.

    Returns:
        ``sqrt(pi / (2 n)) / 20``: the density of the component is at most ``sqrt(n / (2 pi))``.
    """
    return _MISSED * math.sqrt(math.pi / (2.0 * length))


def unseen(
    largest: Tensor,
    diagonal: Sequence[Tensor],
    below: Sequence[Tensor],
    size: Tensor,
    overlap: Tensor | float,
) -> Tensor:
    """Return the distance above the largest Ritz value beyond which there is no eigenvalue.

    An eigenvalue ``x`` whose vector has the component ``c`` in the start is one mass ``c**2`` of the measure
    whose orthonormal polynomials ``p_0, ..., p_k`` the recurrence gives, and no such mass exceeds
    ``1 / (p_0(x)**2 + ... + p_k(x)**2)``. That falls fast beyond the Ritz values: an eigenvalue with at least
    the component ``overlap`` lies below the point where it falls to ``overlap**2``.

    Args:
        largest: Largest Ritz value, 0-dim.
        diagonal: Diagonal of the recurrence, ``k`` numbers.
        below: Entries beside it, ``k`` with the one after the last row; 0 where the space has ended.
        size: Largest magnitude among them, 0-dim.
        overlap: Least component of the start, of unit length, along the eigenvector.

    Returns:
        0-dim, rounded up by at most 9 %; infinity if it exceeds 16 times ``size``.

    Source: the Christoffel-Markov-Stieltjes inequalities; van Dorsselaer, Hochstenbach & van der Vorst 2000,
    who bound the component of a random start, as Kuczynski & Wozniakowski 1992 do.
    """
    octaves = torch.arange(_FINEST * 8, 4 * 8 + 1, dtype=torch.float64, device=largest.device) / 8.0
    distances = size * torch.exp2(octaves)
    at = largest + distances
    before, polynomial, total = torch.zeros_like(at), torch.ones_like(at), torch.ones_like(at)
    side = torch.zeros_like(size)
    for a, b in zip(diagonal, below, strict=True):
        before, polynomial, side = polynomial, ((at - a) * polynomial - side * before) / b, b
        total = total + polynomial.square()
    # beyond the end of the space all polynomials are infinite, and their differences not defined
    total = torch.nan_to_num(total, nan=torch.inf, posinf=torch.inf)
    return torch.where(total * overlap * overlap >= 1.0, distances, torch.inf).min()


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
