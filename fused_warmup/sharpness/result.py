"""What a measurement returns: a value with the parts of its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

Scalar = Tensor | float


@dataclass(frozen=True)
class SharpnessReading:
    """A sharpness and how far it can be trusted; NaN rather than a wrong number.

    Tensors are 0-dim float64 on the device of the parameters; reading one waits for it, as ``asdict`` does.

    Attributes:
        value: Largest eigenvalue, algebraically, of the operator that was measured; 1 / learning rate in
            units.
        lo: ``value`` less the errors of differences and of the batch. A Ritz value is never too large
            besides.
        hi: ``value`` plus all errors. Only ``err_krylov`` is an estimate that the largest eigenvalue may
            escape.
        edge_ratio: ``value`` over the stability threshold at the learning rate in force: below 1 is stable,
            and its inverse is the factor by which the learning rate may grow. NaN without an optimizer.
        lambda_min: Smallest Ritz value.
        err_krylov: Residual: within it of ``value`` there is an eigenvalue.
        err_fd: Error of the finite differences, from steps of several sizes and the asymmetry of products; 0
            for double backward.
        err_batch: Distance from the sharpness of other batches, from Rayleigh quotients of earlier vectors on
            fresh ones; NaN while one batch is all there was. ``lo`` and ``hi`` are then about that batch.
        hvps: Products with the Hessian.
        cost: Gradients of the closure that were computed.
        step: Updates made before the measurement.
        flags: Names with 0-dim bools: ``nonfinite``; ``rough`` where ``err_fd`` is above a tenth, as for
            networks of ReLU, whose kinks differences see and double backward does not; from a probe also
            ``cold``, ``audit`` and ``locked``: a warm start had stayed at an eigenvalue that is no longer the
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
        """Return plain numbers, and the names of the flags that hold; waits for the device."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "flags"}
        plain = {k: v.item() if isinstance(v, Tensor) else v for k, v in plain.items()}
        return {**plain, "step": int(plain["step"]), "flags": [k for k, held in self.flags.items() if held]}


def bracket(value: Tensor, err_krylov: Tensor, err_fd: Tensor, err_batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``lo`` and ``hi`` of a reading; an unknown batch error counts as none."""
    err = err_fd + torch.nan_to_num(err_batch, nan=0.0)
    return value - err, value + err_krylov + err


@dataclass(frozen=True)
class RateSearch:
    """A learning rate found by forward passes.

    Attributes:
        value: Learning rate of the first parameter group; NaN if there is none.
        lo: Largest rate that was seen to lower the loss, or a lower bound of the search.
        hi: Smallest rate that was seen not to lower the loss; infinity if none was.
        forwards: Evaluations of the closure.
        flags: Names of what was unusual.
    """

    value: float
    lo: float
    hi: float
    forwards: int
    flags: tuple[str, ...] = ()
