"""Losses with known curvature, and dense Hessians and operators to test products that never form the matrix."""

import itertools

import torch

from fused_warmup.sharpness.vectors import Product, Vectors


def symmetric(values, seed=0):
    """Return a symmetric float64 matrix with the given eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (q * torch.tensor(values, dtype=torch.float64)) @ q.T


def dense_hessian(loss_fn, params):
    """Return the Hessian over all parameters, float64 of ``[n, n]``, one row of double backward at a time."""
    params = list(params)
    grads = torch.autograd.grad(loss_fn(), params, create_graph=True, allow_unused=True)
    flat = torch.cat([
        (torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, params, strict=True)
    ])
    rows = []
    for entry in flat:
        row = (
            torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
            if entry.requires_grad
            else [None] * len(params)
        )
        rows.append(
            torch.cat([
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for g, p in zip(row, params, strict=True)
            ])
        )
    return torch.stack(rows).double()


def tanh_model(dtype=torch.float64, seed=0, sizes=(8, 16, 12, 4)):
    """Return a tanh MLP with fewer than 500 parameters, and a closure of its cross-entropy loss."""
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(a, b), torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers[:-1]).to(dtype)
    x, y = torch.randn(64, sizes[0]).to(dtype), torch.randint(sizes[-1], (64,))
    return model, lambda: torch.nn.functional.cross_entropy(model(x), y)


def curved(shift, sign):
    """Return a quadratic with known critical rates; ascent of its negative is the same as its descent."""
    h = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
    x = torch.tensor([1.0, 0.5, -3.0], dtype=torch.float64, requires_grad=True)
    return x, h, lambda: sign * (0.5 * (h * x * x).sum() - shift)


class DenseOperator:
    """A symmetric matrix as an operator for Lanczos."""

    scale = None

    def __init__(self, matrix):
        self.matrix = matrix
        self.vectors = Vectors([matrix[0]], [matrix[0]], matrix.dtype)

    def product(self, direction, out, times=1.0):
        basis, inverse = direction.basis, direction.inverse
        out.copy_(self.matrix @ basis[-1])
        return Product(inverse, basis @ out, inverse * inverse * (basis[-1] @ out))
