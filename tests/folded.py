"""Steps whose sums are folded for other processes, in one process that has all rows."""

import torch

import fused_warmup as fw
from fused_warmup.distributed.reduction import Reduction
from fused_warmup.distributed.spread import Spread
from fused_warmup.optim import session
from fused_warmup.plan import plan

SHAPES = ((7, 4), (3, 5, 2), (6,), (), (2, 33000))
CASES = {
    "Adam": (fw.Adam, {}),
    "Adam-clip": (fw.Adam, {"max_grad_norm": 0.5, "average": fw.EMA(0.9)}),
    "Adam-sphere": (fw.Adam, {"projection": "sphere"}),
    "LAMB": (fw.LAMB, {"always_adapt": True, "weight_decay": 0.1}),
    "AdamP": (fw.AdamP, {"weight_decay": 0.1}),
    "AdamP-all": (fw.AdamP, {"projection": "sphere", "max_grad_norm": 0.5, "nonfinite": "skip"}),
}


def spreads_of(params, by_channel):
    """Return rows in two slots, the channels of every other one cut."""
    found = []
    for i, param in enumerate(params):
        channels = len(param) if by_channel and param.dim() > 1 else 1
        groups = (("even", "odd")[i % 2],)
        found.append(Spread(groups, groups, param.numel(), channels, 0, channels > 1 and i % 4 == 0))
    return found


def orthogonal(param, step):
    """Return a gradient that is orthogonal to every channel or, of the second tensor, to the whole."""
    grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
    whole = param.detach()
    rows = whole.reshape(len(whole) if whole.dim() > 1 and len(whole) != 3 else 1, -1)
    part = grad.reshape(rows.shape)
    return (part - (part * rows).sum(1, keepdim=True) / (rows * rows).sum(1, keepdim=True) * rows).reshape(
        param.shape
    )


def check_folded(name, backend, monkeypatch):
    """Check that folded sums give the steps of a process that has all rows; a backend or its name."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    messages = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums, group: messages.append(group))
    make, options = CASES[name]
    runs = []
    for folds in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        named = isinstance(backend, str)
        opt = make(params, lr=0.05, backend=backend if named else "cpu", **options)
        if not named:
            opt.session.backend = backend
        spreads = spreads_of(params, opt.spec.by_channel)
        with monkeypatch.context() as patch:
            if folds:
                patch.setattr(session.build, "check_spreads", lambda *args, found=spreads, **more: found)
                patch.setattr(plan, "make_reduction", Reduction)
            for step in range(3):
                for param in params:
                    param.grad = orthogonal(param, step)
                if step == 1:
                    params[2].grad = None
                opt.step()
        runs.append((params, opt))
    (params, opt), (others, other) = runs
    assert set(messages) == {"even", "odd"}
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(q, p, rtol=2e-6, atol=1e-7)
        for key, value in opt.state[p].items():
            torch.testing.assert_close(other.state[q][key], value, rtol=2e-6, atol=1e-9)
    for column in ("grad_norm", "grad_norm_l1", "clip_coef", "lr", "skipped"):
        a, b = (o.telemetry.history()[column] for o in (opt, other))
        torch.testing.assert_close(b, a, rtol=1e-12, atol=0.0)
