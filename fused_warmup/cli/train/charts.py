"""Charts of the sharpness and of the first step of a training, and the style of all charts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

INK, OURS, PALE, THEIRS, GREY = "#1f2430", "#2a6fbb", "#9cc3ea", "#c8501e", "#9aa3ad"
# flags that say how a reading was made, and not that it is in doubt
_KINDS = {"cold", "audit"}
# matplotlib's axes overflow not far beyond
_LARGEST_DRAWN = 1e100


def title_of(record: dict[str, Any]) -> str:
    """Return the title of a training: model, size, steps, batch size, rate, schedule and dtype."""
    s = record["settings"]
    dtype = s.get("dtype") or "float32"
    state_dtype = s.get("state_dtype") or "float32"
    sixteen_bits = "" if dtype == "float32" else f", {dtype}, {s['param_rounding']}"
    sixteen_bits += "" if state_dtype == "float32" else f", {state_dtype} states"
    return (
        f"{s['model']}, {record['parameters']:,} parameters, {s['steps']} steps of {s['batch_size']}, "
        f"lr {s['lr']:g}, warmup {s['warmup']}, {s['schedule']}{sixteen_bits}"
    )


def logarithmic(panel: Any, values: list[float]) -> None:
    """Make the y axis logarithmic, with plain numbers as labels, unless all values are <= 0."""
    from matplotlib.ticker import LogLocator, NullFormatter

    positive = [x for x in values if 0 < x < math.inf]
    if not positive:
        return
    panel.set_yscale("log")
    subs = (1, 2, 5) if max(positive) < 50 * min(positive) else (1,)
    panel.yaxis.set_major_locator(LogLocator(subs=subs))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def dress(panels: Any, warmup: int) -> None:
    """Apply the common style to all panels and mark the end of the warmup."""
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color=GREY, alpha=0.25, lw=0.6)
        panel.tick_params(colors=INK, labelsize=9)
        panel.margins(x=0.01)
        if warmup:
            panel.axvline(warmup, color=GREY, lw=0.9, ls="--")
    if warmup:
        panels[1].annotate(
            "end of warmup", (warmup, 0), (5, 5), textcoords="offset points", fontsize=8, color=GREY
        )


def number(x: float | None) -> float:
    """Return a number of the record, NaN for null."""
    return math.nan if x is None else float(x)


def points(values: Iterable[float | None]) -> list[float]:
    """Return numbers of the record for a chart, with NaN for null and for numbers too large to draw."""
    return [x if abs(x) < _LARGEST_DRAWN else math.nan for x in map(number, values)]


def describe_search(found: dict[str, Any]) -> str:
    """Return the one-line result of the search along the first step."""
    critical, initial = number(found["critical"]), number(found["initial"])
    return (
        f"first step: critical learning rate {critical:.3g} ({found['critical_forwards']} forward passes), "
        f"initial rate for a warmup to {found['target']:g}: {initial:.3g} ({found['initial_forwards']})"
    )


def draw_search(record: dict[str, Any]) -> Any:
    """Draw the loss along the first step.

    Args:
        record: A record of a training with ``--find-lr``.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    found = record["search"]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained", facecolor="white")
    panel = figure.subplots()
    losses = points(found["losses"])
    panel.plot(points(found["rates"]), losses, color=OURS, lw=1.8, marker="o", ms=3)
    [start] = points([found["start"]])
    panel.axhline(start, color=PALE, lw=1.2, label="loss before the step")
    marks = (
        ("critical learning rate", "critical", THEIRS, "-"),
        ("initial rate of a warmup", "initial", OURS, ":"),
    )
    for label, key, color, style in marks:
        [rate] = points([found[key]])
        if math.isfinite(rate):
            panel.axvline(rate, color=color, lw=1.2, ls=style, label=f"{label} {rate:.2g}")
    panel.set_xscale("log")
    if math.isfinite(start):
        # far beyond the critical rate the loss grows without bound and would flatten the rest of the curve
        lowest = min(x for x in [*losses, start] if math.isfinite(x))
        panel.set_ylim(0.98 * lowest, 2.0 * start)
    panel.set(xlabel="learning rate of the first step", ylabel="training loss after it")
    panel.legend(frameon=False, loc="upper left")
    dress([panel], 0)
    figure.suptitle(title_of(record), fontsize=11)
    return figure


def draw_readings(panel: Any, rows: list[dict[str, Any]], name: str, label: str) -> None:
    """Draw readings of sharpness with their bounds, and mark audits and readings in doubt.

    Args:
        panel: Axes of matplotlib.
        rows: Dictionaries with ``step`` and the entries ``name``, and perhaps ``<name>_lo``, ``<name>_hi``
            and ``<name>_flags``.
        name: Which of the readings.
        label: Their name in the legend.
    """
    steps, values, low, high = (
        points(row.get(key) for row in rows) for key in ("step", name, f"{name}_lo", f"{name}_hi")
    )
    panel.plot(steps, values, color=OURS, lw=1.4, marker="o", ms=3, label=label)
    # a bound that is missing, infinite or on the other side of the value has no bar
    bars = [
        [abs(value - end) if math.isfinite(end) else 0.0 for value, end in zip(values, ends, strict=True)]
        for ends in (low, high)
    ]
    panel.errorbar(steps, values, bars, fmt="none", ecolor=PALE, elinewidth=1.6, capsize=2.0, zorder=1)
    flags = [set(row.get(f"{name}_flags") or ()) for row in rows]
    marks = (
        ("audit", [("audit" in found) for found in flags], {"marker": "o", "ms": 8, "color": INK}),
        ("flagged", [bool(found - _KINDS) for found in flags], {"marker": "x", "ms": 7, "color": THEIRS}),
    )
    for text, wanted, style in marks:
        chosen = [i for i, is_wanted in enumerate(wanted) if is_wanted]
        if chosen:
            x, y = [steps[i] for i in chosen], [values[i] for i in chosen]
            panel.plot(x, y, ls="none", mfc="none", mew=1.2, label=text, **style)


def draw_edge(record: dict[str, Any]) -> Any:
    """Draw the loss, and the sharpness with the stability threshold of the current learning rate.

    Args:
        record: A record of a training with ``--sharpness``.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    rows, losses = record["edge"], points(record["ours"]["losses"])
    steps, threshold, preconditioned, sharpness = (
        points(row[name] for row in rows) for name in ("step", "threshold", "preconditioned", "sharpness")
    )
    figure = Figure(figsize=(7.2, 7.2), layout="constrained", facecolor="white")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1.3, 1.6, 1))
    loss, edge, raw = panels
    loss.plot(range(1, len(losses) + 1), losses, color=OURS, lw=1.4, label=record["ours"]["name"])
    loss.set_ylabel("training loss")
    logarithmic(loss, losses)
    sgd = record["settings"]["optimizer"] == "sgd"
    label = r"$\lambda_{\max}(H)$" if sgd else r"$\lambda_{\max}(P^{-1}H)$"
    draw_readings(edge, rows, "preconditioned", label)
    edge.plot(steps, threshold, color=THEIRS, lw=1.2, ls="--", label="threshold")
    edge.set_ylabel("sharpness of the step")
    logarithmic(edge, [*preconditioned, *threshold])
    edge.legend(frameon=False, loc="upper right")
    draw_readings(raw, rows, "sharpness", r"$\lambda_{\max}(H)$")
    raw.set(ylabel=r"$\lambda_{\max}(H)$", xlabel="step")
    logarithmic(raw, sharpness)
    dress(panels, record["settings"]["warmup"])
    figure.suptitle(title_of(record), fontsize=11)
    return figure
