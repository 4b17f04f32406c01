"""The package as others get it: a wheel built in isolation without torch, and what is in it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built by pip in a fresh environment of its own, with an nvcc that must not matter."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = ["csrc", "fused_warmup", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
    source.mkdir()
    for name in names:
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    for built in source.rglob("*.so"):
        built.unlink()
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("fused_warmup-*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"fused_warmup"}
    shipped = {name for name in names if name.endswith((".py", ".pyi", "py.typed"))}
    tracked = {
        str(p.relative_to(ROOT)) for p in (ROOT / "fused_warmup").rglob("*") if p.suffix in (".py", ".pyi")
    }
    assert shipped == tracked | {"fused_warmup/py.typed"}
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_build_asks_for_no_torch(wheel):
    text = (
        zipfile
        .ZipFile(wheel)
        .read(next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA")))
        .decode()
    )
    assert "Requires-Dist: torch>=2.8" in text
    requires = (ROOT / "pyproject.toml").read_text().split("[build-system]")[1].split("]")[0]
    assert "torch" not in requires


def test_installed_wheel_trains_outside_the_checkout(wheel, tmp_path):
    """Unpacked where nothing of the checkout can be imported from."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = (
        "import torch, fused_warmup as fw; "
        f"assert fw.__file__.startswith({str(site)!r}), fw.__file__; "
        "x = torch.nn.Parameter(torch.ones(3)); x.grad = torch.ones(3); "
        "opt = fw.RAdam([x], lr=0.1); opt.step(); assert opt._backend.name == 'cpu'; "
        "assert abs(x[0].item() - 0.9) < 1e-6"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)


def test_without_the_extension_the_reference_works_and_says_why(tmp_path):
    """An installation whose extension does not load still trains, and an explicit choice of it explains itself."""
    script = """
import sys, torch
sys.modules["fused_warmup._cpu"] = None
import fused_warmup as fw
assert fw.available_backends() == ("reference",)
x = torch.nn.Parameter(torch.ones(3)); x.grad = torch.ones(3)
opt = fw.Adam([x], lr=0.1, average=fw.EMA(0.5), max_grad_norm=1.0); opt.step()
assert "auto (reference)" in repr(opt)
assert x[0].item() < 1
try:
    fw.Adam([x], backend="cpu")
except RuntimeError as error:
    assert 'backend="cpu" is unavailable' in str(error) and "Available: reference." in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_missing_compiler_says_what_is_needed(tmp_path):
    environment = {**os.environ, "CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "a C++17 compiler with OpenMP is needed" in result.stderr
