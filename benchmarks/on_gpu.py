"""Build, test and measure on a machine with a GPU: ``make gpu``.

Takes the Python, torch, nvcc, pybind11, ninja and pytest that are there and fetches nothing. What is missing is
named in one line; the rest still runs. Builds without setuptools, all of whose versions are therefore right.
The exit code is 1 if nothing useful can run or a test fails.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# seconds of all that runs, and of the two parts before the measurement
ALL, BUILD, TESTS = 480.0, 180.0, 120.0
# the measurement stops starting cases so long before the end
LAST_CASE = 45.0
TEST_FILES = (
    "tests/backends/test_gpu.py",
    "tests/backends/test_backends.py",
    "tests/distributed/test_nccl.py",
)
LOG = ROOT / "build" / "kernels.log"


def say(text: str) -> None:
    """Print one line."""
    print(f"make gpu: {text}", flush=True)


def has(module: str) -> bool:
    """Return whether a module is installed."""
    return importlib.util.find_spec(module) is not None


def obstacle() -> str | None:
    """Return why nothing can be measured here, or None."""
    missing = [name for name in ("torch", "numpy") if not has(name)]
    if missing:
        return f"{' and '.join(missing)} must be installed, got none; pip install {' '.join(missing)}"
    import torch

    if not torch.cuda.is_available():
        return f"a CUDA device must be there, got none; torch {torch.__version__} sees no GPU or no driver"
    return None


def build_needs() -> list[str]:
    """Return what is missing for a build of the extensions, with the remedy."""
    cxx = os.environ.get("CXX", "g++").split()[0]
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    found = {
        "pybind11 (pip install pybind11)": has("pybind11"),
        "ninja (pip install ninja)": has("ninja") or shutil.which("ninja"),
        f"the compiler {cxx} (apt install g++)": shutil.which(cxx),
        "Python.h (apt install python3-dev)": header.exists(),
    }
    return [name for name, there in found.items() if not there]


def build(seconds: float) -> None:
    """Build the extensions, with the CUDA kernels for the first GPU if nvcc is there."""
    needs = build_needs()
    if needs:
        say(f"no extension is built, only Triton runs: {' and '.join(needs)} missing")
        return
    import torch

    end = time.monotonic() + seconds
    if shutil.which("nvcc") is None:
        say("the backend cuda is not built: nvcc is not on PATH (install the CUDA toolkit)")
    else:
        arch = "{}{}".format(*torch.cuda.get_device_capability(0))
        if compile_kernels(seconds, {"FUSED_WARMUP_CUDA": "1", "FUSED_WARMUP_CUDA_ARCHS": arch}):
            return
    compile_kernels(end - time.monotonic(), {"FUSED_WARMUP_CUDA": "0"})


def compile_kernels(seconds: float, environment: Mapping[str, str]) -> bool:
    """Run the build and return whether it worked; its output goes to a file."""
    LOG.parent.mkdir(exist_ok=True)
    command = [sys.executable, "setup.py", "kernels"]
    begin = time.monotonic()
    with LOG.open("w", encoding="utf-8") as log:
        code, _ = run(command, seconds, {**os.environ, **environment}, log.fileno())
    took = time.monotonic() - begin
    lines = LOG.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next(filter(None, reversed(lines)), "")
    say(f"built in {took:.0f} s" if code == 0 else f"the build failed, see {LOG.relative_to(ROOT)}: {last}")
    return code == 0


def run(
    command: Sequence[str], seconds: float, environment: Mapping[str, str], output: int | None = None
) -> tuple[int, bool]:
    """Run a command for so many seconds at most; return its exit code, and whether it was stopped."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(max(seconds, 1.0)), False
    except subprocess.TimeoutExpired:
        # pytest prints its summary when it is interrupted
        os.killpg(process.pid, signal.SIGINT)
    try:
        return process.wait(15.0), True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait(), True


def run_tests(seconds: float) -> tuple[str, bool]:
    """Run the tests of the GPU backends; return their outcome as text, and whether none failed."""
    if not has("pytest"):
        say("the tests do not run: pytest is missing (pip install pytest)")
        return "not run, pytest is missing", True
    log = ROOT / "build" / "tests.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *TEST_FILES]
    with log.open("w", encoding="utf-8") as out:
        code, stopped = run(command, seconds, os.environ, out.fileno())
    text = outcome(log.read_text(encoding="utf-8", errors="replace"))
    if stopped:
        text = f"stopped after {seconds:.0f} s: {text}"
    say(f"tests: {text}")
    # 5: nothing was collected
    return text, (stopped and "failed" not in text) or code in (0, 5)


def outcome(report: str) -> str:
    """Return the line of a report of pytest that counts the tests."""
    counts = re.findall(r"^=*\s*((?:\d+ \w+(?:, )?)+ in [\d.:ms() ]+?)\s*=*$", report, re.MULTILINE)
    return counts[-1] if counts else "no summary, see build/tests.log"


def main() -> int:
    """Build, test and measure."""
    start = time.monotonic()
    reason = obstacle()
    if reason is not None:
        say(reason)
        return 1
    build(BUILD)
    usable = usable_backends()
    if not usable:
        say("neither the backend cuda nor triton works here; fused-warmup doctor gives the reasons")
        return 1
    tests, passed = run_tests(TESTS)
    left = ALL - (time.monotonic() - start) - LAST_CASE
    command = [sys.executable, "-m", "benchmarks.gpu", "--seconds", f"{left:.0f}", "--tests", tests]
    # the page is written after every case, so that no row is lost where the last one takes too long
    code, stopped = run(command, left + LAST_CASE, os.environ)
    say(f"took {time.monotonic() - start:.0f} s with {' and '.join(usable)}")
    return 0 if passed and (stopped or code == 0) else 1


def usable_backends() -> list[str]:
    """Return the GPU backends that work, asked in a process that sees what was just built."""
    script = "import fused_warmup as fw; print(*fw.available_backends())"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [name for name in result.stdout.split() if name in ("cuda", "triton")]


if __name__ == "__main__":
    sys.exit(main())
