"""Parts of parameters in this process, and sums over the parts of all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check
from ..distributed.groups import is_distributed, is_flattened_part, placed
from ..distributed.reduction import Reduction, make_reduction
from ..distributed.spread import spread_of
from ..plan.tensors import local_tensor, placed_like


class Shards:
    """Parts of parameters in this process: those of DTensors, and plain tensors as they are.

    Args:
        owner: Name of the caller, for messages.
        params: Parameters, on one device.

    Raises:
        TypeError: If FSDP1 has flattened one.

    Attributes:
        params: The parameters.
        locals: Their parts in this process.
        is_placed: Whether a parameter is a DTensor, as under FSDP2 and tensor parallelism.
        numel: Elements of all parameters, whole.
    """

    def __init__(self, owner: str, params: Sequence[Tensor]) -> None:
        self._owner, self.params = owner, list(params)
        for i, p in enumerate(self.params):
            if is_flattened_part(p):
                hint = "Shard with fully_shard (FSDP2)."
                check.fail(
                    owner, f"params[{i}]", "be a tensor or DTensor", "a part of FSDP1", hint, TypeError
                )
        self.locals = [local_tensor(p) for p in self.params]
        self.is_placed = any(map(is_distributed, self.params))
        self.numel = sum(p.numel() for p in self.params)
        self._spreads = [spread_of(p, by_channel=False) for p in self.params] if self.is_placed else []
        # sums, and the slot of each row, by the number of columns and the rows
        self._reductions: dict[tuple[int, ...], tuple[Reduction | None, Tensor | None]] = {}

    def check_method(self, method: str) -> str:
        """Return the method of products, or raise ``ValueError`` if DTensors do not take it.

        They take differences for ``"auto"``.
        """
        if method == "auto" and self.is_placed:
            return "difference"
        if method == "autograd" and self.is_placed:
            hint = "FSDP2 has no double backward."
            check.fail(self._owner, "method", "be 'difference' for DTensors", method, hint)
        return method

    def part_of(self, index: int, gradient: Tensor) -> Tensor:
        """Return the part of a parameter's gradient in this process; all processes call this."""
        return placed_like(self._owner, index, self.params[index], gradient)

    def runs(self) -> list[tuple[int, int]]:
        """Return the first parameter and the one after the last of runs spread over the same groups."""
        ends = [i for i in range(1, len(self.params)) if not self._is_like(i, i - 1)]
        return list(zip([0, *ends], [*ends, len(self.params)], strict=True))

    def _is_like(self, i: int, j: int) -> bool:
        return not self._spreads or self._spreads[i].groups == self._spreads[j].groups

    def add_up(self, sums: Tensor, firsts: Sequence[int]) -> Tensor:
        """Return the sums over all parameters and processes, each of which makes this call.

        Args:
            sums: Sums over parts of parameters in this process, float64 of ``[rows, k]``.
            firsts: Number of a parameter in each row, which is spread as the others in the row.

        Returns:
            Float64 of ``[k]``, the same bits in all processes.
        """
        key = (sums.shape[1], *firsts)
        if key not in self._reductions:
            self._reductions[key] = self._reduction(firsts, sums.shape[1], sums.device)
        reduction, slots = self._reductions[key]
        if reduction is None or slots is None:
            return sums.sum(0)
        reduction.squares.zero_()
        reduction.squares.index_add_(1, slots, sums.T)
        reduction.add_up(squares=True)
        return reduction.squares.sum(1)

    def _reduction(
        self, firsts: Sequence[int], count: int, device: torch.device
    ) -> tuple[Reduction | None, Tensor | None]:
        """Return a reduction of ``count`` columns, and the slot of each row; None without processes."""
        reduction = make_reduction(self._spreads, count, 0, device)
        if reduction is None:
            return None, None
        return reduction, torch.tensor([reduction.slots[i] for i in firsts], device=device)

    def total(self, sums: Sequence[Tensor]) -> Tensor:
        """Return the sum of a sum over each parameter, 0-dim float64; all processes call this."""
        return self.add_up(torch.stack(list(sums))[:, None], range(len(self.params)))[0]

    def norm(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the L2 norm of a tensor for each parameter, 0-dim float64; all processes call this.

        Args:
            tensors: The parts in this process.
            dtype: Dtype of the sum over one part.
        """
        norms = [torch.linalg.vector_norm(t, dtype=dtype) for t in tensors]
        return self.total([n.to(torch.float64).square() for n in norms]).sqrt()

    def parts_of_flat(self, vector: Tensor) -> Tensor:
        """Return the parts of a vector over all whole parameters, one after the other."""
        pieces = torch.split(vector, [p.numel() for p in self.params])
        pairs = zip(pieces, self.params, strict=True)
        return torch.cat([local_tensor(placed(v.view(p.shape), p)).reshape(-1) for v, p in pairs])
