"""Parameters and gradients that change between steps: gradients that come and go, other memory, forms and devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peers import each_backend
from scenarios import build, compare_with_torch, each_case, param_of, values, walk
from torch import Tensor

import fused_warmup as fw

# gradients


@each_backend
@each_case
def test_gradients_that_come_and_go(case: str, backend: str) -> None:
    """A parameter without a gradient stays and does not advance."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        for i in range(8):
            for j, param in enumerate(params):
                param.grad = values(*param.shape, seed=i) if (i >> j) & 1 else None
            before = [param.detach().clone() for param in params]
            opt.step()
            for param, old in zip(params, before, strict=True):
                assert param.grad is not None or torch.equal(param, old)
        if isinstance(opt, fw.FusedOptimizer):
            assert [int(opt.state[param]["step"]) for param in params] == [4, 4, 4]

    compare_with_torch(case, backend, lambda: [param_of(values(n)) for n in (4, 5, 600)], scenario)


@each_backend
def test_no_gradients_at_all(backend: str) -> None:
    """A step without any gradient changes nothing, the first one included."""
    params = [param_of(values(4)), param_of(values(5))]
    before = [param.detach().clone() for param in params]
    opt = fw.Adam(params, backend=backend, max_grad_norm=1.0, average=fw.EMA(0.9))
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    walk(opt, params)
    opt.zero_grad()
    before = [param.detach().clone() for param in params]
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert opt.telemetry.latest()["grad_norm"] == 0.0


@each_backend
@each_case
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_made_anew_each_step(case: str, backend: str, set_to_none: bool) -> None:
    """Real backward passes, with gradients released or zeroed between."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        kept = []
        for i in range(5):
            opt.zero_grad(set_to_none=set_to_none)
            sum(
                (param * values(*param.shape, seed=i)).sum() + (param**2).sum() for param in params
            ).backward()
            # keeping some alive makes the allocator hand out other addresses
            kept.append([param.grad for param in params][: i % 2])
            opt.step()

    compare_with_torch(case, backend, lambda: [param_of(values(n)) for n in (4, 70)], scenario)


@each_backend
def test_frozen_parameters(backend: str) -> None:
    """``requires_grad_(False)`` between steps, and back."""
    model = torch.nn.Linear(3, 2)
    opt = fw.Adam(model.parameters(), lr=0.1, backend=backend)
    for frozen in (False, True, False):
        model.weight.requires_grad_(not frozen)
        opt.zero_grad()
        model(values(5, 3)).sum().backward()
        before = model.weight.detach().clone()
        opt.step()
        assert torch.equal(model.weight, before) == frozen


# memory and form


def replace(param: Tensor) -> None:
    """Move to new memory."""
    param.data = param.data.clone()


def turn_half(param: Tensor) -> None:
    """Turn the layout around in new memory; the elements stay."""
    param.data = param.data.t().contiguous().t()


def turn_in_place(param: Tensor) -> None:
    """Transpose over the same memory, as tying code does."""
    param.data = param.data.t()


def roll(param: Tensor) -> None:
    """Put the values elsewhere in a longer stretch: the same tensor, now strided."""
    longer = torch.zeros(param.shape[0], 2 * param.shape[1], dtype=param.dtype)
    longer[:, ::2] = param.data
    param.data = longer[:, ::2]


@each_backend
@each_case
@pytest.mark.parametrize("change", [replace, turn_half, turn_in_place, roll], ids=lambda f: f.__name__)
def test_memory_that_changes_between_steps(case: str, backend: str, change: Callable[[Tensor], None]) -> None:
    """``p.data = ...`` between steps; the address alone does not reveal every change."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        walk(opt, params, 2)
        for param in params:
            param.grad = None
            change(param)
        walk(opt, params, 2, seed=70)

    compare_with_torch(
        case, backend, lambda: [param_of(values(6, 6)), param_of(values(6, 6, seed=5))], scenario
    )


CHANGED_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "double": lambda data: data.double(),
    "bfloat16": lambda data: data.bfloat16(),
    "longer": lambda data: torch.cat([data, data]),
    "shorter": lambda data: data[:300].clone(),
    "shorter, same address": lambda data: data[:300],
    "other shape": lambda data: data.view(20, 30).clone(),
    "other shape, same address": lambda data: data.view(20, 30),
}


@each_backend
@pytest.mark.parametrize("form", list(CHANGED_FORMS))
def test_no_state_of_another_form_is_used(backend: str, form: str) -> None:
    """After ``model.double()`` or pruning, states of the old size or dtype are not read as the new one.

    Checked on the table rather than by a step, which would touch memory that is not ours.
    """
    param = param_of(values(600))
    opt = fw.Adam([param], backend=backend, average=fw.EMA(0.9))
    walk(opt, [param])
    param.grad = None
    param.data = CHANGED_FORMS[form](param.data)
    param.grad = torch.ones_like(param)
    refusal = ""
    try:
        plan, _ = opt.session.prepare(None, None)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith("Adam: parameter 0 "), refusal
        return
    (row,) = plan.rows
    wanted = torch.float64 if param.dtype == torch.float64 else torch.float32
    assert int(plan._columns["numel"][0]) == param.numel()
    for state in (*row.states, row.average):
        assert state.numel() == param.numel()
        assert state.dtype == wanted


@each_backend
def test_a_new_parameter_at_an_old_address(backend: str) -> None:
    """Memory that was freed and given to another parameter brings no state with it."""
    memory = torch.zeros(8)
    first = param_of(memory)
    opt = fw.SGD([first], lr=1.0, momentum=0.9, backend=backend)
    first.grad = torch.ones(8)
    opt.step()
    memory.zero_()
    second = param_of(memory[:4])
    opt = fw.SGD([second], lr=1.0, momentum=0.9, backend=backend)
    second.grad = torch.ones(4)
    opt.step()
    assert memory.tolist() == [-1.0] * 4 + [0.0] * 4


# models that are moved


@each_backend
@each_case
def test_moving_a_model_keeps_training(case: str, backend: str) -> None:
    """``Module.to`` and ``load_state_dict`` of the model between steps."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        model = torch.nn.Module()
        model.w = params[0]
        walk(opt, params, 2)
        model.to("cpu", torch.float32)
        model.load_state_dict({"w": values(4, 5, seed=33)})
        walk(opt, params, 2)

    compare_with_torch(case, backend, lambda: [torch.nn.Parameter(values(4, 5))], scenario)


@each_backend
@each_case
def test_meta_model_then_materialised(case: str, backend: str) -> None:
    """Optimizer over a meta model, ``to_empty``, then training; ``to_empty`` keeps the parameters."""
    with torch.device("meta"):
        model = torch.nn.Linear(4, 3)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        opt = build(case, model.parameters(), backend=backend)
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    params = list(model.parameters())
    assert opt.param_groups[0]["params"][0] is params[0]
    expected = [param_of(values(*param.shape)) for param in params]
    with torch.no_grad():
        for param in params:
            param.copy_(values(*param.shape))
    walk(opt, params)
    walk(build(case, expected, backend=backend), expected)
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))
    assert all(value.device.type == "cpu" for state in opt.state.values() for value in state.values())
