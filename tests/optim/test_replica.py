"""The findings of Kalra & Barkeshli on digits, small enough for a test: fixed seeds, margins stated.

1000 digits, standardised each, 64-128-128-128-10 ReLU, half the mean squared error, float64, full batch.
"""

import functools
import itertools
import math

import pytest
import torch

import fused_warmup as fw
from fused_warmup import schedules
from fused_warmup.sharpness import preconditioned, threshold, top_eigenvalue
from fused_warmup.tuning import PersistentCatapult, initial_lr

datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def float64(seed_and_threads):
    torch.set_num_threads(1)


@functools.cache
def digits():
    import numpy as np

    data = datasets.load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    x = torch.tensor(data.data[order], dtype=torch.float64)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
    y = torch.nn.functional.one_hot(torch.tensor(data.target[order]), 10).double()
    return x, y


def problem(seed):
    """Model, loss on the rows of an index, all 1000 by default, and accuracy on the 797 others."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (64, 128, 128, 128, 10)
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layer = torch.nn.Linear(a, b, dtype=torch.float64)
        with torch.no_grad():
            # standard parameterisation: variance 2 / fan-in, 1 / fan-in at the end, cut off at two deviations
            std = math.sqrt((2.0 if i < 3 else 1.0) / a) / 0.87962566
            torch.nn.init.trunc_normal_(layer.weight, 0.0, std, -2 * std, 2 * std, generator=generator)
            layer.bias.zero_()
        layers += [layer, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    x, y = digits()

    def loss(index=slice(0, 1000)):
        return 0.5 * (model(x[index]) - y[index]).square().mean()

    def accuracy():
        with torch.no_grad():
            return (model(x[1000:]).argmax(1) == y[1000:].argmax(1)).double().mean().item()

    return model, loss, accuracy


@pytest.mark.parametrize("seed", [0, 1])
def test_first_preconditioned_sharpness_of_giadam(seed):
    """GIAdam over Adam: sqrt(1 - beta2) within 1e-4 for eps of 1e-12, whatever the model."""
    model, loss, _ = problem(seed)
    found = {}
    loss().backward()
    for cls in (fw.Adam, fw.GIAdam):
        opt = cls(model.parameters(), lr=1e-3, eps=1e-12)
        found[cls] = preconditioned(loss, opt, iterations=30, method="autograd")
    ratio = found[fw.GIAdam].value.item() / found[fw.Adam].value.item()
    print(
        f"seed {seed}: {found[fw.Adam].value.item():.4g}, {found[fw.GIAdam].value.item():.4g}, ratio {ratio:.7f}"
    )
    assert ratio == pytest.approx(math.sqrt(1 - 0.999), rel=1e-4)


def descend(model, loss, steps, lr, schedule):
    opt = fw.SGD(model.parameters(), lr=lr, schedule=schedule)
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        value = loss()
        value.backward()
        opt.step()
        losses.append(value.item())
        if not losses[-1] < 1e6 * losses[0]:
            break
    return torch.tensor(losses) / losses[0]


@pytest.mark.parametrize("seed", [0, 3])
def test_warmup_and_persistent_catapult_at_32_over_the_sharpness(seed):
    """GD at 32 / lambda_0: diverges at once, survives 64 steps of warmup with a loss peak above 3, and gets there
    by persistent catapult with a peak below 1.3 and sooner. Of seeds 0 to 5 these two have such a peak (4.4, 6.1);
    the others stay at 1.1 to 2.4, and the catapult at 1.00 to 1.11 with all six."""
    model, loss, _ = problem(seed)
    sharpness = top_eigenvalue(loss, model.parameters(), iterations=15).value.item()
    target = 32 / sharpness
    without = descend(model, loss, 20, target, None)
    assert without[-1] > 1e6 or without.isnan().any()

    model, loss, accuracy = problem(seed)
    warm = descend(model, loss, 120, target, schedules.warmup(64))
    assert warm.max() > 3.0
    assert warm[-1] < 0.5
    assert accuracy() > 0.9

    model, loss, accuracy = problem(seed)
    opt = fw.SGD(model.parameters(), lr=1.0)
    catapult = PersistentCatapult(opt, target)
    losses, reached = [], None
    for step in range(100):
        opt.zero_grad()
        value = loss()
        value.backward()
        catapult.step(value, loss)
        if catapult.done and reached is None:
            reached = step
        opt.step()
        losses.append(value.item())
    peak = max(losses[1:]) / losses[0]
    print(f"lambda_0 {sharpness:.2f}, linear peak {warm.max():.2f}, catapult peak {peak:.3f} at step {reached}, "
          f"{catapult.forwards} forwards, {catapult.searches} searches")  # fmt: skip
    assert peak < 1.3
    assert reached is not None
    assert reached < 64
    assert accuracy() > 0.9


def test_critical_rate_is_above_that_of_the_sharpness():
    """eta_c times lambda / 2 is 1.4 to 3: the gradient is not the top vector (14 or 15 evaluations)."""
    model, loss, _ = problem(1)
    loss().backward()
    opt = fw.SGD(model.parameters(), lr=1.0)
    found = initial_lr(loss, opt, target=32.0)
    product = found.value * top_eigenvalue(loss, model.parameters(), iterations=15).value.item() / 2
    print(f"eta_c lambda / 2 = {product:.2f} after {found.forwards} evaluations")
    assert 1.0 < product < 4.0
    assert 10 <= found.forwards <= 20


@pytest.mark.parametrize(("cls", "trains"), [(fw.Adam, False), (fw.GIAdam, True), (fw.RAdam, True)])
def test_without_warmup_at_a_rate_of_a_tenth(cls, trains):
    """Adam ends at the constant predictor, loss 0.045; GIAdam and RAdam train. Batches of 128, 250 steps."""
    model, loss, accuracy = problem(0)
    opt = cls(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        opt.zero_grad()
        loss(torch.randint(1000, (128,), generator=generator)).backward()
        opt.step()
    with torch.no_grad():
        final = loss().item()
    print(f"{cls.__name__}: loss {final:.4f}, accuracy {accuracy():.3f}")
    assert (accuracy() > 0.85) == trains
    assert (final < 0.03) == trains
    if not trains:
        assert accuracy() < 0.4


@pytest.mark.parametrize("seed", [0, 1])
def test_without_warmup_at_three_hundredths(seed):
    """Adam's loss first rises more than 50 times (239 and 107), and it lags after 120 steps; theirs never rises by 5 %."""
    peaks, ends = {}, {}
    for cls in (fw.Adam, fw.GIAdam, fw.RAdam):
        model, loss, accuracy = problem(seed)
        opt = cls(model.parameters(), lr=0.03)
        generator = torch.Generator().manual_seed(seed)
        losses = []
        for _ in range(120):
            opt.zero_grad()
            value = loss(torch.randint(1000, (128,), generator=generator))
            value.backward()
            opt.step()
            losses.append(value.item())
        peaks[cls], ends[cls] = max(losses) / losses[0], accuracy()
    print(f"seed {seed}: peaks {list(peaks.values())}, accuracies {list(ends.values())}")
    assert peaks[fw.Adam] > 50.0
    assert max(peaks[fw.GIAdam], peaks[fw.RAdam]) < 1.05
    assert min(ends[fw.GIAdam], ends[fw.RAdam]) > ends[fw.Adam] + 0.03


def test_edge_of_stability():
    """GD at 32 / lambda_0 with warmup: the sharpness comes down 16 times and stays near its threshold."""
    model, loss, _ = problem(0)
    target = 32 / top_eigenvalue(loss, model.parameters(), iterations=15).value.item()
    opt = fw.SGD(model.parameters(), lr=target, schedule=schedules.warmup(64))
    probe = fw.SharpnessProbe(opt, loss, every=25)
    for _ in range(301):
        opt.zero_grad()
        loss().backward()
        probe.measure()
        opt.step()
    readings = []
    while (reading := probe.poll()) is not None:
        readings.append(reading.asdict())
    print([f"{r['step']}: {r['edge_ratio']:.2f}" for r in readings])
    assert readings[0]["edge_ratio"] == pytest.approx(16 / 64, rel=0.02)
    assert threshold(opt) == pytest.approx(2 / target)
    assert all(0.9 < r["edge_ratio"] < 1.1 for r in readings[-6:])
