"""Versions and machine description for measurements."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy
import torch

from .. import __version__

# far more threads would make the system end the process
MAX_THREADS = 1024


def versions() -> dict[str, str]:
    """Return the versions of this package, Python, torch and numpy."""
    return {
        "fused_warmup": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the model name of the processor, or ``"unknown"``."""
    try:
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except (OSError, ValueError):
        pass
    return platform.processor() or platform.machine() or "unknown"


def describe() -> dict[str, Any]:
    """Describe the machine: processor, threads, instruction set and versions; needs the backend ``"cpu"``."""
    from .. import _cpu

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _cpu.instruction_sets()[-1],
        "versions": versions(),
    }
