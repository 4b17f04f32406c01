"""Symmetric operators of a measurement: the Hessian, and its pre-conditioned forms for a pending step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .hvp import Hessian
from .lanczos import Spectrum, start_direction
from .loss_evaluator import Loss, LossEvaluator
from .pending_step import PendingStep
from .vectors import Direction, Product

# largest relative error of long finite-difference steps that still beat short ones
_SMALL = 2.0**-6


class Operator:
    """``C (H + decay) C``, symmetric.

    Args:
        hessian: The Hessian.
        scale: Diagonal of ``C``, ``[n]``, or None.
        decay: Diagonal added to the Hessian, ``[n]``, or None.

    Attributes:
        evaluator: Evaluator of the loss.
        vectors: Operations on vectors.
    """

    def __init__(self, hessian: Hessian, scale: Tensor | None, decay: Tensor | None) -> None:
        self._hessian, self.scale = hessian, scale
        self.evaluator, self.vectors = hessian.evaluator, hessian.evaluator.vectors
        self._shift = decay if decay is None or scale is None else scale * scale * decay

    def product(self, direction: Direction, out: Tensor, times: float = 1.0) -> Product:
        """Write the product with a unit vector into ``out``, up to a factor; see ``Hessian.product``."""
        found = self._hessian.product(direction, out, self.scale, times)
        if self._shift is None:
            return found
        basis, inverse = direction.basis, direction.inverse
        shifted = self._shift * (inverse.to(out.dtype) * basis[-1])
        out.mul_(found.factor.to(out.dtype)).add_(shifted)
        dots = self.vectors.dots(basis, out)
        quotient = found.quotient + inverse * self.vectors.dots(basis[-1:], shifted)[0]
        return Product(torch.ones_like(found.factor), dots, quotient)

    def quotient(self, vector: Tensor, times: float = 1.0) -> Tensor:
        """Return the Rayleigh quotient of a vector of ``[n]`` of any length, 0-dim."""
        return self._product_with(vector, times)[0].quotient

    @property
    def in_16_bits(self) -> bool:
        """See ``Hessian.in_16_bits``; only an evaluation shows whether the forward pass is rounded."""
        return self._hessian.in_16_bits

    def multiply(self, vector: Tensor) -> Tensor:
        """Return the product with a vector of ``[n]`` of any length, ``[n]``."""
        # in double, so that the squares of float32 numbers neither overflow nor vanish
        norm = self.evaluator.shards.norm(self.vectors.split(vector), torch.float64)
        found, out = self._product_with(vector / torch.where(norm == 0.0, 1.0, norm))
        return out.mul_((found.factor * norm).to(out.dtype))

    def image(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return the direction of the product with a unit vector, up to its sign, and its Rayleigh quotient.

        Zeros where the product is zero or not finite.
        """
        product, image = self._product_with(vector)
        length = self.vectors.norm(image)
        return torch.where((length > 0.0) & length.isfinite(), image / length, 0.0), product.quotient

    def _product_with(self, vector: Tensor, times: float = 1.0) -> tuple[Product, Tensor]:
        """Return the product with the unit vector of a vector, and what it has written."""
        basis = self.vectors.basis(2)
        basis[0].copy_(vector)
        direction = start_direction(self.vectors, basis[:1], self.scale)
        return self.product(direction, basis[1], times), basis[1]

    def difference_error(self, spectrum: Spectrum) -> Tensor:
        """Return the error of finite differences at the Ritz vector, 0-dim; 0 for double backward.

        The error grows with the square of the step, so doubling the step shows three times the error. It is
        far larger at the top vector than at the vectors of the search, hence the second term. Kinks, as of
        ReLU, make products noisy instead; ``Spectrum.asymmetry`` measures that noise.
        """
        if self._hessian.method == "autograd":
            return torch.zeros_like(spectrum.largest)
        near, far = (self.quotient(spectrum.vector, times) for times in (1.0, 2.0))
        return (far - near).abs() / 3.0 + (spectrum.largest - near).abs()

    def refine(self, spectrum: Spectrum) -> tuple[Spectrum, Tensor]:
        """Return the spectrum with a better ``largest``, and the error of finite differences, 0-dim.

        In float32 most of the error is rounding of the gradients, which longer steps reduce. Richardson
        extrapolation of the 4x and 8x steps removes their O(h^2) term. The Lanczos value stays if the two
        disagree by more than 2^-6 (ReLU kinks, for example, where the error is not O(h^2)) or in 16-bit
        precision.
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
class StepOperators:
    """The operator ``P^-1 H`` of a step, and the one whose largest eigenvalue is the edge ratio.

    Attributes:
        plain: ``P^-1/2 H P^-1/2``.
        scaled: The same over ``threshold / lr`` of each group, whose largest eigenvalue is the edge ratio;
            None where that quotient is the same for all groups.
        factor: ``lr / threshold`` where it is the same for all groups, 0-dim.
    """

    plain: Operator
    scaled: Operator | None
    factor: Tensor

    def edge_ratio(self, plain: Spectrum, scaled: Spectrum | None) -> Tensor:
        """Return the sharpness over the stability threshold."""
        return plain.largest * self.factor if scaled is None else scaled.largest


def evaluator_of(pending: PendingStep, loss_fn: Loss, reduce: bool = False) -> LossEvaluator:
    """Return the evaluator of a loss at the parameters of a pending step."""
    residues = pending.residues
    return LossEvaluator(pending.owner, loss_fn, pending.params, pending.backend, reduce, residues)


def step_operators(pending: PendingStep, hessian: Hessian) -> StepOperators:
    """Return the operators of a pending step."""
    vectors = hessian.evaluator.vectors
    preconditioner = pending.preconditioner(vectors)
    if preconditioner is not None:
        decay = vectors.flat(preconditioner.decays) if preconditioner.decays else None
        plain = Operator(hessian, preconditioner.scale, decay)
        scaled = None if preconditioner.scaled is None else Operator(hessian, preconditioner.scaled, decay)
        return StepOperators(plain, scaled, preconditioner.factor)
    members = pending.members
    inverse = vectors.flat(pending.inverse_preconditioners(pending.grads_of(hessian)))
    scale = inverse.sqrt() if pending.spec.is_preconditioned else None
    decays = [m.coupled_decay for m in members]
    decay = vectors.flat(decays) if any(decays) else None
    plain = Operator(hessian, scale, decay)
    factors = [m.lr / m.threshold for m in members]
    if len(set(factors)) == 1:
        return StepOperators(plain, None, vectors.number(factors[0]))
    scaled = Operator(hessian, (inverse * vectors.flat(factors)).sqrt(), decay)
    return StepOperators(plain, scaled, vectors.number(0.0))


def random_vector(evaluator: LossEvaluator, seed: int | torch.Generator) -> Tensor:
    """Return a standard normal vector ``[n]``, without touching torch's global random numbers.

    Processes draw the vector of one process, whole, and keep their parts.
    """
    generator = seed
    if isinstance(generator, int):
        generator = torch.Generator(evaluator.device).manual_seed(generator)
    vectors = evaluator.vectors
    drawn = torch.randn(vectors.length, dtype=vectors.dtype, device=vectors.device, generator=generator)
    return vectors.from_params_order(drawn)


def random_signs(evaluator: LossEvaluator, generator: torch.Generator) -> Tensor:
    """Return a vector of ``[n]`` whose elements are 1 or -1 (Rademacher); see ``random_vector``."""
    drawn = random_vector(evaluator, generator)
    return torch.where(drawn < 0.0, -1.0, 1.0).to(drawn.dtype)
