"""State dicts in torch's format, out of and into the device buffers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _checks as check
from ..distributed.groups import whole
from ..plan.build import check_rounding
from ..plan.spec import RuleSpec
from ..plan.state_checks import checked_norm, checked_state, whole_count
from ..plan.structs import COUNTERS, TELEMETRY
from ..plan.tensors import compute_dtype, state_like
from ..plan.tracked_states import entries_of
from ..reference.rounding import MODE_OF_RESIDUE, RESIDUES
from ..schedules import Schedule
from ..schedules.adaptive import AdaptiveSchedule, restored, to_text
from .groups import SCHEDULE_KEYS, make_hyper, restored_dtype
from .session import Session

_VERSION = 1
# states of torch's Adam, AdamW, RAdam and SGD; one that the rule does not keep comes from another optimizer
_TORCH_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
# entries of a state besides those of the rules; all others were added by the user
_OWN = (*MODE_OF_RESIDUE, "average", "step", "n_averaged", "initialized")


def pack_state(session: Session) -> dict[str, Any]:
    """Return the state dict of an optimizer: that of torch in plain types, and an entry of this package.

    Dictionaries and tensors of the parameters are those of the optimizer, as in torch: they follow later
    steps, counts and moments together. ``step`` is float32 as torch keeps it; the exact int64 counts are in
    ``fused_warmup``.

    Args:
        session: Session of the optimizer.
    """
    counts = session.planned_counts()
    if counts is None:
        session.drop_counts()
    groups, positions = _pack_groups(session)
    states = _pack_states(session, positions)
    if counts is None:
        _convert_counts(session, states)
        counts = session.counts.select(session.params)
    step_ids, steps = counts
    own = {
        "version": _VERSION,
        "rule": session.spec.name,
        "steps": steps,
        "step_ids": step_ids,
        "counters": session.counters,
        "init_norm_sq": session.init_norm_sq,
        "telemetry": session.telemetry.kept_rows() if session.telemetry.enabled else None,
    }
    return {"state": states, "param_groups": groups, "fused_warmup": own}


def _pack_groups(session: Session) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Return the groups in plain types with positions of parameters, and these by the identity of each."""
    groups: list[dict[str, Any]] = []
    positions: dict[int, int] = {}
    # groups may share a schedule with a value for every step
    texts: dict[int, str] = {}
    updates, first = session.shared_updates, 0
    for group in session.param_groups:
        ids = list(map(id, group["params"]))
        own = dict(zip(ids, range(first, first + len(ids)), strict=True))
        # a parameter of two groups has the position in the first one, as in torch
        positions |= own if positions.keys().isdisjoint(own) else {**own, **positions}
        first += len(ids)
        packed = {**group, "updates": updates}
        # the last entry in torch
        del packed["params"]
        packed["params"] = [positions[key] for key in ids]
        if "norm" in packed:
            # a later step writes it
            packed["norm"] = torch.as_tensor(packed["norm"]).clone()
        for key in SCHEDULE_KEYS:
            schedule = packed.get(key)
            if schedule is not None and isinstance(schedule, (Schedule, AdaptiveSchedule)):
                if id(schedule) not in texts:
                    texts[id(schedule)] = to_text(schedule)
                packed[key] = texts[id(schedule)]
        if "state_dtype" in packed:
            packed["state_dtype"] = str(packed["state_dtype"])
        groups.append(packed)
    return groups, positions


def _pack_states(session: Session, positions: Mapping[int, int]) -> dict[Any, Any]:
    """Return the states by the position of their parameter; other keys are those of the user.

    Raises:
        KeyError: If a parameter with a state is in no group, as in torch.
    """
    return {
        positions[id(key)] if id(key) in positions or isinstance(key, Tensor) else key: own
        for key, own in entries_of(session.state)
    }


def _convert_counts(session: Session, packed: dict[Any, Any]) -> None:
    """Convert counts that came from elsewhere to the 0-dim float32 of torch; the others are kept."""
    for k, param in enumerate(session.params):
        state, held = packed.get(k), session.counts.steps.get(id(param))
        if not isinstance(state, Mapping):
            continue
        if not state:
            del packed[k]
        elif "step" in state and state["step"] is not held:
            packed[k] = {**state, "step": torch.as_tensor(state["step"], dtype=torch.float32)}


def load_state(session: Session, fixed: Mapping[str, Any], state_dict: dict[str, Any]) -> None:
    """Load a state dict of ours or of ``torch.optim``, all of it or nothing.

    Args:
        session: Session of the optimizer.
        fixed: Hyper-parameters that the class does not let a state dict change.
        state_dict: As ``state_dict`` returned it; not changed.

    Raises:
        ValueError: If it is of another optimizer, version or shape.
        TypeError: If a state is of a kind that cannot be read.
    """
    owner = session.owner
    own = _own_entry(session, state_dict)
    groups = _loaded_groups(session, fixed, state_dict)
    updates = _saved_updates(own, groups)
    states = _loaded_states(session, state_dict, own, groups, updates)
    ids = {k for group in state_dict["param_groups"] for k in group["params"]}
    others = {k: value for k, value in state_dict["state"].items() if k not in ids}

    _warn_of_schedules(owner, session, groups)
    for group, loaded in zip(session.param_groups, groups, strict=True):
        _keep_norm(group, loaded)
        group.update(_kept_live(group, loaded))
    params = session.params
    for key in session.state.keys() - set(params):
        del session.state[key]
    session.state.update(others)
    calls = _load_counters(session, own, updates, states)
    with torch.no_grad():
        for group in session.param_groups:
            for param in group["params"]:
                _fill(session, group, param, states.get(param), calls)
    counted = [param for param in params if "step" in states.get(param, ())]
    session.counts.load(counted, session.state, [states[param]["step"] for param in counted])
    session.reset()


def _saved_updates(own: Mapping[str, Any], groups: list[dict[str, Any]]) -> int:
    """Return the number of updates that a state dict tells, and take it out of the groups.

    Wrappers and checkpoints of torch keep the entries of groups, and drop the one of this package.
    """
    told = [group.get("updates") or 0 for group in groups]
    for group in groups:
        group["updates"] = None
    saved = own.get("counters")
    return max(told, default=0) if saved is None else int(saved[COUNTERS.index("step")])


def _warn_of_schedules(owner: str, session: Session, groups: list[dict[str, Any]]) -> None:
    """Warn once if the state dict replaces a schedule of the optimizer, as all hyper-parameters in torch."""
    for g, (group, loaded) in enumerate(zip(session.param_groups, groups, strict=True)):
        for key in SCHEDULE_KEYS:
            held = group.get(key)
            taken = loaded.get(key, held)
            live = isinstance(held, AdaptiveSchedule) and isinstance(taken, AdaptiveSchedule)
            if held is not None and not live and held != taken:
                warnings.warn(
                    f"{owner}: load_state_dict() replaces the {key} of group {g} by that of the state dict, "
                    f"another one; to keep yours, set param_groups[{g}][{key!r}] after the load.",
                    stacklevel=5,
                )
                return


def _ids(group: Mapping[str, Any]) -> list[Any]:
    """Return the ids of a saved group's parameters, each once: torch repeats a tied weight."""
    return list(dict.fromkeys(group["params"]))


def _own_entry(session: Session, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the checked entry of this package, or an empty one for a state dict of torch."""
    owner, rule = session.owner, session.spec.name
    for key in ("state", "param_groups"):
        if key not in state_dict:
            check.fail(owner, "state_dict", f"have the key {key!r}", sorted(state_dict))
    own: Mapping[str, Any] = state_dict.get("fused_warmup", {})
    if own and own.get("version") != _VERSION:
        hint = "It was saved by another release."
        check.fail(owner, "state_dict['fused_warmup']['version']", f"be {_VERSION}", own.get("version"), hint)
    if own and own.get("rule") != rule:
        check.fail(owner, "state_dict", f"be that of a {rule} rule", own.get("rule"))
    rows = own.get("telemetry")
    if rows is not None and (rows.dim() != 2 or rows.shape[1] != len(TELEMETRY)):
        name = "state_dict['fused_warmup']['telemetry']"
        check.fail(owner, name, f"have the shape [steps, {len(TELEMETRY)}]", tuple(rows.shape))
    return own


def _loaded_groups(
    session: Session, fixed: Mapping[str, Any], state_dict: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the checked hyper-parameters of the state dict."""
    owner = session.owner
    saved = state_dict["param_groups"]
    if len(saved) != len(session.param_groups):
        check.fail(owner, "state_dict", f"have {len(session.param_groups)} parameter groups", len(saved))
    groups, first = [], 0
    made: dict[Any, Any] = {}
    for i, (live, group) in enumerate(zip(session.param_groups, saved, strict=True)):
        if len(_ids(group)) != len(live["params"]):
            name = f"state_dict['param_groups'][{i}]"
            check.fail(owner, name, f"have {len(live['params'])} parameters", len(_ids(group)))
        loaded = {}
        for key, value in group.items():
            if key in SCHEDULE_KEYS and isinstance(value, (str, Mapping)):
                # groups that shared a schedule share it again
                same = value if isinstance(value, str) else id(value)
                made[same] = made[same] if same in made else restored(value)
                loaded[key] = made[same]
            elif key == "state_dtype":
                loaded[key] = restored_dtype(value)
            elif key != "params":
                loaded[key] = value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        loaded.update(fixed)
        hyper = make_hyper(owner, session.spec, {**live, **loaded})
        for k, param in enumerate(live["params"], first) if hyper.rounds else ():
            check_rounding(owner, k, param, hyper)
        first += len(live["params"])
        if "norm" in loaded:
            device = live["params"][0].device if live["params"] else torch.device("cpu")
            name = f"state_dict['param_groups'][{i}]['norm']"
            loaded["norm"] = checked_norm(owner, name, loaded["norm"], device)
        # wrappers save the place of it alone
        if loaded.get("updates") is not None:
            name = f"state_dict['param_groups'][{i}]['updates']"
            loaded["updates"] = whole_count(owner, name, loaded["updates"])
        groups.append(loaded)
    return groups


def _keep_norm(group: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Copy the loaded norm of a group into the tensor that the kernels read; without one it is measured."""
    norm, held = loaded.pop("norm", None), group.get("norm")
    if norm is None:
        group.pop("norm", None)
    elif isinstance(held, Tensor) and (held.dtype, held.device) == (norm.dtype, norm.device):
        held.copy_(norm)
    else:
        group["norm"] = norm


def _kept_live(group: Mapping[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that a group loads; an adaptive schedule stays the object of the user."""
    held, new = group["schedule"], loaded.get("schedule")
    if not isinstance(held, AdaptiveSchedule) or not isinstance(new, AdaptiveSchedule):
        return loaded
    held.load_state_dict(new.state_dict())
    return {**loaded, "schedule": held}


def _loaded_states(
    session: Session,
    state_dict: Mapping[str, Any],
    own: Mapping[str, Any],
    groups: list[dict[str, Any]],
    updates: int,
) -> dict[Tensor, dict[str, Any]]:
    """Return the checked states of the state dict by parameter; ``step`` is an int."""
    owner, spec = session.owner, session.spec
    known = _known_states(spec)
    steps = own["steps"] if own else []
    # a list of 0-dim tensors in older state dicts
    made = steps.tolist() if isinstance(steps, Tensor) else [int(step) for step in steps]
    exact = dict(zip(own["step_ids"] if own else (), made, strict=True))
    ids = [k for group in state_dict["param_groups"] for k in _ids(group)]
    params = [(g, p) for g, group in enumerate(session.param_groups) for p in group["params"]]
    states = {}
    for index, (k, (g, param)) in enumerate(zip(ids, params, strict=True)):
        saved = state_dict["state"].get(k)
        if saved is None or (isinstance(saved, Mapping) and not saved):
            continue
        name = f"state_dict['state'][{k!r}]"
        if not isinstance(saved, Mapping):
            check.fail(owner, name, "be a dictionary", saved, error=TypeError)
        required = spec.state_names({**session.param_groups[g], **groups[g]})
        kept = (*known, *MODE_OF_RESIDUE, "average")
        tensors = {key: saved[key] for key in kept if saved.get(key) is not None}
        residues = [key for key in MODE_OF_RESIDUE if key in tensors]
        if len(residues) > 1:
            check.fail(owner, name, "hold the state of one param_rounding", " and ".join(residues))
        foreign = [key for key in tensors if key in known and key not in spec.states]
        missing = [key for key in required if key not in tensors and key not in spec.optional_states]
        others = {key: value for key, value in saved.items() if key not in (*known, *_OWN)}
        if foreign or (missing and len(others) < len(saved)):
            wanted = " and ".join(required) or "no tensors"
            check.fail(owner, name, f"hold {wanted}", ", ".join(tensors) or "none of them")
        for key, value in tensors.items():
            if isinstance(value, Tensor) and value.shape != param.shape:
                condition = f"have the shape {tuple(param.shape)} of parameter {index}"
                check.fail(owner, f"{name}[{key!r}]", condition, tuple(value.shape))
            checked_state(owner, index, key, value, param)
        others = {key: _as_torch(param, value, k, state_dict, key) for key, value in others.items()}
        states[param] = {"tensors": tensors, "others": others, "counted": "step" in saved}
        if len(others) == len(saved):
            # entries of the user alone: no step has been made
            continue
        step = whole_count(owner, f"{name}['step']", saved.get("step", 0))
        buffer = tensors.get(spec.first_gradient or "")
        if buffer is not None and not step:
            # torch's SGD keeps no count, and its checkpoints leave ours at 0: with a buffer the first step is
            # over, unless the buffer is that of a state without steps
            step = int("step" not in saved or _is_filled(buffer))
        # beyond 2**24 the float says less than a count that agrees with it
        count = exact.get(k, updates)
        step = count if float(np.float32(count)) == step else step
        n_averaged = saved.get("n_averaged")
        if n_averaged is not None:
            n_averaged = whole_count(owner, f"{name}['n_averaged']", n_averaged)
        initialized = bool(saved.get("initialized", False))
        states[param] |= {"step": step, "n_averaged": n_averaged, "initialized": initialized}
    return states


def _is_filled(tensor: Tensor) -> bool:
    """Return whether a state has an element other than zero, on any process."""
    return bool(whole(tensor.any()))


def _known_states(spec: RuleSpec) -> tuple[str, ...]:
    """Return the names of states that the rule or an optimizer of torch may keep per parameter."""
    return tuple(dict.fromkeys((*spec.states, *_TORCH_STATES)))


def _as_torch(param: Tensor, value: Any, k: Any, state_dict: Mapping[str, Any], key: str = "") -> Any:
    """Return an entry of the user as torch loads it, with tensors cast like the parameter."""
    if isinstance(value, Tensor):
        groups = state_dict["param_groups"]
        return Optimizer._process_value_according_to_param_policy(param, value, k, groups, key)
    if isinstance(value, dict):
        return {name: _as_torch(param, item, k, state_dict, name) for name, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_as_torch(param, item, k, state_dict) for item in value)
    return copy.deepcopy(value)


def _dtype_of(key: str, group: Mapping[str, Any], param: Tensor) -> torch.dtype:
    """Return the dtype that a state of a parameter has in a group."""
    if key in MODE_OF_RESIDUE:
        return RESIDUES[MODE_OF_RESIDUE[key]][1]
    dtype: torch.dtype = compute_dtype(param.dtype)
    wanted: torch.dtype = restored_dtype(group["state_dtype"])
    return wanted if dtype == torch.float32 and key != "average" else dtype


def _fill(
    session: Session,
    group: Mapping[str, Any],
    param: Tensor,
    loaded: Mapping[str, Any] | None,
    calls: int,
) -> None:
    """Copy loaded values into the states of a parameter; those that are missing or rounded are allocated."""
    if loaded is None:
        session.state.pop(param, None)
        return
    state = session.state[param]
    keep = dict(loaded["tensors"])
    if "step" not in loaded:
        state.clear()
        state.update(loaded["others"])
        return
    n_averaged = loaded["n_averaged"]
    if session.average is None:
        keep.pop("average", None)
    elif "average" not in keep:
        keep["average"], n_averaged = param, 0
    if n_averaged is None:
        n_averaged = session.average_settings.due_count(calls)
    for key in set(state) - set(keep):
        del state[key]
    for key, value in keep.items():
        held, dtype = state.get(key), _dtype_of(key, group, param)
        if not isinstance(held, Tensor) or held.dtype != dtype:
            state[key] = state_like(param, dtype=dtype)
        state[key].copy_(value)
    state.update(loaded["others"])
    step, count = session.counts.steps.get(id(param)), session.counts.n_averaged.get(id(param))
    if step is None or step.device != param.device:
        step, count = torch.zeros((), dtype=torch.float32, device=param.device), None
    state["step"] = step.fill_(loaded["step"])
    if session.average is not None:
        if count is None:
            count = torch.zeros((), dtype=torch.int64, device=param.device)
        state["n_averaged"] = count.fill_(n_averaged)
    if loaded["initialized"]:
        state["initialized"] = True


def _load_counters(
    session: Session, own: Mapping[str, Any], updates: int, states: Mapping[Tensor, Mapping[str, Any]]
) -> int:
    """Load counters and telemetry, and return the number of updates made.

    Where the states say more than the counters, or there are none, it is the largest count of a parameter.
    """
    device = session.device
    rows = own.get("telemetry")
    calls = 0
    if session.telemetry.enabled:
        empty = torch.empty(0, len(TELEMETRY), dtype=torch.float64, device="cpu")
        calls = session.telemetry.load_rows(rows if rows is not None else empty)
    step: int = max([updates, *(state["step"] for state in states.values() if state["counted"])])
    if session.counters is None:
        session.counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
    session.counters.copy_(torch.tensor([step, calls], dtype=torch.int64, device="cpu"))
    session.init_norm_sq = float(own.get("init_norm_sq", 0.0)) if own else _drawn_norm_sq(session, states)
    return step


def _drawn_norm_sq(session: Session, states: Mapping[Tensor, Mapping[str, Any]]) -> float:
    """Return the squared norm of a random start from the second moments themselves, 0 if none waits."""
    name, drawn, started = session.spec.second_moment, 0.0, 0
    for group in session.param_groups:
        if name is None or make_hyper(session.owner, session.spec, group).init != "random":
            continue
        for param in group["params"]:
            state = states.get(param, {})
            if state.get("step") == 0 and not state["initialized"] and name in state["tensors"]:
                drawn += float(whole(state["tensors"][name].sum(dtype=torch.float64)))
            else:
                started += param.numel()
    # those that have made a step count by the mean of what was drawn, 1 for each element
    return drawn + started if drawn else 0.0
