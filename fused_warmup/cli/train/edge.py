"""Measurements for ``train --sharpness`` and ``train --find-lr``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

import fused_warmup as fw

from ...sharpness.line_search import Line
from ...sharpness.operators import evaluator_of
from ...sharpness.pending_step import PendingStep

Closure = Callable[[], Tensor]

# number of points of the line, and the factors by which it extends below and above the critical rate
_POINTS, _BELOW, _ABOVE = 33, 100.0, 10.0
# most products of a reading
_PRODUCTS = 24


class SharpnessRecorder:
    """Records sharpness, preconditioned sharpness and the stability threshold every few steps.

    The preconditioned sharpness is that of a ``SharpnessProbe``; the sharpness itself takes as many products
    as that takes at most, from a random vector.

    Args:
        opt: The optimizer, with the gradients of the batch in ``.grad`` at each call of ``measure``.
        every: Steps from one measurement to the next.

    Attributes:
        rows: One dictionary per measurement, with the keys of the saved record.
    """

    def __init__(self, opt: fw.FusedOptimizer, every: int) -> None:
        self._opt = opt
        self._params = [p for group in opt.param_groups for p in group["params"]]
        self._probe = fw.SharpnessProbe(opt, every=every, max_products=_PRODUCTS)
        self._step = 0
        self.rows: list[dict[str, Any]] = []

    def measure(self, loss_fn: Closure) -> None:
        """Measure before the next optimizer step, on every ``every``-th call."""
        self._step += 1
        if not self._probe.measure(loss_fn):
            return
        reading = self._probe.poll()
        # a reading on the CPU is finished at once
        assert reading is not None
        top = fw.sharpness.top_eigenvalue(loss_fn, self._params, iterations=_PRODUCTS, method=reading.method)
        self.rows.append({
            "step": self._step,
            **_columns("sharpness", top),
            **_columns("preconditioned", reading),
            "threshold": fw.sharpness.threshold(self._opt),
            "edge_ratio": float(reading.edge_ratio),
        })


def _columns(name: str, reading: fw.SharpnessReading) -> dict[str, Any]:
    """Return value, bounds and flags of a reading by their keys in the record."""
    return {
        name: float(reading.value),
        f"{name}_lo": float(reading.lo),
        f"{name}_hi": float(reading.hi),
        f"{name}_flags": sorted(reading.flags),
    }


def search_first_step(opt: fw.FusedOptimizer, loss_fn: Closure, target: float) -> dict[str, Any]:
    """Return the losses along the next step, its critical learning rate and the initial rate for a warmup.

    Args:
        opt: The optimizer, with the gradients of the batch in ``.grad``.
        loss_fn: Returns the loss of the same batch.
        target: Learning rate at the end of the warmup.

    Returns:
        Plain types: ``rates`` and ``losses`` of the line, the loss ``start`` at rate 0, the rates
        ``critical`` and ``initial`` (NaN if there is none), and the forward passes of each search.
    """
    critical = fw.sharpness.critical_lr(loss_fn, opt)
    start = min(1e-4, target)
    initial = fw.tuning.initial_lr(loss_fn, opt, start=start, target=target)
    middle = critical.value if math.isfinite(critical.value) else target
    # not numpy.geomspace, which warns for rates beyond the largest float
    factors = [(_BELOW * _ABOVE) ** (i / (_POINTS - 1)) for i in range(_POINTS)]
    rates = [middle / _BELOW * factor for factor in factors]
    pending = PendingStep("search", opt)
    with evaluator_of(pending, loss_fn) as evaluator:
        line = Line(evaluator, pending)
        losses = [line.loss(rate) for rate in rates]
    return {
        "rates": rates,
        "losses": losses,
        "start": line.start,
        "critical": critical.value,
        "critical_forwards": critical.forwards,
        "initial": initial.value,
        "initial_forwards": initial.forwards,
        "target": target,
    }
