"""Results of measurements: values with the parts of their errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks as check

Scalar = Tensor | float

# share of a value above which its `err_fd` sets the flag `rough`
ROUGH = 0.1


class Flags(Set[str]):
    """The names of the flags of a reading that are set, as a set: ``"rough" in reading.flags``.

    Asking waits for the device where a flag is a tensor there, making one does not.

    Args:
        tensors: Names with 0-dim bools, set or not.

    Attributes:
        tensors: The same.
    """

    def __init__(self, tensors: Mapping[str, Tensor | bool] | None = None) -> None:
        self.tensors = dict(tensors or {})

    def __contains__(self, name: object) -> bool:
        """Return whether the flag of this name is set."""
        return bool(self.tensors.get(str(name), False))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the flags that are set."""
        return (name for name in self.tensors if name in self)

    def __len__(self) -> int:
        """Return the number of flags that are set."""
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        """Return the names as a set."""
        return f"Flags({list(self)})"

    @classmethod
    def _from_iterable(cls, it: Any) -> Any:
        """Return the result of a set operation."""
        return set(it)


@dataclass(frozen=True)
class SharpnessReading:
    """A measured sharpness of one batch with its error bounds; NaN if it could not be measured.

    Tensors are 0-dim float64 on the device of the parameters; reading one waits for it, as ``asdict`` does.
    All but ``err_batch`` refer to the loss that the closure returns, on its batch.

    Attributes:
        value: Largest eigenvalue, algebraically, of the operator that was measured, in units of
            1 / learning rate.
        lo: Lower bound for the batch: ``value - err_fd``. No Lanczos term is needed because a Ritz value
            never exceeds the largest eigenvalue.
        hi: Upper bound for the batch: ``value + err_krylov + err_fd``.
        edge_ratio: ``value`` over the stability threshold at the current learning rate: below 1 is stable,
            and its inverse is the factor by which the learning rate may grow. NaN without an optimizer.
        lambda_min: Smallest Ritz value.
        err_krylov: Distance above ``value`` beyond which the operator has no eigenvalue, in 19 of 20
            readings: of the random starts, one in 20 has a smaller component along the top vector than the
            bound assumes.
        err_fd: Error of the products: from steps of several sizes and the asymmetry of products. 0 for
            ``method="autograd"``; with double backward that ``method="auto"`` chose, the asymmetry alone.
        err_batch: How far ``value`` exceeds the sharpness of all data because it is the largest of this
            batch: the curvature that this batch has along the previous reading's vector, which does not
            depend on it, is subtracted from ``value``, and the difference averaged over the readings so far.
            By convexity ``value - err_batch`` and ``value`` enclose the sharpness of all data in the mean.
            NaN without a previous reading; near 0, and no statement on other batches, where the closure
            always measures the same one. No part of ``lo`` and ``hi``.
        hvps: Hessian-vector products.
        cost: Gradients of the closure that were computed.
        step: Updates made before the measurement.
        flags: Set of names, false where none is set: ``nonfinite``; ``rough`` where ``err_fd`` exceeds a
            tenth, as with differences for ReLU networks, whose kinks do not affect double backward; from a
            probe also ``unconverged`` where ``err_krylov`` exceeds its tolerance, ``cold``, ``audit``, and
            ``locked``: the warm start had locked on to an eigenvalue that is no longer the largest.
        batch_size: Length of the first dimension of the tensor that the closure gives to the first module
            that it runs, in this process; None if it has fewer than two dimensions, is passed by name, that
            module runs several times, or the closure runs no module.
        method: How products were computed: ``"difference"`` or ``"autograd"``.
        directional: ``value`` of the ``DirectionalReading`` of the same step, from a probe with
            ``directional=True``; else NaN.
        lo_includes: Names of the errors that ``lo`` includes.
        hi_includes: Names of the errors that ``hi`` includes.
    """

    value: Scalar
    lo: Scalar
    hi: Scalar
    edge_ratio: Scalar
    lambda_min: Scalar
    err_krylov: Scalar
    err_fd: Scalar
    err_batch: Scalar
    hvps: int
    cost: int
    step: Scalar | int
    flags: Flags = field(default_factory=Flags)
    batch_size: int | None = None
    method: str = "difference"
    directional: Scalar = math.nan
    lo_includes: ClassVar[tuple[str, ...]] = ("err_fd",)
    hi_includes: ClassVar[tuple[str, ...]] = ("err_krylov", "err_fd")

    def asdict(self) -> dict[str, Any]:
        """Return plain numbers and the names of the flags that are set; waits for the device."""
        return _plain(self)


@dataclass(frozen=True)
class DirectionalReading:
    """Curvature of the loss of one batch over the displacement ``d`` of a step; NaN if that is 0.

    Tensors are 0-dim float64 on the device of the parameters.

    Attributes:
        value: ``d' (g(theta + d) - g(theta)) / d' P d``, in units of 1 / learning rate, for the
            pre-conditioner ``P`` of ``preconditioned`` and the gradient ``g``.
        edge_ratio: ``value`` over the stability threshold at the current learning rate.
        err_fd: Bound on the error of ``value``, if each element of both gradients is right to the last digit
            of the shortest dtype of a parameter, or of bfloat16 where the forward pass or any of them has 16
            bits.
        cost: Gradients of the closure that were computed.
        step: Updates made before the measurement.
        flags: Set of names: ``nonfinite``; ``rough`` where ``err_fd`` exceeds a tenth of ``value``, as where
            the learning rate is close to 0.
        batch_size: As for ``SharpnessReading``.
    """

    value: Scalar
    edge_ratio: Scalar
    err_fd: Scalar
    cost: int
    step: Scalar | int
    flags: Flags = field(default_factory=Flags)
    batch_size: int | None = None

    def asdict(self) -> dict[str, Any]:
        """Return plain numbers and the names of the flags that are set; waits for the device."""
        return _plain(self)


def _plain(reading: SharpnessReading | DirectionalReading) -> dict[str, Any]:
    """Return the fields of a reading as plain numbers, and the names of its flags."""
    plain = {f.name: getattr(reading, f.name) for f in fields(reading) if f.name != "flags"}
    plain = {k: v.item() if isinstance(v, Tensor) else v for k, v in plain.items()}
    return {**plain, "step": int(plain["step"]), "flags": list(reading.flags)}


@dataclass(frozen=True)
class RateSearch:
    """A learning rate found by forward passes.

    Attributes:
        value: Learning rate of the first parameter group; NaN if none was found.
        lo: Largest rate tried that lowered the loss, or a lower bound of the search.
        hi: Smallest rate tried that did not lower the loss; infinity if all did.
        forwards: Evaluations of closures.
        flags: Names of exceptional outcomes.
        err_batch: Mean distance between the rates of two of the batches, infinity if one of them has none.
            With a single batch the distance from the rate of ``previous``, which training has moved too; NaN
            without that.
        batches: Searches along the same direction for each of several batches alone.
    """

    value: float
    lo: float
    hi: float
    forwards: int
    flags: tuple[str, ...] = ()
    err_batch: float = math.nan
    batches: tuple[RateSearch, ...] = ()


@dataclass(frozen=True)
class TraceEstimate:
    """An estimated trace; NaN if a product was not finite.

    Attributes:
        value: The estimate.
        standard_error: Its standard error, from the differences between the vectors; NaN for one vector. The
            errors of finite differences are in it as far as they differ between vectors.
        hvps: Hessian-vector products, one for each random vector.
        cost: Gradients of the closure that were computed.
    """

    value: float
    standard_error: float
    hvps: int
    cost: int

    def asdict(self) -> dict[str, Any]:
        """Return the fields as plain numbers."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class SpectralDensity:
    """Estimated distribution of the eigenvalues of a matrix; NaN where a product was not finite.

    Attributes:
        nodes: Ritz values, float64 of ``[start vectors, steps]`` on the host, ascending in each row.
        weights: Shares of the eigenvalues near them, of the same shape; all of them add up to 1.
        numel: Number of eigenvalues.
        hvps: Hessian-vector products.
        cost: Gradients of the closure that were computed.
    """

    nodes: Tensor
    weights: Tensor
    numel: int
    hvps: int
    cost: int

    @property
    def largest(self) -> float:
        """Largest Ritz value: a lower bound on the largest eigenvalue, up to the error of the products."""
        return self.nodes.max().item()

    @property
    def smallest(self) -> float:
        """Smallest Ritz value: an upper bound on the smallest eigenvalue, up to the error of the products."""
        return self.nodes.min().item()

    def moment(self, order: int) -> float:
        """Return the mean of the eigenvalues to the power ``order``.

        Up to ``2 * steps - 1`` it is the mean of ``z' H**order z / n`` over the start vectors, which is
        unbiased; ``numel * moment(1)`` estimates the trace.
        """
        order = check.whole(type(self).__name__, "order", order)
        return (self.weights * self.nodes**order).sum().item()

    def evaluate(self, grid: Tensor | Sequence[float], width: float | None = None) -> Tensor:
        """Return the density with each Ritz value widened to a Gaussian.

        Args:
            grid: Eigenvalues at which the density is wanted, of any shape.
            width: Standard deviation of the Gaussians; a hundredth of ``largest - smallest`` if None.

        Returns:
            Float64 in the shape of ``grid`` on the host; its integral is 1.

        Raises:
            ValueError: If ``width`` is not positive, or None where all Ritz values are equal.
        """
        points = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
        spread = (self.largest - self.smallest) / 100.0
        if width is None and spread == 0.0:
            check.fail(type(self).__name__, "width", "be given where all nodes are equal", None)
        sigma = spread if width is None else check.number(type(self).__name__, "width", width, ends="()")
        distances = (points[..., None] - self.nodes.flatten()) / sigma
        bells = torch.exp(-0.5 * distances.square()) / (sigma * math.sqrt(2.0 * math.pi))
        return bells @ self.weights.flatten()

    def asdict(self) -> dict[str, Any]:
        """Return plain numbers, and lists of them for ``nodes`` and ``weights``, with both ends."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in plain.items()}
        return {**plain, "largest": self.largest, "smallest": self.smallest}
