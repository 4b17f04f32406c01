"""Readings of losses with generators of their own, searches that ascend, losses in any form, wrapped optimizers."""

import functools
import random
import sys
import types
from collections import deque

import numpy as np
import pytest
import torch
from cases import assert_same_bits
from torch import nn

import fused_warmup as fw
from fused_warmup.sharpness import critical_lr, preconditioned, top_eigenvalue
from fused_warmup.tuning import PersistentCatapult, initial_lr

N = 6
H = torch.linspace(0.5, 3.0, N, dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread(seed_and_threads):
    torch.set_num_threads(1)


# generators that the closure owns


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
    """An odd number of normal numbers, of which some generators keep every second one for later."""
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


GLOBAL = None
POOL = types.SimpleNamespace(generator=None)


def in_cell(w, g):
    return lambda: noisy(w, draw(g))


def in_global(w, g):
    globals()["GLOBAL"] = g
    return lambda: noisy(w, draw(GLOBAL))


def in_object_of_a_global(w, g):
    POOL.generator = g
    return lambda: noisy(w, draw(POOL.generator))


def in_nested_function(w, g):
    globals()["GLOBAL"] = g

    def loss():
        def noise():
            return draw(GLOBAL)

        return noisy(w, noise())

    return loss


def in_comprehension(w, g):
    globals()["GLOBAL"] = g
    return lambda: sum([noisy(w, draw(GLOBAL)) for _ in range(2)])


def in_called_function(w, g):
    globals()["GLOBAL"] = g
    return lambda: noisy(w, global_noise())


def global_noise():
    return draw(GLOBAL)


def in_other_module(w, g):
    sys.modules["noise_for_tests"] = types.ModuleType("noise_for_tests")
    sys.modules["noise_for_tests"].source = g

    def loss():
        import noise_for_tests

        return noisy(w, draw(noise_for_tests.source))

    return loss


def in_default(w, g):
    def loss(source=g):
        return noisy(w, draw(source))

    return loss


def in_keyword_default(w, g):
    def loss(*, source=g):
        return noisy(w, draw(source))

    return loss


def in_partial(w, g):
    return functools.partial(lambda source: noisy(w, draw(source)), g)


def in_partial_keyword(w, g):
    return functools.partial(lambda source: noisy(w, draw(source)), source=g)


class Trainer:
    def __init__(self, w, g):
        self.w, self.g = w, g

    def __call__(self):
        return noisy(self.w, draw(self.g))

    def loss(self):
        return noisy(self.w, draw(self.g))


class Slotted:
    __slots__ = ("__g", "empty", "w")

    def __init__(self, w, g):
        self.w, self.__g = w, g

    def loss(self):
        return noisy(self.w, draw(self.__g))


def in_class(w, g):
    class Settings:
        source = g

    return lambda: noisy(w, draw(Settings.source))


def in_method_of_an_object(w, g):
    """The closure names the object only, and its class has a method that names a global."""
    globals()["GLOBAL"] = g

    class Source:
        def noise(self):
            return draw(GLOBAL)

    source = Source()
    return lambda: noisy(w, source.noise())


def in_property(w, g):
    globals()["GLOBAL"] = g

    class Source:
        @property
        def noise(self):
            return draw(GLOBAL)

        @staticmethod
        def other():
            return draw(GLOBAL)

    source = Source()
    return lambda: noisy(w, source.noise + source.other())


def in_attribute_of_a_function(w, g):
    def loss():
        return noisy(w, draw(loss.source))

    loss.source = g
    return loss


def in_decorated_function(w, g):
    def twice(function):
        @functools.wraps(function)
        def wrapper():
            return function() + function()

        return wrapper

    return twice(torch.enable_grad()(in_cell(w, g)))


def in_containers(w, g):
    nested = {"sources": [(deque([types.MappingProxyType({"one": g})]),)]}
    return lambda: noisy(w, draw(nested["sources"][0][0][0]["one"]))


def in_set(w, g):
    sources = {g}
    return lambda: noisy(w, draw(next(iter(sources))))


def in_stream(w, g):
    def stream():
        while True:
            yield draw(g)

    numbers = stream()
    return lambda: noisy(w, next(numbers))


class Noise(nn.Module):
    """Adds noise from a generator that it has as an attribute, in a list or in a dict."""

    kept = None

    def __init__(self, g, place):
        super().__init__()
        self.place = place
        if place == "attribute":
            self.source = g
        elif place == "list":
            self.sources = [[None], [g]]
        elif place == "dict":
            self.sources = {"one": {"two": g}}
        elif place == "class":
            Noise.kept = g
        elif place == "hook":
            self.register_forward_hook(lambda module, args, output: output + args[0] @ draw(g))
        else:
            globals()["GLOBAL"] = g

    def source_of(self):
        if self.place == "attribute":
            return self.source
        if self.place == "list":
            return self.sources[1][0]
        if self.place == "dict":
            return self.sources["one"]["two"]
        return Noise.kept if self.place == "class" else GLOBAL

    def forward(self, w):
        return w @ draw(self.source_of()) if self.place != "hook" else w.sum() * 0.0


def in_module(place, w, g):
    model = nn.Sequential(nn.ModuleDict({"inner": nn.ModuleList([nn.Identity(), Noise(g, place)])}))
    return lambda: 0.5 * (H * w * w).sum() + 0.5 * model[0]["inner"][1](w) ** 2


def in_module_seen_when_it_runs(w, g):
    """Too far from the closure to be found there: in place 65 of a list."""
    far = [*([None] * 64), Noise(g, "attribute")]
    return lambda: 0.5 * (H * w * w).sum() + 0.5 * far[64](w) ** 2


PLACES = {
    name.removeprefix("in_").replace("_", "-"): make
    for name, make in list(globals().items())
    if name.startswith("in_") and make is not in_module
}
PLACES |= {
    "method": lambda w, g: Trainer(w, g).loss,
    "object": lambda w, g: Trainer(w, g),
    "slots": lambda w, g: Slotted(w, g).loss,
}
PLACES |= {
    f"module-{place}": functools.partial(in_module, place)
    for place in ("attribute", "list", "dict", "class", "hook", "global")
}


def point():
    return torch.linspace(-1.0, 1.0, N, dtype=torch.float64).requires_grad_()


def train(make_loss, generator, with_probe):
    """Five steps; parameters, states and losses, the state of the generator, and the readings."""
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
    """A training with a probe is one without, bit for bit."""
    (plain, last, none), (probed, after, readings) = (
        train(make_loss, GENERATORS[kind](), on) for on in (False, True)
    )
    assert none == []
    assert len(readings) == 3
    assert after == last
    for a, b in zip(plain, probed, strict=True):
        if isinstance(a, torch.Tensor):
            assert_same_bits("training", b, a)


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("place", PLACES)
def test_generators_are_found(place, kind):
    """Of every kind, in every place: readings consume nothing, and see the same numbers in each evaluation."""
    make_loss = PLACES[place]
    assert_untouched(make_loss, kind)
    w, generator = point(), GENERATORS[kind]()
    loss = make_loss(w, generator)
    before = state_of(generator)
    # double backward evaluates once, so that its noise is frozen whether the generator is found or not
    exact = top_eigenvalue(loss, [w], iterations=N, method="autograd").value.item()
    assert state_of(generator) == before
    found = top_eigenvalue(loss, [w], iterations=N)
    assert state_of(generator) == before
    assert found.value.item() == pytest.approx(exact, rel=1e-6)
    assert found.asdict()["flags"] == []


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
    """A hook of a parameter runs in each backward pass; with the same noise at both ends it cancels."""

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


@pytest.mark.parametrize("seen", ["at once", "when it runs"])
def test_generators_that_share_a_state(seen):
    """A module found in the middle of an evaluation may own what was drawn from before: the first state counts."""
    bits = np.random.PCG64(5)
    sources = {
        "bits": (bits, functools.partial(draw, np.random.Generator(bits))),
        "default": (torch.default_generator, lambda: torch.randn(N, dtype=torch.float64)),
        "numpy": (np.random.mtrand._rand, lambda: torch.from_numpy(np.random.standard_normal(N))),
        "python": (random._inst, lambda: torch.tensor([random.gauss() for _ in range(N)]).double()),
    }
    for owned, shared in sources.values():
        module = Noise(owned, "attribute")
        far = [*([None] * (64 if seen == "when it runs" else 0)), module]
        w = point()
        loss = lambda shared=shared: noisy(w, shared()) + 0.5 * far[-1](w) ** 2  # noqa: B023, E731
        before = state_of(owned)
        exact = top_eigenvalue(loss, [w], iterations=N, method="autograd").value.item()
        assert top_eigenvalue(loss, [w], iterations=N).value.item() == pytest.approx(exact, rel=1e-6)
        assert state_of(owned) == before


def test_the_probe_keeps_its_own_generator():
    """A closure may lead to the probe: its random vectors must differ from one reading to the next all the same."""
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
    """The operating system's cannot be set: it is left alone."""
    system, w = random.SystemRandom(), point()
    loss = lambda: noisy(w, torch.ones(N, dtype=torch.float64)) + 0.0 * system.random()  # noqa: E731
    assert top_eigenvalue(loss, [w], iterations=N).value.item() > 3.0


def test_big_models_are_searched_whole():
    """Each of a hundred modules has a budget of its own: the generator of the last one is found."""
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2)) for _ in range(100))
    generator = GENERATORS["torch"]()
    blocks.append(Noise(generator, "dict"))
    config = {str(i): [object() for _ in range(40)] for i in range(60)}
    for block in blocks:
        block.config = config
    w = point()
    before = state_of(generator)
    loss = lambda: 0.5 * (H * w * w).sum() + 0.5 * blocks[-1](w) ** 2  # noqa: E731
    exact = top_eigenvalue(loss, [w], iterations=N, method="autograd").value.item()
    assert top_eigenvalue(loss, [w], iterations=N).value.item() == pytest.approx(exact, rel=1e-6)
    assert state_of(generator) == before
