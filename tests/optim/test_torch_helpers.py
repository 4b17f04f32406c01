"""What stands around an optimizer in torch: schedulers, the gradient scaler, averaged models.

All of it must do with our optimizers what it does with torch's.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS, Case, assert_same_bits, set_grads
from peers import (
    assert_same_params,
    each_backend,
    each_case,
    each_class,
    each_torch_class,
    likeness,
    members,
    peer_of,
    small,
    snapshot,
    two_groups,
    walk,
)
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

import fused_warmup as fw

pytestmark = pytest.mark.pairwise

# schedulers


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 4], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 2, mode="triangular2"),
    "CyclicLR by a function": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 2, scale_fn=lambda x: 0.5**x),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 9),
    "OneCycleLR in three phases": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 9, three_phase=True),
    "OneCycleLR of the rate alone": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 9, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([
        lr_scheduler.ConstantLR(o, 0.1, 3),
        lr_scheduler.ExponentialLR(o, 0.8),
    ]),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, 3),
}
LOSSES = [1.0, 1.0, 1.0, 0.5, 0.75, 0.75, 0.75, 0.25]


def test_every_scheduler_is_here() -> None:
    named = {name.split(" ")[0] for name in SCHEDULERS}
    assert named == {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}


def driven(opt: Optimizer, scheduler: Any, losses: list[float]) -> list[Any]:
    """Train with a scheduler; return what it set before each step."""
    seen = []
    for i, loss in enumerate(losses):
        walk(opt, [i])
        # exact: a scheduler computes in Python numbers
        seen.append([{k: numbers(g.get(k)) for k in ("lr", "momentum", "betas")} for g in opt.param_groups])
        if isinstance(opt, fw.FusedOptimizer):
            assert opt.get_last_lr() == [group["lr"] for group in seen[-1]]
        scheduler.step(*([loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return seen


def numbers(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [numbers(part) for part in value]
    return value.item() if isinstance(value, Tensor) else value


def tensor_of(rate: float) -> Tensor:
    return torch.tensor(rate, dtype=torch.float64)


def by_hand(opt: Optimizer, seen: list[Any]) -> None:
    """Train with hyper-parameters that somebody else's scheduler has set."""
    for i, groups in enumerate(seen):
        for group, values in zip(opt.param_groups, groups, strict=True):
            group.update({key: value for key, value in values.items() if value is not None and key in group})
        walk(opt, [i])


@each_class
@pytest.mark.parametrize(
    ("backend", "as_tensor"),
    [(BACKENDS[0], False), (BACKENDS[-1], False), (BACKENDS[-1], True)],
    ids=["reference-float", "float", "tensor"],
)
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_schedulers_do_what_they_do_for_torch(case: Case, backend: str, name: str, as_tensor: bool) -> None:
    """The values are those that torch's optimizer gets, and the steps those of the values."""
    here, there, hand = small(), small(), small()
    rate = tensor_of if as_tensor else float
    opt = case.make(two_groups(here, rate), backend=backend)
    other = likeness(case, two_groups(there, rate))
    held = [group["lr"] for group in opt.param_groups]
    mine, theirs = SCHEDULERS[name](opt), SCHEDULERS[name](other)
    seen = driven(opt, mine, LOSSES)
    wanted = driven(other, theirs, LOSSES)
    keys = ("lr",) if case.torch_cls is None else ("lr", "momentum", "betas")
    assert [[{k: g[k] for k in keys} for g in at] for at in seen] == [
        [{k: g[k] for k in keys} for g in at] for at in wanted
    ]
    assert numbers(mine.get_last_lr()) == numbers(theirs.get_last_lr())
    if as_tensor:
        # written in place, so that a graph would see it
        assert all(group["lr"] is lr for group, lr in zip(opt.param_groups, held, strict=True))
    by_hand(case.make(two_groups(hand), backend=backend), wanted if case.torch_cls else seen)
    for p, q in zip(here, hand, strict=True):
        assert_same_bits("parameter", p, q)
    if case.torch_cls is not None:
        assert_same_params(here, there)


@each_class
@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_momentum_is_cycled(case: Case, name: str) -> None:
    """Whatever is the first average, ``momentum`` or the first of ``betas``; and the steps follow."""
    opt = case.make(small())
    other = likeness(case, small())
    key = "betas" if "betas" in opt.defaults else "momentum"
    seen, wanted = (driven(o, SCHEDULERS[name](o), LOSSES) for o in (opt, other))
    first, first_wanted = (
        [at[0][key][0] if key == "betas" else at[0][key] for at in values] for values in (seen, wanted)
    )
    assert first == first_wanted
    assert len(set(first)) > 2
    still = case.make(small())
    by_hand(still, [[{**at[0], key: still.defaults[key]}] for at in seen])
    assert not any(torch.equal(p, q) for p, q in zip(members(opt), members(still), strict=True))


@each_class
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_state_dicts_of_schedulers(case: Case, name: str) -> None:
    """Those over torch's optimizer; and a run that was stopped goes on as if it had not been."""
    whole, first, other = case.make(small()), case.make(small()), likeness(case, small())
    at_once, before, there = (SCHEDULERS[name](opt) for opt in (whole, first, other))
    driven(whole, at_once, LOSSES[:4])
    driven(first, before, LOSSES[:4])
    driven(other, there, LOSSES[:4])
    saved = before.state_dict()
    plain = {key: value for key, value in saved.items() if not callable(value) and key != "_schedulers"}
    assert plain == {key: there.state_dict()[key] for key in plain}
    second = case.make([nn.Parameter(p.detach().clone()) for p in members(first)])
    after = SCHEDULERS[name](second)
    after.load_state_dict(copy.deepcopy(saved))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert driven(second, after, LOSSES[4:]) == driven(whole, at_once, LOSSES[4:])
    for p, q in zip(members(second), members(whole), strict=True):
        assert_same_bits("parameter", p, q)


@each_class
def test_a_scheduler_before_the_optimizer_warns_as_in_torch(case: Case) -> None:
    def warned(opt: Optimizer, way: str) -> list[str]:
        scheduler = lr_scheduler.StepLR(opt, 2)
        if way == "overridden":
            opt.step = lambda closure=None: None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if way != "scheduler first":
                walk(opt, range(1))
            scheduler.step()
        return [str(w.message) for w in caught]

    for way in ("scheduler first", "optimizer first", "overridden"):
        wanted = warned(torch.optim.SGD(small(), lr=0.1), way)
        assert bool(wanted) == (way != "optimizer first")
        assert warned(case.make(small()), way) == wanted


@each_class
def test_a_scheduler_goes_with_a_copy_of_its_optimizer(case: Case) -> None:
    opt = case.make(small())
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    driven(opt, scheduler, LOSSES[:2])
    other, of_other = copy.deepcopy((opt, scheduler))
    assert of_other.optimizer is other
    assert driven(other, of_other, LOSSES[2:5]) == driven(opt, scheduler, LOSSES[2:5])
    for p, q in zip(members(opt), members(other), strict=True):
        assert_same_bits("parameter", p, q)


# the gradient scaler


def scaled_step(opt: Optimizer, scaler: Any, step: int, factor: float = 1.0) -> None:
    """Put scaled gradients where autograd would, and step."""
    set_grads(members(opt), step, scale=scaler.get_scale() * factor)
    scaler.step(opt)
    scaler.update()


@each_case
@each_backend
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled"])
def test_a_scaled_step_is_that_without_a_scaler(case: Case, backend: str, unscaled: bool) -> None:
    """Bit for bit, as scales are powers of two; steps with an infinite gradient are not made."""
    here, there = small(torch.float32), small(torch.float32)
    opt, plain = case.make(here, backend=backend), case.make(there, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scaler.scale(torch.ones(()))
    scales = []
    for step in range(7):
        bad = step in (0, 3)
        set_grads(here, step, scale=scaler.get_scale())
        if bad:
            here[1].grad.view(-1)[5] = math.inf if step else math.nan
        if unscaled:
            scaler.unscale_(opt)
        known = snapshot(opt)[0], [p.detach().clone() for p in here]
        assert scaler.step(opt) is None
        scaler.update()
        scales.append(scaler.get_scale())
        if bad:
            for p, old in zip(here, known[1], strict=True):
                assert_same_bits("after an overflow", p, old)
            assert step == 0 or snapshot(opt)[0] == known[0]
        else:
            set_grads(there, step)
            plain.step()
    assert scales == [512.0, 512.0, 1024.0, 512.0, 512.0, 1024.0, 1024.0]
    for p, q in zip(here, there, strict=True):
        assert_same_bits("parameter", p, q)
    assert snapshot(opt)[0] == snapshot(plain)[0]


@each_class
@each_backend
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_a_scaler_steps_without_any_gradient(case: Case, backend: str, trained: bool) -> None:
    """As torch's fused optimizers do: nothing happens."""

    def step(opt: Optimizer) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        if trained:
            scaled_step(opt, scaler, 0)
        opt.zero_grad()
        before = repr((snapshot(opt), members(opt)))
        result = scaler.step(opt)
        assert repr((snapshot(opt), members(opt))) == before
        assert not hasattr(opt, "found_inf")
        assert not hasattr(opt, "grad_scale")
        return result

    assert step(torch.optim.Adam(small(), fused=True)) is None
    opt = case.make(small(), backend=backend)
    assert step(opt) is None
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaled_step(opt, scaler, 1)
    twin = case.make(small(), backend=backend)
    walk(twin, range(0 if trained else 1, 2))
    for p, q in zip(members(opt), members(twin), strict=True):
        assert_same_bits("parameter", p, q)


@each_class
@each_backend
def test_a_scaler_that_is_off_passes_all_on(case: Case, backend: str) -> None:
    opt, plain = case.make(small(), backend=backend), case.make(small(), backend=backend)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(3):
        set_grads(members(opt), step)
        assert scaler.step(opt, lambda: 2.5) == 2.5
        scaler.update()
    walk(plain, range(3))
    for p, q in zip(members(opt), members(plain), strict=True):
        assert_same_bits("parameter", p, q)


@each_torch_class
@each_backend
def test_one_scaler_for_two_optimizers(case: Case, backend: str) -> None:
    """Each skips for itself, and the scale falls if one of them does."""

    def train(make: Callable[[Any], Optimizer]) -> tuple[list[nn.Parameter], float]:
        opts = [make(small(torch.float32, seed=seed)) for seed in (0, 1)]
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.ones(()))
        for step in range(4):
            for k, opt in enumerate(opts):
                set_grads(members(opt), step + k, scale=scaler.get_scale())
                if step == 2 and k == 1:
                    members(opt)[0].grad[0] = math.inf
                scaler.step(opt)
            scaler.update()
        return [p for opt in opts for p in members(opt)], scaler.get_scale()

    mine, theirs = train(lambda p: case.make(p, backend=backend)), train(lambda p: peer_of(case, p))
    assert mine[1] == theirs[1] == 32.0
    assert_same_params(mine[0], theirs[0])


# averaged models


def network() -> nn.Module:
    # products this small only wait for a second thread
    torch.set_num_threads(1)
    torch.manual_seed(5)
    # a bias before a batch norm has rounding errors for a gradient, which Adam would normalise
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


@each_torch_class
@each_backend
@pytest.mark.parametrize("average", ["swa", "ema", "foreign"])
def test_averaged_models_and_their_batch_norms(case: Case, backend: str, average: str) -> None:
    """``AveragedModel``, ``SWALR`` and ``update_bn`` around ours give what they give around torch's."""
    options: dict[str, Any] = {
        "swa": {},
        "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.75)},
        "foreign": {"avg_fn": lambda mean, new, n: (mean * n + new) / (n + 1)},
    }[average]
    batches = [torch.randn(6, 3, dtype=torch.float64) for _ in range(5)]

    def train(make: Callable[[Any], Optimizer]) -> tuple[list[Tensor], list[Tensor], list[float]]:
        model = network()
        averaged = swa_utils.AveragedModel(model, **options)
        opt = make(model.parameters())
        scheduler, rates, plain_mean = swa_utils.SWALR(opt, 0.05, 3), [], []
        for batch in batches:
            opt.zero_grad()
            model(batch).square().mean().backward()
            opt.step()
            averaged.update_parameters(model)
            scheduler.step()
            rates.append(opt.param_groups[0]["lr"])
            plain_mean.append(model[0].weight.detach().clone())
        swa_utils.update_bn(batches, averaged)
        if average == "swa":
            torch.testing.assert_close(averaged.module[0].weight, torch.stack(plain_mean).mean(0))
        return list(model.state_dict().values()), list(averaged.state_dict().values()), rates

    mine, theirs = train(lambda p: case.make(p, backend=backend)), train(lambda p: peer_of(case, p))
    assert_same_params(mine[0], theirs[0])
    assert_same_params(mine[1], theirs[1])
    assert mine[2] == theirs[2]


@each_class
@each_backend
def test_an_averaged_model_of_any_class(case: Case, backend: str) -> None:
    """The mean of what the steps left, and a copy that trains no further."""
    model = network()
    averaged = swa_utils.AveragedModel(model)
    opt = case.make(model.parameters(), backend=backend)
    left = []
    for step in range(4):
        walk(opt, [step])
        averaged.update_parameters(model)
        left.append([p.detach().clone() for p in model.parameters()])
    for mean, *each in zip(averaged.parameters(), *left, strict=True):
        torch.testing.assert_close(mean, torch.stack(each).mean(0))
    held = [p.detach().clone() for p in averaged.parameters()]
    walk(opt, range(4, 6))
    assert all(torch.equal(p, old) for p, old in zip(averaged.parameters(), held, strict=True))


def test_the_scaler_finds_what_it_asks_for() -> None:
    """It looks at the signature of ``step``, and would pass itself to one that names it."""
    assert all(
        "grad_scaler" not in inspect.signature(case.make(small()).step).parameters
        for case in each_class.args[1]
    )
