"""``fused-warmup report``: redraws chart and table of a saved training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..console import PlainConsole
from ..errors import OneLineError, error_message
from ..files import PATH, checked_output, write_picture
from ..words import fixed, print_error
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
    points,
    title_of,
)
from .records import Columns, ForeignError, Record, read

# returns a matplotlib figure
Draw = Callable[[], Any]

# charts of optional measurements, by the entry of the record
EXTRA_CHARTS = {"edge": draw_edge, "search": draw_search}


def charts_of(record: Record, columns: Columns, path: Path) -> dict[Path, Draw]:
    """Return the drawing function of every chart of a training, by output file.

    Args:
        record: Record of the training.
        columns: Columns of its telemetry.
        path: The file ``<model>.json``.

    Returns:
        Functions that return a matplotlib figure.
    """
    drawings: dict[Path, Draw] = {path.with_suffix(".png"): partial(draw, record, columns)}
    for name, make in EXTRA_CHARTS.items():
        if record[name] is not None:
            drawings[path.with_name(f"{path.stem}-{name}.png")] = partial(make, record)
    return drawings


def draw_all(drawings: dict[Path, Draw]) -> None:
    """Draw and write charts.

    Args:
        drawings: Drawing functions by output file, as ``charts_of`` returns them.

    Raises:
        ValueError: If a chart cannot be drawn.
        OSError: If a chart cannot be written.
    """
    for path, make in drawings.items():
        try:
            figure = make()
            write_picture(figure, path, pil_kwargs={"optimize": True})
        except OSError:
            raise
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            raise ValueError(f"report: {path} must show numbers that can be drawn, got {got}") from error


def print_table(record: Record, console: PlainConsole) -> None:
    """Print the table of a training and its caption."""
    console.print(table_of(record))
    for line in caption(record):
        console.print(line)


def present(path: Path, console: PlainConsole) -> None:
    """Draw the charts beside a record, print the table and name the files.

    Args:
        path: The file ``<model>.json``.
        console: Console for the table.

    Raises:
        ValueError: If a file is truncated or is not a saved training.
        OSError: If a file cannot be read or written.
    """
    record, columns = read(path)
    drawings = charts_of(record, columns, path)
    with ExitStack() as outputs:
        for picture in drawings:
            table = path.with_suffix(".csv")
            outputs.enter_context(checked_output("report", "the chart", picture, path, table))
        draw_all(drawings)
    print_table(record, console)
    console.write_line(f"written: {', '.join(map(str, drawings))}")


def table_of(record: Record) -> Table:
    """Return a table of the results of both runs and of the ratio of their times."""
    runs = [run for run in (record["ours"], record["theirs"]) if run is not None]
    table = Table(title=title_of(record), title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(run["name"].replace(" ", "\n"), justify="right", overflow="fold")
    table.add_column("torch\n/ ours" if len(runs) > 1 else "", justify="right", style="bold", no_wrap=True)

    def add(label: str, values: list[str], ratio: str = "") -> None:
        table.add_row(label, *values, ratio)

    add("training loss, last tenth", [_fixed(run["train_loss"]) for run in runs])
    for key, label in (("validation", ""), ("averaged", ", averaged")):
        if all(run[key] is not None for run in runs):
            add(f"validation loss{label}", [_fixed(run[key]["loss"]) for run in runs])
            add(f"accuracy{label}", [f"{fixed(100 * run[key]['accuracy'], 1)}%" for run in runs])
    table.add_section()
    for key, label, scale, unit in (
        ("stage_seconds", "optimizer stage, sum", 1.0, "s"),
        ("stage_median", "median per step", 1e3, "ms"),
    ):
        ratio = fixed(runs[1][key] / runs[0][key], 2) if len(runs) > 1 else ""
        add(label, [f"{fixed(scale * run[key], 3)} {unit}" for run in runs], ratio)
    shares = [100 * run["stage_seconds"] / run["step_seconds"] for run in runs]
    add("share of the training time", [f"{fixed(share, 1)}%" for share in shares])
    return table


def caption(record: Record) -> list[str]:
    """Return the lines printed below the table."""
    versions, machine = record["versions"], record["machine"]
    lines = [record["note"] + "."] if record["note"] else []
    if record["theirs"] is not None:
        difference = number(record["max_loss_difference"])
        lines.append(f"largest difference of the training losses: {difference:.2e}")
    if record["search"] is not None:
        lines.append(describe_search(record["search"]))
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    lines.append(f"{machine['cpu']}, {threads}, torch {versions['torch']}, backend {record['backend']}")
    return lines


def draw(record: Record, columns: Columns) -> Any:
    """Draw losses, learning rate, gradient norm and clip coefficient over the steps.

    Args:
        record: Record of the training.
        columns: Columns of its telemetry.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    settings = record["settings"]
    columns = {name: points(values) for name, values in columns.items()}
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
        norm.axhline(*points([settings["max_grad_norm"]]), color=THEIRS, lw=1, ls=":", label="max_grad_norm")
        norm.legend(frameon=False, loc="upper right")
    clip.fill_between(steps, columns["clip_coef"], 1.0, color=OURS, alpha=0.15, lw=0)
    clip.plot(steps, columns["clip_coef"], color=OURS, lw=1.2)
    clip.set(ylabel="clip coefficient", xlabel="step", ylim=(0, 1.05))
    dress(panels, settings["warmup"])
    figure.suptitle(title_of(record), fontsize=11, color=INK)
    return figure


def _draw_losses(panel: Any, steps: range, ours: dict[str, Any], theirs: dict[str, Any] | None) -> None:
    """Draw the losses of one run or both, on a logarithmic axis if they fall by a factor of 50."""
    losses = points(ours["losses"])
    # a thin line over a wide pale one keeps both visible where the losses agree
    pale = {"color": PALE, "lw": 3.4} if theirs is not None else {"color": OURS, "lw": 1.6}
    panel.plot(steps, losses, label=ours["name"], **pale)
    if theirs is not None:
        thin = {"color": THEIRS, "lw": 0.9}
        panel.plot(steps, points(theirs["losses"]), label=theirs["name"], **thin)
    # False for NaN, too
    if 0 < 50 * min(losses) < losses[0]:
        logarithmic(panel, losses)
    panel.legend(frameon=False, loc="upper right")
    panel.set_ylabel("training loss")


def _fixed(x: float | None) -> str:
    """Format a loss with four decimals."""
    return fixed(number(x), 4)


def _records(path: Path) -> list[Path]:
    """Return the JSON files of an argument: the file itself, or all files of a folder."""
    if path.is_dir():
        files = [file for file in sorted(path.glob("*.json")) if file.is_file()]
    else:
        # another file of the training, such as its chart, stands for the record beside it
        record = path if path.suffix == ".json" else path.with_suffix(".json")
        files = [record] if record.is_file() else []
    if not files:
        raise ValueError(f"report: PATH must be a saved .json or a folder with some, got '{path}'.")
    return files


def _present_all(path: Path, console: PlainConsole) -> list[str]:
    """Present the records of an argument and return a message for each one that fails.

    Foreign files are skipped with a note if the folder also holds a record.
    """
    failed, foreign = [], []
    records = _records(path)
    for record in records:
        try:
            present(record, console)
        except ForeignError as error:
            foreign.append(str(error))
        except (ValueError, OSError) as error:
            failed.append(error_message("report", error))
    if len(foreign) == len(records):
        return foreign
    for message in foreign:
        print_error(f"{message} It is passed over.")
    return failed


@click.command()
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="PATH...")
def report(paths: tuple[Path, ...]) -> None:
    """Redraw the chart and the table of saved trainings: .json files, or folders that hold them."""
    console = PlainConsole()
    failed = []
    # an error of one path does not stop the others
    for path in paths:
        try:
            failed += _present_all(path, console)
        except (ValueError, OSError) as error:
            failed.append(error_message("report", error))
    for message in failed[:-1]:
        print_error(message)
    if failed:
        raise OneLineError(failed[-1])
