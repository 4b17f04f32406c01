"""The Triton kernels compiled ahead of time, for devices that need not be there: accesses, registers, launches."""

import contextlib
import io
import os
import re
from types import SimpleNamespace

import pytest
import torch
from cases import make_params, set_grads

import fused_warmup as fw
from fused_warmup import backends
from fused_warmup.plan.structs import DTYPES, ROUNDINGS

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled where TRITON_INTERPRET is 1", allow_module_level=True)
triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fused_warmup.backends.triton import launch, layerwise, preconditioner, vectors  # noqa: E402
from fused_warmup.backends.triton.decide import decide_kernel  # noqa: E402
from fused_warmup.backends.triton.measure import measure_kernel  # noqa: E402
from fused_warmup.backends.triton.probe import check_kernel  # noqa: E402
from fused_warmup.backends.triton.sphere import rescale_kernel  # noqa: E402
from fused_warmup.backends.triton.step import finish_kernel, update_kernel  # noqa: E402
from fused_warmup.backends.triton.totals import fold_kernel  # noqa: E402

pytestmark = pytest.mark.slow
F32, F64, BF16, F16 = (DTYPES[d] for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16))
SIZES = {F32: 4, F64: 8, BF16: 2, F16: 2}
TARGETS = (80, 90, 100)
THREADS = 32 * launch.NUM_WARPS
# registers of a multiprocessor
REGISTERS = 1 << 16


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """What was compiled before must not stand in for what is there now."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def compile_kernel(kernel, constants, target):
    """Return the PTX and what ptxas says of it: registers, bytes of stack and bytes of spills."""
    names = kernel.arg_names
    options = {name: value for name, value in constants.items() if name not in names}
    constexprs = {(names.index(name),): value for name, value in constants.items() if name in names}
    signature = {name: "*i64" if name in ("step", "call") else "constexpr" for name in names}
    source = ASTSource(kernel, signature, constexprs, {})
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as printed:
        triton.knobs.nvidia.dump_ptxas_log = True
        ptx = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm["ptx"]
    report = printed.getvalue()
    numbers = {
        name: max(int(n) for n in re.findall(pattern, report))
        for name, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("stack", r"(\d+) bytes stack frame"),
            ("spills", r"(\d+) bytes spill"),
        )
    }
    return ptx, numbers


def wide_bytes(ptx, operation):
    """Bytes that the accesses of 16 bytes or more move, for one thread."""
    found = re.findall(rf"\b{operation}\.global\S*\.v(\d)\.b(\d+)", ptx)
    sizes = [int(n) * int(bits) // 8 for n, bits in found]
    assert all(size >= 16 for size in sizes), sizes
    return sum(sizes)


def kinds_of(dtype, n_states, rounding, states):
    """The only kind of a plan, and the bytes of its states; those of rounded states where there are."""
    state = states or (F64 if dtype == F64 else F32)
    return ((dtype, dtype, n_states, state, rounding),), n_states * SIZES[state]


def average_of(dtype, full):
    return full * SIZES[F64 if dtype == F64 else F32]


def update(rule, dtype, n_states, full, rounding=0, states=None, spheres=False):
    """A plain update, or one that sums the norms and updates an average."""
    kinds, state = kinds_of(dtype, n_states, rounding, states)
    constants = launch.update_constants(
        rule, kinds, accumulate=full, average=full, spheres=spheres, tiled=not full
    )
    own = state + average_of(dtype, full)
    return update_kernel, constants, 2 * SIZES[dtype] + own, SIZES[dtype] + own


def on_sphere(job):
    """An update or stage2 that sums the squares of the stored parameters, which moves no further bytes."""
    kernel, constants, loaded, stored = job
    return kernel, {**constants, "SPHERES": True, "maxnreg": max(constants["maxnreg"], 128)}, loaded, stored


def rescale(dtype, full, rounding=0):
    """The rescaling of a parameter to its sphere, with or without an average."""
    constants = launch.rescale_constants(kinds_of(dtype, 2, rounding, None)[0], average=full)
    own = SIZES[dtype] + average_of(dtype, full)
    return rescale_kernel, constants, own, own


def measure(dtype):
    return measure_kernel, launch.measure_constants(kinds_of(dtype, 2, 0, None)[0]), SIZES[dtype], 0


def stage1(rule, dtype, n_states, full, rounding=0, states=None):
    """Stage1, with or without norms."""
    kinds, state = kinds_of(dtype, n_states, rounding, states)
    constants = launch.stage1_constants(rule, kinds, accumulate=full)
    return layerwise.stage1_kernel, constants, 2 * SIZES[dtype] + state, state


def stage2(rule, dtype, n_states, full, rounding=0, states=None):
    """Stage2; every rule but LAMB may read the gradient again."""
    kinds, state = kinds_of(dtype, n_states, rounding, states)
    constants = launch.stage2_constants(rule, kinds, average=full)
    again = 0 if rule == "LAMB" else SIZES[dtype]
    own = SIZES[dtype] + average_of(dtype, full)
    return layerwise.stage2_kernel, constants, own + again + state, own


JOBS = {
    "lamb-stage1-float32": stage1("LAMB", F32, 2, False),
    "lamb-stage2-bfloat16": stage2("LAMB", BF16, 2, True),
    "adamp-stage1-float32-full": stage1("AdamP", F32, 2, True),
    "adamp-stage1-bfloat16-full": stage1("AdamP", BF16, 2, True),
    "adamp-stage2-float32-full": stage2("AdamP", F32, 2, True),
    "sgdp-stage1-float32": stage1("SGDP", F32, 1, False),
    "measure-float32": measure(F32),
    "measure-bfloat16": measure(BF16),
    "adam-float32": update("Adam", F32, 2, False),
    "adam-bfloat16": update("Adam", BF16, 2, False),
    "adam-float32-states": update("Adam", F32, 2, False, states=BF16),
    "adam-float32-full": update("Adam", F32, 2, True),
    "adam-bfloat16-full": update("Adam", BF16, 2, True),
    "amsgrad-float32-full": update("Adam", F32, 3, True),
    "radam-float32": update("RAdam", F32, 2, False),
    "radam-bfloat16-full": update("RAdam", BF16, 2, True),
    "sgd-float32-full": update("SGD", F32, 1, True),
    "sgd-bfloat16": update("SGD", BF16, 1, False),
    "adam-sphere-float32-full": on_sphere(update("Adam", F32, 2, True)),
    "sgd-sphere-bfloat16-full": on_sphere(update("SGD", BF16, 1, True)),
    "adamp-stage2-sphere-float32-full": on_sphere(stage2("AdamP", F32, 2, True)),
    "rescale-float32": rescale(F32, False),
    "rescale-bfloat16-full": rescale(BF16, True),
}
RARE = {
    "adamp-stage1-float64": stage1("AdamP", F64, 2, False),
    "sgdp-stage2-plain-float32": stage2("SGDP", F32, 0, False),
    "measure-float64": measure(F64),
    "adam-float16": update("Adam", F16, 2, False),
    "adam-float64-full": update("Adam", F64, 2, True),
    "sgd-plain-float32": update("SGD", F32, 0, False),
    "adam-sphere-bfloat16-full": on_sphere(update("Adam", BF16, 2, True)),
    "adam-sphere-float64-full": on_sphere(update("Adam", F64, 2, True)),
    "adamp-stage2-sphere-bfloat16-full": on_sphere(stage2("AdamP", BF16, 2, True)),
    "rescale-float64-full": rescale(F64, True),
}
# what replaces subnormal numbers by 0 or is not rounded to nearest
FLUSHED_OR_INEXACT = r"\.ftz|\bdiv\.full|\bsqrt\.approx"
RESIDUE_SIZES = {"kahan": 2, "split": 2, "master": 4}


def rounded(job, mode):
    """A job on 16-bit parameters of another rounding mode, which moves the residues too, but for stage1's writes."""
    make, *arguments = job
    kernel, _, loaded, stored = make(*arguments)
    code, size = ROUNDINGS[mode], RESIDUE_SIZES.get(mode, 0)
    constants = make(*arguments, code)[1]
    return kernel, constants, loaded + size, stored + (0 if make is stage1 else size)


# every mode, in every kernel that rounds or loads a parameter
RARE |= {
    "adam-bfloat16-stochastic": rounded((update, "Adam", BF16, 2, False), "stochastic"),
    "adam-bfloat16-stochastic-full": rounded((update, "Adam", BF16, 2, True), "stochastic"),
    "adam-bfloat16-kahan": rounded((update, "Adam", BF16, 2, False), "kahan"),
    "adam-bfloat16-kahan-full": rounded((update, "Adam", BF16, 2, True), "kahan"),
    "adam-bfloat16-split-full": rounded((update, "Adam", BF16, 2, True), "split"),
    "adam-float16-master": rounded((update, "Adam", F16, 2, False), "master"),
    "sgd-float16-kahan-full": rounded((update, "SGD", F16, 1, True), "kahan"),
    "adamp-stage1-bfloat16-kahan-full": rounded((stage1, "AdamP", BF16, 2, True), "kahan"),
    "adamp-stage2-bfloat16-kahan-full": rounded((stage2, "AdamP", BF16, 2, True), "kahan"),
    "lamb-stage2-bfloat16-stochastic-full": rounded((stage2, "LAMB", BF16, 2, True), "stochastic"),
    "rescale-bfloat16-stochastic-full": rounded((rescale, BF16, True), "stochastic"),
    "rescale-bfloat16-kahan-full": rounded((rescale, BF16, True), "kahan"),
}
STOCHASTIC = ROUNDINGS["stochastic"]
# bfloat16 states, in every kernel that rounds or loads them
RARE |= {
    "adam-bfloat16-stochastic-states": update("Adam", BF16, 2, False, STOCHASTIC, BF16),
    "adam-bfloat16-stochastic-states-full": update("Adam", BF16, 2, True, STOCHASTIC, BF16),
    "amsgrad-float32-states-full": update("Adam", F32, 3, True, states=BF16),
    "sgd-float16-states": update("SGD", F16, 1, False, states=BF16),
    "adam-sphere-float32-states": update("Adam", F32, 2, True, states=BF16, spheres=True),
    "lamb-stage1-float32-states": stage1("LAMB", F32, 2, False, states=BF16),
    "adamp-stage1-bfloat16-states-full": stage1("AdamP", BF16, 2, True, states=BF16),
    "adamp-stage2-bfloat16-states-full": stage2("AdamP", BF16, 2, True, states=BF16),
}
RELEASE = ".".join(triton.__version__.split(".")[:2])
# bytes of stack and of spills of one thread, where not 0: another order of instructions needs up to 20 registers
# more than the 128 that two programs on a multiprocessor leave each; the loops over blocks spill nothing
SPILLED = {
    ("3.5", "adamp-stage1-float32-full", 80): (8, 8),
    ("3.5", "adam-bfloat16-kahan", 90): (8, 4),
    ("3.5", "adam-bfloat16-full", 100): (8, 4),
    ("3.5", "adam-float32-states", 90): (8, 4),
    ("3.6", "adam-bfloat16-full", 100): (8, 4),
    ("3.6", "radam-bfloat16-full", 100): (8, 4),
    ("3.8", "adam-bfloat16-full", 80): (16, 16),
    ("3.8", "amsgrad-float32-full", 80): (24, 24),
    ("3.8", "adam-sphere-float32-full", 80): (16, 16),
    ("3.8", "adam-bfloat16-full", 90): (16, 16),
    ("3.8", "amsgrad-float32-full", 90): (32, 32),
    ("3.8", "radam-bfloat16-full", 90): (8, 8),
    ("3.8", "adam-sphere-float32-full", 90): (16, 16),
    ("3.8", "adam-sphere-bfloat16-full", 90): (32, 32),
    ("3.8", "adam-bfloat16-stochastic-full", 90): (16, 16),
    ("3.8", "adam-bfloat16-kahan-full", 90): (40, 44),
    ("3.8", "adam-bfloat16-split-full", 90): (8, 8),
    ("3.8", "adam-float32-full", 100): (24, 24),
    ("3.8", "adam-bfloat16-full", 100): (48, 56),
    ("3.8", "amsgrad-float32-full", 100): (72, 80),
    ("3.8", "radam-bfloat16-full", 100): (40, 36),
    ("3.8", "adam-sphere-float32-full", 100): (48, 64),
    ("3.9", "adam-bfloat16-full", 80): (16, 16),
    ("3.9", "amsgrad-float32-full", 80): (40, 40),
    ("3.9", "adam-float32-states", 80): (40, 36),
    ("3.9", "adam-sphere-float32-full", 80): (24, 24),
    ("3.9", "adamp-stage1-float32-full", 90): (8, 4),
    ("3.9", "adam-float32-full", 90): (8, 8),
    ("3.9", "adam-bfloat16-full", 90): (32, 28),
    ("3.9", "amsgrad-float32-full", 90): (56, 64),
    ("3.9", "radam-bfloat16-full", 90): (16, 16),
    ("3.9", "adam-sphere-float32-full", 90): (40, 40),
    ("3.9", "adam-sphere-bfloat16-full", 90): (56, 56),
    ("3.9", "adam-bfloat16-stochastic-full", 90): (32, 40),
    ("3.9", "adam-bfloat16-kahan-full", 90): (56, 72),
    ("3.9", "adam-bfloat16-split-full", 90): (24, 20),
    ("3.9", "adam-bfloat16-stochastic-states-full", 90): (32, 40),
    ("3.9", "amsgrad-float32-states-full", 90): (64, 80),
    ("3.9", "adamp-stage1-bfloat16-full", 100): (8, 8),
    ("3.9", "adam-float32-full", 100): (24, 24),
    ("3.9", "adam-bfloat16-full", 100): (32, 32),
    ("3.9", "amsgrad-float32-full", 100): (64, 72),
    ("3.9", "radam-bfloat16-full", 100): (32, 32),
    ("3.9", "adam-sphere-float32-full", 100): (40, 44),
}


@pytest.mark.parametrize(
    ("job", "target"),
    [(job, target) for target in TARGETS for job in JOBS] + [(job, 90) for job in RARE],
)
def test_whole_blocks_move_16_bytes_at_a_time_and_nothing_spills(job, target):
    kernel, constants, loaded, stored = {**JOBS, **RARE}[job]
    ptx, numbers = compile_kernel(kernel, constants, target)
    elements = launch.BLOCK // THREADS
    assert wide_bytes(ptx, "ld") == elements * loaded
    assert wide_bytes(ptx, "st") == elements * stored
    assert not re.findall(FLUSHED_OR_INEXACT, ptx)
    assert (numbers["stack"], numbers["spills"]) == SPILLED.get((RELEASE, job, target), (0, 0))
    programs = REGISTERS // (numbers["registers"] * THREADS)
    # how many share a multiprocessor
    alone = "float64" in job or constants["maxnreg"] == 255
    wanted = 1 if alone else 2 if job.endswith("full") else 4 if "measure" in job else 3
    if "stage1" in job or "stage2" in job:
        wanted = min(wanted, 2)
    assert programs >= wanted, numbers


@pytest.mark.parametrize("rule", ["LAMB", "AdamP"])
@pytest.mark.parametrize("target", TARGETS)
def test_reduce_layers_spills_nothing(target, rule):
    constants = launch.reduce_layers_constants(rule, accumulate=True)
    _, numbers = compile_kernel(layerwise.reduce_layers_kernel, constants, target)
    assert (numbers["stack"], numbers["spills"]) == (0, 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spheres", [False, True])
def test_decide_spills_nothing(target, spheres):
    constants = launch.decide_constants("RAdam", spheres=spheres)
    _, numbers = compile_kernel(decide_kernel, constants, target)
    assert numbers["spills"] == 0
    # the cosine has a table for arguments that no schedule gives it
    assert numbers["stack"] <= 48
    assert numbers["registers"] * THREADS <= REGISTERS


SPREAD = {
    "decide": (decide_kernel, launch.decide_constants("RAdam", spheres=True, spread=True)),
    "finish": (finish_kernel, launch.finish_constants(spheres=True, spread=True)),
    "fold": (fold_kernel, launch.fold_constants(measured=True, norms=True, squares=False)),
    "fold-all": (fold_kernel, launch.fold_constants(measured=False, norms=True, squares=True)),
    "fold-lamb": (layerwise.fold_layers_kernel, launch.fold_layers_constants("LAMB", accumulate=True)),
    "fold-adamp": (layerwise.fold_layers_kernel, launch.fold_layers_constants("AdamP", accumulate=True)),
    "reduce-lamb": (
        layerwise.reduce_layers_kernel,
        launch.reduce_layers_constants("LAMB", accumulate=True, spread=True),
    ),
    "reduce-adamp": (
        layerwise.reduce_layers_kernel,
        launch.reduce_layers_constants("AdamP", accumulate=True, spread=True),
    ),
    "stage1": (
        layerwise.stage1_kernel,
        launch.stage1_constants("AdamP", ((F32, F32, 2, F32, 0),), accumulate=True, spread=True),
    ),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SPREAD)
def test_kernels_for_rows_of_several_processes_spill_nothing(target, name):
    kernel, constants = SPREAD[name]
    ptx, numbers = compile_kernel(kernel, constants, target)
    # as without other processes
    stack, spills = (
        SPILLED.get((RELEASE, "adamp-stage1-float32-full", target), (0, 0)) if name == "stage1" else (0, 0)
    )
    assert numbers["spills"] == spills
    # the cosine of the schedules has a table and float32 arithmetic of its own
    assert numbers["stack"] <= (48 if name == "decide" else stack)
    assert name == "decide" or not re.findall(FLUSHED_OR_INEXACT, ptx)


@pytest.mark.parametrize(("rule", "n_states", "written"), [("Adam", 2, 5), ("RAdam", 2, 4), ("SGD", 1, 4)])
def test_products_and_sums_round_as_they_are_written(rule, n_states, written):
    """As many fused multiply-adds as the rule has, one more for the average, and none for the compiler to make.

    The norms take two for each square.
    """
    kernel, constants, _, _ = update(rule, F32, n_states, True)
    ptx, _ = compile_kernel(kernel, constants, 90)
    elements = (launch.BLOCK + launch.TAIL) // THREADS
    of_norms = 2 * elements
    assert len(re.findall(r"\bfma\.rn\.f32\b", ptx)) == (written + 1) * elements + of_norms
    assert not re.findall(rf"\b(?:mul|add|sub)\.f(?:32|64)\b|{FLUSHED_OR_INEXACT}", ptx)


def test_several_kinds_in_one_kernel():
    kinds = ((F32, F32, 2, F32, 0), (BF16, F32, 2, F32, 0), (BF16, BF16, 2, F32, 0))
    constants = launch.update_constants("Adam", kinds, accumulate=True, average=True)
    _, numbers = compile_kernel(update_kernel, constants, 90)
    assert (numbers["stack"], numbers["spills"]) == (0, 0)
    _, numbers = compile_kernel(measure_kernel, launch.measure_constants(kinds), 90)
    assert (numbers["stack"], numbers["spills"]) == (0, 0)
    for kernel, constants in (
        (layerwise.stage1_kernel, launch.stage1_constants("AdamP", kinds, accumulate=True)),
        (layerwise.stage2_kernel, launch.stage2_constants("AdamP", kinds, average=True)),
    ):
        _, numbers = compile_kernel(kernel, constants, 90)
        assert (numbers["stack"], numbers["spills"]) == (0, 0)


class NoDevice:
    """A driver of Triton that compiles for a device and launches nothing."""

    def __init__(self):
        self.launches = []
        self.loaded = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
            load_binary=self.load,
            unload_module=lambda module: None,
        )

    def load(self, *_):
        self.loaded += 1
        return 1, 1, 64, 0, 1024

    def launcher_cls(self, source, metadata):
        def launcher(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launches.append((source.name, x, arguments))

        return launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


ALL_STAGES = (
    *(measure_kernel, decide_kernel, update_kernel, finish_kernel, rescale_kernel),
    *(layerwise.stage1_kernel, layerwise.reduce_layers_kernel, layerwise.stage2_kernel),
)


@pytest.fixture
def driver(monkeypatch):
    """Steps of CPU tensors go through every line of the launch and end before the device."""
    driver = NoDevice()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(backends, "_interpreted", lambda: True)
    monkeypatch.setattr(backends, "_triton_problem", lambda device: None)
    for kernel in ALL_STAGES:
        kernel.device_caches.clear()
    yield driver
    for kernel in ALL_STAGES:
        kernel.device_caches.clear()


def compiled():
    stages = (measure_kernel, decide_kernel, update_kernel)
    return [len(stage.device_caches[0][0]) for stage in stages]


def test_repeated_steps_compile_nothing(driver):
    """Step counts, rates, weight decay, gradients, tensors and the table itself change; the kernels do not."""
    params = make_params(torch.float32, [(5000,), (3,)])
    opt = fw.AdamW(params, backend="triton", schedule=fw.schedules.warmup(4), average=fw.EMA(0.9))
    for step in range(20):
        set_grads(params, step)
        opt.param_groups[0]["lr"] = 1e-3 * (step + 1)
        opt.param_groups[0]["weight_decay"] = 0.01 * step
        if step == 5:
            params[1].grad = None
        if step == 10:
            extra = make_params(torch.float32, [(17,), (40_000,)])
            set_grads(extra, 0)
            opt.add_param_group({"params": extra})
        opt.step()
        if step == 0:
            assert compiled() == [0, 1, 1]
    assert compiled() == [0, 1, 1]
    assert [name for name, _, _ in driver.launches] == [
        "decide_kernel",
        "update_kernel",
        "finish_kernel",
    ] * 20


def test_seeds_and_steps_of_rounding_compile_nothing(driver):
    """As many launches as without, whatever the mode."""
    params = make_params(torch.bfloat16, [(5000,), (3,), (70,)])
    groups = [
        {"params": [p], "param_rounding": m}
        for p, m in zip(params, ("kahan", "stochastic", "split"), strict=True)
    ]
    opt = fw.Adam(groups, backend="triton")
    for step in range(4):
        set_grads(params, step)
        opt.param_groups[step % 2]["rounding_seed"] = 2**40 * step
        opt.step()
    assert compiled() == [0, 1, 1]
    assert driver.loaded == 3
    assert [name for name, _, _ in driver.launches] == ["decide_kernel", "update_kernel", "finish_kernel"] * 4


def test_clipping_takes_three_launches_and_compiles_once(driver):
    params = make_params(torch.float32, [(5000,)] * 30)
    opt = fw.RAdam(params, backend="triton", max_grad_norm=1.0)
    for step in range(3):
        set_grads(params, step)
        opt.max_grad_norm = 1.0 + step
        opt.step()
    assert compiled() == [1, 1, 1]
    names = [name for name, _, _ in driver.launches]
    assert names == ["measure_kernel", "decide_kernel", "update_kernel"] * 3
    assert all(programs == 1 for name, programs, _ in driver.launches if name == "decide_kernel")


def test_layers_take_two_more_launches_and_compile_once(driver):
    """Nesterov's form, rates and decay are not compiled in."""
    params = make_params(torch.float32, [(50, 100), (3,), (4, 9)])
    opt = fw.AdamP(params, backend="triton")
    for step in range(3):
        set_grads(params, step)
        opt.param_groups[0]["nesterov"] = step == 1
        opt.param_groups[0]["delta"] = 0.1 * step
        opt.step()
    names = [name for name, _, _ in driver.launches]
    assert names == ["decide_kernel", "stage1_kernel", "reduce_layers_kernel", "stage2_kernel"] * 3
    assert driver.loaded == 4


@pytest.mark.parametrize(
    ("cls", "update"),
    [
        (fw.Adam, ["update_kernel", "finish_kernel"]),
        (fw.AdamP, ["stage1_kernel", "reduce_layers_kernel", "stage2_kernel"]),
    ],
)
def test_spheres_take_one_more_launch_and_compile_once(driver, cls, update):
    """Whatever number of groups, norms and tensors."""
    params = make_params(torch.float32, [(50, 100), (3,), (4, 9)])
    opt = cls([{"params": [p], "projection": "sphere"} for p in params[:2]], backend="triton")
    opt.add_param_group({"params": params[2:]})
    for step in range(3):
        set_grads(params, step)
        opt.param_groups[1]["radius"] = 1.0 + step
        opt.step()
    assert [name for name, _, _ in driver.launches] == ["decide_kernel", *update, "rescale_kernel"] * 3
    assert driver.loaded == 2 + len(update)
    opt.param_groups[0]["projection"] = None
    opt.param_groups[1].update(projection=None, radius=None)
    opt.step()
    assert [name for name, _, _ in driver.launches][-1] == update[-1]


def test_init_state_compiles_and_loads_what_steps_may_need(driver):
    """A graph cannot be captured over a compilation, whatever the settings are by then."""
    params = make_params(torch.float32, [(5000,)])
    opt = fw.SGD(params, momentum=0.9, backend="triton")
    set_grads(params, 0)
    opt.init_state()
    assert compiled() == [1, 1, 2]
    assert driver.loaded == 5
    assert driver.launches == []
    for clip in (None, 1.0):
        opt.max_grad_norm = clip
        opt.step()
    assert compiled() == [1, 1, 2]
    assert driver.loaded == 5


def test_later_steps_launch_the_compiled_kernels(driver, monkeypatch):
    """With the arguments of a launch by Triton, which looks kernels up and compares all globals each time."""
    params = make_params(torch.float32, [(5000,)])
    opt = fw.SGD(params, backend="triton", telemetry=False)
    set_grads(params, 0)
    opt.step()
    plan, backend = opt.session.plan, opt.session.backend
    first = list(driver.launches)
    column = plan.step_column().view(torch.int64)
    for _, kernel, programs, constants in backend._launches(plan, False):
        kernel[(programs,)](column, **constants)
    assert len(first) == 2
    assert len(driver.launches) == 4
    for ours, theirs in zip(first, driver.launches[2:], strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2][0].data_ptr() == theirs[2][0].data_ptr()
        assert ours[2][1:] == theirs[2][1:]

    def run(self, *_, **__):
        raise AssertionError("looked up again")

    monkeypatch.setattr(triton.JITFunction, "run", run)
    set_grads(params, 1)
    opt.step()
    assert [name for name, _, _ in driver.launches[4:]] == ["decide_kernel", "update_kernel"]
    # other kernels are looked up
    opt.max_grad_norm = 1.0
    with pytest.raises(AssertionError, match="looked up again"):
        opt.step()


CHANGES = {
    "rule": "RAdam",
    "kinds": ((BF16, BF16, 2, F32, 0),),
    "n_chunks": 2,
    "n_tiles": 2,
    "rows": [None] * 300,
    "record": {"ring_buffer": torch.zeros(1)},
    "average": ("ema",),
    "groups": SimpleNamespace(has_spheres=True),
    "reduction": object(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_kept_launches_follow_the_plan(monkeypatch, name):
    """Without a device: a launch stands for itself."""
    monkeypatch.setattr(launch, "_bind", lambda column, *launch: launch)
    column = torch.zeros(8, dtype=torch.uint8)
    properties = {
        "step_column": lambda: column,
        "device": column.device,
        **{"rule": "Adam", "kinds": ((F32, F32, 2, F32, 0),), "n_chunks": 1, "n_tiles": 1, "rows": [None]},
        **{"record": {"ring_buffer": None}, "average": (None,), "groups": SimpleNamespace(has_spheres=False)},
        "reduction": None,
    }
    plan, other = (SimpleNamespace(**{**properties, **change}) for change in ({}, {name: CHANGES[name]}))
    backend = launch.TritonBackend(8)
    first = backend._bound_launches(plan, False)
    assert backend._bound_launches(plan, False) is first
    for one in (other, plan):
        launches = [(stage, tuple(launch)) for stage, *launch in backend._launches(one, False)]
        assert backend._bound_launches(one, False) == launches
    assert backend._bound_launches(other, False) != first


def test_a_kernel_that_writes_nothing_is_found_out(driver):
    with pytest.raises(RuntimeError, match="a sum of 528 gives 0"):
        check_kernel(torch.device("cpu"))


@pytest.mark.parametrize("operation", ["perturb", "finish", "combine"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["float32", "float64", "bfloat16"])
def test_vector_operations_move_16_bytes_at_a_time_and_spill_nothing(dtype, operation):
    constants = launch.vector_constants(operation, (dtype,), dtype == F64)
    ptx, numbers = compile_kernel(vectors.vector_kernel, constants, 90)
    assert numbers["stack"] == numbers["spills"] == 0, numbers
    # the snapshot, the vector and the scale; gradients and basis; or the vector and the basis
    assert wide_bytes(ptx, "ld") >= 3 * 16
    assert wide_bytes(ptx, "st") >= 16


@pytest.mark.parametrize(("rule", "n_states"), [("Adam", 2), ("Adam", 3), ("RAdam", 2), ("SGD", 1)])
def test_the_preconditioner_moves_16_bytes_at_a_time_and_spills_nothing(rule, n_states):
    constants = launch.preconditioner_constants(rule, ((F32, F32, n_states, F32, 0),), False)
    ptx, numbers = compile_kernel(preconditioner.preconditioner_kernel, constants, 90)
    assert numbers["spills"] == 0, numbers
    assert wide_bytes(ptx, "ld") >= 16 * (2 + n_states if rule != "SGD" else 0)
    assert wide_bytes(ptx, "st") >= 2 * 16
