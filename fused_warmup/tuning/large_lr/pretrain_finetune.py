"""Pre-train at a large learning rate, above the convergence threshold, then fine-tune or average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import _checks as check
from ...optim.losses import loss_value
from .geometry import average_states, copied_state, linear_barrier
from .regimes import Trial

State = dict[str, Tensor]


@dataclass(frozen=True)
class LargeLR:
    """Result of ``pretrain_finetune``.

    Attributes:
        lr: Rate of the pre-training.
        losses: Training loss of each epoch of the pre-training.
        scores: Scores of ``evaluate`` for ``"pretrained"``, ``"averaged"`` and each rate of fine-tuning.
        states: State dicts by the same keys.
        best: The key with the highest score; the model is left in this state.
        barrier: Error barrier between the lowest and the highest rate of fine-tuning; None without ``error``.
    """

    lr: float
    losses: tuple[float, ...]
    scores: dict[str | float, float]
    states: dict[str | float, State]
    best: str | float
    barrier: float | None

    @property
    def trial(self) -> Trial:
        """The trial of this rate for ``find_regimes``, see its ``train``."""
        tuned = max(score for key, score in self.scores.items() if key != "pretrained")
        return Trial(self.losses, (self.scores["pretrained"],), tuned, self.barrier)


def pretrain_finetune(
    model: nn.Module,
    make_optimizer: Callable[[float], torch.optim.Optimizer],
    run_epoch: Callable[[torch.optim.Optimizer], float],
    evaluate: Callable[[], float],
    *,
    lr: float,
    epochs: int,
    finetune_lrs: Sequence[float] = (),
    finetune_epochs: int | None = None,
    average: int = 5,
    error: Callable[[], float] | None = None,
    prepare: Callable[[], None] | None = None,
) -> LargeLR:
    """Pre-train at one rate, then fine-tune at lower ones and average the last checkpoints.

    Pre-training just above the largest rate at which training still converges gives the best start for both;
    lower and much higher rates are worse. ``find_regimes`` finds that window.

    Args:
        model: Model to train; it is left in the best of the states.
        make_optimizer: Returns a new optimizer of the model's parameters for a rate. Plain SGD in the paper.
        run_epoch: Trains the model for an epoch with an optimizer, and returns its mean training loss.
        evaluate: Returns the score of the model in its present state; higher is better.
        lr: Constant rate of the pre-training, > 0.
        epochs: Epochs of the pre-training.
        finetune_lrs: Constant rates of fine-tuning, each from the end of the pre-training.
        finetune_epochs: Epochs of each fine-tuning; None takes ``epochs``.
        average: Number of last epochs of the pre-training whose checkpoints are averaged; 0 averages none.
        error: Returns the training error of the model, to measure ``barrier`` between two or more rates.
        prepare: Called after averaging and at each point of the barrier, for example to project the weights
            back to their sphere or to recompute the statistics of batch norms.

    Returns:
        Scores and states.

    Raises:
        TypeError: If ``run_epoch``, ``evaluate`` or ``error`` returns no number.
        ValueError: If an argument is out of range, or there is neither fine-tuning nor averaging.

    Source: Sadrtdinov et al. 2024, arXiv:2410.22113, section 3.
    """
    owner = "pretrain_finetune"
    lr = check.number(owner, "lr", lr, ends="()")
    epochs = check.whole(owner, "epochs", epochs, 1)
    rates = [
        check.number(owner, f"finetune_lrs[{i}]", rate, ends="()") for i, rate in enumerate(finetune_lrs)
    ]
    later = epochs if finetune_epochs is None else check.whole(owner, "finetune_epochs", finetune_epochs, 1)
    if check.whole(owner, "average", average) > epochs:
        check.fail(owner, "average", f"be <= epochs, which is {epochs}", average)
    if not average and not rates:
        check.fail(owner, "finetune_lrs", "hold a rate where nothing is averaged", finetune_lrs)

    losses, checkpoints = [], []
    optimizer = make_optimizer(lr)
    for epoch in range(epochs):
        losses.append(loss_value(owner, "run_epoch", run_epoch(optimizer), returned=True))
        if epoch >= epochs - average:
            checkpoints.append(copied_state(model.state_dict()))
    states: dict[str | float, State] = {}
    scores: dict[str | float, float] = {}

    def keep(key: str | float) -> None:
        states[key] = copied_state(model.state_dict())
        scores[key] = loss_value(owner, "evaluate", evaluate(), returned=True)

    keep("pretrained")
    if average:
        model.load_state_dict(average_states(checkpoints))
        if prepare is not None:
            prepare()
        keep("averaged")
    for rate in rates:
        model.load_state_dict(states["pretrained"])
        optimizer = make_optimizer(rate)
        for _ in range(later):
            run_epoch(optimizer)
        keep(rate)
    barrier = None
    if error is not None and len(rates) > 1:
        ends = states[min(rates)], states[max(rates)]
        barrier = linear_barrier(model, *ends, error, prepare=prepare).value
    best = max(scores, key=lambda key: scores[key])
    model.load_state_dict(states[best])
    return LargeLR(lr, tuple(losses), scores, states, best, barrier)


def relative_rate(lr: float, weights: Any) -> float:
    """Return the effective learning rate ``lr / |w|^2`` of scale-invariant weights.

    Args:
        lr: Learning rate.
        weights: All scale-invariant weights.

    Returns:
        The rate at which their direction moves, which does not depend on their norm.

    Raises:
        ValueError: If ``lr`` is out of range or there are no weights.

    Source: Sadrtdinov et al. 2024, arXiv:2410.22113, section 3.
    """
    squares = [float(w.detach().double().square().sum()) for w in weights]
    if not sum(squares):
        check.fail("relative_rate", "weights", "not be zero", squares)
    return check.number("relative_rate", "lr", lr) / sum(squares)
