"""The roofline model: what it counts is what a step moves, and its times are those of its formulas."""

from dataclasses import replace

import pytest
import torch
from cases import make_params, set_grads

import fused_warmup as fw
from fused_warmup.plan import roofline, traffic
from fused_warmup.plan.roofline import DEVICES, Kernel, Units, Work, find_device

SHAPES = [(33, 5), (70_000,), (), (0, 4), (1 << 16,)]
STEPS = {
    "adam": (fw.Adam, {}, ["decide", "update", "finish"]),
    "clip": (fw.Adam, {"max_grad_norm": 1.0}, ["measure", "decide", "update"]),
    "no telemetry": (fw.Adam, {"telemetry": False}, ["decide", "update"]),
    "average": (fw.RAdam, {"average": fw.EMA(0.9)}, ["decide", "update", "finish"]),
    "lamb": (fw.LAMB, {}, ["decide", "stage1", "reduce", "update"]),
    "adamp, clip": (fw.AdamP, {"max_grad_norm": 1.0}, ["measure", "decide", "stage1", "reduce", "update"]),
    "sphere": (fw.SGD, {"projection": "sphere", "lr": 0.1}, ["decide", "update", "finish", "rescale"]),
}


def traffic_of(optimizer, shapes=SHAPES, dtype=torch.float32, **options):
    params = make_params(dtype, shapes)
    set_grads(params, 0)
    return optimizer(params, **options).traffic()


@pytest.mark.parametrize(("optimizer", "options", "names"), STEPS.values(), ids=STEPS)
def test_a_prediction_has_the_launches_and_bytes_of_the_step(optimizer, options, names):
    found = traffic_of(optimizer, **options)
    prediction = found.predict("H100")
    assert [kernel.name for kernel in prediction.kernels] == names
    assert len(prediction.kernels) == found.launches
    rate = roofline.OF_COPY * DEVICES["H100"].copy * 1e3
    assert sum(k.bytes_us for k in prediction.kernels) * rate == pytest.approx(found.read + found.written)
    assert prediction.us == pytest.approx(
        sum(max(k.terms) for k in prediction.kernels) + roofline.LAUNCH_US * found.launches
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("optimizer", "options", "names"), STEPS.values(), ids=STEPS)
def test_tensors_of_another_size_cost_what_their_own_plan_has(optimizer, options, names, dtype):
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    resized = traffic_of(optimizer, [(8,)], dtype, **options).resized(sizes)
    real = traffic_of(optimizer, dtype=dtype, **options)
    assert (resized.read, resized.written, resized.numel, resized.held) == (
        *(real.read, real.written),
        *(real.numel, real.held),
    )
    for a, b in zip(resized.kernels, real.kernels, strict=True):
        assert (a.name, a.read, a.written) == (b.name, b.read, b.written)
        assert a.work.instructions == pytest.approx(b.work.instructions)
        assert (a.work.fp64, a.work.conversions) == pytest.approx((b.work.fp64, b.work.conversions))
    assert (resized.units.rows, resized.units.tiles) == (real.units.rows, real.units.tiles)


def test_what_a_step_holds():
    """Parameter, gradient, two states and an average of 4 bytes; of bfloat16 the first two have 2."""
    assert traffic_of(fw.Adam, [(100,)]).held == 1600
    assert traffic_of(fw.Adam, [(100,)], average=fw.EMA(0.9)).held == 2000
    assert traffic_of(fw.Adam, [(100,)], torch.bfloat16).held == 1200
    seven = traffic_of(fw.Adam, [(8,)]).resized([7_000_000_000])
    assert seven.held == 112_000_000_000
    assert {name: seven.predict(name).fits for name in ("H100", "H200")} == {"H100": False, "H200": True}
    assert str(seven.predict("H100")).endswith("which lacks the memory")


def test_the_four_terms():
    """Of a device with round speeds: 2 SMs at 1 GHz, 10 GB/s, 2 FP64 operations and a conversion per clock."""
    device = replace(DEVICES["T4"], sms=2, ghz=1.0, copy=10 / roofline.OF_COPY, fp64=2, conversions=1)
    kernel = Kernel("update", 8_000, 2_000, Work(256_000, 4_000, 2_000))
    time = roofline.time_of(kernel, 0.5, device)
    assert time.terms == pytest.approx((1.0, 1.0, 2.0, 0.5))
    assert time.bound == "FP64"
    assert time.us == pytest.approx(2.0 + roofline.LAUNCH_US)


def test_blocks_without_a_place_wait():
    """Five blocks of an update share an SM of the H100; the 661st begins when another ends."""
    h100 = DEVICES["H100"]
    one, two = (
        roofline.latency_us("update", Units(1, 1, tiles, 1), False, h100) for tiles in (5 * 132, 5 * 132 + 1)
    )
    assert one == pytest.approx((6 * roofline.L2_NS + roofline.MEMORY_NS) / 1e3)
    assert two == pytest.approx(2 * one)


def test_blocks_of_small_tensors_are_small():
    """Blocks of one warp, of which 20 share an SM, for tensors of up to 512 bytes; else of four."""
    assert [Units.of([size, 1], 2048).warps for size in (128, 129, 256, 512, 10**9)] == [1, 2, 2, 4, 4]
    assert Units.of([128], 4096).warps == 1
    assert Units.of([8], 32_768).warps == 4
    h100 = DEVICES["H100"]
    one, two = (
        roofline.latency_us("update", Units(1, 1, tiles, 2048, 1), False, h100) for tiles in (2640, 2641)
    )
    assert two == pytest.approx(2 * one)


def total_work(found):
    return sum((kernel.work for kernel in found.kernels), Work())


def test_norms_are_one_number(monkeypatch):
    """Other sums change the work of the kernel that has the norms, once per element, and nothing else."""
    before = {name: traffic_of(opt, **options) for name, (opt, options, _) in STEPS.items()}
    monkeypatch.setattr(traffic, "NORMS", roofline.NORMS + Work(7, 5, 3))
    for name, (optimizer, options, _) in STEPS.items():
        after = traffic_of(optimizer, **options)
        assert (after.read, after.written) == (before[name].read, before[name].written)
        elements = 0 if name == "no telemetry" else after.numel
        expected = total_work(before[name]) + Work(7, 5, 3) * elements
        assert total_work(after).instructions == pytest.approx(expected.instructions)
        assert total_work(after).fp64 == pytest.approx(expected.fp64)
        assert total_work(after).conversions == pytest.approx(expected.conversions)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla T4", "T4"),
        ("rtx4090", "RTX 4090"),
        ("5090", "RTX 5090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
    ],
)
def test_names_of_devices(text, name):
    assert find_device(text).name == name


@pytest.mark.parametrize("text", ["", "V100", "T400", "GH200", "NVIDIA L40", "14090"])
def test_an_unknown_device_lists_the_known_ones(text):
    with pytest.raises(ValueError, match=r"^Traffic\.predict: gpu must be one of T4, A100, .*RTX 5090, got"):
        traffic_of(fw.SGD).predict(text)


def test_calibration():
    """Two kernels of an H100 that docs/gpu.md has: the update of 10 x 16M took 1,503 us, decide of 300 rows 8.2."""
    found = traffic_of(fw.Adam, [(8,)], telemetry=False)
    _, update = found.resized([16_000_000] * 10).predict("H100").kernels
    decide, _ = found.resized([6_667] * 300).predict("H100").kernels
    assert update.us == pytest.approx(1503, rel=0.005)
    assert decide.us == pytest.approx(8.2, rel=0.02)
