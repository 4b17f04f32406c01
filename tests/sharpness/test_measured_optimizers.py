"""Optimizers that readings and searches take: none with a parameter twice, and which wrapped ones."""

import copy
import re

import pytest
import torch
from dense import curved
from torch import nn

import fused_warmup as fw
from fused_warmup.sharpness import critical_lr, preconditioned, threshold, top_eigenvalue
from fused_warmup.tuning import PersistentCatapult, initial_lr

pytestmark = pytest.mark.usefixtures("one_thread")


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
