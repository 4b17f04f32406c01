"""Compile what the tests of the real PTX run: CUDA and Triton sources to PTX, translated PTX to libraries.

Everything is kept below ``build/ptx`` by the contents of its sources, and made by one of the processes that ask for it.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "ptx"
NVCC = shutil.which("nvcc")
# as the kernels are meant: no contraction, and integers that wrap around; half the time of -O2, which runs no faster
FLAGS = [
    "-std=c++17",
    "-O1",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fwrapv",
    "-fPIC",
    "-shared",
    "-w",
]


def setup_constant(name: str) -> str:
    """Return a constant of ``setup.py``, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


# what all machine code is made from
OLDEST = min(setup_constant("CUDA_ARCHS").split(), key=int)


def digest(texts: Iterable[str | bytes]) -> str:
    """Return a name for the contents of texts."""
    found = hashlib.sha256()
    for text in texts:
        found.update(hashlib.sha256(text if isinstance(text, bytes) else text.encode()).digest())
    return found.hexdigest()[:20]


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """Return a file, after making it unless it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            draft = path.with_name("draft_" + path.name)
            make(draft)
            draft.replace(path)
    return path


def run(*command: str | Path) -> None:
    """Run a compiler, whose errors are those of the test."""
    # a sanitizer that is loaded into tests need not watch the compiler
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, (command, result.stderr[-4000:])


def cuda_ptx(source: Path, arch: str, rule: str = "") -> str:
    """Return the PTX that nvcc makes of a source, with the flags of ``setup.py``."""
    assert NVCC
    flags = [*setup_constant("NVCCFLAGS").split(), f"-arch=compute_{arch}", "-ptx", "-lineinfo"]
    if rule:
        flags.append(f"-DFW_RULE={rule}")
    sources = [source, *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    name = digest([*flags, NVCC, *(path.read_bytes() for path in sources)])
    path = BUILD / f"{source.stem}_{rule}{arch}_{name}.ptx"
    return kept(path, lambda draft: run(NVCC, *flags, source, "-o", draft)).read_text()


def kernel_library(code: str) -> Path:
    """Return the shared library of a translated kernel."""
    name = digest([code, (HERE / "machine.h").read_bytes(), *FLAGS])

    def make(draft: Path) -> None:
        source = draft.with_suffix(".cpp")
        source.write_text(code)
        run(os.environ.get("CXX", "g++"), *FLAGS, "-fvisibility=hidden", f"-I{HERE}", source, "-o", draft)

    return kept(BUILD / f"kernel_{name}.so", make)


def machine() -> Path:
    """Return the shared library that kernels run on."""
    source = HERE / "machine.cpp"
    name = digest([source.read_bytes(), (HERE / "machine.h").read_bytes(), *FLAGS])
    flags = [*FLAGS, "-O2", "-Wall", "-Wextra"]
    return kept(
        BUILD / f"machine_{name}.so",
        lambda draft: run(os.environ.get("CXX", "g++"), *flags, source, "-o", draft),
    )


def plain_symbol(name: str) -> str:
    """Return a mangled name without the name of its anonymous namespace, which each compiler chooses."""
    while match := re.search(r"(\d+)_GLOBAL__N_", name):
        name = name[: match.start()] + "@" + name[match.end(1) + int(match[1]) :]
    return name
