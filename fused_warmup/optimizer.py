"""What all optimizers share: the fused step, its options, its state and the average."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _checks as check
from . import layout
from .averaging import EMA, SWA, Average, swapped
from .backends import BACKENDS, resolve
from .backends.base import Backend
from .build import build_plan
from .columns import is_capturing
from .live import LiveSchedule, live_schedules
from .plan import Plan
from .schedules import Schedule
from .sphere import norm_of, sphere_options
from .state import load_state, pack_state
from .table import RATES, Hyper, Settings
from .telemetry import Telemetry
from .traffic import Traffic, traffic

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes; ``FusedOptimizer`` explains them."""

    schedule: Schedule | LiveSchedule | None
    weight_decay_schedule: Schedule | None
    projection: str | None
    radius: float | None
    max_grad_norm: float | None
    nonfinite: str
    average: Average | None
    backend: str
    telemetry: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool


class FusedOptimizer(Optimizer):
    """What all optimizers share: the step, its options, state dicts and the average.

    Args:
        params: Parameters or parameter groups, as for ``torch.optim``; float32, float64, bfloat16 or float16
            tensors of any shape, dense or strided, on one device.
        defaults: Hyper-parameters of the rule.
        schedule: Multiplier of ``lr`` over the steps; may be set per group. None is the constant 1. An
            ``AutoWU`` is fed by ``record_loss``.
        weight_decay_schedule: Multiplier of ``weight_decay`` over the steps; may be set per group.
        projection: ``"sphere"`` keeps the norm of all parameters of a group together: after the update they
            are multiplied by one factor. May be set per group; for weights that feed a normalisation, whose
            scale does not matter. ``lr`` is then the effective learning rate, that of weights of norm 1: the
            rule gets ``lr * radius**2`` for SGD, SGDP and unrectified RAdam, ``lr * radius`` for the other
            rules, ``lr`` where LAMB adapts; telemetry shows ``lr`` as given, times the schedule. Parameters
            without a gradient are rescaled too, those that require none take no part. Averages are of what
            is on the sphere. Where the norm after the update is 0 or not finite nothing is rescaled.
            ``weight_decay`` must be 0. Source: Sadrtdinov et al. 2024, arXiv:2410.22113.
        radius: Norm that is kept, > 0; the first step brings the group to it, at the rate that its norm
            before means. None keeps the norm that the group has at its first step, or at ``init_state()``.
            May be set per group. ``param_groups[i]["norm"]`` is the norm in force, a 0-dim float64 tensor.
        max_grad_norm: Clip the gradients of all groups together to this L2 norm, > 0, as
            ``torch.nn.utils.clip_grad_norm_`` does, without changing ``.grad``. None does not clip.
        nonfinite: ``"propagate"`` lets NaN and infinity through as torch does; ``"skip"`` leaves parameters,
            states, averages and the step count as they were when any gradient element is not finite.
        average: ``EMA`` or ``SWA`` of the parameters, written by the update itself.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.
        telemetry: Keep a row per step on the device.
        foreach: Accepted and ignored, so that a swap-in needs one changed word.
        fused: Accepted and ignored.
        capturable: Accepted and ignored.
        differentiable: Must be False.

    Raises:
        ValueError: If an argument is out of range; it is named with the condition and the value.
        TypeError: If an argument has a wrong type or is unknown.
    """

    rule: ClassVar[str]
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        schedule: Schedule | LiveSchedule | None = None,
        weight_decay_schedule: Schedule | None = None,
        projection: str | None = None,
        radius: float | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "propagate",
        average: Average | None = None,
        backend: str = "auto",
        telemetry: bool = True,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        name = type(self).__name__
        if differentiable:
            check.fail(
                name, "differentiable", "be False", differentiable, "torch.optim has the differentiable form."
            )
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.backend = check.one_of(name, "backend", backend, ("auto", *BACKENDS))
        self.average = average
        self.telemetry = Telemetry(check.flag(name, "telemetry", telemetry))
        self._check_settings()
        self._counters: Tensor | None = None
        self._init_norm_sq = 0.0
        self._captured: list[Plan] = []
        self._fresh_norms: dict[int, Tensor] = {}
        self._swapped = False
        self._backend: Backend | None = None
        self._reset()
        passed = {"foreach": foreach, "capturable": capturable, "differentiable": False, "fused": fused}
        schedules = {"schedule": schedule, "weight_decay_schedule": weight_decay_schedule}
        sphere = {"projection": projection, "radius": radius}
        super().__init__(params, {**defaults, **schedules, **sphere, **passed})
        self._hyper_keys = tuple(key for key in self.defaults if key not in passed)

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State by parameter, as torch keeps it.

        Whoever has seen it may replace or move its tensors, so from then on each step checks them all: about
        a quarter of a microsecond per parameter.
        """
        self._exposed = True
        return self._state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._state = state
        self._reset()

    # what a rule declares

    @staticmethod
    def _state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the states of a group, in the order in which the rule takes them."""
        raise TypeError("FusedOptimizer: a subclass must name its states.")

    @staticmethod
    def _hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
        """Return the validated hyper-parameters of the rule for a group."""
        raise TypeError("FusedOptimizer: a subclass must name its hyper-parameters.")

    # groups

    def _make_hyper(self, group: Mapping[str, Any]) -> Hyper:
        """Validate a group, its schedules included."""
        name = type(self).__name__
        hyper = self._hyper(name, group)
        schedules = {key: group[key] for key in ("schedule", "weight_decay_schedule")}
        if isinstance(schedules["schedule"], LiveSchedule):
            schedules["schedule"] = schedules["schedule"].schedule
        for key, schedule in schedules.items():
            if schedule is not None and not isinstance(schedule, Schedule):
                hint = "Arbitrary functions of the step go to torch.optim.lr_scheduler.LambdaLR."
                check.fail(name, key, "be a fused_warmup schedule or None", group[key], hint, TypeError)
        hyper.schedule, hyper.weight_decay_schedule = schedules.values()
        for key, value in sphere_options(name, group, hyper.weight_decay).items():
            setattr(hyper, key, value)
        return hyper

    def _check_settings(self) -> None:
        name = type(self).__name__
        check.one_of(name, "nonfinite", self.nonfinite, ("propagate", "skip"))
        if self.average is not None and not isinstance(self.average, (EMA, SWA)):
            check.fail(name, "average", "be EMA, SWA or None", self.average, error=TypeError)
        if self.max_grad_norm is not None:
            check.number(name, "max_grad_norm", self.max_grad_norm, ends="()")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its missing hyper-parameters are the defaults.

        Args:
            param_group: ``params`` and any hyper-parameter of the rule, ``schedule`` and
                ``weight_decay_schedule`` included. Norm, clipping and averaging are common to all groups.

        Raises:
            ValueError: If a value is out of range, or a parameter is given twice.
            TypeError: If a parameter is of a kind that no backend takes.
        """
        name = type(self).__name__
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            for key in ("max_grad_norm", "nonfinite", "average", "backend", "telemetry"):
                if key in param_group:
                    check.fail(name, key, "be given once for the whole optimizer", param_group[key])
            # of another optimizer that had the group; this one measures its own
            param_group.pop("norm", None)
            if param_group.get("differentiable"):
                check.fail(
                    name, "differentiable", "be False", True, "torch.optim has the differentiable form."
                )
            params = param_group.get("params", ())
            param_group["params"] = params = [params] if isinstance(params, Tensor) else params
            if not isinstance(params, set):
                param_group["params"] = params = list(params)
                plain = [p[1] if isinstance(p, tuple) else p for p in params]
                if len({id(p) for p in plain}) != len(plain):
                    check.fail(name, "params", "hold each parameter once", f"{len(plain)} with duplicates")
                self._check_params([p for p in plain if isinstance(p, Tensor)])
            self._make_hyper({**self.defaults, **param_group})
            if isinstance(param_group.get("lr", self.defaults["lr"]), Tensor):
                # a tensor that two groups share would make every scheduler change both
                param_group["lr"] = param_group.get("lr", self.defaults["lr"]).clone()
        super().add_param_group(param_group)
        self._reset()

    def _check_params(self, params: list[Tensor]) -> None:
        """Raise for parameters that no backend takes, before any state exists, and resolve the backend."""
        known = [p for group in getattr(self, "param_groups", ()) for p in group["params"]]
        for i, param in enumerate(params, len(known)):
            # meta parameters may be materialised before the first step, which checks them again
            if not param.is_meta:
                local = layout.check_param(type(self).__name__, i, param, None)
                self._resolve(local.device)

    def _resolve(self, device: torch.device) -> Backend:
        """Return the backend; another one only if the parameters have moved to another kind of device."""
        if self._backend is None or self._backend_device != device.type:
            self._backend, self._backend_device = resolve(self.backend, device), device.type
        return self._backend

    def _reset(self) -> None:
        """Forget the table; the next step builds it again."""
        self._plan: Plan | None = None
        self._planned_average: Average | None = None

    # the step

    # addresses mean nothing while a compiler traces; unlike torch.compiler.disable, this imports none
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step: norm, clipping, schedules, update and average, without waiting for the device.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward()`` and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If called inside ``averaged_parameters``, or while a graph is captured that could
                not be replayed: gradients that moved, states or groups that are new.
            TypeError: If a parameter or gradient is of a kind that no backend takes.
            ValueError: If a parameter, gradient or hyper-parameter does not fit. Nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._swapped:
            raise RuntimeError(
                f"{type(self).__name__}: step() must not be called inside averaged_parameters()."
            )
        plan, backend = self._prepared_plan()
        self._measure_norms(plan)
        if isinstance(loss, (Tensor, float)):
            self.record_loss(loss)
        if plan.fresh_grads and len(plan.rows) > backend.carries:
            plan.push_grads()
        backend.step(plan)
        plan.sent_grads()
        self._last_rates = plan.rates
        changed = plan.finish()
        if is_capturing(plan.device):
            self._keep_captured(plan)
        else:
            self.telemetry.advance()
        if changed:
            torch.autograd.graph.increment_version(changed)
        return loss

    def init_state(self) -> None:
        """Allocate the states of all parameters now, and the table on the device.

        ``step()`` would do so when a parameter gets its first gradient, which it must not do while a CUDA
        graph is captured. The gradients that a graph will write must be in ``.grad`` already.

        Raises:
            TypeError: If a parameter or gradient is of a kind that no backend takes.
            ValueError: If a parameter, gradient or hyper-parameter does not fit.
        """
        self._reset()
        plan, backend = self._prepared_plan(every=True)
        self._measure_norms(plan)
        plan.push_grads()
        backend.prepare(plan)
        plan.release()

    def _measure_norms(self, plan: Plan) -> None:
        """Take the norms of groups that are about to make their first step on a sphere."""
        for g, norm in self._fresh_norms.items():
            norm.copy_(norm_of([row.local for row in plan.rows if row.group == g], plan.device))
            self.param_groups[g]["norm"] = norm
        self._fresh_norms = {}

    def _keep_captured(self, plan: Plan) -> None:
        """Keep the table that a graph reads, whatever tables later eager steps need."""
        plan.columns.captured = True
        if not any(plan is kept for kept in self._captured):
            self._captured.append(plan)

    def update_captured(self) -> None:
        """Let captured graphs see hyper-parameters that changed since the capture.

        Schedules, step counts and averages move on the device by themselves; ``param_groups`` are read on
        the host, which a replay does not pass through. ``load_state_dict`` calls this.
        """
        for plan in self._captured:
            groups = self.param_groups[: len(plan.hypers)]
            plan.refresh_groups(groups, self._hyper_keys, self._make_hyper)

    def _prepared_plan(self, every: bool = False) -> tuple[Plan, Backend]:
        """Return the table with the addresses and hyper-parameters of this step, and the backend.

        Args:
            every: Give all parameters a state, also those without a gradient.
        """
        self._check_settings()
        plan, backend = self._plan, self._backend
        if (
            plan is None
            or backend is None
            or self.average != self._planned_average
            or not plan.refresh(self._exposed)
        ):
            with torch.no_grad():
                plan, backend = build_plan(self, every)
            self._planned_average = self.average
            if not plan.refresh(exposed=True):
                raise RuntimeError(f"{type(self).__name__}: parameters must stay in place while step() runs.")
        if plan.refresh_groups(self.param_groups, self._hyper_keys, self._make_hyper) and plan.rows:
            wanted = [len(self._state_names(self.param_groups[row.group])) for row in plan.rows]
            norms = zip(plan.hypers, plan.norms, strict=True)
            if wanted != [len(row.states) for row in plan.rows] or any(
                h.sphere != (n is not None) for h, n in norms
            ):
                # an option that changes the states, amsgrad, momentum or projection, was turned on or off
                self._reset()
                return self._prepared_plan(every)
        measure = self.max_grad_norm is not None or self.nonfinite == "skip" or plan.random_start
        # a GradScaler sets these around step() and deletes them
        plan.scale(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        plan.prepare(Settings(self.max_grad_norm, self.nonfinite == "skip", measure, self._init_norm_sq))
        self._plan, self._backend = plan, backend
        return plan, backend

    def _plan_ahead(self) -> tuple[Plan, Backend] | None:
        """Return the table for a look at the step about to be made, None if that will build another.

        The caller releases the plan when it has looked.
        """
        if self._plan is None or self.average != self._planned_average or not self._plan.refresh(True):
            return None
        plan, backend = self._prepared_plan()
        if plan.fresh_grads:
            plan.push_grads()
        return plan, backend

    def traffic(self) -> Traffic:
        """Return launches and bytes of the next step, for the gradients now in ``.grad``; nothing is run."""
        plan, _ = self._prepared_plan()
        plan.release()
        return traffic(plan)

    def record_loss(self, loss: Tensor | float) -> None:
        """Put a loss into the telemetry row of the next step; nothing waits.

        An ``AutoWU`` is fed, too, which waits once per epoch of its warmup.

        Args:
            loss: 0-dim tensor or number. ``step(closure)`` records what the closure returned.

        Raises:
            ValueError: If a tensor has more than one element.
            RuntimeError: If an ``AutoWU`` is fed from elsewhere, or while a graph is captured.
        """
        changed = [live.feed(loss, self, self._counters) for live in live_schedules(self.param_groups)]
        self._record("loss", loss)
        if any(changed):
            for plan in (self._plan, *self._captured):
                if plan is not None:
                    plan.forget_groups()
            self.update_captured()

    def record_sharpness(self, sharpness: Tensor | float) -> None:
        """Put a sharpness into the telemetry row of the next step; nothing waits.

        Args:
            sharpness: 0-dim tensor or number. A ``SharpnessProbe`` calls this.

        Raises:
            ValueError: If a tensor has more than one element.
        """
        self._record("sharpness", sharpness)

    def _record(self, name: str, value: Tensor | float) -> None:
        if isinstance(value, Tensor) and value.numel() != 1:
            check.fail(type(self).__name__, name, "have one element", tuple(value.shape))
        if self.telemetry.slots is None:
            device = next(
                (p.device for group in self.param_groups for p in group["params"]), torch.device("cpu")
            )
            self.telemetry.allocate(device)
        self.telemetry.record(name, value)

    def get_last_lr(self) -> list[float]:
        """Return the learning rate applied at the last step, one per group; waits for the device."""
        if self._last_rates is None:
            return [float(group["lr"]) for group in self.param_groups]
        return [float(lr) for lr in self._last_rates[:, RATES.index("lr")].tolist()]

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Evaluate with the averages in place of the parameters; restored exactly, also after an exception.

        Buffers are not averaged: call ``torch.optim.swa_utils.update_bn`` inside the block for batch norms.

        Raises:
            RuntimeError: If the optimizer keeps no average, or the averages are in place already.
        """
        if self.average is None:
            raise RuntimeError(
                f"{type(self).__name__}: averaged_parameters() must have average= set, got None."
            )
        if self._swapped:
            raise RuntimeError(f"{type(self).__name__}: averaged_parameters() must not be nested.")
        local = layout.local_tensor
        pairs = [
            (local(p), local(state["average"])) for p, state in self._state.items() if "average" in state
        ]
        self._swapped = True
        try:
            with swapped(pairs):
                yield
        finally:
            self._swapped = False

    # state

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's format, tensors and plain types only.

        ``state`` and ``param_groups`` load into the ``torch.optim`` optimizer of the same name; the entry
        ``fused_warmup`` holds counters and telemetry besides.
        """
        # hooks see what is returned, so they run after the packing
        hooks = self._optimizer_state_dict_post_hooks
        self._optimizer_state_dict_post_hooks = OrderedDict()
        try:
            packed = pack_state(self, super().state_dict())
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        for hook in hooks.values():
            replaced = hook(self, packed)
            packed = packed if replaced is None else replaced
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this optimizer or the ``torch.optim`` one of the same name saved.

        Values are copied into the buffers that exist, and states keep the dtype of the arithmetic.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            ValueError: If it is of another optimizer, version, or shape; nothing is changed then.
        """
        load_state(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: everything but the table and hooks."""
        keep = ("max_grad_norm", "nonfinite", "backend", "average", "telemetry", "_counters", "_init_norm_sq")
        own = {name: self.__dict__[name] for name in (*keep, "_hyper_keys")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled state; the table is built at the next step."""
        kept = dict(state)
        self.state = kept.pop("state")
        super().__setstate__(kept)
        self._swapped = False
        self._captured = []
        self._fresh_norms = {}
        self._backend = None
        for group in self.param_groups:
            # pickled before there were projections
            group.setdefault("projection", None)
            group.setdefault("radius", None)
        self._reset()

    def __repr__(self) -> str:
        """Name the class, the backend in use and the groups."""
        resolved = self._backend.name if self._backend is not None else "not resolved yet"
        head = f"backend: {self.backend} ({resolved}), max_grad_norm: {self.max_grad_norm}"
        text = super().__repr__()
        return text.replace("(", f"({head}, nonfinite: {self.nonfinite}, average: {self.average}", 1)

    _backend_device: str = ""
    _exposed: bool = False
    _last_rates: Tensor | None = None
