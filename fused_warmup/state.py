"""State dicts in torch's format, out of and into the device buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _checks as check
from .layout import state_like
from .live import LiveSchedule, live_schedules, restored
from .schedules import Schedule
from .table import COUNTERS, TELEMETRY

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

_VERSION = 1
_SCHEDULES = ("schedule", "weight_decay_schedule")
# what any of our rules or torch's may keep per parameter
_KNOWN = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def pack_state(opt: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return torch's state dict of ``opt`` in plain types, with an entry for what torch has no place for.

    Args:
        opt: The optimizer.
        state_dict: What ``torch.optim.Optimizer.state_dict`` returned for it; not changed.

    Returns:
        The state dict. ``step`` is float32 as torch keeps it; the exact int64 counts are in ``fused_warmup``.
    """
    states = state_dict["state"]
    groups = [dict(group) for group in state_dict["param_groups"]]
    # groups share a live schedule, and so they do in the state dict
    live = {id(schedule): schedule.state_dict() for schedule in live_schedules(groups)}
    for group in groups:
        if "norm" in group:
            # a later step writes it
            group["norm"] = group["norm"].clone()
        for key in _SCHEDULES:
            if isinstance(group[key], Schedule):
                group[key] = group[key].to_dict()
            elif isinstance(group[key], LiveSchedule):
                group[key] = live[id(group[key])]
    counted = [k for k, state in states.items() if "step" in state]
    steps = (
        torch.stack([states[k]["step"] for k in counted])
        if counted
        else torch.zeros(0, dtype=torch.int64, device="cpu")
    )
    packed = {k: dict(state) for k, state in states.items() if state}
    for k in counted:
        packed[k]["step"] = states[k]["step"].to(torch.float32)
    own = {
        "version": _VERSION,
        "rule": opt.rule,
        "steps": steps,
        "step_ids": counted,
        "counters": None if opt._counters is None else opt._counters.clone(),
        "init_norm_sq": opt._init_norm_sq,
        "telemetry": opt.telemetry.rows() if opt.telemetry.enabled else None,
    }
    return {**state_dict, "state": packed, "param_groups": groups, "fused_warmup": own}


def load_state(opt: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Load a state dict of ours or of ``torch.optim`` into ``opt``, all of it or nothing.

    Args:
        opt: The optimizer.
        state_dict: What ``state_dict`` returned; not changed.

    Raises:
        ValueError: If it is of another optimizer, version or shape.
    """
    state_dict = dict(state_dict)
    for pre_hook in opt._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(opt, state_dict)
        state_dict = state_dict if replaced is None else replaced
    owner = type(opt).__name__
    own = _own_entry(owner, opt, state_dict)
    groups = _loaded_groups(owner, opt, state_dict)
    states = _loaded_states(owner, opt, state_dict, own, groups)

    for group, loaded in zip(opt.param_groups, groups, strict=True):
        _keep_norm(group, loaded)
        group.update(_kept_live(group, loaded))
    with torch.no_grad():
        for param in [p for group in opt.param_groups for p in group["params"]]:
            _fill(opt, param, states.get(param))
    _load_counters(opt, own, states)
    opt._reset()
    opt.update_captured()
    for post_hook in opt._optimizer_load_state_dict_post_hooks.values():
        post_hook(opt)


def _own_entry(owner: str, opt: FusedOptimizer, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the checked entry of ours, or an empty one for a state dict of torch."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            check.fail(owner, "state_dict", f"have the key {key!r}", sorted(state_dict))
    own: Mapping[str, Any] = state_dict.get("fused_warmup", {})
    if own and own.get("version") != _VERSION:
        hint = "It was saved by another release."
        check.fail(owner, "state_dict['fused_warmup']['version']", f"be {_VERSION}", own.get("version"), hint)
    if own and own.get("rule") != opt.rule:
        check.fail(owner, "state_dict", f"be that of a {opt.rule} rule", own.get("rule"))
    rows = own.get("telemetry")
    if rows is not None and (rows.dim() != 2 or rows.shape[1] != len(TELEMETRY)):
        name = "state_dict['fused_warmup']['telemetry']"
        check.fail(owner, name, f"have the shape [steps, {len(TELEMETRY)}]", tuple(rows.shape))
    return own


def _loaded_groups(owner: str, opt: FusedOptimizer, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the hyper-parameters to take over, checked."""
    saved = state_dict["param_groups"]
    if len(saved) != len(opt.param_groups):
        check.fail(owner, "state_dict", f"have {len(opt.param_groups)} parameter groups", len(saved))
    groups = []
    made: dict[int, Any] = {}
    for i, (live, group) in enumerate(zip(opt.param_groups, saved, strict=True)):
        if len(group["params"]) != len(live["params"]):
            name = f"state_dict['param_groups'][{i}]"
            check.fail(owner, name, f"have {len(live['params'])} parameters", len(group["params"]))
        loaded = {key: value for key, value in group.items() if key != "params"}
        for key in _SCHEDULES:
            if isinstance(loaded.get(key), Mapping):
                place = id(loaded[key])
                made[place] = made[place] if place in made else restored(loaded[key])
                loaded[key] = made[place]
        opt._make_hyper({**live, **loaded})
        norm = loaded.get("norm", torch.zeros(()))
        if not isinstance(norm, Tensor) or norm.shape != ():
            check.fail(owner, f"state_dict['param_groups'][{i}]['norm']", "be a 0-dim tensor", norm)
        if isinstance(loaded.get("lr"), Tensor):
            loaded["lr"] = loaded["lr"].clone()
        groups.append(loaded)
    return groups


def _keep_norm(group: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Bring the loaded norm of a group to where the kernels read it; without one it is to be measured."""
    norm, held = loaded.pop("norm", None), group.get("norm")
    if norm is None:
        group.pop("norm", None)
    elif held is None:
        device = group["params"][0].device if group["params"] else norm.device
        group["norm"] = norm.detach().to(device, torch.float64, copy=True)
    else:
        held.copy_(norm)


def _kept_live(group: Mapping[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """Return what a group takes over; a live schedule stays the object that the user holds."""
    held, new = group["schedule"], loaded.get("schedule")
    if not isinstance(held, LiveSchedule) or not isinstance(new, LiveSchedule):
        return loaded
    held.load_state_dict(new.state_dict())
    return {**loaded, "schedule": held}


def _loaded_states(
    owner: str,
    opt: FusedOptimizer,
    state_dict: Mapping[str, Any],
    own: Mapping[str, Any],
    groups: list[dict[str, Any]],
) -> dict[Tensor, dict[str, Any]]:
    """Return the states to take over by parameter, checked; ``step`` is an int."""
    exact = dict(zip(own["step_ids"], own["steps"].tolist(), strict=True)) if own else {}
    ids = [k for group in state_dict["param_groups"] for k in group["params"]]
    params = [(g, p) for g, group in enumerate(opt.param_groups) for p in group["params"]]
    states = {}
    for index, (k, (g, param)) in enumerate(zip(ids, params, strict=True)):
        saved = state_dict["state"].get(k)
        if not saved:
            continue
        name = f"state_dict['state'][{k!r}]"
        required = opt._state_names({**opt.param_groups[g], **groups[g]})
        tensors = {key: saved[key] for key in (*_KNOWN, "average") if isinstance(saved.get(key), Tensor)}
        foreign = [key for key in tensors if key in _KNOWN and key not in (*required, "max_exp_avg_sq")]
        missing = [
            key for key in required if key not in tensors and key not in ("max_exp_avg_sq", "momentum_buffer")
        ]
        if foreign or missing:
            wanted = " and ".join(required) or "no tensors"
            check.fail(owner, name, f"hold {wanted}", ", ".join(tensors) or "none of them")
        for key, value in tensors.items():
            if value.shape != param.shape:
                condition = f"have the shape {tuple(param.shape)} of parameter {index}"
                check.fail(owner, f"{name}[{key!r}]", condition, tuple(value.shape))
        step = exact.get(k, saved.get("step"))
        if step is None:
            # torch's SGD keeps no count; with a buffer the first step is over
            step = 1 if "momentum_buffer" in tensors else 0
        states[param] = {
            **tensors,
            "step": _step_count(owner, f"{name}['step']", step),
            "counted": "step" in saved,
            "initialized": bool(saved.get("initialized", False)),
        }
    return states


def _step_count(owner: str, name: str, step: Any) -> int:
    """Return a step count from an int, a float or a tensor with one element."""
    count = float(step) if not isinstance(step, int) else step
    if not 0 <= count < 2**62 or count != int(count):
        check.fail(owner, name, "be a whole number >= 0", step)
    return int(count)


def _fill(opt: FusedOptimizer, param: Tensor, loaded: Mapping[str, Any] | None) -> None:
    """Copy loaded values into the buffers of a parameter; buffers that are missing are made."""
    if loaded is None:
        opt._state.pop(param, None)
        return
    state = opt._state[param]
    keep = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    if opt.average is None:
        keep.pop("average", None)
    elif "average" not in keep:
        keep["average"] = param
    for key in set(state) & {*_KNOWN, "average"} - set(keep):
        del state[key]
    for key, value in keep.items():
        if not isinstance(state.get(key), Tensor):
            state[key] = state_like(param)
        state[key].copy_(value)
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.int64, device=param.device)
    state["step"].fill_(loaded["step"])
    if loaded["initialized"]:
        state["initialized"] = True
    else:
        state.pop("initialized", None)


def _load_counters(
    opt: FusedOptimizer, own: Mapping[str, Any], states: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Take over counters and telemetry; from torch, the count of the parameter that made most steps."""
    device = next((p.device for group in opt.param_groups for p in group["params"]), torch.device("cpu"))
    saved = own.get("counters")
    rows = own.get("telemetry")
    calls = 0
    if opt.telemetry.enabled:
        calls = opt.telemetry.load_rows(
            rows if rows is not None else torch.empty(0, len(TELEMETRY), dtype=torch.float64, device="cpu")
        )
    if saved is not None:
        step = int(saved[COUNTERS.index("step")])
    else:
        step = max((state["step"] for state in states.values() if state["counted"]), default=0)
    if opt._counters is None:
        opt._counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
    opt._counters.copy_(torch.tensor([step, calls], dtype=torch.int64, device="cpu"))
    opt._init_norm_sq = float(own.get("init_norm_sq", 0.0))
