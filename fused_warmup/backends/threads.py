"""Number of OpenMP threads of the CPU kernels, also in forked processes."""

from __future__ import annotations

import os

import torch

# a thread for fewer elements costs more than it saves
_ELEMENTS_PER_THREAD = 1 << 14


class _Pool:
    """State of the threads that GNU OpenMP keeps between parallel regions.

    Attributes:
        used: Whether a kernel of this process has run with more than one thread.
        lost: Whether this process was forked after that. It has none of the threads, but OpenMP would wait
            for them for ever.
    """

    def __init__(self) -> None:
        self.used = self.lost = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self.lost = self.lost or self.used


_pool = _Pool()


def threads_for(numel: int) -> int:
    """Return the number of OpenMP threads for a kernel over so many elements."""
    count = 1 if _pool.lost else max(1, min(torch.get_num_threads(), numel // _ELEMENTS_PER_THREAD))
    _pool.used = _pool.used or count > 1
    return count
