"""Backend selection by name."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from functools import cache

import torch

from .base import Backend

BACKENDS = ("reference", "cpu", "triton", "cuda")

# the oldest one that the tests compile with; torch 2.9.1 brings it
OLDEST_TRITON = (3, 5, 1)

_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def unavailable_reason(name: str, device: torch.device | None = None) -> str | None:
    """Return why a backend cannot be used in this process, or None if it can.

    Args:
        name: A backend.
        device: Device of the tensors, on which the kernels of ``cuda`` are tried once per process. Without
            one they are not, because that would make a context there.
    """
    if name == "cuda":
        return _cuda_reason(device)
    reasons = {"cpu": _cpu_reason, "triton": _triton_reason}
    return reasons[name]() if name in reasons else None


def _cpu_reason() -> str | None:
    try:
        from .. import _cpu  # noqa: F401
    except ImportError as error:
        return f"the extension fused_warmup._cpu does not load: {error}"
    return None


def _cuda_reason(device: torch.device | None) -> str | None:
    try:
        from .._cuda import probe
    except ImportError as error:
        return f"the extension fused_warmup._cuda does not load: {error}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    known = device is not None and device.type == "cuda" and device.index is not None
    return _probed(probe, device.index if device is not None and known else -1)


@cache
def _probed(probe: Callable[[int], str | None], index: int) -> str | None:
    """Return why the kernels do not run on a device; -1 asks about the driver alone."""
    return probe(index)


def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not _interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET is not 1"
    try:
        import triton
    except Exception as error:
        return f"the package triton does not load: {error}"
    release = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:3])
    if release < OLDEST_TRITON:
        needed = ".".join(map(str, OLDEST_TRITON))
        return f"triton {triton.__version__} is too old, triton {needed} or later is needed"
    return _triton_problem("cpu" if _interpreted() else "cuda")


@cache
def _triton_problem(device: str) -> str | None:
    """Return why Triton cannot run a kernel on a device, or None if it can; tried once in a process."""
    try:
        from .triton.probe import check_kernel

        check_kernel(torch.device(device))
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        return f"a kernel fails: {type(error).__name__}: {first}"
    return None


def _interpreted() -> bool:
    """Return whether Triton interprets its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _reaches(name: str, device: torch.device) -> bool:
    """Return whether a backend supports tensors on a device."""
    if name == "triton":
        return device.type == ("cpu" if _interpreted() else "cuda")
    return name == "reference" or name in _PREFERENCE.get(device.type, ())


def device_type(name: str) -> str:
    """Return the type of device whose tensors a backend supports, the CPU where it supports several."""
    return next(kind for kind in ("cpu", "cuda") if _reaches(name, torch.device(kind)))


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that can be used in this process."""
    return tuple(name for name in BACKENDS if unavailable_reason(name) is None)


def resolve(name: str, device: torch.device) -> Backend:
    """Return the backend for tensors on ``device``.

    Args:
        name: A backend, or ``"auto"`` for the fastest one available for the device.
        device: Device of the parameters.

    Returns:
        The backend.

    Raises:
        RuntimeError: If the backend is unavailable; the message has the reason and the available backends.
        ValueError: If the backend does not support tensors on this device.
    """
    usable = _PREFERENCE.get(device.type, ("reference",))
    if name == "auto":
        name = next(
            candidate
            for candidate in usable
            if unavailable_reason(candidate, device) is None and _reaches(candidate, device)
        )
    reason = unavailable_reason(name, device)
    if reason is not None:
        others = ", ".join(other for other in BACKENDS if unavailable_reason(other, device) is None)
        raise RuntimeError(f'backend="{name}" is unavailable: {reason}. Available: {others}.')
    if not _reaches(name, device):
        raise ValueError(f'backend="{name}" must get tensors that it can reach, got tensors on {device}.')
    if name == "cpu":
        from .native import CpuBackend

        return CpuBackend()
    if name == "cuda":
        from .native import CudaBackend

        return CudaBackend()
    if name == "triton":
        from .triton.launch import TritonBackend

        return TritonBackend()
    from .reference import ReferenceBackend

    return ReferenceBackend()
