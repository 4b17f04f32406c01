"""Results of measurements: values with the parts of their errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

Scalar = Tensor | float


@dataclass(frozen=True)
class SharpnessReading:
    """A measured sharpness with its error bounds; NaN if it could not be measured.

    Tensors are 0-dim float64 on the device of the parameters; reading one waits for it, as ``asdict`` does.

    Attributes:
        value: Largest eigenvalue, algebraically, of the operator that was measured, in units of
            1 / learning rate.
        lo: Lower bound: ``value - err_fd - err_batch``. No Lanczos term is needed because a Ritz value never
            exceeds the largest eigenvalue.
        hi: Upper bound: ``value`` plus all errors. ``err_krylov`` is an estimate; the largest eigenvalue may
            lie beyond it.
        edge_ratio: ``value`` over the stability threshold at the current learning rate: below 1 is stable,
            and its inverse is the factor by which the learning rate may grow. NaN without an optimizer.
        lambda_min: Smallest Ritz value.
        err_krylov: Lanczos residual: there is an eigenvalue within this distance of ``value``.
        err_fd: Error of the finite differences, from steps of several sizes and the asymmetry of products; 0
            for double backward.
        err_batch: Difference between batches, from Rayleigh quotients of earlier vectors on fresh batches;
            NaN after a single batch, to which ``lo`` and ``hi`` then refer.
        hvps: Hessian-vector products.
        cost: Gradients of the closure that were computed.
        step: Updates made before the measurement.
        flags: Names with 0-dim bools: ``nonfinite``; ``rough`` where ``err_fd`` exceeds a tenth, as for ReLU
            networks, whose kinks affect differences but not double backward; from a probe also ``cold``,
            ``audit`` and ``locked``: the warm start had locked on to an eigenvalue that is no longer the
            largest.
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
    flags: Mapping[str, Tensor | bool] = field(default_factory=dict)

    def asdict(self) -> dict[str, Any]:
        """Return plain numbers and the names of the flags that are set; waits for the device."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "flags"}
        plain = {k: v.item() if isinstance(v, Tensor) else v for k, v in plain.items()}
        return {**plain, "step": int(plain["step"]), "flags": [k for k, held in self.flags.items() if held]}


def bracket(value: Tensor, err_krylov: Tensor, err_fd: Tensor, err_batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``lo`` and ``hi`` of a reading; an unknown batch error counts as 0."""
    err = err_fd + torch.nan_to_num(err_batch, nan=0.0)
    return value - err, value + err_krylov + err


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
