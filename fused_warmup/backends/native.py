"""The compiled backends: one call with the address of the table."""

from __future__ import annotations

import torch

from .. import _checks as check
from .. import _cpu
from ..plan import Plan

# below so many elements a thread costs more than it saves
_ELEMENTS_PER_THREAD = 1 << 14


class CpuBackend:
    """C++ kernels for tensors on the CPU.

    Args:
        instruction_set: One of ``_cpu.instruction_sets()``; None takes the widest. The results are the same
            bit for bit wherever products and sums round once, that is but for the baseline.
    """

    name = "cpu"
    carries = 0

    def __init__(self, instruction_set: str | None = None) -> None:
        names = _cpu.instruction_sets()
        if instruction_set is None:
            instruction_set = names[-1]
        self._isa = names.index(check.one_of("CpuBackend", "instruction_set", instruction_set, names))
        self._rules = {name: i for i, name in enumerate(_cpu.rules())}

    def prepare(self, plan: Plan) -> None:
        """Nothing to load."""

    def step(self, plan: Plan) -> None:
        """Make one step; returns when it is done, with the same bits for any number of threads."""
        threads = max(1, min(torch.get_num_threads(), plan.numel // _ELEMENTS_PER_THREAD))
        _cpu.step(self._isa, self._rules[plan.rule], plan.address, threads)
