"""Decisions of AutoWU: where its fit ends the warmup, and where its plateau and its cooldown begin."""

import copy

import pytest
import torch
from torch.nn import Parameter

import fused_warmup as fw
from fused_warmup.tuning.autowu.gaussian_process import Parity, ScaleFree


def driven(wu, losses):
    """The rates of so many steps."""
    rates = [wu.lr]
    for loss in losses:
        rates.append(wu.step(loss))
    return rates[:-1]


def test_the_cooldown_does_not_begin_early():
    """A part of a step counts as a whole one."""
    wu = fw.AutoWU(10, 2, max_warmup_fraction=0.0, decay="constant-cosine", cooldown_fraction=0.25)
    assert driven(wu, [1.0] * 10) == pytest.approx([1.0] * 9 + [0.5])


def test_a_plateau_may_fall_by_little():
    """By less than a ten-thousandth per epoch it is one; it goes on from its state."""
    options = {"decay": "plateau", "max_warmup_fraction": 0.1, "plateau_patience": 2}
    losses = [1.0 - 1e-6 * i for i in range(200)]
    rates = driven(fw.AutoWU(1000, 10, **options), losses)
    assert rates[139] == rates[99]
    assert rates[140] == pytest.approx(rates[99] / 10)
    first, second = fw.AutoWU(1000, 10, **options), fw.AutoWU(50, 5)
    assert driven(first, losses[:125]) == rates[:125]
    second.load_state_dict(first.state_dict())
    assert driven(second, losses[125:]) == rates[125:]


@pytest.mark.parametrize("positive", [2, 3])
def test_most_votes_decide(positive):
    wu = fw.AutoWU(100, 1, parity=True, patience=1)
    wu._smoother.votes = lambda losses: [(0.96, 0.5)] * positive + [(0.94, 0.5)] * (5 - positive)
    wu.step(1.0)
    assert [test.positive for test in wu.tests] == [positive == 3]
    assert (wu.back_at == 1) == (positive == 3)


def test_a_copy_of_a_schedule_that_was_stepped_may_be_given_away():
    """Whoever fed the original does not feed the copy."""
    wu = fw.AutoWU(100, 10)
    wu.step(1.0)
    opt = fw.SGD([Parameter(torch.zeros(1))], lr=1.0, schedule=copy.deepcopy(wu))
    opt.record_loss(1.0)
    wu.step(1.0)


def test_the_minimum_is_not_beyond_the_last_loss():
    """Losses that fall would go on to do so."""
    losses = torch.linspace(3.0, 1.0, 10, dtype=torch.float64).square()
    ((_, place),) = ScaleFree().votes(losses)
    assert 0.8 < place <= 0.9


def test_four_losses_are_enough_for_a_vote():
    rising = torch.tensor([1.0, 1.1, 2.0, 3.0], dtype=torch.float64)
    assert ScaleFree().votes(rising[:3]) == [(0.0, 0.0)]
    assert ScaleFree().votes(rising)[0][0] > 0.5


def test_a_fit_goes_on_from_its_state():
    """Moments, the count that corrects them, and random numbers."""
    losses = torch.linspace(3.0, 1.0, 150, dtype=torch.float64).sin()
    first, second = Parity(), Parity()
    first.votes(losses[:120])
    second.load_state_dict(first.state_dict())
    assert first.votes(losses) == second.votes(losses)
    assert first.fitted == second.fitted
