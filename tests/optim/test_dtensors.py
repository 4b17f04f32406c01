"""Parameters that are DTensors, in this process alone: shards train as plain tensors, and rules of whole layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peers import each_backend
from scenarios import build, each_case, values

import fused_warmup as fw


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
