"""The compiled backends: one call with the address of the packed table."""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks as check
from ..plan.plan import Plan
from ..plan.vector_tables import OPERATIONS, PreconditionerTable, VectorTable
from .threads import threads_for


class CpuBackend:
    """C++ kernels for tensors on the CPU.

    Args:
        instruction_set: One of ``_cpu.instruction_sets()``; None takes the widest. All but the baseline have
            fused multiply-adds and give the same bits.
    """

    name = "cpu"
    max_inline_pointers = 0
    max_captured_pointers = 0

    def __init__(self, instruction_set: str | None = None) -> None:
        from .. import _cpu

        self._cpu = _cpu
        names = _cpu.instruction_sets()
        if instruction_set is None:
            instruction_set = names[-1]
        self._isa = names.index(check.one_of("CpuBackend", "instruction_set", instruction_set, names))
        self._rules = {name: i for i, name in enumerate(_cpu.rules())}

    def prepare(self, plan: Plan) -> None:
        """Do nothing: there are no kernels to load."""

    def step(self, plan: Plan) -> None:
        """Make one step, with the same bits for any number of threads."""
        for stages in plan.stages():
            self._cpu.step(self._isa, self._rules[plan.rule], plan.address, threads_for(plan.numel), stages)

    def vectors(self, operation: str, table: VectorTable) -> None:
        """Apply one of ``vector_tables.OPERATIONS``, with the same bits for any number of threads."""
        self._cpu.vectors(self._isa, OPERATIONS.index(operation), table.address, threads_for(table.numel))

    def preconditioner(self, plan: Plan, table: PreconditionerTable) -> bool:
        """Compute the preconditioner of the next step, if its rule has one."""
        rules = self._cpu.preconditioned()
        if plan.rule not in rules:
            return False
        rule = rules.index(plan.rule)
        self._cpu.preconditioner(self._isa, rule, plan.address, table.address, threads_for(plan.numel))
        return True


class CudaBackend:
    """CUDA kernels: two launches per step, three where the norms must be known beforehand.

    Args:
        module: A module with the functions of ``fused_warmup._cuda``; None imports that.
        max_blocks: Most blocks of a launch, 0 for as many as the device runs at a time. The results are the
            same bit for bit.
    """

    name = "cuda"

    def __init__(self, module: Any = None, max_blocks: int = 0) -> None:
        if module is None:
            from .. import _cuda as module
        self._cuda = module
        self.max_inline_pointers: int = self._cuda.MAX_INLINE_POINTERS
        self.max_captured_pointers: int = self._cuda.MAX_CAPTURED_POINTERS
        self._max_blocks = max_blocks
        self._rules = {name: i for i, name in enumerate(self._cuda.rules())}

    def prepare(self, plan: Plan) -> None:
        """Load the kernels, which cannot be done while a CUDA graph is captured."""
        self._cuda.prepare(self._rules[plan.rule], plan.device.index or 0, plan.has_all_kinds)

    def step(self, plan: Plan) -> None:
        """Queue one step on the current stream."""
        for stages in plan.stages():
            self._cuda.step(
                self._rules[plan.rule],
                plan.address,
                plan.gradients.address,
                len(plan.rows) if plan.gradients.is_stale else 0,
                plan.has_all_kinds,
                plan.device.index or 0,
                _stream(plan.device),
                self._max_blocks,
                stages,
            )

    def vectors(self, operation: str, table: VectorTable) -> None:
        """Queue one of ``vector_tables.OPERATIONS`` on the current stream, same bits for any grid."""
        self._cuda.vectors(
            OPERATIONS.index(operation),
            table.address,
            table.device.index or 0,
            _stream(table.device),
            self._max_blocks,
        )

    def preconditioner(self, plan: Plan, table: PreconditionerTable) -> bool:
        """Queue the preconditioner of the next step, if its rule has one."""
        rules = self._cuda.preconditioned()
        if plan.rule not in rules:
            return False
        self._cuda.preconditioner(
            rules.index(plan.rule),
            plan.address,
            table.address,
            plan.device.index or 0,
            _stream(plan.device),
            self._max_blocks,
        )
        return True


def _stream(device: torch.device) -> int:
    """Return the handle of the current stream; 0 where the kernels run on the host."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
