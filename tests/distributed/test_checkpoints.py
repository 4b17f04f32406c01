"""Checkpoints of ``torch.distributed.checkpoint``, saved by two processes and loaded by one, two and three."""

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.slow

SETUP = """
import copy
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

warnings.simplefilter("ignore")
size = dist.get_world_size()
mesh = init_device_mesh("cpu", (size,))
sch = fw.schedules
long = sch.warmup(4).then(sch.cosine(1.0, 0.1, 20)).then(sch.table([0.1, 1 / 3]))
decays = sch.linear(1.0, 0.3, 9)

def wu(epoch=3, **options):
    return fw.AutoWU(40, epoch, min_lr=1e-3, max_lr=0.1, **options)

# options of the run that saves, and others for the script that loads
CASES = {
    "Adam": (fw.Adam, {}, {}),
    "amsgrad": (fw.AdamW, {"amsgrad": True}, {"amsgrad": True}),
    "GIAdam": (fw.GIAdam, {}, {}),
    "SGD": (fw.SGD, {"momentum": 0.9, "dampening": 0.1}, {"momentum": 0.5}),
    "plain": (fw.SGD, {"schedule": long}, {}),
    "RAdam": (fw.RAdam, {"average": fw.SWA(2)}, {"average": fw.SWA(2)}),
    "schedules": (
        fw.AdamW,
        {"schedule": long, "weight_decay_schedule": decays, "average": fw.EMA(0.9, every=2)},
        {"schedule": sch.warmup(7), "average": fw.EMA(0.9, every=2)},
    ),
    "AutoWU": (fw.AdamW, {"schedule": wu(parity=True)}, {"schedule": wu(4)}),
    "sphere": (fw.SGD, {"projection": "sphere", "momentum": 0.9}, {"projection": "sphere", "momentum": 0.9}),
}
SHARDED = [name for name in CASES if name != "sphere"]

def made(name, wrap, *, loads=False):
    make, saves, other = CASES[name]
    torch.manual_seed(1 + loads)
    # rows in uneven shards, and one row, which one rank has
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    if wrap == "fsdp" and size > 1:
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif wrap == "ddp" and size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    options = copy.deepcopy(other if loads else saves)
    params = list(model.parameters())
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    return model, make(groups, lr=0.05, **options)

def train(model, opt, steps):
    for step in steps:
        torch.manual_seed(step)
        # every other step leaves the second group out, so that no parameter counts all steps
        opt.zero_grad()
        loss = model(torch.randn(6, 4)).square().mean()
        loss.backward()
        part = (opt.param_groups[0] if step % 3 == 0 else opt.param_groups[1]) if step else {"params": []}
        for p in part["params"] if step != 4 else ():
            p.grad = None
        if any(map(id_of_adaptive, opt.param_groups)):
            opt.record_loss(loss.detach())
        opt.step()

def id_of_adaptive(group):
    return isinstance(group["schedule"], fw.AutoWU)

def whole(value):
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.detach().clone()

def values(model, opt):
    found = {}
    for i, p in enumerate(model.parameters()):
        found[i] = {"param": whole(p)} | {
            key: whole(torch.as_tensor(value)) for key, value in opt.state[p].items()
        }
    return found

def deviation(a, b):
    worst = 0.0
    for i, entries in a.items():
        assert entries.keys() == b[i].keys(), (i, entries.keys(), b[i].keys())
        for key, value in entries.items():
            worst = max(worst, float((value.double() - b[i][key].double()).abs().max()))
    return worst

def report(name, check):
    try:
        outcome = check()
    # torch's CheckpointException is no Exception
    except BaseException as error:
        outcome = f"{type(error).__name__}:{str(error).strip().splitlines()[-1]}".replace(" ", "_")
    print(f"{name}={outcome}")
"""

SAVE = """
folder = Path(sys.argv[2]).parent.parent / "saved"
MODES = {
    "nested": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "offload": {"cpu_offload": True},
    "flat-offload": {"flatten_optimizer_state_dict": True, "cpu_offload": True},
}

def resume(name, wrap, mode):
    model, opt = made(name, wrap, loads=True)
    options = StateDictOptions(**MODES[mode])
    template = dict(zip(("model", "opt"), get_state_dict(model, opt, options=options)))
    dcp.load(template, checkpoint_id=folder / f"{wrap}-{name}-{mode}")
    set_state_dict(
        model, opt, model_state_dict=template["model"], optim_state_dict=template["opt"], options=options
    )
    return model, opt

def compared(name, wrap, mode):
    at, after = torch.load(folder / f"{wrap}-{name}.pt")
    model, opt = resume(name, wrap, mode)
    first = deviation(at, values(model, opt))
    train(model, opt, range(6, 9))
    last = deviation(after, values(model, opt))
    bound = 0.0 if size == 2 else 1e-7
    return "ok" if first == 0.0 and last <= bound else f"{first}/{last}"
"""
SAVING = """
for wrap, names in (("fsdp", SHARDED), ("ddp", CASES)):
    for name in names:
        model, opt = made(name, wrap)
        train(model, opt, range(6))
        for mode in MODES:
            def save():
                options = StateDictOptions(**MODES[mode])
                state = dict(zip(("model", "opt"), get_state_dict(model, opt, options=options)))
                dcp.save(state, checkpoint_id=folder / f"{wrap}-{name}-{mode}")
                return "ok"
            report(f"save:{wrap}:{name}:{mode}", save)
        at = values(model, opt)
        train(model, opt, range(6, 9))
        after = values(model, opt)
        if rank == 0:
            torch.save((at, after), folder / f"{wrap}-{name}.pt")
        dist.barrier()
"""
LOADING = """
for wrap, names in (("fsdp", SHARDED), ("ddp", CASES)):
    for name in names:
        for mode in MODES:
            report(f"load:{wrap}:{name}:{mode}", lambda: compared(name, wrap, mode))
dist.destroy_process_group()
"""
