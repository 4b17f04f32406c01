"""The critical and the initial learning rate, the steps that the latter saves, and the persistent catapult."""

import itertools
import math

import pytest
import torch
from cases import assert_same_bits
from optim.test_replica import problem

import fused_warmup as fw
from fused_warmup import schedules
from fused_warmup.sharpness import critical_lr, top_eigenvalue
from fused_warmup.tuning import PersistentCatapult, initial_lr, reach_steps, saved_steps

pytestmark = pytest.mark.usefixtures("one_thread")


def diagonal(x0, h=(10.0, 1.0, 0.1)):
    h = torch.tensor(h, dtype=torch.float64)
    x = torch.tensor(x0, dtype=torch.float64, requires_grad=True)
    return x, h, lambda: 0.5 * (h * x * x).sum()


@pytest.mark.parametrize("x0", [(1.0, 0.0, 0.0), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("grad", [True, False])
def test_initial_rate_of_a_quadratic(x0, grad):
    """Exactly 1e-4 * 2**11 after 12 evaluations, without bisection; a repetition gives the same."""
    x, _, loss = diagonal(x0)
    opt = fw.SGD([x], lr=0.3)
    if grad:
        loss().backward()
    for _ in range(2):
        found = initial_lr(loss, opt, target=10.0)
        assert found.value == 1e-4 * 2**11 == pytest.approx(0.2048)
        assert (found.forwards, found.flags) == (12, ())
    assert opt.param_groups[0]["lr"] == 0.3


def test_bisection_and_its_stopping_rule():
    """The upper end raises the loss, by at most the tolerance."""
    x, _, loss = diagonal((1.0, 0.0, 0.0))
    loss().backward()
    for start in (1.5e-4, 1.7e-4, 1.9e-4):
        for tolerance in (0.1, 0.01):
            found = initial_lr(loss, fw.SGD([x]), start=start, target=10.0, tolerance=tolerance)
            ratio = (1 - 10 * found.value) ** 2
            assert 1.0 <= ratio <= 1.0 + tolerance
            assert found.lo < 0.2 <= found.hi == found.value
            assert found.forwards > 11


def test_ends_of_the_search():
    x, _, loss = diagonal((1.0, 1.0, 1.0))
    loss().backward()
    opt = fw.SGD([x])
    assert initial_lr(loss, opt, start=0.5, target=1.0).value == 0.5
    assert initial_lr(loss, opt, start=0.5, target=1.0).flags == ("rises",)
    found = initial_lr(loss, opt, start=1e-3, target=0.05)
    assert (found.value, found.flags) == (0.05, ("target",))
    nan = initial_lr(lambda: loss() * math.nan, opt, target=1.0)
    assert math.isnan(nan.value)
    assert nan.flags == ("nonfinite",)
    # a loss that is NaN beyond some rate counts as risen
    broken = initial_lr(lambda: loss() if x[0].detach() > 0.5 else loss() * math.nan, opt, target=1.0)
    assert broken.lo < 0.05
    assert broken.value <= 0.2


@pytest.mark.parametrize("cls", [fw.Adam, torch.optim.Adam])
def test_rates_of_groups_keep_their_ratio(cls):
    """Adam's first step is the sign: the critical rate is 2 |g| / (s' H s), with the ratios in s."""
    x, y = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (1.0, 2.0))
    loss = lambda: (3.0 * x**2 + 0.5 * y**2).sum()  # noqa: E731
    loss().backward()
    opt = cls([{"params": [x], "lr": 1e-3}, {"params": [y], "lr": 4e-3}], eps=1e-16)
    u = torch.tensor([1.0, 4.0])
    exact = 2 * (6.0 * u[0] + 2.0 * u[1]).item() / (6.0 * u[0] ** 2 + u[1] ** 2).item()
    found = critical_lr(loss, opt)
    assert found.lo <= exact <= found.hi
    assert found.hi <= found.lo * 16 / 15 + 1e-12


def test_critical_rate_of_a_quadratic():
    """2 g'u / u'Hu, inside the bracket; about 13 evaluations cold, at most 5 from a value that is near."""
    x, h, loss = diagonal((0.01, -3.0, 10.0))
    loss().backward()
    g = x.grad
    exact = float(2 * g @ g / (g @ (h * g)))
    opt = fw.SGD([x], lr=1e-2)
    cold = critical_lr(loss, opt)
    assert cold.lo <= exact <= cold.hi
    assert 1 - cold.lo / cold.hi <= 1 / 16
    assert cold.forwards <= 16
    for off in (0.95, 1.0, 1.04):
        warm = critical_lr(loss, opt, previous=exact * off)
        assert warm.lo <= exact <= warm.hi
        assert warm.forwards <= 5
    far = critical_lr(loss, opt, previous=exact * 500)
    assert far.lo <= exact <= far.hi
    assert far.forwards <= 16
    again = critical_lr(loss, opt, previous=cold)
    assert again.lo <= exact <= again.hi
    sharpness = top_eigenvalue(loss, [x]).value.item()
    assert 2 / exact < 0.9 * sharpness


def batches(*scales):
    """Closures of quadratics with other curvatures in one parameter of SGD, whose gradient is that of their mean."""
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    losses = [lambda s=s: 0.5 * s * (x * x).sum() for s in scales]
    (sum(loss() for loss in losses) / len(losses)).backward()
    return x, losses


@pytest.mark.parametrize("grad", [True, False])
def test_rates_of_several_batches(grad):
    """The direction of the mean has gradient m: batch i is critical at 2 / m for any curvature that passes through 0."""
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    # minima at 0, 0.2 and -0.3, so that the rates are (1 - minimum) * 2 / m
    minima, curvature = (0.0, 0.2, -0.3), 5.0
    losses = [lambda m=m: 0.5 * curvature * ((x - m) ** 2).sum() for m in minima]
    (sum(loss() for loss in losses) / 3).backward()
    mean = x.grad.item()
    opt = fw.SGD([x], lr=1e-2)
    before = x.detach().clone(), x.grad.clone()
    # without a gradient in .grad the direction is that of the mean, also for each batch
    found = critical_lr(losses, opt, use_grad=grad)
    assert found.lo <= 2 * (1 - sum(minima) / 3) / mean <= found.hi
    exact = [2 * (1 - m) / mean for m in minima]
    assert len(found.batches) == 3
    for batch, rate in zip(found.batches, exact, strict=True):
        assert batch.lo <= rate <= batch.hi
        assert batch.flags == ()
    rates = [batch.value for batch in found.batches]
    distances = [abs(a - b) for a, b in itertools.combinations(rates, 2)]
    assert found.err_batch == pytest.approx(sum(distances) / 3)
    assert found.err_batch == pytest.approx(2 / mean * (0.2 + 0.3 + 0.5) / 3, rel=0.2)
    alone = critical_lr(losses[0], opt)
    assert found.forwards > 3 * alone.forwards
    assert_same_bits("param", x.detach(), before[0])
    assert_same_bits("grad", x.grad, before[1])


def test_the_rate_of_one_batch_is_compared_with_the_one_before():
    x, losses = batches(5.0)
    opt = fw.SGD([x], lr=1e-2)
    first = critical_lr(losses[0], opt)
    assert math.isnan(first.err_batch)
    assert first.batches == ()
    assert math.isnan(critical_lr(losses[0], opt, previous=first.value).err_batch)
    x.grad.mul_(0.5)
    second = critical_lr(losses[0], opt, previous=first)
    # half of the direction is critical at twice the rate
    assert second.err_batch == abs(second.value - first.value)
    assert second.err_batch == pytest.approx(first.value, rel=0.2)


def test_a_batch_without_a_rate_has_an_infinite_distance():
    x, losses = batches(5.0, 1.0)
    found = critical_lr([losses[0], lambda: 0.01 * x.sum()], fw.SGD([x], lr=1e-2))
    assert math.isfinite(found.value)
    assert found.err_batch == math.inf
    assert found.batches[1].flags == ("no_increase",)


def test_initial_rates_of_several_batches():
    x, losses = batches(5.0, 4.0, 6.0)
    opt = fw.SGD([x])
    found = initial_lr(losses, opt, start=1e-3, target=10.0)
    one = initial_lr(lambda: sum(loss() for loss in losses) / 3, opt, start=1e-3, target=10.0)
    assert (found.value, found.lo, found.hi, found.flags) == (one.value, one.lo, one.hi, one.flags)
    # all minima are at 0, so every batch is critical at 2 / m
    assert len({batch.value for batch in found.batches}) == 1
    assert found.err_batch == 0.0
    assert found.forwards == 3 * one.forwards + sum(batch.forwards for batch in found.batches)
    assert initial_lr(losses[:1], opt, start=1e-3, target=10.0).batches == ()


def test_a_catapult_searches_on_several_batches():
    x, losses = batches(5.0, 4.0, 6.0)
    opts = [fw.SGD([x], lr=0.1), fw.SGD([x], lr=0.1)]
    first, second = (PersistentCatapult(opt, target=1e6, start=1e-3) for opt in opts)
    assert first.last_search is None
    rate = first.step(1.0, losses)
    assert rate == second.step(1.0, lambda: sum(loss() for loss in losses) / 3)
    assert (first.last_search.value, len(first.last_search.batches)) == (rate, 3)
    assert first.forwards == first.last_search.forwards > second.forwards
    assert math.isnan(second.last_search.err_batch)


def test_batches_that_do_not_fit_are_named():
    x, losses = batches(5.0)
    opt = fw.SGD([x], lr=1e-2)
    searches = {
        "critical_lr": lambda each: critical_lr(each, opt),
        "initial_lr": lambda each: initial_lr(each, opt, target=1.0),
        "PersistentCatapult": lambda each: PersistentCatapult(opt, target=1.0).step(1.0, each),
    }
    for name, search in searches.items():
        with pytest.raises(ValueError, match=f"{name}: loss_fn must hold at least one closure, got"):
            search([])
        with pytest.raises(TypeError, match=rf"{name}: loss_fn\[1\] must be a function"):
            search([losses[0], 3.0])
        with pytest.raises(TypeError, match=f"{name}: loss_fn must be a function"):
            search(3.0)


def test_critical_rate_without_one():
    x, _, loss = diagonal((1.0, 1.0, 1.0))
    opt = fw.SGD([x], lr=0.1, momentum=0.9)
    loss().backward()
    opt.step()
    opt.state[x]["momentum_buffer"].fill_(-100.0)
    opt.zero_grad()
    loss().backward()
    found = critical_lr(loss, opt)
    assert math.isnan(found.value)
    assert found.flags == ("ascent",)
    linear = critical_lr(lambda: x.sum(), fw.SGD([x], lr=0.1), use_grad=False)
    assert math.isnan(linear.value)
    assert (linear.hi, linear.flags) == (math.inf, ("no_increase",))
    assert critical_lr(lambda: loss() * math.nan, fw.SGD([x])).flags == ("nonfinite",)
    x, _, loss = diagonal((1.0, 1.0, 1.0))
    walled = critical_lr(lambda: loss() if x[0].detach() > 0.5 else loss() * math.nan, fw.SGD([x], lr=1e-3))
    assert walled.lo <= 0.05 <= walled.hi
    assert walled.hi <= walled.lo * 16 / 15 + 1e-12


def test_saved_and_reached_steps():
    """Reached and saved steps add up to the warmup, and ``parallel_warmup`` takes the former."""
    assert reach_steps(100, 0.25, 1.0) == 75.0
    assert saved_steps(100, 0.25, 1.0) == 25.0
    assert saved_steps(100, 0.25, 1.0, forwards=12) == 19.0
    assert reach_steps(100, 2.0, 1.0) == 1.0
    for steps, start in (
        (10, 0.0),
        (10, 0.25),
        (7, 0.5),
        (64, 0.1152 / 1.2433),
        (5, 1.0),
        (1, 0.0),
        (3, 2.0),
    ):
        ramp = schedules.parallel_warmup(steps, start)
        expected = [min(1.0, start + (t + 1) / steps) for t in range(2 * steps)]
        assert ramp.values(2 * steps).tolist() == pytest.approx(expected, abs=1e-15)
        assert schedules.from_json(ramp.to_json()) == ramp
    full = schedules.parallel_warmup(20, 0.3).values(30)
    assert (full < 1.0).sum() == reach_steps(20, 0.3, 1.0) - 1
    assert schedules.parallel_warmup(10, 0.0).values(12).tolist() == pytest.approx(
        schedules.warmup(10).values(12).tolist()
    )


def train_catapult(steps, resume_at=None):
    model, loss, _ = problem(0)
    opt = fw.SGD(model.parameters(), lr=1.0)
    catapult = PersistentCatapult(opt, target=1.2)
    rates, losses, best, jumps = [], [], math.inf, []
    for step in range(steps):
        if step == resume_at:
            saved = catapult.state_dict()
            catapult = PersistentCatapult(opt, target=1.0, start=0.5)
            catapult.load_state_dict(saved)
        opt.zero_grad()
        value = loss()
        value.backward()
        before = catapult.lr
        rates.append(catapult.step(value, loss))
        if rates[-1] > before:
            jumps.append(value.item() < best)
            best = min(best, value.item())
        assert opt.param_groups[0]["lr"] == rates[-1]
        opt.step()
        losses.append(value.item())
    return rates, losses, jumps, catapult, [p.detach() for p in model.parameters()]


def test_persistent_catapult():
    """The rate never falls, ends exactly at the target, and jumps only below the lowest loss so far."""
    rates, _, jumps, catapult, params = train_catapult(25)
    assert all(b >= a for a, b in itertools.pairwise(rates))
    assert rates[-1] == 1.2
    assert catapult.done
    assert len(set(rates)) >= 3
    assert all(jumps)
    searches = catapult.searches
    forwards = catapult.forwards
    assert forwards >= 2 * searches
    again = train_catapult(25, resume_at=3)
    assert again[0] == rates
    for a, b in zip(params, again[4], strict=True):
        assert_same_bits("params", a, b)


def test_errors():
    x, _, loss = diagonal((1.0, 1.0, 1.0))
    opt = fw.SGD([x], lr=0.1)
    with pytest.raises(ValueError, match=r"initial_lr: start must be finite and > 0, got 0\.0"):
        initial_lr(loss, opt, start=0.0, target=1.0)
    with pytest.raises(ValueError, match=r"initial_lr: target must be finite and >= 0\.0001, got 1e-05"):
        initial_lr(loss, opt, target=1e-5)
    with pytest.raises(ValueError, match=r"critical_lr: previous must be finite and > 0, got -1\.0"):
        critical_lr(loss, opt, previous=-1.0)
    with pytest.raises(ValueError, match="PersistentCatapult: schedule must be None"):
        PersistentCatapult(fw.SGD([x], schedule=schedules.warmup(3)), 1.0)
    catapult = PersistentCatapult(opt, 1.0)
    with pytest.raises(ValueError, match=r"PersistentCatapult: state_dict must have the keys best"):
        catapult.load_state_dict({k: v for k, v in catapult.state_dict().items() if k != "best"})
    with pytest.raises(ValueError, match=r"state_dict\['version'\] must be 1, got 2"):
        catapult.load_state_dict({**catapult.state_dict(), "version": 2})
    with pytest.raises(ValueError, match=r"parallel_warmup: steps must be >= 0, got -1"):
        schedules.parallel_warmup(-1, 0.5)
    with pytest.raises(AttributeError, match="has no attribute 'Sharpness'"):
        _ = fw.Sharpness
