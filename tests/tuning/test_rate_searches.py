"""Searches for a rate: the rates that one tries, and when a persistent catapult begins another."""

import math

import pytest
import torch

import fused_warmup as fw
from fused_warmup.tuning.warmup.initial_lr import search


class Known1d:
    """A line whose losses are known, and the rates that were asked for."""

    def __init__(self, loss):
        self._loss, self.asked = loss, []
        self.start = loss(0.0)

    @property
    def forwards(self):
        return len(self.asked)

    def loss(self, eta):
        self.asked.append(eta)
        return self._loss(eta)


def parabola(eta):
    """1 at 0 and at a quarter, where it begins to rise above its start."""
    return (1.0 - 8.0 * eta) ** 2


SEARCHES = {
    # doubling to the threshold itself, where the loss no longer falls
    "exact": (1 / 64, 1.0, 0.1, [1, 2, 4, 8, 16], 16, 8, 16, ()),
    # past it, and back by halves until the rise is a tenth at most
    "halves": (3 / 64, 1.0, 0.1, [3, 6, 12, 24, 18, 15, 16.5, 15.75, 16.125], 16.125, 15.75, 16.125, ()),
    # the bracket is between half of the target and the target
    "target below": (3 / 64, 20 / 64, 3.0, [3, 6, 12, 20], 20, 10, 20, ("target",)),
    "falls up to the target": (1 / 64, 10 / 64, 0.1, [1, 2, 4, 8, 10], 10, 10, math.inf, ("target",)),
    "starts at the target": (1 / 64, 1 / 64, 0.1, [1], 1, 1, math.inf, ("target",)),
    "rises at once": (32 / 64, 1.0, 0.1, [32], 32, 0, 32, ("rises",)),
    "stands still at once": (16 / 64, 1.0, 0.1, [16], 16, 0, 16, ("rises",)),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_rates_that_a_search_tries(name):
    """Each one, in 64ths."""
    start, target, tolerance, asked, value, lo, hi, flags = SEARCHES[name]
    line = Known1d(parabola)
    found = search(line, start, target, tolerance)
    assert [64 * eta for eta in line.asked] == asked
    assert (64 * found.value, 64 * found.lo, 64 * found.hi) == (value, lo, hi)
    assert (found.forwards, found.flags) == (len(asked), flags)


def test_a_search_without_a_resolution_ends():
    """No rate above the threshold raises the loss by little."""
    found = search(Known1d(lambda eta: 1.0 - eta if eta < 0.2 else 5.0), 0.1, 1.0, 0.1)
    assert found.flags == ("unresolved",)
    assert found.lo == pytest.approx(0.2, rel=1e-12)
    assert found.lo < found.value == found.hi


def test_a_loss_as_high_as_at_the_start_has_risen():
    line = Known1d(lambda eta: 1.0 - eta if eta < 0.2 else 1.0 if eta < 0.24 else 5.0)
    found = search(line, 1 / 8, 1.0, 0.1)
    assert [64 * eta for eta in line.asked] == [8, 16, 12, 14]
    assert (64 * found.lo, 64 * found.value, found.flags) == (12, 14, ())


def test_the_rate_that_is_the_target_saves_all_steps_but_one():
    assert fw.tuning.reach_steps(100, 1.0, 1.0) == 1.0
    assert fw.tuning.saved_steps(100, 1.0, 1.0, forwards=3) == 97.5


def bowl(*rates):
    """A quadratic bowl over one group for each rate, whose gradients stand; 2 is the critical rate of their sum."""
    params = [torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in rates]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(params, rates, strict=True)]
    loss = lambda: 0.5 * sum(p.square().sum() for p in params)  # noqa: E731
    loss().backward()
    return groups, loss


@pytest.mark.parametrize("cls", [fw.SGD, torch.optim.SGD])
def test_a_catapult_keeps_ratios_and_tensors(cls):
    groups, loss = bowl(torch.tensor(0.1), torch.tensor(0.05))
    opt = cls(groups, lr=0.1)
    held = [group["lr"] for group in opt.param_groups]
    catapult = fw.PersistentCatapult(opt, target=1.0)
    assert catapult.step(5.0, loss) == catapult.lr > 0.1
    assert all(group["lr"] is lr for group, lr in zip(opt.param_groups, held, strict=True))
    assert [float(lr) for lr in held] == pytest.approx([catapult.lr, catapult.lr / 2])


def test_a_catapult_without_rates_gives_all_groups_the_same():
    groups, loss = bowl(0.0, 0.0)
    opt = fw.SGD(groups, lr=0.1)
    catapult = fw.PersistentCatapult(opt, target=1.0)
    catapult.step(5.0, loss)
    assert [group["lr"] for group in opt.param_groups] == [catapult.lr] * 2


def test_a_catapult_searches_below_its_lowest_loss_only():
    """Not at an equal one, and not for ever after one that is not finite; all evaluations are counted."""
    groups, loss = bowl(0.1)
    catapult = fw.PersistentCatapult(fw.SGD(groups, lr=0.1), target=1e6, start=1e-3)
    counts = []
    for value, searches in ((math.nan, 1), (math.inf, 1), (5.0, 2), (5.0, 2), (6.0, 2), (4.0, 3)):
        rate = catapult.lr
        catapult.step(value, loss)
        assert catapult.searches == searches, value
        assert catapult.lr >= rate
        counts.append(catapult.forwards)
    # from where the rate is, one look is enough to see that it rises
    assert counts == [counts[0], counts[0], counts[0] + 1, counts[0] + 1, counts[0] + 1, counts[0] + 2]
    assert counts[0] > 10
    assert catapult.best == 4.0


def test_a_catapult_stays_where_the_loss_is_not_finite():
    groups, loss = bowl(0.1)
    catapult = fw.PersistentCatapult(fw.SGD(groups, lr=0.1), target=1.0)
    assert catapult.step(5.0, lambda: loss() * math.nan) == 0.0
    # without a rate yet the next step searches again
    assert (catapult.searches, catapult.best) == (1, math.inf)


@pytest.mark.parametrize("reduce", [True, False])
def test_a_catapult_shares_a_copy_of_the_loss(reduce, monkeypatch):
    """The mean over processes, which is taken in place, must not be written into the user's loss."""
    groups, loss = bowl(0.1)
    monkeypatch.setattr(
        "fused_warmup.tuning.warmup.persistent_catapult.average",
        lambda *values: [v.mul_(3.0) for v in values],
    )
    catapult = fw.PersistentCatapult(fw.SGD(groups, lr=0.1), target=1.0, reduce=reduce)
    given = torch.tensor(5.0, dtype=torch.float64)
    catapult.step(given, loss)
    assert given == 5.0
    assert catapult.best == (15.0 if reduce else 5.0)


def test_a_state_of_a_catapult_is_whole():
    groups, loss = bowl(0.1)
    first = fw.PersistentCatapult(fw.SGD(groups, lr=0.1), target=3.0, start=1e-3, tolerance=0.3)
    first.step(5.0, loss)
    second = fw.PersistentCatapult(fw.SGD(groups, lr=0.1), target=1.0)
    second.load_state_dict(first.state_dict())
    names = ("lr", "best", "forwards", "searches", "target", "start", "tolerance")
    assert [getattr(second, name) for name in names] == [getattr(first, name) for name in names]
    with pytest.raises(ValueError, match=r"state_dict must have the keys .*version"):
        second.load_state_dict({k: v for k, v in first.state_dict().items() if k != "version"})
