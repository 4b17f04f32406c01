"""Build the rows of a plan: checks of all tensors, and allocation of the states that are missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..distributed.groups import is_flattened, is_part
from . import tensors
from .address_cache import addresses_of
from .hyper import AverageSettings, Hyper
from .rows import Member, RowCounters
from .spec import RuleSpec
from .state_checks import checked_state, whole_count


def check_norms(owner: str, max_grad_norm: float | None, nonfinite: str) -> None:
    """Raise ``ValueError`` for settings that need the norm of gradients that other processes have."""
    if max_grad_norm is not None or nonfinite == "skip":
        hint = "A process sees its part of the norm only; clip with torch.nn.utils.clip_grad_norm_."
        condition = "be (None, 'propagate') beside sharded parameters"
        check.fail(owner, "(max_grad_norm, nonfinite)", condition, (max_grad_norm, nonfinite), hint)


def check_whole(
    owner: str,
    spec: RuleSpec,
    members: Iterable[tuple[int, Tensor, Hyper]],
    max_grad_norm: float | None,
    nonfinite: str,
    *,
    is_split: bool,
) -> bool:
    """Raise ``ValueError`` if a sum over tensors is needed of which other processes hold a part.

    Args:
        owner: Name of the optimizer class.
        spec: The update rule.
        members: Position, parameter and hyper-parameters of each.
        max_grad_norm: Norm to clip to, or None.
        nonfinite: Policy for gradients that are not finite.
        is_split: Whether other processes hold other parameters of the model.

    Returns:
        Whether other processes hold other parts.
    """
    split, layerwise = False, spec.is_layerwise
    hint = "A process sees its part of the norm only."
    for index, param, hyper in members:
        part = is_part(param)
        if is_split or part:
            split = True
            check_norms(owner, max_grad_norm, nonfinite)
            if hyper.sphere:
                check.fail(owner, "projection", "be None beside sharded parameters", "sphere", hint)
            if hyper.init == "random":
                condition = "be 'zeros' or 'grad' beside sharded parameters"
                check.fail(owner, "exp_avg_sq_init", condition, "random", hint)
        if layerwise and (part or is_flattened(param)):
            reason = "A process sees its part of a layer only, and this rule needs sums over all of it."
            check.fail(owner, f"parameter {index}", "be whole in each process", tuple(param.shape), reason)
    return split


def find_members(
    owner: str,
    spec: RuleSpec,
    groups: Sequence[Mapping[str, Any]],
    hypers: Sequence[Hyper],
    names: Sequence[Sequence[str]],
    state: Mapping[Tensor, Mapping[str, Any]],
    *,
    every: bool,
) -> list[Member]:
    """Return the parameters that have or get a state, after checking every tensor of them.

    Args:
        owner: Name of the optimizer class.
        spec: The update rule.
        groups: Parameter groups.
        hypers: Hyper-parameters of each group.
        names: Names of the states that each group keeps.
        state: States by parameter; not changed.
        every: Include all parameters that require a gradient, also those without one.

    Raises:
        TypeError: If a parameter, gradient or state is of a kind that no backend takes.
        ValueError: If one does not fit, or two parameters share memory.
    """
    members: list[Member] = []
    flat = [(g, param) for g, group in enumerate(groups) for param in group["params"]]
    for index, (g, param) in enumerate(flat):
        own = state.get(param, {})
        idle = param.grad is None and "step" not in own
        # parameters without a gradient still count towards the norm of a sphere
        if idle and not ((every or hypers[g].sphere) and param.requires_grad):
            continue
        local = tensors.check_param(owner, index, param, members[0].local.device if members else None)
        if param.grad is not None:
            tensors.check_grad(owner, index, local, param.grad, spec.takes_sparse)
            tensors.check_placement(owner, index, param, param.grad)
        for key in (*names[g], "average"):
            if own.get(key) is not None:
                checked_state(owner, index, key, own[key], param)
        members.append(Member(index, g, param, local, own))
    addresses = addresses_of([m.local for m in members])
    tensors.check_disjoint(owner, [(m.index, m.local, a) for m, a in zip(members, addresses, strict=True)])
    return members


def checked_counts(
    owner: str,
    spec: RuleSpec,
    member: Member,
    record: RowCounters | None,
    average: AverageSettings,
    calls: int,
) -> tuple[int, int] | None:
    """Return the counts of a parameter that came from elsewhere, None if those of the kernels are in place.

    Args:
        owner: Name of the optimizer class.
        spec: The update rule.
        member: The parameter.
        record: Counts that the kernels write, or None.
        average: Average that is kept.
        calls: Updates that the optimizer has made.

    Returns:
        Updates made and values in the average.

    Raises:
        TypeError: If a count is no real number.
        ValueError: If one is negative or not whole.
    """
    state, index = member.state, member.index
    step = state.get("step")
    if step is None:
        # torch's SGD keeps no count; with a buffer the first step is over
        return int(spec.has_first_gradient(state)), 0
    n_averaged = state.get("n_averaged")
    in_place = record is not None and step is record.step and record.record.device == member.param.device
    if record is not None and in_place and (n_averaged is None or n_averaged is record.n_averaged):
        return None
    made = whole_count(owner, f"state['step'] of parameter {index}", step)
    if n_averaged is not None:
        return made, whole_count(owner, f"state['n_averaged'] of parameter {index}", n_averaged)
    if state.get("average") is None:
        return made, 0
    # an average without a count was there from the first step on
    return made, average.due_count(max(made, calls))


def allocate_state(
    spec: RuleSpec,
    member: Member,
    names: Sequence[str],
    state: dict[str, Any],
    record: RowCounters,
    *,
    averaged: bool,
) -> None:
    """Allocate the missing states of a parameter, and convert those that came from elsewhere.

    Args:
        spec: The update rule.
        member: The parameter.
        names: Names of the states that its group keeps.
        state: A copy of its entry in ``optimizer.state``, which is completed.
        record: Its counts.
        averaged: Whether an average is kept.
    """
    param, by_channel = member.param, spec.by_channel
    starts = "step" not in state
    state["step"] = record.step
    if not starts and spec.first_gradient in names and not spec.has_first_gradient(state):
        # torch starts a buffer that comes late with the gradient itself, as at a first step
        record.set(0, int(record.n_averaged))
    for key in (*names, *(["average"] if averaged else [])):
        held = state.get(key)
        if held is None:
            state[key] = tensors.state_like(param, by_channel)
            if key == "average":
                state[key].copy_(param)
                record.n_averaged.zero_()
        elif not tensors.fits(held, member.local, by_channel):
            # the parameter got another dtype or layout since, or the state came from elsewhere
            state[key] = tensors.state_like(param, by_channel).copy_(held)
    if averaged:
        state["n_averaged"] = record.n_averaged


def draw_second_moment(second_moment: Tensor) -> float:
    """Fill a second moment with squares of normal numbers and return their sum.

    The numbers are drawn on the host, so that their norm is known without waiting for the device.
    """
    noise = torch.randn(second_moment.shape, dtype=torch.float64, device="cpu").square()
    total = float(noise.sum())
    pinned = second_moment.is_cuda
    second_moment.copy_(noise.pin_memory() if pinned else noise, non_blocking=pinned)
    return total
