"""Run the Triton backend by the PTX that Triton emits for a device, on the machine of ``machine.cpp``."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path
from typing import Any

import triton
from backends.test_triton_compile import compile_kernel
from ptx import build, run
from ptx.translate import parse
from torch import Tensor

import fused_warmup
from fused_warmup.backends.triton import launch

WARP = 32


@functools.cache
def sources() -> str:
    """Return a name for all that a kernel is compiled from."""
    package = Path(fused_warmup.__file__).parent
    files = sorted(
        path for name in ("backends/triton", "reference", "plan") for path in (package / name).glob("*.py")
    )
    return build.digest([triton.__version__, *(path.read_bytes() for path in files)])


@functools.cache
def kernel_of(kernel: Any, constants: tuple[tuple[str, Any], ...], target: int) -> run.Kernel:
    """Return a kernel that is compiled for a target such as 90."""

    def make(draft: Path) -> None:
        # what is printed in compiling is not kept with the rest
        with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
            triton.knobs.cache.dir = folder
            draft.write_text(compile_kernel(kernel, dict(constants), target)[0])

    name = build.digest([sources(), kernel.__name__, repr(constants)])
    module = parse(build.kept(build.BUILD / f"{kernel.__name__}_{target}_{name}.ptx", make).read_text())
    (entry,) = module.entries()
    return run.Kernel(module, entry)


class TritonKernel:
    """Stands in for a kernel of ``backends.triton``: called in the same way, it runs the PTX."""

    def __init__(self, kernel: Any, target: int) -> None:
        self._kernel, self._target = kernel, target

    def warmup(self, *arguments: Any, **constants: Any) -> None:
        """Compile nothing before it is needed."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return functools.partial(self._launch, grid[0])

    def _launch(self, programs: int, *columns: Tensor, **constants: Any) -> None:
        kernel = kernel_of(self._kernel, tuple(sorted(constants.items())), self._target)
        # those of scratch memory, which no kernel uses, follow
        addresses = [column.data_ptr() for column in columns] + [0] * (len(kernel.sizes) - len(columns))
        values = [ctypes.c_uint64(address) for address in addresses]
        kernel.launch(programs, WARP * constants["num_warps"], [ctypes.addressof(value) for value in values])


def backend(monkeypatch: Any, target: int, programs: int) -> launch.TritonBackend:
    """Return the Triton backend, whose kernels are replaced until the end of the test."""
    for name, kernel in vars(launch).copy().items():
        # a test may ask for several backends
        if name.endswith("_kernel") and not isinstance(kernel, TritonKernel):
            monkeypatch.setattr(launch, name, TritonKernel(kernel, target))
    return launch.TritonBackend(programs)
