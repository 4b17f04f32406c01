"""The packed all-reduce of a step: sums over the rows of each process, added up over all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .spread import Group, Spread

# numbers for each slot: magnitudes and squares of the gradients
_NORMS = 2
# non-finite elements, and overflows that a GradScaler found
_FLAGS = 2


class Reduction:
    """Sums that processes add up, in one tensor: one message for each group that rows are spread over.

    Rows that are spread over the same groups share a slot. A sum is added up over the groups that its rows
    are spread over, and over another group it is that of the first process there, so that all processes have
    the same bits. The order is that of ``csrc/totals.h``.

    Args:
        spreads: How each row is spread.
        n_groups: Number of parameter groups.
        n_sums: Sums over each layer or channel that the rule takes, 0 if it takes none.
        device: Where the rows are.

    Attributes:
        totals: All sums, float64 of ``[squares + norms + flags + sums of layers]``.
        squares: Squares of the parameters, ``[groups, slots]``.
        norms: Magnitudes and squares of the gradients, ``[slots, 2]``.
        flags: Numbers of non-finite elements and of overflows, ``[2]``.
        layers: Sums of the layers one after the other.
        slots: Slot of each row.
        first_totals: Index of the first sum of each row among those of the layers.
        is_known: Whether all processes are known that rows are spread over; else norms are NaN.
    """

    def __init__(self, spreads: Sequence[Spread], n_groups: int, n_sums: int, device: torch.device) -> None:
        numbers: dict[tuple[Group, ...], int] = {}
        self.slots = [numbers.setdefault(spread.groups, len(numbers)) for spread in spreads]
        self.is_known = all(spread.is_known for spread in spreads)
        self._groups = tuple(dict.fromkeys(group for groups in numbers for group in groups))
        per_slot = [frozenset(groups) for groups in numbers]
        sizes = [_n_sums(spread, n_sums) for spread in spreads]
        ends = np.cumsum(sizes, dtype=np.int64)
        self.first_totals = ends - sizes
        # the groups that each number is added up over
        everywhere = frozenset(self._groups)
        spread_over = per_slot * n_groups
        spread_over += [groups for groups in per_slot for _ in range(_NORMS)] + [everywhere] * _FLAGS
        self._ends = {
            "squares": len(per_slot) * n_groups,
            "norms": len(spread_over),
            "layers": len(spread_over) + int(ends[-1]) if len(ends) else len(spread_over),
        }
        layers = [frozenset(spread.layer_groups) for spread in spreads]
        spread_over += [layers[i] for i in np.repeat(np.arange(len(layers)), sizes)]
        self.totals = torch.zeros(len(spread_over), dtype=torch.float64, device=device)
        self._takes = {group: np.array([group in groups for groups in spread_over]) for group in self._groups}
        # what another process of a group passes on
        self._masks = {
            group: torch.from_numpy(~takes).to(device)
            for group, takes in self._takes.items()
            if torch.distributed.get_rank(group) != 0 and not takes.all()
        }
        first, second, third = self._ends.values()
        self.squares = self.totals[:first].view(n_groups, -1) if n_groups else self.totals[:0]
        self.norms = self.totals[first : second - _FLAGS].view(-1, _NORMS)
        self.flags, self.layers = self.totals[second - _FLAGS : second], self.totals[second:third]

    @property
    def n_slots(self) -> int:
        """Number of slots."""
        return len(self.norms)

    def add_up(self, *, squares: bool = False, norms: bool = False, layers: bool = False) -> None:
        """Add sums up over all processes, each of which makes this call; the device is not waited for.

        Args:
            squares: Whether to take the squares of the parameters.
            norms: Whether to take the norms and flags.
            layers: Whether to take the sums of the layers.
        """
        wanted = [name for name, w in (("squares", squares), ("norms", norms), ("layers", layers)) if w]
        if not wanted:
            return
        names = list(self._ends)
        first = names.index(wanted[0])
        part = slice(self._ends[names[first - 1]] if first else 0, self._ends[wanted[-1]])
        for group in self._messages(part):
            mask = self._masks.get(group)
            if mask is not None:
                self.totals[part].masked_fill_(mask[part], 0.0)
            torch.distributed.all_reduce(self.totals[part], group=group)
        if norms and not self.is_known:
            self.norms.fill_(torch.nan)

    def _messages(self, part: slice) -> Iterator[Group]:
        """Yield the groups that any of some sums are added up over."""
        return (group for group in self._groups if self._takes[group][part].any())

    def any(self, flag: bool) -> bool:
        """Return whether a condition holds in any process, all of which make this call; waits for them."""
        self.flags[0] = float(flag)
        self.add_up(norms=True)
        return bool(self.flags[0] != 0.0)


def _n_sums(spread: Spread, n_sums: int) -> int:
    """Return how many sums a layer has: those of the channels if they are cut, else its own and a count."""
    if n_sums == 0:
        return 0
    return spread.channels * n_sums if spread.is_cut else n_sums + 1


def make_reduction(
    spreads: Sequence[Spread], n_groups: int, n_sums: int, device: torch.device
) -> Reduction | None:
    """Return the reduction of a step, None if no row is spread over processes."""
    if all(spread.is_known and not spread.groups for spread in spreads):
        return None
    return Reduction(spreads, n_groups, n_sums, device)
