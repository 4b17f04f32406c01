"""``fused-warmup doctor``: checks the installation."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click
import torch
from rich.table import Table

import fused_warmup as fw

from ..backends import BACKENDS, device_type, unavailable_reason
from ..plan.traffic import Traffic
from .console import PlainConsole
from .machine import cpu_model, versions
from .words import print_error

REQUIRED_BACKENDS = ("reference", "cpu")
OPTIMIZERS: dict[str, Callable[..., fw.FusedOptimizer]] = {
    "Adam, AdamW, GIAdam": fw.Adam,
    "Adam, amsgrad": partial(fw.Adam, amsgrad=True),
    "RAdam": fw.RAdam,
    "LAMB": fw.LAMB,
    "AdamP": fw.AdamP,
    "SGD": fw.SGD,
    "SGD, momentum": partial(fw.SGD, momentum=0.9),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "clip": {"max_grad_norm": 1.0},
    "EMA": {"average": fw.EMA(0.999)},
    "clip + EMA": {"max_grad_norm": 1.0, "average": fw.EMA(0.999)},
}


def backend_problem(backend: str) -> str | None:
    """Return the problem of a backend, or None if one step on its type of device gives the right result."""
    reason = unavailable_reason(backend)
    if reason is not None:
        return reason
    try:
        param = torch.ones(3, device=device_type(backend))
        param.grad = torch.full_like(param, 2.0)
        fw.SGD([param], lr=0.25, backend=backend).step()
        values = param.tolist()
    except Exception as error:
        return f"a step fails: {error}"
    if values != [0.5, 0.5, 0.5]:
        return f"a step of 1 - 0.25 * 2 gives {values[0]}"
    return None


def instruction_sets() -> str:
    """Return the instruction sets of the compiled kernels and the one in use, as text."""
    if unavailable_reason("cpu") is not None:
        return "none"
    from .. import _cpu

    names = _cpu.instruction_sets()
    return f"{', '.join(names)} ({names[-1]} in use)"


def traffic_of_all() -> Iterator[tuple[str, str, Traffic]]:
    """Yield optimizer, options and the traffic of one step, computed from the step's own plan."""
    for name, optimizer in OPTIMIZERS.items():
        for label, options in OPTIONS.items():
            param = torch.ones(8)
            param.grad = torch.ones(8)
            yield name, label, optimizer([param], backend="reference", **options).traffic()


def traffic_table() -> Table:
    """Return the table of launches and bytes of every optimizer and option."""
    table = Table(title="launches, and bytes per float32 parameter (cuda and triton)", title_justify="left")
    for column in ("optimizer", "options", "launches", "read", "written", "total"):
        table.add_column(column, justify="left" if column in ("optimizer", "options") else "right")
    for name, label, t in traffic_of_all():
        numbers = (t.launches, t.read / t.numel, t.written / t.numel, t.per_parameter)
        table.add_row(name, label, *(f"{x:g}" for x in numbers))
    return table


@click.command()
@click.option("--traffic", is_flag=True, help="Show launches and bytes per parameter of every optimizer.")
@click.pass_context
def doctor(ctx: click.Context, traffic: bool) -> None:
    """Show versions, the machine and which backends work; exit code 0 if reference and cpu do."""
    if traffic:
        PlainConsole().print(traffic_table())
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("system", f"{platform.system()} {platform.machine()}")
    table.add_row("CPU", cpu_model())
    table.add_row("threads", str(torch.get_num_threads()))
    table.add_row("instruction sets", instruction_sets())
    broken = []
    for name in BACKENDS:
        reason = backend_problem(name)
        table.add_row(f"backend {name}", "available" if reason is None else f"not available: {reason}")
        if reason is not None and name in REQUIRED_BACKENDS:
            broken.append(name)
    PlainConsole().print(table)
    if broken:
        names = " and ".join(broken)
        print_error(f"doctor: the backends reference and cpu must work, got trouble with {names}.")
        ctx.exit(1)
    click.echo("doctor: the backends reference and cpu work.")
