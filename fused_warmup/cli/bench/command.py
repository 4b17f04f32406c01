"""``fused-warmup bench``: times the step against the torch code it replaces, and reports the timings.

Every ratio is measured within one process: both sides use the same parameters, gradients and number of
threads, in interleaved rounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fused_warmup as fw

from ..console import PlainConsole
from ..files import PATH, checked_output, ignored_interrupts
from ..machine import MAX_THREADS, describe
from .cases import MAX_SHARE_OF_OTHERS, BenchmarkCase, Row, cases, run_case


def to_json(rows: Sequence[Row], where: Mapping[str, Any]) -> str:
    """Return machine and rows as JSON, one row per line."""
    lines = [json.dumps({**_rounded(asdict(row)), "verdict": row.verdict}) for row in rows]
    return '{"machine": ' + json.dumps(where) + ',\n"rows": [\n' + ",\n".join(lines) + "\n]}\n"


def _rounded(value: Any) -> Any:
    """Round the floats of a nested value to four significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


HEADINGS = (
    "work",
    "compared with",
    "ours, ms",
    "peer, ms",
    "ratio",
    "quartiles",
    "goal",
    "",
    "GB/s",
    "of ceiling",
    "host, µs",
    "others",
)


def cells(row: Row) -> tuple[str, ...]:
    """Return the cells of a row under ``HEADINGS``."""
    return (
        row.name,
        row.peer,
        f"{row.ours_ms:.3g}",
        f"{row.peer_ms:.3g}",
        f"{row.ratio:.2f}×",
        f"{row.spread[0]:.2f}–{row.spread[1]:.2f}",
        "" if row.goal is None else f"≥ {row.goal:g}×",
        row.verdict,
        "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}",
        "" if row.of_ceiling is None else f"{row.of_ceiling:.2f}×",
        "" if row.host_us is None else f"{row.host_us:.0f}",
        "" if row.others is None else f"{row.others:.0%}",
    )


# how to read the columns
EXPLANATION = (
    "Ratio: median time of the peer / median time of our step; above 1 our step is faster. Both sides",
    "step on the same tensors in one process, in interleaved rounds with nothing in between, so small",
    "tensors stay in the caches. Only rows with new gradients allocate these before each step, untimed.",
    "Quartiles: of the ratio taken round by round. GB/s: bytes that our step must move / its time. Of",
    "ceiling: time of a pass that reads and writes as much and computes nothing / time of our step. The",
    "pass has the parameters, the gradients and states of its own, takes them in the chunks and threads of",
    "our step, and runs in the same rounds. Clipping reads the gradients in a pass before; a rule with sums",
    "over layers reads parameters and states once more, if a tensor has more than one chunk. Host: time of",
    "our step outside the compiled call, 64 elements per tensor. Others: share of the cores used by other",
    f"processes; above {MAX_SHARE_OF_OTHERS:.0%} a goal counts as neither met nor missed.",
)


def to_markdown(rows: Sequence[Row], where: Mapping[str, Any]) -> str:
    """Return the results page with every row, slower ones included."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    goals = []
    for verdict in ("met", "missed", "disturbed"):
        names = [row.name for row in rows if row.verdict == verdict]
        goals.append(f"- Goals {verdict}: {len(names)}. {', '.join(names)}")
    return "\n".join((
        f"# {where['cpu']}, {where['threads']} threads",
        "",
        f"{where['cores']} cores, {where['instruction_set']} kernels; {versions}.",
        "",
        *EXPLANATION,
        "",
        *goals,
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
        "",
    ))


def print_table(console: Console, rows: Sequence[Row], where: Mapping[str, Any]) -> None:
    """Print the rows on two lines each, so that no number is cut at 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, leading=1, pad_edge=False, collapse_padding=True)
    table.title = f"{where['cpu']}, {where['threads']} threads, torch {where['versions']['torch']}"
    for i, heading in enumerate(_paired(HEADINGS)):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row in rows:
        table.add_row(*_paired(cells(row)), style="red" if row.verdict == "missed" else None)
    console.print(table)


def _paired(texts: Sequence[str]) -> list[str]:
    """Put every second text below the one before it."""
    return [f"{upper}\n{lower}" for upper, lower in zip(texts[::2], texts[1::2], strict=True)]


def _measure(chosen: Sequence[BenchmarkCase], seconds: float, rows: list[Row]) -> None:
    """Run the cases and append their rows."""
    # the one spinner in ASCII
    with Console().status("", spinner="line") as status:
        for case in chosen:
            status.update(case.name)
            rows.append(run_case(case, seconds))


@click.command("bench")
@click.option("--quick", is_flag=True, help="A few rounds of everything: rough ratios in seconds.")
@click.option("--filter", "pattern", default="", metavar="TEXT", help="Only rows whose name contains TEXT.")
@click.option("--json", "path", type=PATH, help="Write the rows here.")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="Threads of both sides.")
def bench(quick: bool, pattern: str, path: Path | None, threads: int | None) -> None:
    """Compare our step with the torch code it replaces, on this machine."""
    if "cpu" not in fw.available_backends():
        raise click.ClickException('backend "cpu" must be built, got none; see fused-warmup doctor.')
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = cases(pattern)
    if not chosen:
        names = ", ".join(case.name for case in cases())
        raise click.BadParameter(f"must occur in the name of a row, got {pattern!r}. Rows: {names}.")
    rows: list[Row] = []
    with checked_output("bench", "--json", path):
        try:
            _measure(chosen, 0.2 if quick else 4.0, rows)
        finally:
            if rows:
                _save_and_print(rows, path)


def _save_and_print(rows: Sequence[Row], path: Path | None) -> None:
    """Write and print the rows measured so far, also after an interrupt or an error."""
    where = describe()
    with ignored_interrupts(), ExitStack() as outputs:
        # callbacks run last in, first out, and all of them even if one raises
        outputs.callback(print_table, PlainConsole(), rows, where)
        if path is not None:
            outputs.callback(path.write_text, to_json(rows, where), encoding="utf-8")
