"""Builds fused_warmup._cpu with g++ or clang++ and ninja; neither torch nor a GPU is needed.

Environment: CXX chooses the compiler; FUSED_WARMUP_CXXFLAGS adds flags, for example a sanitizer.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# contraction off: rules.h says where a product and a sum round once. errno and traps would forbid vectors.
CXXFLAGS = (
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -fopenmp -Wall -Wextra "
    "-fno-math-errno -fno-trapping-math -ffp-contract=off"
)
ISA_FLAGS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    CXXFLAGS += " -DFW_X86_64"
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mbmi2"
    ISA_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mbmi2 -mprefer-vector-width=512"


def find_ninja() -> str:
    """Return the ninja of the build environment, or the one on the path."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("fused_warmup: ninja must be installed, got none; pip install ninja.") from None
        return found


def escaped(path: Path) -> str:
    """Return a path as a build line of ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(target: Path) -> str:
    """Return the text of a build file that makes the CPU extension."""
    import pybind11

    cxx = os.environ.get("CXX", "g++")
    extra = os.environ.get("FUSED_WARMUP_CXXFLAGS", "")
    paths = (pybind11.get_include(), sysconfig.get_paths()["include"])
    includes = " ".join(shlex.quote(f"-I{path}") for path in paths)
    lines = [
        f"cxxflags = {CXXFLAGS} {includes} {extra}",
        "rule cxx",
        f"  command = {cxx} $cxxflags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -shared -fopenmp {extra} $in -o $out",
        f"build bindings.o: cxx {escaped(ROOT / 'csrc/cpu/bindings.cpp')}",
    ]
    objects = ["bindings.o"]
    for isa, flags in ISA_FLAGS.items():
        objects.append(f"kernels_{isa}.o")
        lines.append(f"build {objects[-1]}: cxx {escaped(ROOT / 'csrc/cpu/kernels.cpp')}")
        lines.append(f"  isa = -DFW_ISA={isa} {flags}")
    lines.append(f"build {escaped(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Compiles one source once per instruction set, which a plain Extension cannot say."""

    def build_extension(self, ext: Extension) -> None:
        """Write the build file and run ninja."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = (Path(self.build_temp) / ext.name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(target))
        command = [
            find_ninja(),
            "-C",
            str(folder),
            *shlex.split(os.environ.get("FUSED_WARMUP_NINJAFLAGS", "")),
        ]
        print("fused_warmup: " + shlex.join(command), flush=True)
        result = subprocess.run(command, check=False)
        if result.returncode:
            sys.exit(f"fused_warmup: the build of {ext.name} failed; a C++17 compiler with OpenMP is needed.")


setup(ext_modules=[Extension("fused_warmup._cpu", sources=[])], cmdclass={"build_ext": NinjaBuild})
