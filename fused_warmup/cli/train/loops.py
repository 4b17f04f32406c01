"""Training loops with the optimizer stage in one line, or in the four torch lines that it replaces."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fused_warmup as fw

from .config import DTYPES, TrainConfig
from .data import Data, Split
from .edge import SharpnessRecorder, search_first_step

_EVALUATION_BATCH = 64
_BATCH_NORM_BATCH = 256


class TrainingLoop(ABC):
    """A model, its optimizer stage, and the losses and times of the steps so far.

    Args:
        name: Name in tables and charts.
        model: The model.

    Attributes:
        losses: Training loss of every step.
        stage_seconds: Seconds of every optimizer stage.
        step_seconds: Seconds of every training step without the measurements.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model
        self.losses: list[float] = []
        self.stage_seconds: list[float] = []
        self.step_seconds: list[float] = []

    @abstractmethod
    def measure(self, loss: Tensor, loss_fn: Callable[[], Tensor]) -> None:
        """Record the loss and take measurements between backward and the optimizer stage; not timed."""

    @abstractmethod
    def step(self) -> None:
        """Run the optimizer stage."""

    @abstractmethod
    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Provide the model with the averaged weights."""

    def train_on(self, inputs: Tensor, targets: Tensor) -> float:
        """Run one training step and return its loss; the optimizer stage is timed on its own."""
        begin = perf_counter()
        loss = loss_of(self.model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        backward_end = perf_counter()
        self.measure(loss, lambda: loss_of(self.model(inputs), targets))
        stage_begin = perf_counter()
        self.step()
        stage_end = perf_counter()
        self.model.zero_grad()
        end = perf_counter()
        self.step_seconds.append(end - stage_begin + backward_end - begin)
        self.stage_seconds.append(stage_end - stage_begin)
        self.losses.append(loss.item())
        return self.losses[-1]

    def summary(self, steps: int) -> dict[str, Any]:
        """Return the saved results of the first steps, without an evaluation."""
        losses, stages = self.losses[:steps], self.stage_seconds[:steps]
        last_tenth = losses[-max(1, steps // 10) :]
        return {
            "name": self.name,
            "train_loss": statistics.fmean(last_tenth),
            "validation": None,
            "averaged": None,
            "stage_seconds": sum(stages),
            "stage_median": statistics.median(stages),
            "step_seconds": sum(self.step_seconds[:steps]),
            "losses": losses,
        }

    def result(self, data: Data, config: TrainConfig) -> dict[str, Any]:
        """Evaluate the model and return the saved results of the whole training."""
        results = self.summary(len(self.losses))
        results["validation"] = evaluate(self.model, data.validation)
        if config.ema:
            with self.averaged() as model:
                # averages have no batch statistics; this overwrites those of the model, so it comes last
                update_bn(torch.split(data.train.inputs, _BATCH_NORM_BATCH), model)
                results["averaged"] = evaluate(model, data.validation)
        return results


class FusedLoop(TrainingLoop):
    """The optimizer stage in one line.

    Args:
        model: The model.
        config: Configuration of the training.

    Attributes:
        opt: The optimizer.
        sharpness: Recorder of sharpness readings, or None.
        search: Result of the search along the first step, or None.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        kind = config.pair.ours
        super().__init__(f"fused_warmup {kind.__name__}", model)
        self.opt = kind(
            model.parameters(),
            **config.shared_options(),
            schedule=config.build_schedule(),
            max_grad_norm=config.max_grad_norm or None,
            average=fw.EMA(config.ema) if config.ema else None,
            param_rounding=config.param_rounding,
            rounding_seed=config.seed,
            state_dtype=DTYPES[config.state_dtype],
            backend=config.backend,
            telemetry="all",
        )
        self.sharpness: SharpnessRecorder | None = None
        if config.sharpness_every:
            self.sharpness = SharpnessRecorder(self.opt, config.sharpness_every)
        self.search: dict[str, Any] | None = None
        self._target = config.lr if config.find_lr else None

    def measure(self, loss: Tensor, loss_fn: Callable[[], Tensor]) -> None:
        """Record the loss; on request measure the sharpness and search along the first step."""
        self.opt.record_loss(loss)
        if self._target is not None:
            self.search = search_first_step(self.opt, loss_fn, self._target)
            self._target = None
        if self.sharpness is not None:
            self.sharpness.measure(loss_fn)

    def step(self) -> None:
        """Run the optimizer stage."""
        self.opt.step()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Swap the averaged weights into the model.

        Yields:
            The model.
        """
        with self.opt.averaged_parameters():
            yield self.model


class TorchLoop(TrainingLoop):
    """The optimizer stage in four torch lines.

    Args:
        model: The model.
        config: Configuration of the training.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__(f"torch {config.pair.peer}", model)
        options = config.shared_options()
        if config.pair.fused:
            options["fused"] = True
        self.opt = config.pair.theirs(model.parameters(), **options)
        self.scheduler = LambdaLR(self.opt, config.build_schedule())
        self.max_grad_norm = config.max_grad_norm
        self.average: AveragedModel | None = None
        if config.ema:
            ema = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(model, multi_avg_fn=ema)

    def measure(self, loss: Tensor, loss_fn: Callable[[], Tensor]) -> None:
        """Do nothing: torch's optimizers record no telemetry."""

    def step(self) -> None:
        """Run the optimizer stage."""
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.opt.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Provide the averaged copy of the model.

        Yields:
            The copy.
        """
        assert self.average is not None
        yield self.average


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of logits ``[..., classes]``, in nats; float32 also for 16-bit logits."""
    return functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
    """Return loss and accuracy over all examples of a split."""
    was_training = model.training
    model.eval()
    loss = hits = 0.0
    batches = zip(
        torch.split(split.inputs, _EVALUATION_BATCH),
        torch.split(split.targets, _EVALUATION_BATCH),
        strict=True,
    )
    for inputs, targets in batches:
        logits = model(inputs)
        loss += loss_of(logits, targets).item() * len(targets)
        hits += (logits.argmax(-1) == targets).float().mean().item() * len(targets)
    model.train(was_training)
    return {"loss": loss / len(split.targets), "accuracy": hits / len(split.targets)}
