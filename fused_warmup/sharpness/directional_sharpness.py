"""Directional sharpness: curvature along the next step of an optimizer, over its whole length."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .hvp import Hessian
from .loss_evaluator import Loss
from .operators import evaluator_of
from .pending_step import PendingStep
from .result import ROUGH, DirectionalReading, Flags


class Secant(NamedTuple):
    """Curvature of the loss over a displacement, 0-dim float64 each; NaN for a displacement of 0.

    Attributes:
        value: See ``DirectionalReading``.
        edge_ratio: See there.
        err_fd: See there.
    """

    value: Tensor
    edge_ratio: Tensor
    err_fd: Tensor


def directional(
    loss_fn: Loss, optimizer: torch.optim.Optimizer, *, use_grad: bool = True, reduce: bool = False
) -> DirectionalReading:
    """Measure the directional sharpness of the step that an optimizer is about to make.

    It is ``d' (g(theta + d) - g(theta)) / d' P d`` for the displacement ``d`` of that step, the gradient
    ``g`` and the pre-conditioner ``P`` of ``preconditioned``: the Rayleigh quotient of the Hessian averaged
    over the path of the step. So it includes what the step meets on its way, such as the kinks of ReLU, which
    no Hessian at a point has. Half of it times ``d' P d`` is what curvature adds to the loss, up to the third
    order. Where the loss is quadratic it is at most the largest eigenvalue. L2 penalties and ``maximize``
    count as in ``preconditioned``.

    Args:
        loss_fn: As for ``top_eigenvalue``.
        optimizer: One of this package, or ``Adam``, ``AdamW``, ``RAdam`` or ``SGD`` of torch.
        use_grad: Take the step that the gradients in ``.grad`` give, if there are any. False computes them
            from the closure.
        reduce: As for ``preconditioned``.

    Returns:
        The reading, from two gradients. Finding the step waits for the device.

    Raises:
        TypeError: If the rule of the optimizer is not known, or an argument has a wrong type.
        ValueError: If an argument is out of range.

    Source: Pan & Li 2023, arXiv:2306.00204, for the derivative at a point.
    """
    owner = "directional"
    pending = PendingStep(owner, optimizer, check.flag(owner, "use_grad", use_grad))
    with evaluator_of(pending, loss_fn, reduce) as evaluator:
        hessian = Hessian(evaluator, sign=pending.sign)
        found = secant(pending, hessian)
        flags = {"nonfinite": ~found.value.isfinite(), "rough": found.err_fd > ROUGH * found.value.abs()}
        return DirectionalReading(
            *found,
            cost=evaluator.evaluations,
            step=pending.made,
            flags=Flags(flags),
            batch_size=evaluator.batch_size,
        )


def secant(pending: PendingStep, hessian: Hessian) -> Secant:
    """Return the curvature over the displacement of a pending step.

    Args:
        pending: The step.
        hessian: Hessian of the loss at the parameters, which must be as they are stored.
    """
    evaluator, vectors = hessian.evaluator, hessian.evaluator.vectors
    near = vectors.flat(hessian.gradient())
    grads = pending.grads or [g.clone() for g in vectors.split(near)]
    update, inverse = map(vectors.flat, pending.updates_and_inverses(grads))
    vectors.perturb(update, None, vectors.number(-1.0))
    # as far as rounded parameters really move
    ends = zip(vectors.params, evaluator.snapshot, strict=True)
    moved = vectors.flat([end.detach().to(vectors.dtype) - start for end, start in ends])
    far = vectors.flat(hessian.gradient())
    vectors.restore()
    members = pending.members
    decay = vectors.flat([m.coupled_decay for m in members])
    limits = vectors.flat([m.threshold / m.lr if m.lr > 0.0 else 0.0 for m in members])
    # in double, so that the squares of float32 numbers neither overflow nor vanish
    moved = moved.double()
    weighted = torch.where(moved == 0.0, 0.0, moved / inverse)
    gained = hessian.sign * (far - near) + decay * moved
    # of the shortest dtype: beside float64 parameters those of float32 have gradients of float32
    dtypes = [torch.bfloat16] if hessian.in_16_bits else [p.dtype for p in vectors.params]
    rounded = max(torch.finfo(dtype).eps for dtype in dtypes) * (near.abs() + far.abs())
    curvature, length, limit = vectors.dots((gained, weighted, limits * weighted), moved)
    error = vectors.dots((rounded,), moved.abs())[0]
    return Secant(curvature / length, curvature / limit, error / length.abs())
