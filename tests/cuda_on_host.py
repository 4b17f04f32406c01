"""Builds csrc/cuda for the host: the very kernels as a Python module that needs no GPU.

CUDA_ON_HOST_FLAGS adds flags of the compiler, for example a sanitizer.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

from fused_warmup import _cpu

ROOT = Path(__file__).resolve().parent.parent
# products and sums are contracted only where the source calls multiply_add, as on the device
FLAGS = "-std=c++17 -O2 -g1 -march=native -ffp-contract=off -fno-math-errno -fPIC -fvisibility=hidden -Wall -Wextra"

# the compute capabilities that the kernels are said to be built for
ARCHS = "7.5, 9.0"


def compile_all(folder: Path, extra: str) -> Path:
    """Compile the kernels once per rule, and link them with the bindings."""
    folder.mkdir(parents=True, exist_ok=True)
    cxx = [os.environ.get("CXX", "g++"), *FLAGS.split(), *extra.split()]
    common = ["-include", str(ROOT / "tests" / "cuda_on_host.h"), "-x", "c++", "-c"]
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    sources = {f"step_{rule}.o": ("step.cu", [f"-DFW_RULE={rule}"]) for rule in _cpu.rules()}
    sources |= {f"{name}.o": (f"{name}.cu", []) for name in ("vectors", "preconditioner", "probe")}
    sources["bindings.o"] = ("bindings.cpp", [*includes, f'-DFW_CUDA_ARCHS="{ARCHS}"'])
    # a sanitizer that is loaded into tests need not watch the compiler
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    running = []
    for name, (source, more) in sources.items():
        command = [*cxx, *more, *common, str(ROOT / "csrc" / "cuda" / source), "-o", str(folder / name)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        running.append((command, process))
    for command, process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0, (command, errors)
    target = folder / ("_cuda" + str(sysconfig.get_config_var("EXT_SUFFIX")))
    objects = [str(folder / name) for name in sources]
    subprocess.run([*cxx, "-shared", *objects, "-o", str(target)], check=True, env=environment)
    return target


def load(path: Path, package: str = "cuda_on_host_module") -> ModuleType:
    """Import a built module as one of a package; pybind11 returns the first module of a name."""
    spec = importlib.util.spec_from_file_location(f"{package}._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cached() -> ModuleType:
    """Build unless sources and flags are those of an earlier build, and import."""
    extra = os.environ.get("CUDA_ON_HOST_FLAGS", "")
    sources = [*(ROOT / "csrc").rglob("*"), ROOT / "tests" / "cuda_on_host.h", Path(__file__)]
    text = b"".join(path.read_bytes() for path in sorted(sources) if path.is_file())
    digest = hashlib.sha256(
        text + extra.encode() + sysconfig.get_config_var("EXT_SUFFIX").encode()
    ).hexdigest()
    folder = ROOT / "build" / "cuda_on_host" / digest[:16]
    target = folder / ("_cuda" + str(sysconfig.get_config_var("EXT_SUFFIX")))
    if not target.exists():
        # several processes may build at once; the last rename wins
        made = compile_all(folder / str(os.getpid()), extra)
        os.replace(made, target)
    return load(target)
