"""Norms of gradients of any magnitude, against exact sums, from the pass that measures and from the update."""

import math

import pytest
import torch
from cases import BACKENDS

import fused_warmup as fw

# what the pairs of csrc/reduce.h promise for the 2,048 terms that a thread adds at most
L2_SQ_RTOL = 2.0**-27
# sixteen magnitudes of a lane are added in float32
L1_RTOL = 16 * 2.0**-24
# the square of this number lies half way between two floats, so that its rounding error is as large as any
HALF_WAY = 4097 / 4096


def scattered(low, high, n=40_000):
    """Powers of two between two exponents, in no order."""
    exponents = torch.linspace(low, high, n, dtype=torch.float64)
    return torch.exp2(exponents[torch.randperm(n, generator=torch.Generator().manual_seed(0))]).float()


def growing():
    """For each of 128 threads numbers whose squares are larger than the sum of all before."""
    numbers = torch.zeros(32, 128, 4)
    numbers[..., 0] = 1.3 * 5.0 ** torch.arange(-16.0, 16.0)[:, None]
    return numbers.flatten()


def gradients():
    """Gradients by name; the limits of fits_pair and fits_pairs are among them."""
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    return {
        "normal": normal,
        "equal": torch.full((100_000,), HALF_WAY / 128),
        "large first": torch.cat([torch.full((2048,), 1e3), torch.full((60_000,), 0.1 * HALF_WAY)]),
        "one large": torch.cat([torch.full((9000,), 1e-3), torch.tensor([1e18]), torch.full((9000,), 1e-3)]),
        "each larger than all before": growing(),
        "below the range": torch.full((40_000,), 1e-20),
        "above the range": torch.full((40_000,), 1e30),
        "the largest": torch.full((40_000,), 3e38),
        "around the lower limit of a pack": scattered(-46, -36),
        "around the lower limit of a chunk": scattered(-60, -44),
        "around the upper limit": scattered(44, 64),
        "everything": scattered(-120, 100),
        "a few below the range": torch.where(torch.arange(40_000) % 1000 == 0, 1e-22, 0.0),
        "zeros": torch.zeros(5000),
        "bfloat16": normal.bfloat16(),
        "float16": (normal.abs() + 2.0**-10).half(),
        "float64": normal.double() * 1e-120,
    }


GRADIENTS = gradients()
DENORMAL = torch.full((5000,), 1e-40)
each_gradient = pytest.mark.parametrize("name", GRADIENTS)


def norms_of(make, grad, backend, **options):
    """L2 and L1 norm that a step records."""
    param = torch.nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    opt = make([param], lr=1e-30, backend=backend, **options)
    opt.step()
    line = opt.telemetry.latest()
    return line["grad_norm"], line["grad_norm_l1"]


def assert_exact(norms, grad):
    """Compare the norms of a step with the sums of the exact terms."""
    numbers = grad.double().tolist()
    l2_sq, l1 = math.fsum(x * x for x in numbers), math.fsum(map(abs, numbers))
    assert norms[0] ** 2 == pytest.approx(l2_sq, rel=L2_SQ_RTOL + 2.0**-50, abs=0.0)
    assert norms[1] == pytest.approx(l1, rel=L1_RTOL, abs=0.0)


def check_norms(name, backend):
    """Both passes give the exact norms, and the same bits."""
    grad = GRADIENTS[name]
    of_update = norms_of(fw.SGD, grad, backend)
    assert_exact(of_update, grad)
    assert norms_of(fw.SGD, grad, backend, max_grad_norm=1e300) == of_update
    assert_exact(norms_of(fw.LAMB, grad, backend), grad)


@each_gradient
@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_every_magnitude(name, backend):
    check_norms(name, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_denormal_numbers(backend):
    for make in (fw.SGD, fw.LAMB):
        assert_exact(norms_of(make, DENORMAL, backend), DENORMAL)


def check_flushed(backend):
    """Norms of normal numbers whose squares are flushed to zero, if the processor can do so."""
    if not torch.set_flush_denormal(True):
        return
    try:
        made = {name: norms_of(fw.SGD, GRADIENTS[name], backend) for name in GRADIENTS}
    finally:
        torch.set_flush_denormal(False)
    for name, norms in made.items():
        assert_exact(norms, GRADIENTS[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_where_denormal_numbers_are_flushed_to_zero(backend):
    check_flushed(backend)
