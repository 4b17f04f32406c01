"""The CUDA kernels as they are, run on the host: against the reference, the CPU kernels and themselves.

The tests of the other backends are collected here once more, with every step made by the CUDA backend over a
table that is mirrored as on a GPU.
"""

import ctypes
import math
from types import SimpleNamespace

import cuda_on_host
import numpy as np
import pytest
import torch
import vector_cases
from backends.test_backends import (  # noqa: F401
    EPS,
    test_one_step_from_the_same_state,
    test_schedules,
    test_trajectory,
)
from backends.test_bitwise import (  # noqa: F401
    OPTIMIZERS,
    OPTIONS,
    bits,
    make_optimizer,
    test_a_group_added_later_leaves_the_others_alone,
    test_a_rebuilt_table_does_not_change_a_bit,
    test_norms_are_the_same_bits_from_either_pass,
    test_runs_do_not_differ,
    test_telemetry_does_not_change_a_bit,
    test_the_update_of_a_tensor_does_not_depend_on_its_neighbours,
    train,
)
from cases import CASES, SCHEDULES, assert_close, assert_same_bits, make_params, set_grads, states_of
from optim.test_averaging import test_averages_of_parameters_that_jump  # noqa: F401
from optim.test_grad_dtypes import test_gradients_that_change_dtype_and_back  # noqa: F401
from optim.test_grad_scaler import (  # noqa: F401
    test_a_scale_and_a_decision_are_read_anew_one_by_one,
    test_norms_of_scaled_gradients,
)
from optim.test_layers import (  # noqa: F401
    test_channels_are_made_orthogonal,
    test_every_row_must_be_orthogonal_to_be_projected_by_row,
    test_golden_lamb,
    test_golden_projections,
    test_lamb_moves_every_layer_by_its_rate,
    test_layers_without_a_ratio,
    test_one_row_along_its_gradient_stops_the_others,
    test_rows_are_those_of_the_shape_whatever_the_layout,
    test_rows_of_every_length,
    test_the_authors_package,
)
from optim.test_moments import (  # noqa: F401
    test_a_gradient_that_collapses_makes_no_leap,
    test_a_moment_that_has_arrived_stays,
    test_moments_are_those_of_the_recurrence,
    test_no_drift_near_one,
    test_same_as_torch_in_double,
)
from optim.test_norms import (  # noqa: F401
    GRADIENTS,
    each_gradient,
    norms_of,
    test_norms_of_denormal_numbers,
    test_norms_of_every_magnitude,
    test_norms_where_denormal_numbers_are_flushed_to_zero,
)
from optim.test_outside import (  # noqa: F401
    test_a_late_parameter_has_an_average_of_its_own_values,
    test_a_norm_of_any_form,
    test_an_average_of_what_has_no_gradient,
    test_an_average_that_begins_after_a_load,
    test_counters_follow_states_that_a_wrapper_restores,
    test_gradients_after_a_scaled_step,
)
from optim.test_properties import (  # noqa: F401
    Layout,
    guarded,
    test_dense_tensors_train_as_the_reference_does,
    test_kernels_stay_inside_states_and_averages,
    test_strided_views_train_as_the_reference_does,
    test_the_layout_of_memory_does_not_change_a_bit,
)
from optim.test_second_moment_starts import (  # noqa: F401
    test_a_random_start_of_no_element,
    test_a_random_start_of_states_that_stand_already,
    test_init_from_gradients_leaves_out_what_has_none,
)
from optim.test_sphere import (  # noqa: F401
    test_a_given_radius_changes_no_direction,
    test_a_group_that_other_parameters_join,
    test_a_norm_that_is_none_rescales_nothing,
    test_a_skipped_step_changes_nothing,
    test_a_state_dict_goes_on_bit_for_bit,
    test_directions_do_not_depend_on_the_radius,
    test_norms_grow_without_a_sphere_only,
    test_one_step_from_the_same_state_on_a_sphere,
    test_other_groups_do_not_notice,
    test_projection_and_radius_may_change,
    test_scaled_gradients_are_unscaled_first,
    test_telemetry_has_the_effective_rate,
    test_the_angle_of_a_step_is_that_of_the_effective_rate,
    test_what_has_no_gradient_turns_with_the_rest,
)
from optim.test_sphere_norms import (  # noqa: F401
    test_a_sphere_that_is_asked_for_before_any_gradient,
    test_an_infinite_gradient_on_a_sphere_spoils_its_element_only,
)
from plan.test_groups import test_steps_without_any_group  # noqa: F401
from plan.test_growth import test_experts_that_come_one_by_one  # noqa: F401
from vector_cases import check_operations, check_preconditioner, check_residues, combination, draw, make_pair

import fused_warmup as fw
from fused_warmup import _cpu
from fused_warmup.backends.native import CpuBackend, CudaBackend
from fused_warmup.optim import session
from fused_warmup.plan import device_buffers
from fused_warmup.plan.structs import STRUCTS
from fused_warmup.reference.rounding import MODE_OF_RESIDUE, MODES, RESIDUES
from fused_warmup.reference.rounding import load as load_value
from fused_warmup.reference.rules import LAYER_RULES
from fused_warmup.sharpness.pending_step import PendingStep
from fused_warmup.sharpness.vectors import FusedVectors


@pytest.fixture(scope="session")
def module():
    return cuda_on_host.cached()


@pytest.fixture(autouse=True)
def every_step_is_by_cuda(module, monkeypatch):
    """Whatever backend but the reference a test asks for."""
    real = session.resolve
    monkeypatch.setattr(
        session,
        "resolve",
        lambda name, device: real(name, device) if name == "reference" else CudaBackend(module),
    )
    monkeypatch.setattr(device_buffers, "is_mirrored", lambda device: True)


@pytest.fixture
def backend():
    return "cpu"


def counter(module, name):
    return ctypes.c_int.in_dll(ctypes.CDLL(module.__file__), f"cuda_on_host_{name}")


def spied(module):
    """The module, and the numbers of addresses that went along with its launches."""
    carried = []

    def step(rule, address, grads, n_grads, *rest):
        carried.append(n_grads)
        module.step(rule, address, grads, n_grads, *rest)

    most = {name: getattr(module, name) for name in ("MAX_INLINE_POINTERS", "MAX_CAPTURED_POINTERS")}
    return SimpleNamespace(step=step, rules=module.rules, prepare=module.prepare, **most), carried


def pair(case, dtype, backends, shapes=None, **options):
    """The same parameters under two backends."""
    runs = []
    for backend in backends:
        params = make_params(dtype, *([shapes] if shapes else []))
        opt = case.make(params, **options)
        opt.session.backend = backend
        runs.append((params, opt))
    return runs


def assert_close_state(runs, unit):
    """Sums over layers are added up in another order, which changes a last bit of them at most."""
    (params, opt), (others, other) = runs
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_close(f"param {i}", p, q, 2 * unit, 2 * unit)
        expected = states_of(other, q)
        for name, value in states_of(opt, p).items():
            if name == "average" or opt.param_groups[0].get("decay_mode") == "gradient":
                assert_close(f"{name} {i}", value, expected[name], 2 * unit, 2 * unit)
            else:
                assert_same_bits(f"{name} {i}", value, expected[name])


def assert_same_state(runs):
    (params, opt), (others, other) = runs
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(f"param {i}", p, q)
        expected = states_of(other, q)
        for name, value in states_of(opt, p).items():
            assert_same_bits(f"{name} {i}", value, expected[name])


@pytest.mark.skipif(len(_cpu.instruction_sets()) == 1, reason="this processor rounds products and sums twice")
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits_as_the_cpu_kernels(module, case, dtype):
    """One text of the mathematics, one rounding: every bit but those of the norms, which are summed otherwise."""
    runs = pair(case, dtype, (CudaBackend(module), CpuBackend()), average=fw.EMA(0.9), nonfinite="skip")
    assert [opt.session.backend.name for _, opt in runs] == ["cuda", "cpu"]
    for step in range(7):
        for params, opt in runs:
            set_grads(params, step)
            if step == 2:
                params[4].grad = None
            if step == 3:
                params[6].grad[1000] = math.nan
            opt.step()
    if case.cls.spec.name in LAYER_RULES:
        assert_close_state(runs, EPS[dtype])
    else:
        assert_same_state(runs)
    ours, theirs = (opt.telemetry.history() for _, opt in runs)
    for name, values in ours.items():
        rtol = 16 * 2.0**-24 if name == "grad_norm_l1" else 1e-12
        torch.testing.assert_close(values, theirs[name], rtol=rtol, atol=0, equal_nan=True)
    assert ours["skipped"].tolist() == [0, 0, 0, 1, 0, 0, 0]


@pytest.mark.pairwise
@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize("case", list(OPTIMIZERS))
def test_grids_and_orders_do_not_change_a_bit(module, monkeypatch, case, option):
    """Parameters, states and norms; whoever forgot a barrier sees threads in another order."""
    results = []
    for blocks, order in [(0, ""), (1, ""), (3, "backwards"), (10**6, "backwards"), (10**6, "")]:
        monkeypatch.setenv("CUDA_ON_HOST_ORDER", order)
        opt = make_optimizer(case, **OPTIONS[option])
        opt.session.backend = CudaBackend(module, max_blocks=blocks)
        results.append(bits(train(opt)))
    assert "telemetry: grad_norm_l1" in results[0]
    for result in results[1:]:
        assert [key for key in results[0] if result[key] != results[0][key]] == []


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("options", "launches"),
    [
        ({}, (3, 4)),
        ({"telemetry": False}, (2, 4)),
        ({"max_grad_norm": 1.0}, (3, 5)),
        ({"nonfinite": "skip"}, (3, 5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [fw.Adam, fw.LAMB, fw.AdamP])
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_launches_do_not_depend_on_the_table(module, dtype, cls, options, launches):
    """One for the norm of an element-wise rule where telemetry or clipping needs it; layers sum it with their own."""
    for shapes in ([(0,)], [(5,)] * 3, [(7,)] * 600):
        params = make_params(dtype, shapes)
        opt = cls([{"params": [p]} for p in params], average=fw.EMA(0.9), **options)
        set_grads(params, 0)
        count = counter(module, "launches")
        before = count.value
        opt.step()
        assert count.value - before == launches[cls is not fw.Adam] == opt.traffic().launches


@pytest.mark.parametrize("cls", [fw.Adam, fw.AdamP])
def test_spheres_take_one_more_launch(module, cls):
    for count in (3, 600):
        params = make_params(torch.float32, [(7,)] * count)
        opt = cls([{"params": [p], "projection": "sphere"} for p in params[1:]])
        opt.add_param_group({"params": params[:1]})
        set_grads(params, 0)
        launches = counter(module, "launches")
        before = launches.value
        opt.step()
        assert launches.value - before == (4 if cls is fw.Adam else 5) == opt.traffic().launches


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("limit", ["small", "large"])
def test_addresses_travel_with_the_launch_where_they_fit(module, limit, extra, clip):
    """And through the column where they do not, or have not changed; the first launch writes the column."""
    count = {"small": 468, "large": module.MAX_INLINE_POINTERS}[limit] + extra
    seen, carried = spied(module)
    case = next(case for case in CASES if case.name == "adamw")
    runs = pair(case, torch.float32, (CudaBackend(seen), CpuBackend()), [(2,)] * count, max_grad_norm=clip)
    for step in range(4):
        for params, opt in runs:
            if step == 0:
                set_grads(params, step)
            if step == 2:
                params[-1].grad = torch.ones(2)
                params[0].grad = None
            opt.step()
    assert_same_state(runs)
    fits = count <= module.MAX_INLINE_POINTERS
    assert carried == ([count, 0, count, 0] if fits else [0] * 4)
    assert [int(runs[0][1].state[p]["step"]) for p in (runs[0][0][0], runs[0][0][-1])] == [2, 4]


def check_alignment(make, dtype, shape):
    """Vectors or single elements: parameters, states and norms, and nothing outside the views."""
    values, results = torch.randn(shape).to(dtype), []
    grads = [torch.randn(shape).to(dtype) for _ in range(3)]
    for offset in range(8):
        views = [guarded(values, Layout(offset=offset))]
        views[0].view.requires_grad_()
        opt = make([views[0].view])
        for grad in grads:
            views.append(guarded(grad, Layout(offset=(3 * offset) % 8)))
            views[0].view.grad = views[-1].view
            before = [view.bytes_outside().clone() for view in views]
            opt.step()
            for view, bytes_before in zip(views, before, strict=True):
                assert torch.equal(view.bytes_outside(), bytes_before)
        results.append(bits(opt))
    assert [i for i, result in enumerate(results) if result != results[0]] == []


@pytest.mark.parametrize("projection", [None, "sphere"])
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_alignment_does_not_change_a_bit(dtype, projection):
    options = {"amsgrad": True, "average": fw.EMA(0.9), "projection": projection}
    check_alignment(lambda params: fw.Adam(params, **options), dtype, (40_003,))


@pytest.mark.parametrize("shape", [(40_003,), (100, 333), (300, 120), (2, 33_001)], ids=str)
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_alignment_does_not_change_a_bit_of_layers(dtype, shape):
    """Of one channel, of odd and of even channels, and of channels longer than a chunk."""
    check_alignment(lambda params: fw.AdamP(params, delta=10.0, nesterov=True), dtype, shape)


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch forbids gradients of another dtype"
)
@pytest.mark.parametrize("clip", [None, 2.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_float32_gradients_of_other_parameters(dtype, clip):
    """Mixed into one table with gradients of the parameter's own type."""
    runs = []
    for name, kind in (("cpu", dtype), ("reference", torch.float64)):
        params = make_params(kind, [(3000,), (7,), (2049,)])
        opt = fw.RAdam(params, lr=0.01, backend=name, max_grad_norm=clip)
        runs.append((params, opt))
    for step in range(6):
        for (params, opt), own in zip(runs, (torch.float32, torch.float64), strict=True):
            set_grads(params, step)
            params[0].grad = None
            params[0].grad_dtype = None
            params[0].grad = (torch.linspace(-1.0, 1.0, 3000) * (step + 1)).to(own)
            opt.step()
    unit = EPS[dtype]
    for i, (p, q) in enumerate(zip(runs[0][0], runs[1][0], strict=True)):
        assert_close(f"param {i}", p, q, 10 * unit, 10 * unit)
    ours, truth = (opt.telemetry.latest() for _, opt in runs)
    assert ours["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-12)


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize("case", ["adamw", "radam", "sgd-momentum"])
def test_scaled_gradients(case, backend_name):
    """What a ``GradScaler`` leaves: unscaled in the same passes; nothing moves where it found an infinity."""
    made = next(c for c in CASES if c.name == case)
    results = []
    for scale in (1.0, 1024.0):
        params = make_params(torch.float32)
        opt = made.make(params, backend=backend_name, max_grad_norm=1.0, average=fw.EMA(0.9))
        for step in range(4):
            set_grads(params, step, scale)
            opt.grad_scale = torch.tensor(scale)
            opt.found_inf = torch.tensor(float(step in {0, 2}))
            before = [p.detach().clone() for p in params]
            opt.step()
            moved = [not torch.equal(p, q) for p, q in zip(params, before, strict=True) if p.numel()]
            assert moved == [step not in {0, 2}] * len(moved)
        history = opt.telemetry.history()
        assert history["skipped"].tolist() == [1, 0, 1, 0]
        assert history["step"].tolist() == [0, 1, 1, 2]
        results.append(bits(opt, {"grad_norm", "clip_coef", "rect", "lr"}))
    # a power of two changes no rounding
    assert results[0] == results[1]


def test_magnitudes_beyond_float32_still_add_up():
    params = make_params(torch.float32, [(40_000,)])
    opt = fw.SGD(params, lr=1e-38)
    params[0].grad = torch.full((40_000,), 3e38)
    opt.step()
    line = opt.telemetry.latest()
    exact = float(params[0].grad[0])
    assert line["grad_norm_l1"] == pytest.approx(40_000 * exact, rel=1e-12)
    assert line["grad_norm"] == pytest.approx(200 * exact, rel=1e-12)


@each_gradient
def test_how_a_norm_is_summed_depends_on_the_numbers_alone(module, monkeypatch, name):
    """Neither alignment nor the grid decides which numbers are summed in double."""
    grad = GRADIENTS[name]
    unaligned = torch.empty(len(grad) + 1, dtype=grad.dtype)[1:].copy_(grad)
    made = []
    for given in (grad, unaligned):
        made += [norms_of(fw.SGD, given, "cpu"), norms_of(fw.SGD, given, "cpu", max_grad_norm=1e300)]
    monkeypatch.setattr(session, "resolve", lambda name, device: CudaBackend(module, max_blocks=2))
    made += [norms_of(fw.SGD, grad, "cpu"), norms_of(fw.SGD, grad, "cpu", max_grad_norm=1e300)]
    assert made[1:] == made[:-1]
    # one row of a matrix is a channel of its own
    channels = grad[: len(grad) // 24 * 24].view(-1, 24)
    assert norms_of(fw.AdamP, channels, "cpu") == norms_of(fw.AdamP, channels, "cpu", max_grad_norm=1e300)


def test_no_gradients_and_no_elements():
    params = make_params(torch.float32, [(4,), (0,)])
    opt = fw.Adam(params, average=fw.EMA(0.5))
    for step in range(2):
        set_grads(params, step)
        opt.step()
    average = opt.state[params[0]]["average"].clone()
    opt.zero_grad()
    opt.step()
    assert opt.telemetry.latest()["grad_norm"] == 0.0
    assert int(opt.state[params[0]]["step"]) == 2
    assert not torch.equal(average, params[0])
    # the average goes on towards a parameter that rests
    assert_close("average", opt.state[params[0]]["average"], (average + params[0]) / 2, 1e-6)


def test_the_device_is_left_as_it_was_and_errors_have_names(module):
    device = counter(module, "device")
    module.prepare(0, 1, False)
    assert device.value == 0
    with pytest.raises(RuntimeError, match=r"cudaSetDevice.*cudaErrorInvalidDevice, invalid device ordinal"):
        module.prepare(0, 7, False)
    assert device.value == 0
    with pytest.raises(ValueError, match="rule must be"):
        module.prepare(99, 0, False)
    with pytest.raises(ValueError, match="address must be"):
        module.step(0, 0, 0, 0, False, 0, 0)


def test_the_tests_of_other_backends_run_these_kernels(module):
    opt = fw.Adam(make_params(torch.float32), backend="cpu")
    assert isinstance(opt.session.backend, CudaBackend)
    assert opt.session.backend._cuda is module


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    "dtypes",
    [[torch.float32], [torch.float64], [torch.bfloat16, torch.float16], vector_cases.DTYPES],
    ids=str,
)
def test_vector_operations(module, dtypes, scaled):
    check_operations(dtypes, CudaBackend(module), scaled=scaled)


@pytest.mark.parametrize(("mode", "dtypes"), vector_cases.ROUNDED, ids=str)
def test_vectors_begin_at_exact_values(module, mode, dtypes):
    check_residues(mode, dtypes, CudaBackend(module))


@pytest.mark.parametrize("backwards", [False, True])
def test_vector_sums_do_not_depend_on_the_grid(module, backwards, monkeypatch):
    monkeypatch.setenv("CUDA_ON_HOST_ORDER", "backwards" if backwards else "forwards")
    bits = []
    for max_blocks in (0, 1, 3):
        bits.append(combination(CudaBackend(module, max_blocks), [(100_003,), (70_001,)], 6))
    assert torch.equal(bits[0], bits[1])
    assert torch.equal(bits[0], bits[2])


def test_a_vector_operation_is_one_launch(module):
    launches = ctypes.c_int.in_dll(ctypes.CDLL(module.__file__), "cuda_on_host_launches")
    _, fused = make_pair(vector_cases.DTYPES, CudaBackend(module))
    before = launches.value
    fused.perturb(draw(fused, 0), None, fused.number(1e-3))
    assert launches.value == before + 1


@pytest.mark.parametrize("dtype", vector_cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", vector_cases.PRECONDITIONED, ids=lambda case: case.name)
def test_preconditioner_is_that_of_the_reference(module, case, dtype):
    def make(case, params, **options):
        return case.make(params, **options), CudaBackend(module)

    clip = None if "weight_decay" in case.options else 5.0
    params = make_params(dtype, [(3,), (0,), (), (33, 101)])
    options = {"max_grad_norm": clip, "schedule": SCHEDULES["warmup_linear"]}
    check_preconditioner(case, make, params, **options)
    mixed = [p for d in vector_cases.DTYPES for p in make_params(d, [(33,)])]
    groups = [{"params": mixed[:1]}, {"params": mixed[1:], "lr": 3e-3}]
    check_preconditioner(case, lambda case, _, **more: make(case, groups, **more), mixed, steps=(1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [None, 0.1], ids=["unclipped", "clipped"])
def test_small_chunks_take_small_blocks(module, clip, dtype):
    """As many threads as they have packs, and the bits of a block of the usual size."""
    most = 512 // torch.finfo(dtype).bits * 8
    for threads, largest in ((32, most), (64, 2 * most), (96, 2 * most + 1), (128, 9 * most)):
        shapes = [(largest,), (1,), (0,), (most - 1,), (3, 5)]
        runs = pair(CASES[0], dtype, [CudaBackend(module)] * 2, shapes, max_grad_norm=clip, telemetry="all")
        for step in range(3):
            for usual, (params, opt) in enumerate(runs):
                set_grads(params, step)
                if step == 1:
                    # unaligned
                    params[0].grad = torch.cat([params[0].grad[:1], params[0].grad])[1:]
                plan, _ = opt.session.prepare(None, None)
                pointer = ctypes.cast(plan.address, ctypes.POINTER(ctypes.c_uint8))
                call = np.ctypeslib.as_array(pointer, (STRUCTS["Step"].itemsize,)).view(STRUCTS["Step"])
                assert call["block_threads"][0] == (128 if usual and step else threads)
                call["block_threads"] = 128 if usual else threads
                opt.step()
        assert_same_state(runs)
        assert_same_bits("telemetry", *(opt.telemetry.rows() for _, opt in runs))


ROUNDED = {
    "Adam": (fw.Adam, {"weight_decay": 0.1}),
    "SGD": (fw.SGD, {"momentum": 0.9}),
    "LAMB": (fw.LAMB, {}),
    "AdamP": (fw.AdamP, {"delta": 1.0}),
}
ROUNDED_OPTIONS = {
    "plain": {},
    "average": {"average": fw.EMA(0.9)},
    "sphere": {"average": fw.EMA(0.9), "projection": "sphere", "weight_decay": 0.0},
}
# below a pack, of no whole number of packs, of odd channels and of more than one chunk
ROUNDED_SHAPES = [(5,), (0,), (8,), (1037,), (7, 333), (40_003,)]
each_mode = pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        (mode, dtype)
        for mode in MODES
        for dtype in (torch.bfloat16, torch.float16)
        if (mode, dtype) != ("split", torch.float16)
    ],
    ids=str,
)


def rounded_run(backend, rule, mode, dtype, shapes=ROUNDED_SHAPES, **options):
    """Parameters whose updates are lost in part by 16 bits."""
    cls, own = ROUNDED[rule]
    params = make_params(dtype, shapes)
    opt = cls(params, lr=1e-3, param_rounding=mode, rounding_seed=7 + 2**40, **{**own, **options})
    opt.session.backend = backend
    return params, opt


def step_rounded(runs, steps=4, change=None):
    """One parameter has no gradient at times; ``change`` is given the table of each run before each step."""
    for step in range(steps):
        for params, opt in runs:
            set_grads(params, step)
            if step == 2:
                params[3].grad = None
            if change is not None:
                change(opt.session.prepare(None, None)[0])
            opt.step()


def check_rounded(runs, rule, option=""):
    if rule in ("LAMB", "AdamP") or option == "sphere":
        assert_close_values(runs)
    else:
        assert_same_state(runs)


def value_of(opt, param):
    """The value of a parameter with its residue."""
    state = opt.state[param]
    own = next(((name, state[name]) for name, _ in RESIDUES.values() if name in state), None)
    if own is None:
        return param.detach().float()
    return load_value(MODE_OF_RESIDUE[own[0]], param.detach(), own[1])


def assert_close_values(runs):
    """Sums over layers and spheres are added up in another order, so that a last digit may be rounded apart."""
    (params, opt), (others, other) = runs
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        ours, theirs = value_of(opt, p), value_of(other, q)
        mode = opt.param_groups[0]["param_rounding"]
        unit = 2.0**-22 if mode in ("split", "master") else 2.0**-15 if mode == "kahan" else EPS[p.dtype]
        assert_close(f"value {i}", ours, theirs, 2 * unit, 2 * unit)
        assert_close(f"parameter {i}", p, q, 2 * unit, EPS[p.dtype])


@pytest.mark.skipif(len(_cpu.instruction_sets()) == 1, reason="this processor rounds products and sums twice")
@pytest.mark.parametrize("option", list(ROUNDED_OPTIONS))
@pytest.mark.parametrize("rule", list(ROUNDED))
@each_mode
def test_rounded_parameters_have_the_bits_of_the_cpu_kernels(module, mode, dtype, rule, option):
    """And residues, averages and moments; some gradients are missing."""
    backends = (CudaBackend(module), CpuBackend())
    runs = [rounded_run(backend, rule, mode, dtype, **ROUNDED_OPTIONS[option]) for backend in backends]
    step_rounded(runs)
    check_rounded(runs, rule, option)


@pytest.mark.parametrize("rule", ["Adam", "AdamP"])
@each_mode
def test_grids_do_not_change_a_bit_of_rounded_parameters(module, monkeypatch, mode, dtype, rule):
    results = []
    for blocks, order in [(0, ""), (1, ""), (3, "backwards"), (10**6, "backwards")]:
        monkeypatch.setenv("CUDA_ON_HOST_ORDER", order)
        run = rounded_run(
            CudaBackend(module, max_blocks=blocks), rule, mode, dtype, **ROUNDED_OPTIONS["sphere"]
        )
        step_rounded([run])
        results.append(bits(run[1]))
    for result in results[1:]:
        assert [key for key in results[0] if result[key] != results[0][key]] == []


@pytest.mark.parametrize("projection", [None, "sphere"])
@each_mode
def test_alignment_does_not_change_a_bit_of_rounded_parameters(mode, dtype, projection):
    options = {"average": fw.EMA(0.9), "projection": projection, "param_rounding": mode}
    check_alignment(lambda params: fw.Adam(params, **options), dtype, (40_003,))


@pytest.mark.parametrize("rule", ["Adam", "SGD"])
@pytest.mark.parametrize(
    "place", [(3, 1037, 1037), (2**35 - 500, 1037, 1037), (3, 17, 40), (2**36 + 8, 8, 24)], ids=str
)
@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
def test_bits_are_those_of_the_place_in_the_whole_tensor(module, mode, place, rule):
    """Of a row that is a part of a tensor: from another element on, or in runs."""

    def change(plan):
        plan._columns[["first_element", "run", "run_stride"]] = place
        plan.buffers.rewrite("rows", range(len(plan.rows)))

    backends = (CudaBackend(module), CpuBackend())
    runs = [rounded_run(backend, rule, mode, torch.bfloat16, [(1037,)] * 4) for backend in backends]
    step_rounded(runs, change=change)
    assert_same_state(runs)
    plain = rounded_run(CpuBackend(), rule, mode, torch.bfloat16, [(1037,)] * 4)
    step_rounded([plain])
    drawn = "parameter 0: kahan_comp" if mode == "kahan" else "parameter 0"
    assert bits(plain[1])[drawn] != bits(runs[0][1])[drawn]


@pytest.mark.parametrize("mode", ["kahan", "split", "master"])
def test_preconditioner_takes_the_exact_value(module, mode):
    """Coupled weight decay takes it from parameter and residue."""

    found = []
    for backend in (CudaBackend(module), CpuBackend()):
        run = rounded_run(
            backend, "Adam", mode, torch.bfloat16, [(5,), (8,), (33,), (1037,)], weight_decay=100.0
        )
        step_rounded([run])
        set_grads(run[0], 9)
        pending = PendingStep("test", run[1])
        vectors = FusedVectors(pending.params, pending.params, torch.float32, backend)
        found.append(pending.preconditioner(vectors).scale)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0.0)


ROUNDED_STATES = {
    "Adam": (fw.Adam, {"weight_decay": 0.1}),
    "Adam-amsgrad": (fw.Adam, {"amsgrad": True}),
    "GIAdam": (fw.GIAdam, {}),
    "RAdam": (fw.RAdam, {}),
    "SGD": (fw.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD-plain": (fw.SGD, {}),
    "LAMB": (fw.LAMB, {}),
    "AdamP": (fw.AdamP, {"delta": 1.0, "nesterov": True}),
    "SGDP": (fw.SGDP, {"momentum": 0.9, "delta": 1.0}),
}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def rounded_states_run(backend, rule, dtype, shapes=ROUNDED_SHAPES, **options):
    cls, own = ROUNDED_STATES[rule]
    params = make_params(dtype, shapes)
    options = {"state_dtype": torch.bfloat16, "rounding_seed": 7 + 2**40, **own, **options}
    opt = cls(params, lr=1e-3, **options)
    opt.session.backend = backend
    return params, opt


def check_rounded_states(runs, rule, option=""):
    """Moments do not depend on the sums over layers and spheres, as long as these decay no gradient."""
    check_rounded(runs, rule, option)
    (params, opt), (others, other) = runs
    names = opt.spec.state_names(opt.param_groups[0])
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        for name in names:
            ours, theirs = opt.state[p][name], other.state[q][name]
            assert ours.dtype is torch.bfloat16
            assert_same_bits(f"{name} {i}", ours, theirs)


@pytest.mark.skipif(len(_cpu.instruction_sets()) == 1, reason="this processor rounds products and sums twice")
@pytest.mark.parametrize("option", list(ROUNDED_OPTIONS))
@pytest.mark.parametrize("rule", list(ROUNDED_STATES))
@each_dtype
def test_rounded_states_have_the_bits_of_the_cpu_kernels(module, dtype, rule, option):
    """Below parameters that are rounded to nearest, or not at all."""
    backends = (CudaBackend(module), CpuBackend())
    runs = [rounded_states_run(backend, rule, dtype, **ROUNDED_OPTIONS[option]) for backend in backends]
    step_rounded(runs)
    check_rounded_states(runs, rule, option)


@pytest.mark.skipif(len(_cpu.instruction_sets()) == 1, reason="this processor rounds products and sums twice")
@pytest.mark.parametrize("rule", ["Adam-amsgrad", "SGD", "LAMB", "AdamP"])
@each_mode
def test_rounded_states_of_rounded_parameters(module, mode, dtype, rule):
    options = {"param_rounding": mode, "average": fw.EMA(0.9)}
    backends = (CudaBackend(module), CpuBackend())
    runs = [rounded_states_run(backend, rule, dtype, **options) for backend in backends]
    step_rounded(runs)
    check_rounded_states(runs, rule)


@pytest.mark.parametrize("rule", ["Adam", "RAdam", "SGD"])
def test_rounded_states_beside_others(module, rule):
    """Groups with states of either dtype, and float64 parameters, in one table."""
    runs = []
    for backend in (CudaBackend(module), CpuBackend()):
        cls, own = ROUNDED_STATES[rule]
        params = [p for dtype in vector_cases.DTYPES for p in make_params(dtype, [(1037,), (9,)])]
        narrow = [p for p in params[::2] if p.dtype is not torch.float64]
        others = [p for p in params if all(p is not q for q in narrow)]
        opt = cls([{"params": narrow, "state_dtype": torch.bfloat16}, {"params": others}], lr=1e-3, **own)
        opt.session.backend = backend
        runs.append((params, opt))
    step_rounded(runs)
    assert_same_state(runs)
    kinds = {value.dtype for p in params for name, value in states_of(opt, p).items() if name != "step"}
    assert kinds == {torch.bfloat16, torch.float32, torch.float64}


@pytest.mark.parametrize("rule", ["Adam-amsgrad", "AdamP"])
@each_dtype
def test_grids_do_not_change_a_bit_of_rounded_states(module, monkeypatch, dtype, rule):
    results = []
    for blocks, order in [(0, ""), (1, ""), (3, "backwards"), (10**6, "backwards")]:
        monkeypatch.setenv("CUDA_ON_HOST_ORDER", order)
        run = rounded_states_run(
            CudaBackend(module, max_blocks=blocks), rule, dtype, **ROUNDED_OPTIONS["sphere"]
        )
        step_rounded([run])
        results.append(bits(run[1]))
    for result in results[1:]:
        assert [key for key in results[0] if result[key] != results[0][key]] == []


@pytest.mark.parametrize(("rule", "shape"), [("Adam-amsgrad", (40_003,)), ("AdamP", (300, 120))])
@each_dtype
def test_alignment_does_not_change_a_bit_of_rounded_states(module, dtype, rule, shape):
    """Of parameters and gradients, and of the states themselves, which keep what lies around them."""
    cls, own = ROUNDED_STATES[rule]
    check_alignment(lambda params: cls(params, state_dtype=torch.bfloat16, **own), dtype, shape)
    results = []
    for offset in range(8):
        (param,), opt = run = rounded_states_run(CudaBackend(module), rule, dtype, [shape])
        set_grads([param], 0)
        opt.step()
        names = opt.spec.state_names(opt.param_groups[0])
        guards = [guarded(opt.state[param][name], Layout(offset=offset)) for name in names]
        before = [guard.bytes_outside().clone() for guard in guards]
        for name, guard in zip(names, guards, strict=True):
            opt.state[param][name] = guard.view
        opt.session.reset()
        for step in (1, 2):
            set_grads([param], step)
            opt.step()
        for guard, bytes_before in zip(guards, before, strict=True):
            assert torch.equal(guard.bytes_outside(), bytes_before)
        assert all(opt.state[param][name] is guard.view for name, guard in zip(names, guards, strict=True))
        results.append(bits(run[1]))
    assert [i for i, result in enumerate(results) if result != results[0]] == []


@pytest.mark.parametrize(
    "place", [(3, 1037, 1037), (2**35 - 500, 1037, 1037), (3, 17, 40), (2**36 + 8, 8, 24)], ids=str
)
@pytest.mark.parametrize("rule", ["Adam", "SGD"])
@each_dtype
def test_bits_of_states_are_those_of_the_place_in_the_whole_tensor(module, dtype, rule, place):
    def change(plan):
        plan._columns[["first_element", "run", "run_stride"]] = place
        plan.buffers.rewrite("rows", range(len(plan.rows)))

    backends = (CudaBackend(module), CpuBackend())
    runs = [rounded_states_run(backend, rule, dtype, [(1037,)] * 4) for backend in backends]
    step_rounded(runs, change=change)
    assert_same_state(runs)
    plain = rounded_states_run(CpuBackend(), rule, dtype, [(1037,)] * 4)
    step_rounded([plain])
    (name, *_) = plain[1].spec.state_names(plain[1].param_groups[0])
    assert bits(plain[1])[f"parameter 0: {name}"] != bits(runs[0][1])[f"parameter 0: {name}"]


@pytest.mark.parametrize("rule", ["Adam-amsgrad", "RAdam", "SGD"])
@each_dtype
def test_preconditioner_takes_rounded_states(module, dtype, rule):
    found = []
    for backend in (CudaBackend(module), CpuBackend()):
        run = rounded_states_run(backend, rule, dtype, [(5,), (8,), (33,), (1037,)])
        step_rounded([run])
        set_grads(run[0], 9)
        pending = PendingStep("test", run[1])
        vectors = FusedVectors(pending.params, pending.params, torch.float32, backend)
        found.append(pending.preconditioner(vectors).scale)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0.0)
