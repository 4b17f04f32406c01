"""The machine that the tests of the real PTX run on: it finds each planted defect, and nothing in correct kernels."""

import ctypes
import re

import pytest
import torch
from ptx import build, run
from ptx.translate import UnknownPtx, parse

pytestmark = pytest.mark.skipif(build.NVCC is None, reason="nvcc is not on PATH, so there is no PTX")
BLOCKS, THREADS, ROWS = 4, 128, 9


@pytest.fixture(scope="module")
def planted():
    """The parsed PTX of all planted kernels."""
    return parse(build.cuda_ptx(build.HERE / "planted.cu", build.OLDEST))


@pytest.fixture(params=[("forward", 1), ("backward", 1), ("random", 1), ("random", 2)], ids=str)
def order(request):
    run.configure(*request.param, races=True)
    yield
    run.configure()


def launch(planted, name, *arguments):
    """Run a kernel on tensors and numbers."""
    values = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a) for a in arguments
    ]
    kernel = run.Kernel(planted, name)
    assert len(kernel.sizes) == len(values)
    kernel.launch(BLOCKS, THREADS, [ctypes.addressof(value) for value in values])


def inputs():
    return torch.arange(ROWS * THREADS, dtype=torch.float32) % 7, torch.zeros(ROWS * THREADS)


def test_correct_sums(planted, order):
    x, y = inputs()
    launch(planted, "sums_of_rows", x, y, ROWS)
    assert torch.equal(y[:ROWS], x.view(ROWS, THREADS).sum(1))


def test_the_last_block_sees_all_others(planted, order):
    x, y = inputs()
    launch(planted, "last_block", x, torch.zeros(BLOCKS), y, torch.zeros(1, dtype=torch.int32))
    assert torch.equal(y[:BLOCKS], x[:BLOCKS])


def test_own_elements_and_copies_of_one_value(planted, order):
    x, y = inputs()
    launch(planted, "own_elements", y)
    assert torch.equal(y[: BLOCKS * THREADS].view(BLOCKS, THREADS)[:, 0], torch.arange(4.0))
    launch(planted, "copies_of_one_value", y)
    assert torch.equal(y[: BLOCKS * THREADS], torch.full((BLOCKS * THREADS,), float(BLOCKS)))
    launch(planted, "vectors_between_their_places", x, y, 4)


# what is found, for kernels of x, y and a number; of x, parts, y and a counter; and of y
ROW_DEFECTS = {
    "read_before_all_wrote": "(read after write|write after read) in .*of_warp|read before it is written",
    "write_before_all_read": "(read after write|write after read) in .*of_warp",
    "barrier_of_half_a_block": "threads wait at different places|threads have returned",
    "vectors_between_their_places": "not aligned.* of 16 bytes",
}
FENCE_DEFECTS = (
    *("no_fence_before", "no_fence_after", "fence_of_another"),
    *("write_after_the_fence", "read_before_the_barrier"),
)
OWN_DEFECTS = {
    "same_elements": "write after write in global memory",
    "neighbours": "write after write in global memory",
    "read_of_another_block": "(write after read|read after write) in global memory",
    "several_values": "write after write in .*value",
    "never_written": "read before it is written",
    "returned_before_a_barrier": "threads have returned while others wait",
    "shuffle_of_half_a_warp": "threads wait at different places|threads have returned",
    "different_shuffles": "threads wait at different places",
    "part_of_a_warp": "a part of a warp",
}


@pytest.mark.parametrize("name", ROW_DEFECTS)
def test_defects_of_barriers_and_vectors(planted, order, name):
    with pytest.raises(run.Finding, match=ROW_DEFECTS[name]):
        launch(planted, name, *inputs(), ROWS)


@pytest.mark.parametrize("name", FENCE_DEFECTS)
def test_missing_fences(planted, order, name):
    x, y = inputs()
    with pytest.raises(run.Finding, match=r"(read after write|write after read) in global memory"):
        launch(planted, name, x, torch.zeros(BLOCKS), y, torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("name", OWN_DEFECTS)
def test_defects_of_shared_and_global_memory(planted, order, name):
    with pytest.raises(run.Finding, match=OWN_DEFECTS[name]):
        launch(planted, name, inputs()[1])


def test_addresses(planted, order):
    y = inputs()[1]
    with pytest.raises(run.Finding, match="outside of the shared variables"):
        launch(planted, "beyond_the_variable", y, 1)
    with pytest.raises(run.Finding, match="no address of global memory"):
        launch(planted, "null_pointer", y, 0)
    with pytest.raises(run.Finding, match="division by zero"):
        launch(planted, "divided_by_zero", y, 0)


def test_a_finding_does_not_disturb_the_next_launch(planted, order):
    with pytest.raises(run.Finding):
        launch(planted, "returned_before_a_barrier", inputs()[1])
    test_correct_sums(planted, order)


def test_races_of_global_memory_are_looked_for_where_asked(planted):
    launch(planted, "same_elements", inputs()[1])


@pytest.mark.parametrize("name", ["sums_of_rows", "last_block"])
def test_a_barrier_or_fence_can_be_left_out(planted, order, name):
    """Each of them is needed, in any order of the threads."""

    def run_once():
        x, y = inputs()
        counter = torch.zeros(1, dtype=torch.int32)
        launch(planted, name, *((x, y, ROWS) if name == "sums_of_rows" else (x, torch.zeros(4), y, counter)))

    kernel = run.Kernel(planted, name)
    assert (len(kernel.barriers), len(kernel.fences)) == ((2, 0) if name == "sums_of_rows" else (1, 2))
    for line in kernel.barriers + kernel.fences:
        with kernel.without(line), pytest.raises(run.Finding, match=r"race|read before it is written"):
            run_once()
    run_once()


def test_unknown_ptx_stops_the_translation():
    text = """
    .visible .entry odd(.param .u64 odd_param_0)
    {
        .reg .b32 %r<3>;
        INSTRUCTION;
        ret;
    }
    """
    parse(text.replace("INSTRUCTION", "add.s32 %r1, %r2, 7")).translate("odd")
    for instruction in (
        "frobnicate.b32 %r1, %r2",
        "add.rn.ftz.f32 %r1, %r2, %r2",
        "add.f32 %r1, %r2, %r2",
        "add.s32 %r1, %r9, 1",
        "add.s64 %r1, %r2, 1",
        "bar.sync 1",
        "atom.global.release.add.u32 %r1, [%r2], 1",
        "cvt.rz.f32.f64 %r1, %r2",
    ):
        with pytest.raises(UnknownPtx, match=re.escape(f"line 5: {instruction}")):
            parse(text.replace("INSTRUCTION", instruction)).translate("odd")
