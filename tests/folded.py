"""Steps whose sums are folded for other processes, in one process that has all rows."""

import contextlib

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


def spreads_of(params, by_channel, groups):
    """Return rows in two slots, the channels of every other one cut."""
    found = []
    for i, param in enumerate(params):
        channels = len(param) if by_channel and param.dim() > 1 else 1
        own = (groups[i % 2],)
        found.append(Spread(own, own, param.numel(), channels, 0, channels > 1 and i % 4 == 0))
    return found


@contextlib.contextmanager
def folding(monkeypatch, groups):
    """Let the steps of optimizers made inside fold sums and add them up over groups of this process alone."""

    def check_spreads(owner, spec, members, *settings, is_zero):
        return spreads_of([param for _, param, _ in members], spec.by_channel, groups)

    with monkeypatch.context() as patch:
        patch.setattr(session.build, "check_spreads", check_spreads)
        patch.setattr(plan, "make_reduction", Reduction)
        yield


def orthogonal(param, step):
    """Return a gradient that is orthogonal to every channel or, of the second tensor, to the whole."""
    grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
    rows = param.reshape(len(param) if param.dim() > 1 and len(param) != 3 else 1, -1)
    part = grad.reshape(rows.shape)
    return (part - (part * rows).sum(1, keepdim=True) / (rows * rows).sum(1, keepdim=True) * rows).reshape(
        param.shape
    )


def check_folded(name, backend, monkeypatch):
    """Check that folded sums give the steps of a process that has all rows; a backend or its name."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    messages = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums, group: messages.append(group))
    compare_steps(name, backend, monkeypatch, ("even", "odd"))
    assert set(messages) == {"even", "odd"}


def compare_steps(name, backend, monkeypatch, groups, device="cpu"):
    """Make steps with and without folded sums and compare all that they write."""
    make, options = CASES[name]
    runs = []
    for folds in (False, True):
        params = start(device)
        named = isinstance(backend, str)
        with folding(monkeypatch, groups) if folds else contextlib.nullcontext():
            opt = make(params, lr=0.05, backend=backend if named else "cpu", **options)
            if not named:
                opt.session.backend = backend
            for step in range(3):
                set_gradients(params, step)
                if step == 1:
                    params[2].grad = None
                opt.step()
        runs.append((params, opt))
    compare_runs(*runs)


def start(device):
    """Return parameters."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(device)) for shape in SHAPES]


def set_gradients(params, step):
    """Give every parameter the gradient of a step."""
    for param in params:
        param.grad = orthogonal(param.detach().cpu(), step).to(param.device)


def compare_runs(one, folded):
    """Compare the parameters, states and telemetry of two runs."""
    (params, opt), (others, other) = one, folded
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(q, p, rtol=2e-6, atol=1e-7)
        for key, value in opt.state[p].items():
            torch.testing.assert_close(other.state[q][key], value, rtol=2e-6, atol=1e-9)
    for column in ("grad_norm", "grad_norm_l1", "clip_coef", "lr", "skipped"):
        a, b = (o.telemetry.history()[column] for o in (opt, other))
        torch.testing.assert_close(b, a, rtol=1e-12, atol=0.0)
