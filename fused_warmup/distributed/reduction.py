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
        groups = tuple(dict.fromkeys(group for own in numbers for group in own))
        per_slot = [frozenset(own) for own in numbers]
        sizes = [_n_sums(spread, n_sums) for spread in spreads]
        self.first_totals = np.cumsum(sizes, dtype=np.int64) - sizes
        # the groups that numbers are added up over, and how many numbers
        over = per_slot * n_groups + [own for own in per_slot for _ in range(_NORMS)]
        over += [frozenset(groups)] * _FLAGS + [frozenset(spread.layer_groups) for spread in spreads]
        counts = [1] * (len(over) - len(spreads)) + sizes
        first, second = len(per_slot) * n_groups, len(over) - len(spreads)
        self._parts = slice(0, first), slice(first, second), slice(second, sum(counts))
        self.totals = torch.zeros(sum(counts), dtype=torch.float64, device=device)
        self._takes = {group: np.repeat([group in own for own in over], counts) for group in groups}
        # what another process of a group passes on
        self._masks = {
            group: torch.from_numpy(~takes).to(device)
            for group, takes in self._takes.items()
            if torch.distributed.get_rank(group) != 0 and not takes.all()
        }
        self.squares = self.totals[:first].view(n_groups, len(per_slot))
        self.norms = self.totals[first : second - _FLAGS].view(len(per_slot), _NORMS)
        self.flags, self.layers = self.totals[second - _FLAGS : second], self.totals[second:]

    @property
    def n_slots(self) -> int:
        """Number of slots."""
        return len(self.norms)

    def _messages(self, squares: bool, norms: bool, layers: bool) -> Iterator[tuple[Group, slice]]:
        """Yield the groups that sums are added up over, and the place of the sums."""
        wanted = [part for part, w in zip(self._parts, (squares, norms, layers), strict=True) if w]
        for group, takes in self._takes.items():
            # processes may have other layers where they share none of them
            found = [part for part in wanted if takes[part].any()]
            if found:
                yield group, slice(found[0].start, found[-1].stop)

    def messages(self, *, squares: bool = False, norms: bool = False, layers: bool = False) -> list[int]:
        """Return the bytes of each all-reduce that ``add_up`` makes."""
        sizes = [part.stop - part.start for _, part in self._messages(squares, norms, layers)]
        return [size * self.totals.itemsize for size in sizes]

    def add_up(self, *, squares: bool = False, norms: bool = False, layers: bool = False) -> None:
        """Add sums up over all processes, each of which makes this call; the device is not waited for.

        Args:
            squares: Whether to take the squares of the parameters.
            norms: Whether to take the norms and flags.
            layers: Whether to take the sums of the layers.
        """
        for group, part in self._messages(squares, norms, layers):
            mask = self._masks.get(group)
            if mask is not None:
                self.totals[part].masked_fill_(mask[part], 0.0)
            torch.distributed.all_reduce(self.totals[part], group=group)
        if norms and not self.is_known:
            self.norms.fill_(torch.nan)

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
