"""Sums over parameters that are spread over processes: norms, layers, groups on a sphere."""

import math

import pytest
import torch
from ranks import run_ranks
from torch import nn

import fused_warmup as fw

pytestmark = pytest.mark.slow

COMPARE = """
from distributed import spread_ranks
{start}
for case, found in spread_ranks.compare({arguments}).items():
    print("/".join(case), found)
print("bits", spread_ranks.digest())
dist.destroy_process_group()
"""


def compare(tmp_path, world_size, arguments, start="", *, same_bits=True):
    """Return what was different; unless they are to differ, all processes have the same norms, bit for bit."""
    body = COMPARE.format(arguments=arguments, start=start)
    first, *others = run_ranks(tmp_path, body, world_size, 300)
    assert not same_bits or all(other[-2:] == first[-2:] for other in others)
    return first[:-2]


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)], ids=str)
def test_steps_are_those_of_one_process(tmp_path, shape):
    """Rows, columns, strided rows, replicas and plain tensors side by side, uneven and empty parts."""
    assert compare(tmp_path, math.prod(shape), f"{shape}, 'cpu'") == []


def test_steps_of_the_reference_are_those_of_one_process(tmp_path):
    assert compare(tmp_path, 2, "(2,), 'reference'") == []


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=str)
def test_steps_of_the_cuda_kernels_are_those_of_one_process(tmp_path, shape):
    assert compare(tmp_path, math.prod(shape), f"{shape}, 'cpu'", "spread_ranks.use_cuda_on_host()") == []


@pytest.mark.parametrize("part", ["squares", "norms", "layers"])
def test_each_sum_is_needed(tmp_path, part):
    """Without one of them the same comparison finds other results, and with the rest alone no others."""
    arguments = "(2,), 'cpu', names=('Adam', 'LAMB', 'AdamP'), options=('clip', 'skip', 'sphere', 'plain')"
    found = compare(tmp_path, 2, arguments, f"spread_ranks.leave_out({part!r})", same_bits=False)
    cases = [case.split("/") for case in found[::2]]
    assert {option for _, _, _, option in cases} == {
        "squares": {"sphere"},
        "norms": {"clip", "skip", "sphere", "plain"},
        "layers": {"clip", "skip", "sphere", "plain"},
    }[part]
    assert {name for _, _, name, _ in cases} == (
        {"LAMB", "AdamP"} if part == "layers" else {"Adam", "LAMB", "AdamP"}
    )


WRAPPED = """
from distributed import wrapped_ranks
for name in {names}:
    for make in (fw.Adam, fw.LAMB, fw.AdamP, fw.SGD):
        for option in wrapped_ranks.OPTIONS:
            if (name, make) == ("fsdp1", fw.AdamP) or (option == "random" and make is not fw.Adam):
                continue
            if option == "random" and name in ("fsdp1", "zero"):
                # parts draw other numbers than the whole
                continue
            found = wrapped_ranks.compare(name, make, option)
            if not found < 1e-9:
                print(name, make.__name__, option, found)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("world_size", "names"),
    [(2, ("ddp", "zero", "fsdp1", "fsdp2", "fsdp2-bf16", "tp")), (3, ("fsdp2", "ddp")), (4, ("2-D",))],
    ids=str,
)
def test_wrapped_models_train_as_one_process(tmp_path, world_size, names):
    assert run_ranks(tmp_path, WRAPPED.format(names=names), world_size, 300) == [[]] * world_size


EDGES = """
import math, pickle
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

mesh = init_device_mesh("cpu", (2,))

def made(*shapes, **options):
    params = [torch.nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)])) for shape in shapes]
    for param in params:
        param.grad = distribute_tensor(torch.ones(param.shape), mesh, [Shard(0)])
    return params, fw.Adam(params, **{"lr": 0.1, **options})

def refuses(make, *words):
    try:
        make()
    except (ValueError, TypeError) as error:
        print(all(word in str(error) for word in words) or str(error).replace(" ", "_"))
    else:
        print("nothing")

# an overflow that one process has found, as a tensor or as the plain 0 of a scaler without a gradient
for found, who in ((1.0, 0), (torch.tensor(1.0), 1)):
    params, opt = made((4, 3))
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), found * (rank == who)
    opt.step()
    print(bool((params[0].to_local() == 1.0).all()), opt.telemetry.latest()["skipped"])
# one process without a gradient
params, opt = made((4, 3), (2, 2), max_grad_norm=100.0)
if rank == 0:
    params[0].grad = None
opt.step()
print(opt.telemetry.latest()["grad_norm"] == math.sqrt(6 + 4))
# a rate of 0 is no probe for the states where one process has a gradient and another an empty part
params, opt = made((1, 3), lr=0.0)
opt.step()
print(len(opt.telemetry), opt.session.updates)
params[0].grad.zero_()
_, opt = params, fw.Adam(params, lr=0.0)
opt.step()
print(len(opt.telemetry), opt.session.updates)
# what is sent, and the launches
for make, options in (
    (fw.Adam, {"max_grad_norm": 1.0}), (fw.Adam, {}), (fw.Adam, {"telemetry": False}), (fw.LAMB, {}),
    (fw.AdamP, {"max_grad_norm": 1.0, "projection": "sphere"}),
):
    params, _ = made((5, 3), (2, 2))
    traffic = make(params, lr=0.1, **options).traffic()
    print(*(kernel.name for kernel in traffic.kernels), *traffic.messages)
# parts made by hand
whole = torch.nn.Parameter(torch.arange(12.0))
part = torch.nn.Parameter(torch.arange(12.0).chunk(2)[rank].clone())
options = {"lr": 0.1, "max_grad_norm": 0.5, "weight_decay": 0.1}
opts = [fw.LAMB([whole], **options), fw.LAMB([part], process_group=dist.group.WORLD, **options)]
for step in range(3):
    whole.grad = torch.linspace(-1.0, 1.0, 12)
    part.grad = whole.grad.chunk(2)[rank]
    for opt in opts:
        opt.step()
print(torch.allclose(whole.chunk(2)[rank], part, rtol=1e-6))
again = pickle.loads(pickle.dumps(opts[1]))
refuses(again.step, "LAMB: process_group must be that of before the pickle, got None")
again.process_group = dist.group.WORLD
again.param_groups[0]["params"][0].grad = part.grad
again.step()
opts[1].step()
print(torch.equal(again.param_groups[0]["params"][0], part))
# what cannot be right
matrix = torch.nn.Parameter(torch.ones(2, 2))
refuses(lambda: fw.AdamP([matrix], process_group=dist.group.WORLD), "parameter 0 must have its channels")
refuses(lambda: fw.Adam([matrix], process_group=2), "process_group must be a torch.distributed.ProcessGroup", "2")
terms = torch.nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Partial()]))
refuses(lambda: fw.Adam([terms]), "parameter 0 must be placed by Shard or Replicate")
model = FSDP(torch.nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=True)
for options in ({"max_grad_norm": 1.0}, {"nonfinite": "skip"}, {"projection": "sphere"}, {"exp_avg_sq_init": "random"}):
    refuses(lambda: fw.Adam(model.parameters(), **options), *list(options)[:1], "process_group=")
refuses(lambda: fw.LAMB(model.parameters()), "parameter 0 must have its process group")
opt = fw.Adam(model.parameters())
model(torch.ones(2, 4)).sum().backward()
opt.step()
print(math.isnan(opt.telemetry.latest()["grad_norm"]))
opt.max_grad_norm = 1.0
refuses(opt.step, "(max_grad_norm, nonfinite)", "process_group=")
dist.destroy_process_group()
"""


def test_edges(tmp_path):
    both = run_ranks(tmp_path, EDGES)
    told = ["True", "1.0"] * 2 + ["True"] + ["1", "1", "0", "0"]
    told += [
        "measure",
        "fold",
        "decide",
        "update",
        "32",
        "decide",
        "update",
        "fold",
        "finish",
        "32",
        "decide",
        "update",
    ]
    told += ["decide", "stage1", "fold", "reduce", "update", "80"]
    told += [
        "measure",
        "fold",
        "decide",
        "stage1",
        "fold",
        "reduce",
        "update",
        "fold",
        "finish",
        "rescale",
        "32",
        "80",
        "8",
    ]
    told += ["True", "True", "True"] + ["True"] * 3 + ["True"] * 5 + ["True"] * 2
    assert both == [told] * 2


STARTS = """
from torch.distributed.optim import ZeroRedundancyOptimizer as Zero

torch.manual_seed(rank)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
for p in model.parameters():
    torch.nn.init.ones_(p)
zero = Zero(model.parameters(), fw.Adam, lr=0.1, exp_avg_sq_init="random")
for p in model.parameters():
    p.grad = torch.ones_like(p)
zero.step()
own = zero.optim
# the starts have the norm of all gradients together, of which the first step keeps beta2
params = [p for group in own.param_groups for p in group["params"]]
start = sum(((own.state[p]["exp_avg_sq"] - 0.001) / 0.999).sum() for p in params)
dist.all_reduce(start)
print(float(start) / sum(p.numel() for p in model.parameters()))
dist.destroy_process_group()
"""


def test_random_starts_of_all_processes_have_the_norm_of_all_gradients(tmp_path):
    (first,), (second,) = run_ranks(tmp_path, STARTS)
    assert first == second
    assert float(first) == pytest.approx(1.0, rel=1e-6)


def test_one_process_adds_nothing_up():
    params = list(nn.Linear(3, 2).parameters())
    opt = fw.LAMB(params, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.session.plan.reduction is None
    assert list(opt.session.plan.stages()) == [15]
