"""The sums of many processes on a GPU: NCCL with one process, and two processes of gloo that share the device."""

import math

import folded
import pytest
import torch
import torch.distributed as dist
from distributed.test_sums import compare

import fused_warmup as fw

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    if request.param not in fw.available_backends():
        pytest.skip(f"the backend {request.param} is not available")
    return request.param


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Two groups of NCCL that have this process alone."""
    if not dist.is_nccl_available():
        pytest.skip("torch has no NCCL")
    store = tmp_path_factory.mktemp("nccl") / "store"
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1, device_id=device)
    yield dist.new_group([0]), dist.new_group([0])
    dist.destroy_process_group()


@pytest.mark.parametrize("name", folded.CASES)
def test_sums_go_through_nccl(name, backend, groups, monkeypatch):
    folded.compare_steps(name, backend, monkeypatch, groups, "cuda")


@pytest.mark.parametrize("name", folded.CASES)
def test_a_captured_step_sends_its_sums(name, backend, groups, monkeypatch):
    """Replays give the bits of eager steps; neither waits for the device."""
    make, options = folded.CASES[name]
    sent = []
    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **more: sent.append(1) or all_reduce(*args, **more))
    runs = []
    with folded.folding(monkeypatch, groups):
        for captures in (False, True):
            params = folded.start("cuda")
            opt = make(params, lr=0.05, backend=backend, **options)
            folded.set_gradients(params, 0)
            opt.step()
            if captures:
                before, graph = len(sent), torch.cuda.CUDAGraph()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    opt.step()
                assert len(sent) > before
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(20):
                    graph.replay() if captures else opt.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            runs.append((params, opt))
    (params, opt), (others, other) = runs
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for key, value in opt.state[p].items():
            assert torch.equal(other.state[q][key], value)
    assert torch.equal(*(o.telemetry.rows()[:, :4].nan_to_num() for o in (opt, other)))


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=str)
def test_processes_that_share_a_gpu_train_as_one(tmp_path, shape, backend):
    names, options = ("Adam", "LAMB", "AdamP"), ("plain", "clip", "all")
    arguments = f"{shape}, {backend!r}, {names}, {options}, device='cuda'"
    assert compare(tmp_path, math.prod(shape), arguments) == []
