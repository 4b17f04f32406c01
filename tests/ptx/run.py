"""Run kernels by their PTX on the machine of ``machine.cpp``, in place of a GPU's driver."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ptx import build
from ptx.translate import Module, parse

from fused_warmup import _cpu


class Finding(Exception):
    """Raised for what a kernel does wrong: a race, a barrier that not all threads come to, a wrong address."""


class Entry(ctypes.Structure):
    """The kernel that a library holds, as ``machine.h`` describes it."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kernel", ctypes.c_void_p),
        ("max_threads", ctypes.c_uint),
        ("sizes", ctypes.POINTER(ctypes.c_uint)),
        ("n_params", ctypes.c_uint),
        ("shared", ctypes.c_void_p),
        ("n_shared", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
    )


@functools.cache
def machine() -> ctypes.CDLL:
    """Load the machine, so that the libraries of kernels find it."""
    found = ctypes.CDLL(str(build.machine()), mode=ctypes.RTLD_GLOBAL)
    found.ptx_launch.restype = ctypes.c_char_p
    return found


ORDERS = ("forward", "backward", "random")


def configure(order: str = "forward", seed: int = 1, races: bool = False) -> None:
    """Choose the order of blocks and threads, and whether races of global memory are looked for."""
    machine().ptx_configure(ORDERS.index(order), seed, races)


# where functions begin in csrc/cuda and backends/triton
HEAD = r"(?:def |FW_DEVICE [^(]* \*?|    (?=\w+_kernel\(const )|\) (?=\w+_kernel\(const ))(\w+)\("
# the kernels that have run, and their names
launched: dict[Kernel, str] = {}


class Kernel:
    """A kernel whose PTX can be launched.

    Args:
        module: A parsed PTX text.
        name: The name of the kernel there.
    """

    def __init__(self, module: Module, name: str) -> None:
        self.code = module.translate(name)
        self._lines = module.text.splitlines()
        machine()
        self._library = ctypes.CDLL(str(build.kernel_library(self.code)))
        self.entry = Entry.in_dll(self._library, "entry")

    @property
    def sizes(self) -> list[int]:
        """Bytes of each parameter."""
        return self.entry.sizes[: self.entry.n_params]

    @property
    def barriers(self) -> list[int]:
        """Lines of the barriers of blocks."""
        return sorted({int(line) for line in re.findall(r"\bbarrier\(t, (\d+)\)", self.code)})

    @property
    def fences(self) -> list[int]:
        """Lines of the fences, and of the atomic operations that are fences, too."""
        return sorted({int(line) for line in re.findall(r"(?:\bfence\(t|, true), (\d+)\)", self.code)})

    def source(self, line: int) -> tuple[str, str, int]:
        """Return the source that a line of the PTX was made of: text, function, and place among equal texts there."""
        while not (found := re.match(r"\s*\.loc\s+(\d+) (\d+) (.*)", self._lines[line - 1])):
            line -= 1
        # Triton lists where a function was inlined, from the innermost on
        places = re.findall(r"(\w+\.py):(\d+)", found[3])
        if not places:
            file = next(text for text in self._lines if re.match(rf"\s*\.file\s+{found[1]} ", text))
            places = [(file.strip('"').rpartition("/")[2], found[2])]
        for name, place in places:
            for path in (build.ROOT / "csrc/cuda" / name, build.ROOT / "fused_warmup/backends/triton" / name):
                if path.exists():
                    before = path.read_text().splitlines()[: int(place)]
                    head = next(i for i in reversed(range(len(before))) if re.match(HEAD, before[i]))
                    function, text = re.match(HEAD, before[head])[1], before[-1].strip()
                    return text, function, sum(text in other for other in before[head:])
        raise ValueError(line)

    @contextlib.contextmanager
    def without(self, line: int) -> Iterator[list[int]]:
        """Leave out the barrier or fence of a line in the launches of the block; the list then has how often."""
        times: list[int] = []
        machine().ptx_leave_out(ctypes.byref(self.entry), line)
        try:
            yield times
        finally:
            times.append(machine().ptx_leave_out(None, -1))

    def launch(self, blocks: int, threads: int, addresses: Sequence[int | None]) -> None:
        """Run all blocks; the addresses are those of the arguments."""
        launched[self] = self.entry.name.decode()
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        found = machine().ptx_launch(ctypes.byref(self.entry), blocks, threads, pointers)
        if found:
            raise Finding(found.decode())


LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t),
)
LAUNCH_FAILURE = 719


class CudaModule:
    """The functions of ``fused_warmup._cuda`` by the host emulation, with every launch made by nvcc's PTX.

    Args:
        emulated: The module of ``cuda_on_host``.
        arch: The virtual architecture that nvcc compiles for, such as 75.
    """

    def __init__(self, emulated: Any, arch: str) -> None:
        self.arch = arch
        self.kernels: dict[str, Kernel] = {}
        self._emulated = emulated
        self._library = ctypes.CDLL(emulated.__file__)
        self._names = kernel_names(self._library, emulated.__file__)
        self._error: BaseException | None = None
        self._launcher = LAUNCHER(self._launch)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._emulated, name)
        return functools.partial(self._call, value) if callable(value) else value

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function while launches are made here."""
        launcher = ctypes.c_void_p.in_dll(self._library, "cuda_on_host_launcher")
        launcher.value = ctypes.cast(self._launcher, ctypes.c_void_p).value
        self._error = None
        try:
            return function(*arguments)
        except RuntimeError:
            if self._error is None:
                raise
            raise self._error from None
        finally:
            launcher.value = None

    def _launch(self, address: int, blocks: int, threads: int, count: int, params: Any, sizes: Any) -> int:
        """Run a kernel of the emulation by its PTX; an exception cannot pass through C++."""
        try:
            kernel = self.kernel(self._names[address])
            assert kernel.sizes == sizes[:count], (kernel.sizes, sizes[:count])
            kernel.launch(blocks, threads, params[:count])
        except BaseException as error:
            self._error = error
            return LAUNCH_FAILURE
        return 0

    def kernel(self, name: str) -> Kernel:
        """Return the kernel of a symbol, compiled on first use."""
        if name not in self.kernels:
            module = parsed_cuda(self.arch, *source_of(name))
            (entry,) = (entry for entry in module.entries() if build.plain_symbol(entry) == name)
            self.kernels[name] = Kernel(module, entry)
        return self.kernels[name]


def kernel_names(library: ctypes.CDLL, path: str) -> dict[int, str]:
    """Return the symbols of all kernels of a library by their addresses."""
    listed = subprocess.run(["nm", path], check=True, capture_output=True, text=True).stdout
    symbols = {name: int(place, 16) for place, name in re.findall(r"^(\w+) \w (\S+)$", listed, re.M)}
    known = "cuda_on_host_launches"
    base = ctypes.addressof(ctypes.c_int.in_dll(library, known)) - symbols[known]
    places = re.findall(r"^(\w+) [tTwW] (_ZN2fw\S*_kernel[IE]\S+)$", listed, re.M)
    return {base + int(place, 16): build.plain_symbol(name) for place, name in places}


def source_of(symbol: str) -> tuple[str, str]:
    """Return the source in ``csrc/cuda`` that has a kernel, and its rule; any rule where it depends on none."""
    stage = re.search(r"\d([a-z]\w*?_kernel)[IE]", symbol)
    assert stage, symbol
    if stage[1] in ("vector_kernel", "preconditioner_kernel"):
        return stage[1].removesuffix("_kernel").replace("vector", "vectors") + ".cu", ""
    rule = re.search(rf"INS_\d+({'|'.join(_cpu.rules())})E", symbol)
    return "step.cu", rule[1] if rule else _cpu.rules()[0]


@functools.cache
def parsed_cuda(arch: str, source: str, rule: str) -> Module:
    """Return the parsed PTX of a source of ``csrc/cuda``."""
    return parse(build.cuda_ptx(build.ROOT / "csrc" / "cuda" / source, arch, rule))
