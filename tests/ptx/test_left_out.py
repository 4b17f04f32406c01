"""Every barrier and fence of the kernels left out once: a race is found, or other bits come out.

Those that nothing misses are in ``REDUNDANT``, with the reason.
"""

import re
from collections import Counter

import pytest
import torch
from cases import BY_NAME, SCHEDULES, make_params, set_grads, states_of
from ptx import run
from ptx.sides import SIDES, backend_of, make_runs, step_all
from vector_cases import DTYPES, draw
from vector_cases import make_params as make_vectors

from fused_warmup.sharpness.pending_step import PendingStep
from fused_warmup.sharpness.vectors import FusedVectors

pytestmark = [pytest.mark.slow, pytest.mark.rest]
# rows beyond one tile of decide, channels of one element, of many and of several pieces
SHAPES = [(3,), (0,), (), (5, 7, 9), (2, 2100), (130, 3)]
MANY = [*SHAPES, *[(2,)] * 600]
# a tile of rows for each group
MORE = [*SHAPES, *[(2,)] * 1020]


def steps(case, shapes, bare=False, **options):
    """Return a function that makes two steps, of the first group without gradients, and returns all that they wrote."""

    def make(backend):
        runs = make_runs(BY_NAME[case], (torch.float32,), [backend], shapes, **options)
        step_all(runs, 2, bare=bare)
        params, opt = runs[0]
        states = [state for p in params for state in states_of(opt, p).values()]
        return [*params, *states, *opt.telemetry.history().values()]

    return make


def vectors(backend):
    """Make each operation once, with more basis vectors than a thread holds, and return the results."""
    params = make_vectors(DTYPES, [(3,), (300,)])
    made = FusedVectors(params, [p.detach().clone() for p in params], torch.float64, backend)
    basis = made.basis(8)
    for i, vector in enumerate(basis):
        vector.copy_(draw(made, i))
    scale, size = draw(made, 100).abs() + 0.5, made.number(2.0**-6)
    made.perturb(basis[-1], scale, size)
    out = made.basis(1)[0]
    sums = [*made.finish(basis, out, params, [p.detach() + 1 for p in params], scale, size)]
    coefficients = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)
    return [out, *sums, *made.combine(out, made.number(0.75), basis, coefficients, scale), *params]


def preconditioner(backend):
    """Return the preconditioner of two groups."""
    params = make_params(torch.float32, [(3,), (0,), (), (33, 101), (1030,)])
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
    opt = BY_NAME["adamw"].make(groups, schedule=SCHEDULES["warmup_linear"])
    opt.session.backend = backend
    set_grads(params, 0)
    opt.step()
    set_grads(params, 1)
    pending = PendingStep("test", opt)
    found = pending.preconditioner(FusedVectors(pending.params, pending.params, torch.float32, backend))
    return [found.scale, found.scaled, found.factor]


SPHERE = {"projection": "sphere", "weight_decay": 0.0}
CLIP = {"max_grad_norm": 1.0}
# which kernels, and the runs of which one must notice
JOBS = {
    "measure": ("measure", [steps("adamw", MANY, **CLIP), steps("adamw", SHAPES, **CLIP)]),
    "decide": ("decide", [steps("adamw", MANY, **CLIP), steps("adamw", MORE, bare=True)]),
    "update": (
        "update|finish",
        [steps("adamw", MANY), steps("adam", SHAPES, **SPHERE), steps("adam", SHAPES, **CLIP, **SPHERE)],
    ),
    "lamb": ("stage1|reduce_layers", [steps("lamb", SHAPES)]),
    "adamp": ("stage|reduce_layers|update", [steps("adamp", SHAPES), steps("adamp", SHAPES, **SPHERE)]),
    "vectors": ("vector", [vectors]),
    "preconditioner": ("preconditioner", [preconditioner]),
}
ROWS = [("cuda", job) for job in JOBS] + [("triton", job) for job in ("decide", "update", "adamp", "vectors")]
# Barriers that nothing needs, by function and place there, with their number. The first one of block_sum,
# share_block_sum and block_min protects what threads still read from the next call: there is none in a launch that
# calls it once, and in set_rows a later barrier comes between. first_rect calls block_min again only for more than a
# tile of rows, which the kernel for few rows never has. Before sum_chunk, stage1_chunk waits where it adds up norms,
# which these runs do.
REDUNDANT = {
    ("cuda", "decide"): {("block_sum", 1): 1, ("block_min", 1): 3},
    ("cuda", "update"): {("block_sum", 1): 1},
    ("cuda", "lamb"): {("block_sum", 1): 1, ("share_block_sum", 1): 1},
    ("cuda", "adamp"): {("block_sum", 1): 1, ("share_block_sum", 1): 2},
    ("triton", "adamp"): {("sum_chunk", 1): 1},
}
TARGETS = {"cuda": SIDES[0], "triton": SIDES[1]}


@pytest.fixture(autouse=True)
def default_order():
    yield
    run.configure()


def is_noticed(kernel, line, make, backend, expected):
    """Return whether a run without a line shows it, and how often the line was left out."""
    reached = 0
    for order in ("random", "backward", "forward"):
        run.configure(order, races=True)
        try:
            with kernel.without(line) as times:
                found = make(backend)
        except run.Finding:
            return True, 1
        reached += times[0]
        if not all(torch.equal(a, b) for a, b in zip(as_bits(found), expected, strict=True)):
            return True, reached
    return False, reached


def as_bits(tensors):
    return [t.detach().reshape(-1).view(torch.uint8).clone() for t in tensors]


@pytest.mark.parametrize(("kind", "job"), ROWS)
def test_whatever_is_left_out_is_missed(kind, job, monkeypatch):
    part, makes = JOBS[job]
    backend = backend_of(TARGETS[kind], monkeypatch)
    unnoticed, sources, reached = {}, {}, set()
    for make in makes:
        run.configure("random", races=True)
        run.launched.clear()
        expected = as_bits(make(backend))
        kernels = [k for k, name in run.launched.items() if re.search(rf"({part})\w*_kernel", name)]
        for kernel in kernels:
            for line in kernel.barriers + kernel.fences:
                key = (kernel.code, line)
                text, *sources[key] = kernel.source(line)
                # the other ones are those of Triton's compiler
                if kind == "triton" and not re.search("debug_barrier|atomic", text):
                    continue
                if unnoticed.setdefault(key, True):
                    noticed, times = is_noticed(kernel, line, make, backend, expected)
                    unnoticed[key] = not noticed
                    reached |= {key} if times else set()
    # a function has copies for dtypes that these runs do not have; one copy of each must have run
    places = {tuple(sources[key]) for key in unnoticed}
    assert places
    assert places == {tuple(sources[key]) for key in reached}
    left = Counter(tuple(sources[key]) for key in reached if unnoticed[key])
    assert left == REDUNDANT.get((kind, job), {})
