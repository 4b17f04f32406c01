"""Draw readings of ``SharpnessProbe`` beside double backward over a whole training, as two versions make them.

``python -m benchmarks.probe_figure --save FILE`` trains two networks as ``benchmarks.readings`` does and writes their
readings; of another version, run it in that version's checkout. ``python -m benchmarks.probe_figure BEFORE AFTER`` draws
``docs/images/probe.png`` from two such files and prints how far the warm readings are from double backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import fused_warmup as fw
from benchmarks.readings import run

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "probe.png"
NETWORKS, READINGS = ("gelu", "relu"), 61
Rows = list[dict[str, Any]]


def save(path: Path) -> None:
    """Write the readings of both networks."""
    torch.set_num_threads(1)
    readings = {name: run(name, fw.AdamW, readings=READINGS) for name in NETWORKS}
    kept = ("step", "value", "lo", "hi", "truth", "hvps", "flags")
    lines = [
        f'"{name}": [\n' + ",\n".join(json.dumps({key: row[key] for key in kept}) for row in rows) + "\n]"
        for name, rows in readings.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def describe(rows: Rows) -> str:
    """Return the errors of the warm readings relative to double backward, and their products, as one line."""
    errors = sorted(row["value"] / row["truth"] - 1.0 for row in rows[1:])
    products = statistics.mean(row["hvps"] for row in rows[1:])
    middle = statistics.median(errors)
    return f"{errors[0]:+.1%} to {errors[-1]:+.1%}, median {middle:+.1%}, {products:.1f} products"


def draw(before: dict[str, Rows], after: dict[str, Rows]) -> Any:
    """Draw each network in a row, before in the left column and after in the right one."""
    from matplotlib.figure import Figure

    from fused_warmup.cli.train.charts import INK, draw_readings, dress, logarithmic

    figure = Figure(figsize=(10.0, 6.4), layout="constrained", facecolor="white")
    panels = figure.subplots(len(NETWORKS), 2, sharex=True, sharey="row")
    for line, name in zip(panels, NETWORKS, strict=True):
        for panel, title, rows in zip(line, ("before", "after"), (before[name], after[name]), strict=True):
            shown = [
                {**row, "value_lo": row["lo"], "value_hi": row["hi"], "value_flags": row["flags"]}
                for row in rows
            ]
            truth = [row["truth"] for row in rows]
            panel.plot(
                [row["step"] for row in rows], truth, color=INK, lw=1.0, ls=":", label="double backward"
            )
            draw_readings(panel, shown, "value", "reading")
            logarithmic(panel, truth)
            panel.set_title(f"{name}, {title}: {describe(rows)}", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    for panel in panels[:, 0]:
        panel.set_ylabel(r"$\lambda_{\max}(P^{-1}H)$ of the batch")
    panels[0, 1].legend(frameon=False, fontsize=8)
    dress(panels.flat, 0)
    return figure


def main() -> int:
    """Write readings, or draw those of two files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe_figure", description=__doc__)
    parser.add_argument("--save", type=Path, metavar="FILE")
    parser.add_argument("files", type=Path, nargs="*", metavar="BEFORE AFTER")
    options = parser.parse_args()
    if options.save:
        save(options.save)
        return 0
    if len(options.files) != 2:
        parser.error("two files are needed, those of BEFORE and AFTER")
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in options.files)
    for title, readings in (("before", before), ("after", after)):
        for name in NETWORKS:
            print(f"{name}, {title}: {describe(readings[name])}")
    draw(before, after).savefig(PICTURE, dpi=100, pil_kwargs={"optimize": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
