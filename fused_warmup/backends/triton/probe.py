"""A small kernel that finds out whether Triton works on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ...plan.structs import STRUCTS
from .memory import load_struct

LANES = 32


@triton.jit
def count_kernel(chunks, n_chunks, total, LANES: tl.constexpr):
    """Sum the counts of chunks, with what the kernels of a step are made of: structs, masks, loops, sums."""
    n = tl.load(n_chunks)
    counts = tl.zeros((LANES,), tl.int64)
    for start in range(0, n, LANES):
        i = start + tl.arange(0, LANES)
        counts += load_struct(chunks.to(tl.int64), i, "Chunk", i < n).count
    tl.store(total, tl.sum(counts))


def check_kernel(device: torch.device) -> None:
    """Compile a kernel and run it on a device; waits for the device.

    Args:
        device: The current device, or the CPU in the interpreter.

    Raises:
        RuntimeError: If the result is wrong.
    """
    chunks = np.zeros(LANES + 1, STRUCTS["Chunk"])
    chunks["count"] = np.arange(len(chunks))
    column: Any = torch.from_numpy(chunks.view(np.int64)).to(device)
    n, total = torch.tensor(len(chunks), device=device), torch.zeros((), dtype=torch.int64, device=device)
    # Triton 3.9 warns where the option is not given
    count_kernel[(1,)](column, n, total, LANES=LANES, enable_fp_fusion=False)
    expected = int(chunks["count"].sum())
    if int(total) != expected:
        raise RuntimeError(f"a sum of {expected} gives {int(total)}")
