"""Kinds of parameters and gradients: sparse and complex ones, sizes, layouts and dtypes.

Tests of the GPU backends have tensors of 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peers import each_backend
from scenarios import build, compare_with_torch, each_case, param_of, values, walk
from torch import Tensor

import fused_warmup as fw

# sparse and complex


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
