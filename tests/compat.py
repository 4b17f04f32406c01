"""Runs the tests of the Triton kernels with every supported version of Triton: ``make compat``.

Versions other than the installed one lie in folders of their own below ``build/triton``, which pip fills
(``python tests/compat.py install`` those that ``make test`` needs), and come first on the path of a new process.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the last release of each minor version from the one that torch 2.9.1 brings
VERSIONS = ("3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
# the versions beside the installed one that make test runs with
ENDS = (VERSIONS[0], VERSIONS[-1])
# the interpreters of 3.5 and 3.6 turn arrays of one element into integers, which numpy 2.4 refuses
INTERPRETED = VERSIONS[2:]
COMPILE, INTERPRET = "tests/backends/test_triton_compile.py", "tests/interpreted.py"


def is_installed(version: str) -> bool:
    """Return whether a version is that of the environment."""
    return importlib.util.find_spec("triton") is not None and metadata.version("triton") == version


def folder(version: str) -> Path:
    """Return the folder of a version that is not that of the environment."""
    return ROOT / "build" / "triton" / version


def install(version: str) -> None:
    """Let pip fill the folder of a version, unless it is there; exit with a message if pip fails."""
    target = folder(version)
    if is_installed(version) or target.exists():
        return
    unfinished = target.with_name(f"{version}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*command, "--target", str(unfinished), f"triton=={version}"]).returncode != 0:
        sys.exit(f"tests/compat.py: pip must install triton {version} into {target}, and failed: see above.")
    unfinished.rename(target)


def run_pytest(
    *options: str, version: str = "", interpreted: bool = False, products: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process of its own and return what it wrote.

    Args:
        options: Files and options.
        version: Version of Triton; the installed one if empty.
        interpreted: Whether Triton interprets its kernels.
        products: Which rows of products run, see ``pairwise.py``.
    """
    environment = {**os.environ, "PRODUCTS": products, "TRITON_INTERPRET": "1" if interpreted else "0"}
    if version and not is_installed(version):
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(folder(version)), os.environ.get("PYTHONPATH")))
        )
    check = f"import triton; assert triton.__version__ == {version!r}, triton.__file__"
    if version:
        subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=environment, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)


def main() -> None:
    """Install what ``make test`` needs, or install and test all versions."""
    if sys.argv[1:] == ["install"]:
        for version in ENDS:
            install(version)
        return
    for version in VERSIONS:
        install(version)
    failed = []
    jobs = [(version, COMPILE) for version in VERSIONS] + [(version, INTERPRET) for version in INTERPRETED]
    for version, file in jobs:
        begin = time.perf_counter()
        run = run_pytest(file, "-n", "auto", version=version, interpreted=file == INTERPRET)
        if run.returncode != 0:
            failed.append(f"{file} with triton {version}")
            print(run.stdout + run.stderr)
        print(
            f"triton {version}, {file}: {run.stdout.strip().splitlines()[-1]}, {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    if failed:
        sys.exit(f"tests/compat.py: {', '.join(failed)} failed.")


if __name__ == "__main__":
    main()
