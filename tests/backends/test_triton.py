"""The Triton kernels in Triton's interpreter, in processes of their own, and how the backend is chosen.

``TRITON_INTERPRET`` counts when triton is imported, so one process cannot both interpret and compile kernels:
``test_triton_compile.py`` compiles in this one, and ``interpreted.py`` runs in two others.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_warmup as fw
from fused_warmup import backends

ROOT = Path(__file__).resolve().parents[2]
# two halves that take about as long
HALVES = ("one_step or grids or layers", "not one_step and not grids and not layers")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def interpret(*options, products):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/interpreted.py",
        *options,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PRODUCTS": products}
    run = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES)
def test_in_the_interpreter(half):
    interpret("-k", half, products="")


@needs_triton
@pytest.mark.slow
@pytest.mark.rest
def test_the_rest_in_the_interpreter():
    interpret(products="1/1")


def test_why_it_is_unavailable(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if importlib.util.find_spec("triton") is not None:
        assert (
            backends.unavailable_reason("triton") == "there is no CUDA device, and TRITON_INTERPRET is not 1"
        )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match='backend="triton" is unavailable: the package triton is not inst'):
        fw.SGD([torch.zeros(3, requires_grad=True)], backend="triton")


@needs_triton
def test_an_old_triton_is_named(monkeypatch):
    import triton

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delattr(triton, "constexpr_function")
    assert f"triton {triton.__version__} is too old" in str(backends.unavailable_reason("triton"))


@needs_triton
def test_which_tensors_it_takes(monkeypatch):
    """The interpreter reads the memory of the host, the kernels that of the device."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for interpreted, good, bad in ((True, cpu, cuda), (False, cuda, cpu)):
        monkeypatch.setattr(backends, "_interpreted", lambda interpreted=interpreted: interpreted)
        with pytest.raises(ValueError, match=f'backend="triton" must get tensors .*, got tensors on {bad}'):
            backends.resolve("triton", bad)
        assert backends.resolve("triton", good).name == "triton"
        assert backends.resolve("auto", cpu).name in ("cpu", "reference")
        assert backends.resolve("auto", cuda).name in ("cuda", "reference" if interpreted else "triton")
