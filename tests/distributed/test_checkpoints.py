"""Checkpoints of ``torch.distributed.checkpoint``, saved by two processes and loaded by one, two and three."""

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.slow

SETUP = """
import copy
import io
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

# schedules that are replaced
warnings.simplefilter("ignore")
folder = Path(sys.argv[2]).parent.parent / "saved"
size = dist.get_world_size()
mesh = init_device_mesh("cpu", (size,))
sch = fw.schedules
long = sch.warmup(4).then(sch.cosine(1.0, 0.1, 20)).then(sch.table([0.1, 1 / 3]))
decays = sch.linear(1.0, 0.3, 9)
clip = {"max_grad_norm": 0.05}
lamb = {"always_adapt": True, "weight_decay": 0.1}
decay = {"weight_decay": 0.1}
ema = {"average": fw.EMA(0.9, every=2)}

def wu(epoch=3, **options):
    return fw.AutoWU(40, epoch, min_lr=1e-3, max_lr=0.1, **options)

# the class, its options in the script that saves, and those in the script that loads
CASES = {
    "Adam": (fw.Adam, {}, {}),
    "amsgrad": (fw.AdamW, {"amsgrad": True}, {"amsgrad": True}),
    "GIAdam": (fw.GIAdam, {}, {}),
    "SGD": (fw.SGD, {"momentum": 0.9, "dampening": 0.1}, {"momentum": 0.5}),
    "plain": (fw.SGD, {"schedule": long}, {}),
    "RAdam": (fw.RAdam, {"average": fw.SWA(2)}, {"average": fw.SWA(2)}),
    "schedules": (
        fw.AdamW,
        {"schedule": long, "weight_decay_schedule": decays, **ema},
        {"schedule": sch.warmup(7), **ema},
    ),
    "AutoWU": (fw.AdamW, {"schedule": wu(parity=True)}, {"schedule": wu(4)}),
    "clip": (fw.AdamW, clip, clip),
    "LAMB": (fw.LAMB, lamb, lamb),
    "AdamP": (fw.AdamP, decay, decay),
    "sphere": (fw.SGD, {"projection": "sphere", "momentum": 0.9}, {"projection": "sphere", "momentum": 0.9}),
}
WRAPPED = [(wrap, name) for wrap in ("fsdp", "ddp") for name in CASES]
MODES = {"nested": {}, "flat": {"flatten_optimizer_state_dict": True, "cpu_offload": True}}

def built(wrap, seed):
    torch.manual_seed(seed)
    # uneven shards, and a bias and a weight of one row, which the first rank has alone
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    if wrap == "fsdp" and size > 1:
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif wrap == "ddp" and size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    return model

def made(wrap, name, *, loads=False):
    make, saves, other = CASES[name]
    model = built(wrap, 1 + loads)
    params = list(model.parameters())
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    return model, make(groups, lr=0.05, **copy.deepcopy(other if loads else saves))

def train(model, opt, steps):
    for step in steps:
        torch.manual_seed(step)
        opt.zero_grad()
        loss = model(torch.randn(6, 4)).square().mean()
        loss.backward()
        # no parameter takes part in every step, so that no count is that of the optimizer
        if step not in (0, 4):
            for p in opt.param_groups[step % 2]["params"]:
                p.grad = None
        if isinstance(opt.param_groups[0].get("schedule"), fw.AutoWU):
            opt.record_loss(loss.detach())
        opt.step()

def whole(value):
    value = torch.as_tensor(value)
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()

def values(model, opt):
    return [
        {"param": whole(p)} | {key: whole(value) for key, value in opt.state[p].items()}
        for p in model.parameters()
    ]

def plain(value):
    # torch makes a list of betas where it gathers
    value = tuple(value) if isinstance(value, list) else value
    return float(value) if isinstance(value, torch.Tensor) else value

def groups_of(opt):
    groups = opt.state_dict()["param_groups"]
    return [{key: plain(value) for key, value in group.items()} for group in groups]

def deviation(left, right):
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys(), (a.keys(), b.keys())
        worst = max(worst, *(float((a[key].double() - b[key].double()).abs().max()) for key in a))
    return worst

def states_of(model, opt, options):
    return dict(zip(("model", "opt"), dsd.get_state_dict(model, opt, options=options)))

def load(model, opt, path, options, planner=None):
    state = states_of(model, opt, options)
    dcp.load(state, checkpoint_id=path, planner=planner)
    dsd.set_model_state_dict(model, state["model"])
    dsd.set_optimizer_state_dict(model, opt, state["opt"], options=options)

def report(check, *words):
    try:
        outcome = check(*words) or "ok"
    # torch's CheckpointException is no Exception
    except BaseException as error:
        outcome = f"{type(error).__name__}:{str(error).strip().splitlines()[-1:]}".replace(" ", "_")
    print(f"{check.__name__}:{':'.join(words)}={outcome}")

def resume(wrap, name, mode):
    at, groups, after = torch.load(folder / f"{wrap}-{name}.pt")
    model, opt = made(wrap, name, loads=True)
    load(model, opt, folder / f"{wrap}-{name}-{mode}", dsd.StateDictOptions(**MODES[mode]))
    first, same = deviation(at, values(model, opt)), groups == groups_of(opt)
    train(model, opt, range(6, 9))
    last = deviation(after, values(model, opt))
    if first or not same or last > (0.0 if size == 2 else 1e-7):
        return f"{first}/{same}/{last}"

def resume_all():
    for wrap, name in WRAPPED:
        for mode in MODES:
            report(resume, wrap, name, mode)
"""
SAVE = """
def save(wrap, name):
    model, opt = made(wrap, name)
    train(model, opt, range(6))
    for mode in MODES:
        state = states_of(model, opt, dsd.StateDictOptions(**MODES[mode]))
        dcp.save(state, checkpoint_id=folder / f"{wrap}-{name}-{mode}")
    at, groups = values(model, opt), groups_of(opt)
    train(model, opt, range(6, 9))
    after = values(model, opt)
    if rank == 0:
        torch.save((at, groups, after), folder / f"{wrap}-{name}.pt")
    dist.barrier()

for wrap, name in WRAPPED:
    report(save, wrap, name)
"""
FULL = """
def full(wrap, name, cpu):
    model, opt = made(wrap, name)
    train(model, opt, range(6))
    options = dsd.StateDictOptions(full_state_dict=True, cpu_offload=cpu == "cpu")
    memory = io.BytesIO()
    torch.save(states_of(model, opt, options), memory)
    memory.seek(0)
    state, groups = torch.load(memory, weights_only=True), groups_of(opt)
    other, resumed = made(wrap, name, loads=True)
    # with cpu_offload the first rank has all of it, and the others nothing
    options = dsd.StateDictOptions(full_state_dict=True, broadcast_from_rank0=cpu == "cpu")
    dsd.set_model_state_dict(other, state["model"], options=options)
    dsd.set_optimizer_state_dict(other, resumed, state["opt"], options=options)
    same = groups == groups_of(resumed)
    for pair in ((model, opt), (other, resumed)):
        train(*pair, range(6, 9))
    found = deviation(values(model, opt), values(other, resumed))
    if not same or found:
        return f"{same}/{found}"

for wrap, name in WRAPPED:
    # torch refuses a full state dict that has no tensors but counts
    if name != "plain":
        for cpu in ("cpu", "all"):
            report(full, wrap, name, cpu)
"""
TORCH = """
PAIRS = {
    "AdamW": (torch.optim.AdamW, fw.AdamW, {"weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, fw.Adam, {"amsgrad": True}),
    "SGD": (torch.optim.SGD, fw.SGD, {"momentum": 0.9, "dampening": 0.1}),
    "RAdam": (torch.optim.RAdam, fw.RAdam, {}),
}

def cross(wrap, name, mode, way):
    theirs, ours, options = PAIRS[name]
    made = (theirs, ours) if way == "to" else (ours, theirs)
    first, second = (built(wrap, seed) for seed in (1, 2))
    opt, resumed = (make(m.parameters(), lr=0.05, **options) for make, m in zip(made, (first, second)))
    train(first, opt, (0, 4, 0, 4))
    settings = dsd.StateDictOptions(**MODES.get(mode, {"full_state_dict": True}))
    state = states_of(first, opt, settings)
    if mode == "full":
        dsd.set_model_state_dict(second, state["model"], options=settings)
        dsd.set_optimizer_state_dict(second, resumed, copy.deepcopy(state["opt"]), options=settings)
    else:
        path = folder / "-".join(("cross", wrap, name, mode, way))
        dcp.save(state, checkpoint_id=path)
        # what only one of both has stays as the script says
        load(second, resumed, path, settings, dcp.DefaultLoadPlanner(allow_partial_load=way == "to"))
    loaded = [{k: v for k, v in s.items() if k != "step"} for s in values(second, resumed)]
    saved = [{k: s[k] for k in loaded[0]} for s in values(first, opt)]
    train(first, opt, (0, 4, 0))
    train(second, resumed, (0, 4, 0))
    ends = [[{"param": whole(p)} for p in model.parameters()] for model in (first, second)]
    if deviation(saved, loaded) or deviation(*ends) > 1e-6:
        return f"{deviation(saved, loaded)}/{deviation(*ends)}"

for wrap in ("fsdp", "ddp"):
    for name in PAIRS:
        for mode, way in (("nested", "to"), ("flat", "to"), ("full", "to"), ("nested", "back"), ("flat", "back")):
            report(cross, wrap, name, mode, way)
"""
PROBE = """
def probe(wrap, name):
    pairs = [made(wrap, name) for _ in range(2)]
    model, opt = pairs[1]
    before = [whole(p) for p in model.parameters()]
    states_of(model, opt, None)
    moved = not all(map(torch.equal, before, map(whole, model.parameters())))
    if moved or len(opt.telemetry) or opt.session.updates:
        return "moved"
    for pair in pairs:
        train(*pair, range(4))
    if not torch.equal(*(opt.telemetry.rows().nan_to_num() for _, opt in pairs)):
        return "rows"
    return deviation(*(values(*pair) for pair in pairs)) or None

def random_start(wrap, name, mode):
    model, opt = made(wrap, name)
    options = dsd.StateDictOptions(**MODES[mode])
    dcp.save(states_of(model, opt, options), checkpoint_id=folder / f"{wrap}-{name}-{mode}")
    other, resumed = made(wrap, name, loads=True)
    load(other, resumed, folder / f"{wrap}-{name}-{mode}", options)
    for pair in ((model, opt), (other, resumed)):
        train(*pair, range(3))
    # the norm of what was drawn is summed again, after it was rounded
    if (found := deviation(values(model, opt), values(other, resumed))) > 1e-7:
        return found

for wrap, name in WRAPPED:
    report(probe, wrap, name)
CASES["random"] = (fw.Adam, {"exp_avg_sq_init": "random"}, {"exp_avg_sq_init": "random"})
for mode in MODES:
    for wrap in ("fsdp", "ddp"):
        report(random_start, wrap, "random", mode)
"""
END = """
dist.destroy_process_group()
"""
# checks of each kind; a script prints a word for each, with its outcome
COUNTS = {"save": 24, "resume": 48, "full": 44, "cross": 40, "probe": 24, "random_start": 4}


def check(ranks, *kinds):
    """Raise for a check of these kinds that failed on any rank, or was not made."""
    for words in ranks:
        found = [word for word in words if word.partition(":")[0] in kinds]
        assert [word for word in found if not word.endswith("=ok")] == []
        assert len(found) == sum(COUNTS[kind] for kind in kinds)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save all checkpoints and make all checks of two processes; return the folder and what was printed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "saved").mkdir()
    body = SETUP + SAVE + "resume_all()\n" + FULL + TORCH + PROBE + END
    return folder, run_ranks(folder, body)


def test_the_same_number_of_ranks_resumes_bit_for_bit(saved):
    """States, groups and counts; the schedules of the checkpoint win wholly over those of the script."""
    check(saved[1], "save", "resume")


@pytest.mark.parametrize("ranks", [1, 3])
def test_other_numbers_of_ranks_resume(saved, ranks):
    """What is loaded is equal bit for bit, and later steps to 1e-7."""
    check(run_ranks(saved[0], SETUP + "resume_all()\n" + END, ranks), "resume")


def test_full_state_dicts(saved):
    """On all ranks, or on the first one, which broadcasts."""
    check(saved[1], "full")


def test_optimizers_of_torch(saved):
    """From them to ours and back."""
    check(saved[1], "cross")


def test_a_step_that_only_asks_for_the_states_changes_nothing(saved):
    """Torch makes one with zero gradients on a fresh optimizer before it returns or loads a state dict."""
    check(saved[1], "probe", "random_start")
