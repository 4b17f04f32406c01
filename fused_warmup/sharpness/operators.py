"""Sharpness, pre-conditioned sharpness and the stability threshold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import _checks as check
from .hvp import Hessian
from .lanczos import Spectrum, lanczos, lengths
from .loss_evaluator import Loss, LossEvaluator
from .pending_step import PendingStep
from .result import SharpnessReading, bracket
from .vectors import dot

# differences that miss by more than this fraction are worth a flag
_ROUGH = 0.1
# and those of long steps that miss by less are better than those of short ones
_SMALL = 2.0**-6


def top_eigenvalue(
    loss_fn: Loss,
    params: Iterable[Tensor],
    *,
    iterations: int = 10,
    method: str = "difference",
    seed: int = 0,
    reduce: bool = False,
) -> SharpnessReading:
    """Measure the largest eigenvalue, algebraically, of the Hessian of a loss; everything is left as it was.

    Args:
        loss_fn: Returns the loss, with one element, on the same batch each time it is called; it does not
            call ``backward()``. All evaluations see the same random numbers, also those of generators that
            the closure refers to or its modules own. Not found are generators inside a C extension, another
            process or thread, those that the closure makes and keeps, and ``random.SystemRandom``.
        params: Parameters, float32, float64, bfloat16 or float16 of any shape on one device. Those that the
            loss does not depend on count as zero rows.
        iterations: Products with the Hessian, two gradients each; two more estimate ``err_fd``.
        method: ``"difference"`` of gradients, or ``"autograd"`` for double backward, the exact form where
            every operation has a second derivative.
        seed: Of the start vector.
        reduce: Measure the mean of the losses of all ranks of the default process group, where there is one:
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

    ``P`` is that of ``theta -= lr * m / P``: for Adam ``(1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps)`` with
    the current gradient in ``v``, for SGD the identity. ``H`` is the Hessian of what the optimizer descends:
    an L2 penalty adds to it, and ``maximize`` turns its sign. ``edge_ratio`` has the learning rate and
    threshold of each group in it. Where those differ between groups it takes products of its own, as many
    again.

    Args:
        loss_fn: As for ``top_eigenvalue``; the loss of the batch whose gradient is in ``.grad``.
        optimizer: One of this package, or ``Adam``, ``AdamW``, ``RAdam`` or ``SGD`` of torch.
        iterations: Products with the Hessian.
        method: ``"difference"`` or ``"autograd"``.
        use_grad: Use the gradients in ``.grad`` if there are any. False computes them from the closure, which
            is right where ``.grad`` is scaled for ``GradScaler`` or belongs to another step.
        seed: Of the start vector.
        reduce: As for ``top_eigenvalue``; gradients in ``.grad`` are those of the mean already, as
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
    with LossEvaluator(owner, loss_fn, pending.params, pending.backend, reduce) as evaluator:
        hessian = Hessian(evaluator, method, pending.sign)
        pair = operators_of(pending, hessian)
        start = random_vector(evaluator, check.whole(owner, "seed", seed))
        spectrum, error = pair.plain.refine(lanczos(pair.plain, start, steps))
        edge = None if pair.scaled is None else lanczos(pair.scaled, start, steps)
        nan = torch.full_like(error, torch.nan)
        return make_reading(spectrum, error, nan, pair.edge_ratio(spectrum, edge), hessian, pending.made)


def threshold(optimizer: torch.optim.Optimizer, *, phase: str = "late") -> float:
    """Return the sharpness above which an optimizer is unstable at the learning rate of its next step.

    Late: ``2 / lr`` for gradient descent, ``2 (1 + b) / lr`` with momentum, ``2 (1 + b) / ((1 + 2 b) lr)``
    with Nesterov's, to compare with ``top_eigenvalue``; ``2 (1 + beta1) / ((1 - beta1) lr)`` for Adam and its
    kin, to compare with ``preconditioned``. Early, before there is momentum: ``2 / lr``, ``2 / ((1 + b) lr)``
    with Nesterov's and ``2 / ((1 - beta1) lr)``.

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
        (m.threshold if late else m.early_threshold) / m.lr if m.lr > 0.0 else float("inf") for m in members
    )


class Operator:
    """``C (H + decay) C``, symmetric.

    Args:
        hessian: The Hessian.
        scale: Diagonal of ``C``, ``[n]``, or None.
        decay: Diagonal added to the Hessian, ``[n]``, or None.
    """

    def __init__(self, hessian: Hessian, scale: Tensor | None, decay: Tensor | None) -> None:
        self._hessian, self.scale = hessian, scale
        self.vectors = hessian.evaluator.vectors
        self._shift = decay if decay is None or scale is None else scale * scale * decay

    def product(
        self, basis: Tensor, out: Tensor, inverse: Tensor, length: Tensor, times: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the product with a unit vector into ``out``, up to a factor; see ``Hessian.product``."""
        factor, products, quotient = self._hessian.product(basis, out, self.scale, inverse, length, times)
        if self._shift is None:
            return factor, products, quotient
        shifted = self._shift * (inverse.to(out.dtype) * basis[-1])
        out.mul_(factor.to(out.dtype)).add_(shifted)
        products = torch.stack([dot(v, out) for v in basis])
        return torch.ones_like(factor), products, quotient + inverse * dot(basis[-1], shifted)

    def quotient(self, vector: Tensor, times: float = 1.0) -> Tensor:
        """Return the Rayleigh quotient of a unit vector of ``[n]``, 0-dim."""
        basis = self.vectors.basis(2)
        basis[0].copy_(vector)
        one = self.vectors.number(1.0)
        _, squares = self.vectors.combine(basis[0], one, basis[:0], one[None][:0], self.scale)
        return self.product(basis[:1], basis[1], *lengths(squares, self.scale), times)[2]

    def difference_error(self, spectrum: Spectrum) -> Tensor:
        """Return the error of finite differences at the Ritz vector, 0-dim; 0 for double backward.

        The error of a step grows with its square, so a step twice as large shows three times the error. The
        top vector sees far more of it than the vectors of the search do, hence the second term. Kinks, as of
        ReLU, make products noisy instead, which shows in their asymmetry; that is not in here.
        """
        if self._hessian.method == "autograd":
            return torch.zeros_like(spectrum.largest)
        near, far = (self.quotient(spectrum.vector, times) for times in (1.0, 2.0))
        return (far - near).abs() / 3.0 + (spectrum.largest - near).abs()

    def refine(self, spectrum: Spectrum) -> tuple[Spectrum, Tensor]:
        """Return the spectrum with a better ``largest``, and the error of finite differences, 0-dim.

        In 32 bits most of what is wrong is rounding of the gradients, which counts for less in a longer step.
        The error of a step four times as long grows with its square, which one of eight times shows; what is
        left without it is about its own square, relatively. The search, of shorter steps, is better where
        that error is large, and it stands where both are far apart, as with kinks, for which squares are no
        law. 16 bits bear no longer step.
        """
        if self._hessian.method == "autograd" or self._hessian.in_16_bits:
            return spectrum, self.difference_error(spectrum)
        near, far = (self.quotient(spectrum.vector, times) for times in (4.0, 8.0))
        part = (far - near) / 3.0
        found = near - part
        error = (found - spectrum.largest).abs()
        better = torch.maximum(part.abs(), error) < _SMALL * found.abs()
        largest = torch.where(better, found, spectrum.largest)
        return replace(spectrum, largest=largest), error


@dataclass
class Pair:
    """The operator ``P^-1 H``, and that with learning rates and thresholds folded in, if it is another.

    Attributes:
        plain: ``P^-1/2 H P^-1/2``.
        scaled: The same over ``edge / lr`` of each group, whose largest eigenvalue is the edge ratio; None
            where that is the same for all.
        factor: ``lr / edge`` where it is the same for all, 0-dim.
    """

    plain: Operator
    scaled: Operator | None
    factor: Tensor

    def edge_ratio(self, plain: Spectrum, scaled: Spectrum | None) -> Tensor:
        """Return the ratio of sharpness and threshold."""
        return plain.largest * self.factor if scaled is None else scaled.largest


def operators_of(pending: PendingStep, hessian: Hessian) -> Pair:
    """Return the operators of the step about to be made."""
    vectors = hessian.evaluator.vectors
    ahead = pending.preconditioner(vectors)
    if ahead is not None:
        decay = vectors.flat(ahead.decays) if ahead.decays else None
        scaled = None if ahead.scaled is None else Operator(hessian, ahead.scaled, decay)
        return Pair(Operator(hessian, ahead.scale, decay), scaled, ahead.factor)
    members = pending.members
    inverse = vectors.flat(pending.inverse_preconditioners(pending.grads_of(hessian)))
    plain_sgd = not pending.spec.is_preconditioned
    scale = None if plain_sgd else inverse.sqrt()
    decay = None
    if any(m.coupled_decay for m in members):
        decay = vectors.flat([vectors.number(m.coupled_decay) for m in members])
    plain = Operator(hessian, scale, decay)
    factors = [m.lr / m.threshold for m in members]
    if len(set(factors)) == 1:
        return Pair(plain, None, vectors.number(factors[0]))
    spread = vectors.flat([vectors.number(factor) for factor in factors])
    return Pair(plain, Operator(hessian, (inverse * spread).sqrt(), decay), vectors.number(0.0))


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
    # a converged residual is below the rounding of the products
    floor = 16.0 * torch.finfo(spectrum.vector.dtype).eps * spectrum.largest.abs()
    err_krylov = torch.maximum(spectrum.residual, floor)
    if hessian.method == "difference":
        err_fd = err_fd + spectrum.asymmetry
    lo, hi = bracket(spectrum.largest, err_krylov, err_fd, err_batch)
    return SharpnessReading(
        value=spectrum.largest,
        lo=lo,
        hi=hi,
        edge_ratio=edge_ratio,
        lambda_min=spectrum.smallest,
        err_krylov=err_krylov,
        err_fd=err_fd,
        err_batch=err_batch,
        hvps=hessian.products,
        cost=hessian.evaluator.evaluations,
        step=step,
        flags={
            "nonfinite": ~spectrum.largest.isfinite(),
            "rough": err_fd > _ROUGH * spectrum.largest.abs(),
            **flags,
        },
    )


def random_vector(evaluator: LossEvaluator, seed: int | torch.Generator) -> Tensor:
    """Return a normal vector of ``[n]``, drawn without a look at torch's own generators."""
    generator = seed
    if isinstance(generator, int):
        generator = torch.Generator(evaluator.device).manual_seed(generator)
    vectors = evaluator.vectors
    drawn = torch.randn(vectors.numel, dtype=vectors.dtype, device=vectors.device, generator=generator)
    return vectors.from_params_order(drawn)
