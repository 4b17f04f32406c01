"""``fused-warmup doctor``: checks the installation."""

from __future__ import annotations

import platform
from collections.abc import Iterable

import click
import torch
from rich.table import Table

import fused_warmup as fw

from ..backends import BACKENDS, device_type, unavailable_reason
from ..plan.roofline import Device, find_device
from .console import PlainConsole
from .machine import cpu_model, versions
from .traffic import (
    KERNEL_HEADINGS,
    ROUNDING_HEADINGS,
    STEP_HEADINGS,
    TRAFFIC_HEADINGS,
    kernel_rows,
    rounding_rows,
    step_rows,
    traffic_rows,
)
from .words import print_error

REQUIRED_BACKENDS = ("reference", "cpu")


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


def print_traffic(gpu: Device | None) -> None:
    """Print launches and bytes of every optimizer and option, and their predicted times on a GPU."""
    console = PlainConsole()
    title = "launches, and bytes per float32 parameter (cuda and triton)"
    console.print(numbers_table(title, TRAFFIC_HEADINGS, traffic_rows()))
    title = "Adam: bytes per parameter, held with the states and without gradients, and moved in a step"
    console.print(numbers_table(title, ROUNDING_HEADINGS, rounding_rows()))
    if gpu is None:
        return
    title = f"predicted milliseconds of a step on one {gpu.name} with float32 parameters"
    console.print(numbers_table(title, STEP_HEADINGS, step_rows(gpu)))
    title = "predicted microseconds of the kernels, 124M: the longest of four terms, and 2.5 for the launch"
    console.print(numbers_table(title, KERNEL_HEADINGS, kernel_rows(gpu)))


def numbers_table(title: str, headings: Iterable[str], rows: Iterable[list[str]]) -> Table:
    """Return a table whose columns are numbers, other than those that name a row."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        named = heading in ("optimizer", "options", "kernel", "parameters", "states", "param_rounding")
        table.add_column(heading, justify="left" if named else "right")
    for row in rows:
        table.add_row(*row)
    return table


def known_gpu(ctx: click.Context, option: click.Parameter, name: str | None) -> Device | None:
    """Return the GPU of a name."""
    try:
        return None if name is None else find_device(name, "doctor")
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, option) from None


@click.command()
@click.option("--traffic", is_flag=True, help="Show launches and bytes per parameter of every optimizer.")
@click.option("--gpu", metavar="NAME", callback=known_gpu, help="With --traffic: predict the times on it.")
@click.pass_context
def doctor(ctx: click.Context, traffic: bool, gpu: Device | None) -> None:
    """Show versions, the machine and which backends work; exit code 0 if reference and cpu do."""
    if gpu is not None and not traffic:
        raise click.UsageError("--gpu needs --traffic.")
    if traffic:
        print_traffic(gpu)
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
