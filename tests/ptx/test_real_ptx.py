"""Steps and vector operations by the PTX that nvcc and Triton emit, against the CPU kernels.

Threads and blocks run in a random order, and races of global memory are looked for in every launch.
"""

import itertools
import re

import folded
import pytest
import torch
from cases import BY_NAME, SCHEDULES, assert_close, assert_same_bits, make_params, states_of
from ptx import run
from ptx.sides import SHAPES, SIDES, backend_of, make_runs, step_all
from vector_cases import (
    DTYPES,
    PRECONDITIONED,
    check_operations,
    check_preconditioner,
    draw,
)
from vector_cases import (
    make_params as make_vectors,
)

from fused_warmup import _cpu
from fused_warmup.backends.native import CpuBackend
from fused_warmup.sharpness.vectors import FusedVectors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        len(_cpu.instruction_sets()) == 1, reason="this processor rounds products and sums twice"
    ),
]
# of these make test runs something, and the rest runs most; of the others it runs each kernel
MAIN = SIDES[:2]
HALVES = (torch.bfloat16, torch.float16)
FEW = ("adam-amsgrad", "radam-l2", "sgd-nesterov", "lamb", "adamp-channel", "sgdp")


def rows(quick, *lists, wanted=lambda *row: True):
    """Return the wanted rows of the product of lists, those that are not quick marked as the rest."""
    product = [row for row in itertools.product(*lists) if wanted(*row)]
    return [pytest.param(*row, marks=[] if quick(*row) else [pytest.mark.rest]) for row in product]


@pytest.fixture(autouse=True)
def any_order():
    run.configure("random", races=True)
    yield
    run.configure()


def assert_same(runs):
    """Same bits but of float64, whose update is scaled with CUDA's log and expm1.

    They differ from those of the C library by a unit in the last place. So do sums over layers, which are added up in
    another order. In units of 2^-53 of an element and the largest one, 0.92 was the most that any case differed by.
    """
    (params, opt), (others, other) = runs
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        expected = states_of(other, q)
        pairs = {"parameter": (p, q)}
        pairs |= {name: (value, expected[name]) for name, value in states_of(opt, p).items()}
        for name, (ours, theirs) in pairs.items():
            if ours.dtype == torch.float64 and ours.numel():
                unit = 2 * 2.0**-53
                assert_close(f"{name} {i}", ours, theirs, unit * float(theirs.detach().abs().max()), unit)
            else:
                assert_same_bits(f"{name} {i}", ours, theirs)
    ours, theirs = (o.telemetry.history() for _, o in runs)
    for name, values in ours.items():
        rtol = 16 * 2.0**-24 if name == "grad_norm_l1" else 1e-12
        torch.testing.assert_close(values, theirs[name], rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("side", "case", "dtypes"),
    rows(
        lambda side, case, dtypes: side in MAIN and case in ("adamw", "lamb") and torch.float64 not in dtypes,
        SIDES,
        BY_NAME,
        [(torch.float32,), HALVES, (torch.float64,), tuple(DTYPES)],
        wanted=lambda side, case, dtypes: (
            len(dtypes) < len(DTYPES) if side in MAIN else case in FEW and len(dtypes) == len(DTYPES)
        ),
    ),
    ids=str,
)
def test_steps_have_the_bits_of_the_cpu_kernels(side, case, dtypes, monkeypatch):
    runs = make_runs(BY_NAME[case], dtypes, (backend_of(side, monkeypatch), CpuBackend()))
    step_all(runs)
    assert_same(runs)


OPTIONS = {
    "clipped": {"max_grad_norm": 1.0},
    "skipping": {"nonfinite": "skip"},
    "sphere": {"projection": "sphere", "weight_decay": 0.0},
    "sphere-clipped": {"projection": "sphere", "weight_decay": 0.0, "max_grad_norm": 1.0},
    "without-telemetry": {"telemetry": 0},
}


@pytest.mark.parametrize(
    ("side", "case", "option"),
    rows(
        lambda side, case, option: case in ("adamw", "lamb") and option == "clipped",
        MAIN,
        ("adamw", "radam", "lamb", "adamp-channel"),
        OPTIONS,
    ),
)
def test_options_have_the_bits_of_the_cpu_kernels(side, case, option, monkeypatch):
    backends = (backend_of(side, monkeypatch), CpuBackend())
    step_all(runs := make_runs(BY_NAME[case], (torch.float32,), backends, **OPTIONS[option]))
    assert_same(runs)


@pytest.mark.parametrize(
    ("side", "case"), rows(lambda side, case: (side, case) == ("triton-90", "adamw"), MAIN, ("adamw", "lamb"))
)
def test_rounded_states_have_the_bits_of_the_cpu_kernels(side, case, monkeypatch):
    """Beside float32 parameters and those that draw bits of their own."""
    backends = (backend_of(side, monkeypatch), CpuBackend())
    options = {"state_dtype": torch.bfloat16, "param_rounding": "stochastic", "rounding_seed": 7}
    step_all(runs := make_runs(BY_NAME[case], (torch.float32, torch.bfloat16), backends, **options))
    assert_same(runs)


@pytest.mark.parametrize("option", [{}, {"max_grad_norm": 1.0}], ids=["unclipped", "clipped"])
def test_small_chunks_take_blocks_of_a_warp(option, monkeypatch):
    """Shared memory for the sums of other warps is not read, because nobody writes it."""
    backends = (backend_of(MAIN[0], monkeypatch), CpuBackend())
    step_all(runs := make_runs(BY_NAME["adamw"], HALVES, backends, [(1,), (64,), (7, 9), (0,)], **option))
    assert_same(runs)


@pytest.mark.parametrize("side", MAIN)
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.rest) for name in ("Adam-sphere", "LAMB")), "AdamP-all"]
)
def test_folded_sums(side, name, monkeypatch):
    """The kernels of rows that are spread over processes."""
    folded.check_folded(name, backend_of(side, monkeypatch), monkeypatch)


@pytest.mark.rest
@pytest.mark.parametrize("side", MAIN)
@pytest.mark.parametrize("case", ["adamw", "adamp"])
def test_more_rows_than_decide_has_threads(side, case, monkeypatch):
    """And than small arguments hold, beside a tensor of two chunks."""
    backends = (backend_of(side, monkeypatch), CpuBackend())
    runs = make_runs(BY_NAME[case], (torch.float32,), backends, [*SHAPES, (33_001,)] + [(2,)] * 600)
    step_all(runs, 2)
    assert_same(runs)


@pytest.mark.rest
@pytest.mark.parametrize("order", ["forward", "backward", "random"])
@pytest.mark.parametrize("side", MAIN)
@pytest.mark.parametrize("case", ["adamw", "lamb"])
def test_orders_and_grids_do_not_change_a_bit(side, case, order, monkeypatch):
    for blocks in (1, 2, 10**6):
        run.configure(order, seed=blocks, races=True)
        backends = (backend_of(side, monkeypatch, blocks), CpuBackend())
        step_all(runs := make_runs(BY_NAME[case], (torch.float32,), backends, max_grad_norm=1.0))
        assert_same(runs)


VECTORS = [(torch.float32,), HALVES, (torch.float64,)]


@pytest.mark.parametrize(
    ("side", "dtypes"),
    rows(lambda side, dtypes: side in MAIN and torch.float64 not in dtypes, SIDES, VECTORS),
    ids=str,
)
def test_vector_operations_have_the_bits_of_the_cpu_kernels(side, dtypes, monkeypatch):
    """Elements; the CPU kernels begin their sums in float32, and add up in another order."""
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    shapes = [(3,), (0,), (), (1023,), (4097,), (8, 16)]
    results = []
    for backend in (backend_of(side, monkeypatch), CpuBackend()):
        params = make_vectors(dtypes, shapes)
        vectors = FusedVectors(params, [p.detach().clone() for p in params], wide, backend)
        basis = vectors.basis(6)
        for i, vector in enumerate(basis):
            vector.copy_(draw(vectors, i))
        scale, size = draw(vectors, 100).abs() + 0.5, vectors.number(2.0**-6)
        vectors.perturb(basis[-1], scale, size)
        perturbed = [p.detach().clone() for p in params]
        generator = torch.Generator().manual_seed(7)
        grads = [[torch.randn(p.shape, generator=generator).to(p.dtype) for p in params] for _ in range(2)]
        grads[0][0] = None
        out = vectors.basis(1)[0]
        sums = [*vectors.finish(basis, out, *grads, scale, size)]
        finished = out.clone()
        coefficients = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
        sums += vectors.combine(out, vectors.number(0.75), basis, coefficients, scale)
        results.append(([*perturbed, finished, out, *params], sums))
    (ours, our_sums), (theirs, their_sums) = results
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_bits(f"result {i}", a, b)
    for a, b in zip(our_sums, their_sums, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-6 * vectors.numel)


@pytest.mark.rest
@pytest.mark.parametrize("side", MAIN)
@pytest.mark.parametrize("dtypes", VECTORS, ids=str)
def test_vector_operations(side, dtypes, monkeypatch):
    check_operations(list(dtypes), backend_of(side, monkeypatch))


@pytest.mark.parametrize(
    ("side", "case"),
    rows(
        lambda side, case: side == "triton-90" and case == "adam-decoupled",
        SIDES,
        [case.name for case in PRECONDITIONED],
        wanted=lambda side, case: side in MAIN or case in FEW,
    ),
)
def test_preconditioner_is_that_of_the_reference(side, case, monkeypatch):
    """In several groups, whose rates one program writes and others must not read."""
    backend = backend_of(side, monkeypatch)

    def make(case, params, **options):
        opt = case.make(params, **options)
        opt.session.backend = backend
        return opt, backend

    params = make_params(torch.float32, [(3,), (0,), (), (33, 101)])
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
    check_preconditioner(
        BY_NAME[case], lambda case, _, **options: make(case, groups, **options), params,
        schedule=SCHEDULES["warmup_linear"],
    )  # fmt: skip


def stages():
    """The names of the kernels that have run, without those of their rules and types."""
    return {re.search(r"([a-z]+\d?(?:_[a-z]+)?)_kernel", name)[1] for name in run.launched.values()}


@pytest.mark.parametrize("side", MAIN)
def test_every_launch_is_by_ptx(side, monkeypatch):
    run.launched.clear()
    case = BY_NAME["lamb"]
    step_all(make_runs(case, (torch.float32,), [backend_of(side, monkeypatch)], max_grad_norm=1.0), 1)
    assert stages() == {
        "measure",
        "decide",
        "stage1",
        "reduce_layers",
        "update" if "cuda" in side else "stage2",
    }
