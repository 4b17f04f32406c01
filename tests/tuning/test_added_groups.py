"""Groups that are added to the optimizer of a persistent catapult follow its rate."""

import copy

import pytest
import torch
from torch import nn

import fused_warmup as fw
from fused_warmup.tuning import PersistentCatapult

pytestmark = pytest.mark.usefixtures("one_thread")


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
