"""Mutable state of an optimizer, and when its plan is built, refreshed and kept."""

from __future__ import annotations

import gc
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import _checks as check
from ..backends import resolve
from ..backends.base import Backend
from ..distributed.groups import is_distributed, is_shard, shared_seed, sum_over
from ..distributed.spread import Spread
from ..plan import build, tensors
from ..plan.address_cache import select_reader
from ..plan.device_buffers import is_capturing
from ..plan.groups import GroupReadings
from ..plan.hyper import AverageSettings, Hyper, Settings
from ..plan.plan import Plan
from ..plan.rows import Row
from ..plan.spec import RuleSpec
from ..plan.sphere import norm_of
from ..plan.state_checks import checked_norm
from ..plan.structs import COUNTERS, RATES
from ..plan.tracked_states import Access, TrackedStates, peek
from ..reference.rounding import MODE_OF_RESIDUE
from ..schedules.adaptive import AdaptiveSchedule, adaptive_schedules
from .averaging import EMA, SWA, Average
from .counts import Counts
from .groups import IGNORED_KEYS, complete_groups, make_hyper, restore_schedules, restored_dtype
from .telemetry import Telemetry

# attributes that pickle and deepcopy keep; plan, backend and captured graphs are made anew
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
    "counts",
    "init_norm_sq",
    "split",
    "grouped",
    "seed",
)


_STEP = COUNTERS.index("step")
# entries of a state that no optimizer of torch keeps alone
_COUNTS = {"step", "n_averaged", "initialized"}
# counts of a parameter without a state
_NONE = (0, 0)


class Session:
    """State, groups, settings, counters and plan of one optimizer.

    An optimizer keeps everything that changes here and nothing in attributes of its own, so that a wrapper
    which forwards the attributes that it lacks, as Lightning's does, reads and writes the same values.

    Args:
        owner: Name of the optimizer class, for messages.
        spec: The update rule.

    Attributes:
        defaults: Defaults of the optimizer for the hyper-parameters of a group.
        state: States by parameter, and whatever else users keep there.
        param_groups: Parameter groups.
        counters: Counts of the optimizer on its device, int64; None before the first step.
        counts: Counts of each parameter, which the table points to.
        adaptive: The adaptive schedule that a group had last, by the identity of the group.
        unfed_steps: Steps since a loss was recorded, if there is an adaptive schedule.
        split: Whether other processes hold other parameters of the same model, as under ZeRO.
        process_group: Processes that plain parameters are spread over, or None; not pickled.
        grouped: Whether there was a process group when the optimizer was pickled.
        seed: Seed of random starts, the same in all processes; None before the first.
        swapped: Whether averages are in the place of the parameters.
        captured: Plans that captured graphs read.
        captured_options: Options of the whole optimizer that the last graph was captured with.
        fresh_norms: Norms of groups that are about to make their first step on a sphere.
        last_rates: Rates of the last step on its device; None before it.
    """

    def __init__(self, owner: str = "", spec: RuleSpec | None = None) -> None:
        self.bind(owner, spec, {})
        self.state: defaultdict[Any, Any] = TrackedStates(Access(), {})
        self.param_groups: list[dict[str, Any]] = []
        self.max_grad_norm: float | None = None
        self.nonfinite = "propagate"
        self.unscale_grads = False
        self.average: Average | None = None
        self.backend_name = "auto"
        self.telemetry = Telemetry(False)
        self.counters: Tensor | None = None
        self.counts = Counts()
        self.init_norm_sq = 0.0
        self.split = self.grouped = False
        self.seed: int | None = None
        self._start()

    def bind(self, owner: str, spec: RuleSpec | None, defaults: Mapping[str, Any]) -> None:
        """Set the declarations of the optimizer class."""
        self.owner, self._spec, self.defaults = owner, spec, defaults
        self._keys = [key for key in defaults if key != "lr" and key not in IGNORED_KEYS]

    @property
    def spec(self) -> RuleSpec:
        """The update rule."""
        assert self._spec is not None
        return self._spec

    def _start(self) -> None:
        """Begin without a plan."""
        self.adaptive: dict[int, AdaptiveSchedule | None] = {}
        self.unfed_steps = 0
        self.swapped = False
        self.process_group: Any = None
        self.captured: list[Plan] = []
        self.captured_options: tuple[Any, ...] = ()
        self.fresh_norms: dict[int, Tensor] = {}
        self.last_rates: Tensor | None = None
        self.plan: Plan | None = None
        self.previous: Plan | None = None
        self.planned_average: Average | None = None
        # options that were found to be in range
        self._checked: tuple[Any, ...] = ()
        self.backend: Backend | None = None
        self.backend_device: torch.device | None = None
        self._rates: Tensor | None = None
        # a view of the counters, and those that it belongs to
        self._updates: Tensor | None = None
        self._counted: Tensor | None = None
        self._loaded: Plan | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the plan; the next step builds it again."""
        # its states need no second check while they are those of the optimizer
        self.previous = self.plan or self.previous
        self.plan = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and deepcopy."""
        return {name: getattr(self, name) for name in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the attributes; the optimizer binds its class again."""
        self.__init__()  # type: ignore[misc]
        for name in _KEPT:
            setattr(self, name, state[name])
        self.track_states()

    def track_states(self) -> None:
        """Convert states of torch, which nobody else holds, to ones that note each access."""
        self.state = TrackedStates(Access(), self.state)

    @property
    def params(self) -> list[Tensor]:
        """The parameters of all groups, in order."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def average_settings(self) -> AverageSettings:
        """The average as the table holds it."""
        return AverageSettings() if self.average is None else self.average.settings

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next((p.device for p in self.params), torch.device("cpu"))

    @property
    def updates(self) -> int:
        """Updates that the optimizer has made; waits for the device."""
        return 0 if self.counters is None else int(self.counters[_STEP])

    def set_process_group(self, process_group: Any) -> None:
        """Set the processes that plain parameters are spread over, or None.

        Raises:
            TypeError: If it is no process group.
        """
        group_type = getattr(torch.distributed, "ProcessGroup", None)
        if process_group is not None and (group_type is None or not isinstance(process_group, group_type)):
            condition = "be a torch.distributed.ProcessGroup or None"
            check.fail(self.owner, "process_group", condition, process_group, error=TypeError)
        self.process_group, self.grouped = process_group, process_group is not None

    def resolve(self, device: torch.device) -> Backend:
        """Return the backend; another one only if the parameters have moved to another device."""
        if self.backend is None or self.backend_device != device:
            self.backend, self.backend_device = resolve(self.backend_name, device), device
        return self.backend

    def allocate_counters(self, device: torch.device) -> Tensor:
        """Return the counters of the optimizer on a device, moved there if they are on another."""
        if self.counters is None or self.counters.device != device:
            fresh = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
            self.counters = fresh if self.counters is None else fresh.copy_(self.counters)
        return self.counters

    @property
    def shared_updates(self) -> Tensor:
        """Number of updates in the memory where the kernels count, 0-dim int64."""
        counters = self.counters
        if counters is None:
            return torch.zeros((), dtype=torch.int64, device="cpu")
        if self._updates is None or self._counted is not counters:
            self._counted, self._updates = counters, counters[_STEP]
        return self._updates

    def allocate_rates(self, device: torch.device) -> Tensor:
        """Return memory for learning rate and weight decay of each group, float64 of ``[>= groups, 2]``.

        All plans write there until a group is added, because a graph that was captured with one plan may be
        replayed after an eager step with another.
        """
        size, rates = len(self.param_groups), self._rates
        if rates is None or rates.device != device or not 0 < size <= len(rates):
            # telemetry has the rate of the first group, not a number where there is none
            rates = torch.full((max(1, size), len(RATES)), math.nan, dtype=torch.float64, device=device)
        if size:
            self._rates = rates
        return rates

    # settings and groups

    def check_settings(self) -> None:
        """Raise for options of the whole optimizer that are out of range."""
        check.one_of(self.owner, "nonfinite", self.nonfinite, ("propagate", "skip"))
        if self.average is not None and not isinstance(self.average, (EMA, SWA)):
            check.fail(self.owner, "average", "be EMA, SWA or None", self.average, error=TypeError)
        if self.max_grad_norm is not None:
            check.number(self.owner, "max_grad_norm", self.max_grad_norm, ends="()")

    def adopt_group(self, group: Any) -> Hyper:
        """Restore the schedules of a group, and return its hyper-parameters."""
        restore_schedules(group, self.adaptive.get(id(group)))
        group["state_dtype"] = restored_dtype(group["state_dtype"])
        hyper = make_hyper(self.owner, self.spec, group)
        if isinstance(group["schedule"], AdaptiveSchedule):
            self.adaptive[id(group)] = group["schedule"]
        return hyper

    def _refresh_groups(self, plan: Plan) -> bool:
        """Update changed hyper-parameters in the plan; return whether others than learning rates changed."""
        # graphs that were captured before groups were added read the first ones
        groups = self.param_groups[: len(plan.groups.norms)]
        return plan.groups.refresh(groups, self._keys, self.adopt_group)

    def check_params(self, params: list[Tensor], hyper: Hyper) -> None:
        """Resolve the backend, and raise for new parameters that it does not take."""

        def numbered() -> Iterator[tuple[int, Tensor, Hyper]]:
            # counted only where it is needed, because a constructor adds many groups
            known = sum(len(group["params"]) for group in self.param_groups)
            yield from ((i, param, hyper) for i, param in enumerate(params, known))

        for i, param, _ in numbered() if hyper.rounds else ():
            build.check_rounding(self.owner, i, param, hyper)
        others = set(select_reader().others(params))
        for k, (i, param, _) in enumerate(numbered() if others else ()):
            # these may be materialised before the first step, which checks them again
            if k in others and not is_lazy(param) and not param.is_meta:
                self.resolve(tensors.check_param(self.owner, i, param, None).device)
        plain = next((param for k, param in enumerate(params) if k not in others), None)
        if plain is not None:
            # the first step raises if they are on several devices
            self.resolve(plain.device)
        self._spreads(numbered())

    def _spreads(self, members: Iterable[tuple[int, Tensor, Hyper]]) -> list[Spread]:
        """Return how parameters are spread over processes; raise where a step could not be right."""
        if self.grouped and self.process_group is None:
            hint = "It is not part of a pickle; set opt.process_group."
            check.fail(self.owner, "process_group", "be that of before the pickle", None, hint)
        settings = self.max_grad_norm, self.nonfinite, self.process_group
        return build.check_spreads(self.owner, self.spec, members, *settings, is_zero=self.split)

    def average_pairs(self) -> list[tuple[Tensor, Tensor, bool]]:
        """Return the local memory of averaged parameters and of their averages, and which are shards."""
        averages = [(p, self.state.get(p, {}).get("average")) for p in self.params]
        local = tensors.local_tensor
        return [(local(p), local(average), is_shard(p)) for p, average in averages if average is not None]

    # the plan

    def prepare(
        self, grad_scale: Tensor | None, found_inf: Tensor | float | None, *, every: bool = False
    ) -> tuple[Plan, Backend]:
        """Return the plan with the addresses and hyper-parameters of this step, and the backend.

        Args:
            grad_scale: Scale of a ``GradScaler``, or None.
            found_inf: Whether it found a gradient that is not finite, or None.
            every: Give all parameters a state, also those without a gradient.
        """
        # True equals 1.0 and is no norm
        settings = self.max_grad_norm, type(self.max_grad_norm), self.nonfinite, self.average
        if settings != self._checked:
            self.check_settings()
            self._checked = settings
        plan, backend = self.plan, self.backend
        if plan is None or backend is None or not self._refresh(plan):
            complete_groups(self.param_groups, self.defaults)
            with torch.no_grad(), _uncollected():
                plan, backend = self._build(every)
            self.planned_average, self.previous = self.average, None
            if isinstance(self.state, TrackedStates):
                self.state.access.noted = self.state.access.replaced = True
            if not self._refresh(plan):
                raise RuntimeError(f"{self.owner}: parameters must stay in place while step() runs.")
        elif plan.reduction is not None and not plan.reduction.is_known:
            build.check_known(self.owner, self.max_grad_norm, self.nonfinite)
        if len(plan.arrivals):
            self._fill(plan)
        if self._refresh_groups(plan) and not self._fits(plan):
            # an option that changes the states, amsgrad, momentum or projection, was turned on or off
            self.reset()
            return self.prepare(grad_scale, found_inf, every=every)
        skip = self.nonfinite == "skip"
        measure = self.max_grad_norm is not None or skip or plan.groups.random_start
        plan.scale(grad_scale, found_inf)
        # states that stood before a random start was asked for were not drawn, and stay zero at any scale
        plan.prepare(Settings(self.max_grad_norm, skip, measure, self.init_norm_sq or 1.0))
        self.plan, self.backend = plan, backend
        return plan, backend

    def _refresh(self, plan: Plan, *, check_states: bool = False) -> bool:
        """Refresh the addresses of a plan; return False if it must be built again."""
        if self.average != self.planned_average:
            return False
        access = self.state.access if isinstance(self.state, TrackedStates) else None
        if access is None:
            return plan.refresh(self.param_groups, check_states=True, check_owners=True)
        if not access.noted:
            return plan.refresh(self.param_groups, check_states=check_states)
        # cleared before the comparison, because another thread may read or replace a state meanwhile; what is
        # let go before the references are counted was changed before the comparison
        replaced, valid = access.replaced, False
        access.noted = access.replaced = False
        shared = plan.states.has_shared()
        try:
            valid = plan.refresh(self.param_groups, check_states=True, check_owners=replaced)
        finally:
            if not valid:
                access.noted, access.replaced = True, access.replaced or replaced
            elif shared:
                access.noted = True
        return valid

    def _fits(self, plan: Plan) -> bool:
        """Return whether the rows have the states and norms that the hyper-parameters ask for."""
        norms = zip(plan.groups.hypers, plan.groups.norms, strict=True)
        return all(h.sphere == (norm is not None) for h, norm in norms) and plan.keeps([
            len(self.spec.state_names(group)) for group in self.param_groups
        ])

    def _build(self, every: bool) -> tuple[Plan, Backend]:
        """Check all tensors, allocate missing states and lay out the table; an error changes nothing."""
        owner, spec, groups = self.owner, self.spec, self.param_groups
        for group in groups:
            for param in group["params"][:1]:
                self._refuse_capture(param.device)
        old = self.plan or self.previous
        readings = GroupReadings() if old is None else old.groups.readings.for_another_table()
        readings.refresh(owner, groups, self._keys, self.adopt_group)
        hypers = readings.hypers
        names = [spec.state_names(group) for group in groups]
        same_average = self.average == self.planned_average
        known = old.valid_rows(self.state) if old is not None and same_average else {}
        found = build.find_rows(
            owner, spec, groups, hypers, names, self.state, known, select_reader(), every=every
        )
        rows, active = found.rows, [found.rows[i] for i in found.active]
        fresh = [i for i in found.active if rows[i].is_reserved]
        counts = self._checked_counts([rows[i] for i in fresh], names)
        device = (active or rows)[0].local.device if rows else torch.device("cpu")
        for g, group in enumerate(groups):
            if hypers[g].sphere and "norm" in group:
                group["norm"] = checked_norm(owner, f"param_groups[{g}]['norm']", group["norm"], device)
        spreads = self._spreads((row.index, row.param, hypers[row.group]) for row in rows)
        backend = self.resolve(device)
        counters = self.allocate_counters(device)
        self.telemetry.allocate(device, counters)
        started = self._allocate_states([rows[i] for i in fresh], hypers, names, counts)
        self._note_start([rows[i] for i in fresh], active, hypers, started)
        self.counts.arrange(rows, device)
        self._count_from(_given(fresh, counts))
        plan = Plan(
            owner,
            spec,
            rows,
            found.reaches,
            found.waiting,
            [list(group["params"]) for group in groups],
            names,
            self.state,
            readings,
            self._norms(hypers, device),
            self.average_settings,
            {
                "row_counters": self.counts.exact,
                "counters": counters,
                "pending_scalars": self.telemetry.pending_scalars,
                "ring_buffer": self.telemetry.ring_buffer,
                "rates": self.allocate_rates(device),
            },
            device,
            spreads=spreads,
        )
        return plan, backend

    def _fill(self, plan: Plan) -> None:
        """Allocate the states of the rows that have got their first gradient; an error changes nothing."""
        positions = plan.arrivals.tolist()
        self._refuse_capture(plan.device)
        rows = [plan.rows[i] for i in positions]
        names = [self.spec.state_names(group) for group in self.param_groups]
        counts = self._checked_counts(rows, names)
        with torch.no_grad():
            filled = [row for row in plan.rows if not row.is_reserved]
            started = self._allocate_states(rows, plan.groups.hypers, names, counts)
            self._note_start(rows, filled + rows, plan.groups.hypers, started)
            self.counts.enter(rows, positions)
            self._count_from(_given(positions, counts))
        plan.fill(positions)

    def _refuse_capture(self, device: torch.device) -> None:
        """Raise if a graph is captured, which must find the table as it stands."""
        if is_capturing(device):
            raise RuntimeError(
                f"{self.owner}: states and table must stand before a graph is captured, got parameters, "
                "groups, states or averages that are new or were moved. Call init_state() before the "
                "capture, with the gradients that the graph will write in .grad."
            )

    def _checked_counts(self, rows: list[Row], names: list[tuple[str, ...]]) -> list[tuple[int, int] | None]:
        """Check the states of rows, and return the counts that came from elsewhere."""
        if not self.state:
            return [_NONE] * len(rows)
        average = self.average_settings
        # the count matters to averages alone, and reading it waits
        calls = 0 if average.kind is None else self.updates
        steps, n_averaged = self.counts.steps, self.counts.n_averaged
        counts: list[tuple[int, int] | None] = []
        for row in rows:
            own, key = peek(self.state, row.param), id(row.param)
            if own is None:
                counts.append(_NONE)
                continue
            build.check_states(self.owner, row, own, names[row.group])
            held = steps.get(key), n_averaged.get(key)
            counts.append(build.checked_counts(self.owner, self.spec, row, own, *held, average, calls))
        return counts

    def _allocate_states(
        self,
        rows: list[Row],
        hypers: Sequence[Hyper],
        names: list[tuple[str, ...]],
        counts: list[tuple[int, int] | None],
    ) -> dict[int, float]:
        """Allocate and convert the states of rows.

        Args:
            rows: The rows.
            hypers: Hyper-parameters of each group.
            names: Names of the states that each group keeps.
            counts: Counts that came from elsewhere, or None for each row.

        Returns:
            For each parameter that had no state, by its identity, the sum of the squares that were drawn.
        """
        spec, averaged, state = self.spec, self.average is not None, self.state
        steps, n_averaged = self.counts.steps, self.counts.n_averaged
        add = state.add if isinstance(state, TrackedStates) else self._add_state
        zero = torch.zeros((), dtype=torch.float32, device=rows[0].local.device if rows else "cpu")
        started: dict[int, float] = {}
        seeds = self._seeds() if any(hyper.init == "random" for hyper in hypers) else {}
        fresh = not state
        for row, count in zip(rows, counts, strict=True):
            own = (None if fresh else peek(state, row.param)) or {}
            if count is None:
                row.step, row.n_averaged = steps[id(row.param)], n_averaged.get(id(row.param))
            elif count[0] or count[1]:
                row.step = torch.full_like(zero, count[0])
                row.n_averaged = torch.full_like(zero, count[1], dtype=torch.int64)
            entries = build.allocate_state(spec, row, names[row.group], own, zero, averaged=averaged)
            if "step" not in own:
                started[id(row.param)] = 0.0
                if hypers[row.group].init == "random":
                    second_moment = entries[spec.states[spec.second_moment_index]]
                    seed = seeds[id(row.param)]
                    started[id(row.param)] = build.draw_second_moment(second_moment, seed)
            for name in own.keys() & MODE_OF_RESIDUE.keys() - entries.keys():
                del own[name]
            add(row.param, entries)
        return started

    def _seeds(self) -> dict[int, int]:
        """Return the seed of a random start of each parameter, by its identity."""
        if self.seed is None:
            self.seed = shared_seed()
        own = 0 if self.process_group is None else torch.distributed.get_rank(self.process_group)
        seeds, index = {}, 0
        for param in self.params:
            # processes with other parts draw other numbers; an empty tensor changes none
            seeds[id(param)] = self.seed + index + (own << 32) * (not is_distributed(param))
            index += bool(param.numel())
        return seeds

    def _note_start(
        self, fresh: Sequence[Row], rows: Sequence[Row], hypers: Sequence[Hyper], started: Mapping[int, float]
    ) -> None:
        """Note the sum of squares of the random starts, with ones for states that stood before.

        Args:
            fresh: Rows that have got states now.
            rows: All rows that have states.
            hypers: Hyper-parameters of each group.
            started: Sums over the rows that had none.
        """
        drawn = any(hypers[row.group].init == "random" and id(row.param) in started for row in fresh)
        # a process without rows adds to the first sum of the others
        waited_for = self.process_group is not None and self.seed is not None and not self.init_norm_sq
        if not (drawn or waited_for):
            return
        total = here = 0.0
        for row in rows:
            value = started.get(id(row.param), float(row.param.numel()))
            if self.process_group is None or is_distributed(row.param):
                total += value
            else:
                here += value
        if self.process_group is not None:
            total += sum_over(here, self.process_group, self.device)
        self.init_norm_sq = total

    def _add_state(self, param: Tensor, entries: Mapping[str, Any]) -> None:
        """Set or complete the state of a parameter in a dictionary of the user."""
        self.state.setdefault(param, {}).update(entries)

    def _count_from(self, made: Mapping[int, int]) -> None:
        """Continue from counts that came from elsewhere, by the position of the row."""
        self.counts.set_exact(made)
        if made and self.counters is not None:
            # wrappers may restore states alone: schedules and averages continue from their counts
            self.counters[_STEP].clamp_(min=max(made.values()))

    def planned_counts(self) -> tuple[list[int], Tensor] | None:
        """Return positions of parameters, and the exact numbers of their updates, int64 on the device.

        None if parameters or states are not those of the plan.
        """
        plan, made = self.plan, self.counts.made
        access = self.state.access if isinstance(self.state, TrackedStates) else None
        noted = access is None or access.noted
        if (
            plan is None
            or made is None
            or not plan.is_current(
                self.param_groups, check_states=noted, check_owners=access is None or access.replaced
            )
        ):
            return None
        return list(plan.indices), made

    def drop_counts(self) -> None:
        """Drop the states of parameters that left the groups where they hold counts alone.

        torch's SGD without momentum keeps no state, and ``state_dict`` cannot number such parameters.
        """
        members = set(map(id, self.params))
        for param, own in list(self.state.items()):
            if isinstance(param, Tensor) and id(param) not in members and own.keys() <= _COUNTS:
                del self.state[param]

    def _norms(self, hypers: list[Hyper], device: torch.device) -> list[Tensor | None]:
        """Return the tensors that hold the norms of groups on a sphere; new ones are to be measured."""
        self.fresh_norms = {}
        for g, (group, hyper) in enumerate(zip(self.param_groups, hypers, strict=True)):
            if not hyper.sphere:
                group.pop("norm", None)
            elif "norm" not in group:
                self.fresh_norms[g] = torch.zeros((), dtype=torch.float64, device=device)
        return [group.get("norm", self.fresh_norms.get(g)) for g, group in enumerate(self.param_groups)]

    def measure_norms(self, plan: Plan) -> None:
        """Measure the norms of groups that are about to make their first step on a sphere."""
        if not self.fresh_norms:
            return
        reduction = plan.reduction
        if reduction is not None:
            members = list(zip(plan.rows, reduction.slots, strict=True))
            for g, slot in product(self.fresh_norms, range(reduction.n_slots)):
                own = [row.value for row, s in members if row.group == g and s == slot]
                reduction.squares[g, slot] = norm_of(own, plan.device).square()
            reduction.add_up(squares=True)
        for g, norm in self.fresh_norms.items():
            if reduction is None:
                norm.copy_(norm_of([row.value for row in plan.rows if row.group == g], plan.device))
            else:
                norm.copy_(reduction.squares[g].sum().sqrt())
            self.param_groups[g]["norm"] = norm
        self.fresh_norms = {}

    def load_kernels(self, plan: Plan, backend: Backend) -> None:
        """Load the kernels of a plan, once: a step that must fail does so before it records a loss."""
        if self._loaded is not plan:
            backend.prepare(plan)
            self._loaded = plan

    def plan_ahead(self) -> tuple[Plan, Backend] | None:
        """Return the plan of the step about to be made without making it; the caller releases it.

        None if that step will build another plan.
        """
        if self.plan is None or not self._refresh(self.plan, check_states=True):
            return None
        if len(self.plan.arrivals):
            self.plan.release()
            return None
        plan, backend = self.prepare(None, None)
        if plan.gradients.is_stale:
            plan.gradients.upload()
        return plan, backend

    def keep_captured(self, plan: Plan) -> None:
        """Keep the plan that a graph reads, whatever plans later eager steps need."""
        plan.buffers.captured = True
        self.captured = [kept for kept in self.captured if kept is not plan] + [plan]
        self.captured_options = self._options

    @property
    def _options(self) -> tuple[Any, ...]:
        """Options of the whole optimizer that a step depends on."""
        return self.max_grad_norm, self.nonfinite, self.average

    def update_captured(self) -> bool:
        """Let captured graphs see hyper-parameters that changed since the capture.

        Returns:
            Whether the graph that was captured last can follow all changes.
        """
        follows = True
        for plan in self.captured:
            follows = len(self.param_groups) == len(plan.groups.norms)
            if len(self.param_groups) >= len(plan.groups.norms):
                self._refresh_groups(plan)
                follows = follows and self._fits(plan)
        return follows and (not self.captured or self._options == self.captured_options)

    # recorded losses

    def record(self, name: str, value: Tensor | float) -> None:
        """Record a loss or sharpness in the next row of the telemetry."""
        if self.telemetry.pending_scalars is None:
            self.telemetry.allocate(self.device)
        self.telemetry.record(name, value)

    def feed(self, loss: Tensor | float) -> None:
        """Pass a loss to the adaptive schedules and take over the ones that change."""
        schedules = adaptive_schedules(self.param_groups)
        changed = [schedule.feed(loss, self, self.counters) for schedule in schedules]
        if any(changed):
            for plan in (self.plan, *self.captured):
                if plan is not None:
                    plan.groups.forget()
            self.update_captured()

    def warn_unfed(self) -> None:
        """Warn once if an adaptive schedule has made two steps without a recorded loss."""
        self.unfed_steps += 1
        if self.unfed_steps == 2:
            names = sorted({type(schedule).__name__ for schedule in adaptive_schedules(self.param_groups)})
            if names:
                warnings.warn(
                    f"{self.owner}: {', '.join(names)} must be fed, got two steps without a loss. Call "
                    "record_loss(loss) before each step().",
                    stacklevel=4,
                )


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector while many objects are made that all stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _given(positions: Sequence[int], counts: Sequence[tuple[int, int] | None]) -> dict[int, int]:
    """Return the numbers of updates that came from elsewhere, by the position of the row."""
    return {i: count[0] for i, count in zip(positions, counts, strict=True) if count is not None and count[0]}
