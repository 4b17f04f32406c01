"""Sharpness and rates over two processes against one process that has both batches."""

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F

import fused_warmup as fw

pytestmark = pytest.mark.slow

# of both ranks and of the one process: everything but the batch and the wrapper
MODEL = """
torch.manual_seed(3)
model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)).to(dtype)
x, y = torch.randn(40, 6, dtype=dtype), torch.randn(40, 3, dtype=dtype)
opt = fw.Adam(model.parameters(), lr=1e-2)
"""
MEASURE = """
def loss_fn():
    return torch.nn.functional.mse_loss(run(x), y)

found = []
probe = fw.SharpnessProbe(opt, every=2, **reduce)
for _ in range(4):
    opt.zero_grad()
    loss_fn().backward()
    probe.measure(loss_fn)
    opt.step()
    if (reading := probe.poll()) is not None:
        found += [reading.value, reading.lambda_min, reading.edge_ratio]
opt.zero_grad()
for method in ("difference", "autograd"):
    reading = fw.sharpness.top_eigenvalue(loss_fn, model.parameters(), method=method, **reduce)
    found += [reading.value, reading.lambda_min]
    # the gradients come from the closure
    found += [fw.sharpness.preconditioned(loss_fn, opt, method=method, **reduce).value]
found += [fw.sharpness.critical_lr(loss_fn, opt, **reduce).value]
found += [fw.sharpness.directional(loss_fn, opt, **reduce).value]
found += [fw.tuning.initial_lr(loss_fn, opt, target=10.0).value]
loss = loss_fn()
loss.backward()
found += [fw.PersistentCatapult(opt, 10.0).step(loss, loss_fn)]
"""
RANK = """
x, y = x[20 * rank:20 * rank + 20], y[20 * rank:20 * rank + 20]
run = torch.nn.parallel.DistributedDataParallel(model)
reduce = {"reduce": True}
"""
SHOW = """
dist.destroy_process_group()
print(*(float(v).hex() for v in found))
"""


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-5), (torch.float32, 1e-3)], ids=["float64", "float32"]
)
def test_ranks_measure_the_mean(tmp_path, dtype, rtol):
    first, second = run_ranks(tmp_path, f"dtype = {dtype}\n" + MODEL + RANK + MEASURE + SHOW)
    assert first == second
    scope = {"torch": torch, "fw": fw, "dtype": dtype, "reduce": {}}
    exec(MODEL + "run = model\n" + MEASURE, scope)
    assert [float.fromhex(word) for word in first] == pytest.approx(
        [float(v) for v in scope["found"]], rel=rtol
    )


def test_ranks_of_their_own(tmp_path):
    """Without ``reduce`` a rank measures its own batch, and asks nobody."""
    body = "dtype = torch.float64\n" + MODEL + RANK
    body += """
if rank == 0:
    found = [fw.sharpness.top_eigenvalue(lambda: torch.nn.functional.mse_loss(model(x), y), model.parameters())]
    print(float(found[0].value).hex())
dist.destroy_process_group()
"""
    (alone,), nothing = run_ranks(tmp_path, body)
    scope = {"torch": torch, "fw": fw, "dtype": torch.float64}
    exec(MODEL, scope)
    model, x, y = scope["model"], scope["x"][:20], scope["y"][:20]
    reading = fw.sharpness.top_eigenvalue(lambda: F.mse_loss(model(x), y), model.parameters())
    assert nothing == []
    assert float.fromhex(alone) == reading.value.item()


def test_clocks_of_ranks_differ():
    opt = fw.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"SharpnessProbe: budget must be None where reduce is True, got 0\.02"
    ):
        fw.SharpnessProbe(opt, budget=0.02, reduce=True)
    with pytest.raises(TypeError, match="critical_lr: reduce must be True or False, got 2"):
        fw.sharpness.critical_lr(lambda: None, opt, reduce=2)


SHARDED = """
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.optim import ZeroRedundancyOptimizer as Zero

torch.manual_seed(0)

def fsdp(make, **options):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    return make(FSDP(model, device_id=torch.device("cpu"), use_orig_params=True).parameters(), **options)

def flat(make, **options):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    return make(FSDP(model, device_id=torch.device("cpu")).parameters(), **options)

def zero(make, **options):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    return Zero(model.parameters(), make, **options)

OPTIONS = {
    "plain": (fw.AdamW, {}),
    "clip": (fw.Adam, {"max_grad_norm": 1.0}),
    "skip": (fw.Adam, {"nonfinite": "skip"}),
    "sphere": (fw.SGD, {"projection": "sphere"}),
    "random": (fw.Adam, {"exp_avg_sq_init": "random"}),
    "LAMB": (fw.LAMB, {}),
    "AdamP": (fw.AdamP, {}),
}
for wrap in (fsdp, flat, zero):
    for name, (make, options) in OPTIONS.items():
        try:
            wrap(make, lr=0.1, **options)
            print(wrap.__name__ + ":" + name)
        except ValueError as error:
            assert any(words in str(error) for words in ("give process_group=", "This rule needs sums")), error
dist.destroy_process_group()
"""


def test_shards_of_unknown_processes_are_refused_at_construction(tmp_path):
    """FSDP1 hands over plain tensors without their process group; ZeRO is asked for it."""
    first, second = run_ranks(tmp_path, SHARDED)
    assert first == second
    zero = ["AdamP", "LAMB", "clip", "plain", "random", "skip", "sphere"]
    assert sorted(first) == ["flat:plain", "fsdp:plain", *(f"zero:{name}" for name in zero)]


RESUME = """
import copy
from torch.distributed.optim import ZeroRedundancyOptimizer as Zero

def made(make, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    return model, Zero(model.parameters(), make, lr=0.01, **options)

def train(model, opt, steps):
    for step in steps:
        torch.manual_seed(step)
        opt.zero_grad()
        model(torch.randn(5, 6)).square().sum().backward()
        opt.step()

ours = {"schedule": fw.schedules.warmup(8), "average": fw.SWA(1)}
model, opt = made(fw.AdamW, **ours)
train(model, opt, range(3))
opt.consolidate_state_dict(0)
box = [copy.deepcopy(opt.state_dict()) if rank == 0 else None]
dist.broadcast_object_list(box, 0)
again, resumed = made(fw.AdamW, **ours)
again.load_state_dict(model.state_dict())
resumed.load_state_dict(box[0])
train(model, opt, range(3, 6))
train(again, resumed, range(3, 6))
local, other = opt.optim, resumed.optim
print(local.get_last_lr() == other.get_last_lr())
print(all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters())))
pairs = [(local.state[p], other.state[q]) for p, q in zip(local.session.params, other.session.params)]
print(all(torch.equal(a[key], b[key]) for a, b in pairs for key in ("exp_avg_sq", "step", "average")))
dist.destroy_process_group()
"""


def test_zero_resumes_where_it_was(tmp_path):
    """Its ``load_state_dict`` puts torch's float counts and the groups of a state dict into our optimizer."""
    assert run_ranks(tmp_path, RESUME) == [["True"] * 3] * 2


AVERAGED = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, ShardingStrategy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

mesh = init_device_mesh("cpu", (2,))

def made():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

def fsdp2(model, **options):
    fully_shard(model[0], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)

def fsdp1(model, strategy):
    return FSDP(model, device_id=torch.device("cpu"), use_orig_params=True, sharding_strategy=strategy)

WRAPS = {
    "ddp": torch.nn.parallel.DistributedDataParallel,
    "fsdp2": fsdp2,
    "fsdp2-kept": lambda model: fsdp2(model, reshard_after_forward=False),
    "fsdp1": lambda model: fsdp1(model, ShardingStrategy.FULL_SHARD),
    "fsdp1-kept": lambda model: fsdp1(model, ShardingStrategy.SHARD_GRAD_OP),
    "tp": lambda model: parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}),
}
torch.manual_seed(1)
x = torch.randn(4, 5)
wrapped = {"alone": made()} | {name: wrap(made()) for name, wrap in WRAPS.items()}
for name, model in wrapped.items():
    opt = fw.Adam(model.parameters(), lr=0.1, average=fw.EMA(0.9))
    for _ in range(4):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    found = []
    with torch.no_grad():
        found += [float(model(x).square().sum())]
        try:
            with opt.averaged_parameters(model):
                found += [float(model(x).square().sum()) for _ in range(2)]
                raise KeyError
        except KeyError:
            found += [float(model(x).square().sum())]
        found += [float(model(x).square().sum())]
    if name == "alone":
        alone = found
        print(*(float(v).hex() for v in found))
    else:
        print(all(abs(a - b) < 1e-5 * abs(b) for a, b in zip(found, alone)))
    refused = []
    for other in (None, made()):
        try:
            with opt.averaged_parameters(other):
                refused += [False]
        except ValueError as error:
            assert "averaged_parameters(model) must get the model that has the sharded" in str(error), error
            refused += [True]
    print(name, *refused)
dist.destroy_process_group()
"""


def test_averages_reach_the_forward(tmp_path):
    """Whatever has gathered the parameters before, and the parameters come back after an exception."""
    first, second = run_ranks(tmp_path, AVERAGED)
    assert first == second
    before, *inside, after, later = map(float.fromhex, first[:5])
    assert inside[0] == inside[1] != before == after == later
    told = iter(first[5:])
    assert [next(told) for _ in range(3)] == ["alone", "False", "False"]
    for name in ("ddp", "fsdp2", "fsdp2-kept", "fsdp1", "fsdp1-kept", "tp"):
        refuses = str(name != "ddp")
        assert [next(told) for _ in range(4)] == ["True", name, refuses, refuses]


PLACED = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
start = torch.randn(5, 4)
for name, own in (("replicated", Replicate()), ("rows", Shard(0)), ("columns", Shard(1))):
    plain = torch.nn.Parameter(start.clone())
    param = torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [own]))
    other = torch.nn.Parameter(torch.ones(3))
    pairs = [(p, fw.Adam(ps, lr=0.1)) for p, ps in ((plain, [plain]), (param, [param, other]))]
    for step, given in enumerate([own, Partial(), Partial("avg"), Shard(1), Replicate(), Partial(), own]):
        torch.manual_seed(step)
        parts = [torch.randn(5, 4) for _ in range(2)]
        whole = {Partial(): sum(parts), Partial("avg"): sum(parts) / 2}.get(given, parts[0])
        plain.grad = whole
        if isinstance(given, Partial):
            param.grad = DTensor.from_local(parts[rank], mesh, [given])
        else:
            param.grad = distribute_tensor(whole, mesh, [given])
        if step:
            other.grad = torch.ones(3)
        for _, opt in pairs:
            opt.step()
    print(name, torch.allclose(param.full_tensor(), plain, rtol=1e-6, atol=1e-7))
    param.grad = None
    try:
        # torch refuses a gradient of another kind in the assignment, and other meshes do not
        param.grad = distribute_tensor(start, init_device_mesh("cpu", (2, 1)), [own, Replicate()])
        pairs[1][1].step()
    except ValueError as error:
        print("the gradient of parameter 0 must be on" in str(error))
dist.destroy_process_group()
"""


def test_gradients_with_other_placements_are_redistributed(tmp_path):
    """At the first step and at later ones: partial sums, shards of another dimension, whole ones."""
    told = [word for name in ("replicated", "rows", "columns") for word in (name, "True", "True")]
    assert run_ranks(tmp_path, PLACED) == [told] * 2
