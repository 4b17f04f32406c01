"""Backends that run the real PTX, and steps by them beside the CPU kernels; ``SIDES`` names them."""

from __future__ import annotations

import functools
import math
from typing import Any

import cuda_on_host
import pytest
from cases import Case, make_params, set_grads
from ptx import build, run

import fused_warmup as fw
from fused_warmup.backends.native import CudaBackend
from fused_warmup.plan import device_buffers

# nvcc's code for the virtual architecture that the library is made of, and Triton's for devices whose PTX differs
SIDES = [f"cuda-{build.OLDEST}", "triton-90", "triton-100"]
# fewer than there are chunks, so that blocks take several and the last one is another in each order
BLOCKS = 3
SHAPES = [(3,), (0,), (), (33, 101), (1030,), (5, 7, 9), (4, 2100)]


@functools.cache
def cuda_module(arch: str) -> run.CudaModule:
    """Return the functions of the CUDA extension by nvcc's PTX for an architecture."""
    return run.CudaModule(cuda_on_host.cached(), arch)


def backend_of(side: str, monkeypatch: Any, blocks: int = BLOCKS) -> Any:
    """Return the backend of a side, with tables that are mirrored as on a GPU."""
    monkeypatch.setattr(device_buffers, "is_mirrored", lambda device: True)
    kind, _, target = side.partition("-")
    if kind == "cuda":
        if build.NVCC is None:
            pytest.skip("nvcc is not on PATH, so there is no PTX")
        return CudaBackend(cuda_module(target), blocks)
    pytest.importorskip("triton", reason="triton is not installed")
    from ptx import run_triton

    return run_triton.backend(monkeypatch, int(target), blocks)


def make_runs(case: Case, dtypes: Any, backends: Any, shapes: Any = SHAPES, **options: Any) -> list[Any]:
    """Return the same parameters in two groups, and an optimizer, for each backend."""
    runs = []
    for backend in backends:
        params = [p for dtype in dtypes for p in make_params(dtype, shapes)]
        groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 3e-3}]
        opt = case.make(groups, average=fw.EMA(0.9), **options)
        opt.session.backend = backend
        runs.append((params, opt))
    return runs


def step_all(runs: list[Any], steps: int = 4, *, bare: bool = False) -> None:
    """Make steps; in the second gradients are missing, also the first, and in the third one is not a number.

    The first group has no gradients if ``bare``.
    """
    for step in range(steps):
        for params, opt in runs:
            set_grads(params, step)
            if step == 1:
                params[0].grad = params[3].grad = None
            for p in params[::2] if bare else ():
                p.grad = None
            if step == 2 and opt.nonfinite == "skip":
                params[3].grad[-1, -1] = math.nan
            opt.step()
