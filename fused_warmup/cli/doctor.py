"""``fused-warmup doctor``: does this installation work, and with what."""

from __future__ import annotations

import platform

import click
import torch
from rich.console import Console
from rich.table import Table

import fused_warmup as fw

from ..backends import BACKENDS, unavailable_reason
from .machine import cpu_model, versions

NEEDED = ("reference", "cpu")


def trouble(backend: str) -> str | None:
    """Return what is wrong with a backend for CPU tensors, or None after a step with the right result."""
    reason = unavailable_reason(backend)
    if reason is not None:
        return reason
    param = torch.ones(3)
    param.grad = torch.full((3,), 2.0)
    try:
        fw.SGD([param], lr=0.25, backend=backend).step()
    except Exception as error:  # whatever goes wrong is the diagnosis
        return f"a step fails: {error}"
    return None if param.tolist() == [0.5] * 3 else f"a step of 1 - 0.25 * 2 gives {param[0].item()}"


def instruction_sets() -> str:
    """Return the instruction sets of the compiled kernels, and which is in use."""
    if unavailable_reason("cpu") is not None:
        return "none"
    from .. import _cpu

    names = _cpu.instruction_sets()
    return f"{', '.join(names)} ({names[-1]} in use)"


@click.command()
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Show versions, the machine and which backends work; exit code 0 if reference and cpu do."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("system", f"{platform.system()} {platform.machine()}")
    table.add_row("CPU", cpu_model())
    table.add_row("threads", str(torch.get_num_threads()))
    table.add_row("instruction sets", instruction_sets())
    found = {name: trouble(name) if name in NEEDED else unavailable_reason(name) for name in BACKENDS}
    for name, reason in found.items():
        table.add_row(f"backend {name}", "available" if reason is None else f"not available: {reason}")
    Console().print(table, markup=False)
    broken = [name for name in NEEDED if found[name] is not None]
    if broken:
        click.echo(
            f"doctor: the backends reference and cpu must work, got trouble with {' and '.join(broken)}.",
            err=True,
        )
        ctx.exit(1)
    click.echo("doctor: the backends reference and cpu work.")
