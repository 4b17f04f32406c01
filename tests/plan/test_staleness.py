"""What tells a table that it is out of date, with and without the extension."""

import gc
import weakref

import numpy as np
import pytest
import torch
from cases import every_backend
from optim.test_dtensors import mesh  # noqa: F401
from torch.nn import Parameter

import fused_warmup as fw
from fused_warmup.plan import address_cache

backend = every_backend
WATCHERS = {
    "python": (address_cache.groups_unchanged, address_cache.states_unchanged),
    "compiled": (
        address_cache.select_reader().groups_unchanged,
        address_cache.select_reader().states_unchanged,
    ),
}


@pytest.mark.parametrize("how", WATCHERS)
def test_groups_that_are_the_same_and_not(how):
    a, b, c = (Parameter(torch.zeros(2)) for _ in range(3))
    same = WATCHERS[how][0]
    members = [[a, b], [c]]

    def held(*lists):
        return same([{"params": params} for params in lists], members)

    assert held([a, b], [c])
    for others in ([[b, a], [c]], [[a, b], [a]], [[a], [c]], [[a, b, c], [c]], [[a, b]], [[a, b], [c], []]):
        assert not held(*others), others


def test_a_shard_that_was_replaced_is_trained(backend, mesh):  # noqa: F811
    """As FSDP does when it moves a model: the parameter stays the same object, and its old memory stays in place."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def placed(value):
        return distribute_tensor(torch.full((4, 3), value), mesh, [Shard(0)])

    param = Parameter(placed(1.0))
    opt = fw.SGD([param], lr=0.5, backend=backend)
    for _ in range(2):
        param.grad = placed(1.0)
        opt.step()
    old = param._local_tensor
    param._local_tensor = torch.full((4, 3), 7.0)
    param.grad = placed(1.0)
    opt.step()
    assert torch.equal(param._local_tensor, torch.full((4, 3), 6.5))
    assert not old.any()


@pytest.mark.parametrize("how", ["python", "compiled"])
def test_gradients_are_kept_until_they_are_released(how):
    """Another thread may replace them while the kernels read."""
    param = Parameter(torch.zeros(3))
    forms = (
        address_cache.PythonSignatures([param])
        if how == "python"
        else address_cache.select_reader().signatures([param])
    )
    out, held = np.zeros(1, np.uint64), torch.ones(3)
    param.grad, ref = held, weakref.ref(held)
    assert forms.read([param], out.ctypes.data, True) == []
    assert out[0] == held.data_ptr()
    param.grad = None
    del held
    gc.collect()
    assert ref() is not None
    forms.release()
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("how", WATCHERS)
def test_entries_that_are_the_same_and_not(how):
    a, b = torch.zeros(2), torch.zeros(2)
    same, names = WATCHERS[how][1], ["step", "exp_avg"]
    assert same([{"step": a}, {"exp_avg": b, "more": a}], names, [a, b])
    for second in ({}, {"exp_avg": a}, {"exp_avg": b.clone()}, {"exp_avg": None}, {"more": b}):
        assert not same([{"step": a}, second], names, [a, b])
