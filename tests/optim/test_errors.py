"""Bad input: the error, what it says, and that nothing changed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS
from torch import Tensor

import fused_warmup as fw
from fused_warmup import schedules

NAN, INF = math.nan, math.inf
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("Adam", {}),
    "Adam-amsgrad": ("Adam", {"amsgrad": True}),
    "AdamW": ("AdamW", {}),
    "GIAdam": ("GIAdam", {}),
    "RAdam": ("RAdam", {}),
    "SGD": ("SGD", {}),
    "SGD-momentum": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "LAMB": ("LAMB", {"eps": 1e-3}),
    "AdamP": ("AdamP", {"delta": 1e9}),
}
CLASSES = ["Adam", "AdamW", "GIAdam", "RAdam", "SGD", "LAMB", "AdamP"]


def parameter(*shape: int, grad: float | None = 0.5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a parameter of ones, with a gradient unless it is None."""
    param = torch.ones(shape, dtype=dtype, requires_grad=True)
    param.grad = None if grad is None else torch.full(shape, grad, dtype=dtype)
    return param


def freeze(value: Any) -> Any:
    """Return a copy that compares bit for bit: tensors as bytes, containers by their items."""
    if isinstance(value, Tensor):
        if value.is_meta or value.layout != torch.strided:
            return ("tensor", str(value.layout), tuple(value.shape))
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return ("tensor", str(value.dtype), tuple(value.shape), raw)
    if isinstance(value, dict):
        return {key: freeze(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [freeze(item) for item in value]
    return repr(value)


def snapshot(opt: fw.FusedOptimizer) -> dict[str, Any]:
    """Return everything that an error must leave alone: parameters, states, counters, record and options."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    params = [param for group in opt.param_groups for param in group["params"]]
    return {
        "parameters": freeze(params),
        "groups": freeze(groups),
        "states": freeze([opt.state.get(param, {}) for param in params]),
        "counters": freeze(opt.session.counters),
        "rows": len(opt.telemetry),
        "telemetry": freeze(opt.telemetry.rows()),
        "pending_scalars": freeze(opt.telemetry.pending_scalars),
        "options": repr((opt.max_grad_norm, opt.nonfinite, opt.average)),
    }


def assert_refused(
    act: Callable[[], Any], error: type[Exception], message: str, opt: fw.FusedOptimizer | None = None
) -> None:
    """Check type and message, and that the optimizer is as it was, bit for bit, also on a second try."""
    before = None if opt is None else snapshot(opt)
    for _ in range(2):
        with pytest.raises(error, match=message) as caught:
            act()
        assert type(caught.value) is error
        assert str(caught.value).endswith(".")
        assert opt is None or snapshot(opt) == before


def says(owner: str, name: str, condition: str, value: str) -> str:
    """Return the pattern of ``<owner>: <name> must <condition>, got <value>.``."""
    return "^" + re.escape(f"{owner}: {name} must {condition}, got {value}.")


# hyper-parameters

AT_LEAST_0 = "be finite and >= 0"
NUMBER = "be a number"
FLAG = "be True or False"
UNIT = "lie in [0, 1)"
KINDS = "be one of 'zeros', 'grad', 'random'"


def numbers(name: str, condition: str, *values: Any) -> list[tuple[str, Any, type[Exception], str, str]]:
    """Return rows for numbers out of range, and for things that are no numbers."""
    rows = [(name, value, ValueError, condition, repr(value)) for value in values]
    wrong = ["0.1", None, True, [0.1], 1j, torch.ones(2), np.ones(2), torch.tensor(True)]
    return rows + [(name, value, TypeError, NUMBER, "") for value in wrong]


def flags(name: str) -> list[tuple[str, Any, type[Exception], str, str]]:
    """Return rows for what is no bool."""
    return [(name, value, TypeError, FLAG, repr(value)) for value in (2, None, "yes")]


SHARED = [
    *numbers("lr", AT_LEAST_0, -1e-3, NAN, INF, -INF, 10**400),
    ("lr", torch.tensor(-1.0), ValueError, AT_LEAST_0, "-1.0"),
    ("lr", torch.tensor([NAN]), ValueError, AT_LEAST_0, "nan"),
    *numbers("weight_decay", AT_LEAST_0, -0.1, NAN, INF),
    *flags("maximize"),
    ("schedule", lambda t: 1.0, TypeError, "be a fused_warmup schedule or None", ""),
    ("schedule", 0.5, TypeError, "be a fused_warmup schedule or None", "0.5"),
    ("weight_decay_schedule", [1.0], TypeError, "be a fused_warmup schedule or None", "[1.0]"),
]
MOMENTS = [
    *numbers("eps", AT_LEAST_0, -1e-8, NAN, INF),
    *((f"betas[{i}]", x, ValueError, UNIT, repr(x)) for i in (0, 1) for x in (1.0, -0.1, 1.5, NAN, INF)),
    *((f"betas[{i}]", x, TypeError, NUMBER, repr(x)) for i in (0, 1) for x in ("0.9", None, True)),
    *(
        ("betas", x, TypeError, "be a pair of numbers", "")
        for x in (0.9, (0.9,), (0.9, 0.99, 0.999), "ab", None)
    ),
]
DECOUPLED = flags("decoupled_weight_decay")
# True equals the default 1.0, so setting it later changes nothing
INIT = [
    row
    for row in numbers("exp_avg_sq_init_scale", AT_LEAST_0, -1.0, NAN, INF)
    if row[1] is not True and not (isinstance(row[1], Tensor) and row[1].dtype == torch.bool)
]
AMSGRAD = flags("amsgrad")
WORD = [("exp_avg_sq_init", x, ValueError, KINDS, repr(x)) for x in ("ones", "", None, 0, ["grad"])]
HYPERS = {
    "Adam": [*SHARED, *MOMENTS, *DECOUPLED, *AMSGRAD, *INIT, *WORD],
    "AdamW": [*SHARED, *MOMENTS, *AMSGRAD, *INIT, *WORD],
    "GIAdam": [*SHARED, *MOMENTS, *DECOUPLED, *AMSGRAD, *INIT],
    "RAdam": [
        *SHARED,
        *MOMENTS,
        *DECOUPLED,
        *numbers("rho_threshold", "be finite and >= 4", 3.9, NAN, INF),
        *(
            ("unrectified", x, ValueError, "be one of 'momentum', 'skip'", repr(x))
            for x in ("none", "", None, True)
        ),
    ],
    "SGD": [
        *SHARED,
        *numbers("momentum", AT_LEAST_0, -0.9, NAN, INF),
        *numbers("dampening", "be finite and >= -inf", NAN, INF, -INF),
        *flags("nesterov"),
        ("nesterov", True, ValueError, "be False unless momentum > 0 and dampening = 0", "True"),
    ],
}
HYPERS["LAMB"] = [
    *SHARED,
    *MOMENTS,
    *flags("grad_averaging")[1:],
    *flags("bias_correction")[1:],
    *(("trust_clip", x, ValueError, "be finite and > 0", repr(x)) for x in (0.0, -1.0, NAN, -INF)),
    *(("trust_clip", x, TypeError, NUMBER, repr(x)) for x in ("1", [1.0])),
    *(("norm_clip", x, TypeError, "be a pair of numbers or None", repr(x)) for x in (1.0, (1.0,), "ab")),
    *(
        ("decay_mode", x, ValueError, "be one of 'update', 'gradient', 'decoupled'", repr(x))
        for x in ("l2", None)
    ),
]
HYPERS["AdamP"] = [
    *SHARED,
    *MOMENTS,
    *numbers("delta", AT_LEAST_0, -0.1, NAN, INF),
    *numbers("wd_ratio", AT_LEAST_0, -0.1, NAN, INF),
    *flags("nesterov"),
]
HYPER_CASES = [
    pytest.param(owner, *row, id=f"{owner}-{row[0]}-{i}")
    for owner, rows in HYPERS.items()
    for i, row in enumerate(rows)
]


def keywords(name: str, value: Any) -> dict[str, Any]:
    """Return the keyword for an argument; ``betas[i]`` is inside a pair."""
    if name.startswith("betas["):
        return {"betas": (value, 0.9) if name == "betas[0]" else (0.9, value)}
    return {name: value}


@pytest.mark.parametrize(("owner", "name", "value", "error", "condition", "got"), HYPER_CASES)
def test_hyper_parameters(
    owner: str, name: str, value: Any, error: type[Exception], condition: str, got: str
) -> None:
    message = "^" + re.escape(f"{owner}: {name} must {condition}, got {got}")
    bad = keywords(name, value)
    make = getattr(fw, owner)
    assert_refused(lambda: make([parameter(3)], **bad), error, message)

    opt = make([parameter(3)])
    opt.step()
    group = {"params": [parameter(2)], **bad}
    assert_refused(lambda: opt.add_param_group(group), error, message, opt)
    assert len(opt.param_groups) == 1
    opt.param_groups[0].update(bad)
    assert_refused(opt.step, error, message, opt)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_goes_on_after_a_broken_learning_rate(backend: str) -> None:
    params = [parameter(3), parameter(3)]
    broken, smooth = (fw.Adam([param], lr=0.1, backend=backend) for param in params)
    for i in range(3):
        if i == 1:
            broken.param_groups[0]["lr"] = NAN
            assert_refused(broken.step, ValueError, says("Adam", "lr", AT_LEAST_0, "nan"), broken)
            broken.param_groups[0]["lr"] = 0.1
        broken.step()
        smooth.step()
    assert snapshot(broken) == snapshot(smooth)


# options of the whole optimizer

OPTIONS = [
    *numbers("max_grad_norm", "be finite and > 0", -1.0, NAN, -INF),
    *(
        ("nonfinite", x, ValueError, "be one of 'propagate', 'skip'", repr(x))
        for x in ("raise", "", None, True)
    ),
    *(
        ("backend", x, ValueError, "be one of 'auto', 'reference', 'cpu', 'triton', 'cuda'", repr(x))
        for x in ("gpu", "", None)
    ),
    *(("average", x, TypeError, "be EMA, SWA or None", "") for x in (0.99, "ema", fw.EMA, True)),
    *flags("telemetry"),
    ("differentiable", True, ValueError, "be False", "True"),
]
OPTIONS = [row for row in OPTIONS if not (row[0] == "max_grad_norm" and row[1] is None)]
NOT_PER_GROUP = {"max_grad_norm", "nonfinite", "average", "backend", "telemetry"}


@pytest.mark.parametrize("owner", CLASSES)
@pytest.mark.parametrize(
    ("name", "value", "error", "condition", "got"),
    [pytest.param(*row, id=f"{row[0]}-{i}") for i, row in enumerate(OPTIONS)],
)
def test_options(owner: str, name: str, value: Any, error: type[Exception], condition: str, got: str) -> None:
    message = "^" + re.escape(f"{owner}: {name} must {condition}, got {got}")
    assert_refused(lambda: getattr(fw, owner)([parameter(3)], **{name: value}), error, message)


@pytest.mark.parametrize("value", [-1.0, NAN, -INF, "1", True])
def test_max_grad_norm_broken_later(value: Any) -> None:
    opt = fw.Adam([parameter(3)], max_grad_norm=1.0)
    opt.step()
    opt.max_grad_norm = value
    error = ValueError if isinstance(value, float) else TypeError
    assert_refused(opt.step, error, "^Adam: max_grad_norm must be ", opt)


@pytest.mark.parametrize("owner", CLASSES)
@pytest.mark.parametrize("name", sorted(NOT_PER_GROUP))
def test_options_of_the_whole_optimizer_are_refused_in_a_group(owner: str, name: str) -> None:
    message = says(owner, name, "be given once for the whole optimizer", "1.0")
    make = getattr(fw, owner)
    assert_refused(lambda: make([{"params": [parameter(3)], name: 1.0}]), ValueError, message)
    opt = make([parameter(3)])
    assert_refused(
        lambda: opt.add_param_group({"params": [parameter(3)], name: 1.0}), ValueError, message, opt
    )


@pytest.mark.parametrize("owner", CLASSES)
def test_differentiable_is_refused_in_a_group(owner: str) -> None:
    message = says(owner, "differentiable", "be False", "True")
    group = {"params": [parameter(3)], "differentiable": True}
    assert_refused(lambda: getattr(fw, owner)([group]), ValueError, message)


@pytest.mark.parametrize("owner", CLASSES)
def test_unknown_keyword(owner: str) -> None:
    with pytest.raises(TypeError, match=rf"^{owner}\(\) got an unexpected keyword argument 'momentun'"):
        getattr(fw, owner)([parameter(3)], momentun=0.9)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_unavailable_backend(backend: str) -> None:
    if backend in fw.available_backends():
        pytest.skip(f"{backend} is available here")
    with pytest.raises(RuntimeError, match=f'backend="{backend}" is unavailable: .*Available: reference'):
        fw.Adam([parameter(3)], backend=backend)


# schedules and averages

MAKERS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: schedules.warmup(-5), ValueError, says("warmup", "steps", "be >= 0", "-5")),
    (lambda: schedules.warmup(1.5), TypeError, says("warmup", "steps", "be an integer", "1.5")),
    (lambda: schedules.warmup(None), TypeError, says("warmup", "steps", "be an integer", "None")),
    (lambda: schedules.warmup(True), TypeError, says("warmup", "steps", "be an integer", "True")),
    (lambda: schedules.warmup(5, start=NAN), ValueError, says("warmup", "start", AT_LEAST_0, "nan")),
    (lambda: schedules.warmup(5, start=-0.1), ValueError, says("warmup", "start", AT_LEAST_0, "-0.1")),
    (lambda: schedules.constant(NAN), ValueError, says("constant", "value", AT_LEAST_0, "nan")),
    (lambda: schedules.constant("1"), TypeError, says("constant", "value", NUMBER, "'1'")),
    (lambda: schedules.constant(1.0, 0), ValueError, says("constant", "steps", "be >= 1", "0")),
    (lambda: schedules.linear(1.0, -0.5, 3), ValueError, says("linear", "end", AT_LEAST_0, "-0.5")),
    (lambda: schedules.linear(INF, 0.0, 3), ValueError, says("linear", "start", AT_LEAST_0, "inf")),
    (lambda: schedules.linear(1.0, 0.0, -3), ValueError, says("linear", "steps", "be >= 1", "-3")),
    (lambda: schedules.cosine(1.0, NAN, 3), ValueError, says("cosine", "end", AT_LEAST_0, "nan")),
    (lambda: schedules.cosine(1.0, 0.0, "3"), TypeError, says("cosine", "steps", "be an integer", "'3'")),
    (
        lambda: schedules.exponential(0.0, 1.0, 3),
        ValueError,
        says("exponential", "start", "be finite and > 0", "0.0"),
    ),
    (
        lambda: schedules.exponential(1.0, 0.0, 3),
        ValueError,
        says("exponential", "end", "be finite and > 0", "0.0"),
    ),
    (
        lambda: schedules.polynomial(1.0, 0.0, 3, 0.0),
        ValueError,
        says("polynomial", "power", "be finite and > 0", "0.0"),
    ),
    (
        lambda: schedules.inverse_sqrt(0.0),
        ValueError,
        says("inverse_sqrt", "timescale", "be finite and > 0", "0.0"),
    ),
    (
        lambda: schedules.inverse_sqrt(NAN),
        ValueError,
        says("inverse_sqrt", "timescale", "be finite and > 0", "nan"),
    ),
    (lambda: schedules.table([]), ValueError, says("table", "values", "hold at least one multiplier", "()")),
    (lambda: schedules.table([1.0, NAN]), ValueError, says("table", "values[1]", AT_LEAST_0, "nan")),
    (lambda: schedules.table([1.0, 0.5, -1.0]), ValueError, says("table", "values[2]", AT_LEAST_0, "-1.0")),
    (lambda: schedules.table(["a"]), TypeError, says("table", "values[0]", NUMBER, "'a'")),
    (
        lambda: schedules.constant().then(schedules.warmup(3)),
        ValueError,
        says("Schedule", "then()", "follow a schedule that ends", "'constant'"),
    ),
    (
        lambda: schedules.warmup(3).then(schedules.inverse_sqrt(5.0)).then(schedules.warmup(3)),
        ValueError,
        says("Schedule", "then()", "follow a schedule that ends", "'inverse_sqrt'"),
    ),
    (lambda: schedules.warmup(3).then(0.5), TypeError, says("Schedule", "other", "be a Schedule", "0.5")),
    (lambda: schedules.warmup(3)(-1), ValueError, says("Schedule", "t", "be >= 0", "-1")),
    (lambda: schedules.warmup(3)(0.5), TypeError, says("Schedule", "t", "be an integer", "0.5")),
    (lambda: schedules.warmup(3).values(-1), ValueError, says("Schedule", "n", "be >= 0", "-1")),
    (
        lambda: len(schedules.constant()),
        TypeError,
        "^Schedule: len\\(\\) must be asked of one that ends, got",
    ),
    (lambda: fw.EMA(1.1), ValueError, says("EMA", "decay", "lie in [0, 1]", "1.1")),
    (lambda: fw.EMA(-0.1), ValueError, says("EMA", "decay", "lie in [0, 1]", "-0.1")),
    (lambda: fw.EMA(NAN), ValueError, says("EMA", "decay", "lie in [0, 1]", "nan")),
    (lambda: fw.EMA("0.9"), TypeError, says("EMA", "decay", NUMBER, "'0.9'")),
    (lambda: fw.EMA(0.9, every=0), ValueError, says("EMA", "every", "be >= 1", "0")),
    (lambda: fw.EMA(0.9, every=1.5), TypeError, says("EMA", "every", "be an integer", "1.5")),
    (lambda: fw.SWA(0), ValueError, says("SWA", "start", "be >= 1", "0")),
    (lambda: fw.SWA(-1), ValueError, says("SWA", "start", "be >= 1", "-1")),
    (lambda: fw.SWA(1.0), TypeError, says("SWA", "start", "be an integer", "1.0")),
    (lambda: fw.SWA(1, every=-1), ValueError, says("SWA", "every", "be >= 1", "-1")),
]


@pytest.mark.parametrize(("make", "error", "message"), MAKERS, ids=range(len(MAKERS)))
def test_schedules_and_averages(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    assert_refused(make, error, message)


SCHEDULE = schedules.warmup(4).then(schedules.table([1.0, 0.5, 0.25]))


def altered(change: Callable[[dict[str, Any]], Any]) -> str:
    """Return the JSON of a schedule after a change."""
    data = json.loads(SCHEDULE.to_json())
    change(data)
    return json.dumps(data)


ALTERED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda d: d.update(version=2), "^from_json: version must be 1, got 2"),
    "no version": (lambda d: d.pop("version"), "^from_json: version must be 1, got None"),
    "format": (lambda d: d.update(format="other"), "^from_json: format must be .*, got 'other'"),
    "segments of another type": (lambda d: d.update(segments={}), "^from_json: segments must be a list"),
    "kind": (
        lambda d: d["segments"][1].update(kind="stairs"),
        "^from_json: segments\\[1\\].kind must be one of .*, got 'stairs'",
    ),
    "missing key": (lambda d: d["segments"][0].pop("end"), "^from_json: segments\\[0\\] must have the keys"),
    "unknown key": (
        lambda d: d["segments"][0].update(colour=1),
        "^from_json: segments\\[0\\] must have the keys",
    ),
    "steps": (lambda d: d["segments"][0].update(steps=-1), "segments\\[0\\].*steps must be >= 0, got -1"),
    "steps of another type": (
        lambda d: d["segments"][0].update(steps="4"),
        "segments\\[0\\].*steps must be an integer, got '4'",
    ),
    "value": (
        lambda d: d["segments"][1].update(values=[1.0, NAN, 0.25]),
        "segments\\[1\\].*values\\[1\\] must be finite and >= 0, got nan",
    ),
    "no values": (lambda d: d["segments"][1].update(values=[]), "segments\\[1\\].*values must hold at least"),
    "values cut short": (lambda d: d["segments"][1]["values"].pop(), "segments\\[1\\]"),
    "values that are no list": (lambda d: d["segments"][1].update(values=3), "segments\\[1\\]"),
    "end of a warmup": (lambda d: d["segments"][0].update(end=0.5), "segments\\[0\\]"),
}


@pytest.mark.parametrize(("change", "message"), list(ALTERED.values()), ids=list(ALTERED))
def test_altered_schedule_files(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    assert_refused(lambda: schedules.from_json(altered(change)), ValueError, message)


def test_schedule_files_cut_short_name_the_line() -> None:
    text = SCHEDULE.to_json()
    assert schedules.from_json(text) == SCHEDULE
    for size in range(len(text)):
        with pytest.raises(ValueError, match=r"^from_json: ") as caught:
            schedules.from_json(text[:size])
        assert f"line {text[:size].count(chr(10)) + 1}" in str(caught.value), size


# tensors


def sparse() -> Tensor:
    """Return a sparse parameter."""
    return torch.eye(3).to_sparse().requires_grad_()


REFUSED_PARAMS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "sparse": (
        sparse,
        TypeError,
        r"\(shape \(3, 3\), torch.float32, cpu\) must be dense, got layout .*sparse",
    ),
    "complex64": (
        lambda: torch.ones(3, dtype=torch.complex64, requires_grad=True),
        TypeError,
        r"must be float32, float64, bfloat16 or float16, got torch.complex64; give torch.view_as_real",
    ),
    "int64": (lambda: torch.ones(3, dtype=torch.int64), TypeError, r"must be float32.*got torch.int64"),
    "bool": (lambda: torch.ones(3, dtype=torch.bool), TypeError, r"must be float32.*got torch.bool"),
    "expanded": (
        lambda: torch.ones(1).expand(4).requires_grad_(),
        ValueError,
        r"must not overlap itself, got strides \(0,\)",
    ),
    "sliding window": (
        lambda: torch.ones(6).as_strided((3, 3), (1, 1)).requires_grad_(),
        ValueError,
        r"must not overlap itself, got strides \(1, 1\)",
    ),
}


@pytest.mark.parametrize("owner", CLASSES)
@pytest.mark.parametrize("kind", list(REFUSED_PARAMS))
def test_parameters_that_no_backend_takes(owner: str, kind: str) -> None:
    make, error, condition = REFUSED_PARAMS[kind]
    message = rf"^{owner}: parameter 1 .*{condition}"
    bad = make()
    assert_refused(lambda: getattr(fw, owner)([parameter(2), bad]), error, message)
    opt = getattr(fw, owner)([parameter(3)])
    opt.step()
    assert_refused(lambda: opt.add_param_group({"params": [bad]}), error, message, opt)


@pytest.mark.parametrize("owner", CLASSES)
def test_fake_tensors(owner: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    with mode:
        fake = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=rf"^{owner}: parameter 0 .*must hold data, got a FakeTensor"):
        getattr(fw, owner)([fake])
    param = parameter(3)
    opt = getattr(fw, owner)([param])
    opt.step()
    param.grad = mode.from_tensor(torch.ones(3))
    message = rf"^{owner}: the gradient of parameter 0 .*must hold data, got a FakeTensor"
    assert_refused(opt.step, TypeError, message, opt)


@pytest.mark.parametrize("owner", CLASSES)
def test_meta_tensors(owner: str) -> None:
    meta = torch.ones(3, device="meta", requires_grad=True)
    meta.grad = torch.ones(3, device="meta")
    message = rf"^{owner}: parameter 0 .*meta\) must hold data, got a meta tensor"
    opt = getattr(fw, owner)([meta])
    assert_refused(opt.step, ValueError, message, opt)
    opt = getattr(fw, owner)([parameter(2), meta])
    assert_refused(opt.step, ValueError, message.replace("parameter 0", "parameter 1"), opt)


@pytest.mark.parametrize("data", ["not a tensor", 3, None, [1.0]], ids=repr)
def test_parameters_that_are_no_tensors(data: Any) -> None:
    with pytest.raises(TypeError, match="param"):
        fw.Adam([parameter(2), data])


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        fw.Adam([])


def test_a_parameter_in_two_groups() -> None:
    param = parameter(3)
    opt = fw.Adam([param])
    before = snapshot(opt)
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [param]})
    assert snapshot(opt) == before


def sparse_grad(param: Tensor) -> None:
    """Give a sparse gradient."""
    param.grad = torch.eye(3).to_sparse()


def other_shape(param: Tensor) -> None:
    """Give a gradient of another shape, as ``p.data =`` can."""
    data, param.data = param.data, torch.ones(2, 2)
    param.grad = torch.ones(2, 2)
    param.data = data


REFUSED_GRADS: dict[str, tuple[Callable[[Tensor], None], type[Exception], str]] = {
    "sparse": (sparse_grad, RuntimeError, "must be dense, got layout .*sparse.*SparseAdam"),
    "other shape": (other_shape, ValueError, r"must have its shape, got \(2, 2\)"),
}


@pytest.mark.parametrize("trained", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("kind", list(REFUSED_GRADS))
@pytest.mark.parametrize("owner", CLASSES)
def test_gradients_that_no_backend_takes(owner: str, kind: str, trained: bool) -> None:
    give, error, condition = REFUSED_GRADS[kind]
    if getattr(fw, owner).spec.takes_sparse and kind == "sparse":
        pytest.skip("SGD takes sparse gradients")
    params = [parameter(2), parameter(3, 3)]
    opt = getattr(fw, owner)(params, average=fw.EMA(0.9), max_grad_norm=1.0)
    if trained:
        opt.step()
    params[1].grad = None
    give(params[1])
    message = rf"^{owner}: the gradient of parameter 1 \(shape \(3, 3\), torch.float32, cpu\) {condition}"
    assert_refused(opt.step, error, message, opt)


# state dicts


def trained(owner: str, *shapes: tuple[int, ...], **options: Any) -> fw.FusedOptimizer:
    """Return an optimizer after two steps; one group per shape."""
    opt = getattr(fw, owner)([{"params": [parameter(*shape)]} for shape in shapes], **options)
    opt.step()
    opt.step()
    return opt


def changed(opt: fw.FusedOptimizer, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Return the state dict of an optimizer after a change."""
    state = opt.state_dict()
    change(state)
    return state


WRONG_STATES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "RAdam": (lambda: trained("RAdam", (3,), (2,)).state_dict(), "state_dict must be that of a Adam rule"),
    "SGD": (lambda: trained("SGD", (3,), (2,), momentum=0.9).state_dict(), "must be that of a Adam rule"),
    "torch's SGD": (lambda: torch_sgd().state_dict(), "must hold exp_avg and exp_avg_sq"),
    "other shape": (
        lambda: trained("Adam", (3,), (4,)).state_dict(),
        r"\['exp_avg'\] must have the shape \(2,\) of parameter 1, got \(4,\)",
    ),
    "fewer groups": (lambda: trained("Adam", (3,)).state_dict(), "must have 2 parameter groups, got 1"),
    "more parameters": (
        lambda: changed(trained("Adam", (3,), (2,)), lambda s: s["param_groups"][1]["params"].append(2)),
        r"\['param_groups'\]\[1\] must have 1 parameters, got 2",
    ),
    "version": (
        lambda: changed(trained("Adam", (3,), (2,)), lambda s: s["fused_warmup"].update(version=99)),
        r"\['version'\] must be 1, got 99",
    ),
    "no state": (
        lambda: changed(trained("Adam", (3,), (2,)), lambda s: s.pop("state")),
        "state_dict must have the key 'state'",
    ),
    "no groups": (
        lambda: changed(trained("Adam", (3,), (2,)), lambda s: s.pop("param_groups")),
        "state_dict must have the key 'param_groups'",
    ),
    "missing moment": (
        lambda: changed(trained("Adam", (3,), (2,)), lambda s: s["state"][1].pop("exp_avg_sq")),
        "must hold exp_avg and exp_avg_sq, got 'exp_avg'",
    ),
    "bad learning rate": (
        lambda: changed(trained("Adam", (3,), (2,)), lambda s: s["param_groups"][1].update(lr=-1.0)),
        "lr must be finite and >= 0, got -1.0",
    ),
    "broken step": (
        lambda: changed(
            trained("Adam", (3,), (2,)),
            lambda s: (s.pop("fused_warmup"), s["state"][1].update(step=torch.tensor(NAN))),
        ),
        r"\['step'\] must be a whole number >= 0",
    ),
    "infinite step": (
        lambda: changed(
            trained("Adam", (3,), (2,)),
            lambda s: (s.pop("fused_warmup"), s["state"][1].update(step=torch.tensor(INF))),
        ),
        r"\['step'\] must be a whole number >= 0",
    ),
}


def torch_sgd() -> torch.optim.Optimizer:
    """Return torch's SGD with momentum after a step."""
    opt = torch.optim.SGD([{"params": [parameter(3)]}, {"params": [parameter(2)]}], lr=0.1, momentum=0.9)
    opt.step()
    return opt


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
@pytest.mark.parametrize(("make", "condition"), list(WRONG_STATES.values()), ids=list(WRONG_STATES))
def test_wrong_state_dicts(make: Callable[[], dict[str, Any]], condition: str, fresh: bool) -> None:
    opt = fw.Adam([{"params": [parameter(3)]}, {"params": [parameter(2)]}], average=fw.SWA(1))
    if not fresh:
        opt.step()
    state = make()
    assert_refused(lambda: opt.load_state_dict(state), ValueError, rf"^Adam: .*{condition}", opt)


# calls at the wrong time


def test_calls_at_the_wrong_time() -> None:
    opt = fw.Adam([parameter(3)], average=fw.EMA(0.9))
    with pytest.raises(RuntimeError, match=r"^Telemetry: latest\(\) must follow a step"):
        opt.telemetry.latest()
    opt.step()
    with opt.averaged_parameters():
        assert_refused(opt.step, RuntimeError, r"^Adam: step\(\) must not be called inside", opt)
        with pytest.raises(RuntimeError, match="must not be nested"), opt.averaged_parameters():
            pass
    plain = fw.Adam([parameter(3)])
    with pytest.raises(RuntimeError, match="must have average= set, got None"), plain.averaged_parameters():
        pass
    assert_refused(
        lambda: opt.record_loss(torch.ones(2)),
        ValueError,
        says("Adam", "loss", "have one element", "(2,)"),
        opt,
    )
    with pytest.raises(RuntimeError, match="must come before the first step"):
        opt.init_from_gradients()


@pytest.mark.parametrize("grad", [None, NAN, INF])
def test_no_start_from_bad_gradients(grad: float | None) -> None:
    params = [parameter(3, grad=grad), parameter(2, grad=grad)]
    opt = fw.GIAdam(params)
    with pytest.raises(ValueError, match=r"^GIAdam: .grad must "):
        opt.init_from_gradients()
    assert all(not bool(torch.any(state["exp_avg_sq"])) for state in opt.state.values())


# gradients that are not finite

STEPS = 5
POISON = {"nan": NAN, "inf": INF, "-inf": -INF}


def run_poisoned(
    case: str, backend: str, poison: float, at: int | None, **options: Any
) -> tuple[fw.FusedOptimizer, list[dict[str, Any]]]:
    """Train with one bad element at one step; return the optimizer and a snapshot after every step."""
    name, hyper = OPTIMIZERS[case]
    params = [parameter(700), parameter(3, 5, dtype=torch.bfloat16), parameter(6, dtype=torch.float64)]
    opt = getattr(fw, name)(params, lr=0.1, weight_decay=0.1, backend=backend, **hyper, **options)
    snapshots = [snapshot(opt)]
    for i in range(STEPS):
        for j, param in enumerate(params):
            param.grad = torch.linspace(-1.0, 2.0 + i, param.numel()).to(param.dtype).view(param.shape)
            if i == at and j == 1:
                param.grad[1, 2] = poison
        opt.step()
        snapshots.append(snapshot(opt))
    return opt, snapshots


@pytest.mark.pairwise
@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("at", [0, 2, STEPS - 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("poison", list(POISON))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", list(OPTIMIZERS))
def test_skip_leaves_everything_as_it_was(
    case: str, backend: str, poison: str, at: int, clip: float | None
) -> None:
    opt, snapshots = run_poisoned(
        case, backend, POISON[poison], at, max_grad_norm=clip, nonfinite="skip", average=fw.EMA(0.5)
    )
    before, after = snapshots[at], snapshots[at + 1]
    assert after["parameters"] == before["parameters"]
    if at:
        assert after["states"] == before["states"]
    history = opt.telemetry.history()
    assert history["skipped"].tolist() == [float(i == at) for i in range(STEPS)]
    assert history["step"].tolist() == [i + 1 - (i >= at) for i in range(STEPS)]
    assert math.isnan(history["rect"][at])
    for state in opt.state.values():
        assert int(state["step"]) == STEPS - 1
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        assert all(bool(value.isfinite().all()) for value in tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", list(OPTIMIZERS))
def test_skip_is_as_if_the_step_had_not_been_called(case: str, backend: str) -> None:
    name, hyper = OPTIMIZERS[case]
    finals = []
    for grads in ([NAN, 1.0, INF, 2.0, -1.0, NAN], [1.0, 2.0, -1.0]):
        param = parameter(5)
        warmup = schedules.warmup(4)
        opt = getattr(fw, name)(
            [param], schedule=warmup, nonfinite="skip", average=fw.SWA(2, 2), backend=backend, **hyper
        )
        for grad in grads:
            param.grad = torch.full((5,), grad)
            opt.step()
        finals.append((freeze(param), freeze(opt.state[param]), opt.telemetry.latest()["step"]))
    assert finals[0] == finals[1]


# a lane adds the magnitudes of at most 16 float32 gradients before it goes on in double
L1_RTOL = 16 * 2.0**-24


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension fused_warmup._cpu is not built")
@pytest.mark.pairwise
@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("at", [0, 2, STEPS - 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("poison", list(POISON))
@pytest.mark.parametrize("case", list(OPTIMIZERS))
def test_propagate_is_what_the_reference_does(case: str, poison: str, at: int, clip: float | None) -> None:
    options = {"max_grad_norm": clip, "nonfinite": "propagate", "average": fw.EMA(0.5)}
    actual, _ = run_poisoned(case, "cpu", POISON[poison], at, **options)
    expected, _ = run_poisoned(case, "reference", POISON[poison], at, **options)
    left = [param for group in actual.param_groups for param in group["params"]]
    right = [param for group in expected.param_groups for param in group["params"]]
    assert not bool(right[1].isfinite().all())
    for param, param_ref in zip(left, right, strict=True):
        # a few roundings; NaN and infinities at the same places
        torch.testing.assert_close(param, param_ref, equal_nan=True)
        for key, value in expected.state[param_ref].items():
            torch.testing.assert_close(actual.state[param][key], value, equal_nan=True, msg=key)
    assert actual.telemetry.history()["skipped"].tolist() == [0.0] * STEPS
    for key, value in expected.telemetry.history().items():
        torch.testing.assert_close(
            actual.telemetry.history()[key],
            value,
            rtol=L1_RTOL if key == "grad_norm_l1" else 1e-12,
            atol=0.0,
            equal_nan=True,
            msg=key,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "grad", [[1.0, INF, 2.0], [1.0, -INF, INF], [NAN, 1.0, 2.0], [0.1, 0.2, 0.2]], ids=repr
)
def test_clipping_bad_gradients_is_what_torch_does(backend: str, grad: list[float]) -> None:
    ours, theirs = parameter(3), parameter(3)
    ours.grad, theirs.grad = torch.tensor(grad), torch.tensor(grad)
    fw.SGD([ours], lr=1.0, max_grad_norm=0.5, backend=backend).step()
    torch.nn.utils.clip_grad_norm_([theirs], 0.5)
    torch.optim.SGD([theirs], lr=1.0).step()
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    if grad[1] == INF:
        assert theirs.grad.isnan().tolist() == [False, True, False]
    assert torch.equal(ours.grad.isnan(), torch.tensor(grad).isnan()), "the gradient was overwritten"
