"""What all optimizers share: the fused step, its options, its state and the average."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import required

from .. import _checks as check
from ..backends import BACKENDS
from ..backends.base import Backend
from ..distributed.groups import built_by_zero
from ..plan import tensors
from ..plan.build import build_plan, check_norms, check_whole
from ..plan.device_buffers import is_capturing
from ..plan.hyper import Hyper, Settings
from ..plan.plan import Plan
from ..plan.sphere import norm_of, sphere_options
from ..plan.structs import RATES
from ..plan.traffic import Traffic, traffic
from ..schedules import Schedule
from ..schedules.adaptive import AdaptiveSchedule, adaptive_schedules, restored
from .averaging import EMA, SWA, Average, swapped
from .losses import checked_loss, reported_loss
from .session import Session
from .state_dict import load_state, pack_state
from .telemetry import Telemetry

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes; ``FusedOptimizer`` explains them."""

    schedule: Schedule | AdaptiveSchedule | None
    weight_decay_schedule: Schedule | None
    projection: str | None
    radius: float | None
    max_grad_norm: float | None
    nonfinite: str
    unscale_grads: bool
    average: Average | None
    backend: str
    telemetry: bool | str
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
            ``torch.nn.utils.clip_grad_norm_`` does, without changing ``.grad``. None, 0 and infinity do not
            clip.
        nonfinite: ``"propagate"`` lets NaN and infinity through as torch does; ``"skip"`` leaves parameters,
            states, averages and the step count as they were when any gradient element is not finite.
        unscale_grads: What ``.grad`` holds after ``scaler.step(opt)`` of a ``torch.amp.GradScaler``. False
            leaves it multiplied by the scale, because unscaling costs a write of every gradient that the step
            does not need; True divides it by the scale after the update, as torch's optimizers do. Telemetry
            has the norms of the unscaled gradients either way.
        average: ``EMA`` or ``SWA`` of the parameters, written by the update itself.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.
        telemetry: Keep a row per step on the device. State dicts hold the last 1,024 rows, or all of them
            with ``"all"``.
        foreach: Accepted and ignored, so that a swap-in needs one changed word.
        fused: Accepted and ignored.
        capturable: Accepted and ignored.
        differentiable: Must be False.

    Raises:
        ValueError: If an argument is out of range; it is named with the condition and the value.
        TypeError: If an argument has a wrong type or is unknown.
    """

    rule: ClassVar[str]
    # hyper-parameters that make the class what it is, whatever a state dict says
    fixed: ClassVar[Mapping[str, Any]] = {}
    # gradients that are sparse are made dense
    takes_sparse: ClassVar[bool] = False
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        schedule: Schedule | AdaptiveSchedule | None = None,
        weight_decay_schedule: Schedule | None = None,
        projection: str | None = None,
        radius: float | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "propagate",
        unscale_grads: bool = False,
        average: Average | None = None,
        backend: str = "auto",
        telemetry: bool | str = True,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **unknown: Any,
    ) -> None:
        name = type(self).__name__
        if unknown:
            raise TypeError(f"{name}() got an unexpected keyword argument {next(iter(unknown))!r}.")
        if differentiable:
            check.fail(
                name, "differentiable", "be False", differentiable, "torch.optim has the differentiable form."
            )
        self._session = Session()
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.unscale_grads = check.flag(name, "unscale_grads", unscale_grads)
        self.backend = backend
        self.average = average
        if telemetry != "all":
            telemetry = check.flag(name, "telemetry", telemetry)
        self.telemetry = Telemetry(bool(telemetry), keep_all=telemetry == "all")
        self._check_settings()
        # before params, which may be a generator, are touched
        self._hyper(name, {**defaults, "lr": 0.0} if defaults["lr"] is required else defaults)
        passed = {"foreach": foreach, "capturable": capturable, "differentiable": False, "fused": fused}
        schedules = {"schedule": schedule, "weight_decay_schedule": weight_decay_schedule}
        sphere = {"projection": projection, "radius": radius}
        self._session.split = built_by_zero()
        # what holds for all groups
        self._common = {
            "max_grad_norm": max_grad_norm,
            "nonfinite": nonfinite,
            "unscale_grads": unscale_grads,
            "average": average,
            "backend": backend,
            "telemetry": telemetry,
        }
        super().__init__(params, {**defaults, **schedules, **sphere, **passed})
        self._hyper_keys = tuple(key for key in self.defaults if key not in passed)

    # what the session holds, under the names that users know

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State by parameter, as torch keeps it.

        Whoever has seen it may replace or move its tensors, so from then on each step checks them all: about
        a quarter of a microsecond per parameter.
        """
        self._session.exposed = True
        return self._session.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._session.state = state
        self._session.reset()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups, as torch keeps them; the list may be replaced."""
        return self._session.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._session.param_groups = groups
        self._session.reset()

    @property
    def max_grad_norm(self) -> float | None:
        """L2 norm to which the gradients of all groups together are clipped, or None."""
        return self._session.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        # the usual words for no clipping
        plain = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool)
        unclipped = plain and max_grad_norm in (0, math.inf)
        self._session.max_grad_norm = None if unclipped else max_grad_norm

    @property
    def nonfinite(self) -> str:
        """What gradients that are not finite do: ``"propagate"`` or ``"skip"``."""
        return self._session.nonfinite

    @nonfinite.setter
    def nonfinite(self, nonfinite: str) -> None:
        self._session.nonfinite = nonfinite

    @property
    def unscale_grads(self) -> bool:
        """Whether ``.grad`` is divided by the scale of a ``GradScaler`` after the update."""
        return self._session.unscale_grads

    @unscale_grads.setter
    def unscale_grads(self, unscale_grads: bool) -> None:
        self._session.unscale_grads = unscale_grads

    @property
    def average(self) -> Average | None:
        """``EMA`` or ``SWA`` of the parameters, or None."""
        return self._session.average

    @average.setter
    def average(self, average: Average | None) -> None:
        self._session.average = average

    @property
    def backend(self) -> str:
        """Name of the backend that was asked for."""
        return self._session.backend_name

    @backend.setter
    def backend(self, backend: str) -> None:
        self._session.backend_name = check.one_of(
            type(self).__name__, "backend", backend, ("auto", *BACKENDS)
        )
        self._session.backend = None
        self._session.reset()

    @property
    def telemetry(self) -> Telemetry:
        """The record that steps leave."""
        return self._session.telemetry

    @telemetry.setter
    def telemetry(self, telemetry: Telemetry) -> None:
        self._session.telemetry = telemetry
        self._session.reset()

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
        if isinstance(schedules["schedule"], AdaptiveSchedule):
            schedules["schedule"] = schedules["schedule"].schedule
        for key, schedule in schedules.items():
            if schedule is not None and not isinstance(schedule, Schedule):
                hint = "Arbitrary functions of the step go to torch.optim.lr_scheduler.LambdaLR."
                check.fail(name, key, "be a fused_warmup schedule or None", group[key], hint, TypeError)
        hyper.schedule, hyper.weight_decay_schedule = schedules.values()
        for key, value in sphere_options(name, group, hyper.weight_decay).items():
            setattr(hyper, key, value)
        return hyper

    def _adopt_group(self, group: Any) -> Hyper:
        """Validate a group as it stands, after making schedules of those that came as plain types.

        Wrappers copy the groups of a state dict without asking ``load_state_dict``. A live schedule stays the
        object that the user holds.
        """
        live = self._session.adaptive
        for key in ("schedule", "weight_decay_schedule"):
            if isinstance(group[key], Mapping):
                schedule, held = restored(group[key]), live.get(id(group))
                if isinstance(schedule, AdaptiveSchedule) and type(held) is type(schedule):
                    held.load_state_dict(schedule.state_dict())
                    schedule = held
                group[key] = schedule
        hyper = self._make_hyper(group)
        if isinstance(group["schedule"], AdaptiveSchedule):
            live[id(group)] = group["schedule"]
        return hyper

    def _complete_groups(self) -> None:
        """Give groups that came from elsewhere the hyper-parameters that they lack."""
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def _check_settings(self) -> None:
        name, session = type(self).__name__, self._session
        check.one_of(name, "nonfinite", session.nonfinite, ("propagate", "skip"))
        if session.average is not None and not isinstance(session.average, (EMA, SWA)):
            check.fail(name, "average", "be EMA, SWA or None", session.average, error=TypeError)
        if session.max_grad_norm is not None:
            check.number(name, "max_grad_norm", session.max_grad_norm, ends="()")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its missing hyper-parameters are the defaults.

        The dictionary itself becomes the group, as in torch, so that whoever holds it can change it.

        Args:
            param_group: ``params`` and any hyper-parameter of the rule, ``schedule`` and
                ``weight_decay_schedule`` included. Norm, clipping and averaging are common to all groups.

        Raises:
            ValueError: If a value is out of range, or a parameter is in another group already.
            TypeError: If a parameter is of a kind that no backend takes.
            KeyError: If there are no ``params``.
        """
        name = type(self).__name__
        if isinstance(param_group, dict):
            for key, value in self._common.items():
                # a wrapper may repeat what the optimizer was made with in each group
                given = param_group.get(key, value)
                if type(given) is not type(value) or given != value:
                    check.fail(name, key, "be given once for the whole optimizer", given)
            if param_group.get("differentiable"):
                check.fail(
                    name, "differentiable", "be False", True, "torch.optim has the differentiable form."
                )
            merged = {**self.defaults, **param_group}
            if merged["lr"] is required:
                check.fail(name, "lr", "be given for each group or for all", "none")
            hyper = self._make_hyper(merged)
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else params
            if not isinstance(params, set):
                params = self._once(list(params))
                plain = [p[1] if isinstance(p, tuple) else p for p in params]
                self._check_params([p for p in plain if isinstance(p, Tensor)], hyper)
            param_group["params"] = params
            # of another optimizer that had the group; this one measures its own
            param_group.pop("norm", None)
        super().add_param_group(param_group)
        self._session.reset()

    def _once(self, params: list[Any]) -> list[Any]:
        """Return the entries of a group, each parameter once; a tied weight may be listed twice."""
        first: dict[int, Any] = {}
        for entry in params:
            first.setdefault(id(entry[1] if isinstance(entry, tuple) else entry), entry)
        if len(first) < len(params):
            warnings.warn(
                f"{type(self).__name__}: got a parameter group with duplicate parameters; each is "
                "trained once.",
                stacklevel=4,
            )
        return list(first.values())

    def _check_params(self, params: list[Tensor], hyper: Hyper) -> None:
        """Raise for parameters that no backend takes, before any state exists, and resolve the backend."""
        name, session = type(self).__name__, self._session
        known = len(session.params)
        for i, param in enumerate(params, known):
            # these may be materialised before the first step, which checks them again
            if not is_lazy(param) and not param.is_meta:
                local = tensors.check_param(name, i, param, None)
                session.resolve(local.device)
        check_whole(name, self.rule, session, [(i, p, hyper) for i, p in enumerate(params, known)])

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
            ValueError: If a parameter, gradient, state or hyper-parameter does not fit. Nothing is changed
                then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        session = self._session
        if session.swapped:
            raise RuntimeError(
                f"{type(self).__name__}: step() must not be called inside averaged_parameters()."
            )
        may_probe = not session.state and self._is_at_rest()
        plan, backend = self._prepared_plan()
        if may_probe and plan.gradients_are_zero():
            # not a step but a wrapper that wants to see the states
            self.init_state()
            return loss
        self._measure_norms(plan)
        value = reported_loss(loss)
        if value is not None:
            self.record_loss(value)
        self._warn_unfed()
        if plan.fresh_grads and len(plan.rows) > backend.max_inline_pointers:
            plan.upload_grads()
        backend.step(plan)
        plan.sent_grads()
        session.last_rates = plan.rates
        if session.unscale_grads:
            plan.unscale_grads()
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
        self._session.reset()
        plan, backend = self._prepared_plan(every=True)
        self._measure_norms(plan)
        plan.upload_grads()
        backend.prepare(plan)
        plan.release()

    def _is_at_rest(self) -> bool:
        """Whether all learning rates are 0, which are numbers on the host."""
        return all(float(group["lr"]) == 0.0 for group in self.param_groups)

    def _measure_norms(self, plan: Plan) -> None:
        """Take the norms of groups that are about to make their first step on a sphere."""
        for g, norm in self._session.fresh_norms.items():
            norm.copy_(norm_of([row.local for row in plan.rows if row.group == g], plan.device))
            self.param_groups[g]["norm"] = norm
        self._session.fresh_norms = {}

    def _keep_captured(self, plan: Plan) -> None:
        """Keep the table that a graph reads, whatever tables later eager steps need."""
        plan.buffers.captured = True
        captured = self._session.captured
        if not any(plan is kept for kept in captured):
            captured.append(plan)

    def _warn_unfed(self) -> None:
        """Warn once if a live schedule gets no losses: it would warm up for ever."""
        session = self._session
        session.unfed_steps = session.unfed_steps + 1 if session.adaptive else 0
        if session.unfed_steps == 2:
            names = ", ".join(sorted({type(live).__name__ for live in adaptive_schedules(self.param_groups)}))
            if names:
                warnings.warn(
                    f"{type(self).__name__}: {names} must be fed, got two steps without a loss. Call "
                    "record_loss(loss) before each step().",
                    stacklevel=4,
                )

    def update_captured(self) -> None:
        """Let captured graphs see hyper-parameters that changed since the capture.

        Schedules, step counts and averages move on the device by themselves; ``param_groups`` are read on
        the host, which a replay does not pass through. ``load_state_dict`` calls this.
        """
        for plan in self._session.captured:
            groups = self.param_groups[: len(plan.hypers)]
            plan.refresh_groups(groups, self._hyper_keys, self._adopt_group)

    def _prepared_plan(self, every: bool = False) -> tuple[Plan, Backend]:
        """Return the table with the addresses and hyper-parameters of this step, and the backend.

        Args:
            every: Give all parameters a state, also those without a gradient.
        """
        self._check_settings()
        session = self._session
        plan, backend = session.plan, session.backend
        if (
            plan is None
            or backend is None
            or session.average != session.planned_average
            or not plan.refresh(self.param_groups, session.exposed)
        ):
            self._complete_groups()
            with torch.no_grad():
                plan, backend = build_plan(self, every)
            session.planned_average = session.average
            if not plan.refresh(self.param_groups, exposed=True):
                raise RuntimeError(f"{type(self).__name__}: parameters must stay in place while step() runs.")
        elif plan.is_split:
            check_norms(type(self).__name__, session)
        if plan.refresh_groups(self.param_groups, self._hyper_keys, self._adopt_group) and plan.rows:
            wanted = [len(self._state_names(self.param_groups[row.group])) for row in plan.rows]
            norms = zip(plan.hypers, plan.norms, strict=True)
            if wanted != [len(row.states) for row in plan.rows] or any(
                h.sphere != (n is not None) for h, n in norms
            ):
                # an option that changes the states, amsgrad, momentum or projection, was turned on or off
                session.reset()
                return self._prepared_plan(every)
        skip = session.nonfinite == "skip"
        measure = session.max_grad_norm is not None or skip or plan.random_start
        # a GradScaler sets these around step() and deletes them
        plan.scale(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        plan.prepare(Settings(session.max_grad_norm, skip, measure, session.init_norm_sq))
        session.plan, session.backend = plan, backend
        return plan, backend

    def _plan_ahead(self) -> tuple[Plan, Backend] | None:
        """Return the table for a look at the step about to be made, None if that will build another.

        The caller releases the plan when it has looked.
        """
        session = self._session
        if (
            session.plan is None
            or session.average != session.planned_average
            or not session.plan.refresh(self.param_groups, exposed=True)
        ):
            return None
        plan, backend = self._prepared_plan()
        if plan.fresh_grads:
            plan.upload_grads()
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
            loss: 0-dim tensor or number. ``step(closure)`` records what the closure returned: the mean of a
                tensor with several elements, and nothing where it is no number.

        Raises:
            ValueError: If a tensor has more than one element.
            TypeError: If it is neither a tensor nor a number.
            RuntimeError: If an ``AutoWU`` is fed from elsewhere, or while a graph is captured.
        """
        session = self._session
        loss = checked_loss(type(self).__name__, "loss", loss)
        session.unfed_steps = -1
        live = adaptive_schedules(self.param_groups)
        changed = [schedule.feed(loss, session, session.counters) for schedule in live]
        self._record("loss", loss)
        if any(changed):
            for plan in (session.plan, *session.captured):
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
        self._record("sharpness", checked_loss(type(self).__name__, "sharpness", sharpness))

    def _record(self, name: str, value: Tensor | float) -> None:
        if self.telemetry.pending_scalars is None:
            device = next((p.device for p in self._session.params), torch.device("cpu"))
            self.telemetry.allocate(device)
        self.telemetry.record(name, value)

    def get_last_lr(self) -> list[float]:
        """Return the learning rate applied at the last step, one per group; waits for the device."""
        rates = self._session.last_rates
        if rates is None:
            return [float(group["lr"]) for group in self.param_groups]
        return [float(lr) for lr in rates[:, RATES.index("lr")].tolist()]

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
        session = self._session
        if session.swapped:
            raise RuntimeError(f"{type(self).__name__}: averaged_parameters() must not be nested.")
        local = tensors.local_tensor
        averages = [(p, session.state.get(p, {}).get("average")) for p in session.params]
        pairs = [(local(p), local(average)) for p, average in averages if average is not None]
        session.swapped = True
        try:
            with swapped(pairs):
                yield
        finally:
            session.swapped = False

    # state

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's format, tensors and plain types only.

        ``state`` and ``param_groups`` load into the ``torch.optim`` optimizer of the same name; the entry
        ``fused_warmup`` holds counters and telemetry besides. As in torch, tensors are those of the optimizer
        and follow its later steps; copy the state dict to keep one of the past in memory.
        """
        # hooks see what is returned, so they run after the packing
        hooks = self._optimizer_state_dict_post_hooks
        self._optimizer_state_dict_post_hooks = OrderedDict()
        try:
            packed = pack_state(self.rule, self._session, super().state_dict())
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        for hook in hooks.values():
            replaced = hook(self, packed)
            packed = packed if replaced is None else replaced
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this optimizer or the ``torch.optim`` one of the same name saved.

        Values are copied into the buffers that exist, and states keep the dtype of the arithmetic. As with
        all hyper-parameters in torch, the schedules of the state dict win over those of the optimizer, also
        where it has none; a warning says so once if yours is replaced. A state dict of torch says nothing
        of schedules.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            ValueError: If it is of another optimizer, version, or shape; nothing is changed then.
            TypeError: If a state is no tensor of real numbers.
        """
        load_state(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: everything but the table and hooks."""
        own = {name: self.__dict__[name] for name in ("_common", "_hyper_keys", "_session")}
        return {"defaults": self.defaults, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled state, or states and groups that torch's ``load_state_dict`` has read.

        The table is built at the next step, which checks and converts what is in them.
        """
        kept = dict(state)
        loaded = {key: kept.pop(key) for key in ("state", "param_groups") if key in kept}
        super().__setstate__(kept)
        for held, group in zip(self.param_groups, loaded.get("param_groups", ()), strict=False):
            self._session.adaptive[id(group)] = held.get("schedule")
        for key, value in loaded.items():
            setattr(self, key, value)
        self._complete_groups()
        for group in self.param_groups if loaded else ():
            group.update(self.fixed)

    def __repr__(self) -> str:
        """Name the class, the backend in use and the groups."""
        resolved = "not resolved yet" if self._session.backend is None else self._session.backend.name
        head = f"backend: {self.backend} ({resolved}), max_grad_norm: {self.max_grad_norm}"
        text = super().__repr__()
        return text.replace("(", f"({head}, nonfinite: {self.nonfinite}, average: {self.average}", 1)
