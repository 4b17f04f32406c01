"""Runs the kernels under AddressSanitizer and UndefinedBehaviorSanitizer: ``make sanitize``.

The extension is built with both beside a copy of the package, and so are the CUDA kernels as the host runs them.
The tests that touch most memory run in an interpreter whose allocator is the sanitizer's, so that every tensor
has red zones around it; of products of parameters those rows that hold every value.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
FLAGS = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
# -O1 of the last flag wins over -O3: the loops stay readable in a report
TESTS = [
    BUILD / "test_origin.py",
    ROOT / "tests" / "optim" / "test_properties.py",
    ROOT / "tests" / "backends" / "test_bitwise.py",
    ROOT / "tests" / "backends" / "test_backends.py",
    ROOT / "tests" / "sharpness" / "test_vectors.py",
    ROOT / "tests" / "optim" / "test_layers.py",
    ROOT / "tests" / "backends" / "test_cuda_on_host.py",
]
# test_instruction_sets_... and test_grids_and_orders_... run every kernel with each option over all dtypes; what
# is left out goes through the same memory, with other numbers, in more steps or beside other tables
CHOICE = (
    "not error_is_no_larger and not test_schedules and not test_trajectory and not no_drift "
    "and not runs_do_not_differ and not same_bits_from_either_pass "
    "and not golden and not authors_package and not bad_arguments "
    "and not addresses_travel and not launches_do_not_depend "
    "and not (test_cuda_on_host and (large or from_the_same_state or do_not_depend or has_arrived or neighbours "
    "or telemetry_does_not or added_later or rebuilt_table or goes_on or one_more_launch or numbers_alone "
    "or do_not_notice))"
)
OVERFLOWS = {
    "CPU": "CpuBackend()",
    "CUDA": "CudaBackend(cuda_on_host.cached())",
}


# a path of pytest's configuration would come before that of the copy
ORIGIN = f"""
import fused_warmup

def test_origin():
    assert fused_warmup.__file__.startswith({str(BUILD)!r})
"""


def build() -> None:
    """Copy the package and compile its extension with the sanitizers."""
    shutil.rmtree(BUILD, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fused_warmup", BUILD / "fused_warmup", ignore=ignored)
    (BUILD / "test_origin.py").write_text(ORIGIN, encoding="utf-8")
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(BUILD), "-t", str(BUILD / "objects")]
    extra = {"FUSED_WARMUP_CXXFLAGS": FLAGS, "FUSED_WARMUP_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **extra}, check=True)


def library(name: str) -> str:
    """Return the path of a runtime library of the compiler."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def environment() -> dict[str, str]:
    """Return the environment in which the sanitizers see every allocation."""
    return {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')}:{library('libubsan.so')}:{library('libstdc++.so')}",
        "OMP_WAIT_POLICY": "passive",
        # the interpreter and torch keep memory until exit
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{BUILD}:{ROOT / 'tests'}",
        "CUDA_ON_HOST_FLAGS": FLAGS,
        "PRODUCTS": "values",
    }


def main() -> int:
    """Build, prove that an overflow is caught, and run the tests; return the exit code."""
    build()
    # the checkout must not be the working directory: Python would import the package from there
    run = {"cwd": BUILD, "env": environment()}
    for name, backend in OVERFLOWS.items():
        overflow = (
            "import torch, cuda_on_host, fused_warmup as fw\n"
            "from fused_warmup.backends.native import CpuBackend, CudaBackend\n"
            "x = torch.nn.Parameter(torch.ones(100)); x.grad = torch.ones(100)\n"
            f"opt = fw.Adam([x]); opt.session.backend = {backend}; opt.step()\n"
            "opt.session.plan._chunks['count'] += 64\n"
            "opt.step()\n"
        )
        caught = subprocess.run([sys.executable, "-c", overflow], capture_output=True, text=True, **run)
        if caught.returncode == 0 or "heap-buffer-overflow" not in caught.stderr:
            print(f"sanitize: an overflow of the {name} kernels must be caught, got {caught.returncode}")
            print(caught.stderr)
            return 1
        print(f"sanitize: an overflow of the {name} kernels on purpose was caught", flush=True)
    options = [
        "-q",
        "-x",
        "-n",
        "auto",
        "--maxprocesses",
        "8",
        "--dist",
        "worksteal",
        "-p",
        "no:cacheprovider",
        "-o",
        "pythonpath=tests",
    ]
    options += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-k", CHOICE]
    return subprocess.run([sys.executable, "-m", "pytest", *options, *TESTS], **run).returncode


if __name__ == "__main__":
    raise SystemExit(main())
