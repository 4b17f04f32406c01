"""How steps are timed: repetitions that interleave, within one process."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Step = Callable[[], object]
Clock = Callable[[], float]

# RAdam is rectified from the sixth step on
_WARM_UP = 6
_ROUNDS = (7, 300)
_PASSES = 5


def nothing() -> None:
    """Do nothing."""


def in_order(*steps: Step) -> Step:
    """Return the step that makes the given ones."""

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
    """What one race gave.

    Attributes:
        ours: Median seconds of our step.
        peer: Name of the fastest peer.
        theirs: Median seconds of its step.
        spread: Quartiles of the ratio taken round by round.
        rounds: Seconds of our step, round by round.
        others: Share of the machine's cores that other processes used meanwhile, or None.
    """

    ours: float
    peer: str
    theirs: float
    spread: tuple[float, float]
    rounds: tuple[float, ...]
    others: float | None

    @property
    def ratio(self) -> float:
        """Median of theirs / median of ours; above 1 we are faster."""
        return self.theirs / self.ours


class Race:
    """Interleaved repetitions of our step and its peers.

    Args:
        ours: Our step.
        peers: Steps to compare with, by name; the fastest counts.
        before: What every step needs; it is not timed.
        clock: Seconds from an arbitrary origin.
    """

    def __init__(
        self, ours: Step, peers: Mapping[str, Step], before: Step = nothing, clock: Clock = time.perf_counter
    ) -> None:
        self.ours, self._peers, self._before, self._clock = ours, peers, before, clock
        self._times: dict[str, list[float]] = {name: [] for name in peers}
        self._usage = _usage()

    def before_ours(self) -> None:
        """Make all of a round but our own step."""
        for name, peer in self._peers.items():
            self._before()
            self._times[name].append(timed(peer, self._clock))
        self._before()

    def warm_up(self, seconds: float) -> int:
        """Make the rounds that do not count.

        Args:
            seconds: How long the race may take.

        Returns:
            The number of rounds that fit.
        """
        took = [timed(in_order(self.before_ours, self.ours), self._clock) for _ in range(_WARM_UP)]
        for times in self._times.values():
            times.clear()
        self._usage = _usage()
        low, high = _ROUNDS
        return max(low, min(high, int(seconds / max(statistics.median(took), 1e-9))))

    def result(self, ours: Sequence[float]) -> Comparison:
        """Compare.

        Args:
            ours: Seconds of our step in every round since the warm-up.

        Returns:
            The comparison with the fastest peer.
        """
        others = _others(self._usage, _usage())
        medians = {name: statistics.median(times) for name, times in self._times.items()}
        peer = min(medians, key=medians.__getitem__)
        ratios = [b / a for a, b in zip(ours, self._times[peer], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Comparison(statistics.median(ours), peer, medians[peer], (low, high), tuple(ours), others)


def interleaved(
    ours: Step,
    peers: Mapping[str, Step],
    before: Step = nothing,
    *,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """Compare our step with its peers, warmed up, in rounds that interleave.

    Args:
        ours: Our step.
        peers: Steps to compare with, by name.
        before: What every step needs; it is not timed.
        seconds: How long it may take.
        clock: Seconds from an arbitrary origin.

    Returns:
        Medians, and quartiles of the ratio to the fastest peer.
    """
    race = Race(ours, peers, before, clock)
    times = []
    for _ in range(race.warm_up(seconds)):
        race.before_ours()
        times.append(timed(ours, clock))
    return race.result(times)


def stream(n_bytes: int) -> Step:
    """Return the ceiling: a pass that reads and writes ``n_bytes`` in total."""
    a = torch.ones(n_bytes // 8)
    # a factor of 1 keeps the values normal for ever; the memory traffic is the same
    return lambda: a.mul_(1.0)


def stream_seconds(n_bytes: int) -> list[float]:
    """Return the times of a few passes of ``stream``, after one that does not count."""
    run = stream(n_bytes)
    run()
    return [timed(run) for _ in range(_PASSES)]


def _usage() -> tuple[float, float, float] | None:
    """Return seconds of all cores, busy ones among them, and those of this process; None where unknown."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        per_second = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / per_second, (sum(ticks) - ticks[3] - ticks[4]) / per_second, time.process_time()
    return None


def _others(
    before: tuple[float, float, float] | None, after: tuple[float, float, float] | None
) -> float | None:
    if before is None or after is None or after[0] <= before[0]:
        return None
    cores, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (busy - own) / cores)
