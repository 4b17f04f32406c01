"""Searches for a learning rate by optimizers that ascend, and of losses below zero."""

import pytest
import torch
from cases import assert_same_bits
from dense import curved
from optim.test_replica import problem

import fused_warmup as fw
from fused_warmup.sharpness import critical_lr
from fused_warmup.tuning import PersistentCatapult, initial_lr

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = {
    "SGD": (lambda p, **o: fw.SGD(p, lr=1e-2, **o), lambda g: g),
    "torch-SGD": (lambda p, **o: torch.optim.SGD(p, lr=1e-2, **o), lambda g: g),
    "clipped": (lambda p, **o: fw.SGD(p, lr=1e-2, max_grad_norm=0.5, **o), lambda g: 0.5 * g / g.norm()),
    "Adam": (lambda p, **o: fw.Adam(p, lr=1e-2, eps=1e-30, **o), torch.sign),
    "torch-AdamW": (
        lambda p, **o: torch.optim.AdamW(p, lr=1e-2, eps=1e-30, weight_decay=0.0, **o),
        torch.sign,
    ),
}
SHIFTS = [0.0, 5.575, 5.5751, 5.0, 7.0, 1e3]
USES = pytest.mark.parametrize(("sign", "use_grad"), [(1, True), (1, False), (-1, True), (-1, False)])


def exact_rate(rule):
    """Return 2 g'u / u'Hu for the first step u."""
    x, h, loss = curved(0.0, 1)
    g = torch.autograd.grad(loss(), x)[0]
    u = RULES[rule][1](g)
    return (2.0 * g @ u / (u @ (h * u))).item()


@USES
@pytest.mark.parametrize("rule", RULES)
def test_critical_rate_up_and_down(rule, sign, use_grad):
    """The exact rate; the same for ascent of the negative, and for any constant subtracted from the loss."""
    exact, found = exact_rate(rule), []
    for shift in SHIFTS:
        x, _, loss = curved(shift, sign)
        opt = RULES[rule][0]([x], maximize=sign < 0)
        if use_grad:
            loss().backward()
        found.append(critical_lr(loss, opt, use_grad=use_grad))
        warm = critical_lr(loss, opt, previous=found[-1], use_grad=use_grad)
        for rates in (found[-1], warm):
            assert rates.flags == ()
            assert rates.lo <= exact <= rates.hi
            assert rates.hi <= rates.lo * 8 / 7 + 1e-12
    assert all(rates == found[0] for rates in found)
    assert found[0].hi <= found[0].lo * 16 / 15 + 1e-12


@USES
@pytest.mark.parametrize("rule", RULES)
def test_initial_rate_up_and_down(rule, sign, use_grad):
    """Just above the critical rate, within the tolerance, also for losses of zero or below."""
    exact = exact_rate(rule)
    for start in (1e-4, 1.3e-4, 1.7e-4):
        found = []
        for shift in SHIFTS:
            x, h, loss = curved(shift, sign)
            opt = RULES[rule][0]([x], maximize=sign < 0)
            if use_grad:
                loss().backward()
            found.append(initial_lr(loss, opt, start=start, target=1e3, use_grad=use_grad))
            assert found[-1].flags == ()
            assert found[-1].lo < exact <= found[-1].value == found[-1].hi
            with torch.no_grad():
                u = RULES[rule][1](h * x)
                before = curved(0.0, 1)[2]().item()
                x -= found[-1].value * u
                after = sign * loss().item() + shift
            assert before <= after <= 1.1 * before + 1e-9
        # a tenth of the decrease is at most a tenth of the loss, which may cost one more bisection
        assert all(rates.forwards <= found[0].forwards + 1 for rates in found)
        assert found[0] == initial_lr_of(rule, start)


def initial_lr_of(rule, start):
    """Return the initial rate for descent of a positive loss."""
    x, _, loss = curved(0.0, 1)
    return initial_lr(loss, RULES[rule][0]([x]), start=start, target=1e3)


@pytest.mark.parametrize("search", ["critical_lr", "initial_lr"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("lost", [torch.inf, -torch.inf, torch.nan])
def test_lost_losses_are_increases(lost, sign, search):
    """A loss that is not finite below half of the first coordinate has increased, whatever its sign."""
    x, _, loss = curved(6.0, sign)
    walled = lambda: loss() if x[0].detach() > 0.5 else loss() * 0.0 + lost  # noqa: E731
    opt = fw.SGD([x], lr=1e-3, maximize=sign < 0)
    found = critical_lr(walled, opt) if search == "critical_lr" else initial_lr(walled, opt, target=10.0)
    if search == "critical_lr":
        assert found.lo <= 0.05 <= found.hi <= found.lo * 16 / 15 + 1e-12
    else:
        assert found.hi == found.value == pytest.approx(0.05)


def follow(sign, shift, steps=25, **options):
    """Train a network of the paper with a catapult, by descent or ascent."""
    model, loss, _ = problem(0)
    signed = lambda: sign * (loss() - shift)  # noqa: E731
    opt = fw.SGD(model.parameters(), lr=1.0, maximize=sign < 0)
    catapult = PersistentCatapult(opt, target=1.2, **options)
    rates = []
    for _ in range(steps):
        opt.zero_grad()
        value = signed()
        value.backward()
        rates.append(catapult.step(value, signed))
        opt.step()
    return rates, catapult, [p.detach() for p in model.parameters()]


def test_catapult_up_and_down():
    """Ascent of the negative follows the path of descent; losses below zero raise the rate as well."""
    down, catapult, params = follow(1, 0.0)
    up, other, others = follow(-1, 0.0)
    assert up == down
    assert catapult.searches >= 3
    assert (other.searches, other.forwards) == (catapult.searches, catapult.forwards)
    for a, b in zip(others, params, strict=True):
        assert_same_bits("parameters", a, b)
    below, catapult, params = follow(1, 1.0)
    assert follow(-1, 1.0)[0] == below
    assert below[0] == pytest.approx(down[0], rel=0.5)
    assert below[-1] == 1.2
    assert len(set(below)) >= 3


def test_catapult_searches_until_there_is_a_rate():
    """A non-finite loss of the first batch must not leave the rate at 0 for good."""
    x, _, loss = curved(0.0, 1)
    loss().backward()
    catapult = PersistentCatapult(fw.SGD([x]), target=10.0)
    assert catapult.step(1.0, lambda: loss() * torch.nan) == 0.0
    assert catapult.step(2.0, loss) > 0.0
