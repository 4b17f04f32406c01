"""Our optimizers beside torch's: the same parameters, the same gradients, the same edits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from cases import BACKENDS, CASES, TORCH_CASES, Case, assert_close, make_params, set_grads
from torch import Tensor
from torch.optim import Optimizer

SHAPES = [(3,), (2, 4), ()]
# one case of every class, with a state to keep
CLASSES = [
    case
    for case in CASES
    if case.name
    in {"adam", "adamw", "giadam", "radam", "sgd-momentum", "lamb", "adamp-channel", "sgdp-momentum"}
]
TORCH_CLASSES = [case for case in CLASSES if case.torch_cls is not None]


def _each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_case, each_torch_case, each_class, each_torch_class = map(
    _each, (CASES, TORCH_CASES, CLASSES, TORCH_CLASSES)
)


def small(
    dtype: torch.dtype = torch.float64, shapes: Any = SHAPES, seed: int = 0
) -> list[torch.nn.Parameter]:
    return make_params(dtype, shapes, seed)


def members(opt: Optimizer) -> list[Tensor]:
    return [param for group in opt.param_groups for param in group["params"]]


def two_groups(params: list[Any], rate: Callable[[float], Any] = float) -> list[dict[str, Any]]:
    """Return the first parameter and the others, with a learning rate each."""
    return [{"params": params[:1], "lr": rate(0.1)}, {"params": params[1:], "lr": rate(0.02)}]


def walk(opt: Optimizer, steps: Iterable[int]) -> None:
    """Make steps; the gradients depend on the step and the position of the parameter."""
    for step in steps:
        set_grads(members(opt), step)
        opt.step()


def peer_of(case: Case, params: Any, **options: Any) -> Optimizer:
    """Return torch's optimizer; our reference where torch has none."""
    if case.torch_cls is None:
        return case.make(params, backend="reference", **options)
    return case.make_torch(params, foreach=False, **options)


def likeness(case: Case, params: Any) -> Optimizer:
    """Return an optimizer of torch with the hyper-parameters that schedulers ask for, of another rule perhaps."""
    if case.torch_cls is not None:
        return case.make_torch(params, foreach=False)
    if "betas" in case.make(small()).defaults:
        return torch.optim.Adam(params, lr=1e-2)
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def assert_same_params(mine: Any, theirs: Any) -> None:
    """Equal up to the rounding of their dtype."""
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.dtype == b.dtype
        tol = 1e-12 if a.dtype == torch.float64 else 4e-6
        assert_close(f"parameter {i}", a, b, tol, tol)


def compare_with_torch(
    case: Case,
    backend: str,
    scenario: Callable[[Optimizer, list[torch.nn.Parameter]], Any],
    make: Callable[[], list[torch.nn.Parameter]] = small,
    **options: Any,
) -> None:
    """Run a scenario with torch's optimizer and with ours: what it returns and the parameters must agree."""
    there, here = make(), make()
    wanted = scenario(peer_of(case, there, **options), there)
    got = scenario(case.make(here, backend=backend, **options), here)
    assert got == wanted
    assert_same_params(here, there)


def snapshot(opt: Optimizer) -> Any:
    """Return all that a user can see of an optimizer, in plain types."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            readable = not value.is_meta and value.layout == torch.strided
            return (str(value.dtype), value.device.type, value.tolist() if readable else str(value.layout))
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    states = [plain(opt.state.get(param, {})) for param in members(opt)]
    groups = [{key: plain(value) for key, value in group.items()} for group in opt.param_groups]
    return states, groups
