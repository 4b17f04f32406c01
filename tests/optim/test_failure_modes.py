"""Failure modes of other optimizers in practice that a CPU can show.

Tests of the GPU backends have the rest: devices, 2^31 elements, streams, graph capture and NCCL. Those of LAMB
and AdamP are in test_layers.py.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS, assert_same_bits
from torch import Tensor
from torch.optim import lr_scheduler

import fused_warmup as fw

each_backend = pytest.mark.parametrize("backend", BACKENDS)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("Adam", {}),
    "Adam-amsgrad": ("Adam", {"amsgrad": True}),
    "AdamW": ("AdamW", {}),
    "RAdam": ("RAdam", {}),
    "SGD": ("SGD", {}),
    "SGD-momentum": ("SGD", {"momentum": 0.9}),
    "LAMB": ("LAMB", {"weight_decay": 0.1}),
    "AdamP": ("AdamP", {"delta": 1.0, "weight_decay": 0.1}),
    "SGDP-momentum": ("SGDP", {"momentum": 0.9, "delta": 1e9}),
}
each_case = pytest.mark.parametrize("case", list(CASES))


def build(case: str, params: Any, ours: bool = True, **options: Any) -> torch.optim.Optimizer:
    """Return our optimizer, or that of torch with the same name; the reference where torch has none."""
    name, hyper = CASES[case]
    if not ours and not hasattr(torch.optim, name):
        ours, options = True, {**options, "backend": "reference"}
    return getattr(fw if ours else torch.optim, name)(params, **{"lr": 0.05, **hyper, **options})


def values(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers that depend on the shape and seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def param_of(tensor: Tensor) -> Tensor:
    """Return a leaf over the same memory, with the same strides."""
    return tensor.detach().requires_grad_()


Scenario = Callable[[torch.optim.Optimizer, list[Tensor]], None]


def compare_with_torch(case: str, backend: str, make: Callable[[], list[Tensor]], scenario: Scenario) -> None:
    """Run a scenario with torch's single-tensor optimizer and with ours; the parameters must agree."""
    results = []
    for ours in (False, True):
        params = make()
        options = {"backend": backend} if ours else {"foreach": False}
        scenario(build(case, params, ours, **options), params)
        results.append([param.detach().clone() for param in params])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=3e-6, atol=3e-6)


def walk(opt: torch.optim.Optimizer, params: list[Tensor], steps: int = 3, seed: int = 1) -> None:
    """Make steps with gradients that are new tensors each time."""
    for i in range(steps):
        for j, param in enumerate(params):
            param.grad = values(*param.shape, seed=seed + 10 * i + j).to(param.dtype)
        opt.step()


# kinds of tensors


@each_backend
def test_sparse_gradients_are_refused_by_name(backend: str) -> None:
    """An embedding with sparse=True."""
    table = torch.nn.Embedding(5, 3, sparse=True)
    opt = fw.Adam([torch.nn.Parameter(torch.ones(2)), *table.parameters()], backend=backend)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of parameter 1 \(shape \(5, 3\).*SparseAdam"):
        opt.step()
    assert not opt.state


@each_backend
def test_complex_parameters_train_as_two_reals(backend: str) -> None:
    """Refused as complex, with the advice that then works as torch's own treatment does."""
    theirs = torch.nn.Parameter(torch.complex(values(4), values(4, seed=1)))
    with pytest.raises(TypeError, match="view_as_real"):
        fw.Adam([theirs], backend=backend)
    ours = param_of(torch.view_as_real(theirs.detach().clone()))
    grad = torch.complex(values(4, seed=2), values(4, seed=3))
    theirs.grad, ours.grad = grad, torch.view_as_real(grad).clone()
    torch.optim.Adam([theirs], lr=0.1).step()
    fw.Adam([ours], lr=0.1, backend=backend).step()
    torch.testing.assert_close(torch.view_as_complex(ours.detach()), theirs.detach())


# sizes

EMPTIES = {
    "first": [0, 3, 4],
    "middle": [3, 0, 4],
    "last": [3, 4, 0],
    "several": [0, 3, 0, 0, 4, 0],
    "many tensors, then an empty one": [*[2] * 40, 0],
    "all": [0, 0],
    "one": [0],
}


@each_backend
@each_case
@pytest.mark.parametrize("sizes", list(EMPTIES.values()), ids=list(EMPTIES))
def test_empty_tensors(case: str, backend: str, sizes: list[int]) -> None:
    """An empty tensor, wherever it stands, neither stops nor shifts the others."""
    make = lambda: [param_of(values(n)) for n in sizes]  # noqa: E731
    compare_with_torch(case, backend, make, walk)
    params = make()
    opt = build(case, params, backend=backend, max_grad_norm=1.0, average=fw.EMA(0.9))
    walk(opt, params)
    assert [int(opt.state[param]["step"]) for param in params] == [3] * len(sizes)
    assert opt.telemetry.latest()["step"] == 3.0
    with opt.averaged_parameters():
        pass
    opt.load_state_dict(opt.state_dict())


@each_backend
@each_case
def test_scalars(case: str, backend: str) -> None:
    """0-dim parameters."""
    compare_with_torch(case, backend, lambda: [param_of(values()), param_of(values(1))], walk)


@each_backend
@each_case
@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 511, 513, 32769])
def test_odd_sizes(case: str, backend: str, size: int) -> None:
    """Sizes that are no multiple of a vector."""
    compare_with_torch(case, backend, lambda: [param_of(values(size))], walk)


# layouts


def channels_last() -> list[Tensor]:
    """Return a channels_last weight."""
    return [param_of(values(4, 3, 5, 2).contiguous(memory_format=torch.channels_last))]


def every_second_column() -> list[Tensor]:
    """Return a strided view."""
    return [param_of(values(6, 8)[:, ::2])]


LAYOUTS: dict[str, Callable[[], list[Tensor]]] = {
    "channels_last": channels_last,
    "transposed": lambda: [param_of(values(5, 7).t())],
    "every second column": every_second_column,
    "rows from 1": lambda: [param_of(values(5, 7)[1:])],
    "a column": lambda: [param_of(values(5, 7)[:, 3])],
    "two interleaved views": lambda: [
        param_of(view) for base in [values(6, 8)] for view in (base[:, ::2], base[:, 1::2])
    ],
}


@each_backend
@each_case
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts(case: str, backend: str, layout: str) -> None:
    """Views and permuted memory, with gradients of other strides."""
    compare_with_torch(case, backend, LAYOUTS[layout], walk)


@each_backend
def test_nothing_outside_a_view_is_written(backend: str) -> None:
    """``base[:, ::2]`` leaves the other columns alone."""
    base = values(6, 8)
    before = base.clone()
    param = torch.nn.Parameter(base[:, ::2])
    assert param.data_ptr() == base.data_ptr()
    opt = fw.Adam([param], lr=0.1, backend=backend)
    walk(opt, [param])
    assert torch.equal(base[:, 1::2], before[:, 1::2])
    assert not torch.any(base[:, ::2] == before[:, ::2])


@each_backend
@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_unaligned_views(backend: str, dtype: torch.dtype, offset: int) -> None:
    """An address without the alignment of vector loads gives the same bits."""
    flat = values(1000).to(dtype)
    left, right = param_of(flat.clone()[offset:]), param_of(flat[offset:].clone())
    for param in (left, right):
        walk(fw.RAdam([param], lr=0.05, backend=backend), [param])
    assert torch.equal(left, right)


# dtypes


@each_backend
@each_case
def test_mixed_dtypes_count_steps_once(case: str, backend: str) -> None:
    """Several dtypes in one group; every parameter advances by one a step."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    params = [param_of(values(5).to(dtype)) for dtype in dtypes]
    opt = build(case, params, backend=backend)
    walk(opt, params, 4)
    assert [int(opt.state[param]["step"]) for param in params] == [4] * 5
    alone = [param_of(values(5).to(dtype)) for dtype in dtypes]
    for j, param in enumerate(alone):
        walk(build(case, [param], backend=backend), [param], 4, seed=1 + j)
    assert all(torch.equal(a, b) for a, b in zip(params, alone, strict=True))


@each_backend
@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch forbids gradients of another dtype")
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_another_dtype(backend: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """A gradient enters with the precision it has."""
    param = param_of(values(600).to(dtype))
    param.grad_dtype = None
    opt = fw.SGD([param], lr=1.0, momentum=0.9, backend=backend)
    for i in range(3):
        grad = values(600, seed=i + 1).to(grad_dtype)
        # back to the own dtype in the end: the table must notice
        param.grad = grad if i < 2 else grad.to(dtype)
        opt.step()
        if i == 0:
            buffer = opt.state[param]["momentum_buffer"]
            assert torch.equal(buffer, grad.to(buffer.dtype))
    assert int(opt.state[param]["step"]) == 3


# changes between steps


@each_backend
@each_case
def test_parameters_added_later(case: str, backend: str) -> None:
    """A later group starts at its own first step, with its own options."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        walk(opt, params, 3)
        late = [param_of(values(6, seed=9)), param_of(values(3, 4, seed=8))]
        opt.add_param_group({"params": late, "lr": 0.2, "weight_decay": 0.1})
        params += late
        walk(opt, params, 3, seed=50)

    compare_with_torch(case, backend, lambda: [param_of(values(5))], scenario)


@each_backend
@each_case
def test_gradients_that_come_and_go(case: str, backend: str) -> None:
    """A parameter without a gradient stays and does not advance."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        for i in range(8):
            for j, param in enumerate(params):
                param.grad = values(*param.shape, seed=i) if (i >> j) & 1 else None
            before = [param.detach().clone() for param in params]
            opt.step()
            for param, old in zip(params, before, strict=True):
                assert param.grad is not None or torch.equal(param, old)
        if isinstance(opt, fw.FusedOptimizer):
            assert [int(opt.state[param]["step"]) for param in params] == [4, 4, 4]

    compare_with_torch(case, backend, lambda: [param_of(values(n)) for n in (4, 5, 600)], scenario)


@each_backend
def test_no_gradients_at_all(backend: str) -> None:
    """A step without any gradient changes nothing, the first one included."""
    params = [param_of(values(4)), param_of(values(5))]
    before = [param.detach().clone() for param in params]
    opt = fw.Adam(params, backend=backend, max_grad_norm=1.0, average=fw.EMA(0.9))
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    walk(opt, params)
    opt.zero_grad()
    before = [param.detach().clone() for param in params]
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert opt.telemetry.latest()["grad_norm"] == 0.0


@each_backend
@each_case
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_made_anew_each_step(case: str, backend: str, set_to_none: bool) -> None:
    """Real backward passes, with gradients released or zeroed between."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        kept = []
        for i in range(5):
            opt.zero_grad(set_to_none=set_to_none)
            sum(
                (param * values(*param.shape, seed=i)).sum() + (param**2).sum() for param in params
            ).backward()
            # keeping some alive makes the allocator hand out other addresses
            kept.append([param.grad for param in params][: i % 2])
            opt.step()

    compare_with_torch(case, backend, lambda: [param_of(values(n)) for n in (4, 70)], scenario)


def replace(param: Tensor) -> None:
    """Move to new memory."""
    param.data = param.data.clone()


def turn_half(param: Tensor) -> None:
    """Turn the layout around in new memory; the elements stay."""
    param.data = param.data.t().contiguous().t()


def turn_in_place(param: Tensor) -> None:
    """Transpose over the same memory, as tying code does."""
    param.data = param.data.t()


def roll(param: Tensor) -> None:
    """Put the values elsewhere in a longer stretch: the same tensor, now strided."""
    longer = torch.zeros(param.shape[0], 2 * param.shape[1], dtype=param.dtype)
    longer[:, ::2] = param.data
    param.data = longer[:, ::2]


@each_backend
@each_case
@pytest.mark.parametrize("change", [replace, turn_half, turn_in_place, roll], ids=lambda f: f.__name__)
def test_memory_that_changes_between_steps(case: str, backend: str, change: Callable[[Tensor], None]) -> None:
    """``p.data = ...`` between steps; the address alone does not reveal every change."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        walk(opt, params, 2)
        for param in params:
            param.grad = None
            change(param)
        walk(opt, params, 2, seed=70)

    compare_with_torch(
        case, backend, lambda: [param_of(values(6, 6)), param_of(values(6, 6, seed=5))], scenario
    )


CHANGED_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "double": lambda data: data.double(),
    "bfloat16": lambda data: data.bfloat16(),
    "longer": lambda data: torch.cat([data, data]),
    "shorter": lambda data: data[:300].clone(),
    "shorter, same address": lambda data: data[:300],
    "other shape": lambda data: data.view(20, 30).clone(),
    "other shape, same address": lambda data: data.view(20, 30),
}


@each_backend
@pytest.mark.parametrize("form", list(CHANGED_FORMS))
def test_no_state_of_another_form_is_used(backend: str, form: str) -> None:
    """After ``model.double()`` or pruning, states of the old size or dtype are not read as the new one.

    Checked on the table rather than by a step, which would touch memory that is not ours.
    """
    param = param_of(values(600))
    opt = fw.Adam([param], backend=backend, average=fw.EMA(0.9))
    walk(opt, [param])
    param.grad = None
    param.data = CHANGED_FORMS[form](param.data)
    param.grad = torch.ones_like(param)
    refusal = ""
    try:
        plan, _ = opt.session.prepare(None, None)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith("Adam: parameter 0 "), refusal
        return
    (row,) = plan.rows
    wanted = torch.float64 if param.dtype == torch.float64 else torch.float32
    assert int(plan._columns["numel"][0]) == param.numel()
    for state in (*row.states, row.average):
        assert state.numel() == param.numel()
        assert state.dtype == wanted


@each_backend
def test_a_new_parameter_at_an_old_address(backend: str) -> None:
    """Memory that was freed and given to another parameter brings no state with it."""
    memory = torch.zeros(8)
    first = param_of(memory)
    opt = fw.SGD([first], lr=1.0, momentum=0.9, backend=backend)
    first.grad = torch.ones(8)
    opt.step()
    memory.zero_()
    second = param_of(memory[:4])
    opt = fw.SGD([second], lr=1.0, momentum=0.9, backend=backend)
    second.grad = torch.ones(4)
    opt.step()
    assert memory.tolist() == [-1.0] * 4 + [0.0] * 4


@each_backend
@each_case
def test_moving_a_model_keeps_training(case: str, backend: str) -> None:
    """``Module.to`` and ``load_state_dict`` of the model between steps."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        model = torch.nn.Module()
        model.w = params[0]
        walk(opt, params, 2)
        model.to("cpu", torch.float32)
        model.load_state_dict({"w": values(4, 5, seed=33)})
        walk(opt, params, 2)

    compare_with_torch(case, backend, lambda: [torch.nn.Parameter(values(4, 5))], scenario)


# copies


@each_backend
@each_case
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_as_the_original(case: str, backend: str, how: str) -> None:
    """A copy of model and optimizer trains on with the same bits, and leaves the original alone."""
    params = [torch.nn.Parameter(values(40, 3)), torch.nn.Parameter(values(7))]
    warmup = fw.schedules.warmup(5)
    opt = build(case, params, backend=backend, average=fw.EMA(0.9), schedule=warmup, max_grad_norm=1.0)
    walk(opt, params)
    if how == "deepcopy":
        params2, opt2 = copy.deepcopy((params, opt))
    elif how == "pickle":
        params2, opt2 = pickle.loads(pickle.dumps((params, opt)))
    else:
        file = io.BytesIO()
        torch.save((params, opt), file)
        file.seek(0)
        params2, opt2 = torch.load(file, weights_only=False)
    assert opt2.param_groups[0]["params"][0] is params2[0]
    before = [param.detach().clone() for param in params]
    walk(opt2, params2, seed=40)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    walk(opt, params, seed=40)
    for a, b in zip(params, params2, strict=True):
        assert torch.equal(a, b)
        for key, value in opt.state[a].items():
            assert torch.equal(opt2.state[b][key], value), key
    assert torch.equal(opt.telemetry.rows().nan_to_num(), opt2.telemetry.rows().nan_to_num())
    assert type(opt2) is type(opt)
    assert repr(opt2) == repr(opt)


SPAWN = """
import multiprocessing
import torch
import fused_warmup as fw

def work(opt, queue):
    param = opt.param_groups[0]["params"][0]
    param.grad = torch.ones(4)
    opt.step()
    queue.put((param.tolist(), int(opt.state[param]["step"]), opt.telemetry.latest()["step"]))

if __name__ == "__main__":
    param = torch.nn.Parameter(torch.zeros(4))
    opt = fw.SGD([param], lr=1.0, momentum=0.5)
    param.grad = torch.ones(4)
    opt.step()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(opt, queue))
    process.start()
    print(queue.get(timeout=60))
    process.join()
"""

FORK = """
import os
import torch
import fused_warmup as fw

torch.set_num_threads(2)
param = torch.nn.Parameter(torch.zeros(100_000))
opt = fw.SGD([param], lr=1.0)
param.grad = torch.ones(100_000)
opt.step()
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    opt.step()
    os._exit(0 if float(param[0].detach()) == -2.0 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def run_script(text: str, folder: Path) -> str:
    """Run a script in a new interpreter; return what it printed."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    root = str(Path(fw.__file__).parents[1])
    command = [sys.executable, str(script)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={"PYTHONPATH": root}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_spawned_processes_take_an_optimizer(tmp_path: Path) -> None:
    """An optimizer passed to a spawned process goes on there."""
    assert run_script(SPAWN, tmp_path) == "([-2.5, -2.5, -2.5, -2.5], 2, 2.0)"


def test_forked_processes_make_steps(tmp_path: Path) -> None:
    """A process forked after a parallel step can make one of its own, on one thread."""
    assert run_script(FORK, tmp_path) == "0"


# state dicts


@each_backend
@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7.0])], ids=repr)
def test_step_counts_of_every_kind_load(backend: str, step: Any) -> None:
    """Step counts as int, float, 0-dim and one-element tensors load; we write torch's 0-dim float32."""
    param = param_of(values(4))
    theirs = torch.optim.Adam([param])
    walk(theirs, [param])
    state = theirs.state_dict()
    state["state"][0]["step"] = step
    opt = fw.Adam([param], backend=backend)
    opt.load_state_dict(state)
    assert int(opt.state[param]["step"]) == 7
    written = opt.state_dict()["state"][0]["step"]
    assert (written.dtype, written.shape, float(written)) == (torch.float32, (), 7.0)


@each_backend
@each_case
def test_state_dicts_of_torch_load_both_ways(case: str, backend: str) -> None:
    """Training goes on as torch's after loading torch's state, and the reverse."""

    def continued(first: bool, second: bool) -> list[Tensor]:
        params = [param_of(values(5, 4)), param_of(values(3))]
        options = [{"backend": backend} if ours else {"foreach": False} for ours in (first, second)]
        opt = build(case, params, first, **options[0])
        walk(opt, params, 4)
        other = build(case, params, second, lr=0.9, **options[1])
        other.load_state_dict(opt.state_dict())
        walk(other, params, 4, seed=90)
        return [param.detach() for param in params]

    expected = continued(False, False)
    for path in ((False, True), (True, False), (True, True)):
        for actual, want in zip(continued(*path), expected, strict=True):
            torch.testing.assert_close(actual, want, rtol=3e-6, atol=3e-6)


@each_backend
@pytest.mark.parametrize("saved", [{"momentum": 0.9}, {"momentum": 0.0}], ids=["with", "without"])
@pytest.mark.parametrize("live", [{"momentum": 0.9}, {"momentum": 0.0}], ids=["into with", "into without"])
def test_momentum_comes_with_the_state_dict(
    backend: str, saved: dict[str, float], live: dict[str, float]
) -> None:
    """The saved momentum replaces the live one, so its buffer must load, as in torch."""
    results = []
    for ours in (False, True):
        param = param_of(values(5))
        opt = torch.optim.SGD([param], lr=0.1, **saved)
        walk(opt, [param])
        options = {"backend": backend} if ours else {}
        other = (fw if ours else torch.optim).SGD([param], lr=0.5, **live, **options)
        other.load_state_dict(opt.state_dict())
        walk(other, [param], seed=30)
        results.append(param.detach())
    torch.testing.assert_close(results[1], results[0])


@each_backend
def test_amsgrad_comes_with_the_state_dict(backend: str) -> None:
    """The saved amsgrad flag and its third state replace the live ones."""
    results = []
    for ours in (False, True):
        param = param_of(values(5))
        opt = torch.optim.Adam([param], lr=0.1, amsgrad=True)
        walk(opt, [param])
        other = fw.Adam([param], backend=backend) if ours else torch.optim.Adam([param])
        other.load_state_dict(opt.state_dict())
        walk(other, [param], seed=30)
        results.append(param.detach())
    torch.testing.assert_close(results[1], results[0])


@each_backend
@each_case
def test_loading_keeps_the_buffers(case: str, backend: str) -> None:
    """Values are copied into the tensors that exist."""
    param = param_of(values(5))
    opt = build(case, [param], backend=backend, average=fw.EMA(0.9))
    walk(opt, [param])
    before = {key: (id(value), value.data_ptr()) for key, value in opt.state[param].items()}
    saved = copy.deepcopy(opt.state_dict())
    walk(opt, [param])
    opt.load_state_dict(saved)
    assert {key: (id(value), value.data_ptr()) for key, value in opt.state[param].items()} == before
    assert int(opt.state[param]["step"]) == 3


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loading_keeps_float32_states(backend: str, dtype: torch.dtype) -> None:
    """Float32 moments beside 16-bit parameters stay float32, to the last bit."""
    param = param_of(values(50).to(dtype))
    opt = fw.Adam([param], backend=backend, amsgrad=True, average=fw.EMA(0.9))
    walk(opt, [param])
    saved = copy.deepcopy(opt.state_dict())
    other = fw.Adam([param], backend=backend, amsgrad=True, average=fw.EMA(0.9))
    other.load_state_dict(saved)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "average"):
        assert other.state[param][key].dtype == torch.float32
        assert torch.equal(other.state[param][key], opt.state[param][key])


# 20, and what schedulers do


@each_backend
def test_a_learning_rate_tensor_shared_by_groups(backend: str) -> None:
    """One tensor given to two groups stays the user's, as in torch: filling it sets both."""

    def applied(make: Any, step: Any) -> tuple[list[float], float]:
        lr = torch.tensor(0.1)
        opt = make([{"params": [param_of(values(3))]}, {"params": [param_of(values(3))]}], lr)
        scheduler = lr_scheduler.LambdaLR(opt, [lambda t: 1.0, lambda t: 0.5])
        for _ in range(3):
            step(opt, [p for g in opt.param_groups for p in g["params"]], 1)
            scheduler.step()
        lr.fill_(0.3)
        step(opt, [p for g in opt.param_groups for p in g["params"]], 1)
        return [float(group["lr"]) for group in opt.param_groups], float(lr)

    ours = applied(lambda groups, lr: fw.Adam(groups, lr=lr, backend=backend), walk)
    assert ours == applied(lambda groups, lr: torch.optim.Adam(groups, lr=lr), walk)
    assert ours[0] == [pytest.approx(0.3)] * 2


@each_backend
@each_case
def test_a_learning_rate_tensor_written_in_place(case: str, backend: str) -> None:
    """``group["lr"].fill_(...)`` reaches the next step."""
    params = [param_of(values(5))]
    opt = build(case, params, lr=torch.tensor(0.05), backend=backend)
    applied = []
    for lr in (0.05, 0.01, 0.0):
        opt.param_groups[0]["lr"].fill_(lr)
        walk(opt, params, 1)
        applied.append(opt.telemetry.latest()["lr"])
    assert applied == [float(torch.tensor(lr)) for lr in (0.05, 0.01, 0.0)]


@each_backend
@pytest.mark.parametrize("key", ["weight_decay", "betas"])
def test_other_hyper_parameters_written_in_place(backend: str, key: str) -> None:
    """A decay or a list of betas written in place takes effect like a rate."""
    params = [param_of(values(5)), param_of(values(5))]
    start = {"weight_decay": torch.tensor(0.0), "betas": [0.9, 0.99]}
    end = {"weight_decay": torch.tensor(0.5), "betas": [0.5, 0.99]}
    written = fw.Adam([params[0]], lr=0.1, backend=backend, **{key: start[key]})
    replaced = fw.Adam([params[1]], lr=0.1, backend=backend, **{key: copy.deepcopy(start[key])})
    for opt, param in zip((written, replaced), params, strict=True):
        walk(opt, [param], 2)
    if key == "betas":
        written.param_groups[0]["betas"][0] = 0.5
    else:
        written.param_groups[0]["weight_decay"].fill_(0.5)
    replaced.param_groups[0][key] = end[key]
    for opt, param in zip((written, replaced), params, strict=True):
        walk(opt, [param], 2, seed=5)
    assert torch.equal(params[0], params[1])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (t + 1)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[4],
    ),
}


@each_backend
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
@pytest.mark.parametrize("case", ["Adam", "RAdam", "SGD-momentum"])
def test_schedulers_of_torch(case: str, backend: str, scheduler: str, as_tensor: bool) -> None:
    """Torch's schedulers drive our rates (and momenta) as they drive torch's."""
    results = []
    for ours in (False, True):
        params = [param_of(values(6))]
        options = {"backend": backend} if ours else {"foreach": False}
        lr = torch.tensor(0.05, dtype=torch.float64) if as_tensor and ours else 0.05
        opt = build(case, params, ours, lr=lr, **options)
        driver = SCHEDULERS[scheduler](opt)
        rates = []
        for i in range(12):
            walk(opt, params, 1, seed=i)
            driver.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            rates.append(float(opt.param_groups[0]["lr"]))
        results.append((params[0].detach(), rates))
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-12)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)


# two optimizers; test_errors.py has every policy for gradients that are not finite


@each_backend
@each_case
def test_optimizers_do_not_disturb_each_other(case: str, backend: str) -> None:
    """Two optimizers in turn give the bits of each alone."""

    def pair() -> list[tuple[torch.optim.Optimizer, list[Tensor]]]:
        made = [[param_of(values(50))], [param_of(values(7, 9))]]
        return [(build(case, params, backend=backend), params) for params in made]

    together, apart = pair(), pair()
    for i in range(4):
        for opt, params in together:
            walk(opt, params, 1, seed=i)
    for opt, params in apart:
        for i in range(4):
            walk(opt, params, 1, seed=i)
    for (_, a), (_, b) in zip(together, apart, strict=True):
        assert torch.equal(a[0], b[0])


# memory shared


def test_duplicates() -> None:
    """A parameter given twice is trained once in one group, with a warning, and is an error in two."""
    for twice in (lambda p: [p, p], lambda p: [("a", p), ("b", p)]):
        param = param_of(torch.ones(3))
        param.grad = torch.ones(3)
        with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
            opt = fw.SGD(twice(param), lr=0.5)
        opt.step()
        assert param.tolist() == [0.5] * 3
    with pytest.raises(ValueError, match="more than one parameter group"):
        fw.Adam([{"params": [param]}, {"params": [param]}])


OVERLAPS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "the same memory": lambda base: [base, base.view(-1)],
    "a part": lambda base: [base, base[1:3]],
    "ends overlap": lambda base: [base[:3], base[2:]],
    "the same columns twice": lambda base: [base[:, ::2], base[:, ::2]],
    "some of the columns twice": lambda base: [base[:, ::2], base[:, ::4]],
    "all, and some columns": lambda base: [base, base[:, ::2]],
    "another dtype": lambda base: [base, base.view(torch.bfloat16)],
}


@each_backend
@pytest.mark.parametrize("overlap", list(OVERLAPS))
def test_parameters_over_the_same_memory(backend: str, overlap: str) -> None:
    """Tied weights that are two tensors are named, and nothing is changed."""
    base = values(4, 8)
    before = base.clone()
    params = [param_of(view) for view in OVERLAPS[overlap](base)]
    for param in params:
        param.grad = torch.ones_like(param)
    opt = fw.SGD(params, lr=1.0, momentum=0.9, backend=backend)
    with pytest.raises(ValueError, match=r"^SGD: parameters must not share memory, got 0 and 1"):
        opt.step()
    assert torch.equal(base, before)
    assert not opt.state


@each_backend
@each_case
def test_gradients_with_strange_memory(case: str, backend: str) -> None:
    """Gradients that are expanded, shared between parameters, or the parameter itself."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        params[0].grad = torch.tensor(0.5).expand(600)
        params[1].grad = params[2].grad = values(600, seed=4)
        opt.step()
        params[0].grad = values(1, seed=3).expand(600)
        params[1].grad = params[0].grad
        params[2].grad = values(1200, seed=3)[::2]
        opt.step()
        # torch's AdamW decays the parameter before it reads the gradient, so it gets a copy
        mine = isinstance(opt, fw.FusedOptimizer)
        params[0].grad = params[0].data if mine else params[0].data.clone()
        params[1].grad = params[1].data.clone()
        opt.step()

    compare_with_torch(case, backend, lambda: [param_of(values(600, seed=i)) for i in range(3)], scenario)


@each_backend
def test_gradients_that_need_gradients(backend: str) -> None:
    """``create_graph=True`` leaves gradients with a history of their own."""
    param = param_of(values(4))
    opt = fw.Adam([param], backend=backend)
    (grad,) = torch.autograd.grad((param**3).sum(), param, create_graph=True)
    param.grad = grad
    opt.step()
    assert int(opt.state[param]["step"]) == 1


# numbers of steps


@each_backend
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.6, 2.0 / 3.0, 0.7, 0.9, 0.99, 0.999, 0.9999])
def test_radam_near_its_threshold(backend: str, beta2: float) -> None:
    """Rectification sets in at the step of the closed form, or never; no NaN on the way."""
    param = param_of(values(4))
    opt = fw.RAdam([param], betas=(0.9, beta2), backend=backend)
    walk(opt, [param], 12)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    for t, rect in enumerate(opt.telemetry.history()["rect"].tolist(), 1):
        rho = rho_inf - 2.0 * t * beta2**t / (1.0 - beta2**t)
        expected = 0.0
        if rho > 5.0:
            expected = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        assert rect == pytest.approx(expected, rel=1e-9)
    assert bool(param.isfinite().all())


@each_backend
@each_case
@pytest.mark.parametrize("start", [2**24, 2**31, 2**53, 2**60], ids=["2^24", "2^31", "2^53", "2^60"])
def test_counting_goes_on_after_huge_steps(case: str, backend: str, start: int) -> None:
    """The float32 of torch stops at 2^24; the count behind it is int64, in the state dict as well."""
    param = param_of(values(4))
    opt = build(case, [param], backend=backend)
    walk(opt, [param], 1)
    opt.state[param]["step"].fill_(start)
    walk(opt, [param], 3)
    assert opt.state_dict()["fused_warmup"]["steps"].tolist() == [start + 3]
    assert float(opt.state[param]["step"]) == float(np.float32(start + 3))
    assert bool(param.isfinite().all())
    other = build(case, [param], backend=backend)
    other.load_state_dict(opt.state_dict())
    walk(other, [param], 1)
    assert other.state_dict()["fused_warmup"]["steps"].tolist() == [start + 4]


# flags


@each_backend
@each_case
@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable"])
def test_flags_of_torch_change_nothing(case: str, backend: str, flag: str) -> None:
    """Accepted, so that a swap-in needs one changed word."""
    plain, flagged = [param_of(values(20))], [param_of(values(20))]
    walk(build(case, plain, backend=backend), plain)
    walk(build(case, flagged, backend=backend, **{flag: True}), flagged)
    assert torch.equal(plain[0], flagged[0])


@each_backend
@each_case
def test_maximize(case: str, backend: str) -> None:
    """Ascent is descent with the opposite gradient."""

    def scenario(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        opt.param_groups[0]["maximize"] = True
        walk(opt, params)

    compare_with_torch(case, backend, lambda: [param_of(values(20))], scenario)


@each_backend
def test_options_turned_on_later(backend: str) -> None:
    """Amsgrad and momentum switched between steps; SGD's buffer then starts with the whole gradient."""

    def amsgrad(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        walk(opt, params, 2)
        opt.param_groups[0]["amsgrad"] = True
        if not isinstance(opt, fw.FusedOptimizer):
            opt.state[params[0]]["max_exp_avg_sq"] = torch.zeros_like(params[0])
        walk(opt, params, 3, seed=20)
        opt.param_groups[0]["amsgrad"] = False
        walk(opt, params, 2, seed=60)

    def momentum(opt: torch.optim.Optimizer, params: list[Tensor]) -> None:
        opt.param_groups[0]["dampening"] = 0.5
        walk(opt, params, 2)
        opt.param_groups[0]["momentum"] = 0.9
        walk(opt, params, 3, seed=20)

    make = lambda: [param_of(values(20))]  # noqa: E731
    compare_with_torch("Adam", backend, make, amsgrad)
    compare_with_torch("SGD", backend, make, momentum)


# the protocol of torch.optim


@each_backend
@each_case
def test_closures(case: str, backend: str) -> None:
    """A closure is called once with gradients enabled, even under no_grad; the loss comes back and is recorded."""
    param = param_of(values(4))
    opt = build(case, [param], backend=backend)
    calls = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    with torch.no_grad():
        losses = [opt.step(closure) for _ in range(3)]
    assert [float(loss.detach()) for loss in losses] == calls
    assert len(calls) == 3
    recorded = opt.telemetry.history()["loss"].tolist()
    assert recorded == [float(torch.tensor(call)) for call in calls]
    assert calls[2] < calls[0]
    assert build(case, [param_of(values(2))], backend=backend).step(lambda: 0.25) == 0.25


@each_backend
def test_an_error_in_the_closure_changes_nothing(backend: str) -> None:
    """The exception of the closure propagates."""
    param = param_of(values(4))
    opt = fw.Adam([param], backend=backend)
    walk(opt, [param])
    before = param.detach().clone()

    def closure() -> Tensor:
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        opt.step(closure)
    assert torch.equal(param, before)
    assert len(opt.telemetry) == 3


@each_backend
@each_case
def test_hooks_and_profiler_names(case: str, backend: str) -> None:
    """Pre and post hooks run around the step, and the profiler sees torch's name for it."""
    param = param_of(values(4))
    opt = build(case, [param], backend=backend)
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o is opt, param.detach().clone())))
    opt.register_step_post_hook(
        lambda o, args, kwargs: seen.append(("post", o is opt, param.detach().clone()))
    )
    opt.register_state_dict_post_hook(lambda o, state: seen.append(("saved", o is opt, None)))
    opt.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o is opt, None)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        walk(opt, [param], 1)
    assert [(name, same) for name, same, _ in seen] == [("pre", True), ("post", True)]
    assert not torch.equal(seen[0][2], seen[1][2])
    assert f"Optimizer.step#{type(opt).__name__}.step" in {event.key for event in profile.key_averages()}
    opt.load_state_dict(opt.state_dict())
    assert [name for name, _, _ in seen[2:]] == ["saved", "loaded"]


@each_backend
@each_case
@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("unscaled", [True, False], ids=["unscaled", "scaled"])
def test_grad_scaler(case: str, backend: str, clip: float | None, unscaled: bool) -> None:
    """Unscale, then norm, then clip, with or without ``unscale_``; an overflow halves the scale.

    A skipped step changes nothing, on the first step too, and leaves a row that says so.
    """
    results = []
    for ours in (False, True):
        param = param_of(values(6))
        options = {"backend": backend, "max_grad_norm": clip} if ours else {"foreach": False}
        opt = build(case, [param], ours, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        norms = []
        for i in range(5):
            opt.zero_grad()
            loss = (param * values(6, seed=i)).sum() * (math.inf if i in {0, 3} else 1.0)
            scaler.scale(loss).backward()
            if unscaled or not ours:
                scaler.unscale_(opt)
            if not ours and clip is not None:
                torch.nn.utils.clip_grad_norm_([param], clip)
            norms.append(float(values(6, seed=i).norm()))
            before = [t.clone() for t in (param.detach(), *tensors_of(opt, param))]
            scaler.step(opt)
            scaler.update()
            if ours and i == 3:
                for old, new in zip(before, (param.detach(), *tensors_of(opt, param)), strict=True):
                    assert_same_bits("after an overflow", old, new)
        results.append(param.detach())
        assert scaler.get_scale() == 256.0
        assert not hasattr(opt, "found_inf")
    torch.testing.assert_close(results[1], results[0])
    history = opt.telemetry.history()
    assert history["skipped"].tolist() == [1, 0, 0, 1, 0]
    assert history["step"].tolist() == [0, 1, 2, 2, 3]
    made = history["skipped"] == 0
    assert history["grad_norm"][made].tolist() == pytest.approx([norms[i] for i in (1, 2, 4)], rel=1e-6)
    # without a measure pass nobody looks at the gradients of a step that is not made
    assert not history["grad_norm"][~made].isfinite().any()


@each_backend
@pytest.mark.parametrize("late", [False, True], ids=["first step skipped", "gradient comes later"])
def test_a_random_start_waits_for_the_first_update(backend: str, late: bool) -> None:
    """The random start is scaled by the norm at the first update, even if that is not the first call of ``step``."""
    results = []
    for waits in (False, True):
        torch.manual_seed(3)
        params = [param_of(values(6)), param_of(values(5))]
        opt = fw.Adam(params, lr=0.1, exp_avg_sq_init="random", backend=backend)
        opt.init_state()
        if waits and late:
            opt.step()
        elif waits:
            for p in params:
                p.grad = torch.full_like(p, math.inf)
            opt.found_inf = torch.ones(())
            opt.step()
            del opt.found_inf
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        results.append([p.detach() for p in params])
        assert float(opt.state[params[0]]["exp_avg_sq"].mean()) > 0.0
    for a, b in zip(*results, strict=True):
        assert_same_bits("param", a, b)


def tensors_of(opt: torch.optim.Optimizer, param: Tensor) -> list[Tensor]:
    """The states of a parameter, the count of steps included."""
    return [value for value in opt.state[param].values() if isinstance(value, Tensor)]


@each_backend
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros((), dtype=torch.float64)], ids=["two", "wide"])
def test_what_a_scaler_leaves_is_checked(backend: str, name: str, value: Tensor) -> None:
    """A scale of another kind would be read as other bits."""
    param = param_of(values(4))
    opt = fw.Adam([param], backend=backend)
    walk(opt, [param], 1)
    before = param.detach().clone()
    param.grad = values(4)
    setattr(opt, name, value)
    with pytest.raises(ValueError, match=f"Adam: {name} must be one float32 on cpu, got"):
        opt.step()
    assert_same_bits("param", before, param.detach())


# DTensor


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch was built without gloo")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@each_backend
@each_case
def test_dtensors_train_as_their_shards(case: str, backend: str, mesh: Any) -> None:
    """DTensor parameters, one with an empty shard, give the bits of plain ones; state dicts go round."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    plain = [
        torch.nn.Parameter(values(6, 5)),
        torch.nn.Parameter(values(0, 3)),
        torch.nn.Parameter(values(4)),
    ]
    placements = [Shard(0), Shard(0), Replicate()]
    sharded = [
        torch.nn.Parameter(distribute_tensor(param.detach().clone(), mesh, [placement]))
        for param, placement in zip(plain, placements, strict=True)
    ]
    options = {"backend": backend, "average": fw.EMA(0.9), "max_grad_norm": 1.0}
    optimizers = [build(case, params, **options) for params in (plain, sharded)]
    for i in range(3):
        for opt, params in zip(optimizers, (plain, sharded), strict=True):
            opt.zero_grad()
            for j, param in enumerate(params):
                factor = values(*param.shape, seed=10 * i + j)
                if params is sharded:
                    factor = distribute_tensor(factor, mesh, [placements[j]])
                (param * factor).sum().backward()
            opt.step()
        optimizers[1].load_state_dict(optimizers[1].state_dict())
    for param, shard in zip(plain, sharded, strict=True):
        assert torch.equal(param, shard.to_local())
    model = torch.nn.ParameterList(sharded)
    with optimizers[0].averaged_parameters(), optimizers[1].averaged_parameters(model):
        for param, shard in zip(plain, sharded, strict=True):
            assert torch.equal(param, shard.to_local())


@pytest.fixture
def mesh_of_two() -> Iterator[Any]:
    """A mesh of this process and one that is made up and never answers."""
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("this torch was built without distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


@each_backend
@pytest.mark.parametrize("name", ["LAMB", "AdamP", "SGDP", "Adam"])
def test_rules_of_whole_layers_take_shards(name: str, backend: str, mesh_of_two: Any) -> None:
    """The sums of other processes are asked for; here nobody answers, and the step goes on with its own."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def param_with_gradient(placement: Any) -> torch.nn.Parameter:
        whole = DTensor.from_local(values(3, 5), mesh_of_two, [placement], run_check=False)
        param = torch.nn.Parameter(whole)
        gradient = DTensor.from_local(values(3, 5, seed=1), mesh_of_two, [placement], run_check=False)
        param.grad = gradient
        return param

    for placement in (Replicate(), Shard(0)):
        param = param_with_gradient(placement)
        before = param.to_local().detach().clone()
        opt = getattr(fw, name)([param], lr=0.1, backend=backend)
        opt.step()
        assert not torch.equal(param.to_local(), before)
        assert (opt.session.plan.reduction is not None) == placement.is_shard()


# meta


@each_backend
@each_case
def test_meta_model_then_materialised(case: str, backend: str) -> None:
    """Optimizer over a meta model, ``to_empty``, then training; ``to_empty`` keeps the parameters."""
    with torch.device("meta"):
        model = torch.nn.Linear(4, 3)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        opt = build(case, model.parameters(), backend=backend)
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    params = list(model.parameters())
    assert opt.param_groups[0]["params"][0] is params[0]
    expected = [param_of(values(*param.shape)) for param in params]
    with torch.no_grad():
        for param in params:
            param.copy_(values(*param.shape))
    walk(opt, params)
    walk(build(case, expected, backend=backend), expected)
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))
    assert all(value.device.type == "cpu" for state in opt.state.values() for value in state.values())


# found beside the list


@each_backend
@pytest.mark.parametrize("view", [False, True], ids=["dense", "strided"])
def test_version_counters_protect_stale_graphs(backend: str, view: bool) -> None:
    """A backward pass through a graph from before the step raises, as after torch's optimizers."""
    param = param_of(values(4, 6)[:, ::2] if view else values(4, 6))
    opt = fw.SGD([param], lr=0.1, backend=backend)
    param.grad = torch.ones_like(param)
    stale = (param**2).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@each_backend
def test_version_counters_of_parameters_that_did_not_change(backend: str) -> None:
    """A parameter without a gradient is not written, so its graph is still good, as after torch's."""
    trained, resting = param_of(values(4)), param_of(values(4))
    opt = fw.SGD([trained, resting], lr=0.1, backend=backend)
    walk(opt, [trained, resting], 1)
    resting.grad = None
    graph = (resting**2).sum()
    version = resting._version
    opt.step()
    assert resting._version == version
    graph.backward()
    assert resting.grad is not None


@each_backend
def test_named_parameters(backend: str) -> None:
    """``model.named_parameters()`` is taken as torch takes it, and the names are kept."""
    model = torch.nn.Linear(3, 2)
    opt = fw.AdamW(model.named_parameters(), backend=backend)
    model(values(5, 3)).sum().backward()
    opt.step()
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@each_backend
def test_frozen_parameters(backend: str) -> None:
    """``requires_grad_(False)`` between steps, and back."""
    model = torch.nn.Linear(3, 2)
    opt = fw.Adam(model.parameters(), lr=0.1, backend=backend)
    for frozen in (False, True, False):
        model.weight.requires_grad_(not frozen)
        opt.zero_grad()
        model(values(5, 3)).sum().backward()
        before = model.weight.detach().clone()
        opt.step()
        assert torch.equal(model.weight, before) == frozen


@each_backend
def test_many_tensors_in_many_groups(backend: str) -> None:
    """Hundreds of small tensors, each in a group of its own rate."""
    params = [param_of(values(1 + i % 7, seed=i)) for i in range(150)]
    start = [param.detach().clone() for param in params]
    opt = fw.SGD([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(params)], backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    for i, (param, old) in enumerate(zip(params, start, strict=True)):
        torch.testing.assert_close(param.detach(), old - 0.01 * i)


@each_backend
def test_steps_are_made_with_gradients_on_or_off(backend: str) -> None:
    """The mode of the caller does not matter."""
    results = []
    for mode in (torch.enable_grad, torch.no_grad):
        param = param_of(values(4, 6)[:, ::2])
        opt = fw.Adam([param], lr=0.1, backend=backend, average=fw.EMA(0.9))
        with mode():
            walk(opt, [param])
        results.append(param.detach().clone())
    assert torch.equal(*results)


def test_importing_does_not_load_the_compiler() -> None:
    """Dynamo takes more than a second to import, and no step needs it."""
    root = str(Path(fw.__file__).parents[1])
    code = "import sys, fused_warmup; print('torch._dynamo' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": root}
    )
    assert result.stdout.strip() == "False"
