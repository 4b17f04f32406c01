"""``fused-warmup report``: the chart and the table of a training, from the files that it wrote."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from .charts import (
    INK,
    OURS,
    PALE,
    THEIRS,
    describe_search,
    draw_edge,
    draw_search,
    dress,
    logarithmic,
    number,
    title_of,
)
from .group import OneLineError

FORMAT = "fused_warmup.train"
VERSION = 1

_COLUMNS = ("lr", "grad_norm", "clip_coef")
# charts of what only some trainings measured, by the entry of the record
MORE = {"edge": draw_edge, "search": draw_search}


def read(path: Path) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return what a training saved.

    Args:
        path: The file ``<model>.json``; the telemetry is ``<model>.csv`` beside it.

    Returns:
        The record, and the columns of the telemetry by name.

    Raises:
        ValueError: If a file is cut short, of another kind, or the two do not belong together.
        OSError: If a file cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"report: {path} must be complete JSON, got: {error}.") from None
    found = (record.get("format"), record.get("version")) if isinstance(record, dict) else record
    if found != (FORMAT, VERSION):
        raise ValueError(f"report: {path} must be of {(FORMAT, VERSION)}, got {found!r:.80}.")
    table = path.with_suffix(".csv")
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        steps = len(record["ours"]["losses"])
        columns = {name: [float(row[name]) for row in rows] for name in _COLUMNS}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"report: {path} and {table} must be complete, got {error!r}.") from None
    if len(rows) != steps:
        raise ValueError(f"report: {table} must have {steps} rows, as many as {path}, got {len(rows)}.")
    return record, columns


def present(path: Path, console: Console) -> None:
    """Draw the chart beside the record, print the table and name the files.

    Args:
        path: The file ``<model>.json``.
        console: Where to print.

    Raises:
        ValueError: If a file is cut short or of another kind.
        OSError: If a file cannot be read or written.
    """
    record, columns = read(path)
    pictures: list[Path] = []
    try:
        draw(record, columns).savefig(path.with_suffix(".png"), dpi=100, pil_kwargs={"optimize": True})
        for name, make in MORE.items():
            if record.get(name):
                picture = path.with_name(f"{path.stem}-{name}.png")
                make(record).savefig(picture, dpi=100, pil_kwargs={"optimize": True})
                pictures.append(picture)
        table, lines = table_of(record), caption(record)
    except (KeyError, TypeError) as error:
        raise ValueError(f"report: {path} must be complete, got {error!r}.") from None
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False)
    files = [*(path.with_suffix(suffix) for suffix in (".png", ".csv", ".json")), *pictures]
    console.print(f"written: {', '.join(map(str, files))}", highlight=False, markup=False, soft_wrap=True)


def table_of(record: dict[str, Any]) -> Table:
    """Return the numbers of both runs, and torch's time over ours."""
    runs = [run for run in (record["ours"], record["theirs"]) if run is not None]
    table = Table(title=title_of(record), title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(run["name"].replace(" ", "\n"), justify="right", no_wrap=True)
    table.add_column("torch\n/ ours" if len(runs) > 1 else "", justify="right", style="bold", no_wrap=True)

    def add(label: str, values: list[str], ratio: str = "") -> None:
        table.add_row(label, *values, ratio)

    add("training loss, last tenth", [_fixed(run["train_loss"]) for run in runs])
    for key, label in (("validation", ""), ("averaged", ", averaged")):
        if runs[0][key] is not None:
            add(f"validation loss{label}", [_fixed(run[key]["loss"]) for run in runs])
            add(f"accuracy{label}", [f"{run[key]['accuracy']:.1%}" for run in runs])
    table.add_section()
    for key, label in (("stage_seconds", "optimizer stage, sum"), ("stage_median", "median per step")):
        ratio = f"{runs[1][key] / runs[0][key]:.2f}" if len(runs) > 1 else ""
        values = [
            f"{run[key]:.3f} s" if key == "stage_seconds" else f"{1e3 * run[key]:.3f} ms" for run in runs
        ]
        add(label, values, ratio)
    add("share of the training time", [f"{run['stage_seconds'] / run['step_seconds']:.1%}" for run in runs])
    return table


def caption(record: dict[str, Any]) -> list[str]:
    """Return the lines below the table."""
    versions, machine = record["versions"], record["machine"]
    lines = [record["note"] + "."] if record["note"] else []
    if record["theirs"] is not None:
        lines.append(
            f"largest difference of the training losses: {number(record['max_loss_difference']):.2e}"
        )
    if record.get("search"):
        lines.append(describe_search(record["search"]))
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    lines.append(f"{machine['cpu']}, {threads}, torch {versions['torch']}, backend {record['backend']}")
    return lines


def draw(record: dict[str, Any], columns: dict[str, list[float]]) -> Any:
    """Return a figure of losses, learning rate, gradient norm and clip coefficient over the steps.

    Args:
        record: What ``read`` returned first.
        columns: What ``read`` returned second.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    settings = record["settings"]
    steps = range(1, len(columns["lr"]) + 1)
    figure = Figure(figsize=(7.2, 8.2), layout="constrained", facecolor="white")
    panels = figure.subplots(4, 1, sharex=True, height_ratios=(2.2, 1, 1, 1))
    loss, lr, norm, clip = panels
    _draw_losses(loss, steps, record["ours"], record["theirs"])
    lr.plot(steps, columns["lr"], color=OURS, lw=1.8)
    lr.set_ylabel("learning rate")
    lr.set_ylim(bottom=0)
    lr.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    norm.plot(steps, columns["grad_norm"], color=OURS, lw=1.2)
    norm.set_ylabel("gradient norm")
    logarithmic(norm, columns["grad_norm"])
    if settings["max_grad_norm"]:
        norm.axhline(settings["max_grad_norm"], color=THEIRS, lw=1, ls=":", label="max_grad_norm")
        norm.legend(frameon=False, loc="upper right")
    clip.fill_between(steps, columns["clip_coef"], 1.0, color=OURS, alpha=0.15, lw=0)
    clip.plot(steps, columns["clip_coef"], color=OURS, lw=1.2)
    clip.set(ylabel="clip coefficient", xlabel="step", ylim=(0, 1.05))
    dress(panels, settings["warmup"])
    figure.suptitle(title_of(record), fontsize=11, color=INK)
    return figure


def _draw_losses(panel: Any, steps: range, ours: dict[str, Any], theirs: dict[str, Any] | None) -> None:
    """Draw the losses of one run or both, on a logarithmic axis if they fall far."""
    losses = [number(x) for x in ours["losses"]]
    # ours is the wide pale line, so that theirs shows on top of it where the two agree
    pale = {"color": PALE, "lw": 3.4} if theirs is not None else {"color": OURS, "lw": 1.6}
    panel.plot(steps, losses, label=ours["name"], **pale)
    if theirs is not None:
        thin = {"color": THEIRS, "lw": 0.9}
        panel.plot(steps, [number(x) for x in theirs["losses"]], label=theirs["name"], **thin)
    # false for NaN, too
    if 0 < 50 * min(losses) < losses[0]:
        logarithmic(panel, losses)
    panel.legend(frameon=False, loc="upper right")
    panel.set_ylabel("training loss")


def _fixed(x: float | None) -> str:
    """Return a loss as text."""
    return f"{number(x):.4f}"


def _records(paths: tuple[Path, ...]) -> list[Path]:
    """Return the records that the arguments name: files, or all that a folder holds."""
    found = []
    for path in paths:
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path.with_suffix(".json")]
        if not inside or not all(record.is_file() for record in inside):
            raise OneLineError(f"report: PATH must be a saved .json or a folder with some, got '{path}'.")
        found += inside
    return found


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
def report(paths: tuple[Path, ...]) -> None:
    """Redraw the chart and the table of saved trainings: .json files, or folders that hold them."""
    console = Console()
    for path in _records(paths):
        try:
            present(path, console)
        except (ValueError, OSError) as error:
            raise OneLineError(str(error)) from None
