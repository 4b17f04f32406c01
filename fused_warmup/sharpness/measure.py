"""Sharpness, pre-conditioned sharpness and the stability threshold, measured once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _checks as check
from .hvp import Hessian
from .lanczos import Spectrum, lanczos
from .loss_evaluator import Loss, LossEvaluator
from .operators import Operator, evaluator_of, random_vector, step_operators
from .pending_step import PendingStep
from .result import ROUGH, Flags, SharpnessReading


def top_eigenvalue(
    loss_fn: Loss,
    params: Iterable[Tensor],
    *,
    iterations: int = 10,
    method: str = "difference",
    seed: int = 0,
    reduce: bool = False,
) -> SharpnessReading:
    """Measure the algebraically largest eigenvalue of the Hessian of a loss, and restore all state.

    Args:
        loss_fn: Returns the loss, with one element, on the same batch each time it is called; it does not
            call ``backward()``. All evaluations see the same random numbers, also those of generators that
            the closure refers to or its modules own. Not restored are generators inside a C extension,
            another process or thread, those that the closure makes and keeps, and ``random.SystemRandom``.
        params: Parameters, float32, float64, bfloat16 or float16 of any shape on one device. Those that the
            loss does not depend on count as zero rows. DTensors of FSDP2 and tensor parallelism are measured
            as one whole model: every rank makes the call, and losses are means over all ranks. All are taken
            as they are stored: ``preconditioned`` adds what the ``param_rounding`` of its optimizer keeps.
        iterations: Hessian-vector products of two gradients each; two more products estimate ``err_fd``.
        method: ``"difference"`` of gradients, or ``"autograd"`` for double backward, the exact form where
            every operation has a second derivative; not for DTensors.
        seed: Seed of the start vector.
        reduce: Measure the mean of the losses of all ranks of the default process group, if there is one:
            every rank calls this, with its own batch, and gets the same reading.

    Returns:
        The reading; ``edge_ratio`` is NaN.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range.

    Source: Lanczos with full reorthogonalisation; Kuczynski & Wozniakowski 1992 for random starts.
    """
    owner = "top_eigenvalue"
    steps = check.whole(owner, "iterations", iterations, 1)
    with LossEvaluator(owner, loss_fn, list(params), reduce=reduce) as evaluator:
        hessian = Hessian(evaluator, method)
        operator = Operator(hessian, None, None)
        start = random_vector(evaluator, check.whole(owner, "seed", seed))
        spectrum, error = operator.refine(lanczos(operator, start, steps))
        nan = torch.full_like(error, torch.nan)
        return make_reading(spectrum, error, nan, nan, hessian, 0)


def preconditioned(
    loss_fn: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    iterations: int = 10,
    method: str = "difference",
    use_grad: bool = True,
    seed: int = 0,
    reduce: bool = False,
) -> SharpnessReading:
    """Measure the largest eigenvalue of ``P^-1 H`` for the step that an optimizer is about to make.

    ``P`` is the pre-conditioner of ``theta -= lr * m / P``: ``(1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps)``
    for Adam, with the current gradient in ``v``, and the identity for SGD. ``H`` is the Hessian of the
    function that the optimizer descends: an L2 penalty adds to it, and ``maximize`` turns its sign.
    ``edge_ratio`` includes the learning rate and threshold of each group. Where these differ between groups
    it takes as many products again.

    Args:
        loss_fn: As for ``top_eigenvalue``; the loss of the batch whose gradient is in ``.grad``.
        optimizer: One of this package, or ``Adam``, ``AdamW``, ``RAdam`` or ``SGD`` of torch.
        iterations: Hessian-vector products.
        method: ``"difference"`` or ``"autograd"``.
        use_grad: Use the gradients in ``.grad`` if there are any. False computes them from the closure; pass
            it if ``.grad`` is scaled for ``GradScaler`` or belongs to another step.
        seed: Seed of the start vector.
        reduce: As for ``top_eigenvalue``; gradients in ``.grad`` must be those of the mean already, as
            ``DistributedDataParallel`` leaves them.

    Returns:
        The reading. Reading the step counts waits for the device once.

    Raises:
        TypeError: If the rule of the optimizer is not known, or an argument has a wrong type.
        ValueError: If an argument is out of range.

    Source: Cohen et al. 2022, arXiv:2207.14484; Kalra & Barkeshli 2024, arXiv:2406.09405.
    """
    owner = "preconditioned"
    steps = check.whole(owner, "iterations", iterations, 1)
    pending = PendingStep(owner, optimizer, check.flag(owner, "use_grad", use_grad))
    with evaluator_of(pending, loss_fn, reduce) as evaluator:
        hessian = Hessian(evaluator, method, pending.sign)
        operators = step_operators(pending, hessian)
        start = random_vector(evaluator, check.whole(owner, "seed", seed))
        spectrum, error = operators.plain.refine(lanczos(operators.plain, start, steps))
        scaled = None if operators.scaled is None else lanczos(operators.scaled, start, steps)
        edge_ratio = operators.edge_ratio(spectrum, scaled)
        nan = torch.full_like(error, torch.nan)
        return make_reading(spectrum, error, nan, edge_ratio, hessian, pending.made)


def threshold(optimizer: torch.optim.Optimizer, *, phase: str = "late") -> float:
    """Return the sharpness above which an optimizer is unstable at the learning rate of its next step.

    Late: ``2 / lr`` for gradient descent, ``2 (1 + b) / lr`` with momentum, ``2 (1 + b) / ((1 + 2 b) lr)``
    with Nesterov momentum, to compare with ``top_eigenvalue``; ``2 (1 + beta1) / ((1 - beta1) lr)`` for Adam
    and its variants, to compare with ``preconditioned``. Early, before there is momentum: ``2 / lr``,
    ``2 / ((1 + b) lr)`` with Nesterov momentum and ``2 / ((1 - beta1) lr)``.

    Args:
        optimizer: As for ``preconditioned``.
        phase: ``"late"`` or ``"early"``.

    Returns:
        The threshold; the smallest if groups differ, below which all of them are stable. Infinity at rate 0.

    Raises:
        TypeError: If the rule of the optimizer is not known.
        ValueError: If ``phase`` is another word.

    Source: Cohen et al. 2021, arXiv:2103.00065, and 2022, arXiv:2207.14484; decoupled weight decay, which
    lowers it by the factor ``1 - lr * weight_decay / 2``, is left out.
    """
    late = check.one_of("threshold", "phase", phase, ("late", "early")) == "late"
    members = PendingStep("threshold", optimizer, use_grad=False).members
    return min(
        (m.threshold if late else m.early_threshold) / m.lr if m.lr > 0.0 else math.inf for m in members
    )


def make_reading(
    spectrum: Spectrum,
    err_fd: Tensor,
    err_batch: Tensor,
    edge_ratio: Tensor,
    hessian: Hessian,
    step: Tensor | int,
    **flags: Tensor | bool,
) -> SharpnessReading:
    """Return the reading of a spectrum."""
    # a converged bound is smaller than the rounding of the products
    floor = 16.0 * torch.finfo(spectrum.vector.dtype).eps * spectrum.largest.abs()
    err_krylov = torch.maximum(spectrum.unseen, floor)
    if not hessian.is_exact:
        err_fd = err_fd + spectrum.asymmetry
    return SharpnessReading(
        value=spectrum.largest,
        lo=spectrum.largest - err_fd,
        hi=spectrum.largest + err_krylov + err_fd,
        edge_ratio=edge_ratio,
        lambda_min=spectrum.smallest,
        err_krylov=err_krylov,
        err_fd=err_fd,
        err_batch=err_batch,
        hvps=hessian.products,
        cost=hessian.evaluator.evaluations,
        step=step,
        flags=Flags({
            "nonfinite": ~spectrum.largest.isfinite(),
            "rough": err_fd > ROUGH * spectrum.largest.abs(),
            **flags,
        }),
        batch_size=hessian.evaluator.batch_size,
        method=hessian.method,
    )
