"""``fused-warmup report``: the chart and the table of a training, from the files that it wrote."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from .group import OneLineError

FORMAT = "fused_warmup.train"
VERSION = 1

_INK, _OURS, _PALE, _THEIRS, _GREY = "#1f2430", "#2a6fbb", "#9cc3ea", "#c8501e", "#9aa3ad"
_COLUMNS = ("lr", "grad_norm", "clip_coef")


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
    try:
        draw(record, columns).savefig(path.with_suffix(".png"), dpi=100, pil_kwargs={"optimize": True})
        table, lines = table_of(record), caption(record)
    except (KeyError, TypeError) as error:
        raise ValueError(f"report: {path} must be complete, got {error!r}.") from None
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False)
    files = ", ".join(str(path.with_suffix(suffix)) for suffix in (".png", ".csv", ".json"))
    console.print(f"written: {files}", highlight=False, markup=False, soft_wrap=True)


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
            f"largest difference of the training losses: {_value(record['max_loss_difference']):.2e}"
        )
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    lines.append(f"{machine['cpu']}, {threads}, torch {versions['torch']}, backend {record['backend']}")
    return lines


def title_of(record: dict[str, Any]) -> str:
    """Return one line about what was trained."""
    s = record["settings"]
    return (
        f"{s['model']}, {record['parameters']:,} parameters, {s['steps']} steps of {s['batch_size']}, "
        f"lr {s['lr']:g}, warmup {s['warmup']}, {s['schedule']}"
    )


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
    lr.plot(steps, columns["lr"], color=_OURS, lw=1.8)
    lr.set_ylabel("learning rate")
    lr.set_ylim(bottom=0)
    lr.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    norm.plot(steps, columns["grad_norm"], color=_OURS, lw=1.2)
    norm.set_ylabel("gradient norm")
    _logarithmic(norm, columns["grad_norm"])
    if settings["max_grad_norm"]:
        norm.axhline(settings["max_grad_norm"], color=_THEIRS, lw=1, ls=":", label="max_grad_norm")
        norm.legend(frameon=False, loc="upper right")
    clip.fill_between(steps, columns["clip_coef"], 1.0, color=_OURS, alpha=0.15, lw=0)
    clip.plot(steps, columns["clip_coef"], color=_OURS, lw=1.2)
    clip.set(ylabel="clip coefficient", xlabel="step", ylim=(0, 1.05))
    _dress(panels, settings["warmup"])
    figure.suptitle(title_of(record), fontsize=11, color=_INK)
    return figure


def _draw_losses(panel: Any, steps: range, ours: dict[str, Any], theirs: dict[str, Any] | None) -> None:
    """Draw the losses of one run or both, on a logarithmic axis if they fall far."""
    losses = [_value(x) for x in ours["losses"]]
    # ours is the wide pale line, so that theirs shows on top of it where the two agree
    pale = {"color": _PALE, "lw": 3.4} if theirs is not None else {"color": _OURS, "lw": 1.6}
    panel.plot(steps, losses, label=ours["name"], **pale)
    if theirs is not None:
        thin = {"color": _THEIRS, "lw": 0.9}
        panel.plot(steps, [_value(x) for x in theirs["losses"]], label=theirs["name"], **thin)
    # false for NaN, too
    if 0 < 50 * min(losses) < losses[0]:
        _logarithmic(panel, losses)
    panel.legend(frameon=False, loc="upper right")
    panel.set_ylabel("training loss")


def _logarithmic(panel: Any, values: list[float]) -> None:
    """Make the axis logarithmic, with plain numbers as labels, if there is anything above 0."""
    from matplotlib.ticker import LogLocator, NullFormatter

    positive = [x for x in values if 0 < x < math.inf]
    if not positive:
        return
    panel.set_yscale("log")
    subs = (1, 2, 5) if max(positive) < 50 * min(positive) else (1,)
    panel.yaxis.set_major_locator(LogLocator(subs=subs))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _dress(panels: Any, warmup: int) -> None:
    """Give all panels the same quiet frame, and show where the warmup ends."""
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color=_GREY, alpha=0.25, lw=0.6)
        panel.tick_params(colors=_INK, labelsize=9)
        panel.margins(x=0.01)
        if warmup:
            panel.axvline(warmup, color=_GREY, lw=0.9, ls="--")
    if warmup:
        panels[1].annotate(
            "end of warmup", (warmup, 0), (5, 5), textcoords="offset points", fontsize=8, color=_GREY
        )


def _value(x: float | None) -> float:
    """Return a number of the record; JSON has no NaN, it says null."""
    return math.nan if x is None else float(x)


def _fixed(x: float | None) -> str:
    """Return a loss as text."""
    return f"{_value(x):.4f}"


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
