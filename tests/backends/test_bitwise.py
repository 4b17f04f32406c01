"""The same bits whatever the threads, the instruction set, the table, the telemetry and the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

import fused_warmup as fw
from fused_warmup.plan.chunks import CHUNK

pytestmark = pytest.mark.skipif(
    "cpu" not in fw.available_backends(), reason="the extension fused_warmup._cpu is not built"
)

# over 80 000 elements, so that five threads get work, in rows that end inside blocks and chunks
SHAPES = [(), (0,), (513,), (7, 5), (8000,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
LARGE = [(180, 181), (32769,)]
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("Adam", {"weight_decay": 0.1}),
    "Adam-amsgrad": ("Adam", {"amsgrad": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "Adam-random": ("Adam", {"exp_avg_sq_init": "random"}),
    "GIAdam": ("GIAdam", {}),
    "RAdam": ("RAdam", {"betas": (0.9, 0.95)}),
    "SGD": ("SGD", {}),
    "SGD-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "LAMB": ("LAMB", {"weight_decay": 0.1}),
    "AdamP": ("AdamP", {"weight_decay": 0.1, "delta": 1.0}),
    "Adam-sphere": ("Adam", {"projection": "sphere"}),
    "AdamP-sphere": ("AdamP", {"projection": "sphere", "radius": 3.0, "delta": 1.0}),
    "SGDP-nesterov": ("SGDP", {"momentum": 0.9, "nesterov": True, "delta": 1e9}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"max_grad_norm": 0.5},
    "all": {
        "max_grad_norm": 0.5,
        "nonfinite": "skip",
        "average": fw.EMA(0.9),
        "schedule": fw.schedules.warmup(3),
    },
}


@cache
def make_tensors(seed: int) -> tuple[torch.Tensor, ...]:
    """Return one tensor of every shape and dtype, as ``make_optimizer`` groups them; not to be written."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for dtype in DTYPES for shape in SHAPES]
    tensors += [torch.randn(shape, generator=generator) for shape in LARGE]
    return (*tensors[::2], *tensors[1::2])


def make_optimizer(case: str, **options: Any) -> fw.FusedOptimizer:
    """Return an optimizer over two groups."""
    torch.manual_seed(0)
    name, hyper = OPTIMIZERS[case]
    params = [tensor.clone().requires_grad_() for tensor in make_tensors(0)]
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 0.003}]
    return getattr(fw, name)(groups, lr=0.01, backend="cpu", **hyper, **options)


def parameters(opt: fw.FusedOptimizer) -> list[torch.Tensor]:
    """Return the parameters of all groups."""
    return [param for group in opt.param_groups for param in group["params"]]


Between = Callable[[fw.FusedOptimizer, int], None]


def train(opt: fw.FusedOptimizer, steps: int = 3, between: Between | None = None) -> fw.FusedOptimizer:
    """Make steps with gradients that depend on the step and the parameter alone; some have none at times."""
    for i in range(steps):
        for j, (param, grad) in enumerate(zip(parameters(opt), make_tensors(i + 1), strict=False)):
            param.grad = None if (i + j) % 5 == 4 else grad
        opt.step()
        if between is not None:
            between(opt, i)
    return opt


def bits(opt: fw.FusedOptimizer, columns: set[str] | None = None) -> dict[str, bytes]:
    """Return parameters, states and telemetry as bytes."""
    found = {}
    for i, param in enumerate(parameters(opt)):
        found[f"parameter {i}"] = param.detach()
        for key, value in opt.state.get(param, {}).items():
            found[f"parameter {i}: {key}"] = value
    if opt.telemetry.enabled:
        for key, value in opt.telemetry.history().items():
            if columns is None or key in columns:
                found[f"telemetry: {key}"] = value
    return {
        key: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for key, value in found.items()
    }


def assert_same_bits(actual: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Compare two runs; name what differs."""
    assert actual.keys() == expected.keys()
    assert [key for key in expected if actual[key] != expected[key]] == []


@cache
def plain_bits(case: str, option: str) -> dict[str, bytes]:
    """Return the bits of an undisturbed run."""
    return bits(train(make_optimizer(case, **OPTIONS[option])))


@contextmanager
def thread_count(n: int) -> Iterator[None]:
    """Set the number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


each_case = pytest.mark.parametrize("case", list(OPTIMIZERS))
each_option = pytest.mark.parametrize("option", list(OPTIONS))


@each_option
@each_case
def test_threads_do_not_change_a_bit(case: str, option: str) -> None:
    results = []
    for n in (1, 2, 5):
        with thread_count(n):
            results.append(bits(train(make_optimizer(case, **OPTIONS[option]))))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@each_case
def test_runs_of_chunks_do_not_change_a_bit(case: str) -> None:
    """A thread takes runs of 10, 5 and 2 chunks here, and the last run is shorter."""
    name, options = OPTIMIZERS[case]
    results = []
    for n in (1, 2, 5):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        params = [torch.randn(300, generator=generator) for _ in range(329)]
        params.append(torch.randn(3 * CHUNK + 5, generator=generator))
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        opt = getattr(fw, name)(params, lr=0.01, **options, **OPTIONS["all"])
        with thread_count(n):
            opt.step()
            opt.step()
            assert len(opt.session.plan._chunks) == 333
            results.append(bits(opt))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_there_is_work_for_five_threads() -> None:
    opt = train(make_optimizer("Adam"), 1)
    assert opt.session.plan.numel // (1 << 14) >= 5
    assert len({int(row) for row in opt.session.plan._chunks["row"]}) >= 5


@pytest.mark.pairwise
@each_option
@each_case
def test_instruction_sets_do_not_change_a_bit(case: str, option: str) -> None:
    """Wherever products and sums round once; the baseline rounds them twice, but its norms and rates agree to 1e-12."""
    from fused_warmup import _cpu
    from fused_warmup.backends.native import CpuBackend

    opts = {}
    for name in _cpu.instruction_sets():
        opts[name] = make_optimizer(case, **OPTIONS[option])
        opts[name].session.backend = CpuBackend(instruction_set=name)
        train(opts[name])
        assert opts[name].session.backend._isa == _cpu.instruction_sets().index(name)
    baseline = opts.pop("baseline")
    results = [bits(opt) for opt in opts.values()]
    for result in results:
        assert_same_bits(result, results[0])
    for opt in opts.values():
        ours, theirs = opt.telemetry.history(), baseline.telemetry.history()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=0, equal_nan=True)
        for p, q in zip(parameters(opt), parameters(baseline), strict=True):
            # a norm over all dtypes has the rounding of the coarsest in it
            eps = torch.finfo(torch.bfloat16 if case.endswith("sphere") else p.dtype).eps
            torch.testing.assert_close(p, q, rtol=2 * eps, atol=2 * eps, equal_nan=True)


def reset(opt: fw.FusedOptimizer, step: int) -> None:
    """Throw the table away."""
    opt.session.reset()


def turn(opt: fw.FusedOptimizer, step: int) -> None:
    """Change a hyper-parameter and change it back, so that the columns of the groups are made again."""
    group = opt.param_groups[0]
    kept, group["maximize"] = group["maximize"], True
    opt.session.prepare(None, None)
    group["maximize"] = kept


def move(opt: fw.FusedOptimizer, step: int) -> None:
    """Put the parameters elsewhere in memory."""
    for param in parameters(opt):
        param.data = param.data.clone()


def reload(opt: fw.FusedOptimizer, step: int) -> None:
    """Save and load."""
    opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("between", [reset, turn, move, reload], ids=lambda f: f.__name__)
@each_case
def test_a_rebuilt_table_does_not_change_a_bit(case: str, between: Between) -> None:
    rebuilt = bits(train(make_optimizer(case, **OPTIONS["all"]), between=between))
    assert_same_bits(rebuilt, plain_bits(case, "all"))


@pytest.mark.parametrize("case", [case for case in OPTIMIZERS if case != "Adam-random"])
def test_a_group_added_later_leaves_the_others_alone(case: str) -> None:
    late = [torch.ones(40_000, requires_grad=True), torch.ones(3, requires_grad=True)]

    def add(opt: fw.FusedOptimizer, step: int) -> None:
        if step == 1:
            for param in late:
                param.grad = torch.ones_like(param)
            opt.add_param_group({"params": late, "lr": 0.5})

    columns = {"step", "lr", "clip_coef"}
    actual = bits(train(make_optimizer(case), between=add), columns)
    expected = bits(train(make_optimizer(case)), columns)
    assert not torch.equal(late[0].detach(), torch.ones(40_000))
    assert_same_bits({key: actual[key] for key in expected}, expected)


@each_option
@each_case
def test_telemetry_does_not_change_a_bit(case: str, option: str) -> None:
    off = bits(train(make_optimizer(case, telemetry=False, **OPTIONS[option])))
    on = bits(train(make_optimizer(case, telemetry=True, **OPTIONS[option])), columns=set())
    assert_same_bits(on, off)


@each_case
def test_norms_are_the_same_bits_from_either_pass(case: str) -> None:
    columns = {"grad_norm", "grad_norm_l1"}
    of_update = bits(train(make_optimizer(case)), columns)
    of_measure = bits(train(make_optimizer(case, max_grad_norm=1e9)), columns)
    of_policy = bits(train(make_optimizer(case, nonfinite="skip")), columns)
    assert "telemetry: grad_norm" in of_update
    assert_same_bits(of_measure, of_update)
    assert_same_bits(of_policy, of_update)


@each_option
@each_case
def test_runs_do_not_differ(case: str, option: str) -> None:
    first = bits(train(make_optimizer(case, **OPTIONS[option])))
    assert_same_bits(bits(train(make_optimizer(case, **OPTIONS[option]))), first)


@each_case
def test_the_update_of_a_tensor_does_not_depend_on_its_neighbours(case: str) -> None:
    if case == "Adam-random":
        pytest.skip("the random start is scaled by the norm over all parameters, as the paper states it")
    if case.endswith("sphere"):
        pytest.skip("all parameters of a group share the factor that brings them to their sphere")
    name, hyper = OPTIMIZERS[case]
    values, grads = make_tensors(0), [make_tensors(i + 1) for i in range(3)]
    together = [value.clone().requires_grad_() for value in values]
    alone = [value.clone().requires_grad_() for value in values]
    optimizers = [getattr(fw, name)(list(reversed(together)), lr=0.01, backend="cpu", **hyper)]
    optimizers += [getattr(fw, name)([param], lr=0.01, backend="cpu", **hyper) for param in alone]
    for step_grads in grads:
        for params in (together, alone):
            for param, grad in zip(params, step_grads, strict=True):
                param.grad = grad.clone()
        for opt in optimizers:
            opt.step()
    assert [i for i, (a, b) in enumerate(zip(together, alone, strict=True)) if not torch.equal(a, b)] == []
