"""Generators of random numbers are found wherever a closure keeps them."""

import functools
import random
import sys
import types
import weakref
from collections import deque

import numpy as np
import pytest
import torch
from noisy_losses import GENERATORS, H, N, Trainer, assert_untouched, draw, in_cell, noisy, point, state_of
from torch import nn

from fused_warmup.sharpness import top_eigenvalue

pytestmark = pytest.mark.usefixtures("one_thread")

GLOBAL = None
POOL = types.SimpleNamespace(generator=None)


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
    """The closure names only the object, whose class has a method that names a global."""
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
    """Adds noise from a generator in an attribute, a list, a dict, its class, a hook or a global."""

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


def in_module_found_when_it_runs(w, g):
    """Out of reach of the search from the closure: item 65 of a list."""
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


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("place", PLACES)
def test_generators_are_found(place, kind):
    """Every kind in every place: readings consume no numbers, and each evaluation draws the same ones."""
    make_loss = PLACES[place]
    assert_untouched(make_loss, kind)
    w, generator = point(), GENERATORS[kind]()
    loss = make_loss(w, generator)
    before = state_of(generator)
    # double backward evaluates once, so its noise is frozen even if the generator is not found
    exact = top_eigenvalue(loss, [w], iterations=N, method="autograd").value.item()
    assert state_of(generator) == before
    found = top_eigenvalue(loss, [w], iterations=N)
    assert state_of(generator) == before
    assert found.value.item() == pytest.approx(exact, rel=1e-6)
    assert found.asdict()["flags"] == []


@pytest.mark.parametrize("found", ["at once", "when it runs"])
def test_generators_that_share_a_state(found):
    """A module found during an evaluation may own a generator already used: the first saved state counts."""
    bits = np.random.PCG64(5)
    sources = {
        "bits": (bits, functools.partial(draw, np.random.Generator(bits))),
        "default": (torch.default_generator, lambda: torch.randn(N, dtype=torch.float64)),
        "numpy": (np.random.mtrand._rand, lambda: torch.from_numpy(np.random.standard_normal(N))),
        "python": (random._inst, lambda: torch.tensor([random.gauss() for _ in range(N)]).double()),
    }
    for owned, shared in sources.values():
        module = Noise(owned, "attribute")
        far = [*([None] * (64 if found == "when it runs" else 0)), module]
        w = point()
        loss = lambda shared=shared: noisy(w, shared()) + 0.5 * far[-1](w) ** 2  # noqa: B023, E731
        before = state_of(owned)
        exact = top_eigenvalue(loss, [w], iterations=N, method="autograd").value.item()
        assert top_eigenvalue(loss, [w], iterations=N).value.item() == pytest.approx(exact, rel=1e-6)
        assert state_of(owned) == before


def test_strange_objects_do_no_harm():
    """Objects that a closure refers to may raise: dead proxies, attributes, classes without a module's name."""

    class Odd:
        @property
        def __dict__(self):
            raise RuntimeError("no")

    class Nameless:
        __module__ = property(lambda self: "none")

    gone = weakref.proxy(Nameless())
    generator = GENERATORS["torch"]()
    around = [gone, Odd(), Nameless(), Nameless, types.ModuleType("empty"), generator]
    w = point()
    before = state_of(generator)
    loss = lambda: noisy(w, draw(around[-1]))  # noqa: E731
    exact = top_eigenvalue(loss, [w], iterations=N, method="autograd").value.item()
    assert top_eigenvalue(loss, [w], iterations=N).value.item() == pytest.approx(exact, rel=1e-6)
    assert state_of(generator) == before


def test_big_models_are_searched_whole():
    """Each of a hundred modules has its own budget: the generator of the last one is found."""
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
