"""What torch's own tests ask of every optimizer, asked of ours: construction, parameters and groups.

The answers are those of torch's optimizers, asked in the same test where there is one. ``test_torch_calls.py``
has closures, hooks and copies, ``test_torch_state.py`` states and their files, ``test_torch_helpers.py``
schedulers, scalers and averaged models.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, assert_same_bits, set_grads
from peers import (
    CLASSES,
    assert_same_params,
    compare_with_torch,
    each_backend,
    each_case,
    each_class,
    each_torch_class,
    members,
    peer_of,
    small,
    snapshot,
    two_groups,
    walk,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import fused_warmup as fw

pytestmark = pytest.mark.pairwise

# construction


def broken_source() -> Iterator[Tensor]:
    raise RuntimeError("params was touched")
    yield torch.zeros(1)


BAD_HYPER: dict[str, list[Any]] = {
    "lr": [-1.0, float("nan"), "0.1", torch.tensor(-1.0), torch.tensor([0.1, 0.2])],
    "betas": [(1.0, 0.9), (0.9, -0.1), (0.9,), 0.9],
    "eps": [-1e-8],
    "weight_decay": [-0.1],
    "momentum": [-0.5],
    "maximize": ["yes"],
    "amsgrad": ["yes"],
}


def having(*names: str) -> list[Any]:
    """Return the classes that take a hyper-parameter, with its name."""
    pairs = ((case, name) for name in names for case in CLASSES)
    return [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case, name in pairs
        if name in inspect.signature(case.cls).parameters
    ]


@pytest.mark.parametrize(("case", "name"), having(*BAD_HYPER))
def test_bad_hyper_parameters_are_named_before_params_is_touched(case: Case, name: str) -> None:
    for value in BAD_HYPER[name]:
        for params in (broken_source(), [], small()):
            with pytest.raises((ValueError, TypeError), match=rf"^{case.cls.__name__}: {name}\b"):
                case.make(params, **{name: value})


@each_class
def test_an_unknown_keyword_names_the_class(case: Case) -> None:
    with pytest.raises(TypeError, match="'momentun'") as error:
        case.make(small(), momentun=0.9)
    assert re.search(rf"\b{case.cls.__name__}\b", str(error.value))
    assert "FusedOptimizer" not in str(error.value)


def leaf() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


def non_leaf() -> Tensor:
    return leaf() * 2.0


BAD_PARAMS: dict[str, Callable[[], Any]] = {
    "a tensor": leaf,
    "an empty list": list,
    "an empty generator": lambda: iter(()),
    "None": lambda: None,
    "a number": lambda: 3,
    "a string": lambda: "weight",
    "a dict": lambda: {"params": [leaf()]},
    "a list of strings": lambda: ["weight"],
    "a list with None": lambda: [leaf(), None],
    "a list of arrays": lambda: [np.ones(3)],
    "a result": lambda: [non_leaf()],
    "a result in a group": lambda: [{"params": non_leaf()}],
    "a set in a group": lambda: [{"params": {leaf()}}],
    "a group without params": lambda: [{"lr": 0.1}],
    "a group that is a list": lambda: [{"params": [leaf()]}, [leaf()]],
    "a string in a group": lambda: [{"params": "weight"}],
    "a name beside none": lambda: [("a", leaf()), leaf()],
    "none beside a name": lambda: [leaf(), ("a", leaf())],
    "groups with and without names": lambda: [{"params": [("a", leaf())]}, {"params": [leaf()]}],
    "one parameter in two groups": lambda: [{"params": (p := leaf())}, {"params": [p]}],
}


@each_class
@pytest.mark.parametrize("kind", list(BAD_PARAMS))
def test_what_is_no_parameter_raises_as_in_torch(case: Case, kind: str) -> None:
    with pytest.raises((TypeError, ValueError, KeyError)) as theirs:
        torch.optim.SGD(BAD_PARAMS[kind](), lr=0.1)
    # a key that is missing is a bad value, too
    wanted = (KeyError, ValueError) if theirs.type is KeyError else theirs.type
    with pytest.raises(wanted):
        case.make(BAD_PARAMS[kind]())


GOOD_PARAMS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "a list": list,
    "a tuple": tuple,
    "a generator": iter,
    "values of a dict": lambda params: dict(enumerate(params)).values(),
    "a group of one tensor": lambda params: [{"params": p} for p in params],
    "a group of a generator": lambda params: [{"params": iter(params)}],
    "names": lambda params: [(f"p{i}", p) for i, p in enumerate(params)],
    "names in a group": lambda params: iter([{"params": ((f"p{i}", p) for i, p in enumerate(params))}]),
}


@each_class
@pytest.mark.parametrize("kind", list(GOOD_PARAMS))
def test_what_holds_parameters_is_taken_as_in_torch(case: Case, kind: str) -> None:
    params = small()
    mine, theirs = case.make(GOOD_PARAMS[kind](params)), torch.optim.SGD(GOOD_PARAMS[kind](params), lr=0.1)
    for got, wanted in zip(mine.param_groups, theirs.param_groups, strict=True):
        assert [id(p) for p in got["params"]] == [id(p) for p in wanted["params"]]
        assert got.get("param_names") == wanted.get("param_names")
        assert type(got["params"]) is list
    before = [p.detach().clone() for p in params]
    walk(mine, range(2))
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@each_class
def test_names_must_be_given_for_all_groups_or_none(case: Case) -> None:
    named, plain = case.make([("a", leaf())]), case.make([leaf()])
    for opt, extra in ((named, leaf()), (plain, ("b", leaf()))):
        with pytest.raises(ValueError, match="names"):
            opt.add_param_group({"params": [extra]})
        assert len(opt.param_groups) == 1
        walk(opt, range(1))


@each_class
@each_backend
def test_a_tied_weight_warns_and_is_trained_once(case: Case, backend: str) -> None:
    (tied, other), single = small(shapes=[(3,), (4,)]), small(shapes=[(3,), (4,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = case.make([tied, other, tied], backend=backend)
    once = case.make(single, backend=backend)
    for step in range(3):
        set_grads(single, step)
        tied.grad, other.grad = (p.grad.clone() for p in single)
        opt.step()
        once.step()
    for p, q in zip((tied, other), single, strict=True):
        assert_same_bits("parameter", p, q)
    saved = opt.state_dict()
    assert saved["param_groups"][0]["params"] == [0, 1]
    assert list(saved["state"]) == [0, 1]
    opt.load_state_dict(copy.deepcopy(saved))
    assert snapshot(opt)[0][0] == snapshot(once)[0][0]
    # as torch lists them
    saved["param_groups"][0]["params"] = [0, 1, 0]
    opt.load_state_dict(copy.deepcopy(saved))
    assert snapshot(opt)[0][0] == snapshot(once)[0][0]


@each_backend
def test_a_learning_rate_may_come_from_the_groups_alone(backend: str) -> None:
    here, there = small(), small()
    opt = fw.SGDP([{"params": here[:1], "lr": 0.1}, {"params": here[1:], "lr": 0.01}], backend=backend)
    given = fw.SGDP([{"params": there[:1]}, {"params": there[1:], "lr": 0.01}], lr=0.1, backend=backend)
    for one in (opt, given):
        walk(one, range(3))
    for p, q in zip(here, there, strict=True):
        assert_same_bits("parameter", p, q)
    with pytest.raises((ValueError, TypeError), match=r"\blr\b"):
        fw.SGDP([{"params": small(), "lr": 0.1}, {"params": small()}])
    with pytest.raises((ValueError, TypeError), match=r"\blr\b"):
        opt.add_param_group({"params": small()})


@each_case
@each_backend
def test_numbers_serve_as_flags(case: Case, backend: str) -> None:
    """As in torch, 1 is True and 0 is False."""
    here, there = small(), small()
    defaults = case.make(small()).defaults
    flags = {
        key: int(value)
        for key, value in defaults.items()
        if isinstance(value, bool) and key in inspect.signature(case.cls).parameters
    }
    assert "maximize" in flags
    opts = case.make(here, backend=backend, **flags), case.make(there, backend=backend)
    for opt in opts:
        walk(opt, range(3))
    for p, q in zip(here, there, strict=True):
        assert_same_bits("parameter", p, q)


@each_class
@each_backend
@pytest.mark.parametrize("clip", [0, 0.0, float("inf")])
def test_a_norm_of_zero_or_infinity_does_not_clip(case: Case, backend: str, clip: float) -> None:
    here, there = small(), small()
    clipped = case.make(here, backend=backend, max_grad_norm=clip)
    free = case.make(there, backend=backend, max_grad_norm=None)
    for opt in (clipped, free):
        walk(opt, range(3))
    for p, q in zip(here, there, strict=True):
        assert_same_bits("parameter", p, q)


# parameters and gradients of all kinds


def odd_params() -> list[nn.Parameter]:
    """Return an empty, a 0-dim, a transposed, a strided and a large-offset parameter."""
    flat = small(shapes=[(0,), (), (3, 5), (14,), (9,)])
    views = [flat[0], flat[1], flat[2].t(), flat[3][::2], flat[4][5:]]
    return [nn.Parameter(view.detach()) for view in views]


@each_case
@each_backend
def test_shapes_and_strides(case: Case, backend: str) -> None:
    if case.torch_cls is not None:
        compare_with_torch(case, backend, lambda opt, _: walk(opt, range(4)), odd_params)
        return
    strided, dense = odd_params(), [nn.Parameter(p.detach().clone().contiguous()) for p in odd_params()]
    for params in (strided, dense):
        walk(case.make(params, backend=backend), range(4))
    assert_same_params(strided, dense)


@each_torch_class
@each_backend
@pytest.mark.parametrize("grads", [True, False], ids=["gradients", "none"])
def test_parameters_that_require_no_gradient(case: Case, backend: str, grads: bool) -> None:
    """What counts is .grad, as in torch."""

    def scenario(opt: Optimizer, params: list[nn.Parameter]) -> list[bool]:
        params[1].requires_grad_(False)
        for step in range(3):
            set_grads(params, step)
            if not grads:
                params[1].grad = None
            opt.step()
        return [param in opt.state for param in params]

    if case.name == "sgd-momentum":
        # torch's SGD makes an entry without a buffer
        compare_with_torch(case, backend, lambda opt, params: scenario(opt, params) and None)
    else:
        compare_with_torch(case, backend, scenario)


@each_class
@each_backend
def test_no_gradient_no_step(case: Case, backend: str) -> None:
    params = small()
    opt = case.make(params, backend=backend)
    before = [p.detach().clone() for p in params]
    opt.step()
    assert_same_params(params, before)
    assert len(opt.state) == 0
    walk(opt, range(2))
    known = snapshot(opt), [p.detach().clone() for p in params]
    opt.zero_grad()
    opt.step()
    assert snapshot(opt) == known[0]
    for p, old in zip(params, known[1], strict=True):
        assert_same_bits("parameter", p, old)


@each_case
@each_backend
def test_zero_gradients_move_nothing_without_decay(case: Case, backend: str) -> None:
    params = small()
    opt = case.make(params, backend=backend, weight_decay=0.0)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        opt.step()
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, old)
    assert all(len(opt.state[p]) > 0 for p in params)


@each_class
def test_complex_parameters_are_refused_by_name(case: Case) -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=rf"^{case.cls.__name__}: parameter 0 .*complex64.*view_as_real"):
        case.make([param])


def embed(opt: Optimizer, params: list[nn.Parameter]) -> None:
    """Train a table of embeddings with sparse gradients, some of them repeated."""
    for rows in ([0, 2, 2], [1, 2, 5], [0]):
        opt.zero_grad()
        out = nn.functional.embedding(torch.tensor(rows), params[0], sparse=True)
        (out * (1.0 + params[0].detach()[rows])).sum().backward()
        assert params[0].grad is not None
        assert params[0].grad.is_sparse
        opt.step()


# torch cannot decay a sparse gradient; nobody is asked to
DECAYING_SGD = [case for case in CASES if case.cls is fw.SGD and "weight_decay" in case.options]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in DECAYING_SGD], ids=lambda case: case.name
)
@each_backend
def test_sparse_gradients(case: Case, backend: str) -> None:
    def make() -> list[nn.Parameter]:
        return small(shapes=[(6, 2)])

    if case.cls is fw.SGD:
        compare_with_torch(case, backend, embed, make)
        return
    params = make()
    opt = case.make(params, backend=backend)
    walk(opt, range(2))
    before = snapshot(opt), params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"(?i)sparse"):
        embed(opt, params)
    assert snapshot(opt) == before[0]
    assert_same_bits("parameter", params[0], before[1])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@each_torch_class
@each_backend
def test_lazy_parameters_are_trained_once_they_have_a_shape(case: Case, backend: str) -> None:
    def train(make: Callable[..., Optimizer]) -> list[nn.Parameter]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
        opt = make(model.parameters())
        x = torch.randn(5, 3)
        model(x)
        for _ in range(3):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
        return list(model.parameters())

    mine = train(lambda params: case.make(params, backend=backend))
    theirs = train(lambda params: peer_of(case, params))
    assert_same_params(mine, theirs)


@each_class
@pytest.mark.parametrize("foreach", [None, True], ids=["default", "foreach"])
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(case: Case, foreach: bool | None, to_none: bool) -> None:
    params = small()
    opt = case.make(params, foreach=foreach)
    walk(opt, range(1))
    # a gradient with a history of its own, as create_graph=True leaves it
    params[0].grad = params[0] * 2.0
    params[1].grad = None
    held = params[2].grad
    opt.zero_grad(set_to_none=to_none)
    assert params[1].grad is None
    for param in (params[0], params[2]):
        if to_none:
            assert param.grad is None
        else:
            assert torch.equal(param.grad, torch.zeros_like(param))
            assert not param.grad.requires_grad
    assert to_none or params[2].grad is held
    walk(opt, range(1, 3))


# groups that are edited


@each_class
@each_backend
def test_the_dict_of_a_group_is_the_one_in_use(case: Case, backend: str) -> None:
    late, early = small(), small()
    group = {"params": list(late), "lr": 0.1}
    opt = case.make([group], backend=backend)
    assert opt.param_groups[0] is group
    assert set(opt.defaults) <= set(group)
    group["lr"] = 0.5
    added = {"params": small(seed=1)}
    opt.add_param_group(added)
    assert opt.param_groups[1] is added
    added["weight_decay"] = 0.25
    peer = case.make(
        [{"params": early, "lr": 0.5}, {"params": small(seed=1), "weight_decay": 0.25}], backend=backend
    )
    for one in (opt, peer):
        walk(one, range(3))
    for p, q in zip(members(opt), members(peer), strict=True):
        assert_same_bits("parameter", p, q)


def _swap_groups(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    opt.param_groups = [{**opt.param_groups[0], "params": fresh}]


def _swap_for_as_many(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    old = opt.param_groups
    opt.param_groups = [{**old[0], "params": fresh[:1]}, {**old[1], "params": fresh[1:], "lr": 0.3}]


def _swap_params(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    opt.param_groups[0]["params"] = fresh


def _extend(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    opt.param_groups[0]["params"].extend(fresh)


def _append(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    opt.param_groups[0]["params"].append(fresh[0])


def _set_one(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    opt.param_groups[1]["params"][1] = fresh[1]


def _add(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    opt.add_param_group({"params": fresh, "weight_decay": 0.1})


def _insert_group(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    opt.param_groups.insert(0, {**opt.param_groups[1], "params": fresh})


def _delete(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    del opt.param_groups[1]


def _pop_param(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    opt.param_groups[1]["params"].pop(0)


def _move(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    opt.param_groups[0]["params"].append(opt.param_groups[1]["params"].pop())


def _reverse(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    opt.param_groups.reverse()


def _empty(opt: Optimizer, fresh: list[nn.Parameter]) -> None:
    opt.param_groups[0]["params"] = []


EDITS = [
    _swap_groups,
    _swap_for_as_many,
    _swap_params,
    _extend,
    _append,
    _set_one,
    _add,
    _insert_group,
    _delete,
    _pop_param,
    _move,
    _reverse,
    _empty,
]


@each_torch_class
@each_backend
@pytest.mark.parametrize("steps", [0, 3], ids=["before", "after"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__.strip("_"))
def test_groups_that_are_edited(
    case: Case, backend: str, steps: int, edit: Callable[[Optimizer, list[nn.Parameter]], None]
) -> None:
    """Whatever is in ``param_groups`` at a step is trained with what stands there; nothing else is."""

    def train(make: Callable[[Any], Optimizer]) -> list[nn.Parameter]:
        old, fresh = small(), small(seed=9)
        opt = make(two_groups(old))
        walk(opt, range(steps))
        edit(opt, fresh)
        walk(opt, range(5, 8))
        return old + fresh

    mine = train(lambda params: case.make(params, backend=backend))
    assert_same_params(mine, train(lambda params: peer_of(case, params)))


def fills(opt: fw.FusedOptimizer, lr: Tensor) -> None:
    for step, rate in enumerate((0.1, 0.01, 0.05)):
        lr.fill_(rate)
        walk(opt, [step])
        assert opt.get_last_lr()[-1] == float(lr)


@each_class
@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("given", ["default", "group", "later"])
def test_a_learning_rate_tensor_that_the_user_fills(
    case: Case, backend: str, given: str, dtype: torch.dtype
) -> None:
    lr, here, there = torch.tensor(1.0, dtype=dtype), small(), small()
    if given == "default":
        opt = case.make(here, lr=lr, backend=backend)
    elif given == "group":
        opt = case.make([{"params": here[:1], "lr": 0.3}, {"params": here[1:], "lr": lr}], backend=backend)
    else:
        opt = case.make(here, backend=backend)
        opt.param_groups[0]["lr"] = lr
    fills(opt, lr)
    assert opt.param_groups[-1]["lr"] is lr
    peer = case.make([{"params": there[:1]}, {"params": there[1:]}], lr=0.3, backend=backend)
    for step, rate in enumerate((0.1, 0.01, 0.05)):
        for group in peer.param_groups[given == "group" :]:
            group["lr"] = float(torch.tensor(rate, dtype=dtype))
        walk(peer, [step])
    for p, q in zip(here, there, strict=True):
        assert_same_bits("parameter", p, q)


BETAS: dict[str, Any] = {
    "tensors": (torch.tensor(0.75), torch.tensor(0.9375)),
    "one tensor": torch.tensor([0.75, 0.9375]),
    "a list": [0.75, 0.9375],
    "tensors of one element": (torch.tensor([0.75]), torch.tensor([0.9375])),
    "numpy": np.array([0.75, 0.9375]),
}


@pytest.mark.parametrize(("case", "name"), having("betas"))
@each_backend
@pytest.mark.parametrize("form", list(BETAS))
@pytest.mark.parametrize("late", [False, True], ids=["given", "set"])
def test_betas_of_every_form(case: Case, name: str, backend: str, form: str, late: bool) -> None:
    here, there = small(), small()
    opt = case.make(here, backend=backend, **({} if late else {name: BETAS[form]}))
    if late:
        opt.param_groups[0][name] = BETAS[form]
    peer = case.make(there, backend=backend, betas=(0.75, 0.9375))
    for one in (opt, peer):
        walk(one, range(4))
    for p, q in zip(here, there, strict=True):
        assert_same_bits("parameter", p, q)
