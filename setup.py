"""Builds fused_warmup._cpu, and fused_warmup._cuda where nvcc is; neither torch nor a GPU is needed.

``python setup.py kernels`` builds them in place without setuptools, whose versions before 77 refuse the
license in ``pyproject.toml``. Any other command is setuptools'.

Environment: CXX chooses the compiler, g++ or clang++; FUSED_WARMUP_CXXFLAGS adds flags, for example a
sanitizer. FUSED_WARMUP_CUDA=0 leaves the CUDA kernels out and =1 insists on them; FUSED_WARMUP_CUDA_ARCHS
restricts them to some devices, for example "80 90"; FUSED_WARMUP_NVCCFLAGS adds flags.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# contraction off: the sources fix where a product and a sum round once. errno and traps prevent vectors.
# Without NDEBUG pybind11 asks for the GIL at each reference.
CXXFLAGS = (
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -fopenmp -Wall -Wextra "
    "-fno-math-errno -fno-trapping-math -ffp-contract=off -DNDEBUG"
)
ISA_FLAGS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    CXXFLAGS += " -DFW_X86_64"
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mbmi2 -mf16c"
    ISA_FLAGS["avx512"] = (
        ISA_FLAGS["avx2"] + " -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
    )
# one object per rule of the list that all kernels iterate over
RULES = re.findall(
    r"\bX\((\w+)\)", re.search("define FW_RULES.*", (ROOT / "csrc/rules.h").read_text(encoding="utf-8"))[0]
)
# devices of the same major version run the machine code of the lowest: 8.6 and 8.9 that of 8.0
CUDA_ARCHS = "75 80 90 100 120"
# -fmad: contraction off here too. The rest of the first line are defaults that the results depend on.
NVCCFLAGS = (
    "-O3 -std=c++17 -fmad=false -ftz=false -prec-div=true -prec-sqrt=true "
    "-cudart static -Xfatbin=-compress-all -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"
)


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
    """Return a path escaped for a build line of ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def find_nvcc() -> str | None:
    """Return the nvcc to use, or None if the CUDA kernels are left out."""
    return None if WANTED == "0" else shutil.which("nvcc")


def explain_missing_nvcc() -> None:
    """Print why the CUDA kernels are left out, or stop if they are required."""
    if WANTED not in ("0", "1", "auto"):
        raise SystemExit(f"fused_warmup: FUSED_WARMUP_CUDA must be 0, 1 or auto, got {WANTED}.")
    if NVCC is None and WANTED == "1":
        raise SystemExit("fused_warmup: nvcc must be on PATH for FUSED_WARMUP_CUDA=1, got none.")
    if NVCC is None and WANTED == "auto":
        print(
            "fused_warmup: building without CUDA: nvcc not found on PATH "
            "(FUSED_WARMUP_CUDA=1 makes this an error)",
            flush=True,
        )


def compiler_lines() -> list[str]:
    """Return the ninja rule that compiles C++ for both extensions."""
    try:
        import pybind11
    except ImportError:
        sys.exit("fused_warmup: pybind11 must be installed, got none; pip install pybind11.")
    cxx = os.environ.get("CXX", "g++")
    extra = os.environ.get("FUSED_WARMUP_CXXFLAGS", "")
    paths = (pybind11.get_include(), sysconfig.get_paths()["include"])
    includes = " ".join(shlex.quote(f"-I{path}") for path in paths)
    return [
        f"cxx = {cxx}",
        f"extra = {extra}",
        f"cxxflags = {CXXFLAGS} {includes} $extra",
        "rule cxx",
        "  command = $cxx $cxxflags $options -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]


def cpu_lines(target: Path) -> list[str]:
    """Return the lines of the build file of the CPU extension."""
    lines = [
        *compiler_lines(),
        "rule link",
        "  command = $cxx -shared -fopenmp $extra $in -o $out",
        f"build bindings.o: cxx {escaped(ROOT / 'csrc/cpu/bindings.cpp')}",
    ]
    objects = ["bindings.o"]
    for isa, flags in ISA_FLAGS.items():
        for name in ("step", "vectors", "preconditioner", "stream"):
            objects.append(f"{name}_{isa}.o")
            lines.append(f"build {objects[-1]}: cxx {escaped(ROOT / f'csrc/cpu/{name}.cpp')}")
            lines.append(f"  options = -DFW_ISA={isa} {flags}")
    return [*lines, f"build {escaped(target)}: link {' '.join(objects)}"]


def cuda_lines(target: Path, nvcc: str) -> list[str]:
    """Return the lines of the build file of the CUDA extension, which has one object per rule."""
    wanted = os.environ.get("FUSED_WARMUP_CUDA_ARCHS")
    archs = (wanted or CUDA_ARCHS).replace(",", " ").replace(";", " ").split()
    # The sources do not depend on the device, so one compilation to PTX serves all of them. That PTX is kept:
    # a driver compiles it for every device of a later kind than the first that the list does not serve.
    first = min(archs, key=int)
    machine = ",".join([f"compute_{first}", *(f"sm_{arch}" for arch in archs)])
    gencode = f"-gencode 'arch=compute_{first},code=[{machine}]'"
    built_for = ", ".join(f"{arch[:-1]}.{arch[-1]}" for arch in archs)
    built_for += " and later, limited by FUSED_WARMUP_CUDA_ARCHS" if wanted else " and later"
    define = shlex.quote(f'-DFW_CUDA_ARCHS="{built_for}"')
    extra = os.environ.get("FUSED_WARMUP_NVCCFLAGS", "")
    lines = [
        *compiler_lines(),
        f"nvcc = {shlex.quote(nvcc)} -ccbin {shlex.quote(os.environ.get('CXX', 'g++'))}",
        f"nvccflags = {NVCCFLAGS} {gencode} {extra}",
        "rule nvcc",
        "  command = $nvcc $nvccflags -DFW_RULE=$optimizer -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # hide the symbols of the static CUDA runtime from any other runtime in the process
        "  command = $nvcc -shared -cudart static -Xlinker --exclude-libs,ALL $in -o $out",
        f"build bindings.o: cxx {escaped(ROOT / 'csrc/cuda/bindings.cpp')}",
        f"  options = {define}",
    ]
    objects = ["bindings.o"]
    for name in ("vectors", "preconditioner", "probe"):
        objects.append(f"{name}.o")
        lines.append(f"build {objects[-1]}: nvcc {escaped(ROOT / f'csrc/cuda/{name}.cu')}")
    for rule in RULES:
        objects.append(f"step_{rule}.o")
        lines.append(f"build {objects[-1]}: nvcc {escaped(ROOT / 'csrc/cuda/step.cu')}")
        lines.append(f"  optimizer = {rule}")
    return [*lines, f"build {escaped(target)}: link {' '.join(objects)}"]


def build(name: str, target: Path, folder: Path) -> None:
    """Write the build file of an extension into a folder and run ninja."""
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = cpu_lines(target) if name == CPU else cuda_lines(target, str(NVCC))
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [
        find_ninja(),
        "-C",
        str(folder),
        *shlex.split(os.environ.get("FUSED_WARMUP_NINJAFLAGS", "")),
    ]
    print("fused_warmup: " + shlex.join(command), flush=True)
    result = subprocess.run(command, check=False)
    if result.returncode:
        sys.exit(f"fused_warmup: the build of {name} failed; {NEEDED[name]}.")


def build_in_place() -> None:
    """Build the extensions beside the modules of the package."""
    explain_missing_nvcc()
    for name in NAMES:
        target = ROOT.joinpath(*name.split(".")).with_suffix(sysconfig.get_config_var("EXT_SUFFIX"))
        build(name, target, ROOT / "build" / "kernels" / name)


def run_setuptools() -> None:
    """Run the command of setuptools that was given."""
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext

    class NinjaBuild(build_ext):
        """Compiles one source several times, once per instruction set or rule, with ninja."""

        def run(self) -> None:
            """Build the CPU extension, and the CUDA extension if nvcc is there."""
            explain_missing_nvcc()
            super().run()

        def build_extension(self, ext: Extension) -> None:
            """Write the build file and run ninja."""
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            build(ext.name, target, (Path(self.build_temp) / ext.name).resolve())

    setup(
        ext_modules=[Extension(name, sources=[]) for name in NAMES],
        cmdclass={"build_ext": NinjaBuild},
    )


CPU, CUDA = "fused_warmup._cpu", "fused_warmup._cuda"
NEEDED = {
    CPU: "a C++17 compiler with OpenMP is needed",
    CUDA: f"an nvcc that knows the devices {CUDA_ARCHS} is needed, or fewer in FUSED_WARMUP_CUDA_ARCHS, "
    "or FUSED_WARMUP_CUDA=0",
}
WANTED = os.environ.get("FUSED_WARMUP_CUDA", "auto")
NVCC = find_nvcc()
NAMES = (CPU, CUDA) if NVCC else (CPU,)

if sys.argv[1:] == ["kernels"]:
    build_in_place()
else:
    run_setuptools()
