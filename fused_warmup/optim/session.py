"""What an optimizer keeps from step to step besides torch's state and groups."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ..backends import resolve
from ..backends.base import Backend
from ..plan.hyper import AverageSettings
from ..plan.plan import Plan
from ..plan.rows import RowCounters
from ..plan.structs import COUNTERS
from ..schedules.adaptive import AdaptiveSchedule
from .averaging import Average
from .telemetry import Telemetry

# what pickle and deepcopy keep; the table, the backend and captured graphs are made anew
_KEPT = (
    "state",
    "param_groups",
    "max_grad_norm",
    "nonfinite",
    "unscale_grads",
    "average",
    "backend_name",
    "telemetry",
    "counters",
    "init_norm_sq",
    "split",
)


class Session:
    """State, groups, settings, counters and table of one optimizer.

    An optimizer keeps all that changes here and nothing in attributes of its own, so that a wrapper which
    forwards what it does not have, as Lightning's does, reads and writes the same things.

    Attributes:
        state: States by parameter, and whatever else users keep there.
        param_groups: Parameter groups.
        counters: The counts of the optimizer on its device, int64; None before the first step.
        records: The counts of each parameter that the table points to.
        live: The live schedule that a group had last, by the identity of the group.
        unfed_steps: Steps since a loss was recorded, where there is a live schedule.
        split: Whether other processes hold other parameters of the same model, as under ZeRO.
        exposed: Whether somebody else may hold the states, which each step must then check.
        swapped: Whether averages are in the place of the parameters.
        captured: Tables that captured graphs read.
        fresh_norms: Norms of groups that are about to make their first step on a sphere.
        last_rates: Rates of the last step on its device; None before it.
    """

    def __init__(self) -> None:
        self.state: defaultdict[Any, Any] = defaultdict(dict)
        self.param_groups: list[dict[str, Any]] = []
        self.max_grad_norm: float | None = None
        self.nonfinite = "propagate"
        self.unscale_grads = False
        self.average: Average | None = None
        self.backend_name = "auto"
        self.telemetry = Telemetry(False)
        self.counters: Tensor | None = None
        self.init_norm_sq = 0.0
        self.split = False
        self._start()

    def _start(self) -> None:
        """Begin without a table."""
        self.records: dict[Tensor, RowCounters] = {}
        self.adaptive: dict[int, AdaptiveSchedule | None] = {}
        self.unfed_steps = 0
        self.exposed = self.swapped = False
        self.captured: list[Plan] = []
        self.fresh_norms: dict[int, Tensor] = {}
        self.last_rates: Tensor | None = None
        self.backend: Backend | None = None
        self.backend_device = ""
        self.reset()

    def reset(self) -> None:
        """Forget the table; the next step builds it again."""
        self.plan: Plan | None = None
        self.planned_average: Average | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep."""
        return {name: getattr(self, name) for name in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was kept."""
        self.__init__()  # type: ignore[misc]
        for name in _KEPT:
            setattr(self, name, state[name])

    @property
    def average_settings(self) -> AverageSettings:
        """The average as the table holds it."""
        return AverageSettings() if self.average is None else self.average.settings

    @property
    def params(self) -> list[Tensor]:
        """The parameters of all groups, in order."""
        return [p for group in self.param_groups for p in group["params"]]

    def resolve(self, device: torch.device) -> Backend:
        """Return the backend; another one only if the parameters have moved to another kind of device."""
        if self.backend is None or self.backend_device != device.type:
            self.backend, self.backend_device = resolve(self.backend_name, device), device.type
        return self.backend

    def allocate_counters(self, device: torch.device) -> Tensor:
        """Return the counters of the optimizer on a device, moved there if they are on another."""
        if self.counters is None or self.counters.device != device:
            fresh = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
            self.counters = fresh if self.counters is None else fresh.copy_(self.counters)
        return self.counters
