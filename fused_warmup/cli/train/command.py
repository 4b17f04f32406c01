"""``fused-warmup train``: our step against the torch lines it replaces, on the same batches."""

from __future__ import annotations

import copy
import importlib
import json
import math
import platform
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from ... import _checks as check
from ...backends import resolve
from ...optim.telemetry import Telemetry
from ..console import PlainConsole
from ..files import PATH, folder_of, tried, undisturbed
from ..machine import cpu_model, versions
from ..words import complain
from . import config as setup
from .config import Settings
from .data import Data, Split, load
from .loops import Contestant, Ours, Theirs
from .models import build
from .records import COLUMNS, FORMAT, VERSION, Record
from .report import MORE, charts, draw_all, print_table

_SHOWN_EVERY = 10


class Clock:
    """A contestant, its losses and its times.

    Args:
        contestant: What is timed.
    """

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.losses: list[float] = []
        self.stages: list[float] = []
        self.steps: list[float] = []

    def train_on(self, inputs: Tensor, targets: Tensor) -> float:
        """Make one training step and return the loss; the optimizer stage alone is timed as such."""
        begin = perf_counter()
        model = self.contestant.model
        loss = loss_of(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        looked = perf_counter()
        self.contestant.observe(loss, lambda: loss_of(model(inputs), targets))
        before = perf_counter()
        begin += before - looked
        self.contestant.step()
        after = perf_counter()
        model.zero_grad()
        self.steps.append(perf_counter() - begin)
        self.stages.append(after - before)
        self.losses.append(loss.item())
        return self.losses[-1]

    def summary(self, steps: int) -> dict[str, Any]:
        """Return the numbers of the first steps that the report shows, without an evaluation."""
        losses, stages = self.losses[:steps], self.stages[:steps]
        return {
            "name": self.contestant.name,
            "train_loss": statistics.fmean(losses[-max(1, steps // 10) :]),
            "validation": None,
            "averaged": None,
            "stage_seconds": sum(stages),
            "stage_median": statistics.median(stages),
            "step_seconds": sum(self.steps[:steps]),
            "losses": losses,
        }

    def result(self, data: Data, settings: Settings) -> dict[str, Any]:
        """Return the numbers that the report shows; the model is evaluated here."""
        found = {
            **self.summary(len(self.losses)),
            "validation": evaluate(self.contestant.model, data.validation),
        }
        if settings.ema:
            with self.contestant.averaged() as model:
                # averages have no batch statistics of their own; comes last, as it overwrites the model's
                update_bn(_pieces(data.train.inputs, 256), model)
                found["averaged"] = evaluate(model, data.validation)
        return found


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of logits ``[..., classes]``, in nats."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _pieces(x: Tensor, size: int = 64) -> tuple[Tensor, ...]:
    """Return slices of ``size`` examples."""
    return torch.split(x, size)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
    """Return loss and accuracy over all examples of a split."""
    was_training = model.training
    model.eval()
    loss = hits = 0.0
    for inputs, targets in zip(_pieces(split.inputs), _pieces(split.targets), strict=True):
        logits = model(inputs)
        loss += loss_of(logits, targets).item() * len(targets)
        hits += (logits.argmax(-1) == targets).float().mean().item() * len(targets)
    model.train(was_training)
    return {"loss": loss / len(split.targets), "accuracy": hits / len(split.targets)}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with a number of threads and restore the one before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _progress(console: Console) -> Progress:
    """Return a progress bar that draws only when told, so that no thread of it disturbs the timing."""
    numbers = TextColumn(
        "loss {task.fields[loss]:.4g}  lr {task.fields[lr]:.2e}  norm {task.fields[norm]:.3g}"
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        numbers,
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, auto_refresh=False)


def train_all(clocks: list[Clock], data: Data, settings: Settings) -> None:
    """Train all contestants, turn by turn on the same batches."""
    ours = clocks[0].contestant
    assert isinstance(ours, Ours)
    order = torch.Generator().manual_seed(settings.seed)
    with _progress(Console()) as progress:
        task = progress.add_task(
            settings.model, total=settings.steps, loss=math.nan, lr=math.nan, norm=math.nan
        )
        for done in range(1, settings.steps + 1):
            index = torch.randint(len(data.train.targets), (settings.batch_size,), generator=order)
            inputs, targets = data.train.inputs[index], data.train.targets[index]
            losses = [clock.train_on(inputs, targets) for clock in clocks]
            if done % _SHOWN_EVERY == 0 or done == settings.steps:
                row = ours.opt.telemetry.latest()
                progress.update(task, completed=done, loss=losses[0], lr=row["lr"], norm=row["grad_norm"])
                progress.refresh()


def run(settings: Settings, console: PlainConsole) -> None:
    """Train, write the files and print the table; an interrupt or an error keeps the steps before it."""
    with _threads(settings.threads):
        data = load(settings.model)
        torch.manual_seed(settings.seed)
        model = build(settings.model, data.classes)
        numel = sum(param.numel() for param in model.parameters())
        console.print(f"{settings.model}: {numel:,} parameters; {data.source}")
        ours = Ours(model, settings)
        rivals: list[Contestant] = [ours]
        if settings.compare:
            rivals.append(Theirs(copy.deepcopy(model), settings))
        clocks = [Clock(contestant) for contestant in rivals]

        def keep(results: list[dict[str, Any]]) -> None:
            leave(record(settings, data, numel, results, ours), ours, console)

        try:
            train_all(clocks, data, settings)
            results = [clock.result(data, settings) for clock in clocks]
        except BaseException:
            # an interrupt can come before a contestant has made its step
            done = min(len(clock.losses) for clock in clocks)
            if done:
                with undisturbed():
                    keep([clock.summary(done) for clock in clocks])
                    complain(f"train: stopped after {done} of {settings.steps} steps, which are kept.")
            raise
        with undisturbed():
            keep(results)


def leave(saved: Record, ours: Ours, console: PlainConsole) -> None:
    """Write telemetry, record and charts, and print the table; each is made even if one before it fails."""
    saved = _plain(saved)
    kept = Telemetry()
    kept.load_rows(ours.opt.telemetry.rows()[: len(saved["ours"]["losses"])])
    columns = {name: kept.history()[name].tolist() for name in COLUMNS}
    path = _record_path(saved["settings"]["out"], saved["settings"]["model"])
    table, drawings = path.with_suffix(".csv"), charts(saved, columns, path)
    text = json.dumps(saved, allow_nan=False)
    with ExitStack() as left:
        # the last one goes first
        left.callback(print_table, saved, console)
        left.callback(draw_all, drawings)
        left.callback(path.write_text, text + "\n", encoding="utf-8")
        left.callback(kept.to_csv, table)
        left.callback(path.parent.mkdir, parents=True, exist_ok=True)
    written = [path.with_suffix(".png"), table, path, *list(drawings)[1:]]
    console.write_line(f"written: {', '.join(map(str, written))}")


def _record_path(out: str, model: str) -> Path:
    """Return the path of the record; the other files are beside it."""
    return Path(out) / f"{model}.json"


@contextmanager
def outputs(settings: Settings) -> Iterator[None]:
    """Make the folder and try all files of a training before the block.

    Args:
        settings: What says which files there will be.

    Yields:
        Nothing.

    Raises:
        ValueError: If one of them cannot be written.
    """
    path = _record_path(settings.out, settings.model)
    asked = {"edge": settings.sharpness_every > 0, "search": settings.find_lr}
    more = [path.with_name(f"{path.stem}-{name}.png") for name in MORE if asked[name]]
    with ExitStack() as files:
        files.enter_context(folder_of("train", "--out", path.parent))
        for file in (path, path.with_suffix(".csv"), path.with_suffix(".png"), *more):
            files.enter_context(tried("train", f"{file.name} in --out", file))
        yield


def record(settings: Settings, data: Data, numel: int, results: list[dict[str, Any]], ours: Ours) -> Record:
    """Return everything that the report needs and a reader wants to know, as plain types."""
    first, theirs = results[0], results[1] if len(results) > 1 else None
    done = len(first["losses"])
    notes = [settings.choice.note] if settings.compare and settings.choice.note else []
    if first["validation"] is None:
        notes.append(f"stopped after {done} of {settings.steps} steps, before the evaluation")
    difference = None
    if theirs is not None:
        difference = max(abs(a - b) for a, b in zip(first["losses"], theirs["losses"], strict=True))
    backend = resolve(settings.backend, torch.device("cpu")).name
    machine = {"cpu": cpu_model(), "threads": settings.threads, "system": platform.system()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": asdict(settings),
        "note": "; ".join(notes),
        "data": data.source,
        "parameters": numel,
        "backend": backend,
        "ours": first,
        "theirs": theirs,
        "max_loss_difference": difference,
        "edge": [row for row in ours.edge.rows if row["step"] <= done] if ours.edge is not None else None,
        "search": ours.found,
        "versions": versions(),
        "machine": machine,
    }


def _plain(value: Any) -> Any:
    """Return the value with null for what JSON cannot say: NaN and infinities of a training that diverged."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_OPTIONS: list[tuple[str, Any, Any, str]] = [
    ("--model", str, "gpt", f"{' or '.join(setup.MODELS)}."),
    ("--optimizer", str, "adamw", f"One of {', '.join(setup.OPTIMIZERS)}."),
    ("--schedule", str, "cosine", f"After the warmup: one of {', '.join(setup.SCHEDULES)}."),
    ("--lr", float, None, "Learning rate at the end of the warmup; by default one that suits the optimizer."),
    ("--weight-decay", float, None, "By default that of the optimizer's class."),
    ("--steps", int, None, "Optimizer steps; by default 400 for gpt, 300 for digits."),
    ("--warmup", int, None, "Steps of linear warmup; by default a tenth of the steps."),
    ("--batch-size", int, None, "Examples per step; by default 16 for gpt, 64 for digits."),
    ("--max-grad-norm", float, 1.0, "Clip the gradients to this norm; 0 does not clip."),
    ("--ema", float, 0.98, "Decay of the average of the weights; 0 keeps none."),
    ("--seed", int, 0, "Seed of the model and of the order of the data."),
    # one by default: two that share a busy core wait for each other, and the times say nothing
    ("--threads", int, 1, "Threads of torch and of our kernels."),
    ("--backend", str, "auto", "Backend of our step."),
    ("--out", PATH, "out", "Folder for the chart, the telemetry and the numbers."),
]


def _with_options(command: Any) -> Any:
    """Add the options to a command, in the order of the list."""
    for name, kind, default, text in reversed(_OPTIONS):
        shown = default is not None
        command = click.option(name, type=kind, default=default, show_default=shown, help=text)(command)
    return command


@click.command()
@_with_options
@click.option("--sharpness", is_flag=True, help="Measure sharpness and threshold, and draw them.")
@click.option(
    "--sharpness-every", type=int, default=10, show_default=True, help="Steps between the readings."
)
@click.option("--find-lr", is_flag=True, help="Search along the first step for its critical learning rate.")
@click.option("--compare/--no-compare", default=True, help="Train with the torch lines, too.")
def train(out: Path, sharpness: bool, sharpness_every: int, **options: Any) -> None:
    """Train a small model with our step and, on the same batches, with the torch lines it replaces."""
    # 0 stands for no readings, which is not for the option to say
    every = check.whole("train", "--sharpness-every", sharpness_every, 1) if sharpness else 0
    settings = setup.make(**options, out=str(out), sharpness_every=every)
    # without it there is nothing to draw the charts with
    importlib.import_module("matplotlib.figure")
    with outputs(settings):
        run(settings, PlainConsole())
