"""Parameter groups: validation, and completion of those that came from elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from .. import _checks as check
from ..plan.hyper import Hyper
from ..plan.spec import RuleSpec
from ..plan.sphere import sphere_options
from ..reference.rounding import MODES, STATE_DTYPES
from ..schedules import Schedule
from ..schedules.adaptive import AdaptiveSchedule, restored

SCHEDULE_KEYS = ("schedule", "weight_decay_schedule")
# arguments of torch's optimizers that are accepted and not used, and what a state dict alone fills
IGNORED_KEYS = ("foreach", "capturable", "differentiable", "fused", "updates")
# as state dicts have them: torch.distributed.checkpoint takes no dtype in a group
_DTYPES = {str(dtype): dtype for dtype in STATE_DTYPES}


def make_hyper(owner: str, spec: RuleSpec, group: Mapping[str, Any]) -> Hyper:
    """Return the validated hyper-parameters of a group, schedules and sphere included.

    Args:
        owner: Name of the optimizer class, for messages.
        spec: The update rule.
        group: A parameter group with all hyper-parameters.

    Raises:
        ValueError: If a value is out of range; it is named.
        TypeError: If a value has a wrong type.
    """
    hyper = spec.hyper(owner, group)
    schedule, weight_decay_schedule = (_plain_schedule(owner, key, group[key]) for key in SCHEDULE_KEYS)
    hyper.schedule, hyper.weight_decay_schedule = schedule, weight_decay_schedule
    hyper.sphere, hyper.radius = sphere_options(owner, group, hyper.weight_decay)
    hyper.param_rounding = check.one_of(owner, "param_rounding", group["param_rounding"], MODES)
    hyper.state_dtype = check.one_of(owner, "state_dtype", restored_dtype(group["state_dtype"]), STATE_DTYPES)
    hyper.rounding_seed = check.whole(owner, "rounding_seed", group["rounding_seed"], 0, 2**64 - 1)
    return hyper


def _plain_schedule(owner: str, key: str, schedule: Any) -> Schedule | None:
    """Return a schedule as segments; only the learning rate may have an adaptive one."""
    if schedule is None:
        return None
    if key == "schedule" and isinstance(schedule, AdaptiveSchedule):
        return schedule.schedule
    if not isinstance(schedule, Schedule):
        hint = "Arbitrary functions of the step go to torch.optim.lr_scheduler.LambdaLR."
        check.fail(owner, key, "be a fused_warmup schedule or None", schedule, hint, TypeError)
    return schedule


def restored_dtype(value: Any) -> Any:
    """Return the dtype that a state dict holds as text; another value as it is."""
    return _DTYPES.get(value, value) if isinstance(value, str) else value


def restore_schedules(group: Any, held: AdaptiveSchedule | None) -> None:
    """Replace schedules that came as text or as plain types, as in a state dict, by schedules.

    Wrappers copy the groups of a state dict without asking ``load_state_dict``.

    Args:
        group: A parameter group; changed in place.
        held: The adaptive schedule that the group had last. It stays the object of the user and takes over
            what was saved.
    """
    for key in SCHEDULE_KEYS:
        if group[key] is not None and isinstance(group[key], (str, Mapping)):
            schedule = restored(group[key])
            if held is not None and isinstance(schedule, AdaptiveSchedule) and type(held) is type(schedule):
                held.load_state_dict(schedule.state_dict())
                schedule = held
            group[key] = schedule


def complete_groups(groups: list[dict[str, Any]], defaults: Mapping[str, Any]) -> None:
    """Give groups that came from elsewhere the hyper-parameters that they lack."""
    for group in groups:
        for key in defaults.keys() - group.keys():
            group[key] = defaults[key]


def check_common(owner: str, common: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for an option of the whole optimizer that differs in a group.

    A wrapper may repeat the options of the constructor in each group.

    Args:
        owner: Name of the optimizer class, for messages.
        common: Options that the optimizer was made with.
        group: A new parameter group.
    """
    for key, value in common.items():
        given = group.get(key, value)
        if type(given) is not type(value) or given != value:
            check.fail(owner, key, "be given once for the whole optimizer", given)
    if group.get("differentiable"):
        check.fail(owner, "differentiable", "be False", True, "torch.optim has the differentiable form.")


def unique_params(owner: str, params: list[Any]) -> list[Any]:
    """Return the entries of a new group, each parameter once; a tied weight may be listed twice."""
    if len(set(map(id, params))) == len(params) and tuple not in set(map(type, params)):
        return params
    first: dict[int, Any] = {}
    for entry in params:
        first.setdefault(id(entry[1] if isinstance(entry, tuple) else entry), entry)
    if len(first) < len(params):
        warnings.warn(
            f"{owner}: got a parameter group with duplicate parameters; each is trained once.", stacklevel=4
        )
    return list(first.values())


def tensors_of(params: list[Any]) -> list[Tensor]:
    """Return the tensors of a new group, some of which may come with their names."""
    if set(map(type, params)) <= {Tensor, Parameter}:
        return params
    unnamed = (entry[1] if isinstance(entry, tuple) else entry for entry in params)
    return [entry for entry in unnamed if isinstance(entry, Tensor)]
