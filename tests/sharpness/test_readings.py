"""Readings of losses that own generators, searches that ascend, losses in any form, and wrapped optimizers."""

import copy
import functools
import random
import re
import sys
import types
import weakref
from collections import deque
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import assert_same_bits
from optim.test_replica import problem
from ranks import run_ranks
from torch import nn

import fused_warmup as fw
from fused_warmup.sharpness import critical_lr, preconditioned, threshold, top_eigenvalue
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


# searches for a rate that ascend, and losses below zero


def curved(shift, sign):
    """Return a quadratic with known critical rates; ascent of its negative is the same as its descent."""
    h = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
    x = torch.tensor([1.0, 0.5, -3.0], dtype=torch.float64, requires_grad=True)
    return x, h, lambda: sign * (0.5 * (h * x * x).sum() - shift)


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


# losses in any form


class Half:
    """An object with ``__float__``, like fractions and arrays of other libraries."""

    def __float__(self):
        return 0.5


LOSSES = {
    "int": 2,
    "float": 0.5,
    "Fraction": Fraction(1, 2),
    "Decimal": Decimal("0.5"),
    "object": Half(),
    "nan": float("nan"),
    "huge": 10**400,
    **{f"numpy-{t.__name__}": t(2) for t in (np.float16, np.float32, np.float64, np.longdouble)},
    **{f"numpy-{t.__name__}": t(2) for t in (np.int8, np.int64, np.uint64)},
    **{f"array{list(shape)}": np.full(shape, 0.5, np.float32) for shape in ((), (1,), (1, 1))},
    "array-int": np.array(2),
    **{f"tensor{list(shape)}": torch.full(shape, 0.5) for shape in ((), (1,), (1, 1, 1))},
    "graph": torch.tensor(0.5, requires_grad=True) * 1.0,
    "parameter": nn.Parameter(torch.tensor([0.5])),
    "sparse": torch.full((1, 1), 0.5).to_sparse(),
    "expanded": torch.tensor(0.5).expand(1, 1),
    **{
        str(d): torch.tensor([2]).to(d)
        for d in (
            torch.float64,
            torch.bfloat16,
            torch.float16,
            torch.float8_e4m3fn,
            torch.int64,
            torch.uint8,
            torch.uint32,
        )
    },
}
NO_LOSSES = {
    "None": None,
    "bool": True,
    "numpy-bool": np.bool_(True),
    "tensor-bool": torch.tensor(True),
    "str": "0.5",
    "numpy-str": np.str_("0.5"),
    "bytes": b"0.5",
    "complex": 1j,
    "numpy-complex": np.complex64(1),
    "tensor-complex": torch.tensor(1j),
    "meta": torch.ones((), device="meta"),
    "list": [0.5],
    "tuple": (torch.tensor(0.5), torch.tensor(0.5)),
    "dict": {"loss": 0.5},
    "array-object": np.array([None]),
    "function": lambda: 0.5,
}
SEVERAL = {
    "tensor": torch.ones(2),
    "tensor-int": torch.ones(2, 2, dtype=torch.int64),
    "empty": torch.ones(0),
    "array": np.ones(3),
    "array-empty": np.ones((1, 0)),
    "sparse": torch.ones(2).to_sparse(),
}
ANY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
REFUSED = pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        *((x, TypeError, "be a number or a tensor with one element, got") for x in NO_LOSSES.values()),
        *((x, ValueError, "have one element, got (") for x in SEVERAL.values()),
    ],
    ids=[*NO_LOSSES, *(f"several-{name}" for name in SEVERAL)],
)


def plain(loss):
    """Return a loss as a number."""
    if isinstance(loss, torch.Tensor):
        return (loss.to_dense() if loss.layout != torch.strided else loss).double().item()
    return (
        torch.inf
        if type(loss) is int and loss > 2
        else float(loss.item() if isinstance(loss, np.ndarray) else loss)
    )


class Source:
    """A source of losses for a schedule."""


def same(a, b):
    return a == b or (a != a and b != b)


@ANY_LOSS
def test_schedules_record_any_number(loss):
    """Alone and by an optimizer, the recorded loss is the number."""
    alone = fw.AutoWU(total_steps=100, steps_per_epoch=3)
    alone.step(loss)
    alone.step(0.25)
    fed = fw.AutoWU(total_steps=100, steps_per_epoch=3)
    source = Source()
    fed.feed(loss, source, torch.zeros(4, dtype=torch.int64))
    for wu, count in ((alone, 2), (fed, 1)):
        assert same(wu.state_dict()["epoch"][0].item(), plain(loss))
        assert (wu.state_dict()["steps"], wu.state_dict()["filled"]) == (count, count)


@REFUSED
def test_schedules_refuse_other_losses(loss, error, words):
    """Raises in every phase, before anything has changed."""
    for wu in (fw.AutoWU(100, 3), fw.AutoWU(100, 3, max_warmup_fraction=0.0)):
        before = repr(wu.state_dict())
        for act in (lambda wu=wu: wu.step(loss), lambda wu=wu: wu.feed(loss, Source(), None)):
            with pytest.raises(error, match=re.escape(f"AutoWU: loss must {words}")):
                act()
        assert repr(wu.state_dict()) == before
        # the refused call is not the source of the losses
        wu.feed(0.5, Source(), None)


@pytest.mark.slow
def test_schedules_record_distributed_tensors(tmp_path):
    """The parts of a sum on two ranks count as the sum."""
    body = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

loss = DTensor.from_local(torch.tensor([0.25 + rank]), init_device_mesh("cpu", (2,)), [Partial()])
wu = fw.AutoWU(100, 3)
wu.step(loss)
print(wu.state_dict()["epoch"][0].item())
dist.destroy_process_group()
"""
    assert run_ranks(tmp_path, body) == [["1.5"], ["1.5"]]


@ANY_LOSS
def test_catapults_take_any_number(loss):
    x, _, loss_fn = curved(0.0, 1)
    loss_fn().backward()
    catapult = PersistentCatapult(fw.SGD([x]), target=10.0)
    assert catapult.step(loss, loss_fn) > 0.0
    number = plain(loss)
    assert catapult.best == (number if np.isfinite(number) else torch.inf)


@REFUSED
@pytest.mark.parametrize("target", [10.0, 1e-4])
def test_catapults_refuse_other_losses(loss, error, words, target):
    """Also when the target is reached and the loss no longer matters."""
    x, _, loss_fn = curved(0.0, 1)
    loss_fn().backward()
    opt = fw.SGD([x], lr=0.5)
    catapult = PersistentCatapult(opt, target=target)
    if target == 1e-4:
        catapult.step(1.0, loss_fn)
        assert catapult.done
    before, rate = catapult.state_dict(), opt.param_groups[0]["lr"]
    with pytest.raises(error, match=re.escape(f"PersistentCatapult: loss must {words}")):
        catapult.step(loss, loss_fn)
    assert (catapult.state_dict(), opt.param_groups[0]["lr"]) == (before, rate)


FORMS = {
    "float": lambda v: v.item(),
    "numpy": lambda v: np.float64(v.item()),
    "array": lambda v: np.array([[v.item()]]),
    "tensor": lambda v: v.detach().reshape(1, 1),
    "graph": lambda v: v[None],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_searches_take_any_number(form):
    """With gradients in ``.grad`` a search needs only values of the loss."""
    found = []
    for wrap in (form, lambda v: v):
        x, _, loss = curved(0.0, 1)
        loss().backward()
        opt = fw.SGD([x], lr=1e-2)
        closure = lambda wrap=wrap, loss=loss: wrap(loss())  # noqa: E731
        found.append([critical_lr(closure, opt), initial_lr(closure, opt, target=10.0)])
        found[-1].append(PersistentCatapult(opt, target=10.0).step(1.0, closure))
    assert found[0] == found[1]


@REFUSED
def test_searches_refuse_other_losses(loss, error, words):
    x, _, loss_fn = curved(0.0, 1)
    loss_fn().backward()
    words = words.replace("have one", "return a loss with one").replace("be a", "return a")
    for owner, search in (
        ("critical_lr", lambda opt: critical_lr(lambda: loss, opt)),
        ("initial_lr", lambda opt: initial_lr(lambda: loss, opt, target=1.0)),
    ):
        with pytest.raises(error, match=re.escape(f"{owner}: loss_fn must {words}")):
            search(fw.SGD([x]))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_large_rates_take_any_number(form):
    """Losses, scores and errors of a protocol and of a search for regimes."""
    model = nn.Linear(1, 1)

    def run_epoch(opt):
        opt.step()
        return form(torch.tensor(0.25, requires_grad=True) * 1.0)

    def pretrained(lr):
        return fw.tuning.pretrain_finetune(
            model,
            lambda rate: fw.SGD(model.parameters(), lr=rate),
            run_epoch,
            lambda: form(torch.tensor(0.75, requires_grad=True)),
            lr=lr,
            epochs=2,
            average=1,
            finetune_lrs=(np.float32(0.5), 1),
            error=lambda: form(torch.tensor(0.5, requires_grad=True)),
        )

    found = pretrained(np.float32(0.5))
    assert (found.lr, found.losses, set(found.scores.values())) == (0.5, (0.25, 0.25), {0.75})
    assert found.barrier == pytest.approx(0.0, abs=1e-15)
    barrier = fw.tuning.linear_barrier(
        model, *[model.state_dict()] * 2, lambda: form(torch.tensor(0.5)), points=2
    )
    assert barrier.errors == (0.5, 0.5)

    def train(lr):
        loss = torch.tensor(0.001 if lr < 0.3 else 0.5)
        return {
            "losses": [form(loss)],
            "accuracies": [form(loss)],
            "tuned": form(loss),
            "barrier": form(loss),
        }

    regimes = fw.tuning.find_regimes(train, [0.1, 0.5], max_runs=0)
    assert regimes.threshold == (0.1, 0.5)
    for point in regimes.points:
        values = (*point.trial.losses, *point.trial.accuracies, point.trial.tuned, point.trial.barrier)
        assert all(type(v) is float for v in values)


@REFUSED
def test_large_rates_refuse_other_losses(loss, error, words):
    model = nn.Linear(1, 1)
    kept = copy.deepcopy(model.state_dict())
    returned = words.replace("have one", "return a loss with one").replace("be a", "return a")
    make = lambda rate: fw.SGD(model.parameters(), lr=rate)  # noqa: E731
    cases = {
        f"pretrain_finetune: run_epoch must {returned}": lambda: fw.tuning.pretrain_finetune(
            model, make, lambda opt: loss, lambda: 1.0, lr=0.1, epochs=1, average=1
        ),
        f"pretrain_finetune: evaluate must {returned}": lambda: fw.tuning.pretrain_finetune(
            model, make, lambda opt: 1.0, lambda: loss, lr=0.1, epochs=1, average=1
        ),
        f"linear_barrier: error must {returned}": lambda: fw.tuning.linear_barrier(
            model, kept, kept, lambda: loss
        ),
        f"find_regimes: losses[1] must {words}": lambda: fw.tuning.find_regimes(
            lambda lr: {"losses": [1.0, loss]}, [0.1, 0.5]
        ),
        f"find_regimes: accuracies[0] must {words}": lambda: fw.tuning.find_regimes(
            lambda lr: {"losses": [1.0], "accuracies": [loss]}, [0.1, 0.5]
        ),
    }
    if loss is not None:
        cases[f"find_regimes: tuned must {words}"] = lambda: fw.tuning.find_regimes(
            lambda lr: {"losses": [1.0], "tuned": loss}, [0.1, 0.5]
        )
    for message, act in cases.items():
        with pytest.raises(error, match=re.escape(message)):
            act()
    for name, value in model.state_dict().items():
        assert_same_bits(name, value, kept[name])


def test_losses_of_regimes_are_a_sequence():
    for losses in (np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]), iter([0.5, 0.25]), (0.5, 0.25)):
        trials = iter([losses, [0.5, 0.25]])
        regimes = fw.tuning.find_regimes(lambda lr: {"losses": next(trials)}, [0.1, 0.5], max_runs=0)  # noqa: B023
        assert regimes.points[0].trial.losses == (0.5, 0.25)
    for losses in (0.5, None, torch.tensor(0.5)):
        with pytest.raises(TypeError, match="find_regimes: losses must be a sequence of numbers, got"):
            fw.tuning.find_regimes(lambda lr: {"losses": losses}, [0.1, 0.5])  # noqa: B023
    with pytest.raises(ValueError, match="find_regimes: losses must hold the loss of each epoch"):
        fw.tuning.find_regimes(lambda lr: {"losses": np.array([])}, [0.1, 0.5])


# groups that are added to a catapult's optimizer


def grown(cls, first, join_at, **group):
    """Train two parameters, the second from step ``join_at`` on; return rates, catapult and optimizer."""
    x, y = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (1.0, 2.0))
    loss = lambda: (3.0 * x**2 + 0.5 * y**2 + 1.0).sum()  # noqa: E731
    opt = cls([x], lr=first)
    catapult = PersistentCatapult(opt, target=0.2)
    rates = []
    for step in range(8):
        if step == join_at:
            opt.add_param_group({"params": [y], **group})
        opt.zero_grad()
        value = loss()
        value.backward()
        catapult.step(value, loss)
        rates.append([float(g["lr"]) for g in opt.param_groups])
        assert rates[-1][0] == pytest.approx(catapult.lr)
        opt.step()
    return rates, catapult, opt


@pytest.mark.pairwise
@pytest.mark.parametrize("cls", [fw.SGD, torch.optim.SGD, fw.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("join_at", [0, 3, 7])
@pytest.mark.parametrize(("lr", "group", "ratio"), [
    (0.5, {}, 1.0),
    (0.5, {"lr": 0.125}, 0.25),
    (torch.tensor(0.5), {}, 1.0),
    (torch.tensor(0.5), {"lr": 2.0}, 4.0),
    (torch.tensor(0.5), {"lr": torch.tensor(2.0)}, 4.0),
    (0.0, {"lr": 0.125}, 1.0),
])  # fmt: skip
def test_new_groups_follow(cls, lr, group, ratio, join_at):
    """With the ratio of their rate to the initial one of the first group; before, at and after the target."""
    lr, group = copy.deepcopy(lr), copy.deepcopy(group)
    rates, *_ = grown(cls, lr, join_at, **group)
    assert [len(r) for r in rates] == [1] * join_at + [2] * (8 - join_at)
    for r in rates[join_at:]:
        assert r[1] == pytest.approx(ratio * r[0], rel=1e-6)


def test_new_groups_once_the_target_is_reached():
    """They are scaled once; afterwards the user may change all rates."""
    _, catapult, opt = grown(fw.SGD, 0.5, 8)
    loss = lambda: 0.0 * catapult.lr  # noqa: E731
    catapult.lr = catapult.target
    opt.param_groups[0]["lr"] = 0.01
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.125})
    for _ in range(2):
        assert catapult.step(1.0, loss) == 0.2
        assert [g["lr"] for g in opt.param_groups] == [0.01, pytest.approx(0.2 * 0.25)]
    opt.param_groups[1]["lr"] = 0.02
    catapult.step(1.0, loss)
    assert [g["lr"] for g in opt.param_groups] == [0.01, 0.02]


@pytest.mark.parametrize("stop", [2, 5])
def test_new_groups_of_a_resumed_run(stop):
    """A new catapult of a resumed optimizer restores the initial rates, not the scaled ones."""
    _, catapult, opt = grown(fw.SGD, 0.5, stop, lr=0.125)
    state = copy.deepcopy(catapult.state_dict())
    assert state["given_lrs"] == [0.5, 0.125]
    other = PersistentCatapult(opt, target=0.2)
    other.load_state_dict(state)
    assert other.state_dict() == state
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.25})
    other.lr = 0.1
    other.best = -torch.inf
    other.step(1.0, lambda: 1.0)
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.1, 0.025, 0.05])
    # states of earlier releases, without added groups
    old = {k: v for k, v in state.items() if k != "given_lrs"}
    other.load_state_dict(old)
    assert other.best == state["best"]


def test_groups_that_a_catapult_refuses():
    """A schedule, or fewer groups than before: named, before any rate has changed."""
    _, catapult, opt = grown(fw.SGD, 0.5, 2)
    before, rates = catapult.state_dict(), [g["lr"] for g in opt.param_groups]
    gone = opt.param_groups.pop()
    with pytest.raises(
        ValueError, match=r"PersistentCatapult: optimizer must keep its 2 groups, got 1\. Make a"
    ):
        catapult.step(1.0, lambda: 1.0)
    opt.param_groups.append(gone)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "schedule": fw.schedules.warmup(3)})
    with pytest.raises(ValueError, match="PersistentCatapult: schedule must be None for all groups"):
        catapult.step(1.0, lambda: 1.0)
    assert catapult.state_dict() == before
    assert [g["lr"] for g in opt.param_groups[:2]] == rates
    single = PersistentCatapult(fw.SGD([nn.Parameter(torch.ones(2))]), target=1.0)
    with pytest.raises(
        ValueError, match=r"state_dict\['given_lrs'\] must have at most one rate for each of 1"
    ):
        single.load_state_dict(before)
    with pytest.raises(TypeError, match=r"state_dict\['given_lrs'\]\[1\] must be a number, got 'x'"):
        catapult.load_state_dict({**before, "given_lrs": [0.5, "x"]})
    assert catapult.state_dict() == before


# parameters that are given twice, and wrapped optimizers


@pytest.mark.parametrize("order", [(0, 1, 0), (0, 0), (1, 0, 1, 0)])
def test_parameters_given_twice(order):
    params = [nn.Parameter(torch.ones(i + 2)) for i in range(2)]
    given = [params[i] for i in order]
    at = next(i for i, p in enumerate(given) if any(p is q for q in given[:i]))
    first = order.index(order[at])
    message = f"params[{at}] must differ from params[{first}], got {tuple(given[at].shape)}. Give each"
    loss = lambda: sum((p * p).sum() for p in params)  # noqa: E731
    with pytest.raises(ValueError, match=re.escape(f"top_eigenvalue: {message}")):
        top_eigenvalue(loss, given)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = torch.optim.SGD(given, lr=0.1)
    for owner, act in READINGS.items():
        if owner == "threshold":
            continue
        with pytest.raises(ValueError, match=re.escape(f"{owner}: {message}")):
            act(opt, loss)
    assert all(p.grad is None for p in params)


READINGS = {
    "preconditioned": lambda opt, loss: preconditioned(loss, opt).asdict(),
    "threshold": lambda opt, loss: threshold(opt),
    "critical_lr": lambda opt, loss: critical_lr(loss, opt),
    "initial_lr": lambda opt, loss: initial_lr(loss, opt, target=1.0),
    "SharpnessProbe": lambda opt, loss: probed(opt, loss),
    "PersistentCatapult": lambda opt, loss: PersistentCatapult(opt, target=1.0).step(1.0, loss),
}


def probed(opt, loss):
    probe = fw.SharpnessProbe(opt, loss)
    probe.measure()
    return probe.poll().asdict()


def wrapper(name, attribute, base=object):
    """Return a class that keeps an optimizer in an attribute."""

    def init(self, inner):
        setattr(self, attribute, inner)

    return type(name, (base,), {"__init__": init})


class Private:
    """Keeps the optimizer in a private attribute, and has a property that raises."""

    def __init__(self, inner):
        self._kept = inner

    @property
    def optim(self):
        raise RuntimeError("not ready")


WRAPPERS = [
    (wrapper("AcceleratedOptimizer", "optimizer", torch.optim.Optimizer), ".optimizer"),
    (wrapper("Sharded", "optim"), ".optim"),
    (wrapper("SAM", "base_optimizer", torch.optim.Optimizer), ".base_optimizer"),
    (wrapper("Other", "my_inner_one"), ".my_inner_one"),
    (Private, "._kept"),
]


@pytest.mark.parametrize("owner", READINGS)
@pytest.mark.parametrize(("kind", "path"), WRAPPERS, ids=[kind.__name__ for kind, _ in WRAPPERS])
def test_wrappers_are_refused_with_the_path_to_the_optimizer(kind, path, owner):
    for cls in (fw.Adam, torch.optim.SGD):
        x, _, loss = curved(0.0, 1)
        inner = cls([x], lr=1e-3)
        words = f"{owner}: optimizer must be a fused_warmup optimizer, got {{}}. Pass its attribute {{}}."
        with pytest.raises(TypeError, match="^" + re.escape(words.format(kind.__name__, path)) + "$"):
            READINGS[owner](kind(inner), loss)
        outer = wrapper("Outer", "optimizer")(kind(inner))
        if path != "._kept" and path != ".my_inner_one":
            with pytest.raises(TypeError, match=re.escape(words.format("Outer", ".optimizer" + path))):
                READINGS[owner](outer, loss)


@pytest.mark.parametrize("owner", READINGS)
def test_other_objects_are_refused(owner):
    x, _, loss = curved(0.0, 1)
    for other in (None, 3, "Adam", nn.Linear(2, 2), [fw.SGD([x])], fw.SGD, lambda: 1.0):
        words = f"^{owner}: optimizer must be a fused_warmup optimizer, got {type(other).__name__}\\.$"
        with pytest.raises(TypeError, match=words):
            READINGS[owner](other, loss)
    for other in (torch.optim.Rprop([x]), WRAPPERS[0][0](torch.optim.Rprop([x]))):
        words = f"{owner}: optimizer must be one whose rule is known, got '{type(other).__name__}'"
        with pytest.raises(TypeError, match=words):
            READINGS[owner](other, loss)


class Forwarding:
    """A wrapper with a class of its own that derives from the class of the optimizer, as in Lightning."""

    def __init__(self, inner, copies):
        if copies:
            self.__dict__ = {k: v for k, v in inner.__dict__.items() if k != "step"}
        self._optimizer = inner
        self.__class__ = type("Lightning" + type(inner).__name__, (type(self), type(inner)), {})

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self.__dict__["_optimizer"], name)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("cls", [fw.Adam, fw.SGD, torch.optim.Adam])
@pytest.mark.parametrize("owner", READINGS)
def test_wrappers_of_a_derived_class(owner, cls, copies):
    """They work, also before the first step: values are those of the optimizer, which is not changed."""
    found = []
    for wrapped in (False, True):
        x, _, loss = curved(0.0, 1)
        opt = cls([x], lr=1e-3)
        outer = Forwarding(opt, copies) if wrapped else opt
        assert isinstance(outer, cls)
        values = []
        for step in range(4):
            opt.zero_grad()
            loss().backward()
            opt.step()
            if step % 2:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            opt.zero_grad()
            loss().backward()
            values.append(READINGS[owner](outer, loss))
        found.append([*values, x.detach().tolist(), opt.param_groups[0]["lr"]])
    assert repr(found[0]) == repr(found[1])


def test_optimizers_that_have_another_one_are_not_wrappers():
    """An optimizer of ours with an attribute for an optimizer of other parameters is measured itself."""
    x, *_ = curved(0.0, 1)

    class Both(fw.SGD):
        pass

    both = Both([x], lr=0.5)
    both.optimizer = fw.SGD([nn.Parameter(torch.ones(2))], lr=0.25)
    assert threshold(both) == 4.0
    assert fw.SharpnessProbe(both).optimizer is both
