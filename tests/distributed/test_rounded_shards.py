"""Rounding of 16-bit parameters and states that are spread over processes: the bits of one process."""

import pytest
import torch
from ranks import run_ranks

import fused_warmup as fw
from fused_warmup.distributed.spread import elements_of, place_of

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without torch.distributed"
)

STEPS = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from fused_warmup.reference.rounding import RESIDUES

def check(name, found, expected):
    found, expected = (t.detach().contiguous().view(torch.uint8) for t in (found, expected))
    assert torch.equal(found, expected), (name, rank)

shape = {shape}
mesh = init_device_mesh("cpu", shape)
sizes = ((7, 4), (3, 5, 6), (6,), (1, 9), (4, 2050))
placements = [Shard(0), Shard(1), Replicate()] if len(shape) == 1 else [(Shard(0), Shard(1)), (Replicate(), Shard(1))]
done = 0
for cls, modes in ((fw.Adam, ("stochastic", "kahan", "split", "master")), (fw.LAMB, ("kahan",))):
    for mode in modes:
        for placement in placements:
            each = placement if isinstance(placement, tuple) else (placement,)
            generator = torch.Generator().manual_seed(3)
            values = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
            own = [[p if not (p.is_shard() and p.dim >= v.dim()) else Shard(0) for p in each] for v in values]
            whole = [torch.nn.Parameter(v.clone()) for v in values]
            parts = [
                torch.nn.Parameter(distribute_tensor(v.clone(), mesh, p, src_data_rank=None))
                for v, p in zip(values, own)
            ]
            options = dict(lr=1e-2, param_rounding=mode, rounding_seed=5, backend="{backend}")
            options["state_dtype"] = torch.bfloat16 if mode in ("stochastic", "kahan") else torch.float32
            opts = [cls(params, **options) for params in (whole, parts)]
            for step in range(3):
                for param, part, p in zip(whole, parts, own):
                    param.grad = torch.randn(param.shape, generator=generator).bfloat16()
                    part.grad = distribute_tensor(param.grad, mesh, p, src_data_rank=None)
                for opt in opts:
                    opt.step()
                if step == 1:
                    # on with a new optimizer, from a state dict
                    saved = opts[1].state_dict()
                    opts[1] = cls(parts, **dict(options, param_rounding="nearest", rounding_seed=0, state_dtype=torch.float32))
                    opts[1].load_state_dict(saved)
            exact = [opt.exact_parameters() for opt in opts]
            for i, (param, part) in enumerate(zip(whole, parts)):
                name = (cls.__name__, mode, placement, tuple(param.shape))
                check(name, part.full_tensor(), param)
                check(name, exact[1][i].full_tensor(), exact[0][i])
                keys = ("exp_avg", "exp_avg_sq", *([RESIDUES[mode][0]] if mode in RESIDUES else []))
                assert opts[1].state[part]["exp_avg"].dtype == options["state_dtype"], name
                for key in keys:
                    state = opts[1].state[part][key]
                    assert isinstance(state, DTensor), name
                    check((name, key), state.full_tensor(), opts[0].state[param][key])
            opts[1].set_exact_parameters(exact[1])
            check("set", opts[1].exact_parameters()[0].full_tensor(), exact[0][0])
            done += 1
print(done)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)], ids=str)
def test_shards_are_rounded_as_whole_tensors(tmp_path, shape):
    """Every mode, by rows, by columns, by both, and copied; sums of LAMB over processes are exact enough here."""
    world_size = torch.Size(shape).numel()
    counts = run_ranks(tmp_path, STEPS.format(shape=shape, backend="auto"), world_size, timeout=300)
    each = 3 if len(shape) == 1 else 2
    assert counts == [[str(5 * each)]] * world_size


def test_a_whole_tensor_counts_its_elements_in_memory_order():
    param = torch.nn.Parameter(torch.zeros(3, 4))
    assert place_of(param) == (0, 12, 12)
    assert elements_of(param).tolist() == list(range(12))
    assert elements_of(torch.nn.Parameter(torch.zeros(0))).tolist() == []
    opt = fw.SGD(
        [torch.nn.Parameter(torch.zeros(0, dtype=torch.bfloat16))], lr=0.1, param_rounding="stochastic"
    )
    opt.param_groups[0]["params"][0].grad = torch.zeros(0, dtype=torch.bfloat16)
    opt.step()
