"""What a backend is."""

from __future__ import annotations

from typing import Protocol

from ..plan import Plan


class Backend(Protocol):
    """Runs the three stages of a step over a plan.

    Attributes:
        name: The word that selects it.
    """

    name: str

    def prepare(self, plan: Plan) -> None:
        """Load what the steps of a new plan need, which a CUDA graph could not record."""

    def step(self, plan: Plan) -> None:
        """Make one step.

        Args:
            plan: A plan whose ``refresh`` and ``refresh_groups`` have just run.
        """
