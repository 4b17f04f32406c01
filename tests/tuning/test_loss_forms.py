"""Losses in any form: numbers, arrays and tensors of one element are taken, all else is refused."""

import copy
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import assert_same_bits
from dense import curved
from ranks import run_ranks
from torch import nn

import fused_warmup as fw
from fused_warmup.sharpness import critical_lr
from fused_warmup.tuning import PersistentCatapult, initial_lr

pytestmark = pytest.mark.usefixtures("one_thread")


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
