"""The Triton kernels, run in Python by Triton's interpreter, against the reference.

Not collected by itself: ``TRITON_INTERPRET`` must be set before triton is imported, so ``test_triton.py`` runs
this file in processes of its own. The interpreter takes tens of milliseconds for a chunk of any size, so options
are covered and sizes are few.
"""

import functools
import math

import folded
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import vector_cases
from backends.test_backends import EPS, check_pair, check_single_steps, run_pair
from cases import (
    BY_NAME,
    CASES,
    SCHEDULES,
    SHAPES,
    assert_close,
    assert_same_bits,
    make_params,
    set_grads,
    states_of,
)
from graphs import Recorder
from optim import test_layers
from optim.test_averaging import test_averages_of_parameters_that_jump  # noqa: F401
from optim.test_grad_dtypes import check_changing_dtypes
from optim.test_grad_scaler import test_norms_of_scaled_gradients  # noqa: F401
from optim.test_layers import (
    INPUTS,
    LAMBS,
    assert_like_the_reference,
    layouts,
    test_golden_lamb,
    test_golden_projections,
)
from optim.test_moments import CASES as MOMENT_CASES
from optim.test_moments import check_moments
from optim.test_norms import DENORMAL, assert_exact, check_flushed, check_norms, norms_of
from optim.test_outside import joined_late
from optim.test_projections import test_a_gradient_of_zeros_is_at_right_angles_to_everything  # noqa: F401
from optim.test_rounding import (
    check_rounded_bits,
    test_beyond_the_largest_number_the_nearest_one_is_taken,  # noqa: F401
    test_bits_of_an_element_do_not_depend_on_its_neighbours,  # noqa: F401
    test_stochastic_rounding_is_unbiased,
)
from optim.test_rounding import each_pair as each_rounding
from optim.test_second_moment_starts import (
    check_first_look,
    test_a_random_start_of_no_element,  # noqa: F401
    test_a_random_start_of_states_that_stand_already,  # noqa: F401
    test_init_from_gradients_leaves_out_what_has_none,  # noqa: F401
)
from optim.test_sphere import (
    RULES,
    check_directions,
    check_skipped_steps,
    check_steps,
    on_spheres,
    test_a_norm_that_is_none_rescales_nothing,  # noqa: F401
    test_projection_and_radius_may_change,  # noqa: F401
    test_what_has_no_gradient_turns_with_the_rest,  # noqa: F401
    three_groups,
)
from optim.test_sphere_norms import (
    test_a_sphere_that_is_asked_for_before_any_gradient,  # noqa: F401
    test_an_infinite_gradient_on_a_sphere_spoils_its_element_only,  # noqa: F401
)
from pairwise import singly
from plan.test_capture import Training, assert_same_training, capture  # noqa: F401
from plan.test_groups import test_steps_without_any_group  # noqa: F401
from plan.test_growth import check_late_gradients
from torch.nn import Parameter
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from vector_cases import (
    FusedVectors,
    PendingStep,
    check_operations,
    check_preconditioner,
    check_residues,
    close,
    combination,
)

import fused_warmup as fw
from fused_warmup.backends.triton import memory, reduce, rounding, rules, schedules
from fused_warmup.backends.triton.launch import LANES, TritonBackend
from fused_warmup.distributed import spread
from fused_warmup.plan import plan
from fused_warmup.plan.hyper import AverageSettings, Hyper, pack_rows, pack_schedules
from fused_warmup.plan.structs import AVERAGE_KINDS, DTYPES, ROUNDINGS, STRUCTS
from fused_warmup.reference import rounding as reference_rounding
from fused_warmup.reference import rules as truth
from fused_warmup.reference import schedules as truth_schedules

# numpy says so where IEEE arithmetic silently gives infinity or NaN, which is what these tests are about
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"
)
FEW_SHAPES = [(0,), (), (63,)]
rest = pytest.mark.rest
# it takes two minutes, and the bits are those of the reference
test_stochastic_rounding_is_unbiased = rest(test_stochastic_rounding_is_unbiased)
ALL_RULES = {**rules.RULES, **rules.LAYER_RULES}
some = pytest.mark.parametrize("name", ["adamw", "radam-l2", "sgd-nesterov"])


@pytest.fixture(autouse=True)
def promises_hold(monkeypatch):
    """Whole blocks promise alignment to the compiler, and here nobody else would notice a broken promise."""
    real = TensorHandle.set_attr

    def set_attr(self, name, values):
        assert name != "tt.divisibility" or (self.data % values[0] == 0).all()
        real(self, name, values)

    monkeypatch.setattr(TensorHandle, "set_attr", set_attr)


@pytest.fixture(autouse=True)
def products_and_sums_round_once(monkeypatch):
    """Triton's interpreter rounds a fused multiply-add of float32 numbers twice, a device once."""
    real = InterpreterBuilder.create_fma

    def create_fma(self, a, b, c):
        if a.data.dtype != np.float32:
            return real(self, a, b, c)
        # a product of two float32 numbers is exact in float64
        exact = a.data.astype(np.float64) * b.data + c.data
        return TensorHandle(exact.astype(np.float32), a.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)


@pytest.fixture(autouse=True)
def repeated_work_is_left_out(monkeypatch):
    """Triton's interpreter patches its language in each call of a device function, more than half of the time.

    It also makes the table of numpy's types again at each operation.
    """
    patch, find = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)

    def patch_lang(fn):
        return patch(fn) if tl.core.is_builtin(tl.load) else None

    def get_np_dtype(dtype):
        # pointers have no hash
        return np.dtype(np.uint64) if isinstance(dtype.scalar, tl.pointer_type) else find(dtype.scalar)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
    monkeypatch.setattr(interpreter, "_get_np_dtype", get_np_dtype)


@pytest.fixture
def backend():
    return "triton"


# every case and every dtype of each rule; which dtype a case has beside float32 matters to no rule
STEPS = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}", marks=[rest] if is_left_out else [])
    for i, case in enumerate(CASES)
    for k, dtype in enumerate(EPS)
    for is_left_out in [dtype != torch.float32 and (i + k) % 3 != 0]
]


@pytest.mark.parametrize(("case", "dtype"), STEPS)
def test_one_step_from_the_same_state(case, dtype):
    check_single_steps(case, "triton", make_params(dtype, FEW_SHAPES), 2, average=fw.EMA(0.9))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trajectory(case):
    """With clipping, so that a measure pass runs, across the step where RAdam begins to rectify."""
    options = {"max_grad_norm": 5.0, "average": fw.EMA(0.9, every=2), "schedule": SCHEDULES["warmup_linear"]}
    checked = (1, 5, 6, 7) if case.cls is fw.RAdam else (1, 2, 3)
    for state in run_pair(case, "triton", torch.float32, FEW_SHAPES, checked, **options):
        check_pair(*state, torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("adam", torch.float32),
        ("adam", torch.float64),
        ("radam", torch.float32),
        pytest.param("lamb-sums", torch.float32, marks=rest),
        pytest.param("adamp-nesterov", torch.float64, marks=rest),
    ],
    ids=str,
)
def test_moments(name, dtype):
    """Every statement that moves a moment."""
    check_moments(next(case for case in MOMENT_CASES if case.name == name), "triton", dtype)


@pytest.mark.parametrize(
    ("dtype", "clip"), [*((dtype, None) for dtype in EPS), (torch.bfloat16, 5.0)], ids=str
)
def test_sizes(dtype, clip):
    """Empty and 0-dim tensors, sizes around blocks and chunks; the second half not aligned."""
    params = make_params(dtype, SHAPES)
    for p in make_params(dtype, [(2049,), (5, 7)]):
        room = torch.zeros(p.numel() + 1, dtype=dtype)
        params.append(Parameter(room[1:].view(p.shape).copy_(p.detach())))
    assert params[-1].data_ptr() % 16
    check_single_steps(BY_NAME["adamw"], "triton", params, 2, max_grad_norm=clip, average=fw.EMA(0.9))


def test_strided_views_and_rows_without_gradients():
    """A strided parameter is worked on as a copy; a parameter that has no gradient moves its average only."""
    base = make_params(torch.float32, [(12, 10)])[0].detach()
    ours = [Parameter(base.clone()[::2, 1::3]), *make_params(torch.float32, [(9,), (4,)])]
    for options in ({}, {"max_grad_norm": 1.0, "average": fw.SWA(1, every=1)}):
        pairs = {}
        for backend in ("triton", "reference"):
            params = [Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in ours]
            opt = fw.RAdam(params, lr=1e-2, backend=backend, **options)
            for step in range(3):
                set_grads(params, step)
                if step != 1:
                    params[1].grad = None
                opt.step()
            pairs[backend] = params, opt
        for i, (a, b) in enumerate(zip(pairs["triton"][0], pairs["reference"][0], strict=True)):
            assert_close(f"param {i}", a, b, 4e-7)
            for name, value in states_of(pairs["reference"][1], b).items():
                assert_close(f"{name} {i}", states_of(pairs["triton"][1], a)[name], value, 4e-7, 4e-7)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_gradients_of_another_dtype(dtype, grad_dtype):
    param = make_params(dtype, [(70,)])[0]
    other = Parameter(param.detach().clone())
    for backend, p in (("triton", param), ("reference", other)):
        p.grad_dtype = None
        opt = fw.AdamW([p], lr=1e-2, backend=backend, max_grad_norm=1.0)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(70, generator=generator).to(grad_dtype)
            opt.step()
    unit = EPS[dtype]
    assert_close("param", param, other, 2 * unit, 2 * unit)


@pytest.mark.parametrize(
    ("name", "dtype", "other", "clip"),
    [
        ("sgd-momentum", torch.float32, torch.bfloat16, None),
        ("adamw", torch.bfloat16, torch.float32, 1.0),
        ("adamp", torch.float32, torch.float16, None),
    ],
)
def test_gradients_that_change_dtype_and_back(name, dtype, other, clip):
    check_changing_dtypes(name, dtype, clip, "triton", (dtype, other, dtype))


@some
def test_all_dtypes_and_groups_in_one_table(name):
    """One launch serves rows of every kind; more groups than are taken at a time, most of them empty."""
    kinds = [p for dtype in EPS for p in make_params(dtype, [(33,)])]
    empty = [Parameter(torch.zeros(0)) for _ in range(LANES + 5)]
    ours, theirs = ([Parameter(p.detach().clone()) for p in (*empty, *kinds)] for _ in range(2))
    opts = []
    for backend, params in (("triton", ours), ("reference", theirs)):
        groups = [{"params": [p], "lr": 1e-3 * (1 + i % 7)} for i, p in enumerate(params)]
        opts.append(BY_NAME[name].make(groups, backend=backend, schedule=SCHEDULES["cosine"]))
    for step in range(2):
        for params, opt in zip((ours, theirs), opts, strict=True):
            set_grads(params, step)
            opt.step()
    assert opts[0].get_last_lr() == pytest.approx(opts[1].get_last_lr(), rel=1e-14)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(f"param {i}", a, b, 2 * EPS[a.dtype], 2 * EPS[a.dtype])
        assert int(opts[0].state[a]["step"]) == 2


@pytest.mark.parametrize("clip", [None, 5.0])
def test_grids_give_the_same_bits(clip):
    """However many programs share the chunks, and whichever finishes last."""
    results = []
    for programs in (1, 2, 5):
        params = make_params(torch.float32, [(70_000,), (5,), (2049,)])
        opt = fw.AdamW(params, lr=1e-2, backend="triton", max_grad_norm=clip, average=fw.EMA(0.5))
        opt.session.backend = TritonBackend(programs)
        for step in range(2):
            set_grads(params, step)
            opt.step()
        states = [value for p in params for value in states_of(opt, p).values()]
        results.append([*params, *states, *opt.telemetry.history().values()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits("result", a.detach(), b.detach())


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(rule, torch.float32) for rule in RULES]
    + [(rule, dtype) for dtype in EPS for rule in ("adam", "adamp") if dtype != torch.float32],
)
def test_one_step_on_a_sphere(rule, dtype):
    check_steps(rule, dtype, "triton", [(7, 9), (), (63,)], 2)


# sums over a layer take the interpreter four seconds for a vector longer than a block
@pytest.mark.parametrize(("rule", "length"), [("adam", 2049), ("lamb", 63)])
@pytest.mark.parametrize("how", ["nonfinite", "found_inf"])
def test_a_skipped_step_changes_nothing(rule, length, how):
    check_skipped_steps(rule, how, "triton", [(17, 3), (), (length,)])


def test_spheres_of_every_size():
    check_steps("adam", torch.float32, "triton", [(5, 7), (2049,), (32769,)], 1)
    check_steps("adamp", torch.bfloat16, "triton", [(3, 4104), (40, 9), (33_000,)], 1)


@pytest.mark.parametrize("rule", ["sgd", "radam", pytest.param("lamb-adapts", marks=rest)])
def test_directions_do_not_depend_on_the_radius(rule):
    check_directions(rule, "triton", 7)


@pytest.mark.parametrize("rule", ["adam", "adamp"])
def test_grids_share_spheres_without_a_trace(rule):
    """However many programs share the squares, and whichever finds the factors."""
    results = []
    for programs in (1, 5):
        groups = three_groups(torch.float32, [(70_000,), (5,)])
        opt = on_spheres(rule, "triton", groups, average=fw.EMA(0.5))
        opt.session.backend = TritonBackend(programs)
        params = [p for group in groups for p in group]
        set_grads(params, 0)
        opt.step()
        states = [value for p in params for value in states_of(opt, p).values()]
        results.append([*params, *states, opt.telemetry.rows()])
    for a, b in zip(*results, strict=True):
        assert_same_bits("result", a.detach(), b.detach())


def test_grids_share_layers_without_a_trace():
    """Rows that several chunks share, and chunks of several rows."""
    results = []
    for programs in (1, 5):
        params = make_params(torch.float32, [(2, 33_000), (3,), (50, 9)])
        opt = fw.AdamP(params, lr=1e-2, weight_decay=0.1, backend="triton")
        opt.session.backend = TritonBackend(programs)
        set_grads(params, 0)
        opt.step()
        states = [value for p in params for value in states_of(opt, p).values()]
        results.append([*params, *states, opt.telemetry.rows()])
    for a, b in zip(*results, strict=True):
        assert_same_bits("result", a.detach(), b.detach())


@pytest.mark.parametrize("pattern", INPUTS["grad"])
def test_layers_make_the_golden_steps_of_projections(pattern):
    test_golden_projections(pattern, "triton", torch.float64)


@pytest.mark.parametrize("name", LAMBS)
def test_layers_make_the_golden_steps_of_lamb(name):
    test_golden_lamb(name, "triton", torch.float64)


def test_layers_without_a_ratio():
    test_layers.test_layers_without_a_ratio("triton")


@pytest.mark.parametrize("shape", [(40, 9), (3, 20_000), (2, 33_000)], ids=str)
def test_layers_with_one_row_along_its_gradient(shape):
    test_layers.test_one_row_along_its_gradient_stops_the_others(shape, "triton")


# rows around vectors, tiles, pieces and chunks
ROWS = [(7, 1), (40, 9), (3, 136), (18, 64), (2, 2049), (3, 4104), (1, 33_000), (1, 5), (4, 0)]
# and single ones of odd lengths, whose last elements are not read as vectors
ROWS += [(13,), (2051,), (4109,), (33_001,)]


@pytest.mark.parametrize(
    ("cls", "dtype", "options"),
    [
        (fw.AdamP, torch.float32, {"delta": 1e9, "average": fw.SWA(1)}),
        (fw.AdamP, torch.bfloat16, {"delta": 1.0}),
        (fw.LAMB, torch.float32, {}),
    ],
    ids=["channels", "bfloat16", "lamb"],
)
def test_layers_of_rows_of_every_length(cls, dtype, options):
    params = make_params(dtype, ROWS)
    options = {"lr": 0.01, "weight_decay": 0.1, **options}
    assert_like_the_reference(cls, dtype, params, "triton", steps=1, **options)


def test_layers_of_odd_channels_longer_than_a_chunk():
    """The second channel begins at an odd place with a chunk of a round length, which is not aligned for that."""
    options = {"lr": 0.01, "weight_decay": 0.1, "delta": 1e9}
    params = make_params(torch.float32, [(2, 33_001)])
    assert_like_the_reference(fw.AdamP, torch.float32, params, "triton", steps=1, **options)


@triton.jit
def vector_part_kernel(address, offset, count, part, out):
    chunk = memory.Chunk(offset=offset, count=count)
    tl.store(out, reduce.vector_part(address, chunk, part))


@pytest.mark.parametrize(
    ("address", "offset", "count", "part", "expected"),
    [
        (4096, 0, 6667, 6667, 6664),
        (4096, 32_768, 5, 5, 0),
        (4096, 0, 6664, 3332, 0),
        (4096, 0, 6672, 3336, 3336),
        (4100, 0, 6664, 6664, 0),
        (4096, 33_001, 32_768, 32_768, 0),
    ],
)
def test_vectors_of_a_channel_part(address, offset, count, part, expected):
    """Whole parts of round lengths, and all but the last elements of one that nothing follows."""
    out = torch.zeros(1, dtype=torch.int32)
    vector_part_kernel[(1,)](address, offset, count, part, out)
    assert out.item() == expected


def test_layers_in_any_layout():
    params = layouts(torch.float32)
    options = {"lr": 0.01, "delta": 1e9, "momentum": 0.9, "nesterov": True, "max_grad_norm": 1.0}
    assert_like_the_reference(fw.SGDP, torch.float32, params, "triton", steps=1, **options)


def test_skip_leaves_everything_as_it_was():
    for bad in (math.nan, math.inf, -math.inf):
        params = make_params(torch.float32, FEW_SHAPES)
        opt = fw.AdamW(params, backend="triton", nonfinite="skip", average=fw.EMA(0.9))
        set_grads(params, 0)
        opt.step()
        before = [t.clone() for p in params for t in (p.detach(), *states_of(opt, p).values())]
        set_grads(params, 1)
        params[2].grad[5] = bad
        opt.step()
        after = [t for p in params for t in (p.detach(), *states_of(opt, p).values())]
        for a, b in zip(before, after, strict=True):
            assert_same_bits("kept", a, b)
        line = opt.telemetry.latest()
        assert (line["step"], line["skipped"]) == (1.0, 1.0)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_nonfinite_gradients_propagate(clip):
    pairs = []
    for backend in ("triton", "reference"):
        params = make_params(torch.float32, FEW_SHAPES)
        opt = fw.Adam(params, backend=backend, max_grad_norm=clip, amsgrad=True)
        for step in range(2):
            set_grads(params, step)
            params[2].grad[3:5] = torch.tensor([math.nan, math.inf])
            opt.step()
        pairs.append((params, opt))
    for a, b in zip(pairs[0][0], pairs[1][0], strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        for name, value in states_of(pairs[1][1], b).items():
            assert torch.equal(states_of(pairs[0][1], a)[name].isnan(), value.isnan()), name
    lines = [opt.telemetry.latest() for _, opt in pairs]
    assert lines[0] == pytest.approx(lines[1], nan_ok=True)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_grad_scaler(clip):
    """Gradients that came scaled, and a step that the scaler found not finite, on the first step too."""
    pairs = []
    for backend in ("triton", "reference"):
        params = make_params(torch.float32, FEW_SHAPES)
        opt = fw.AdamW(params, lr=1e-2, backend=backend, max_grad_norm=clip)
        for step, found in enumerate((1.0, 0.0, 1.0, 0.0)):
            set_grads(params, step, scale=1024.0)
            opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(found)
            opt.step()
            del opt.grad_scale, opt.found_inf
        pairs.append((params, opt))
    for a, b in zip(pairs[0][0], pairs[1][0], strict=True):
        assert_close("param", a, b, 4e-7)
        assert int(pairs[0][1].state[a]["step"]) == 2
    histories = [opt.telemetry.history() for _, opt in pairs]
    for name in histories[0]:
        assert_close(name, histories[0][name], histories[1][name], 0.0, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_average_is_of_the_parameter_as_it_is_stored(dtype):
    params = make_params(dtype, [(63,), (2100,)])
    opt = fw.SGD(params, lr=0.1, backend="triton", average=fw.SWA(1, every=1))
    set_grads(params, 0)
    opt.step()
    for p in params:
        assert_same_bits("average", opt.state[p]["average"], p.detach().float())


@pytest.mark.parametrize(("init", "clip"), [("grad", None), ("random", None), ("random", 1.0)])
def test_second_moments_that_do_not_start_at_zero(init, clip):
    options = {"exp_avg_sq_init": init, "exp_avg_sq_init_scale": 0.5, "max_grad_norm": clip}
    pairs = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        params = make_params(torch.float32, FEW_SHAPES)
        opt = fw.Adam(params, lr=1e-2, backend=backend, **options)
        for step in range(2):
            set_grads(params, step)
            opt.step()
        pairs.append((params, opt))
    for a, b in zip(pairs[0][0], pairs[1][0], strict=True):
        assert_close("param", a, b, 4e-7)
        assert_close("v", pairs[0][1].state[a]["exp_avg_sq"], pairs[1][1].state[b]["exp_avg_sq"], 0.0, 4e-6)


MAGNITUDES = (
    "normal",
    "below the range",
    "above the range",
    "around the lower limit of a pack",
    "everything",
    "bfloat16",
)
SLOW_MAGNITUDES = ("around the lower limit of a chunk", "around the upper limit", "float64")


@pytest.mark.parametrize("name", [*MAGNITUDES, *(pytest.param(name, marks=rest) for name in SLOW_MAGNITUDES)])
def test_norms_of_every_magnitude(name):
    check_norms(name, "triton")


def test_norms_of_denormal_numbers():
    for make in (fw.SGD, fw.LAMB):
        assert_exact(norms_of(make, DENORMAL, "triton"), DENORMAL)


def test_norms_where_denormal_numbers_are_flushed_to_zero():
    check_flushed("triton")


# the real PTX runs all of them
@rest
@pytest.mark.parametrize("name", ["Adam-clip", "AdamP-all"])
def test_folded_sums(name, monkeypatch):
    folded.check_folded(name, "triton", monkeypatch)


def test_without_telemetry():
    ours, theirs = make_params(torch.float32, FEW_SHAPES), make_params(torch.float32, FEW_SHAPES)
    for params, backend in ((ours, "triton"), (theirs, "reference")):
        opt = fw.SGD(params, lr=0.1, momentum=0.9, backend=backend, telemetry=False)
        set_grads(params, 0)
        opt.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_close("param", a, b, 1e-7)


@rest
def test_experts_that_come_one_by_one(backend):
    """On backends that have no memory of their own for a row without states."""
    check_late_gradients(BY_NAME["lamb"], backend, max_grad_norm=0.5)


def test_a_step_without_any_gradient():
    params = make_params(torch.float32, FEW_SHAPES)
    opt = fw.SGD(params, lr=0.1, backend="triton")
    opt.step()
    set_grads(params, 0)
    opt.step()
    assert opt.telemetry.latest()["step"] == 2.0


def test_auto_never_takes_the_interpreter():
    assert "triton" in fw.available_backends()
    assert fw.SGD(make_params(torch.float32, FEW_SHAPES), lr=0.1).session.backend.name in (
        "cpu",
        "reference",
    )


# parts: the same functions, called by small kernels of the test


@triton.jit
def multiplier_kernel(segments, count, t, out, N: tl.constexpr):
    i = tl.arange(0, N)
    value = schedules.multiplier(tl.load(segments + i), tl.load(count + i), tl.load(t + i))
    tl.store(out + i, value)


def test_schedules():
    """Every chain at every step of a hundred, and long after, in one block."""
    # a table that nothing follows must not read on when it is over
    chains = [*(s for s in SCHEDULES.values() if s is not None), fw.schedules.table([0.3, 0.7])]
    groups = [Hyper(1.0, schedule=s) for s in (None, *chains)]
    places, segments, values = pack_schedules(groups)
    segments["table"] += np.uint64(values.ctypes.data)
    hypers = pack_rows(groups, places, segments.ctypes.data)
    steps = [*range(100), 10**6, 2**40]
    table = [(h["lr_segments"], h["n_lr_segments"], t) for h in hypers for t in steps]
    n = 1 << (len(table) - 1).bit_length()
    table += [(0, 0, 0)] * (n - len(table))
    first, count, t = (
        torch.tensor([int(row[k]) for row in table], dtype=d)
        for k, d in enumerate((torch.int64, torch.int32, torch.int64))
    )
    out = torch.zeros(n, dtype=torch.float64)
    multiplier_kernel[(1,)](first, count, t, out, N=n)
    expected = [1.0 if s is None else float(s(step)) for s in (None, *chains) for step in steps]
    assert_close("multiplier", out[: len(expected)], torch.tensor(expected, dtype=torch.float64), 0.0, 1e-13)


def test_averages_count_the_values_of_each_row():
    assert joined_late("triton", fw.SWA(4, every=2), 4) == [-6.0, -2.0]
    assert joined_late("triton", fw.EMA(0.5, every=2), 4) == [-6.25, -2.0]


def test_counts_are_those_of_the_state_dict():
    params = make_params(torch.float32, [(3,), (2, 2)])
    opt = fw.Adam(params, backend="triton")
    saved = None
    for step in range(3):
        set_grads(params, step)
        params[1].grad = params[1].grad if step == 1 else None
        opt.step()
        saved = saved or opt.state_dict()
    assert [float(opt.state_dict()["state"][i]["step"]) for i in (0, 1)] == [3.0, 1.0]
    assert float(saved["state"][0]["step"]) == 3.0
    opt.state[params[0]]["step"] = torch.tensor(6.0)
    opt.step()
    assert int(opt.state[params[0]]["step"]) == 7


@triton.jit
def bias_correction_kernel(beta, step, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, rules.bias_correction(tl.load(beta + i), tl.load(step + i)))


def test_bias_corrections_at_the_ends():
    """Of betas that are 0 or next to 1, where one step changes less than an ulp of 1."""
    betas = [0.0, 1e-300, 0.5, 0.9, 1.0 - 2.0**-40, 1.0 - 2.0**-53]
    table = [(beta, step) for beta in betas for step in (1, 2, 3, 1000, 10**7, 2**40)]
    expected = [truth.bias_correction(*row) for row in table]
    n = 1 << (len(table) - 1).bit_length()
    table += table[:1] * (n - len(table))
    beta, step = (
        torch.tensor(x, dtype=d)
        for x, d in zip(zip(*table, strict=True), (torch.float64, torch.int64), strict=True)
    )
    out = torch.zeros(n, dtype=torch.float64)
    bias_correction_kernel[(1,)](beta, step, out, N=n)
    assert out[: len(expected)].tolist() == pytest.approx(expected, rel=1e-13)


@triton.jit
def average_weight_kernel(kind, decay, start, every, step, out, N: tl.constexpr):
    """Weights as value number ``step`` where that step is averaged, 0 elsewhere."""
    i = tl.arange(0, N)
    n = tl.load(step + i)
    due = schedules.is_averaged(tl.load(kind + i), tl.load(start + i), tl.load(every + i), n)
    weight = schedules.average_weight(tl.load(kind + i), tl.load(decay + i), n)
    tl.store(out + i, tl.where(due, weight, 0.0))


def test_weights_of_averages():
    """None, and both kinds with starts and periods that do not divide each other, before and after the start."""
    kinds = [None, fw.EMA(0.9), fw.EMA(0.3, every=3), fw.SWA(1), fw.SWA(4, every=3), fw.SWA(7, every=2)]
    table = [
        (*(average.settings if average else AverageSettings()), step)
        for average in kinds
        for step in range(1, 31)
    ]
    expected = [
        truth_schedules.average_weight(kind, decay, step)
        if truth_schedules.is_averaged(kind, start, every, step)
        else 0.0
        for kind, decay, start, every, step in table
    ]
    n = 1 << (len(table) - 1).bit_length()
    table += table[:1] * (n - len(table))
    kind, *numbers = zip(*table, strict=True)
    kinds_of = torch.tensor([AVERAGE_KINDS[k] for k in kind], dtype=torch.int32)
    dtypes = (torch.float64, torch.int64, torch.int64, torch.int64)
    columns = [torch.tensor(column, dtype=d) for column, d in zip(numbers, dtypes, strict=True)]
    out = torch.zeros(n, dtype=torch.float64)
    average_weight_kernel[(1,)](kinds_of, *columns, out, N=n)
    assert out[: len(expected)].tolist() == expected


@triton.jit
def scalars_kernel(hypers, step, out, SCALARS: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    h = memory.load_struct(hypers.to(tl.int64), i, "Hyper", i < N)
    rates = memory.Rates(lr=h.lr, weight_decay=h.weight_decay)
    s = SCALARS(h, rates.lr, tl.load(step + i), rules.common_scalars(h, rates, 0.5))
    memory.store_struct(out.to(tl.int64), i, s, "Scalars", i < N)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_scalars(rule):
    """Bias corrections and rectification to thirteen digits, at the first steps and after millions."""
    steps = [*range(1, 40), 100, 1000, 10**5, 10**7]
    flags = [{}, {"decoupled": True, "maximize": True, "nesterov": True, "skip_unrectified": True}]
    flags += [{"bias_correction": False, "grad_averaging": False}, {"decays_update": True}]
    cases = [
        (Hyper(0.1, 0.01, b1, b2, 1e-8, 0.9, 0.5, rho, **kinds), step)
        for b1, b2 in ((0.9, 0.999), (0.0, 0.6), (0.5, 0.0), (0.99, 0.9999999))
        for rho in (4.0, 5.0)
        for kinds in flags
        for step in steps
    ]
    n = 1 << (len(cases) - 1).bit_length()
    cases += cases[:1] * (n - len(cases))
    groups = [h for h, _ in cases]
    hypers = pack_rows(groups, pack_schedules(groups)[0], 0)
    out = np.zeros(n, STRUCTS["Scalars"])
    columns = [torch.from_numpy(c.view(np.uint8).reshape(-1)) for c in (hypers, out)]
    step = torch.tensor([step for _, step in cases])
    scalars_kernel[(1,)](columns[0], step, columns[1], SCALARS=ALL_RULES[rule].scalars, N=n)
    for (h, step), ours in zip(cases, out, strict=True):
        expected = truth.common_scalars(h, h.lr, h.weight_decay, 0.5)
        (truth.RULES.get(rule) or truth.LAYER_RULES[rule]).scalars(h, h.lr, step, expected)
        for name in out.dtype.names:
            assert ours[name] == pytest.approx(getattr(expected, name), rel=1e-13), (name, step, h)


@triton.jit
def round_kernel(x, out, back, DTYPE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    stored = memory.narrow(tl.load(x + i), DTYPE)
    memory.store_block(out.to(tl.int64), i, i < N, stored, DTYPE, True)
    tl.store(back + i, memory.load_block(out.to(tl.int64), i, i < N, DTYPE, tl.float32, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding(dtype):
    """Every number of the type, those half-way to the next and beside it, overflow and tiny ones."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    half = {torch.bfloat16: 1 << 15, torch.float16: 1 << 12}[dtype]
    between = [(every.view(torch.int32) + half + d).view(torch.float32) for d in (-1, 0, 1)]
    x = torch.cat([every, *between, *(torch.randn(2**16) * s for s in (1e-7, 1e-5, 1e5, 1e38))])
    out, back = torch.zeros(len(x), dtype=dtype), torch.zeros(len(x))
    round_kernel[(1,)](x, out.view(torch.uint8), back, DTYPE=DTYPES[dtype], N=len(x))
    expected = x.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(0.0), expected.nan_to_num(0.0))
    assert torch.equal(back.nan_to_num(0.0), expected.float().nan_to_num(0.0))


@triton.jit
def draw_kernel(out, seed, number, row_number, t, STAGE: tl.constexpr):
    row = memory.Row(seed=tl.load(seed), number=row_number)
    words = rounding.draw(row, tl.load(t), tl.load(number), STAGE)
    for k in tl.static_range(4):
        tl.store(out + k, words[k])


def test_philox_gives_its_known_answer():
    """Seven rounds of a counter and a key of zeros."""
    zero, out = torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    draw_kernel[(1,)](out, zero, zero, 0, zero, STAGE=0)
    assert [hex(x & 0xFFFFFFFF) for x in out.tolist()] == [
        "0x5f6fb709",
        "0xd893f64",
        "0x4f121f81",
        "0x4f730a48",
    ]


@triton.jit
def bits_kernel(rows, t, place, out, STAGE: tl.constexpr, ALIGNED: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    key = (rows.to(tl.int64), 0, tl.load(t))
    bits = rounding.bits_of_block(key, tl.load(place), i, STAGE, ALIGNED)
    tl.store(out + i, bits.to(tl.int32))


# first element, elements of a run and from one run to the next in the whole tensor, of a row of 2100
PLACES = [(0, 2100, 2100), (40, 2100, 2100), (24, 16, 64), (2**40 + 8, 8, 2**33), (3, 2100, 2100), (5, 7, 11)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "stage",
    [reference_rounding.UPDATE_PASS, reference_rounding.SPHERE_PASS, reference_rounding.STATE_PASSES[2]],
)
def test_random_bits(place, stage):
    """Of seeds and counts of more than 32 bits, at a place in the row that is not its first."""
    rows = np.zeros(1, STRUCTS["Row"])
    rows[["numel", "seed", "number"]] = (2100, 2**64 - 12345678901, 3)
    rows[["first_element", "run", "run_stride"]] = place
    first, run, stride = place
    i = torch.arange(1024, 1024 + 64)
    numbers = first + i // run * stride + i % run
    expected = reference_rounding.random_bits(numbers, 2**64 - 12345678901, 3, 2**32 + 5, stage)
    aligned = all(n % 8 == 0 for n in (place if run != 2100 else place[:1]))
    for whole in (False, True) if aligned else (False,):
        out = torch.zeros(64, dtype=torch.int32)
        column, t, begin = torch.from_numpy(rows.view(np.uint8)), torch.tensor(2**32 + 5), torch.tensor(1024)
        bits_kernel[(1,)](column, t, begin, out, STAGE=stage, ALIGNED=whole, N=64)
        assert out.tolist() == expected.tolist()


@triton.jit
def alignment_kernel(rows, out, KINDS: tl.constexpr):
    row = memory.load_struct(rows.to(tl.int64), 0, "Row")
    tl.store(out, rounding.vector_alignment(row, rounding.rounds_anything(KINDS)) % memory.VECTOR)


@pytest.mark.parametrize("place", [*PLACES, (4, 16, 64), (8, 16, 60), (8, 12, 64)])
def test_whole_blocks_begin_where_a_counter_does(place):
    """And where the residue is aligned; whether parameters or states draw bits."""
    rows, out = np.zeros(1, STRUCTS["Row"]), torch.zeros(1, dtype=torch.int64)
    rows[["numel", "residue"]] = (2100, 4096)
    rows[["first_element", "run", "run_stride"]] = place
    column = torch.from_numpy(rows.view(np.uint8))
    aligned = all(n % 8 == 0 for n in (place if place[1] != 2100 else place[:1]))
    for kinds in (((2, 2, 2, 0, 1),), ((0, 0, 2, 2, 0),), ((0, 0, 2, 0, 0), (0, 0, 2, 2, 0))):
        alignment_kernel[(1,)](column, out, KINDS=kinds)
        assert (out.item() == 0) == aligned
    rows["residue"] = 4098
    alignment_kernel[(1,)](column, out, KINDS=((2, 2, 2, 0, 2),))
    assert out.item() != 0


@triton.jit
def modes_kernel(
    x, bits, param, residue, stored, kept, held, loaded,
    DTYPE: tl.constexpr, ROUNDING: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Store values, and load parameters with residues that need not belong to them."""
    i = tl.arange(0, N)
    own, rest, value = rounding.round_value(
        tl.load(x + i), tl.load(bits + i).to(tl.uint32), DTYPE, ROUNDING, tl.float32
    )
    memory.store_block(stored.to(tl.int64), i, None, own, DTYPE, True)
    tl.store(held + i, value)
    plain = memory.load_stored(param.to(tl.int64), i, None, memory.storage(DTYPE), True)
    if rounding.has_residue(ROUNDING):
        TYPE: tl.constexpr = rounding.residue_type(ROUNDING)
        memory.store_stored(kept.to(tl.int64), i, None, rest, TYPE, True)
        residue = memory.load_stored(residue.to(tl.int64), i, None, TYPE, True)
        tl.store(loaded + i, rounding.value_with(plain, residue, DTYPE, ROUNDING))


ROUNDED = [
    (mode, dtype)
    for dtype in reference_rounding.SIXTEEN_BITS
    for mode in reference_rounding.MODES
    if (mode, dtype) != ("split", torch.float16)
]


def float32_numbers(dtype):
    """Return every number of a 16-bit dtype, those beside it and half-way to the next, overflow, tiny numbers."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    half = {torch.bfloat16: 1 << 15, torch.float16: 1 << 12}[dtype]
    between = [(every.view(torch.int32) + d).view(torch.float32) for d in (1, half - 1, half, half + 1)]
    generator = torch.Generator().manual_seed(3)
    scaled = [
        torch.randn(2**14, generator=generator) * s for s in (1e-40, 1e-7, 1e-5, 1e5, 1e38, 1.0, 1.0, 1.0)
    ]
    x = torch.cat([every, *between, *scaled])
    return torch.cat([x, x.new_zeros((1 << (len(x) - 1).bit_length()) - len(x))])


def assert_same_numbers(name, actual, expected):
    """Equal, where NaN is equal to NaN and the sign of zero does not matter."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), (name, int((~same).sum()), actual[~same][:5], expected[~same][:5])


@pytest.mark.parametrize(("mode", "dtype"), ROUNDED, ids=str)
def test_values_are_stored_and_loaded_as_by_the_reference(mode, dtype, monkeypatch):
    x = float32_numbers(dtype)
    n, generator = len(x), torch.Generator().manual_seed(5)
    bits = torch.randint(0, 2**16, (n,), generator=generator, dtype=torch.int32)
    monkeypatch.setattr(reference_rounding.Rounding, "bits", lambda self, like: bits)
    param, residue = reference_rounding.store(x, dtype, reference_rounding.Rounding(mode))
    # Every other parameter was written from outside. Beside a tiny residue a 0 of the other sign is one of those
    # in the kernels, and none in the reference.
    other = torch.roll(param, 77)
    is_own = (torch.arange(n) % 2 == 0) | ((other == 0) & (mode != "split"))
    written = torch.where(is_own, param, other)
    kind = reference_rounding.RESIDUES.get(mode, ("", torch.float32))[1]
    kept = torch.zeros(n, dtype=kind)
    given = kept if residue is None else residue
    stored, held, loaded = torch.zeros(n, dtype=dtype), torch.zeros(n), torch.zeros(n)
    columns = [t.view(torch.uint8) for t in (written, given, stored, kept)]
    modes_kernel[(1,)](
        x, bits, columns[0], columns[1], columns[2], columns[3], held, loaded,
        DTYPE=DTYPES[dtype], ROUNDING=ROUNDINGS[mode], N=n,
    )  # fmt: skip
    assert_same_numbers("param", stored, param)
    assert_same_numbers("held", held, reference_rounding.load(mode, param, residue))
    if residue is not None:
        assert_same_numbers("residue", kept, residue)
        assert_same_numbers("value", loaded, reference_rounding.load(mode, written, residue))


OPTIONS = {
    "plain": {},
    "average": {"average": fw.EMA(0.9)},
    "sphere": {"average": fw.EMA(0.9), "projection": "sphere", "weight_decay": 0.0},
}
ROUNDED_RULES = {
    "adam": (fw.Adam, {}),
    "sgd": (fw.SGD, {"momentum": 0.9}),
    "lamb": (fw.LAMB, {}),
    "adamp": (fw.AdamP, {}),
}


def check_rounded_steps(cls, mode, dtype, shapes, steps, **options):
    """Each step starts from the same state, and values that differ in their last digit may be rounded apart."""
    options = {"lr": 1e-2, "param_rounding": mode, "rounding_seed": 2**63 + 11, **options}
    state_digit = EPS[torch.bfloat16] if "state_dtype" in options else 0.0
    ours, theirs = make_params(dtype, shapes), make_params(dtype, shapes)
    opt, ref = (cls(p, backend=b, **options) for p, b in ((ours, "triton"), (theirs, "reference")))
    unit = EPS[torch.float32]
    residue_name = reference_rounding.RESIDUES.get(mode, (None,))[0]
    # of a value that is rounded: a unit of the parameter, or of the compensation, which is a 256th of that
    digit = {"stochastic": EPS[dtype], "kahan": 2.0**-8 * EPS[dtype]}.get(mode, 4 * unit)
    for step in range(steps):
        for a, b in zip(ours, theirs, strict=True):
            b.data.copy_(a)
            for name, value in states_of(opt, a).items():
                ref.state[b][name].copy_(value)
        for params, own in ((ours, opt), (theirs, ref)):
            set_grads(params, step)
            own.step()
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(f"param {i} at {step}", a, b, 4 * unit, 1.01 * EPS[dtype])
            states, expected = states_of(opt, a), states_of(ref, b)
            assert states.keys() == expected.keys()
            for name in states.keys() - {residue_name, "average"}:
                digits = max(4 * unit, 1.01 * state_digit)
                assert_close(f"{name} {i} at {step}", states[name], expected[name], 4 * unit, digits)
            if "average" in states:
                averages = (own["average"] for own in (states, expected))
                assert_close(f"average {i} at {step}", *averages, 4 * unit, digit)
            if residue_name is not None:
                pairs = ((a, states), (b, expected))
                values = (reference_rounding.load(mode, p.detach(), own[residue_name]) for p, own in pairs)
                assert_close(f"value {i} at {step}", *values, 4 * unit, digit)


@pytest.mark.parametrize(
    ("kind", "rule", "option"),
    singly([row for row in ROUNDED if row[0] != "nearest"], list(ROUNDED_RULES), list(OPTIONS)),
    ids=str,
)
def test_rounded_parameters(kind, rule, option):
    """Whole blocks, odd ends and tensors smaller than a block."""
    (mode, dtype), (cls, own) = kind, ROUNDED_RULES[rule]
    check_rounded_steps(cls, mode, dtype, [(2100,), (3, 24)], 2, **{**own, **OPTIONS[option]})


@each_rounding
def test_rounded_bits_are_those_of_the_reference(mode, dtype):
    check_rounded_bits(mode, dtype, "triton", [(), (7,), (3, 24), (2100,)])


@pytest.mark.parametrize(
    ("kind", "rule", "option"),
    singly([("nearest", torch.float32), *ROUNDED], list(ROUNDED_RULES), list(OPTIONS)),
    ids=str,
)
def test_parameters_beside_rounded_states(kind, rule, option):
    """Of every rounding mode, which draws other bits than the states."""
    (mode, dtype), (cls, own) = kind, ROUNDED_RULES[rule]
    options = {**own, **OPTIONS[option], "state_dtype": torch.bfloat16}
    check_rounded_steps(cls, mode, dtype, [(2100,), (3, 24)], 2, **options)


def test_layers_are_scaled_by_what_the_stored_moments_give():
    """Sums over one element show any other direction."""
    options = {"lr": 0.5, "always_adapt": True, "state_dtype": torch.bfloat16}
    check_rounded_steps(fw.LAMB, "nearest", torch.float32, [(1,)] * 4, 2, **options)


# weights of one half, whose products are exact, so that the moments are those of the reference bit for bit
HALF = {"betas": (0.5, 0.5)}
STATEFUL = {
    "adam": (fw.Adam, HALF),
    "adamw-amsgrad": (fw.AdamW, {**HALF, "amsgrad": True}),
    "giadam": (fw.GIAdam, HALF),
    "radam": (fw.RAdam, HALF),
    "sgd": (fw.SGD, {"momentum": 0.5}),
    "sgd-plain": (fw.SGD, {}),
    "lamb": (fw.LAMB, HALF),
    "adamp": (fw.AdamP, HALF),
    "sgdp": (fw.SGDP, {"momentum": 0.5}),
}


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(rule, torch.float32) for rule in STATEFUL] + [("adam", torch.float16), ("adamp", torch.bfloat16)],
    ids=str,
)
def test_rounded_states_have_the_bits_of_the_reference(rule, dtype):
    """Blocks, odd ends, channels, and states that are not aligned."""
    check_rounded_states(rule, dtype, [(7,), (3, 24), (2100,), (40,)])


@pytest.mark.parametrize("rule", ["adam", "adamp"])
@pytest.mark.parametrize("place", [PLACES[2], PLACES[5]], ids=str)
def test_states_of_parts_draw_the_bits_of_the_whole(place, rule, monkeypatch):
    for module in (plan, spread):
        monkeypatch.setattr(module, "place_of", lambda param: place)
    check_rounded_states(rule, torch.float32, [(2100,), (40,)])


def check_rounded_states(rule, dtype, shapes):
    """No gradient depends on a parameter, so that moments are the same; those of the last one are not aligned."""
    cls, options = STATEFUL[rule]
    options = {
        "lr": 2.0**-7,
        "weight_decay": 0.0,
        "state_dtype": torch.bfloat16,
        "rounding_seed": 5,
        **options,
    }
    sides = []
    for backend in ("triton", "reference"):
        params = make_params(dtype, shapes)
        opt = cls(params, backend=backend, average=fw.EMA(0.5), **options)
        opt.init_state()
        if rule != "sgd-plain":
            name = "exp_avg" if "betas" in options else "momentum_buffer"
            room = torch.zeros(41, dtype=torch.bfloat16)
            opt.state[params[-1]][name] = room[1:]
        for t in range(2):
            set_grads(params, t)
            opt.step()
        sides.append((params, opt))
    for p, q in zip(sides[0][0], sides[1][0], strict=True):
        ours, theirs = (states_of(opt, x) for x, (_, opt) in zip((p, q), sides, strict=True))
        assert ours.keys() == theirs.keys()
        assert ours["average"].dtype == torch.float32
        rounded = {name for name, value in ours.items() if value.dtype == torch.bfloat16}
        assert rounded == ours.keys() - {"step", "average", "n_averaged"}
        for name in rounded:
            assert_same_bits(name, ours[name], theirs[name])


@pytest.mark.parametrize(
    ("place", "rule", "mode"),
    [(place, "adam", "kahan") for place in PLACES[1:]]
    + [(place, "adamp", "stochastic") for place in (PLACES[2], PLACES[5])],
    ids=str,
)
def test_parts_of_tensors_draw_the_bits_of_the_whole(place, rule, mode, monkeypatch):
    """As the rows of a DTensor lie in the whole one."""
    for module in (plan, spread):
        monkeypatch.setattr(module, "place_of", lambda param: place)
    check_rounded_steps(ROUNDED_RULES[rule][0], mode, torch.bfloat16, [(2100,)], 1)


def test_rows_of_every_rounding_mode_in_one_table():
    """And of every dtype, of which only those of 16 bits are rounded in another way."""
    groups = []
    for backend in ("triton", "reference"):
        params = [p for dtype in EPS for p in make_params(dtype, [(33,)] * 4)]
        modes = ("stochastic", "kahan", "master", "nearest")
        own = [{"params": params[k::4], "param_rounding": mode} for k, mode in enumerate(modes)]
        own.append({"params": make_params(torch.bfloat16, [(33,)]), "param_rounding": "split"})
        params += own[-1]["params"]
        for mode in ("nearest", "kahan"):
            few = [p for dtype in EPS if dtype != torch.float64 for p in make_params(dtype, [(33,)])]
            own.append({"params": few, "param_rounding": mode, "state_dtype": torch.bfloat16})
            params += few
        opt = fw.SGD(own, lr=1e-2, momentum=0.5, backend=backend)
        for step in range(2):
            set_grads(params, step)
            opt.step()
        groups.append([(p, states_of(opt, p)) for p in params])
    for (a, ours), (b, theirs) in zip(*groups, strict=True):
        unit = EPS[torch.float32]
        assert_close("param", a, b, unit, unit)
        assert ours.keys() == theirs.keys()
        for name in {"kahan_comp", "remainder", "master_param", "momentum_buffer"} & ours.keys():
            assert_close(name, ours[name], theirs[name], unit, unit)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtypes", [[d] for d in EPS] + [list(EPS)], ids=str)
def test_vector_operations(dtypes, scaled):
    check_operations(dtypes, TritonBackend(), vector_cases.FEW_SHAPES, scaled=scaled, n_basis=(1, 6))


@pytest.mark.parametrize(("mode", "dtypes"), vector_cases.ROUNDED, ids=str)
def test_vectors_begin_at_exact_values(mode, dtypes):
    check_residues(mode, dtypes, TritonBackend(), [*vector_cases.FEW_SHAPES, (3000,)])


def test_vector_sums_do_not_depend_on_the_grid():
    bits = []
    for programs in (1, 2, 3):
        bits.append(combination(TritonBackend(programs), [(40_000,), (300,), (5,)], 2))
    assert torch.equal(bits[0], bits[1])
    assert torch.equal(bits[0], bits[2])


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("adam-amsgrad", torch.bfloat16),
        ("giadam", torch.float32),
        ("radam-l2", torch.float32),
        ("radam-l2", torch.bfloat16),
        ("sgd-momentum", torch.bfloat16),
    ],
    ids=str,
)
def test_preconditioner_is_that_of_the_reference(name, states):
    """Two groups over all dtypes, so that rates and thresholds are scaled in; before the second step and the sixth."""
    params = [p for dtype in EPS for p in make_params(dtype, [(33,), ()])]
    if states == torch.bfloat16:
        params = [p for p in params if p.dtype != torch.float64]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 3e-3, "weight_decay": 0.01}]

    def make(case, _, **options):
        return case.make(groups, backend="triton", **options), TritonBackend()

    check_preconditioner(BY_NAME[name], make, params, schedule=SCHEDULES["warmup_linear"], state_dtype=states)


def test_preconditioner_takes_the_value_with_its_residue():
    """A gradient that the decay of the parameter as it is stored would cancel."""
    param = Parameter(torch.ones(2100, dtype=torch.bfloat16))
    options = {"weight_decay": 1.0, "backend": "triton", "param_rounding": "master"}
    opt = fw.Adam([param], betas=(0.9, 0.5), **options)
    param.grad = torch.full_like(param, -1.0)
    opt.init_state()
    opt.state[param]["master_param"].fill_(1.0 + 2.0**-9)
    pending = PendingStep("test", opt)
    vectors = FusedVectors(pending.params, pending.params, torch.float32, TritonBackend())
    found = pending.preconditioner(vectors)
    close(vectors, found.scale, [torch.full((2100,), (0.1 * (2.0**-9 + 1e-8)) ** -0.5)])


@pytest.mark.parametrize("init", ["grad", "random"])
def test_a_look_at_a_first_step_that_does_not_start_at_zero(init):
    check_first_look(init, "triton", TritonBackend)


@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
def test_graphs_hold_their_gradients_and_settings(capture, monkeypatch, clip):  # noqa: F811
    """Of two graphs each replays its own, whatever eager steps do between; schedules reach both."""
    recorder, real = Recorder(capture), TritonBackend._bound_launches

    def bound(self, plan, measure):
        launches = real(self, plan, measure)
        return [(stage, lambda launch=launch: recorder.launch(launch)) for stage, launch in launches]

    monkeypatch.setattr(TritonBackend, "_bound_launches", bound)
    options = {"schedule": fw.schedules.constant(0.5), "max_grad_norm": clip, "backend": "triton"}
    eager, training = Training(**options), Training(**options)
    eager.step(0)
    training.step(0)
    graphs = [training.captured(recorder) for _ in range(2)]
    for step in range(1, 6):
        later = (
            fw.schedules.warmup(4).then(fw.schedules.table([1.0, 0.5])) if step > 3 else options["schedule"]
        )
        for one in (eager, training):
            one.opt.param_groups[0]["schedule"] = later
        training.opt.update_captured()
        if step == 2:
            training.opt.max_grad_norm = eager.opt.max_grad_norm = 0.1
            training.step(step)
            training.opt.max_grad_norm = clip
        else:
            training.replay(graphs[step % 2], step)
        eager.step(step)
        eager.opt.max_grad_norm = clip
    assert_same_training(training, eager)
