"""Which code makes the step, chosen by one word."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch

from .base import Backend

BACKENDS = ("reference", "cpu", "triton", "cuda")

_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def unavailable_reason(name: str) -> str | None:
    """Return why a backend cannot be used in this process, or None if it can."""
    if name == "reference":
        return None
    if name in ("cpu", "cuda"):
        try:
            importlib.import_module(f"fused_warmup._{name}")
        except ImportError as error:
            return f"the extension fused_warmup._{name} does not load: {error}"
        if name == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA device"
        return None
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not _interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET is not 1"
    triton = importlib.import_module("triton")
    if not hasattr(triton, "constexpr_function"):
        return f"triton {triton.__version__} is too old, it has no constexpr_function"
    return None


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _reaches(name: str, device: torch.device) -> bool:
    """Whether a backend takes tensors on a device."""
    if name == "triton":
        return device.type == ("cpu" if _interpreted() else "cuda")
    return name == "reference" or name in _PREFERENCE.get(device.type, ())


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that this installation can run."""
    return tuple(name for name in BACKENDS if unavailable_reason(name) is None)


def resolve(name: str, device: torch.device) -> Backend:
    """Return the backend for tensors on ``device``.

    Args:
        name: A backend, or ``"auto"`` for the fastest one that the device has.
        device: Where the parameters are.

    Returns:
        The backend.

    Raises:
        RuntimeError: If the backend cannot be used here; the reason and the available ones are named.
        ValueError: If the backend does not take tensors on this device.
    """
    usable = _PREFERENCE.get(device.type, ("reference",))
    if name == "auto":
        name = next(
            candidate
            for candidate in usable
            if unavailable_reason(candidate) is None and _reaches(candidate, device)
        )
    reason = unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(
            f'backend="{name}" is unavailable: {reason}. Available: {", ".join(available_backends())}.'
        )
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
