"""``fused-warmup train``: trains with our step and with the torch lines it replaces, on the same batches."""

from __future__ import annotations

import copy
import json
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ... import _checks as check
from ...backends import resolve
from ...optim.telemetry import Telemetry
from ...reference.rounding import MODES
from ..console import PlainConsole
from ..files import PATH, checked_output, created_folder, ignored_interrupts
from ..machine import cpu_model, versions
from ..words import print_error
from .config import DTYPES, MODELS, OPTIMIZERS, SCHEDULES, TrainConfig
from .data import Data, load
from .loops import FusedLoop, TorchLoop, TrainingLoop
from .models import build
from .records import COLUMNS, FORMAT, VERSION, Record
from .report import EXTRA_CHARTS, charts_of, draw_all, print_table

_STEPS_PER_REFRESH = 10


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set torch's number of threads and restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _progress(console: Console) -> Progress:
    """Return a progress bar without a refresh thread, which would disturb the timing."""
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


def train_all(fused: FusedLoop, loops: Sequence[TrainingLoop], data: Data, config: TrainConfig) -> None:
    """Train all loops in turn on the same batches.

    Args:
        fused: The loop whose loss and telemetry the progress bar shows.
        loops: All loops, ``fused`` included.
        data: Data set.
        config: Configuration of the training.
    """
    generator = torch.Generator().manual_seed(config.seed)
    with _progress(Console()) as progress:
        task = progress.add_task(config.model, total=config.steps, loss=math.nan, lr=math.nan, norm=math.nan)
        for done in range(1, config.steps + 1):
            index = torch.randint(len(data.train.targets), (config.batch_size,), generator=generator)
            inputs, targets = data.train.inputs[index], data.train.targets[index]
            for loop in loops:
                loop.train_on(inputs, targets)
            if done % _STEPS_PER_REFRESH == 0 or done == config.steps:
                row = fused.opt.telemetry.latest()
                loss, lr, norm = fused.losses[-1], row["lr"], row["grad_norm"]
                progress.update(task, completed=done, loss=loss, lr=lr, norm=norm)
                progress.refresh()


def run(config: TrainConfig, console: PlainConsole) -> None:
    """Train, write the files and print the table; an interrupt or an error keeps the finished steps."""
    with _threads(config.threads):
        data = load(config.model, config.param_dtype)
        torch.manual_seed(config.seed)
        model = build(config.model, data.classes, config.param_dtype)
        console.print(f"{config.model}: {_parameter_count(model):,} parameters; {data.source}")
        fused = FusedLoop(model, config)
        loops: list[TrainingLoop] = [fused]
        if config.compare:
            loops.append(TorchLoop(copy.deepcopy(model), config))
        try:
            train_all(fused, loops, data, config)
            results = [loop.result(data, config) for loop in loops]
        except BaseException:
            # an interrupt can come between the loops of one step
            done = min(len(loop.losses) for loop in loops)
            if done:
                with ignored_interrupts():
                    summaries = [loop.summary(done) for loop in loops]
                    save_results(build_record(config, data, fused, summaries), fused.opt.telemetry, console)
                    print_error(f"train: stopped after {done} of {config.steps} steps, which are kept.")
            raise
        with ignored_interrupts():
            save_results(build_record(config, data, fused, results), fused.opt.telemetry, console)


def _parameter_count(model: nn.Module) -> int:
    """Return the number of elements of all parameters."""
    return sum(param.numel() for param in model.parameters())


def save_results(record: Record, telemetry: Telemetry, console: PlainConsole) -> None:
    """Write telemetry, record and charts, and print the table; one failing output does not stop the others.

    Args:
        record: The record of the training.
        telemetry: Telemetry of our optimizer; rows after the last step of the record are left out.
        console: Console for the table.
    """
    record = _json_values(record)
    kept = Telemetry(keep_all=True)
    kept.load_rows(telemetry.rows()[: len(record["ours"]["losses"])])
    history = kept.history()
    columns = {name: history[name].tolist() for name in COLUMNS}
    path = _record_path(record["settings"]["out"], record["settings"]["model"])
    table, chart = path.with_suffix(".csv"), path.with_suffix(".png")
    drawings = charts_of(record, columns, path)
    text = json.dumps(record, allow_nan=False)
    with ExitStack() as outputs:
        # callbacks run last in, first out, and all of them even if one raises
        outputs.callback(print_table, record, console)
        outputs.callback(draw_all, drawings)
        outputs.callback(path.write_text, text + "\n", encoding="utf-8")
        outputs.callback(kept.to_csv, table)
        outputs.callback(path.parent.mkdir, parents=True, exist_ok=True)
    more = [drawing for drawing in drawings if drawing != chart]
    console.write_line(f"written: {', '.join(map(str, [chart, table, path, *more]))}")


def _record_path(out: str, model: str) -> Path:
    """Return the path of the record; the other outputs are in the same folder."""
    return Path(out) / f"{model}.json"


@contextmanager
def checked_outputs(config: TrainConfig) -> Iterator[None]:
    """Create the output folder and check all output files before the block.

    Args:
        config: Configuration, which decides on the files.

    Yields:
        Nothing.

    Raises:
        ValueError: If one of them cannot be written.
    """
    path = _record_path(config.out, config.model)
    files = [path, path.with_suffix(".csv"), path.with_suffix(".png")]
    requested = {"edge": config.sharpness_every > 0, "search": config.find_lr}
    files += [path.with_name(f"{path.stem}-{name}.png") for name in EXTRA_CHARTS if requested[name]]
    with ExitStack() as stack:
        stack.enter_context(created_folder("train", "--out", path.parent))
        for file in files:
            stack.enter_context(checked_output("train", f"{file.name} in --out", file))
        yield


def build_record(
    config: TrainConfig, data: Data, fused: FusedLoop, results: Sequence[dict[str, Any]]
) -> Record:
    """Return the saved record of a training as plain types.

    Args:
        config: Configuration of the training.
        data: Data set.
        fused: Our loop.
        results: Results of our loop and, if there was one, of torch's.

    Returns:
        A dictionary of the format that ``records.SHAPE`` describes.
    """
    ours = results[0]
    theirs = results[1] if len(results) > 1 else None
    done = len(ours["losses"])
    notes = config.notes
    if ours["validation"] is None:
        notes.append(f"stopped after {done} of {config.steps} steps, before the evaluation")
    difference = None
    if theirs is not None:
        difference = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    edge = None
    if fused.sharpness is not None:
        edge = [row for row in fused.sharpness.rows if row["step"] <= done]
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": asdict(config),
        "note": "; ".join(notes),
        "data": data.source,
        "parameters": _parameter_count(fused.model),
        "backend": resolve(config.backend, torch.device("cpu")).name,
        "ours": ours,
        "theirs": theirs,
        "max_loss_difference": difference,
        "edge": edge,
        "search": fused.search,
        "versions": versions(),
        "machine": {"cpu": cpu_model(), "threads": config.threads, "system": platform.system()},
    }


def _json_values(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None in a nested value."""
    if isinstance(value, dict):
        return {key: _json_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@click.command()
@click.option("--model", default="gpt", show_default=True, help=f"{' or '.join(MODELS)}.")
@click.option("--optimizer", default="adamw", show_default=True, help=f"One of {', '.join(OPTIMIZERS)}.")
@click.option(
    "--schedule",
    default="cosine",
    show_default=True,
    help=f"After the warmup: one of {', '.join(SCHEDULES)}.",
)
@click.option(
    "--lr",
    type=float,
    help="Learning rate at the end of the warmup; by default one that suits the optimizer.",
)
@click.option("--weight-decay", type=float, help="By default that of the optimizer's class.")
@click.option("--steps", type=int, help="Optimizer steps; by default 400 for gpt, 300 for digits.")
@click.option("--warmup", type=int, help="Steps of linear warmup; by default a tenth of the steps.")
@click.option("--batch-size", type=int, help="Examples per step; by default 16 for gpt, 64 for digits.")
@click.option("--dtype", default="float32", show_default=True, help=f"Of the model: {' or '.join(DTYPES)}.")
@click.option(
    "--param-rounding",
    default="nearest",
    show_default=True,
    help=f"How our step rounds bfloat16 parameters: one of {', '.join(MODES)}.",
)
@click.option(
    "--state-dtype",
    default="float32",
    show_default=True,
    help=f"Of the states of our optimizer: {' or '.join(DTYPES)}.",
)
@click.option(
    "--max-grad-norm",
    type=float,
    default=1.0,
    show_default=True,
    help="Clip the gradients to this norm; 0 does not clip.",
)
@click.option(
    "--ema",
    type=float,
    default=0.98,
    show_default=True,
    help="Decay of the average of the weights; 0 keeps none.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the model and of the order of the data."
)
# one by default: threads that share a busy core wait for each other, and the times would measure that
@click.option(
    "--threads", type=int, default=1, show_default=True, help="Threads of torch and of our kernels."
)
@click.option("--backend", default="auto", show_default=True, help="Backend of our step.")
@click.option(
    "--out",
    type=PATH,
    default="out",
    show_default=True,
    help="Folder for the chart, the telemetry and the numbers.",
)
@click.option("--sharpness", is_flag=True, help="Measure sharpness and threshold, and draw them.")
@click.option(
    "--sharpness-every", type=int, default=10, show_default=True, help="Steps between the readings."
)
@click.option("--find-lr", is_flag=True, help="Search along the first step for its critical learning rate.")
@click.option("--compare/--no-compare", default=True, help="Train with the torch lines, too.")
def train(out: Path, sharpness: bool, sharpness_every: int, **options: Any) -> None:
    """Train a small model with our step and, on the same batches, with the torch lines it replaces."""
    # 0 disables the readings in the configuration, but is an error in the option
    every = check.whole("train", "--sharpness-every", sharpness_every, 1) if sharpness else 0
    config = TrainConfig.from_options(**options, out=str(out), sharpness_every=every)
    # fail before the training if the charts cannot be drawn
    import matplotlib.figure  # noqa: F401

    with checked_outputs(config):
        run(config, PlainConsole())
