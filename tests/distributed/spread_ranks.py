"""Steps of optimizers whose parameters are spread over processes against ones that have them whole.

Run in every process of a group. Gradients are given, so that they are the same bits in both.
"""

import functools
import hashlib
import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import fused_warmup as fw

SHAPES = ((7, 4), (3, 5, 2), (6,), (1, 4), (9, 3), (2, 2500))
STEPS = 4
# of AdamP and SGDP: a layer or channel of n elements is scale-invariant up to a cosine of this / sqrt(n)
DELTA = 0.1

OPTIMIZERS = {
    "SGD": (fw.SGD, {"momentum": 0.9}),
    "Adam": (fw.Adam, {}),
    "AdamW": (fw.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    "GIAdam": (fw.GIAdam, {}),
    "RAdam": (fw.RAdam, {}),
    "LAMB": (fw.LAMB, {"weight_decay": 0.1, "always_adapt": True}),
    "AdamP": (fw.AdamP, {"weight_decay": 0.1, "delta": DELTA}),
    "SGDP": (fw.SGDP, {"momentum": 0.9, "weight_decay": 0.1, "delta": DELTA}),
}
OPTIONS = {
    "plain": {},
    "clip": {"max_grad_norm": 0.5},
    "skip": {"nonfinite": "skip"},
    "average": {"average": fw.EMA(0.8)},
    "schedule": {"schedule": fw.schedules.warmup(3).then(fw.schedules.cosine(1.0, 0.1, 5))},
    "sphere": {"projection": "sphere", "weight_decay": 0.0},
    "all": {
        "max_grad_norm": 0.5,
        "nonfinite": "skip",
        "average": fw.EMA(0.8),
        "projection": "sphere",
        "weight_decay": 0.0,
    },
}
FULL = ("Adam", "LAMB", "AdamP")


def gradients(step, params, name, option):
    """Return gradients of all parameters; orthogonal to channels or whole layers where that is tested.

    That of the last layer is not, by a fifth of what is tolerated, but would be for a part of the layer.
    """
    generator = torch.Generator().manual_seed(step)
    found = []
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.device)
        whole = param.detach().to(torch.float64)
        if name in ("AdamP", "SGDP"):
            # channels of the first ones, layers of the next, and neither
            rows = whole.reshape(len(whole) if i < 3 else 1, -1) if whole.dim() else whole.reshape(1, 1)
            part = grad.reshape(rows.shape)
            part = part - (part * rows).sum(1, keepdim=True) / (rows * rows).sum(1, keepdim=True) * rows
            if i == 5:
                cosine = 1.2 * DELTA / math.sqrt(rows.numel())
                part = part + cosine * part.norm() / rows.norm() * rows
            grad = part.reshape(param.shape)
        if option in ("skip", "all") and step == 2 and i == 1:
            grad.view(-1)[-1] = math.inf
        found.append(grad.to(param.dtype))
    return found


@functools.cache
def mesh_of(device, shape):
    """Return the mesh of that shape."""
    return init_device_mesh(device, shape)


def gathered(tensor):
    """Return a tensor whole and on the CPU, where gloo gathers."""
    if not isinstance(tensor, DTensor):
        return tensor.cpu()
    mesh = mesh_of("cpu", tensor.device_mesh.shape)
    local, like = tensor.to_local().cpu(), {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(local, mesh, tensor.placements, run_check=False, **like).full_tensor()


def distance(a, b):
    """Return the largest distance of two tensors relative to the largest element, infinity where one is NaN."""
    a, b = gathered(a), gathered(b)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return math.inf
    a, b = a[finite].detach().double(), b[finite].detach().double()
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) if a.numel() else 0.0


def run(make, options, name, option, places, mesh, backend, dtype=torch.float64):
    """Return the largest relative distance of parameters, states and telemetry."""
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=dtype).to(mesh.device_type) for shape in SHAPES]
    whole = [torch.nn.Parameter(p.clone()) for p in start]
    spread = [
        torch.nn.Parameter(
            p.clone() if place is None else distribute_tensor(p.clone(), mesh, place, src_data_rank=None)
        )
        for p, place in zip(start, places, strict=True)
    ]
    settings = {"lr": 0.05, **options, **OPTIONS[option], "backend": backend}
    opts = []
    for params in (whole, spread):
        torch.manual_seed(dist.get_rank() if params is spread else 0)
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]
        opts.append(make(groups, **settings))
    if "exp_avg_sq_init" in settings:
        # the seed of the first process
        torch.manual_seed(0)
    for step in range(STEPS):
        grads = gradients(step, whole, name, option)
        for p, q, grad, place in zip(whole, spread, grads, places, strict=True):
            p.grad = grad
            q.grad = grad if place is None else distribute_tensor(grad, mesh, place, src_data_rank=None)
        for opt in opts:
            opt.step()
    pairs = [
        (*(opt.telemetry.history()[name] for opt in opts),)
        for name in ("grad_norm", "grad_norm_l1", "clip_coef", "skipped")
    ]
    _seen.append(pairs[0][1].nan_to_num())
    for p, q in zip(whole, spread, strict=True):
        pairs += [(p, q)]
        pairs += [
            (v, opts[1].state[q][k]) for k, v in opts[0].state[p].items() if isinstance(v, torch.Tensor)
        ]
    return max(distance(a, b) for a, b in pairs)


def placements(mesh):
    """Return named placements of all parameters on a mesh; None leaves a parameter plain."""
    if mesh.ndim == 1:
        return {
            "rows": [[Shard(0)]] * 6,
            "columns": [[Shard(1)], [Shard(2)], [Shard(0)], [Shard(1)], [Shard(1)], [Shard(1)]],
            "mixed": [[Shard(0)], [Replicate()], None, [Shard(0)], None, [Shard(1)]],
        }
    strided = _StridedShard(0, split_factor=mesh.size(1))
    return {
        "2-D": [
            [Shard(0), Shard(1)],
            [strided, Shard(0)],
            [Shard(0), Replicate()],
            [Replicate(), Shard(1)],
            None,
            [Replicate(), Replicate()],
        ],
        "HSDP": [[Replicate(), Shard(0)]] * 6,
    }


_seen = []


def digest():
    """Return a hash of the norms that were recorded in this process."""
    return hashlib.sha256(torch.cat(_seen).numpy().tobytes()).hexdigest()


def leave_out(part):
    """Let processes keep some sums to themselves: ``squares``, ``norms`` or ``layers``."""
    from fused_warmup.distributed.reduction import Reduction

    add_up = Reduction.add_up
    Reduction.add_up = lambda self, **parts: add_up(self, **{**parts, part: False})


def use_cuda_on_host():
    """Let every step be made by the CUDA kernels that are built for the host."""
    import cuda_on_host

    from fused_warmup.backends.native import CudaBackend
    from fused_warmup.optim import session
    from fused_warmup.plan import device_buffers

    backend, real = CudaBackend(cuda_on_host.cached()), session.resolve
    session.resolve = lambda name, device: real(name, device) if name == "reference" else backend
    device_buffers.is_mirrored = lambda device: True


def compare(shape, backend, names=tuple(OPTIMIZERS), options=tuple(OPTIONS), device="cpu"):
    """Return the cases of a mesh of that shape in which the two are not equal, and their distance."""
    mesh, different = mesh_of(device, shape), {}
    for place, places in placements(mesh).items():
        for name in names:
            # what is true of one rule without sums over layers is true of the others
            for option in options if name in FULL else ("all",):
                make, settings = OPTIMIZERS[name]
                worst = run(make, settings, name, option, places, mesh, backend)
                if not worst < 1e-12:
                    different[backend, place, name, option] = worst
    return different
