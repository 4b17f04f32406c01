"""Losses with noise from generators of their own, of every kind, and trainings that show what readings do to them."""

import random

import numpy as np
import torch
from cases import assert_same_bits

import fused_warmup as fw

N = 6
H = torch.linspace(0.5, 3.0, N, dtype=torch.float64)
GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(5),
    "Generator": lambda: np.random.default_rng(5),
    "Generator-Philox": lambda: np.random.Generator(np.random.Philox(5)),
    "RandomState": lambda: np.random.RandomState(5),
    "RandomState-PCG64": lambda: np.random.RandomState(np.random.PCG64(5)),
    "BitGenerator": lambda: np.random.PCG64(5),
    "Random": lambda: random.Random(5),
}


def draw(generator):
    """Draw an odd number of normal numbers: some generators cache every second one."""
    if isinstance(generator, torch.Generator):
        return torch.randn(N, dtype=torch.float64, generator=generator)
    if isinstance(generator, random.Random):
        return torch.tensor([generator.gauss(0.0, 1.0) for _ in range(N + 1)][:N], dtype=torch.float64)
    if isinstance(generator, np.random.BitGenerator):
        return torch.tensor((generator.random_raw(N) >> 11).astype(np.float64) / 2.0**53)
    return torch.from_numpy(generator.standard_normal(N + 1)[:N])


def state_of(generator):
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return repr(generator.get_state(legacy=False))
    return repr(getattr(generator, "bit_generator", generator).state)


def noisy(w, z):
    """A loss whose Hessian depends on the noise."""
    return 0.5 * (H * w * w).sum() + 0.5 * (w @ z) ** 2


def in_cell(w, g):
    return lambda: noisy(w, draw(g))


class Trainer:
    def __init__(self, w, g):
        self.w, self.g = w, g

    def __call__(self):
        return noisy(self.w, draw(self.g))

    def loss(self):
        return noisy(self.w, draw(self.g))


def point():
    return torch.linspace(-1.0, 1.0, N, dtype=torch.float64).requires_grad_()


def train(make_loss, generator, with_probe):
    """Train for five steps; return values of the training, the state of the generator, and the readings."""
    w = point()
    loss = make_loss(w, generator)
    opt = fw.Adam([w], lr=1e-2)
    probe = fw.SharpnessProbe(opt, every=2)
    found, readings = [], []
    for _ in range(5):
        opt.zero_grad()
        value = loss()
        value.backward()
        if with_probe:
            probe.measure(loss)
        opt.step()
        found += [value.detach(), w.detach().clone()]
    while (reading := probe.poll()) is not None:
        readings.append(reading)
    return [*found, *opt.state[w].values()], state_of(generator), readings


def assert_untouched(make_loss, kind):
    """Assert that a training with a probe equals one without, bit for bit."""
    (plain, last, none), (probed, after, readings) = (
        train(make_loss, GENERATORS[kind](), on) for on in (False, True)
    )
    assert none == []
    assert len(readings) == 3
    assert after == last
    for a, b in zip(plain, probed, strict=True):
        if isinstance(a, torch.Tensor):
            assert_same_bits("training", b, a)
