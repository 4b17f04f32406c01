"""Roofline model of a step on a GPU: bytes, issue, FP64 and latency of each kernel, and their times.

A kernel takes the longest of the four times, and its launch. All times are predictions; nothing is measured.
``docs/roofline.md`` compares them with times of an H100 and an H200.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from .. import _checks as check
from .chunks import BLOCK_THREADS, CHUNK, TILE_BYTES, threads_for

# share of the speed of a copy that the kernels reach; calibrated: the update of Adam on 10 x 16M took 1,503
# us on an H100, and its bytes take 1,489 at the speed of a copy
OF_COPY = 0.99
# assumption: from the end of a kernel to the first instruction of the next one in the same stream
LAUNCH_US = 2.5
# assumption: latencies of an H100 without load, for all devices, as no source was found for the others
L2_NS, MEMORY_NS = 270.0, 600.0
# warp schedulers of a multiprocessor, each of which issues an instruction per clock (CUDA C++ Programming
# Guide, "Compute Capabilities": 4 for all of these devices)
WARPS_PER_CLOCK = 4
WARP = 32


@dataclass(frozen=True)
class Device:
    """Speeds of a GPU.

    Attributes:
        name: Name, as ``find_device`` takes it.
        sms: Multiprocessors.
        ghz: Clock, 10^9 per second.
        copy: Speed of a copy in device memory, 10^9 bytes read and written per second.
        fp64: FP64 operations per clock and multiprocessor.
        conversions: Conversions between float32 and float64 per clock and multiprocessor.
        memory: Memory, 10^9 bytes.
        source: Where the speed of a copy comes from.
    """

    name: str
    sms: int
    ghz: float
    copy: float
    fp64: int
    conversions: int
    memory: float
    source: str


# Multiprocessors, clocks and memory are those that the vendor states, but for the clocks of H100, H200 and
# B200, whose value under load is an assumption. FP64: CUDA C++ Programming Guide, "Compute Capabilities" 7.5
# to 10.0; 2 for 12.0 is an assumption, from 1/64 of the float32 rate. Conversions: the guide's "Throughput of
# Native Arithmetic Instructions", row "Type conversions from and to 64-bit types"; for 10.0 and 12.0 an
# assumption.
_TABLE = (
    Device("T4", 40, 1.59, 240, 2, 2, 16, "assumption: 0.75 of the peak of 320, as its memory has ECC"),
    Device(
        "A100", 108, 1.41, 1820, 32, 16, 80, "0.89 of the peak of 2,039, as in mli/transformers-benchmarks#4"
    ),
    Device("H100", 132, 1.755, 3009, 64, 16, 80, "measured by this project"),
    Device("H200", 132, 1.755, 4270, 64, 16, 141, "measured by this project"),
    Device("B200", 148, 1.755, 6890, 64, 16, 180, "assumption: 0.90 of the peak of 7,672 in pytorch/ao#4002"),
    Device("RTX 4090", 128, 2.52, 920, 2, 2, 24, "918 to 924 measured in tinygrad/open-gpu-kernel-modules#6"),
    Device("RTX 5090", 170, 2.407, 1635, 2, 2, 32, "assumption: 0.91 of the peak of 1,792, as the RTX 4090"),
)
DEVICES = {device.name: device for device in _TABLE}


def find_device(name: str, owner: str = "find_device") -> Device:
    """Return the device of a name such as ``"H100"``, ``"rtx4090"`` or ``"NVIDIA H100 80GB HBM3"``.

    Raises:
        ValueError: If the name of no known device is a part of it.
    """
    text = str(name).lower()
    for device in DEVICES.values():
        word = device.name.lower().replace("rtx ", "")
        # no part of a longer word or number, such as the t4 of a T400 or the h200 of a GH200
        before = r"(?<![0-9])" if word[0].isdigit() else r"(?<![0-9a-z])"
        if re.search(rf"{before}{word}(?![0-9])", text):
            return device
    check.fail(owner, "gpu", f"be one of {', '.join(DEVICES)}", name)


@dataclass(frozen=True)
class Work:
    """Work of a kernel beside its bytes, per element or for all of them.

    Attributes:
        instructions: Instructions that a thread issues.
        fp64: FP64 operations.
        conversions: Conversions between float32 and float64.
    """

    instructions: float = 0.0
    fp64: float = 0.0
    conversions: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Return the work of both."""
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, count: float) -> Work:
        """Return the work of so many elements."""
        return Work(*(getattr(self, f.name) * count for f in fields(self)))


# Instructions per element of a float32 and of a 16-bit parameter, by kernel and number of states; more states
# count as the last. Counted in the machine code of nvcc 13.0 for sm_90, in the loop with the widest accesses.
# Upper bounds: branches that are skipped, such as the average and the sphere, are counted.
INSTRUCTIONS: dict[str, tuple[tuple[float, float], ...]] = {
    "measure": ((10, 11),),
    "update": ((20, 54), (25, 60), (62, 103), (108, 110)),
    "stage1": ((42, 44), (46, 48), (95, 91)),
    "update of layers": ((28, 35), (29, 35), (70, 71)),
    "rescale": ((15, 21),),
}
# The norms of a gradient element, on top of the instructions above: seven for its square in a pair of floats,
# one for its magnitude, and a quarter of the eight that add four magnitudes to another pair.
NORMS = Work(10)
# one product that is summed in double, and the conversion of its factor
SUM = Work(fp64=1.0, conversions=1.0)


def work_of(kernel: str, n_states: int, itemsize: int) -> Work:
    """Return the work per element of a kernel, without norms and sums.

    Args:
        kernel: Key of ``INSTRUCTIONS``.
        n_states: Number of states that it reads.
        itemsize: Bytes of a parameter; all arithmetic of float64 parameters is FP64.
    """
    counts = INSTRUCTIONS[kernel]
    wide, narrow = counts[min(n_states, len(counts) - 1)]
    return Work(narrow if itemsize == 2 else wide, fp64=wide if itemsize == 8 else 0.0)


@dataclass(frozen=True)
class Kernel:
    """One launch of a step.

    Attributes:
        name: Its name in ``csrc/cuda``, such as ``"update"``.
        read: Bytes that it reads of parameters, gradients, states and averages.
        written: Bytes that it writes to them.
        work: Work on all elements.
    """

    name: str
    read: int = 0
    written: int = 0
    work: Work = Work()

    def __add__(self, other: Kernel) -> Kernel:
        """Return the launch that does both."""
        return Kernel(self.name, self.read + other.read, self.written + other.written, self.work + other.work)

    def scaled(self, numel: int, before: int) -> Kernel:
        """Return the launch for ``numel`` elements in the place of ``before``."""
        read, written = (count * numel // before for count in (self.read, self.written))
        return Kernel(self.name, read, written, self.work * (numel / before))


@dataclass(frozen=True)
class Units:
    """Units of work that the blocks of a step share.

    Attributes:
        rows: Tensors.
        chunks: Chunks of them; channels are not regarded.
        tiles: Tiles of these, which a block of the update takes.
        tile: Elements of the longest tile.
        warps: Warps of a block of ``measure`` and ``update``, fewer than usual if all tensors are small.
    """

    rows: int
    chunks: int
    tiles: int
    tile: int
    warps: int = BLOCK_THREADS // WARP

    @staticmethod
    def of(sizes: Sequence[int], tile: int) -> Units:
        """Return the units of tensors of some numbers of elements."""
        chunks, tiles = (sum(math.ceil(size / unit) for size in sizes) for unit in (CHUNK, tile))
        # a step without tiles has blocks of the usual size
        longest = max(sizes, default=0) * (TILE_BYTES // tile) if tile < CHUNK else TILE_BYTES
        return Units(len(sizes), chunks, tiles, tile, threads_for(longest) // WARP)


@dataclass(frozen=True)
class KernelTime:
    """Predicted times of one launch, in microseconds.

    Attributes:
        name: Name of the kernel.
        bytes_us: Its bytes at ``OF_COPY`` of the speed of a copy.
        issue_us: Its instructions at one per clock and warp scheduler.
        fp64_us: Its FP64 operations and conversions, which alternate.
        latency_us: Reads that wait for each other, of all blocks that follow one another.
    """

    name: str
    bytes_us: float
    issue_us: float
    fp64_us: float
    latency_us: float

    @property
    def terms(self) -> tuple[float, float, float, float]:
        """The four terms, in the order of the attributes."""
        return self.bytes_us, self.issue_us, self.fp64_us, self.latency_us

    @property
    def bound(self) -> str:
        """Name of the longest term: ``"bytes"``, ``"issue"``, ``"FP64"`` or ``"latency"``."""
        return ("bytes", "issue", "FP64", "latency")[self.terms.index(max(self.terms))]

    @property
    def us(self) -> float:
        """The longest term and the launch."""
        return max(self.terms) + LAUNCH_US


@dataclass(frozen=True)
class Prediction:
    """Predicted time of a step.

    Attributes:
        device: The GPU.
        kernels: Times of the launches, in order.
        held: Bytes of parameters, gradients, states and averages.
    """

    device: Device
    kernels: tuple[KernelTime, ...]
    held: int

    @property
    def us(self) -> float:
        """Microseconds of the step on the device."""
        return sum(kernel.us for kernel in self.kernels)

    @property
    def fits(self) -> bool:
        """Whether parameters, gradients, states and averages fit into the memory, without activations."""
        return self.held <= self.device.memory * 1e9

    def __str__(self) -> str:
        """Return one line per launch, with its longest term, and the sum."""
        lines = [f"{k.name:8} {k.us:10.1f} us  {k.bound}" for k in self.kernels]
        total = f"{'step':8} {self.us:10.1f} us  predicted for {self.device.name}"
        return "\n".join([*lines, total if self.fits else f"{total}, which lacks the memory"])


def predict(kernels: Sequence[Kernel], units: Units, held: int, device: Device) -> Prediction:
    """Return the predicted time of a step of the given launches on a device."""
    measured = any(kernel.name == "measure" for kernel in kernels)
    times = tuple(
        time_of(kernel, latency_us(kernel.name, units, measured, device), device) for kernel in kernels
    )
    return Prediction(device, times, held)


def time_of(kernel: Kernel, latency: float, device: Device) -> KernelTime:
    """Return the four terms of a launch, given its latency in microseconds."""
    # 10^3 clocks of all multiprocessors per microsecond
    clocks = device.sms * device.ghz * 1e3
    return KernelTime(
        kernel.name,
        bytes_us=(kernel.read + kernel.written) / (OF_COPY * device.copy * 1e3),
        issue_us=kernel.work.instructions / (WARP * WARPS_PER_CLOCK * clocks),
        fp64_us=(kernel.work.fp64 / device.fp64 + kernel.work.conversions / device.conversions) / clocks,
        latency_us=latency,
    )


def latency_us(name: str, units: Units, measured: bool, device: Device) -> float:
    """Return the time of the reads that wait for each other, in microseconds.

    Blocks that find no place on a multiprocessor begin when others end.

    Args:
        name: Name of the kernel.
        units: Units of work of the step.
        measured: Whether the step measures the norm first, so that ``decide`` sums over the chunks.
        device: The GPU.
    """
    # a partial sum of three numbers per chunk, 128 threads with eight reads each in flight
    sum_of_chunks = 3 * units.chunks / (128 * 8)
    # addresses, types and scalars of a chunk, each found through the one before
    prologue = 6 * L2_NS + MEMORY_NS
    # registers leave room for 20 warps
    small = 20 // units.warps
    blocks, per_sm, block_ns = {
        "measure": (units.chunks, small, prologue),
        # calibrated: 8.2 us for 300 tensors on an H100
        "decide": (units.rows / 512, 1, (21 + sum_of_chunks * measured) * L2_NS),
        "stage1": (units.chunks, 4, prologue),
        # 128 threads with four reads each in flight
        "reduce": (units.rows, 4, (8 + units.chunks / max(units.rows, 1) / 512) * L2_NS),
        "update": (units.tiles, small, prologue),
        # each thread sums the tiles of a chunk, four reads in flight; the last block sums over the chunks
        "finish": (
            units.chunks / 128,
            5,
            (8 + sum_of_chunks + units.tiles / max(units.chunks, 1) / 4) * L2_NS,
        ),
        "rescale": (units.chunks, 5, prologue),
    }[name]
    return max(1, math.ceil(blocks / (per_sm * device.sms))) * block_ns / 1e3
