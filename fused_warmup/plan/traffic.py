"""Launches and bytes of a step."""

from __future__ import annotations

from dataclasses import dataclass

from ..reference.rules import LAYER_RULES
from .hyper import Settings
from .plan import Plan
from .rows import Row


@dataclass(frozen=True)
class Traffic:
    """Launches and bytes of one step of a plan.

    Attributes:
        launches: Kernel launches on the device backends; the same for any number of tensors.
        read: Bytes read, of all tensors together.
        written: Bytes written.
        numel: Number of parameters.
    """

    launches: int
    read: int
    written: int
    numel: int

    @property
    def per_parameter(self) -> float:
        """Bytes read and written per parameter."""
        return (self.read + self.written) / max(self.numel, 1)


def traffic(plan: Plan) -> Traffic:
    """Return launches and bytes of a step in which all parameters have gradients and the average is due.

    The table itself is left out: 16 bytes a chunk of 32,768 elements and 200 a tensor. A sphere takes one
    more pass over its groups, whose squares the update sums.

    Args:
        plan: A plan whose groups and settings are those of the step.
    """
    sizes, layered = plan.gradients.item_sizes(), LAYER_RULES.get(plan.rule)
    stages = [
        _row_bytes(row, size, plan.settings)
        if layered is None
        else _layer_bytes(
            row, size, plan.settings, layered.needs_grad(plan.groups.hypers[row.group], len(row.states))
        )
        for row, size in zip(plan.rows, sizes, strict=True)
        if not row.is_reserved
    ]
    # sphere groups are read and written once more
    stages += [(n, n) for row in plan.rows if plan.groups.hypers[row.group].sphere for n in [row.work.nbytes]]
    return Traffic(
        # decide and update, and one for the norm: before them, or after them for telemetry. Rules that sum
        # over layers update in two parts with the sums between, and sum the norm there.
        launches=(2 if layered is None else 4) + _takes_norm(plan, layered is None) + plan.groups.has_spheres,
        read=sum(read for read, _ in stages),
        written=sum(written for _, written in stages),
        numel=plan.numel,
    )


def _takes_norm(plan: Plan, elementwise: bool) -> bool:
    """Return whether a launch measures or finishes the norm of the gradients."""
    return plan.settings.measure or (elementwise and plan.record["ring_buffer"] is not None)


def _row_bytes(row: Row, grad_size: int, settings: Settings) -> tuple[int, int]:
    """Return the bytes read and written for one row."""
    kept = [row.work, *row.states, *([] if row.average is None else [row.average])]
    updated = sum(tensor.element_size() for tensor in kept)
    passes = 2 if settings.measure else 1
    return row.work.numel() * (updated + passes * grad_size), row.work.numel() * updated


def _layer_bytes(row: Row, grad_size: int, settings: Settings, needs_grad: bool) -> tuple[int, int]:
    """Return the bytes for a rule that reads parameter and states once more after the sums."""
    read, written = _row_bytes(row, grad_size, settings)
    again = row.work.element_size() + sum(state.element_size() for state in row.states)
    return read + row.work.numel() * (again + needs_grad * grad_size), written
