"""From an optimizer to its plan: checks of all tensors, and the states that are missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from ..backends.base import Backend
from ..distributed.groups import is_flattened, is_part
from ..reference.rules import LAYER_RULES
from . import tensors
from .device_buffers import is_capturing
from .hyper import Hyper
from .plan import Plan, check_disjoint
from .rows import RowCounters, make_row
from .state_checks import checked_norm, checked_state, whole_count
from .structs import COUNTERS

if TYPE_CHECKING:
    from ..optim.base import FusedOptimizer
    from ..optim.session import Session


def check_norms(owner: str, session: Session) -> None:
    """Raise ``ValueError`` for settings that need the norm of gradients that other processes have."""
    if session.max_grad_norm is not None or session.nonfinite == "skip":
        hint = "A process sees its part of the norm only; clip with torch.nn.utils.clip_grad_norm_."
        value = (session.max_grad_norm, session.nonfinite)
        condition = "be (None, 'propagate') beside sharded parameters"
        check.fail(owner, "(max_grad_norm, nonfinite)", condition, value, hint)


def check_whole(
    owner: str, rule: str, session: Session, members: Iterable[tuple[int, Tensor, Hyper]]
) -> bool:
    """Raise ``ValueError`` where a sum over tensors is needed of which other processes hold a part.

    Args:
        owner: Name of the optimizer class.
        rule: Name of its rule.
        session: Settings of the optimizer.
        members: Position, parameter and hyper-parameters of each.

    Returns:
        Whether other processes hold other parts.
    """
    split = False
    hint = "A process sees its part of the norm only."
    for index, param, hyper in members:
        part = is_part(param)
        if session.split or part:
            split = True
            check_norms(owner, session)
            if hyper.sphere:
                check.fail(owner, "projection", "be None beside sharded parameters", "sphere", hint)
            if hyper.init == "random":
                condition = "be 'zeros' or 'grad' beside sharded parameters"
                check.fail(owner, "exp_avg_sq_init", condition, "random", hint)
        if (part or is_flattened(param)) and rule in LAYER_RULES:
            reason = "A process sees its part of a layer only, and this rule needs sums over all of it."
            check.fail(owner, f"parameter {index}", "be whole in each process", tuple(param.shape), reason)
    return split


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
    name, session = type(opt).__name__, opt._session
    if any(is_capturing(p.device) for group in session.param_groups for p in group["params"][:1]):
        raise RuntimeError(
            f"{name}: states and table must stand before a graph is captured, got parameters, groups, "
            "states or averages that are new or were moved. Call init_state() before the capture, with "
            "the gradients that the graph will write in .grad."
        )
    hypers = [opt._adopt_group(group) for group in session.param_groups]
    members = [(i, p) for i, group in enumerate(session.param_groups) for p in group["params"]]
    names = [opt._state_names(group) for group in session.param_groups]
    device: torch.device | None = None
    known: list[tuple[int, int, Tensor, Tensor]] = []
    counts: dict[Tensor, tuple[int, int]] = {}
    for index, (g, param) in enumerate(members):
        state = session.state.get(param, {})
        idle = param.grad is None and "step" not in state
        # what has no gradient is a part of the norm all the same
        if idle and not ((every or hypers[g].sphere) and param.requires_grad):
            continue
        local = tensors.check_param(name, index, param, device)
        device = local.device
        if param.grad is not None:
            tensors.check_grad(name, index, local, param.grad, opt.takes_sparse)
            tensors.check_placement(name, index, param, param.grad)
        for key in (*names[g], "average"):
            if state.get(key) is not None:
                checked_state(name, index, key, state[key], param)
        counted = _counts(name, index, session, param, state)
        if counted is not None:
            counts[param] = counted
        known.append((g, index, param, local))
    device = device or torch.device("cpu")
    for g, group in enumerate(session.param_groups):
        if hypers[g].sphere and "norm" in group:
            group["norm"] = checked_norm(name, f"param_groups[{g}]['norm']", group["norm"], device)
    split = check_whole(name, opt.rule, session, [(index, p, hypers[g]) for g, index, p, _ in known])
    check_disjoint(name, [(index, local) for _, index, _, local in known])
    backend = session.resolve(device)
    counters = session.allocate_counters(device)
    session.telemetry.allocate(device, counters)
    _allocate(session, [(g, p, local) for g, _, p, local in known], hypers, names, counts, _by_channel(opt))
    averaged, by_channel = session.average is not None, _by_channel(opt)
    rows = [
        make_row(
            p,
            local,
            session.state[p],
            names[g],
            session.records[p],
            averaged=averaged,
            group=g,
            index=index,
            by_channel=by_channel,
        )
        for g, index, p, local in known
    ]
    record = {
        "counters": counters,
        "pending_scalars": session.telemetry.pending_scalars,
        "ring_buffer": session.telemetry.ring_buffer,
    }
    plan = Plan(
        name,
        opt.rule,
        rows,
        session.param_groups,
        session.state,
        _norms(session, hypers, device),
        session.average_settings,
        record,
        device,
        takes_sparse=opt.takes_sparse,
        is_split=split,
    )
    return plan, backend


def _counts(
    owner: str, index: int, session: Session, param: Tensor, state: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Return the checked counts of a parameter that came from elsewhere, None where ours are in place."""
    record, step = session.records.get(param), state.get("step")
    if step is None:
        # torch's SGD keeps no count; with a buffer the first step is over
        return int(state.get("momentum_buffer") is not None), 0
    n_averaged = state.get("n_averaged")
    in_place = record is not None and step is record.step and record.record.device == param.device
    if record is not None and in_place and (n_averaged is None or n_averaged is record.n_averaged):
        return None
    made = whole_count(owner, f"state['step'] of parameter {index}", step)
    if n_averaged is not None:
        return made, whole_count(owner, f"state['n_averaged'] of parameter {index}", n_averaged)
    if session.average is None or state.get("average") is None:
        return made, 0
    # of an average without a count, which was there from the first step on
    calls = 0 if session.counters is None else int(session.counters[COUNTERS.index("step")])
    return made, session.average_settings.due_count(max(made, calls))


def _norms(session: Session, hypers: list[Hyper], device: torch.device) -> list[Tensor | None]:
    """Return where the norms of groups on a sphere are kept; those of new groups are to be measured."""
    session.fresh_norms = {}
    for g, (group, hyper) in enumerate(zip(session.param_groups, hypers, strict=True)):
        if not hyper.sphere:
            group.pop("norm", None)
        elif "norm" not in group:
            session.fresh_norms[g] = torch.zeros((), dtype=torch.float64, device=device)
    fresh = session.fresh_norms
    return [group.get("norm", fresh.get(g)) for g, group in enumerate(session.param_groups)]


def _by_channel(opt: FusedOptimizer) -> bool:
    """Whether the rule looks at output channels by themselves."""
    return opt.rule in LAYER_RULES and LAYER_RULES[opt.rule].projects


def _allocate(
    session: Session,
    members: list[tuple[int, Tensor, Tensor]],
    hypers: list[Hyper],
    names: list[tuple[str, ...]],
    counts: Mapping[Tensor, tuple[int, int]],
    by_channel: bool,
) -> None:
    """Make the states that are missing, and convert those that came from elsewhere."""
    drawn, started = 0.0, 0
    for g, param, local in members:
        state = session.state[param]
        starts = "step" not in state
        if param in counts:
            session.records[param] = RowCounters(local.device, *counts[param])
        record = session.records[param]
        state["step"] = record.step
        if not starts and "momentum_buffer" in names[g] and state.get("momentum_buffer") is None:
            # torch starts a buffer that comes late with the gradient itself, as at a first step
            record.set(0, int(record.n_averaged))
        for key in names[g]:
            if state.get(key) is None:
                state[key] = tensors.state_like(param, by_channel)
        if session.average is not None and state.get("average") is None:
            state["average"] = tensors.state_like(param, by_channel).copy_(param)
            record.n_averaged.zero_()
        if session.average is not None:
            state["n_averaged"] = record.n_averaged
        for key in (*names[g], *(["average"] if session.average is not None else [])):
            if not tensors.fits(state[key], local, by_channel):
                # the parameter got another dtype or layout since, or the state is somebody else's
                state[key] = tensors.state_like(param, by_channel).copy_(state[key])
        started += param.numel() if starts else 0
        if starts and hypers[g].init == "random":
            # drawn on the host, so that its norm is known without a wait
            noise = torch.randn(param.shape, dtype=torch.float64, device="cpu")
            drawn += float(noise.square().sum())
            noise = noise.square().pin_memory() if param.is_cuda else noise.square()
            state["exp_avg_sq"].copy_(noise, non_blocking=True)
    if drawn:
        session.init_norm_sq = drawn + sum(param.numel() for _, param, _ in members) - started
    most = max((step for step, _ in counts.values()), default=0)
    if most and session.counters is not None:
        # a wrapper that restores states alone: schedules and averages go on where these are
        session.counters[COUNTERS.index("step")].clamp_(min=most)
    here = {param for _, param, _ in members}
    for param in session.records.keys() - here:
        del session.records[param]
