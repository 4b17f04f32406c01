"""The edge of stability of a training: what ``train --sharpness`` and ``train --find-lr`` measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

import fused_warmup as fw

from ...sharpness.line_search import Line
from ...sharpness.loss_evaluator import LossEvaluator
from ...sharpness.pending_step import PendingStep

Closure = Callable[[], Tensor]

# points of the line search, and how far they reach around the critical rate
_POINTS, _BELOW, _ABOVE = 33, 100.0, 10.0


class EdgeWatch:
    """Measures sharpness, pre-conditioned sharpness and the threshold now and then, and keeps the numbers.

    Each measurement is cold, some 50 gradients in all, because the chart is of small batches that share
    little from one step to the next. ``SharpnessProbe`` is what costs next to nothing.

    Args:
        opt: The optimizer, with the gradients of the batch in ``.grad`` at each call of ``measure``.
        every: Steps from one measurement to the next.
    """

    def __init__(self, opt: fw.FusedOptimizer, every: int) -> None:
        self._opt, self._every = opt, every
        self._params = [p for group in opt.param_groups for p in group["params"]]
        self._step = 0
        self.rows: list[dict[str, float]] = []

    def measure(self, loss_fn: Closure) -> None:
        """Measure before the step about to be made, if it is time to."""
        self._step += 1
        if (self._step - 1) % self._every:
            return
        top = fw.sharpness.top_eigenvalue(loss_fn, self._params)
        reading = fw.sharpness.preconditioned(loss_fn, self._opt)
        self.rows.append({
            "step": self._step,
            "sharpness": float(top.value),
            "preconditioned": float(reading.value),
            "threshold": fw.sharpness.threshold(self._opt),
            "edge_ratio": float(reading.edge_ratio),
        })


def search(opt: fw.FusedOptimizer, loss_fn: Closure, target: float) -> dict[str, Any]:
    """Return the losses along the step about to be made, with its critical and its initial learning rate.

    Args:
        opt: The optimizer, with the gradients of the batch in ``.grad``.
        loss_fn: Returns the loss of the same batch.
        target: Learning rate at which warmup ends.

    Returns:
        Plain types: ``rates`` and ``losses`` of the line, ``start`` its loss at rate 0, ``critical`` and
        ``initial``, NaN where there is none, and the ``forwards`` that each search took.
    """
    critical = fw.sharpness.critical_lr(loss_fn, opt)
    start = min(1e-4, target)
    initial = fw.tuning.initial_lr(loss_fn, opt, start=start, target=target)
    middle = critical.value if math.isfinite(critical.value) else target
    reach = _BELOW * _ABOVE
    rates = [middle / _BELOW * reach ** (i / (_POINTS - 1)) for i in range(_POINTS)]
    pending = PendingStep("search", opt)
    with LossEvaluator("search", loss_fn, pending.params, pending.backend) as evaluator:
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
