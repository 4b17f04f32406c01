"""The ledger: launches and bytes of a step, from the plan that the step runs."""

import pytest
import torch
from cases import make_params, set_grads

import fused_warmup as fw
from fused_warmup.cli.bench import cases as bench_cases

SHAPES = [(33, 5), (7,), (), (0, 4), (1 << 16,)]

# read and written together, per float32 parameter
TOTALS = {
    "adam": (fw.Adam, {}, 28),
    "adamw": (fw.AdamW, {}, 28),
    "giadam": (fw.GIAdam, {}, 28),
    "amsgrad": (fw.Adam, {"amsgrad": True}, 36),
    "radam": (fw.RAdam, {}, 28),
    "sgd": (fw.SGD, {}, 12),
    "momentum": (fw.SGD, {"momentum": 0.9}, 20),
}


def ledger(optimizer, dtype=torch.float32, grad_dtype=None, **options):
    params = make_params(dtype, SHAPES)
    set_grads(params, 0)
    if grad_dtype is not None:
        for p in params:
            grad, p.grad = p.grad, None
            p.grad_dtype = grad_dtype
            p.grad = grad.to(grad_dtype)
    return optimizer(params, **options).traffic()


@pytest.mark.parametrize(("optimizer", "options", "total"), TOTALS.values(), ids=TOTALS)
def test_bytes_and_launches(optimizer, options, total):
    """A measure pass reads the gradient once more; an average is read and written; telemetry takes a launch."""
    plain = ledger(optimizer, **options, telemetry=False)
    assert (plain.launches, plain.per_parameter) == (2, total)
    recorded = ledger(optimizer, **options)
    assert (recorded.launches, recorded.per_parameter) == (3, total)
    for more in ({"max_grad_norm": 1.0}, {"nonfinite": "skip"}):
        measured = ledger(optimizer, **options, **more)
        assert (measured.launches, measured.per_parameter) == (3, total + 4)
    averaged = ledger(optimizer, **options, average=fw.EMA(0.9))
    assert (averaged.launches, averaged.per_parameter) == (3, total + 8)
    both = ledger(optimizer, **options, average=fw.SWA(1), max_grad_norm=1.0)
    assert (both.launches, both.per_parameter) == (3, total + 12)


@pytest.mark.parametrize("mode", ["nearest", "stochastic", "kahan", "split", "master"])
def test_residues_are_read_and_written_where_the_parameter_is(mode):
    """Per bfloat16 parameter: with each of its 2 bytes those of the residue, and no launch more."""
    residue = {"kahan": 2, "split": 2, "master": 4}.get(mode, 0)
    options = {"param_rounding": mode, "telemetry": False}
    plain = ledger(fw.Adam, torch.bfloat16, **options)
    assert (plain.launches, plain.per_parameter) == (2, 22 + 2 * residue)
    assert plain.held == plain.numel * (12 + residue)
    # the first stage of a rule that sums over layers reads them once more
    layered = ledger(fw.LAMB, torch.bfloat16, **options, max_grad_norm=None)
    assert (
        layered.per_parameter
        == ledger(fw.LAMB, torch.bfloat16, telemetry=False, max_grad_norm=None).per_parameter + 3 * residue
    )
    sphere = ledger(fw.SGD, torch.bfloat16, projection="sphere", **options)
    assert sphere.per_parameter == 6 + 4 + 4 * residue


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_states_take_half(dtype):
    """Each state is read and written with 2 bytes less, and by a rule that sums over layers read once more."""
    options = {"state_dtype": torch.bfloat16, "telemetry": False}
    for optimizer, more, saved in (
        (fw.Adam, {}, 8),
        (fw.Adam, {"amsgrad": True}, 12),
        (fw.SGD, {"momentum": 0.9}, 4),
        (fw.LAMB, {"max_grad_norm": None}, 12),
    ):
        plain, light = (
            ledger(optimizer, dtype, telemetry=False, **more),
            ledger(optimizer, dtype, **options, **more),
        )
        assert light.launches == plain.launches
        assert light.per_parameter == plain.per_parameter - saved
    # averages stay float32
    averaged = ledger(fw.Adam, dtype, **options, average=fw.EMA(0.9))
    assert averaged.per_parameter == ledger(fw.Adam, dtype, **options).per_parameter + 8


# what is read twice: parameter and states, and the gradient where the update needs it again
LAYERS = {
    "lamb": (fw.LAMB, {}, 40),
    "adamp": (fw.AdamP, {}, 40),
    "adamp-nesterov": (fw.AdamP, {"nesterov": True}, 44),
    "sgdp": (fw.SGDP, {"lr": 0.1}, 20),
    "sgdp-momentum": (fw.SGDP, {"lr": 0.1, "momentum": 0.9}, 28),
    "sgdp-nesterov": (fw.SGDP, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 32),
}


@pytest.mark.parametrize(("optimizer", "options", "total"), LAYERS.values(), ids=LAYERS)
def test_bytes_and_launches_with_sums_over_layers(optimizer, options, total):
    plain = ledger(optimizer, **options)
    assert (plain.launches, plain.per_parameter) == (4, total)
    clipped = ledger(optimizer, **options, max_grad_norm=1.0)
    assert (clipped.launches, clipped.per_parameter) == (5, total + 4)
    averaged = ledger(optimizer, **options, average=fw.EMA(0.9))
    assert (averaged.launches, averaged.per_parameter) == (4, total + 8)


@pytest.mark.parametrize(
    ("optimizer", "options", "launches", "total"),
    [(fw.Adam, {}, 3, 28), (fw.Adam, {"max_grad_norm": 1.0}, 3, 32), (fw.SGDP, {"lr": 0.1}, 4, 20)],
)
def test_a_sphere_is_read_and_written_once_more(optimizer, options, launches, total):
    """By one launch for all of them; the groups that have none cost what they did."""
    kept = ledger(optimizer, projection="sphere", **options)
    assert (kept.launches, kept.per_parameter) == (launches + 1, total + 8)
    averaged = ledger(optimizer, projection="sphere", average=fw.EMA(0.9), **options)
    assert (averaged.launches, averaged.per_parameter) == (launches + 1, total + 16)
    assert ledger(optimizer, torch.bfloat16, projection="sphere", **options).per_parameter == (
        ledger(optimizer, torch.bfloat16, **options).per_parameter + 4
    )
    params = make_params(torch.float32, [(50,), (50,)])
    set_grads(params, 0)
    groups = [{"params": params[:1]}, {"params": params[1:], "projection": "sphere"}]
    mixed = optimizer(groups, **options).traffic()
    assert (mixed.launches, mixed.per_parameter) == (launches + 1, total + 4)


def test_telemetry_costs_a_launch_and_no_pass():
    on, off = (ledger(fw.Adam, telemetry=telemetry) for telemetry in (True, False))
    assert (on.launches, on.read, on.written) == (off.launches + 1, off.read, off.written)


@pytest.mark.parametrize("shapes", [[(4,)], [(4,)] * 500])
def test_the_number_of_tensors_and_groups_does_not_matter(shapes):
    params = make_params(torch.float32, shapes)
    set_grads(params, 0)
    t = fw.Adam([{"params": [p]} for p in params], max_grad_norm=1.0).traffic()
    assert (t.launches, t.per_parameter, t.numel) == (3, 32, 4 * len(shapes))


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "total"),
    [
        (torch.bfloat16, None, 2 + 2 + 2 + 16),
        (torch.bfloat16, torch.float32, 2 + 4 + 2 + 16),
        (torch.float16, None, 22),
        (torch.float64, None, 56),
    ],
)
def test_dtypes(dtype, grad_dtype, total):
    """States are float32 beside sixteen-bit parameters, and float64 beside float64 ones."""
    assert ledger(fw.Adam, dtype, grad_dtype).per_parameter == total


def test_reading_and_writing():
    t = ledger(fw.Adam, max_grad_norm=1.0, average=fw.EMA(0.9))
    assert (t.read / t.numel, t.written / t.numel) == (4 + 4 + 4 + 8 + 4, 4 + 8 + 4)


def test_looking_changes_nothing():
    params = make_params(torch.float32, SHAPES)
    set_grads(params, 0)
    opt = fw.Adam(params)
    before = [p.detach().clone() for p in params]
    opt.traffic()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert len(opt.telemetry) == 0


def test_the_benchmark_counts_the_same_bytes():
    for clip in (False, True):
        for average in (False, True):
            options = {"max_grad_norm": 1.0 if clip else None, "average": fw.EMA(0.9) if average else None}
            assert (
                bench_cases.bytes_moved(2, clip=clip, average=average)
                == ledger(fw.Adam, **options).per_parameter
            )
