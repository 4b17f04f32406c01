"""Both ends of a spectrum by Lanczos, with every scalar on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .vectors import combine, orthogonalise

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


def lanczos(product: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, steps: int) -> Spectrum:
    """Search the space of ``start, A start, ..., A**(steps - 1) start``, fully orthogonalised.

    Args:
        product: Returns ``A v`` and ``v' A v`` for a unit vector, ``A`` symmetric.
        start: Vector of ``[n]``, not zero.
        steps: Number of products; no more than ``n`` are made.

    Returns:
        Both ends of the spectrum. Where the space is exhausted before, as for the zero matrix, the products
        made in vain leave no trace.
    """
    steps = min(steps, start.numel())
    _, norm, _ = orthogonalise(start, [])
    v = start / norm.to(start.dtype)
    alive = torch.ones((), dtype=torch.bool, device=start.device)
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    below: list[Tensor] = []
    lives: list[Tensor] = []
    size = noise = torch.zeros((), dtype=torch.float64, device=start.device)
    for _ in range(steps):
        basis.append(v)
        lives.append(alive)
        w, alpha = product(v)
        diagonal.append(alpha)
        w, beta, overlaps = orthogonalise(w, basis)
        if below:
            *far, near = overlaps[:-1]
            odd = torch.stack([near - below[-1], *far]).norm()
            noise = torch.maximum(noise, torch.where(alive, odd, 0.0))
        size = torch.maximum(size, torch.maximum(alpha.abs(), beta))
        # NaN compares false and so goes on, to be seen in the result
        alive = alive & ~(beta <= 16.0 * torch.finfo(start.dtype).eps * size)
        below.append(torch.where(alive, beta, 0.0))
        v = torch.where(alive, w / beta.to(w.dtype), basis[0])
    live = torch.stack(lives)
    # rows after the end of the space lie below all eigenvalues
    entries = torch.where(live, torch.stack(diagonal), -3.0 * size - 1.0)
    side = torch.stack(below)[:-1]
    matrix = torch.diag(entries) + torch.diag(side, 1) + torch.diag(side, -1)
    finite = matrix.isfinite().all()
    values, vectors = eigh(torch.where(finite, matrix, 0.0))
    nan = torch.full_like(size, torch.nan)
    weights = vectors[:, -1]
    return Spectrum(
        largest=torch.where(finite, values[-1], nan),
        smallest=torch.where(finite, values.gather(0, (~live).sum()[None])[0], nan),
        residual=torch.where(finite, below[-1] * weights[-1].abs(), nan),
        first=diagonal[0],
        asymmetry=torch.where(finite, noise, nan),
        vector=combine(basis, weights),
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
