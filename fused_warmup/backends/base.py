"""Protocols of a backend."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ..plan.plan import Plan
from ..plan.vector_tables import PreconditionerTable, VectorTable


class Backend(Protocol):
    """Runs the three stages of a step over a plan.

    Attributes:
        name: The name that selects it.
        max_inline_pointers: Most gradient pointers that it passes in the arguments of a launch.
        max_captured_pointers: Most of them in the arguments of a launch that a graph captures.
    """

    name: str
    max_inline_pointers: int
    max_captured_pointers: int

    def prepare(self, plan: Plan) -> None:
        """Load the kernels of a new plan, which cannot be done while a CUDA graph is captured."""

    def step(self, plan: Plan) -> None:
        """Make one step.

        Args:
            plan: A plan whose ``refresh`` and ``refresh_groups`` have just run.
        """


@runtime_checkable
class VectorBackend(Protocol):
    """A backend with kernels for the vectors of sharpness measurements, which otherwise use PyTorch."""

    def vectors(self, operation: str, table: VectorTable) -> None:
        """Queue one of ``vector_tables.OPERATIONS``.

        Args:
            operation: Its name.
            table: A table whose ``prepare`` has just run.
        """

    def preconditioner(self, plan: Plan, table: PreconditionerTable) -> bool:
        """Queue the preconditioner of the next step.

        Args:
            plan: The table of the step, with its gradients where the kernels read them.
            table: The vectors that it is written to.

        Returns:
            False, with nothing done, if the rule of the plan has none.
        """
