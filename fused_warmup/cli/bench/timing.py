"""Interleaved timing of several steps within one process."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Step = Callable[[], object]
Clock = Callable[[], float]

# RAdam is rectified from the sixth step on
_WARM_UP_ROUNDS = 6
_MIN_ROUNDS, _MAX_ROUNDS = 7, 300
# no name of a peer
_CEILING = ""


def nothing() -> None:
    """Do nothing."""


def in_order(*steps: Step) -> Step:
    """Return a step that runs the given steps one after the other."""

    def run() -> None:
        for step in steps:
            step()

    return run


def timed(function: Step, clock: Clock = time.perf_counter) -> float:
    """Return the seconds that one call takes."""
    begin = clock()
    function()
    return clock() - begin


@dataclass(frozen=True)
class Comparison:
    """Result of one interleaved comparison.

    Attributes:
        ours: Median seconds of our step.
        peer: Name of the fastest peer.
        theirs: Median seconds of its step.
        spread: Quartiles of the ratio taken round by round.
        rounds: Seconds of our step, round by round.
        others: Share of the machine's cores that other processes used meanwhile, or None.
        ceiling: Median seconds of the ceiling, or None.
    """

    ours: float
    peer: str
    theirs: float
    spread: tuple[float, float]
    rounds: tuple[float, ...]
    others: float | None
    ceiling: float | None = None

    @property
    def ratio(self) -> float:
        """Median of theirs / median of ours; above 1 we are faster."""
        return self.theirs / self.ours


# torch.utils.benchmark.Timer times each statement in a block of its own; without interleaved rounds the ratio
# would depend on how the clock speed drifts from block to block
class InterleavedTimer:
    """Times our step and its peers in turn, so that all see the same state of the machine.

    Args:
        ours: Our step.
        peers: Steps to compare with, by name; the fastest one counts.
        setup: Untimed preparation that every step needs.
        ceiling: A pass over as much memory, which is no peer.
        clock: Seconds from an arbitrary origin.
    """

    def __init__(
        self,
        ours: Step,
        peers: Mapping[str, Step],
        setup: Step = nothing,
        ceiling: Step | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.ours, self._setup, self._clock = ours, setup, clock
        # first, so that a peer runs before our step as before any other
        self._others = {_CEILING: ceiling, **peers} if ceiling else dict(peers)
        self._times: dict[str, list[float]] = {name: [] for name in self._others}
        self._usage = _cpu_usage()

    def run_peers(self) -> None:
        """Run and time the ceiling and every peer once, then the untimed setup of our step."""
        for name, step in self._others.items():
            self._setup()
            self._times[name].append(timed(step, self._clock))
        self._setup()

    def warm_up(self, seconds: float) -> int:
        """Run a few rounds that do not count.

        Args:
            seconds: Time budget of the whole comparison.

        Returns:
            The number of rounds that fit into the budget.
        """
        one_round = in_order(self.run_peers, self.ours)
        durations = [timed(one_round, self._clock) for _ in range(_WARM_UP_ROUNDS)]
        for times in self._times.values():
            times.clear()
        self._usage = _cpu_usage()
        fitting = int(seconds / max(statistics.median(durations), 1e-9))
        return max(_MIN_ROUNDS, min(_MAX_ROUNDS, fitting))

    def compare(self, ours: Sequence[float]) -> Comparison:
        """Compare our times with those of the fastest peer.

        Args:
            ours: Seconds of our step in every round since the warm-up.

        Returns:
            Medians and the quartiles of the ratio.
        """
        others = _share_of_others(self._usage, _cpu_usage())
        medians = {name: statistics.median(times) for name, times in self._times.items()}
        ceiling = medians.pop(_CEILING, None)
        peer = min(medians, key=medians.__getitem__)
        ratios = [theirs / own for own, theirs in zip(ours, self._times[peer], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        own = statistics.median(ours)
        return Comparison(own, peer, medians[peer], (low, high), tuple(ours), others, ceiling)


def interleaved(
    ours: Step,
    peers: Mapping[str, Step],
    setup: Step = nothing,
    ceiling: Step | None = None,
    *,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """Compare our step with its peers in interleaved rounds after a warm-up.

    Args:
        ours: Our step.
        peers: Steps to compare with, by name.
        setup: Untimed preparation that every step needs.
        ceiling: A pass over as much memory, which is no peer.
        seconds: Time budget.
        clock: Seconds from an arbitrary origin.

    Returns:
        Medians, and quartiles of the ratio to the fastest peer.
    """
    timer = InterleavedTimer(ours, peers, setup, ceiling, clock)
    times = []
    for _ in range(timer.warm_up(seconds)):
        timer.run_peers()
        times.append(timed(ours, clock))
    return timer.compare(times)


def _cpu_usage() -> tuple[float, float, float] | None:
    """Return seconds of all cores, the busy ones of these, and those of this process; None if unknown."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        first_line = Path("/proc/stat").read_text().split("\n", 1)[0]
        ticks = [int(word) for word in first_line.split()[1:9]]
        per_second = os.sysconf("SC_CLK_TCK")
        idle, waiting_for_disk = ticks[3], ticks[4]
        busy = sum(ticks) - idle - waiting_for_disk
        return sum(ticks) / per_second, busy / per_second, time.process_time()
    return None


def _share_of_others(
    before: tuple[float, float, float] | None, after: tuple[float, float, float] | None
) -> float | None:
    """Return the share of all cores that other processes used between two readings; None if unknown."""
    if before is None or after is None or after[0] <= before[0]:
        return None
    cores, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (busy - own) / cores)
