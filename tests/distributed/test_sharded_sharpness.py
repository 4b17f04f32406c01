"""Sharpness and rates of sharded models over two processes against one process that has all of it."""

import pytest
import torch
from ranks import run_ranks
from torch.nn import functional as F

import fused_warmup as fw

pytestmark = pytest.mark.slow

# of both ranks and of the one process; the optimizer has no parameter of the last layer
MODEL = """
def made(hidden):
    torch.manual_seed(3)
    layers = [torch.nn.Linear(6, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1), torch.nn.Linear(1, 3)]
    model = torch.nn.Sequential(*layers).double()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    return model, x, y

def narrow():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5))
    return model, torch.randn(40, 20), torch.randn(40, 5)

def optimizers(model):
    first, second = list(model[0].parameters()), list(model[2].parameters())
    groups = lambda: [{"params": first}, {"params": second, "lr": 0.02}]
    options = {"lr": 1e-2, "weight_decay": 0.1}
    yield fw.Adam(groups(), max_grad_norm=0.05, average=fw.EMA(0.9), **options)
    yield torch.optim.Adam(groups(), foreach=False, **options)
    yield fw.SGD(groups(), momentum=0.9, lr=0.05)

def same(a, b):
    return all((p is None and q is None) or torch.equal(p, q) for p, q in zip(map(whole, a), map(whole, b)))

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "placements") else tensor
"""
MEASURE = """
def measure(model, run, x, y, opt, steps):
    def loss_fn():
        return torch.nn.functional.mse_loss(run(x), y) + 0.1 * run(x).square().mean()

    found, params = [], [p for group in opt.param_groups for p in group["params"]]
    catapult = fw.PersistentCatapult(opt, 10.0)
    probe = fw.SharpnessProbe(opt, every=1)
    for step in range(steps):
        opt.zero_grad()
        loss_fn().backward()
        probe.measure(loss_fn)
        opt.step()
        reading = probe.poll()
        found += [reading.value, reading.lambda_min, reading.edge_ratio]
    opt.zero_grad()
    before = [whole(p).clone() for p in model.parameters()]
    grads = [None if p.grad is None else whole(p.grad).clone() for p in model.parameters()]
    reading = fw.sharpness.top_eigenvalue(loss_fn, params)
    found += [reading.value, reading.lambda_min, fw.sharpness.preconditioned(loss_fn, opt).value]
    found += [fw.sharpness.critical_lr(loss_fn, opt).value, fw.sharpness.directional(loss_fn, opt).value]
    found += [fw.tuning.initial_lr(loss_fn, opt, target=10.0).value]
    restored = same(before, model.parameters()) and same(grads, [p.grad for p in model.parameters()])
    loss = loss_fn()
    loss.backward()
    found += [loss.item() if run is model else mean(loss.detach().clone()).item()]
    found += [fw.sharpness.critical_lr(loss_fn, opt).value, catapult.step(loss.detach(), loss_fn)]
    return restored, [float(v) for v in found]
"""
WRAPS = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

mesh = init_device_mesh("cpu", (2,))

def fsdp2(model, **options):
    fully_shard(model[0], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)

def tp(model):
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

def mean(loss):
    dist.all_reduce(loss)
    return loss / 2
"""
# wrapper and number of the optimizer
CASES = [("fsdp2", 0), ("fsdp2", 1), ("kept", 2), ("tp", 0)]
RUN = (
    f"CASES = {CASES}"
    + """
# rows of the first layer are cut in 4 and 3, and one process has nothing of the second
for name, i in CASES:
    model, x, y = made(8 if name == "tp" else 7)
    if name == "tp":
        tp(model)
    else:
        fsdp2(model, reshard_after_forward=name != "kept")
        x, y = x.chunk(2)[rank], y.chunk(2)[rank]
    restored, found = measure(model, lambda x: model(x), x, y, list(optimizers(model))[i], 2)
    print(name, i, restored, *(v.hex() for v in found))

model, x, y = narrow()
fsdp2(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
x, y = x.chunk(2)[rank], y.chunk(2)[rank]
loss_fn = lambda: torch.nn.functional.mse_loss(model(x).float(), y)
print(float(fw.sharpness.top_eigenvalue(loss_fn, model.parameters()).value))
dist.destroy_process_group()
"""
)


def test_shards_measure_what_one_process_does(tmp_path):
    first, second = run_ranks(tmp_path, MODEL + MEASURE + WRAPS + RUN)
    assert first == second
    scope = {"torch": torch, "fw": fw}
    exec(MODEL + MEASURE, scope)
    words = iter(first)
    for name, i in CASES:
        model, x, y = scope["made"](8 if name == "tp" else 7)
        restored, found = scope["measure"](model, model, x, y, list(scope["optimizers"](model))[i], 2)
        assert [next(words) for _ in range(3)] == [name, str(i), "True"]
        assert restored
        values = [float.fromhex(next(words)) for _ in found]
        assert values == pytest.approx(found, rel=1e-5), (name, i)
    # a shorter step, as for float32, gives 1.7 times as much
    model, x, y = scope["narrow"]()
    whole = fw.sharpness.top_eigenvalue(lambda: F.mse_loss(model(x), y), model.parameters())
    assert float(next(words)) == pytest.approx(float(whole.value), rel=0.1)
    assert next(words, None) is None


REFUSED = """
def message(of, kind=ValueError):
    try:
        of()
    except kind as error:
        print(str(error).replace(" ", "_"))

model, x, y = made(7)
run = fsdp2(model)
opt = fw.SGD(model.parameters(), lr=0.1)
loss_fn = lambda: run(x).square().mean()
message(lambda: fw.sharpness.top_eigenvalue(loss_fn, model.parameters(), method="autograd"))
message(lambda: fw.SharpnessProbe(opt, method="autograd"))
message(lambda: fw.SharpnessProbe(opt, budget=0.02))
flat = FSDP(made(7)[0], device_id=torch.device("cpu"), use_orig_params=True)
message(lambda: fw.sharpness.top_eigenvalue(lambda: flat(x).sum(), flat.parameters()), TypeError)
opt = fw.SGD(made(7)[0].parameters(), lr=0.1, process_group=dist.group.WORLD)
message(lambda: fw.PersistentCatapult(opt, 10.0))
model[2].bias.register_post_accumulate_grad_hook(lambda p: None)
message(lambda: fw.sharpness.top_eigenvalue(loss_fn, model[0].parameters()))
dist.destroy_process_group()
"""


def test_what_shards_do_not_take_is_refused(tmp_path):
    first, second = run_ranks(tmp_path, MODEL + WRAPS + REFUSED)
    assert first == second
    method = "method must be 'difference' for DTensors, got 'autograd'. FSDP2 has no double backward."
    assert [word.replace("_", " ") for word in first] == [
        f"top eigenvalue: {method}",
        f"SharpnessProbe: {method}",
        "SharpnessProbe: budget must be None for DTensors, got 0.02. The clocks of ranks differ.",
        "top eigenvalue: params[0] must be a tensor or DTensor, got 'a part of FSDP1'. "
        "Shard with fully shard (FSDP2).",
        "PersistentCatapult: process group must be None where an optimizer is measured, got 'a group'. "
        "Shard with fully shard (FSDP2).",
        "top eigenvalue: a parameter must have no hook after its gradient where a DTensor is measured, got (1,).",
    ]


EXACT = """
from fused_warmup.reference.rounding import RESIDUES, load
from fused_warmup.sharpness.operators import evaluator_of
from fused_warmup.sharpness.pending_step import PendingStep

for mode, (name, _) in RESIDUES.items():
    model, x, y = narrow()
    model, x, y = fsdp2(model.bfloat16()), x.bfloat16(), y.bfloat16()
    opt = fw.AdamW(model.parameters(), lr=3e-3, param_rounding=mode)
    loss_fn = lambda: torch.nn.functional.mse_loss(model(x), y)
    for step in range(4):
        opt.zero_grad()
        loss_fn().backward()
        if step < 3:
            opt.step()
    params = [p.to_local() for p in model.parameters()]
    before = [p.clone() for p in params]
    values = [load(mode, p, opt.state[q][name].to_local()) for p, q in zip(before, model.parameters())]
    pending = PendingStep("test", opt)
    with evaluator_of(pending, loss_fn) as evaluator:
        vectors = evaluator.vectors
        vector = vectors.flat(pending.directions(pending.grads))
        vectors.perturb(vector, None, vectors.number(2.0**-7))
        steps = [2.0**-7 * part for part in vectors.split(vector)]
        found = [p.clone() for p in params]
    exact = [(v + step).bfloat16() for v, step in zip(values, steps)]
    rounded = [(p + step).bfloat16() for p, step in zip(before, steps)]
    print(mode, same(found, exact), same(found, rounded), same(params, before))
dist.destroy_process_group()
"""


def test_shards_begin_at_exact_values(tmp_path):
    for rank in run_ranks(tmp_path, MODEL + WRAPS + EXACT):
        words = iter(rank)
        for mode in ("kahan", "split", "master"):
            assert [next(words) for _ in range(4)] == [mode, "True", "False", "True"]
        assert next(words, None) is None
