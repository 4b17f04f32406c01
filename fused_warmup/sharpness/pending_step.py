"""Inspect the next step of an optimizer (states, learning rates, direction) without taking it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .. import _checks as check
from ..backends.base import VectorBackend
from ..optim.adam import Adam
from ..optim.base import FusedOptimizer
from ..optim.groups import make_hyper
from ..optim.radam import RAdam
from ..optim.sgd import SGD
from ..plan.hyper import Hyper
from ..plan.plan import Plan
from ..plan.residues import Residue, residue_of, value_of
from ..plan.spec import RuleSpec
from ..plan.tensors import compute_dtype, local_tensor
from ..plan.tracked_states import peek
from ..plan.vector_tables import PreconditionerTable
from ..reference.rules import (
    RULES,
    Rule,
    Scalars,
    clip_coefficient,
    common_scalars,
    inverse_preconditioner,
    start_exp_avg_sq,
)
from .hvp import Hessian
from .shards import Shards
from .vectors import FusedVectors, Vectors, dot

_TORCH: dict[type[torch.optim.Optimizer], type[FusedOptimizer]] = {
    torch.optim.Adam: Adam,
    torch.optim.AdamW: Adam,
    torch.optim.RAdam: RAdam,
    torch.optim.SGD: SGD,
}
_KNOWN: tuple[type, ...] = (FusedOptimizer, *_TORCH)
# where wrappers keep the optimizer that they wrap
_WRAPPED = ("optimizer", "optim", "base_optimizer", "inner_optimizer", "original_optimizer")


@dataclass
class ParamState:
    """State of one parameter in the next step.

    Attributes:
        param: The part of the parameter in this process, as it is stored.
        residue: Its residue, or None.
        spec: Its update rule.
        hyper: Validated hyper-parameters of its group.
        states: States of the rule, zeros before the first step; not copies.
        step: Number of the update, from 1.
        initialized: Whether the second moment was prepared before the first step.
        lr: Learning rate in force, schedule included.
        weight_decay: Weight decay in force, schedule included.
    """

    param: Tensor
    residue: Residue | None
    spec: RuleSpec
    hyper: Hyper
    states: list[Tensor]
    step: int
    initialized: bool
    lr: float
    weight_decay: float

    @property
    def threshold(self) -> float:
        """Largest stable ``lr * eigenvalue`` late in training."""
        return self.spec.stability_threshold(self.hyper)

    @property
    def early_threshold(self) -> float:
        """Largest stable ``lr * eigenvalue`` at the first step."""
        return self.spec.early_stability_threshold(self.hyper)

    @property
    def rule(self) -> type[Rule]:
        """The update rule, which needs no sums over layers."""
        return RULES[self.spec.name]

    @property
    def coupled_decay(self) -> float:
        """L2 penalty, which adds to the Hessian."""
        return 0.0 if self.hyper.decoupled else self.weight_decay


class PendingStep:
    """Parameters, states and rates of the next step of an optimizer.

    Args:
        owner: Name of the caller, for messages.
        optimizer: One of ours, or ``Adam``, ``AdamW``, ``RAdam`` or ``SGD`` of torch.
        use_grad: Use the gradients in ``.grad``, and leave out parameters without one.

    Raises:
        TypeError: If the rule of the optimizer is not known, or it is a wrapper of one.
        ValueError: If some groups ascend and others descend, no parameter takes part, or one is kept on a
            sphere.

    Attributes:
        optimizer: The optimizer itself, where a wrapper passes for one.
        params: The parameters.
        shards: Their parts in this process.
        residues: Residues of those parts, None for a part that is stored exactly.
        grads: The parts of their gradients in this process, or None if the closure must give them.
        spec: The update rule.
        hypers: Hyper-parameters of each parameter's group.
        made: Updates that the optimizer has made, a copy of its 0-dim int64, or an int.
        sign: -1 if the optimizer ascends.
    """

    def __init__(self, owner: str, optimizer: torch.optim.Optimizer, use_grad: bool = True) -> None:
        optimizer = _unwrapped(owner, optimizer)
        self.owner, self.optimizer = owner, optimizer
        ours = optimizer if isinstance(optimizer, FusedOptimizer) else None
        every = [(g, p) for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
        with_grad = [(g, p) for g, p in every if p.grad is not None] if use_grad else []
        chosen = with_grad or every
        if not chosen:
            check.fail(owner, "optimizer", "have parameters that require a gradient", optimizer)
        session = None if ours is None else ours.session
        self._state: Mapping[Tensor, Any] = optimizer.state
        counters = None if session is None else session.counters
        self.spec = _spec_of(owner, optimizer)
        self._by_group = {id(g): _hyper_of(owner, self.spec, optimizer, g) for g in optimizer.param_groups}
        self._chosen = chosen
        self.params = [p for _, p in chosen]
        self.made: Tensor | int = 0 if counters is None else counters[0].clone()
        if ours is None:
            self.made = max(_counts(0, [self._state.get(p, {}) for p in self.params])[1]) - 1
        self.shards = Shards(owner, self.params)
        group = None if session is None else session.process_group
        if group is not None and torch.distributed.get_world_size(group) > 1:
            hint = "Shard with fully_shard (FSDP2)."
            check.fail(owner, "process_group", "be None where an optimizer is measured", "a group", hint)
        self.grads: list[Tensor] | None = None
        if with_grad:
            self.grads = [self.shards.part_of(i, p.grad.detach()) for i, (_, p) in enumerate(with_grad)]
        self.hypers = [self._by_group[id(g)] for g, _ in chosen]
        self.residues = [
            residue_of(peek(self._state, p), hyper.param_rounding, local)
            for p, local, hyper in zip(self.params, self.shards.locals, self.hypers, strict=True)
        ]
        if any(hyper.sphere for hyper in self.hypers):
            hint = "The line search leaves the sphere."
            check.fail(owner, "projection", "be None in groups that are measured", "sphere", hint)
        signs = {-1.0 if hyper.maximize else 1.0 for hyper in self.hypers}
        if len(signs) > 1:
            check.fail(owner, "maximize", "be the same for all groups", sorted(signs))
        self.sign = signs.pop()
        self._max_grad_norm = None if session is None else session.max_grad_norm
        self._init_norm_sq = 0.0 if session is None else session.init_norm_sq

    @functools.cached_property
    def members(self) -> list[ParamState]:
        """State of each parameter; reading the step counts waits for the device."""
        t, steps = _counts(self.made, [self._state.get(p, {}) for p in self.params])
        return [
            _param_state(self.spec, p, residue, self._by_group[id(g)], g, self._state.get(p, {}), step, t)
            for (g, p), residue, step in zip(self._chosen, self.residues, steps, strict=True)
        ]

    def preconditioner(self, vectors: Vectors) -> Preconditioner | None:
        """Compute the preconditioner by the kernels of the optimizer's backend; nothing waits.

        None before the first step, for an optimizer of torch, and with gradients of a closure.
        """
        optimizer = self.optimizer
        if not (isinstance(optimizer, FusedOptimizer) and isinstance(vectors, FusedVectors) and self.grads):
            return None
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        prepared = optimizer.session.plan_ahead()
        for param in self.params:
            param.grad = None
        if prepared is None:
            return None
        plan, backend = prepared
        try:
            return (
                _preconditioner(self, plan, backend, vectors) if isinstance(backend, VectorBackend) else None
            )
        finally:
            plan.release()

    @property
    def lr(self) -> float:
        """Learning rate of the first group that takes part, in force at the next step."""
        return self.members[0].lr

    @property
    def backend(self) -> str:
        """Name of the backend that the optimizer asked for."""
        return self.optimizer.backend if isinstance(self.optimizer, FusedOptimizer) else "auto"

    def grads_of(self, hessian: Hessian) -> list[Tensor]:
        """Return the gradients in ``.grad``, or those of the closure; zeros for parameters without one."""
        if self.grads is not None:
            return self.grads
        found = zip(hessian.gradient(), self.params, strict=True)
        return [torch.zeros_like(local_tensor(p)) if g is None else g for g, p in found]

    def ratios(self) -> list[float]:
        """Return the learning rate of each parameter over ``lr``; by ``param_groups`` while ``lr`` is 0."""
        rates = [m.lr for m in self.members] if self.lr > 0.0 else [m.hyper.lr for m in self.members]
        return [rate / rates[0] if rates[0] > 0.0 else 1.0 for rate in rates]

    def inverse_preconditioners(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Return the diagonal of ``1 / P`` for each parameter, such that the update is ``lr * m / P``.

        ``P = (1 - beta1**t) (sqrt(v / (1 - beta2**t)) + eps)`` for Adam, with this step's gradient in ``v``.

        Args:
            grads: Gradients of the loss.

        Returns:
            Tensors in the shapes of the parameters; ones for SGD.

        Source: Kalra & Barkeshli 2024, arXiv:2406.09405, equation 6 with the square root of the authors'
            code.
        """
        return self._inverses(grads, self._clipping(grads))

    def directions(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Return the update per unit of the first group's learning rate: ``param - lr * direction``.

        Args:
            grads: Gradients of the loss.

        Returns:
            Tensors in the shapes of the parameters; decoupled decay is in them.
        """
        return self._updates(grads, self.ratios(), self._clipping(grads))

    def updates_and_inverses(self, grads: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the step subtracts from each parameter before rounding, and ``1 / P`` as above.

        Args:
            grads: Gradients of the loss, whose norm is computed once.

        Returns:
            Tensors in the shapes of the parameters.
        """
        clipping = self._clipping(grads)
        updates = self._updates(grads, [m.lr for m in self.members], clipping)
        return updates, self._inverses(grads, clipping)

    def _updates(
        self, grads: Sequence[Tensor], rates: Sequence[float], clipping: tuple[float, float]
    ) -> list[Tensor]:
        return [
            self._moved(m, g, self._scalars(m, rate, *clipping))
            for m, g, rate in zip(self.members, grads, rates, strict=True)
        ]

    def _inverses(self, grads: Sequence[Tensor], clipping: tuple[float, float]) -> list[Tensor]:
        return [
            self._inverse_preconditioner(m, g, self._scalars(m, 1.0, *clipping))
            for m, g in zip(self.members, grads, strict=True)
        ]

    def _clipping(self, grads: Sequence[Tensor]) -> tuple[float, float]:
        """Return the clip coefficient, and the norm of all gradients after clipping; waits for the device."""
        # in double before they are squared, which 16 bits would round
        norm = float(self.shards.total([dot(g.double(), g.double()) for g in grads]).sqrt())
        clip_coef = 1.0
        if self._max_grad_norm is not None:
            clip_coef = clip_coefficient(norm, self._max_grad_norm)
        return clip_coef, norm * clip_coef

    def _scalars(self, m: ParamState, effective_lr: float, clip_coef: float, grad_norm: float) -> Scalars:
        """Return the scalars of the update of a parameter at learning rate ``effective_lr``."""
        first = m.step == 1 and not m.initialized
        if first and m.hyper.init == "random" and not self._init_norm_sq:
            raise RuntimeError(f"{self.owner}: the optimizer must have drawn its states: call init_state().")
        s = common_scalars(m.hyper, effective_lr, m.weight_decay, clip_coef)
        m.rule.scalars(m.hyper, effective_lr, m.step, s)
        start_exp_avg_sq(m.hyper, m.step, m.initialized, grad_norm, self._init_norm_sq, s)
        return s

    @torch.no_grad()
    def _moved(self, m: ParamState, grad: Tensor, s: Scalars) -> Tensor:
        """Return the update of a parameter, computed in double precision."""
        param, grad, states = _doubles(m, grad)
        moved, _ = m.rule.update(param, grad, states, s)
        return (param - moved).to(compute_dtype(m.param.dtype))

    @torch.no_grad()
    def _inverse_preconditioner(self, m: ParamState, grad: Tensor, s: Scalars) -> Tensor:
        """Return the update that a first moment of ones would give, which is ``1 / P``."""
        param, grad, states = _doubles(m, grad)
        return inverse_preconditioner(m.rule, param, grad, states, s).to(compute_dtype(m.param.dtype))


def _doubles(m: ParamState, grad: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the value of the parameter, gradient and states in double precision."""
    states = [state.to(torch.float64) for state in m.states]
    return value_of(m.param.detach(), m.residue).to(torch.float64), grad.to(torch.float64), states


@dataclass
class Preconditioner:
    """Diagonal preconditioner of the next step on the device, computed by the optimizer's kernels.

    Attributes:
        scale: ``P**-1/2``, ``[n]``, or None for the identity.
        scaled: The same with the square root of ``lr / threshold``, or None where that is the same for all.
        factor: ``lr / threshold`` of the first parameter, 0-dim float64.
        decays: L2 penalty of each parameter, 0-dim float64 each; empty without any.
    """

    scale: Tensor | None
    scaled: Tensor | None
    factor: Tensor
    decays: list[Tensor]


def _preconditioner(
    pending: PendingStep, plan: Plan, backend: VectorBackend, vectors: FusedVectors
) -> Preconditioner | None:
    """Run the kernels on a plan that is ready for the step."""
    assert pending.grads is not None
    spec, hypers = pending.spec, pending.hypers
    thresholds = [spec.stability_threshold(h) for h in hypers]
    ratios = {(h.lr / limit, h.schedule) for h, limit in zip(hypers, thresholds, strict=True)}
    scale = vectors.basis(1)[0] if spec.is_preconditioned else None
    scaled = vectors.basis(1)[0] if len(ratios) > 1 else None
    l2_sq = vectors.number(0.0)
    if plan.settings.measure:
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=vectors.dtype) for g in pending.grads])
        l2_sq = norms.to(torch.float64).square().sum()
    table = PreconditionerTable(plan, pending.params, vectors.offsets, thresholds, l2_sq, scale, scaled)
    if not backend.preconditioner(plan, table):
        return None
    groups = {id(row.param): row.group for row in plan.rows}
    rates = [table.rates[groups[id(p)]] for p in pending.params]
    decays = [rate[1] for rate in rates] if any(h.weight_decay and not h.decoupled for h in hypers) else []
    decays = [d * 0.0 if h.decoupled else d for d, h in zip(decays, hypers, strict=False)]
    return Preconditioner(scale, scaled, rates[0][0] / thresholds[0], decays)


def _counts(made: Tensor | int, states: Sequence[Mapping[str, Any]]) -> tuple[int, list[int]]:
    """Return the optimizer's count and those of the parameters, read from the device at once."""
    found = [made, *(_step_of(state) for state in states)]
    tensors = [c.to(torch.int64) for c in found if isinstance(c, Tensor)]
    device = next((c.device for c in tensors if c.device.type != "cpu"), torch.device("cpu"))
    read = iter(torch.stack([c.to(device) for c in tensors]).tolist() if tensors else ())
    t, *steps = [next(read) if isinstance(c, Tensor) else c for c in found]
    return t, [step + 1 for step in steps]


def _step_of(state: Mapping[str, Any]) -> Tensor | int:
    """Return the number of updates of a parameter; torch's SGD keeps a buffer, but no count."""
    step: Tensor | int = state.get("step", 1 if state.get("momentum_buffer") is not None else 0)
    return step if isinstance(step, Tensor) else int(step)


def _unwrapped(owner: str, optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer itself, also for a wrapper whose class derives from that of the optimizer.

    Raises:
        TypeError: If it is another wrapper, or no optimizer.
    """
    path, inner = _inner(optimizer)
    if isinstance(optimizer, _KNOWN):
        # such a wrapper forwards attributes, or has copies of them that go stale
        passes = isinstance(optimizer, type(inner)) and _params(optimizer) == _params(inner)
        return _unwrapped(owner, inner) if passes else cast(torch.optim.Optimizer, optimizer)
    kind = type(optimizer).__name__
    if inner is None and isinstance(optimizer, torch.optim.Optimizer):
        hint = "Adam, AdamW, GIAdam, RAdam and SGD are, of this package or of torch."
        check.fail(owner, "optimizer", "be one whose rule is known", kind, hint, TypeError)
    hint = f" Pass its attribute {path}." if path else ""
    raise TypeError(f"{owner}: optimizer must be a fused_warmup optimizer, got {kind}.{hint}")


def _inner(wrapper: Any, depth: int = 3) -> tuple[str, Any]:
    """Return the path of attributes from a wrapper to an optimizer of a known rule, and that optimizer."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys((*_WRAPPED, *getattr(wrapper, "__dict__", ()))):
        # properties of an unknown object may raise anything
        with contextlib.suppress(Exception):
            found[name] = getattr(wrapper, name)
    for name, value in found.items():
        if isinstance(value, _KNOWN) and value is not wrapper:
            return f".{name}", value
    for name in _WRAPPED if depth else ():
        path, inner = _inner(found.get(name), depth - 1)
        if inner is not None:
            return f".{name}{path}", inner
    return "", None


def _params(optimizer: torch.optim.Optimizer) -> list[int]:
    """Return the identities of the parameters."""
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def _spec_of(owner: str, optimizer: torch.optim.Optimizer) -> RuleSpec:
    """Return the spec of the update rule of an optimizer.

    Raises:
        TypeError: If the rule does not state what a measurement needs.
    """
    ours = type(optimizer) if isinstance(optimizer, FusedOptimizer) else _counterpart(optimizer)
    if not ours.spec.is_measurable:
        check.fail(owner, "optimizer", "have a known rule", ours.spec.name, error=TypeError)
    return ours.spec


def _counterpart(optimizer: torch.optim.Optimizer) -> type[FusedOptimizer]:
    """Return the class of this package that has the rule of an optimizer of torch."""
    return next(ours for kind, ours in _TORCH.items() if isinstance(optimizer, kind))


def _hyper_of(owner: str, spec: RuleSpec, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Hyper:
    """Return the hyper-parameters of a group; those that torch does not have are at their defaults."""
    if isinstance(optimizer, FusedOptimizer):
        return make_hyper(owner, spec, group)
    arguments = inspect.signature(_counterpart(optimizer)).parameters.values()
    defaults = {argument.name: argument.default for argument in arguments}
    decoupled = group.get("decoupled_weight_decay", False) or isinstance(optimizer, torch.optim.AdamW)
    return spec.hyper(owner, {**defaults, **group, "decoupled_weight_decay": decoupled})


def _param_state(
    spec: RuleSpec,
    param: Tensor,
    residue: Residue | None,
    hyper: Hyper,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    step: int,
    t: int,
) -> ParamState:
    """Return the state of a parameter in the next step."""
    states = [state.get(name) for name in spec.state_names(group)]
    local = local_tensor(param)
    zeros = torch.zeros_like(local, dtype=compute_dtype(param.dtype), requires_grad=False)
    lr, weight_decay = hyper.rates_at(t)
    return ParamState(
        param=local,
        residue=residue,
        spec=spec,
        hyper=hyper,
        states=[zeros if s is None else local_tensor(s.detach()) for s in states],
        step=step,
        initialized=bool(state.get("initialized", False)),
        lr=lr,
        weight_decay=weight_decay,
    )
