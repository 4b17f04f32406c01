"""The package as others get it: a wheel built in isolation without torch, and what is in it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def hurry_of_nvcc():
    """The flag with which an nvcc compiles several times faster, if it has one."""
    if shutil.which("nvcc") is None:
        return ""
    text = subprocess.run(["nvcc", "--help"], check=True, capture_output=True, text=True).stdout
    return "--Ofast-compile=max" if "--Ofast-compile" in text else ""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built by pip in a fresh environment of its own, with CUDA kernels for one device if nvcc is there.

    Compiled in a hurry: what is in it and whether it loads and trains does not depend on optimization.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = ["csrc", "fused_warmup", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
    source.mkdir()
    for name in names:
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    for built in source.rglob("*.so"):
        built.unlink()
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    environment = {**os.environ, "FUSED_WARMUP_CUDA": "auto", "FUSED_WARMUP_CUDA_ARCHS": "90"}
    environment |= {"FUSED_WARMUP_CXXFLAGS": "-O0", "FUSED_WARMUP_NVCCFLAGS": hurry_of_nvcc()}
    command += ["-w", str(folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("fused_warmup-*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"fused_warmup"}
    shipped = {name for name in names if name.endswith((".py", ".pyi", "py.typed"))}
    tracked = {
        str(p.relative_to(ROOT)) for p in (ROOT / "fused_warmup").rglob("*") if p.suffix in (".py", ".pyi")
    }
    assert shipped == tracked | {"fused_warmup/py.typed"}
    extensions = {re.sub(r"\..*", "", name) for name in names if name.endswith(".so")}
    assert extensions == {"fused_warmup/_cpu"} | ({"fused_warmup/_cuda"} if shutil.which("nvcc") else set())
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
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


@pytest.mark.slow
def test_installed_wheel_trains_outside_the_checkout(wheel, tmp_path):
    """Unpacked where nothing of the checkout can be imported from."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = (
        "import torch, fused_warmup as fw; "
        f"assert fw.__file__.startswith({str(site)!r}), fw.__file__; "
        "x = torch.nn.Parameter(torch.ones(3)); x.grad = torch.ones(3); "
        "opt = fw.RAdam([x], lr=0.1); opt.step(); assert opt.session.backend.name == 'cpu'; "
        "assert abs(x[0].item() - 0.9) < 1e-6"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)


@pytest.mark.slow
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


def build(folder, **environment):
    """What ``build_ext`` says and returns; with -n ninja compiles nothing."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(folder), "-t", str(folder)]
    environment = {**os.environ, "FUSED_WARMUP_NINJAFLAGS": "-n", **environment}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def test_missing_nvcc_is_one_line_unless_it_is_wanted(tmp_path):
    code, text = build(tmp_path, PATH=str(tmp_path), FUSED_WARMUP_CUDA="auto")
    assert code == 0
    assert text.count("building without CUDA: nvcc not found on PATH") == 1
    assert "_cuda" not in text
    code, text = build(tmp_path, PATH=str(tmp_path), FUSED_WARMUP_CUDA="0")
    assert code == 0
    assert "CUDA" not in text
    code, text = build(tmp_path, PATH=str(tmp_path), FUSED_WARMUP_CUDA="1")
    assert code != 0
    assert "nvcc must be on PATH for FUSED_WARMUP_CUDA=1, got none." in text
    code, text = build(tmp_path, FUSED_WARMUP_CUDA="maybe")
    assert code != 0
    assert "FUSED_WARMUP_CUDA must be 0, 1 or auto, got maybe." in text


def kernels_without(module, **environment):
    """Runs ``setup.py kernels`` where a module cannot be imported."""
    script = (
        f"import runpy, sys; sys.modules['{module}'] = None; sys.argv = ['setup.py', 'kernels']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {**os.environ, "FUSED_WARMUP_CUDA": "0", **environment}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_kernels_build_without_setuptools():
    """No version of it is asked, because those before 77 refuse the license in pyproject.toml."""
    result = kernels_without("setuptools", FUSED_WARMUP_NINJAFLAGS="-n")
    assert result.returncode == 0, result.stderr
    written = ROOT / "build" / "kernels" / "fused_warmup._cpu" / "build.ninja"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert f"fused_warmup/_cpu{suffix}: link" in written.read_text()


def test_missing_pybind11_is_one_line():
    result = kernels_without("pybind11")
    assert result.returncode != 0
    assert result.stderr == "fused_warmup: pybind11 must be installed, got none; pip install pybind11.\n"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_a_device_that_nvcc_does_not_know_stops_the_build(tmp_path):
    # a host compiler that makes nothing: nvcc reads the devices before it asks for one
    code, text = build(tmp_path, FUSED_WARMUP_CUDA_ARCHS="12 90", FUSED_WARMUP_NINJAFLAGS="", CXX="true")
    assert code != 0
    assert "'compute_12'" in text
    assert "the build of fused_warmup._cuda failed; an nvcc that knows the devices" in text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize(
    ("archs", "options", "built_for"),
    [
        (
            "90 75,120",
            "-gencode 'arch=compute_75,code=[compute_75,sm_90,sm_75,sm_120]'",
            "9.0, 7.5, 12.0 and later, limited by FUSED_WARMUP_CUDA_ARCHS",
        ),
        (
            "86",
            "-gencode 'arch=compute_86,code=[compute_86,sm_86]'",
            "8.6 and later, limited by FUSED_WARMUP_CUDA_ARCHS",
        ),
        ("", "code=[compute_75,sm_75,", "7.5, 8.0, 9.0, 10.0, 12.0 and later"),
    ],
)
def test_the_lowest_architecture_serves_devices_that_are_not_listed(tmp_path, archs, options, built_for):
    code, _ = build(tmp_path, FUSED_WARMUP_CUDA="1", FUSED_WARMUP_CUDA_ARCHS=archs)
    assert code == 0
    rules = (tmp_path / "fused_warmup._cuda" / "build.ninja").read_text()
    flags = next(line for line in rules.splitlines() if line.startswith("nvccflags"))
    assert options in flags
    assert flags.count("-gencode") == 1
    assert f"""'-DFW_CUDA_ARCHS="{built_for}"'""" in rules


def test_source_distribution_has_the_kernels(tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()} <= names
