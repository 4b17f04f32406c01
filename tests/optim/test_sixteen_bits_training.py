"""Training of bfloat16 parameters: what rounding to nearest loses, and each other mode keeps."""

import pytest
import torch
from torch import nn

import fused_warmup as fw
from fused_warmup.reference.rounding import MODES

SEEDS = (0, 1, 2)
STEPS, BATCH, RATE = 400, 64, 3e-4


def after_1000_unit_gradients(mode, dtype):
    """Return weights that start at 1 after 1,000 steps of SGD at rate 1e-3, float32."""
    w = torch.ones(256, dtype=dtype, requires_grad=True)
    w.grad = torch.ones_like(w)
    opt = fw.SGD([w], lr=1e-3, param_rounding=mode, rounding_seed=1)
    for _ in range(1000):
        opt.step()
    return w.detach().float()


@pytest.mark.parametrize("mode", MODES)
def test_1000_unit_gradients(mode):
    exact = after_1000_unit_gradients("nearest", torch.float32)
    w = after_1000_unit_gradients(mode, torch.bfloat16)
    # a step of 1e-3 is less than half of the distance from 1 to the bfloat16 below it, 2**-8
    if mode == "nearest":
        assert w.eq(1.0).all()
    elif mode == "stochastic":
        # elements differ, and their mean is exact within four standard errors
        assert 0 < w.std() < 0.05
        assert abs((w - exact).mean()) < 4 * w.std() / len(w) ** 0.5
    elif mode == "kahan":
        # no element strays as far as a single step
        assert (w - exact).abs().max() < 1e-3
    else:
        assert w.equal(exact.bfloat16().float())


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    raw = load_digits()
    return torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)


def final_loss(digits, dtype, mode, seed, state_dtype=torch.float32):
    """Train a perceptron from weights that bfloat16 has exactly, and return its loss on all images."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).bfloat16().to(dtype)
    images, labels = digits[0].to(dtype), digits[1]
    opt = fw.AdamW(
        model.parameters(), lr=RATE, param_rounding=mode, state_dtype=state_dtype, rounding_seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        index = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[index]).float(), labels[index])
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(images).float(), labels).item()


@pytest.fixture(scope="module")
def float32_losses(digits):
    return [final_loss(digits, torch.float32, "nearest", seed) for seed in SEEDS]


@pytest.mark.parametrize("mode", MODES)
def test_losses_after_training(digits, float32_losses, mode):
    """Each seed ends within 1 % of its float32 run, but at least a quarter above it with rounding to nearest."""
    losses = [final_loss(digits, torch.bfloat16, mode, seed) for seed in SEEDS]
    ratios = [loss / base for loss, base in zip(losses, float32_losses, strict=True)]
    # the loss of the first step is the logarithm of 10
    assert max(float32_losses) < 1.5
    if mode == "nearest":
        assert min(ratios) > 1.25, ratios
    else:
        assert max(abs(ratio - 1) for ratio in ratios) < 0.01, ratios


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [(torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "split")],
    ids=str,
)
def test_losses_with_moments_of_16_bits(digits, float32_losses, dtype, mode):
    """Each seed ends within 1 % of its float32 run."""
    losses = [final_loss(digits, dtype, mode, seed, torch.bfloat16) for seed in SEEDS]
    ratios = [loss / base for loss, base in zip(losses, float32_losses, strict=True)]
    assert max(abs(ratio - 1) for ratio in ratios) < 0.01, ratios
