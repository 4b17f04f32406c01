"""``fused-warmup refine``: refines a schedule from the gradient norms of an earlier run."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from .. import _checks as check
from ..schedules import Schedule
from ..tuning.refinement.norms import read_norms
from ..tuning.refinement.refine import ADVICE, Refinement, refinement
from .console import PlainConsole
from .files import PATH, checked_output, picture_format, write_picture
from .train.charts import GREY, INK, OURS, PALE, THEIRS, logarithmic, points
from .words import print_error

# a schedule takes 20 bytes of JSON per step
_MAX_STEPS = 10_000_000


def draw(norms: np.ndarray, found: Refinement, schedule: Schedule) -> Any:
    """Draw the norms, and below them the schedule with its polynomial fit.

    Args:
        norms: Recorded norms, float64 of ``[steps]``.
        found: Refinement of these norms.
        schedule: The schedule to be written: the refined one or the fallback.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    n = len(found.smoothed)
    figure = Figure(figsize=(7.2, 5.6), layout="constrained", facecolor="white")
    upper, lower = figure.subplots(2, 1, sharex=True)
    shown = points(norms.tolist())
    upper.plot(np.linspace(0, n - 1, len(norms)), shown, color=PALE, lw=0.8, label="recorded")
    upper.plot(points(found.smoothed.tolist()), color=OURS, lw=1.8, label=f"median of {found.width}")
    upper.set_ylabel("gradient norm")
    logarithmic(upper, shown)
    fit = found.fit()
    lower.plot(found.schedule.values(n), color=OURS, lw=1.8, label="refined")
    label = f"warmup {fit.warmup:.0%}, power {fit.power:.2g}"
    lower.plot(fit.schedule.values(n), color=GREY, lw=1.2, ls="--", label=label)
    if schedule != found.schedule:
        lower.plot(schedule.values(n), color=THEIRS, lw=1.6, label="fallback, written")
    lower.set(ylabel="multiplier", xlabel="step", ylim=(0, 1.05))
    for panel in (upper, lower):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK, labelsize=9)
        panel.legend(frameon=False)
    return figure


def table_of(found: Refinement) -> Table:
    """Return a table of the diagnostics of a refinement."""
    fit = found.fit()
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in (
        ("steps", f"{len(found.smoothed):,}"),
        ("median filter", f"{found.width} steps"),
        ("norms left out, not finite", str(found.dropped)),
        ("norms raised to the floor", str(found.raised)),
        ("range of the smoothed norms", f"{found.norm_range:.3g}"),
        ("peak of the rate", f"after {found.peak:.1%}"),
        ("closest polynomial", f"warmup {fit.warmup:.0%}, power {fit.power:.2f}, rmse {fit.rmse:.3f}"),
    ):
        table.add_row(label, value)
    return table


@click.command()
@click.argument("norms", type=PATH, metavar="NORMS.csv")
@click.option("-o", "--out", type=PATH, required=True, help="Schedule to write, JSON.")
@click.option("--plot", type=PATH, default=None, help="Chart to write.")
@click.option("--kind", default="adam", show_default=True, help="adam (L1 norms) or sgd (L2 norms).")
@click.option(
    "--smoothing", type=float, default=0.1, show_default=True, help="Part of the run to smooth over."
)
@click.option("--steps", type=int, default=None, help="Length of the schedule; by default as recorded.")
@click.option("--power", type=float, default=None, help="By default 1 for adam, 2 for sgd.")
@click.option("--floor", type=float, default=1e-3, show_default=True, help="Least norm over the median one.")
@click.option("--column", default=None, help="Column of the file; by default grad_norm_l1 or grad_norm.")
@click.option("--fallback", is_flag=True, help="Write warmup and linear decay if the norms collapse.")
def refine(
    norms: Path,
    out: Path,
    plot: Path | None,
    kind: str,
    column: str | None,
    steps: int | None,
    fallback: bool,
    **options: Any,
) -> None:
    """Refine a learning-rate schedule from recorded gradient norms."""
    if steps is not None:
        check.whole("refine", "--steps", steps, 2, _MAX_STEPS)
    image_format = "" if plot is None else picture_format("refine", "--plot", plot)
    with ExitStack() as outputs:
        outputs.enter_context(checked_output("refine", "--out", out, norms))
        outputs.enter_context(checked_output("refine", "--plot", plot, norms, out))
        recorded = read_norms("refine", norms, kind, column)
        found = refinement(recorded, kind, steps=steps, **options)
        schedule = found.fallback if fallback and found.trouble else found.schedule
        out.write_text(schedule.to_json() + "\n", encoding="utf-8")
        if plot is not None:
            write_picture(draw(recorded, found, schedule), plot, image_format)
    console = PlainConsole()
    console.print(table_of(found))
    if found.trouble:
        advice = "the fallback was written." if fallback else f"{ADVICE} --fallback writes the former."
        print_error(f"refine: {' and '.join(found.trouble)}. {advice}")
    written = [str(path) for path in (out, plot) if path is not None]
    console.write_line(f"written: {', '.join(written)}")
