"""What a backend is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ..plan.plan import Plan
from ..plan.vector_tables import PreconditionerTable, VectorTable


class Backend(Protocol):
    """Runs the three stages of a step over a plan.

    Attributes:
        name: The word that selects it.
        max_inline_pointers: Up to how many addresses of gradients it takes along with a launch.
    """

    name: str
    max_inline_pointers: int

    def prepare(self, plan: Plan) -> None:
        """Load what the steps of a new plan need, which a CUDA graph could not record."""

    def step(self, plan: Plan) -> None:
        """Make one step.

        Args:
            plan: A plan whose ``refresh`` and ``refresh_groups`` have just run.
        """


@runtime_checkable
class VectorBackend(Protocol):
    """Has kernels for the vectors of sharpness measurements; without them they are worked on by PyTorch."""

    def vectors(self, operation: str, table: VectorTable) -> None:
        """Queue one of ``vector_tables.OPERATIONS``.

        Args:
            operation: Its name.
            table: A table whose ``prepare`` has just run.
        """

    def preconditioner(self, plan: Plan, table: PreconditionerTable) -> bool:
        """Queue the pre-conditioner of the step about to be made.

        Args:
            plan: The table of the step, with its gradients where the kernels read them.
            table: Where to write.

        Returns:
            False, with nothing done, if the rule of the plan has none.
        """
