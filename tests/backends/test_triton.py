"""The Triton kernels in Triton's interpreter, in processes of their own, and how the backend is chosen.

``TRITON_INTERPRET`` counts when triton is imported, so one process cannot both interpret and compile kernels:
``test_triton_compile.py`` compiles in this one, and ``interpreted.py`` runs in two others.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import compat
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
    run = compat.run_pytest(compat.INTERPRET, *options, interpreted=True, products=products)
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


@pytest.fixture
def found_device(monkeypatch):
    """A CUDA device that torch finds, and an extension that does not load."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends, "_cuda_reason", lambda *_: "not built")
    backends._triton_problem.cache_clear()
    yield torch.device("cuda")
    backends._triton_problem.cache_clear()


@needs_triton
def test_an_old_triton_is_named(monkeypatch, found_device):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.4.0")
    assert f"triton {triton.__version__} is too old" in str(backends.unavailable_reason("triton"))
    assert str(backends.unavailable_reason("triton")).endswith("triton 3.5.1 or later is needed")
    assert "triton" not in fw.available_backends()


def test_a_triton_that_does_not_load_is_unavailable(monkeypatch, found_device):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = str(backends.unavailable_reason("triton"))
    assert reason.startswith("the package triton does not load: ")
    assert backends.resolve("auto", found_device).name == "reference"


@needs_triton
def test_a_triton_that_cannot_compile_is_found_out_once(monkeypatch, found_device):
    from fused_warmup.backends.triton import probe

    tried = []

    def fail(device):
        tried.append(str(device))
        raise RuntimeError("there is no C compiler\nset CC")

    monkeypatch.setattr(probe, "check_kernel", fail)
    for _ in range(2):
        assert backends.resolve("auto", found_device).name == "reference"
        assert "triton" not in fw.available_backends()
    reason = "a kernel fails: RuntimeError: there is no C compiler"
    assert backends.unavailable_reason("triton") == reason
    with pytest.raises(RuntimeError, match=f'backend="triton" is unavailable: {reason}'):
        backends.resolve("triton", found_device)
    assert tried == ["cuda"]


@needs_triton
def test_a_triton_that_compiles_is_taken(monkeypatch, found_device):
    from fused_warmup.backends.triton import probe

    monkeypatch.setattr(probe, "check_kernel", lambda device: None)
    assert backends.resolve("auto", found_device).name == "triton"
    assert "triton" in fw.available_backends()


def test_without_a_device_triton_is_not_imported():
    script = (
        "import sys, torch, fused_warmup as fw; torch.cuda.is_available = lambda: False; "
        "fw.available_backends(); fw.backends.resolve('auto', torch.device('cpu')); "
        "sys.exit('triton' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)


def test_where_a_backend_is_tried(monkeypatch):
    for interpreted, kind in ((True, "cpu"), (False, "cuda")):
        monkeypatch.setattr(backends, "_interpreted", lambda interpreted=interpreted: interpreted)
        tried = {name: backends.device_type(name) for name in backends.BACKENDS}
        assert tried == {"reference": "cpu", "cpu": "cpu", "triton": kind, "cuda": "cuda"}


@needs_triton
def test_which_tensors_it_takes(monkeypatch):
    """The interpreter reads the memory of the host, the kernels that of the device."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends, "_triton_problem", lambda device: None)
    for interpreted, good, bad in ((True, cpu, cuda), (False, cuda, cpu)):
        monkeypatch.setattr(backends, "_interpreted", lambda interpreted=interpreted: interpreted)
        with pytest.raises(ValueError, match=f'backend="triton" must get tensors .*, got tensors on {bad}'):
            backends.resolve("triton", bad)
        assert backends.resolve("triton", good).name == "triton"
        assert backends.resolve("auto", cpu).name in ("cpu", "reference")
        assert backends.resolve("auto", cuda).name in ("cuda", "reference" if interpreted else "triton")
