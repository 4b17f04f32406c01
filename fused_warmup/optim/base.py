"""Base class of all optimizers: torch's contract over the fused step."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim import Optimizer, optimizer
from torch.optim.optimizer import required

from .. import _checks as check
from ..backends import BACKENDS
from ..backends.base import Backend
from ..distributed.groups import is_shard, reshard, zero_group
from ..plan.device_buffers import is_capturing
from ..plan.plan import Plan
from ..plan.spec import RuleSpec
from ..plan.structs import RATES
from ..plan.traffic import Traffic, traffic
from ..schedules import Schedule
from ..schedules.adaptive import AdaptiveSchedule
from .averaging import Average, swapped
from .exact import checked_values, exact_values, set_values
from .groups import check_common, complete_groups, make_hyper, tensors_of, unique_params
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
    param_rounding: str
    state_dtype: torch.dtype
    rounding_seed: int
    max_grad_norm: float | None
    nonfinite: str
    unscale_grads: bool
    average: Average | None
    backend: str
    telemetry: bool | str
    process_group: Any
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool


def _kept_in_session(name: str, doc: str, *, resets: bool = False) -> Any:
    """Return a property that reads and writes an attribute of the session.

    Args:
        name: Name of the attribute.
        doc: Docstring of the property.
        resets: Whether the plan must be built again after a change.
    """

    def read(self: FusedOptimizer) -> Any:
        return getattr(self.session, name)

    def write(self: FusedOptimizer, value: Any) -> None:
        setattr(self.session, name, value)
        if resets:
            self.session.reset()

    return property(read, write, doc=doc)


class FusedOptimizer(Optimizer):
    """Base class of all optimizers.

    Args:
        params: Parameters or parameter groups, as for ``torch.optim``; float32, float64, bfloat16 or float16
            tensors of any shape, dense or strided, on one device.
        defaults: Hyper-parameters of the rule.
        schedule: Multiplier of ``lr`` over the steps; may be set per group. None is the constant 1. An
            ``AutoWU`` is fed by ``record_loss``.
        weight_decay_schedule: Multiplier of ``weight_decay`` over the steps; may be set per group.
        projection: ``"sphere"`` keeps the joint L2 norm of the group's parameters constant by rescaling them
            after each update; ``lr`` is then the effective learning rate and ``weight_decay`` must be 0. See
            docs/large_lr.md. May be set per group. Source: Sadrtdinov et al. 2024, arXiv:2410.22113.
        radius: Norm to keep, > 0. The first step rescales the group to it; that step still uses the old norm
            to convert ``lr``. None keeps the norm of the group at its first step or at ``init_state()``. May
            be set per group. ``param_groups[i]["norm"]`` is the norm in force, a 0-dim float64 tensor.
        param_rounding: How bfloat16 and float16 parameters are rounded after an update; others are not.
            ``"nearest"`` loses updates below half of the last digit. ``"stochastic"`` rounds up with the
            probability of what is dropped. ``"kahan"`` keeps a bfloat16 compensation, ``"split"`` the 16 low
            bits of the float32 value beside a bfloat16 parameter, ``"master"`` the float32 value. See
            docs/sixteen_bits.md. May be set per group.
        state_dtype: Dtype of the states: ``torch.float32``, which is float64 beside float64 parameters, or
            ``torch.bfloat16``, not beside those. bfloat16 states are rounded stochastically, so that a second
            moment decays as it should; averages stay float32. May be set per group.
        rounding_seed: Seed of the random bits of ``"stochastic"``, ``"kahan"`` and bfloat16 states, in
            [0, 2**64). The bits depend on it, on the number of the step, on the position of the parameter and
            on that of the element. May be set per group.
        max_grad_norm: Clip the gradients of all groups together to this L2 norm, > 0, as
            ``torch.nn.utils.clip_grad_norm_`` does, without changing ``.grad``. None, 0 and infinity do not
            clip.
        nonfinite: ``"propagate"`` lets NaN and infinity through as torch does; ``"skip"`` leaves parameters,
            states, averages and the step count as they were when any gradient element is not finite.
        unscale_grads: Whether ``.grad`` is divided by the scale of a ``torch.amp.GradScaler`` after
            ``scaler.step(opt)``, as torch's optimizers do. False leaves it multiplied, because unscaling
            costs a write of every gradient that the step does not need. Telemetry
            has the norms of the unscaled gradients either way.
        average: ``EMA`` or ``SWA`` of the parameters, written by the update itself.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.
        telemetry: Record a row per step on the device. The last 16,384 rows are kept, 1.2 MB, and state dicts
            hold the last 1,024; ``"all"`` keeps all in both, 72 bytes each.
        process_group: Processes that hold other parts of the tensors in ``params``, which are plain ones: the
            group of an FSDP1 module, or of shards made by hand, the k-th of which are parts of one tensor.
            Norms and sums are then those of all parts. DTensors (FSDP2, tensor parallelism) and ZeRO need
            none. Not part of a pickle: set the attribute again.
        foreach: Accepted and ignored, so that a swap-in needs one changed word.
        fused: Accepted and ignored.
        capturable: Accepted and ignored.
        differentiable: Must be False.

    Raises:
        ValueError: If an argument is out of range; it is named with the condition and the value.
        TypeError: If an argument has a wrong type or is unknown.
    """

    spec: ClassVar[RuleSpec]
    # hyper-parameters that a state dict cannot change, because they define the class
    fixed: ClassVar[Mapping[str, Any]] = {}
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
        param_rounding: str = "nearest",
        state_dtype: torch.dtype = torch.float32,
        rounding_seed: int = 0,
        max_grad_norm: float | None = None,
        nonfinite: str = "propagate",
        unscale_grads: bool = False,
        average: Average | None = None,
        backend: str = "auto",
        telemetry: bool | str = True,
        process_group: Any = None,
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
        if not isinstance(getattr(type(self), "spec", None), RuleSpec):
            raise TypeError(f"{name}: a subclass of FusedOptimizer must declare spec, a RuleSpec.")
        self._session = Session(name, self.spec)
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.unscale_grads = check.flag(name, "unscale_grads", unscale_grads)
        self.backend = backend
        self.average = average
        if telemetry != "all":
            telemetry = check.flag(name, "telemetry", telemetry)
        self.telemetry = Telemetry(bool(telemetry), keep_all=telemetry == "all")
        self._session.check_settings()
        # before params, which may be a generator, are touched
        self.spec.hyper(name, {**defaults, "lr": 0.0} if defaults["lr"] is required else defaults)
        zero = zero_group()
        self._session.split = zero is not None
        self._session.set_process_group(zero if process_group is None else process_group)
        # options of the whole optimizer, which a group may repeat but not change
        self._common = {
            "max_grad_norm": max_grad_norm,
            "nonfinite": nonfinite,
            "unscale_grads": unscale_grads,
            "average": average,
            "backend": backend,
            "telemetry": telemetry,
        }
        group_options = {
            "schedule": schedule,
            "weight_decay_schedule": weight_decay_schedule,
            "projection": projection,
            "radius": radius,
            "param_rounding": param_rounding,
            "state_dtype": state_dtype,
            "rounding_seed": rounding_seed,
        }
        ignored = {"foreach": foreach, "capturable": capturable, "differentiable": False, "fused": fused}
        # flattened checkpoints of torch load those entries alone that a group has already
        merged = {**defaults, **group_options, **ignored, "updates": None}
        self._session.bind(name, self.spec, merged)
        super().__init__(params, merged)
        self._session.track_states()

    # values of the session, under the names that users know

    @property
    def session(self) -> Session:
        """Mutable state of the optimizer, for the tools of this package rather than for training loops."""
        return self._session

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State by parameter, as torch keeps it.

        Its tensors may be replaced or moved. Steps compare them as long as somebody holds one, or the
        dictionary of a parameter, which takes about a quarter of a microsecond per parameter.
        """
        return self._session.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._session.state = state
        self._session.reset()

    @property
    def max_grad_norm(self) -> float | None:
        """L2 norm to which the gradients of all groups together are clipped, or None."""
        return self._session.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        # 0 and infinity are usual ways to ask for no clipping
        plain = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool)
        unclipped = plain and max_grad_norm in (0, math.inf)
        self._session.max_grad_norm = None if unclipped else max_grad_norm

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

    param_groups: list[dict[str, Any]] = _kept_in_session(
        "param_groups", "Parameter groups, as torch keeps them; the list may be replaced.", resets=True
    )
    nonfinite: str = _kept_in_session(
        "nonfinite", "Policy for gradients that are not finite: ``propagate`` or ``skip``."
    )
    unscale_grads: bool = _kept_in_session(
        "unscale_grads", "Whether ``.grad`` is divided by the scale of a ``GradScaler`` after the update."
    )
    average: Average | None = _kept_in_session("average", "``EMA`` or ``SWA`` of the parameters, or None.")
    telemetry: Telemetry = _kept_in_session("telemetry", "Record of the steps.", resets=True)

    @property
    def process_group(self) -> Any:
        """Process group that plain parameters are spread over, or None; not part of a pickle."""
        return self._session.process_group

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        self._session.set_process_group(process_group)
        self._session.reset()

    # hooks

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``step`` with hooks as torch's method does, and with its range in the traces of profilers.

        To enter and leave the range takes as long as the rest of a step of a few tensors, and is left out
        where no profiler of torch runs.
        """
        hooked = Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            plain = not (profiler._is_profiler_enabled or self._has_step_hooks())
            return func(self, *args, **kwargs) if plain else hooked(self, *args, **kwargs)

        return step

    def _has_step_hooks(self) -> bool:
        """Return whether anything is to be called before or after a step."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
        )

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, or to zeros, as ``torch.optim.Optimizer.zero_grad`` does.

        Args:
            set_to_none: Whether to let the gradients go, rather than to fill them with zeros in place.
        """
        # its range in the traces of profilers takes longer than a few gradients
        if not set_to_none or profiler._is_profiler_enabled:
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad = None

    # groups

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
            check_common(name, self._common, param_group)
            merged = {**self.defaults, **param_group}
            if merged["lr"] is required:
                check.fail(name, "lr", "be given for each group or for all", "none")
            hyper = make_hyper(name, self.spec, merged)
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else params
            if not isinstance(params, set):
                params = unique_params(name, list(params))
                self._session.check_params(tensors_of(params), hyper)
            param_group["params"] = params
            # the norm may come from another optimizer that had the group; this one measures its own
            param_group.pop("norm", None)
        super().add_param_group(param_group)
        self._session.reset()

    # the step

    # addresses mean nothing while a compiler traces; unlike torch.compiler.disable, this imports none
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run one step: norm, clipping, schedules, update and average, without waiting for the device.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward()`` and returns the loss.

        Returns:
            The result of the closure, or None.

        Raises:
            RuntimeError: If called inside ``averaged_parameters``, or while a graph is captured that could
                not be replayed: states or groups that are new, hyper-parameters that changed; if the device
                fails. The step is not counted then, and the message says whether any of its kernels was
                queued.
            TypeError: If a parameter or gradient is of a kind that no backend takes.
            ValueError: If a parameter, gradient, state or hyper-parameter does not fit. Nothing is changed
                then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        session = self._session
        self._refuse_swapped("step()")
        may_probe = not session.state and self._is_at_rest()
        plan, backend = self._prepare()
        if may_probe and plan.has_zero_gradients():
            # a wrapper that probes for the states rather than a step
            self.init_state()
            return loss
        if session.fresh_norms:
            session.measure_norms(plan)
        value = None if loss is None else reported_loss(loss)
        if value is not None:
            if session.adaptive:
                session.load_kernels(plan, backend)
            self.record_loss(value)
        capturing = plan.buffers.mirrored and is_capturing(plan.device)
        try:
            if capturing:
                with plan.captured_arguments(backend.max_captured_pointers):
                    backend.step(plan)
            else:
                if plan.gradients.is_stale and len(plan.rows) > backend.max_inline_pointers:
                    plan.gradients.upload()
                backend.step(plan)
        except Exception:
            plan.release()
            raise
        if not capturing and plan.gradients.is_stale:
            plan.gradients.note_upload()
        session.last_rates = plan.groups.rates
        if session.unscale_grads:
            plan.gradients.unscale(plan.scaling[0])
        changed = plan.finish()
        if capturing:
            session.keep_captured(plan)
        else:
            session.telemetry.advance()
        if changed:
            torch.autograd.graph.increment_version(changed)
        if session.adaptive:
            session.warn_unfed()
        return loss

    def _prepare(self, *, every: bool = False) -> tuple[Plan, Backend]:
        """Return the plan of this step and the backend, with what a ``GradScaler`` set around ``step``."""
        scaling = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return self._session.prepare(*scaling, every=every)

    def init_state(self) -> None:
        """Allocate the states of all parameters now, and the table on the device.

        ``step()`` would do so when a parameter gets its first gradient, which it must not do while a CUDA
        graph is captured. Gradients that are there already tell the dtypes of those that a graph will write.

        Raises:
            TypeError: If a parameter or gradient is of a kind that no backend takes.
            ValueError: If a parameter, gradient or hyper-parameter does not fit.
        """
        self._session.reset()
        plan, backend = self._prepare(every=True)
        self._session.measure_norms(plan)
        plan.gradients.upload()
        backend.prepare(plan)
        plan.release()

    def _is_at_rest(self) -> bool:
        """Return whether all learning rates are 0, which are numbers on the host."""
        return all(float(group["lr"]) == 0.0 for group in self.param_groups)

    def update_captured(self) -> None:
        """Let captured graphs see hyper-parameters that changed since the capture.

        Schedules, step counts and averages move on the device by themselves; ``param_groups`` are read on
        the host, which a replay does not pass through. ``load_state_dict`` calls this.

        Raises:
            RuntimeError: If the graph captured last cannot follow a change: of the groups, of their states
                (``amsgrad``, ``momentum``) or ``projection``, of ``max_grad_norm``, ``nonfinite`` or
                ``average``.
        """
        if not self._session.update_captured():
            raise RuntimeError(self._describe_other_capture("update_captured()"))

    def _describe_other_capture(self, caller: str) -> str:
        """Return what is wrong where a captured graph goes on with other options than the optimizer."""
        return (
            f"{type(self).__name__}: {caller} must find the groups, states, projection, max_grad_norm, "
            "nonfinite and average of the graph captured last, got others. Its replays go on with those of "
            "the capture; capture it again."
        )

    def traffic(self) -> Traffic:
        """Return launches and bytes of the next step for the gradients in ``.grad``; nothing is run."""
        plan, _ = self._prepare()
        plan.release()
        return traffic(plan)

    def record_loss(self, loss: Tensor | float) -> None:
        """Record a loss in the telemetry row of the next step, without waiting for the device.

        The loss also goes to an ``AutoWU``, which waits once per epoch of its warmup.

        Args:
            loss: 0-dim tensor or number. ``step(closure)`` records what the closure returned: the mean of a
                tensor with several elements, and nothing where it is no number.

        Raises:
            ValueError: If a tensor has more than one element.
            TypeError: If it is neither a tensor nor a number.
            RuntimeError: If an ``AutoWU`` is fed from elsewhere, or while a graph is captured.
        """
        loss = checked_loss(type(self).__name__, "loss", loss)
        self._session.unfed_steps = -1
        self._session.feed(loss)
        self._session.record("loss", loss)

    def record_sharpness(self, sharpness: Tensor | float) -> None:
        """Record a sharpness in the telemetry row of the next step, without waiting for the device.

        Args:
            sharpness: 0-dim tensor or number. A ``SharpnessProbe`` calls this.

        Raises:
            ValueError: If a tensor has more than one element.
        """
        self._session.record("sharpness", checked_loss(type(self).__name__, "sharpness", sharpness))

    def get_last_lr(self) -> list[float]:
        """Return the learning rate applied at the last step, one per group; waits for the device."""
        rates = self._session.last_rates
        if rates is None:
            return [float(group["lr"]) for group in self.param_groups]
        return [float(lr) for lr in rates[:, RATES.index("lr")].tolist()]

    @contextmanager
    def averaged_parameters(self, model: torch.nn.Module | None = None) -> Iterator[None]:
        """Swap the averages in for the block, and restore the parameters exactly, even after an exception.

        Buffers are not averaged: call ``torch.optim.swa_utils.update_bn`` inside the block for batch norms.

        Args:
            model: The model, which sharded parameters need: its modules drop what they have gathered, on
                entry and on exit.

        Raises:
            RuntimeError: If the optimizer keeps no average, or the averages are in place already.
            ValueError: If a parameter is sharded and ``model`` is not given or does not have it.
        """
        if self.average is None:
            raise RuntimeError(
                f"{type(self).__name__}: averaged_parameters() must have average= set, got None."
            )
        session = self._session
        if session.swapped:
            raise RuntimeError(f"{type(self).__name__}: averaged_parameters() must not be nested.")
        if model is not None:
            reshard(model)
        self._check_shards(model)
        session.swapped = True
        try:
            with swapped(session.average_pairs()):
                yield
        finally:
            session.swapped = False
            if model is not None:
                reshard(model)

    def exact_parameters(self) -> list[Tensor]:
        """Return copies of the parameters in float32, with what ``param_rounding`` keeps beside 16-bit ones.

        Those of ``"split"`` and ``"master"`` are the values that the updates compute with, bit for bit; those
        of ``"kahan"`` are within the last digit of its compensation. float64 parameters stay float64.

        Returns:
            One tensor for each parameter, in the order of the groups, of its shape and on its device.
        """
        self._refuse_swapped("exact_parameters()")
        with torch.no_grad():
            return exact_values(self._session)

    def set_exact_parameters(self, values: Iterable[Tensor]) -> None:
        """Set the parameters to float32 values, and keep what 16-bit ones lack as ``param_rounding`` does.

        Call it after the model has loaded a float32 checkpoint, which rounds 16-bit parameters to nearest.
        Allocates the states of all parameters.

        Args:
            values: One tensor for each parameter, in the order of the groups, of its shape.

        Raises:
            TypeError: If one is no tensor of real numbers.
            ValueError: If there are not as many as parameters, or one has another shape. Nothing is changed
                then.
        """
        self._refuse_swapped("set_exact_parameters()")
        checked = checked_values(self._session, values)
        self.init_state()
        with torch.no_grad():
            set_values(self._session, checked)

    def _refuse_swapped(self, caller: str) -> None:
        """Raise if the averages are in the place of the parameters."""
        if self._session.swapped:
            raise RuntimeError(
                f"{type(self).__name__}: {caller} must not be called inside averaged_parameters()."
            )

    def _check_shards(self, model: torch.nn.Module | None) -> None:
        """Raise for a sharded parameter that the model does not have."""
        known = set(map(id, () if model is None else model.parameters()))
        for i, param in enumerate(self._session.params):
            if is_shard(param) and id(param) not in known:
                got = "none" if model is None else "another"
                raise ValueError(
                    f"{type(self).__name__}: averaged_parameters(model) must get the model that has the "
                    f"sharded parameter {i} (shape {tuple(param.shape)}), got {got}. Its modules would go on "
                    "with what they have gathered."
                )

    # state

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's format, tensors and plain types only.

        ``state`` and ``param_groups`` load into the ``torch.optim`` optimizer of the same name. A schedule is
        one line of JSON there, which ``schedules.from_json`` reads unless it is adaptive, and ``updates`` the
        number of updates. The entry ``fused_warmup`` holds exact counts and telemetry besides;
        ``torch.distributed.checkpoint`` drops it. As in torch, dictionaries and tensors are those
        of the optimizer and follow its later steps; make a deep copy to keep one of the past in memory.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        packed = pack_state(self._session)
        for hook in self._optimizer_state_dict_post_hooks.values():
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
            state_dict: Result of ``state_dict``, of this class or of the ``torch.optim`` class.

        Raises:
            ValueError: If it is of another optimizer, version, or shape; nothing is changed then.
            TypeError: If a state is no tensor of real numbers.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        load_state(self._session, self.fixed, state_dict)
        if not self._session.update_captured():
            warnings.warn(self._describe_other_capture("load_state_dict"), stacklevel=2)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and deepcopy: all but the plan and hooks."""
        own = {name: self.__dict__[name] for name in ("_common", "_session")}
        return {"defaults": self.defaults, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled optimizer, or states and groups that torch's ``load_state_dict`` has read.

        The next step builds the plan, and checks and converts the states.
        """
        kept = dict(state)
        loaded = {key: kept.pop(key) for key in ("state", "param_groups") if key in kept}
        super().__setstate__(kept)
        session = self._session
        session.bind(type(self).__name__, self.spec, self.defaults)
        for held, group in zip(self.param_groups, loaded.get("param_groups", ()), strict=False):
            session.adaptive[id(group)] = held.get("schedule")
        for key, value in loaded.items():
            setattr(self, key, value)
        session.track_states()
        complete_groups(self.param_groups, self.defaults)
        for group in self.param_groups if loaded else ():
            group.update(self.fixed)

    def __repr__(self) -> str:
        """Return the class, the backend in use, the options and the groups."""
        resolved = "not resolved yet" if self._session.backend is None else self._session.backend.name
        options = (
            f"backend: {self.backend} ({resolved}), max_grad_norm: {self.max_grad_norm}, "
            f"nonfinite: {self.nonfinite}, average: {self.average}"
        )
        lines = [f"{type(self).__name__} ({options}"]
        for i, group in enumerate(self.param_groups):
            lines += [*([""] if i else []), f"Parameter Group {i}"]
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key != "params"]
        return "\n".join([*lines, ")"])
