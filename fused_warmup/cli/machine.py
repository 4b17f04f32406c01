"""What a measurement must name: versions and the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy
import torch

from .. import __version__

# with many more than this the system ends the process
MOST_THREADS = 1024


def versions() -> dict[str, str]:
    """Return the versions of everything that computes."""
    return {
        "fused_warmup": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor, as well as the system knows it."""
    try:
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except (OSError, ValueError):
        pass
    return platform.processor() or platform.machine() or "unknown"


def describe() -> dict[str, Any]:
    """Return what timings depend on besides the code; the backend "cpu" must be built."""
    from .. import _cpu

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _cpu.instruction_sets()[-1],
        "versions": versions(),
    }
