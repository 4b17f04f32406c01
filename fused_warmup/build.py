"""From an optimizer to its plan: checks of all tensors, and the states that are missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _checks as check
from . import layout
from .backends.base import Backend
from .columns import is_capturing
from .plan import Plan, check_disjoint
from .reference.rules import LAYER_RULES
from .rows import make_row
from .table import COUNTERS, Hyper

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


def build_plan(opt: FusedOptimizer, every: bool) -> tuple[Plan, Backend]:
    """Check all tensors, then allocate missing states and lay out the table.

    Args:
        opt: The optimizer; nothing of it is changed if something is wrong.
        every: Give all parameters a state, also those without a gradient.

    Returns:
        The plan, and the backend that runs it.

    Raises:
        RuntimeError: If a graph is captured, which could not record this.
        TypeError: If a parameter or gradient is of a kind that no backend takes.
        ValueError: If one does not fit.
    """
    name = type(opt).__name__
    if any(is_capturing(p.device) for group in opt.param_groups for p in group["params"][:1]):
        raise RuntimeError(
            f"{name}: states and table must stand before a graph is captured, got parameters, groups, "
            "states or averages that are new or were moved. Call init_state() before the capture, with "
            "the gradients that the graph will write in .grad."
        )
    hypers = [opt._make_hyper(group) for group in opt.param_groups]
    members = [(i, p) for i, group in enumerate(opt.param_groups) for p in group["params"]]
    device: torch.device | None = None
    known: list[tuple[int, int, Tensor, Tensor]] = []
    for index, (g, param) in enumerate(members):
        idle = param.grad is None and "step" not in opt._state.get(param, {})
        # what has no gradient is a part of the norm all the same
        if idle and not ((every or hypers[g].sphere) and param.requires_grad):
            continue
        local = layout.check_param(name, index, param, device)
        device = local.device
        if param.grad is not None:
            layout.check_grad(name, index, local, param.grad)
            layout.check_placement(name, index, param, param.grad)
        if layout.is_sharded(param) and (opt.max_grad_norm is not None or opt.nonfinite == "skip"):
            hint = "A process sees its part of the norm only; clip with torch.nn.utils.clip_grad_norm_."
            value = (opt.max_grad_norm, opt.nonfinite)
            condition = "be (None, 'propagate') beside sharded parameters"
            check.fail(name, "(max_grad_norm, nonfinite)", condition, value, hint)
        if layout.is_sharded(param) and hypers[g].sphere:
            hint = "A process sees its part of the norm only."
            check.fail(name, "projection", "be None beside sharded parameters", "sphere", hint)
        if layout.is_sharded(param) and opt.rule in LAYER_RULES:
            hint = "A process sees its part of a layer only, and this rule needs sums over all of it."
            check.fail(name, f"parameter {index}", "be whole in each process", tuple(param.shape), hint)
        for key in (*opt._state_names(opt.param_groups[g]), "average"):
            state = opt._state.get(param, {}).get(key)
            if isinstance(state, Tensor) and state.shape != param.shape:
                shape = tuple(state.shape)
                check.fail(name, f"parameter {index}", f"keep the shape {shape} of {key}", tuple(param.shape))
        known.append((g, index, param, local))
    check_disjoint(name, [(index, local) for _, index, _, local in known])
    device = device or torch.device("cpu")
    backend = opt._resolve(device)
    if opt._counters is None or opt._counters.device != device:
        fresh = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        opt._counters = fresh if opt._counters is None else fresh.copy_(opt._counters)
    opt.telemetry.allocate(device, opt._counters)
    _allocate(opt, [(g, p, local) for g, _, p, local in known], hypers)
    names = [opt._state_names(group) for group in opt.param_groups]
    averaged, by_channel = opt.average is not None, _by_channel(opt)
    rows = [
        make_row(
            p, local, opt._state[p], names[g], averaged=averaged, group=g, index=index, by_channel=by_channel
        )
        for g, index, p, local in known
    ]
    record = {"counters": opt._counters, "slots": opt.telemetry.slots, "page": opt.telemetry.page}
    groups, state, average = opt.param_groups, opt._state, opt.average
    norms = _norms(opt, hypers, device)
    return Plan(name, opt.rule, rows, groups, state, norms, average, record, device), backend


def _norms(opt: FusedOptimizer, hypers: list[Hyper], device: torch.device) -> list[Tensor | None]:
    """Return where the norms of groups on a sphere are kept; those of new groups are to be measured."""
    opt._fresh_norms = {}
    for g, (group, hyper) in enumerate(zip(opt.param_groups, hypers, strict=True)):
        if not hyper.sphere:
            group.pop("norm", None)
        elif "norm" not in group:
            opt._fresh_norms[g] = torch.zeros((), dtype=torch.float64, device=device)
        elif group["norm"].device != device:
            group["norm"] = group["norm"].to(device)
    return [group.get("norm", opt._fresh_norms.get(g)) for g, group in enumerate(opt.param_groups)]


def _by_channel(opt: FusedOptimizer) -> bool:
    """Whether the rule looks at output channels by themselves."""
    return opt.rule in LAYER_RULES and LAYER_RULES[opt.rule].projects


def _allocate(opt: FusedOptimizer, members: list[tuple[int, Tensor, Tensor]], hypers: list[Hyper]) -> None:
    """Make the states that are missing; new step counts share one buffer."""
    fresh = [param for _, param, _ in members if "step" not in opt._state[param]]
    steps = iter(torch.zeros(len(fresh), dtype=torch.int64, device=fresh[0].device) if fresh else ())
    drawn, by_channel = 0.0, _by_channel(opt)
    for g, param, local in members:
        state, group = opt._state[param], opt.param_groups[g]
        random = "step" not in state and hypers[g].init == "random"
        if "step" not in state:
            state["step"] = next(steps)
        elif "momentum_buffer" in opt._state_names(group) and state.get("momentum_buffer") is None:
            # torch starts a buffer that comes late with the gradient itself, as at a first step
            state["step"].zero_()
        for state_name in opt._state_names(group):
            if not isinstance(state.get(state_name), Tensor):
                state[state_name] = layout.state_like(param, by_channel)
        if opt.average is not None and "average" not in state:
            state["average"] = layout.state_like(param, by_channel).copy_(param)
        for key in (*opt._state_names(group), *(["average"] if opt.average is not None else [])):
            if not layout.fits(state[key], local, by_channel):
                # the parameter got another dtype or layout since
                state[key] = layout.state_like(param, by_channel).copy_(state[key])
        if random:
            # drawn on the host, so that its norm is known without a wait
            noise = torch.randn(param.shape, dtype=torch.float64, device="cpu")
            drawn += float(noise.square().sum())
            noise = noise.square().pin_memory() if param.is_cuda else noise.square()
            state["exp_avg_sq"].copy_(noise, non_blocking=True)
    if drawn:
        others = sum(param.numel() for _, param, _ in members) - sum(param.numel() for param in fresh)
        opt._init_norm_sq = drawn + others
