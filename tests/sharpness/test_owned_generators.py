"""Readings of losses that own generators: the noise is frozen, and the generators are left as they were."""

import random

import pytest
import torch
from cases import assert_same_bits
from noisy_losses import GENERATORS, H, N, Trainer, assert_untouched, draw, in_cell, noisy, point, state_of

import fused_warmup as fw
from fused_warmup.sharpness import critical_lr, preconditioned, top_eigenvalue
from fused_warmup.tuning import PersistentCatapult, initial_lr

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", GENERATORS)
def test_value_is_that_of_frozen_noise(kind):
    """The largest eigenvalue of diag(h) + z z', for the next numbers z of the generator."""
    z = draw(GENERATORS[kind]())
    exact = torch.linalg.eigvalsh(torch.diag(H) + torch.outer(z, z))[-1].item()
    w, frozen = point(), point()
    generator = GENERATORS[kind]()
    opt, twin = fw.SGD([w], lr=0.1), fw.SGD([frozen], lr=0.1)
    loss, still = in_cell(w, generator), lambda: noisy(frozen, z)
    assert top_eigenvalue(loss, [w], iterations=N).value.item() == pytest.approx(exact, rel=1e-6)
    assert preconditioned(loss, opt, iterations=N).value.item() == pytest.approx(exact, rel=1e-6)
    assert critical_lr(loss, opt) == critical_lr(still, twin)
    assert initial_lr(loss, opt, target=10.0) == initial_lr(still, twin, target=10.0)
    rates = [PersistentCatapult(o, target=10.0).step(1.0, f) for o, f in ((opt, loss), (twin, still))]
    assert rates[0] == rates[1]
    assert state_of(generator) == state_of(GENERATORS[kind]())


@pytest.mark.parametrize("kind", GENERATORS)
def test_noise_in_a_gradient_hook(kind):
    """A hook of a parameter runs in each backward pass; the same noise at both ends cancels."""

    def hooked(w, generator):
        w.register_hook(lambda grad: grad + draw(generator))
        return lambda: noisy(w, torch.ones(N, dtype=torch.float64))

    assert_untouched(hooked, kind)
    w = point()
    exact = torch.linalg.eigvalsh(torch.diag(H) + 1.0)[-1].item()
    found = top_eigenvalue(hooked(w, GENERATORS[kind]()), [w], iterations=N)
    assert found.value.item() == pytest.approx(exact, rel=1e-6)


def test_after_an_exception():
    generator = GENERATORS["torch"]()
    w, calls = point(), []

    def loss():
        calls.append(draw(generator))
        if len(calls) == 3:
            raise KeyError("from the closure")
        return noisy(w, calls[-1])

    before = state_of(generator)
    with pytest.raises(KeyError, match="from the closure"):
        top_eigenvalue(loss, [w])
    assert state_of(generator) == before
    assert_same_bits("noise", calls[1], calls[0])


def test_the_probe_keeps_its_own_generator():
    """A closure may refer to the probe: its random vectors must still differ from one reading to the next."""
    w = point()

    class Session(Trainer):
        def __init__(self, opt):
            super().__init__(w, torch.Generator().manual_seed(1))
            self.opt, self.probe = opt, fw.SharpnessProbe(opt, every=1)

    session = Session(fw.SGD([w], lr=1e-3))
    states = []
    for _ in range(3):
        states.append(state_of(session.probe._generator))
        session.probe.measure(session.loss)
    assert len({str(state) for state in states}) == 3


def test_generators_without_a_state_do_no_harm():
    """The state of the operating system's generator cannot be set: it is left alone."""
    system, w = random.SystemRandom(), point()
    loss = lambda: noisy(w, torch.ones(N, dtype=torch.float64)) + 0.0 * system.random()  # noqa: E731
    assert top_eigenvalue(loss, [w], iterations=N).value.item() > 3.0
