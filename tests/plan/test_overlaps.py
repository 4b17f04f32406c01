"""Parameters that share memory, among many and in any strided form: the right answer, and the cost of it."""

import itertools
import random
import re

import numpy as np
import pytest
import torch

import fused_warmup as fw
from fused_warmup.plan.overlaps import check_disjoint, reach_of
from fused_warmup.plan.rows import Row
from fused_warmup.plan.tensors import overlaps_itself


def check(tensors):
    """The number of elements that the check marks."""
    rows = [Row(t, 0, i, t, t) for i, t in enumerate(tensors)]
    addresses = np.array([t.data_ptr() for t in tensors], np.uint64)
    return check_disjoint("Adam", rows, addresses, np.array([reach_of(t) for t in tensors], np.int64))


def bytes_of(tensor):
    offsets = np.zeros(1, np.int64)
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = np.add.outer(offsets, np.arange(n) * stride).ravel()
    size = tensor.element_size()
    return set((tensor.data_ptr() + np.add.outer(offsets * size, np.arange(size)).ravel()).tolist())


def random_views(rng):
    base = torch.zeros(
        rng.choice([24, 48, 96]), dtype=rng.choice([torch.float32, torch.float64, torch.bfloat16])
    )
    views = []
    for _ in range(rng.randint(2, 5)):
        memory = base.view(rng.choice([base.dtype, base.dtype, torch.float32, torch.bfloat16, torch.float64]))
        shape = [rng.randint(1, 4) for _ in range(rng.randint(0, 3))]
        strides = [rng.choice([1, 2, 3, 4, 6, 8]) for _ in shape]
        reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
        if reach <= memory.numel():
            view = memory.as_strided(shape, strides, rng.randint(0, memory.numel() - reach))
            views += [] if overlaps_itself(view) else [view]
    return views


def test_the_answer_is_that_of_comparing_all_bytes():
    rng, shared, apart = random.Random(0), 0, 0
    for _ in range(1500):
        views = random_views(rng)
        owned = list(map(bytes_of, views))
        pairs = {(i, j) for i, j in itertools.combinations(range(len(views)), 2) if owned[i] & owned[j]}
        shared, apart = shared + bool(pairs), apart + (not pairs)
        if not pairs:
            check(views)
            continue
        with pytest.raises(ValueError, match="must not share memory") as error:
            check(views)
        named = re.search(r"got (\d+) and (\d+)", str(error.value))
        assert named is not None
        assert (int(named[1]), int(named[2])) in pairs
    assert shared > 200
    assert apart > 200


def matrix(rows, columns):
    return torch.zeros(rows, columns)


@pytest.mark.parametrize(
    ("views", "marked"),
    [
        ([torch.zeros(8) for _ in range(3000)], 0),
        (list(matrix(1000, 3000).split(1)), 0),
        (list(matrix(64, 4000).unbind(1)), 0),
        (list(matrix(4000, 64).unbind(1)), 0),
        (list(matrix(50, 3000).split(3, 1)), 0),
        (list(matrix(3000, 50).t().split(1)), 0),
        # a column that lies between two others begins behind both
        ([(m := matrix(100, 50))[:, 5], m[:, 9], m[1:, 7]], 0),
        # the tiles of a row of tiles begin in between each other, those of two rows do not
        ([t for band in matrix(100, 100).split(10) for t in band.split(10, 1)], 0),
        # two strides: an element is marked once; the end of the last row lies behind all columns
        ([*(m := matrix(100, 100))[:50].unbind(1), *m[50:].unbind(0)], 0),
        ([*(m := matrix(100, 100))[:, :50].unbind(1), *m[:, 50:].unbind(0)], 9_950),
    ],
    ids=[
        "tensors",
        "rows",
        "columns",
        "long columns",
        "blocks",
        "rows of a transpose",
        "rolled",
        "tiles",
        "halves",
        "mixed",
    ],
)
def test_the_cost_grows_with_the_elements_at_most(views, marked):
    assert check(views) == marked


def test_elements_at_odd_addresses():
    memory = np.zeros(200, np.uint8)
    first, second = (torch.from_numpy(memory[k : k + 128].view(np.float32))[::4] for k in (0, 14))
    with pytest.raises(ValueError, match="must not share memory, got 0 and 1"):
        check([first, second])
    third = torch.from_numpy(memory[6:134].view(np.float32))[::4]
    assert check([first, third]) == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_columns_are_trained_and_a_shared_one_is_named(backend):
    base = torch.ones(5, 6)
    params = [torch.nn.Parameter(column) for column in base.unbind(1)]
    opt = fw.SGD(params, lr=0.5, backend=backend)
    for i, param in enumerate(params):
        param.grad = torch.full((5,), float(i))
    opt.step()
    assert torch.equal(params[3].detach(), torch.full((5,), -0.5))
    other = torch.nn.Parameter(base[2:4, 3])
    other.grad = torch.ones(2)
    with pytest.raises(ValueError, match="parameters must not share memory, got 3 and 6 over the same"):
        fw.SGD([*params, other], lr=0.5, backend=backend).step()
    # also where a parameter moves later
    params[5].data = params[3].data
    with pytest.raises(ValueError, match="parameters must not share memory, got 3 and 5 over the same"):
        opt.step()
