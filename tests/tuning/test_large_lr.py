"""Large learning rates: angles, barriers, training on a sphere, the protocol, the regimes, and the tick task."""

import copy
import math
import re

import pytest
import torch
from cases import assert_same_bits
from torch import nn
from torch.optim.swa_utils import update_bn

import fused_warmup as fw
from benchmarks.large_lr import chosen, sides
from benchmarks.tick import MARGIN, Batch, boundary_features, draw, draw_features, draw_single, normalised
from fused_warmup.tuning import (
    Trial,
    angular_distance,
    average_states,
    find_regimes,
    frequency_bands,
    linear_barrier,
    pretrain_finetune,
    relative_rate,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# angles


def test_angles():
    """Independent of positive factors; small angles to all their digits, which arccos loses below 1e-8."""
    w = torch.randn(50)
    assert angular_distance([w], [3.7 * w]) < 1e-7
    assert angular_distance([w], [-0.2 * w]) == pytest.approx(math.pi, abs=1e-7)
    x, y = torch.eye(2, dtype=torch.float64)
    assert angular_distance([x], [y]) == pytest.approx(math.pi / 2, rel=1e-15)
    for angle in (1e-12, 1e-6, 0.5, 3.0):
        turned = 5.0 * (math.cos(angle) * x + math.sin(angle) * y)
        assert angular_distance([x], [turned]) == pytest.approx(angle, rel=1e-3 if angle < 1e-9 else 1e-9)
    assert math.isnan(angular_distance([x], [0 * x]))
    # all tensors together are one direction
    assert angular_distance([x, y], [x, -y]) == pytest.approx(math.pi / 2)


def test_angles_between_models():
    a = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    b = copy.deepcopy(a)
    b[1].running_mean.add_(5.0)
    for p in a[2].parameters():
        p.requires_grad_(False)
    for p in b[2].parameters():
        p.requires_grad_(False).mul_(-1.0)
    # neither statistics nor frozen layers count
    assert angular_distance(a, b) == 0.0
    state = {name: p.detach() for name, p in a.named_parameters()}
    assert angular_distance(state, {name: 2 * p for name, p in state.items()}) < 1e-7
    with pytest.raises(ValueError, match=re.escape("angular_distance: b must have the names")):
        angular_distance(state, {f"other.{name}": p for name, p in state.items()})
    with pytest.raises(
        ValueError, match=re.escape("angular_distance: b must have the shapes [(2,)] of a, got [(3,)]")
    ):
        angular_distance([torch.ones(2)], [torch.ones(3)])
    with pytest.raises(ValueError, match=re.escape("angular_distance: a must hold weights, got 'none'.")):
        angular_distance([], [])


# means and barriers


def test_means_of_states():
    """Equal states give themselves bit for bit, two states their mean in double precision."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    state = model.state_dict()
    for name, value in average_states([state] * 3).items():
        assert_same_bits(name, value, state[name])
    other = {name: t + 2 for name, t in state.items()}
    mean = average_states([state, other])
    for name, value in mean.items():
        expected = (state[name].double() + other[name].double()) / 2
        assert_same_bits(
            name, value, (expected if value.is_floating_point() else other[name]).to(value.dtype)
        )
    with pytest.raises(ValueError, match="average_states: states must hold at least one state dict"):
        average_states([])
    with pytest.raises(
        ValueError, match=re.escape("average_states: states[1] must have the names and shapes")
    ):
        average_states([state, nn.Linear(3, 4).state_dict()])


class Point(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([float(x)], dtype=torch.float64))

    def state(self, x):
        return {"x": torch.tensor([float(x)], dtype=torch.float64)}


def test_barriers():
    """None between a solution and itself or along a linear error; the same in both directions."""
    model = Point(0.25)
    error = lambda: 1.0 - abs(model.x.item())  # noqa: E731
    a, b = model.state(-1), model.state(0.5)
    found = linear_barrier(model, a, b, error)
    # the error is 1 at 0, which is two thirds of the way from an end of 0 to one of 0.5
    assert found.value == pytest.approx(
        max(e - 0.5 * x for x, e in zip(found.alphas, found.errors, strict=True))
    )
    assert found.value == pytest.approx(2 / 3, abs=0.04)
    assert (len(found.alphas), found.errors[0], found.errors[-1]) == (21, 0.0, 0.5)
    assert linear_barrier(model, b, a, error).value == pytest.approx(found.value)
    assert linear_barrier(model, a, a, error).value == 0.0
    assert linear_barrier(model, model.state(1), model.state(3), error, points=5).value == pytest.approx(
        0, abs=1e-15
    )
    # an error below the line is no barrier
    assert linear_barrier(model, a, model.state(1), lambda: model.x.item() ** 2).value == 0.0
    assert model.x.item() == 0.25


def test_barriers_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = copy.deepcopy(model.state_dict())
    a = copy.deepcopy(before)
    b = {name: t + 1 for name, t in before.items()}
    seen = []

    def prepare():
        seen.append(int(model[1].num_batches_tracked))
        with torch.no_grad():
            model[0].weight.div_(model[0].weight.norm())

    def error():
        assert model[0].weight.norm().item() == pytest.approx(1.0)
        if len(seen) == 3:
            raise RuntimeError("broken")
        return 0.0

    with pytest.raises(RuntimeError, match="broken"):
        linear_barrier(model, a, b, error, prepare=prepare)
    for name, value in model.state_dict().items():
        assert_same_bits(name, value, before[name])
    assert seen == [0, 0, 0]
    with pytest.raises(ValueError, match="linear_barrier: points must be >= 2, got 1"):
        linear_barrier(model, a, b, error, points=1)
    with pytest.raises(
        ValueError, match=re.escape("linear_barrier: states[1] must have the names and shapes")
    ):
        linear_barrier(model, a, {"x": torch.ones(1)}, error)


def test_statistics_are_measured_again():
    """With ``prepare`` neither barriers nor the final statistics depend on the statistics in the states."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    x = torch.randn(16, 2, dtype=torch.float64)
    a = copy.deepcopy(model.state_dict())
    b = {name: t + 1 for name, t in a.items()}
    stale = [{name: t + 7 if "running" in name else t for name, t in state.items()} for state in (a, b)]

    def error():
        with torch.no_grad():
            return model.eval()(x).square().mean().item()

    prepare = lambda: update_bn([x[:8], x[8:]], model)  # noqa: E731
    fresh = linear_barrier(model, a, b, error, points=5, prepare=prepare)
    assert linear_barrier(model, *stale, error, points=5, prepare=prepare) == fresh
    assert linear_barrier(model, *stale, error, points=5).errors != fresh.errors
    for state in (a, stale[0]):
        model.load_state_dict(state)
        prepare()
        assert torch.allclose(model[1].running_mean, model[0](x).mean(0), rtol=1e-12)


# bands


@pytest.mark.parametrize(
    ("shape", "bounds", "default"),
    [
        ((2, 3, 32, 32), (0, 8, 24), True),
        ((28, 28), (0, 7, 21), True),
        ((9, 14), (0, 2, 8), True),
        ((9, 14), (1, 5), False),
        ((1, 5), (0,), False),
    ],
)
def test_frequency_bands(shape, bounds, default):
    """Bands add up, are idempotent and orthogonal, and equal those by real masks of the centred spectrum."""
    images = torch.randn(shape, dtype=torch.float64)
    bands = frequency_bands(images) if default else frequency_bands(images, bounds)
    assert bands.shape == (len(bounds) + 1, *shape)
    height, width = shape[-2:]
    k, l = torch.arange(height) - height // 2, torch.arange(width) - width // 2  # noqa: E741
    distance = k.abs()[:, None] + l.abs()
    centred = torch.fft.fftshift(torch.fft.fft2(images), (-2, -1))
    for band, low, high in zip(bands, (-1, *bounds), (*bounds, height + width), strict=True):
        mask = (distance > low) & (distance <= high)
        assert mask.any()
        expected = torch.fft.ifft2(torch.fft.ifftshift(centred * mask, (-2, -1)))
        assert expected.imag.abs().max() < 1e-12
        assert torch.allclose(band, expected.real, rtol=0, atol=1e-12)
    assert torch.allclose(bands.sum(0), images, rtol=0, atol=1e-12)
    for i, band in enumerate(bands):
        again = frequency_bands(band, bounds)
        again[i] -= band
        assert again.abs().max() < 1e-12
        for other in bands[:i]:
            assert (band * other).sum((-2, -1)).abs().max() < 1e-10
    energies = bands.square().sum((0, -2, -1))
    assert torch.allclose(energies, images.square().sum((-2, -1)), rtol=1e-12)


def test_frequency_bands_of_waves():
    """A wave of k periods down and l across lies in the band of k + l; dtypes are kept, gradients flow."""
    places = torch.arange(32, dtype=torch.float64) * (2 * math.pi / 32)
    for k, l, i in ((0, 0, 0), (0, 1, 1), (4, 4, 1), (5, 4, 2), (16, 8, 2), (9, 16, 3), (16, 16, 3)):  # noqa: E741
        wave = torch.cos(k * places[:, None] + l * places)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            bands = frequency_bands(wave.to(dtype))
            assert bands.dtype == dtype
            sizes = bands.float().abs().amax((-2, -1))
            assert sizes[i] == pytest.approx(1.0, abs=1e-2)
            assert sizes.sum() - sizes[i] < (1e-5 if dtype == torch.float32 else 5e-2)
    images = torch.randn(3, 8, 8, requires_grad=True)
    frequency_bands(images).sum().backward()
    assert torch.allclose(images.grad, torch.ones(3, 8, 8), atol=1e-5)


@pytest.mark.parametrize(
    ("images", "bounds", "error", "message"),
    [
        (torch.ones(4, 4, dtype=torch.uint8), None, TypeError, "images must be a floating-point tensor, got torch.uint8."),
        ([1.0], None, TypeError, "images must be a floating-point tensor, got <class 'list'>."),
        (torch.ones(4), None, ValueError, "images must have the shape [..., height, width], got (4,)."),
        (torch.ones(4, 0), None, ValueError, "images must have the shape [..., height, width], got (4, 0)."),
        (torch.ones(8, 8), (0, 3, 3), ValueError, "bounds must rise, got [0, 3, 3]."),
        (torch.ones(8, 8), (-1, 3), ValueError, "bounds[0] must be >= 0, got -1."),
        (torch.ones(8, 8), (0.5,), TypeError, "bounds[0] must be an integer, got 0.5."),
        (torch.ones(2, 2), None, ValueError, "bounds must rise, got [0, 0, 1]."),
    ],
)  # fmt: skip
def test_bad_bands(images, bounds, error, message):
    with pytest.raises(error, match=re.escape(f"frequency_bands: {message}")):
        frequency_bands(images, bounds)


# scale-invariant weights, projected to their sphere by the loop


class Invariant(nn.Module):
    """Two scale-invariant layers and a frozen one, float64."""

    def __init__(self, rho, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        w = [make(8, 6), make(8, 8)]
        norm = math.sqrt(sum(float(t.square().sum()) for t in w))
        self.hidden = nn.ParameterList(nn.Parameter(rho * t / norm) for t in w)
        self.last = nn.Parameter(make(1, 8), requires_grad=False)
        self.x, self.y = make(32, 6), make(32, 1)

    def loss(self):
        h = self.x
        for w in self.hidden:
            h = nn.functional.layer_norm(h @ w.T, (8,), eps=0.0).relu()
        return (h @ self.last.T - self.y).square().mean()

    def norm(self):
        return math.sqrt(sum(float(w.detach().square().sum()) for w in self.hidden))


def descend(rho, rate, steps, project=True):
    """Descend at the effective rate ``rate``; return the model and weights, gradients and norm of each step."""
    model = Invariant(rho)
    opt = fw.SGD(model.hidden, lr=rate * rho**2)
    rows = []
    for _ in range(steps):
        opt.zero_grad()
        model.loss().backward()
        gradients = [w.grad.clone() for w in model.hidden]
        before = [w.detach().clone() for w in model.hidden]
        opt.step()
        raw = model.norm()
        if project:
            with torch.no_grad():
                for w in model.hidden:
                    w.mul_(rho / raw)
        rows.append((before, gradients, raw))
    return model, rows


def test_direction_does_not_depend_on_the_norm():
    """At a stable rate the trajectories of norms 1 and 28 have the same directions; the frozen layer stays."""
    small, _ = descend(1.0, 0.03, 30)
    large, _ = descend(28.0, 0.03, 30)
    assert angular_distance(small, large) < 1e-12
    assert small.norm() == pytest.approx(1.0, abs=1e-14)
    assert large.norm() == pytest.approx(28.0, abs=28e-14)
    assert_same_bits("last", small.last, Invariant(1.0).last)
    assert relative_rate(0.03 * 28.0**2, large.hidden) == pytest.approx(0.03)


@pytest.mark.parametrize("rho", [1.0, 28.0])
def test_angle_of_a_step(rho):
    """arctan(effective rate * |gradient on the unit sphere|), with a gradient orthogonal to the weights."""
    model, rows = descend(rho, 0.3, 10)
    ends = [before for before, _, _ in rows[1:]] + [[w.detach() for w in model.hidden]]
    for (before, gradients, raw), after in zip(rows, ends, strict=True):
        size = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        product = sum(float((g * w).sum()) for g, w in zip(gradients, before, strict=True))
        assert abs(product) < 1e-10 * size * rho
        assert angular_distance(before, after) == pytest.approx(math.atan(0.3 * size * rho), rel=1e-10)
        assert raw**2 == pytest.approx(rho**2 + (0.3 * rho**2 * size) ** 2, rel=1e-12)


def test_without_projection_the_effective_rate_decays():
    """Norms never fall, so that the effective rate does."""
    model, rows = descend(1.0, 0.3, 30, project=False)
    norms = [1.0, *(raw for _, _, raw in rows)]
    assert norms == sorted(norms)
    assert relative_rate(0.3, model.hidden) < 0.9 * 0.3


# the protocol


class Ball:
    """A point that moves by minus the rate in each epoch, and a log of the rates."""

    def __init__(self):
        self.model = Point(10.0)
        self.log = []

    def make_optimizer(self, lr):
        self.log.append(lr)
        return fw.SGD([self.model.x], lr=lr)

    def run_epoch(self, optimizer):
        self.model.x.grad = torch.ones_like(self.model.x)
        optimizer.step()
        return self.model.x.item()

    def go(self, **options):
        goal = options.pop("goal", 5.5)
        evaluate = lambda: -abs(self.model.x.item() - goal)  # noqa: E731
        return pretrain_finetune(
            self.model, self.make_optimizer, self.run_epoch, evaluate, **{"lr": 1.0, "epochs": 4, **options}
        )


def test_protocol():
    """Pre-training ends at 6, averages its last two epochs and is fine-tuned; the model is left in the best state."""
    ball = Ball()
    found = ball.go(average=2, finetune_lrs=(0.1, 0.5), finetune_epochs=2)
    assert ball.log == [1.0, 0.1, 0.5]
    assert found.losses == (9.0, 8.0, 7.0, 6.0)
    ends = {"pretrained": 6.0, "averaged": 6.5, 0.1: 5.8, 0.5: 5.0}
    assert {key: state["x"].item() for key, state in found.states.items()} == pytest.approx(ends)
    assert found.scores == pytest.approx({key: -abs(x - 5.5) for key, x in ends.items()})
    assert found.best == 0.1
    assert ball.model.x.item() == pytest.approx(5.8)
    assert found.trial == Trial((9.0, 8.0, 7.0, 6.0), (-0.5,), pytest.approx(-0.3), None)


def test_protocol_measures_the_barrier_and_prepares():
    ball = Ball()
    prepared = []
    error = lambda: 1.0 - abs(ball.model.x.item() - 5.4)  # noqa: E731
    found = ball.go(
        average=1, finetune_lrs=(0.1, 0.5), finetune_epochs=2, error=error,
        prepare=lambda: prepared.append(ball.model.x.item()),
    )  # fmt: skip
    assert len(prepared) == 1 + 21
    assert prepared[0] == 6.0
    # from 5.8 to 5.0 over a top at 5.4
    assert found.barrier == pytest.approx(0.4)
    only = Ball().go(average=0, finetune_lrs=(0.1,), error=error)
    assert (only.barrier, sorted(map(str, only.states))) == (None, ["0.1", "pretrained"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "pretrain_finetune: lr must be finite and > 0, got 0.0."),
        ({"epochs": 0}, "pretrain_finetune: epochs must be >= 1, got 0."),
        ({"average": 5}, "pretrain_finetune: average must be <= epochs, which is 4, got 5."),
        (
            {"average": 0},
            "pretrain_finetune: finetune_lrs must hold a rate where nothing is averaged, got ().",
        ),
        (
            {"finetune_lrs": (0.1, -1.0)},
            "pretrain_finetune: finetune_lrs[1] must be finite and > 0, got -1.0.",
        ),
        ({"finetune_epochs": 0}, "pretrain_finetune: finetune_epochs must be >= 1, got 0."),
    ],
)
def test_bad_protocols(options, message):
    ball = Ball()
    with pytest.raises(ValueError, match=re.escape(message)):
        ball.go(**options)
    assert (ball.log, ball.model.x.item()) == ([], 10.0)


# regimes


def trained(lr, threshold=0.0123, divergence=0.7, epochs=40):
    """A synthetic training: slow at small rates, equilibria above the threshold, random guesses at large rates."""
    if lr >= divergence:
        return {"losses": [2.0 + lr] * epochs, "accuracies": [0.1] * epochs, "tuned": 0.2, "barrier": 0.3}
    if lr > threshold:
        near = lr < 4 * threshold
        losses = [max(2.0 * 0.5**i, 0.1 * lr / threshold) for i in range(epochs)]
        return {"losses": losses, "accuracies": [0.6], "tuned": 0.9 if near else 0.7, "barrier": 0.0}
    losses = [2.0 * math.exp(-1e3 * lr * i) for i in range(epochs)]
    return {"losses": losses, "accuracies": [0.7 + lr], "tuned": 0.71 + lr, "barrier": 0.0}


GRID = [10 ** (k / 4) for k in range(-18, 2)]


def test_regimes_of_a_known_training():
    runs = []

    def train(lr):
        runs.append(lr)
        return Trial(**trained(lr)) if len(runs) % 2 else trained(lr)

    found = find_regimes(train, reversed(GRID), chance=0.1)
    low, high = found.threshold
    assert low <= 0.0123 < high < 1.05 * low
    # 16 rates of the grid are below or above; each halving of a quarter decade costs one run
    assert len(runs) == len(GRID) + 4
    regimes = {p.lr: p.regime for p in found.points}
    for lr, regime in regimes.items():
        first = min(x for x in regimes if 2.0 * math.exp(-1e3 * x * 39) < 1e-2)
        expected = (
            "slow"
            if lr < first
            else "1"
            if lr <= 0.0123
            else "3"
            if lr >= 0.7
            else "2A"
            if lr < 0.0492
            else "2B"
        )
        assert regime == expected, lr
    assert "slow" in regimes.values()
    assert found.divergence == min(lr for lr in GRID if lr >= 0.7)
    assert found.window == (high, max(lr for lr in regimes if lr < 0.0492))
    assert found.window[0] <= found.best <= found.window[1]
    one = next(p for p in found.points if p.regime == "1" and p.lr > 0.005)
    assert one.epoch == next(i for i in range(1, 99) if 2.0 * math.exp(-1e3 * one.lr * (i - 1)) < 1e-2)
    two = next(p for p in found.points if p.regime == "2A")
    assert (two.epoch, two.loss) == (None, pytest.approx(0.1 * two.lr / 0.0123))
    assert two.spread == pytest.approx(0.0, abs=1e-12)


def test_regimes_without_fine_tuning():
    """With losses alone regime 2 is not divided, and the window ends at twice the threshold."""
    found = find_regimes(lambda lr: Trial(tuple(trained(lr)["losses"])), GRID)
    assert {p.regime for p in found.points} == {"slow", "1", "2", "3"}
    assert found.best is None
    assert found.window == (found.threshold[1], pytest.approx(2 * found.threshold[1]))
    assert all(math.isnan(p.accuracy) for p in found.points)


def test_a_barrier_or_a_lower_accuracy_make_2b():
    high = lambda lr: {**trained(lr), "barrier": 0.011} if lr > 0.02 else trained(lr)  # noqa: E731
    found = find_regimes(high, GRID, chance=0.1)
    assert all((p.regime == "2A") == (p.lr < 0.02) for p in found.points if p.regime in ("2A", "2B"))


def test_losses_that_are_not_finite_diverge():
    train = lambda lr: Trial((1.0, math.nan if lr > 0.1 else 0.0 if lr < 0.01 else 0.5))  # noqa: E731
    found = find_regimes(train, [1e-3, 1e-2, 0.05, 1.0], max_runs=0)
    assert [p.regime for p in found.points] == ["1", "2", "2", "3"]
    assert (found.threshold, found.divergence) == ((1e-3, 1e-2), 1.0)
    assert math.isnan(found.points[-1].loss)


def test_ranges_without_a_threshold():
    all_converge = find_regimes(lambda lr: Trial((1.0, 0.0)), [1e-3, 1e-2])
    assert (all_converge.threshold, all_converge.window) == ((1e-2, math.inf), None)
    none = find_regimes(lambda lr: Trial((1.0, 0.5)), [1e-3, 1e-2])
    assert (none.threshold, none.window, {p.regime for p in none.points}) == ((0.0, 1e-3), None, {"2"})
    # a rate above the threshold that converges by luck does not move it
    lucky = find_regimes(lambda lr: Trial((1.0, 0.0 if lr != 0.1 else 0.5)), [0.01, 0.1, 0.2], max_runs=0)
    assert lucky.threshold == (0.01, 0.1)


def test_regimes_are_drawn():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = find_regimes(trained, GRID, chance=0.1)
    ax = found.plot()
    drawn = {line.get_label(): line.get_xdata() for line in ax.lines}
    assert set(drawn) == {f"regime {name}" for name in ("slow", "1", "2A", "2B", "3")}
    assert sum(map(len, drawn.values())) == len(found.points)
    assert [line.get_label() for line in ax.figure.axes[1].lines] == [
        "accuracy",
        "accuracy, fine-tuned or averaged",
    ]
    assert found.plot(ax) is ax


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrs": [0.1]}, "find_regimes: lrs must hold at least two rates, got [0.1]."),
        ({"lrs": [0.1, 0.0]}, "find_regimes: lrs[1] must be finite and > 0, got 0.0."),
        ({"converged_loss": -1.0}, "find_regimes: converged_loss must be finite and > 0, got -1.0."),
        ({"chance": 1.0}, "find_regimes: chance must lie in (0, 1), got 1.0."),
        ({"precision": 1.0}, "find_regimes: precision must be finite and > 1, got 1.0."),
        ({"max_runs": -1}, "find_regimes: max_runs must be >= 0, got -1."),
    ],
)
def test_bad_searches(options, message):
    def train(lr):
        raise AssertionError

    with pytest.raises(ValueError, match=re.escape(message)):
        find_regimes(train, **{"lrs": [0.1, 0.2], **options})


def test_bad_trainings():
    with pytest.raises(
        TypeError, match=re.escape("find_regimes: train must return a Trial or a mapping, got 1.0.")
    ):
        find_regimes(lambda lr: 1.0, [0.1, 0.2])
    with pytest.raises(TypeError, match="train must return the fields of a Trial, got \\['loss'\\]"):
        find_regimes(lambda lr: {"loss": 1.0}, [0.1, 0.2])
    with pytest.raises(ValueError, match="losses must hold the loss of each epoch"):
        find_regimes(lambda lr: Trial(()), [0.1, 0.2])


# the tick task


def test_ticks():
    """Each feature determines the class; points on the boundary belong to none."""
    generator = torch.Generator().manual_seed(0)
    x, y = draw(2000, generator)
    assert abs(y.mean() - 0.5) < 0.05
    assert x.abs().max() <= 2
    for k in range(16):
        first, second = x[:, 2 * k].abs(), x[:, 2 * k + 1]
        # class 1 is above the roof, or below its copy two steps down
        rule = (second > first) | (second < first - 2)
        assert torch.equal(rule, y > 0.5)
        gap = torch.minimum((second - first).abs(), (second - first + 2).abs())
        assert gap.min() >= MARGIN - 1e-6
    other = boundary_features(2000, generator)
    gap = torch.minimum((other[:, 1] - other[:, 0].abs()).abs(), (other[:, 1] - other[:, 0].abs() + 2).abs())
    assert gap.max() < 1e-6
    assert draw_features(y.long(), generator).shape == (2000, 2)


def test_ticks_of_which_one_tells_the_class():
    """The rule of that feature is always right; any function of another one is right half of the time."""
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 20))
    for k in (0, 7, 15):
        x, y = draw_single(k, 4000, generator)
        for i in range(16):
            first, second = x[:, 2 * i].abs(), x[:, 2 * i + 1]
            rule = (second > first) | (second < first - 2)
            if i == k:
                assert torch.equal(rule, y > 0.5)
            else:
                answers = torch.cat([net(x[:, 2 * i : 2 * i + 2]) > 0, rule[:, None], second[:, None] > 0], 1)
                right = (answers == (y[:, None] > 0.5)).float().mean(0)
                # five standard errors
                assert (right - 0.5).abs().max() < 5 * 0.5 / 4000**0.5
    # a model that uses feature 2 only
    batch = Batch([0], [0.1])
    is_above = lambda x: (x[..., 5] > x[..., 4].abs()) | (x[..., 5] < x[..., 4].abs() - 2)  # noqa: E731
    batch.logits = lambda weights, x: 2.0 * is_above(x)[None] - 1.0
    single = batch.single_accuracies(batch.weights).flatten()
    assert single[2] == 1.0
    assert (single[[i for i in range(16) if i != 2]] - 0.5).abs().max() < 0.08


@pytest.mark.slow
def test_signatures_of_the_regimes():
    """Three seeds, 9600 steps, fine-tuning for 1600: convergence at 3.16e-3 and below, equilibria whose loss grows with
    the rate, random guesses at 0.1; fine-tuning stays in its basin only after regime 1."""
    rates = [1e-3, 3.16e-3, 1.33e-2, 2.37e-2, 1e-1]
    batch = Batch([0, 1, 2], rates)
    weights, losses, _ = batch.train(batch.weights, batch.rates, 9600, seed=0)
    ends = losses[-30:].mean(0).view(3, 5)
    converged = (losses < 1e-2).any(0).view(3, 5)
    assert converged.tolist() == [[True, True, False, False, False]] * 3
    assert (ends[:, 3:] > ends[:, 2:-1]).all()
    accuracy = batch.accuracy(weights)
    assert ((accuracy[:, 4] - 0.5).abs() < 0.05).all()
    low, high = (
        batch.train(weights, torch.full_like(batch.rates, r), 1600, seed=1)[0] for r in (3.16e-5, 7.5e-3)
    )

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 32, 32))

    model = One()
    for k in range(15):
        angle = angular_distance([low[k]], [high[k]])

        def error(k=k):
            repeated = model.w.detach()[None].expand(15, -1, -1, -1)
            return 1.0 - batch.accuracy(repeated, batch.x, batch.y).flatten()[k].item()

        def prepare():
            model.w.data = normalised(model.w.data[None])[0]

        barrier = linear_barrier(
            model, {"w": low[k]}, {"w": high[k]}, error, points=11, prepare=prepare
        ).value
        print(f"seed {k // 5}, rate {rates[k % 5]:g}: loss {ends.flatten()[k]:.4f}, accuracy "
              f"{accuracy.flatten()[k]:.3f}, angle {angle:.3f}, barrier {barrier:.4f}")  # fmt: skip
        if k % 5 < 2:
            assert angle < 0.2
            assert barrier < 0.01
        if k % 5 == 4:
            assert angle > 1.0


def test_rates_are_chosen_on_held_out_data():
    """The benchmark's rule: the best held-out score among the allowed rates, whatever the test score."""
    converged = torch.tensor([[True, True, False, False], [True, False, True, False]])
    below, above = sides((1.0, 2.0, 3.0, 5.0), converged)
    assert below.tolist() == converged.tolist()
    assert above.tolist() == [[False, False, True, False], [False, False, False, True]]
    # of two ends, two seeds and four rates
    valid = torch.tensor([
        [[0.1, 0.2, 0.9, 0.3], [0.5, 0.9, 0.4, 0.1]],
        [[0.1, 0.4, 0.8, 0.7], [0.6, 0.9, 0.2, 0.3]],
    ])
    test = torch.arange(16.0).view(2, 2, 4)
    assert chosen(valid, test, below).tolist() == [9.0, 12.0]
    assert chosen(valid, test, above).tolist() == [2.0, 15.0]
    assert chosen(valid[1:], test[1:], above).tolist() == [10.0, 15.0]
