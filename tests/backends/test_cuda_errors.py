"""What the CUDA backend does where the runtime returns errors, and what it leaves behind on other devices.

The kernels run on the host; ``cuda_on_host.h`` returns the errors of a real runtime where a test asks for them.
"""

import ctypes
import shutil
import sys

import cuda_on_host
import pytest
import torch
from cases import assert_same_bits, make_params, set_grads
from plan.test_capture import SHAPES, capture, fill_grads  # noqa: F401

import fused_warmup as fw
from fused_warmup import backends
from fused_warmup.backends.native import CudaBackend
from fused_warmup.optim import session
from fused_warmup.plan import device_buffers

ILLEGAL_ADDRESS, OUT_OF_RESOURCES, INVALID_HANDLE = 700, 701, 400
NO_IMAGE, UNSUPPORTED_PTX = 209, 222


class Runtime:
    """The emulated runtime behind a module.

    Args:
        module: A module of ``cuda_on_host``.
    """

    def __init__(self, module):
        self.module = module
        self.emulation = ctypes.CDLL(module.__file__)

    def number(self, name):
        return ctypes.c_int.in_dll(self.emulation, f"cuda_on_host_{name}")

    def numbers(self, name):
        return (ctypes.c_int * 2).in_dll(self.emulation, f"cuda_on_host_{name}")

    def reset(self, device=0):
        """Begin anew, with a context on a device; -1 for none."""
        self.emulation.cuda_on_host_reset(device)

    def fail(self, call, error, after=0):
        """Let a call return an error after some that work."""
        self.emulation.cuda_on_host_fail(call.encode(), after, error)


@pytest.fixture
def runtime(tmp_path_factory, monkeypatch):
    """A library of its own, which has loaded no kernel yet, under every optimizer."""
    # kept until all tests have run: the loader takes a file with the inode of a deleted one for that one
    folder = tmp_path_factory.mktemp("cuda")
    copy = folder / "_cuda.so"
    shutil.copy(cuda_on_host.cached().__file__, copy)
    found = Runtime(cuda_on_host.load(copy, folder.name))
    monkeypatch.setattr(session, "resolve", lambda name, device: CudaBackend(found.module))
    monkeypatch.setattr(device_buffers, "is_mirrored", lambda device: True)
    return found


def values(opt):
    """Copies of parameters, states and counts."""
    tensors = [t for p in opt.session.params for t in (p, *opt.state[p].values())]
    return [t.detach().clone() for t in (*tensors, opt.session.counters, opt.telemetry.rows())]


def assert_same_values(a, b):
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert_same_bits(f"value {i}", x, y)


# the probe


@pytest.fixture
def cuda(runtime, monkeypatch):
    """The emulated runtime as the extension of a machine with two devices."""
    monkeypatch.setitem(sys.modules, "fused_warmup._cuda", runtime.module)
    monkeypatch.setattr(fw, "_cuda", runtime.module, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends._probed.cache_clear()
    yield runtime
    backends._probed.cache_clear()


def on(index):
    return torch.device("cuda", index)


def test_devices_of_one_machine_may_differ(cuda):
    """Automatic selection takes another backend where these kernels do not run, and only there."""
    cuda.numbers("capability")[1] = 61
    assert backends.unavailable_reason("cuda", on(0)) is None
    assert backends.resolve("auto", on(0)).name == "cuda"
    assert backends.resolve("auto", on(1)).name in ("triton", "reference")
    with pytest.raises(RuntimeError) as caught:
        backends.resolve("cuda", on(1))
    assert str(caught.value).startswith(
        'backend="cuda" is unavailable: cudaFuncGetAttributes: '
        "cudaErrorNoKernelImageForDevice, no kernel image is available for execution on the device. "
        f"The extension was built with CUDA 13.0 for compute capability {cuda_on_host.ARCHS}; "
        "the driver supports CUDA 13.0; cuda:1 has compute capability 6.1. Available: reference, "
    )
    assert "cuda" not in str(caught.value).rpartition("Available: ")[2]


def test_a_driver_older_than_the_toolkit_is_named(cuda):
    """Also without a device, where no context is made for the answer."""
    cuda.reset(-1)
    cuda.number("driver").value = 12040
    for device in (None, on(0)):
        reason = backends.unavailable_reason("cuda", device)
        assert "cudaErrorInsufficientDriver, CUDA driver version is insufficient" in reason
        assert "built with CUDA 13.0 for" in reason
        assert "the driver supports CUDA 12.4" in reason
    assert backends.resolve("auto", on(0)).name != "cuda"
    assert list(cuda.numbers("contexts")) == [0, 0]


@pytest.mark.parametrize(
    ("call", "error"), [("cudaFuncGetAttributes", UNSUPPORTED_PTX), ("cudaSetDevice", 101)], ids=str
)
def test_whatever_keeps_a_kernel_from_loading_is_a_reason(cuda, call, error):
    cuda.fail(call, error)
    reason = backends.unavailable_reason("cuda", on(1))
    assert reason.startswith(call)
    assert "cuda:1 has compute capability 9.0" in reason


def test_a_device_is_probed_once(cuda, monkeypatch):
    """An error later on is one of a step."""
    assert backends.unavailable_reason("cuda", on(0)) is None
    cuda.fail("cudaFuncGetAttributes", NO_IMAGE)
    assert backends.unavailable_reason("cuda", on(0)) is None
    assert "cudaErrorNoKernelImageForDevice" in backends.unavailable_reason("cuda", on(1))


def test_without_a_device_no_context_is_made(cuda):
    cuda.reset(-1)
    assert backends.unavailable_reason("cuda") is None
    assert "cuda" in fw.available_backends()
    assert list(cuda.numbers("contexts")) == [0, 0]


def test_a_moved_parameter_has_the_backend_of_its_device(monkeypatch):
    asked = []

    def resolve(name, device):
        asked.append(device)
        return CudaBackend(cuda_on_host.cached())

    monkeypatch.setattr(session, "resolve", resolve)
    opt = fw.SGD([torch.zeros(2, requires_grad=True)])
    for index in (0, 1, 1):
        opt.session.resolve(on(index))
    assert asked == [torch.device("cpu"), on(0), on(1)]


# contexts


@pytest.mark.parametrize("before", [-1, 0, 1])
@pytest.mark.parametrize("device", [0, 1])
def test_no_context_on_another_device(runtime, device, before):
    """A step leaves the context of the thread as it was, and makes none but that of its own device."""
    for act in (runtime.module.probe, lambda index: runtime.module.prepare(0, index, False)):
        runtime.reset(before)
        # a second call finds the kernels loaded
        for _ in range(2):
            act(device)
            assert list(runtime.numbers("contexts")) == [int(i in (before, device)) for i in range(2)]
            assert runtime.number("device").value == max(before, 0)
        current = ctypes.c_void_p(1)
        runtime.emulation.cuda_on_host_get(ctypes.byref(current))
        assert (current.value is None) == (before < 0)


def test_a_failing_call_restores_the_context_too(runtime):
    runtime.reset(0)
    runtime.fail("cudaOccupancyMaxActiveBlocksPerMultiprocessor", NO_IMAGE)
    with pytest.raises(RuntimeError, match="cudaErrorNoKernelImageForDevice"):
        runtime.module.prepare(0, 1, False)
    assert runtime.number("device").value == 0


# steps


def trained(runtime, steps=1, **options):
    runtime.reset()
    params = make_params(torch.float32, SHAPES)
    opt = fw.Adam(params, lr=0.1, average=fw.EMA(0.9), **options)
    for step in range(steps):
        fill_grads(params, step)
        opt.step()
    return params, opt


def test_an_error_of_another_call_is_not_one_of_a_step(runtime):
    """The step after it queues all of its launches; before, it queued one and raised."""
    params, opt = trained(runtime)
    _, plain = trained(runtime, 2)
    fill_grads(params, 1)
    # an error that nobody has cleared
    runtime.fail("cudaGetDeviceCount", OUT_OF_RESOURCES)
    assert runtime.emulation.cuda_on_host_count() == OUT_OF_RESOURCES
    opt.step()
    assert_same_values(values(opt), values(plain))
    assert runtime.emulation.cuda_on_host_last_error() == OUT_OF_RESOURCES


def test_a_failing_call_leaves_no_error(runtime):
    runtime.reset()
    with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"):
        runtime.module.prepare(0, 7, False)
    assert runtime.emulation.cuda_on_host_last_error() == 0
    runtime.fail("cudaLaunchKernelEx", INVALID_HANDLE)
    opt = fw.SGD(make_params(torch.float32, SHAPES))
    with pytest.raises(RuntimeError, match="cudaErrorInvalidResourceHandle"):
        opt.step()
    assert runtime.emulation.cuda_on_host_last_error() == 0


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("cudaLaunchKernelEx", INVALID_HANDLE),
        ("cudaGetDevice", INVALID_HANDLE),
    ],
)
def test_a_step_of_which_nothing_was_queued_changes_nothing(runtime, call, error, options):
    """It is not counted and leaves no row, and the same step can be made after it."""
    params, opt = trained(runtime, 2, **options)
    _, plain = trained(runtime, 3, **options)
    fill_grads(params, 2)
    before, rates = values(opt), opt.get_last_lr()
    launches = runtime.number("launches")
    count = launches.value
    runtime.fail(call, error)
    with pytest.raises(
        RuntimeError, match="cudaErrorInvalidResourceHandle, invalid resource handle"
    ) as caught:
        opt.step()
    if call == "cudaLaunchKernelEx":
        assert str(caught.value).endswith("; no launch of this call was queued, so that nothing is changed")
    assert launches.value == count
    assert_same_values(values(opt), before)
    assert opt.get_last_lr() == rates
    opt.step()
    assert launches.value - count == opt.traffic().launches
    assert_same_values(values(opt), values(plain))


def test_kernels_that_do_not_load_fail_before_the_first_launch(runtime):
    """Each of them is asked for before any is launched, one of another kind of parameter too."""
    asked = "cudaOccupancyMaxActiveBlocksPerMultiprocessor"
    for cls, kernels in ((fw.Adam, 7), (fw.LAMB, 9)):
        runtime.reset()
        params = make_params(torch.float32, SHAPES)
        opt = cls(params, lr=0.1)
        set_grads(params, 0)
        launches = runtime.number("launches")
        count = launches.value
        for after in range(kernels):
            runtime.fail(asked, UNSUPPORTED_PTX, after)
            with pytest.raises(RuntimeError, match="cudaErrorUnsupportedPtxVersion"):
                opt.step()
            assert launches.value == count
            assert len(opt.telemetry) == 0
        opt.step()
        assert launches.value - count == opt.traffic().launches


def test_a_kernel_without_room_for_a_block_fails_before_the_first_launch(runtime):
    params = make_params(torch.float32, SHAPES)
    opt = fw.Adam(params)
    set_grads(params, 0)
    runtime.reset()
    runtime.number("blocks").value = 0
    with pytest.raises(RuntimeError, match=r"device 0 must have room for a block of \d+ threads, got none"):
        opt.step()
    assert runtime.number("launches").value == 0


@pytest.mark.parametrize("queued", [1, 2])
def test_a_device_that_fails_in_the_middle_says_what_was_queued(runtime, queued):
    """And that the error may be one of an earlier kernel; the step is not counted on the host."""
    params, opt = trained(runtime, 2)
    fill_grads(params, 2)
    rates = opt.session.last_rates
    runtime.fail("cudaLaunchKernelEx", ILLEGAL_ADDRESS, queued)
    with pytest.raises(RuntimeError) as caught:
        opt.step()
    assert str(caught.value) == (
        "cudaLaunchKernelEx: cudaErrorIllegalAddress, an illegal memory access was encountered. A kernel that "
        "was launched earlier failed, perhaps one of another library; CUDA_LAUNCH_BLOCKING=1 shows which; "
        f"{queued} launches of this call were queued before, so that parameters and states may be updated in "
        "part"
    )
    assert opt.session.last_rates is rates
    assert opt.telemetry._uncopied == 2
    # the context is lost: no later call works, and none launches anything
    count = runtime.number("launches").value
    with pytest.raises(RuntimeError, match=r"cudaErrorIllegalAddress.*CUDA_LAUNCH_BLOCKING=1"):
        opt.step()
    assert runtime.number("launches").value == count


def test_the_gradients_of_a_failed_step_are_let_go(runtime):
    params, opt = trained(runtime, 1)
    runtime.fail("cudaLaunchKernelEx", INVALID_HANDLE)
    released = []
    opt.session.plan.gradients.release = lambda: released.append(True)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidResourceHandle"):
        opt.step()
    assert released
    assert params[0].grad is not None


def test_an_adaptive_schedule_takes_the_loss_of_a_failed_step_once(runtime):
    """Kernels that do not load are found before the loss is recorded."""
    runtime.reset()
    params = make_params(torch.float32, SHAPES)
    schedule = fw.AutoWU(40, 10)
    opt = fw.Adam(params, lr=0.1, schedule=schedule)

    def closure():
        set_grads(params, 0)
        return torch.tensor(1.0)

    runtime.fail("cudaOccupancyMaxActiveBlocksPerMultiprocessor", NO_IMAGE)
    with pytest.raises(RuntimeError, match="cudaErrorNoKernelImageForDevice"):
        opt.step(closure)
    assert schedule.state_dict()["steps"] == 0
    opt.step(closure)
    opt.step(closure)
    assert schedule.state_dict()["steps"] == 2


# captured graphs


def replay(opt, plan):
    """What a replay of a graph does that was captured with a plan."""
    opt.session.backend.step(plan)


def test_last_rates_after_a_replay_that_follows_another_plan(runtime, capture):  # noqa: F811
    """The captured plan and one that was made later write the same rates."""
    params, opt = trained(runtime, 2, schedule=fw.schedules.warmup(10))
    with capture:
        opt.step()
    captured = opt.session.plan
    set_grads(params, 5)
    opt.init_state()
    opt.step()
    assert opt.session.plan is not captured
    for _ in range(3):
        replay(opt, captured)
        assert opt.get_last_lr() == [opt.telemetry.latest()["lr"]]
    set_grads(params, 6)
    opt.step()
    assert opt.get_last_lr() == [opt.telemetry.latest()["lr"]]


def test_last_rates_after_groups_come_and_go(runtime):
    params, opt = trained(runtime)
    assert opt.get_last_lr() == [0.1]
    more = make_params(torch.float32, [(2,)])
    opt.add_param_group({"params": more, "lr": 0.2})
    set_grads(more, 0)
    opt.step()
    assert opt.get_last_lr() == [0.1, 0.2]
    opt.param_groups = opt.param_groups[:1]
    opt.param_groups[0]["lr"] = 0.3
    fill_grads(params, 1)
    opt.step()
    assert opt.get_last_lr() == [0.3]


def test_captured_launches_have_few_arguments(runtime, capture):  # noqa: F811
    """Drivers before CUDA 12.1 take 4 KiB, and a replay sends the arguments anew."""
    runtime.reset()
    params = make_params(torch.float32, [(2,)] * 600)
    opt = fw.SGD(params, telemetry=False)
    set_grads(params, 0)
    sizes = []
    launch = ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
    )(lambda kernel, blocks, threads, count, arguments, bytes_of: sizes.append(sum(bytes_of[:count])) or 0)
    launcher = ctypes.c_void_p.in_dll(runtime.emulation, "cuda_on_host_launcher")
    launcher.value = ctypes.cast(launch, ctypes.c_void_p).value
    opt.step()
    assert max(sizes) > 4096
    sizes.clear()
    with capture:
        opt.step()
    assert len(sizes) == 2
    assert max(sizes) <= 4096
