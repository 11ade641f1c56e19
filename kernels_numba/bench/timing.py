"""Whose turn it is, how often, and what the times come to: the part of the bench that needs no GPU.

Knows: contenders as functions that queue one call, lanes that queue and time them. Refuses to know: ops,
arrays, CUDA. Sources of the rules: a card under load throttles and drifts, so contenders take turns; an
empty queue would time launches, so a replay of a captured graph holds many calls.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

COLD_BYTES = 120 << 20  # touched between two turns of a set: over twice the L2 of an H100 or H200 (50 MB)
MAX_SETS = 2048
LONG_ENOUGH_US = 1000.0  # of one replay, so that the gap before it does not count
REPLAY_LIMIT_US = 200_000.0  # of one replay: a call of 200 ms needs no company
MAX_CALLS = 4096  # launches held by one graph
SUSTAINED_CALLS = 400
STEADY_US = 10_000.0  # a call this long is under sustained load by itself

Queue = Callable[[], Any]


class Lane(Protocol):
    """A stream, and how work is queued, captured and timed on it."""

    stream: Any  # what a contender is given
    cold_bytes: int  # what must be touched between two turns of a buffer for it to have left L2

    def capture(self, work: Queue) -> Queue:
        """`work`, queued once while it is captured -> a function that queues all of it again."""

    def elapsed_us(self, work: Queue) -> float:
        """Queue `work`, wait for it, and say how long the device took."""


@dataclass(frozen=True)
class Measurement:
    """Microseconds of one call: median, least and most over the rounds; err: in tolerances (1 passes).

    calls: in a row, each round; sets: buffer sets that they walk over.
    """

    us: float
    low: float
    high: float
    err: float
    calls: int
    sets: int


def cold_bytes(l2_bytes: int) -> int:
    """COLD_BYTES, or 2.4 times a larger L2."""
    return max(COLD_BYTES, l2_bytes * 12 // 5)


def buffer_sets(touched_bytes: int, cold: bool = True, needed: int = COLD_BYTES) -> int:
    """How many sets to rotate so that `needed` bytes are touched before a set's turn comes again.

    At least 2 and at most MAX_SETS, if cold; else 1."""
    return max(2, min(MAX_SETS, -(-needed // max(1, touched_bytes)) + 1)) if cold else 1


def l2_state(touched_bytes: int, sets: int, needed: int = COLD_BYTES) -> str:
    """ "cold L2", "warm L2", or that too little is touched to tell."""
    if sets == 1:
        return "warm L2"
    turned = (sets - 1) * touched_bytes
    return "cold L2" if turned >= needed else f"L2 may hold the {turned / 1e6:.0f} MB rotated"


def interleaved(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each contender once a round, in turn, so that a throttling card slows all alike. ValueError under 1
    round."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least 1 is required")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(call())
    return times


class Timed:
    """One contender ready to be timed: a captured graph of `calls` calls over the first of `sets` sets."""

    def __init__(self, lane: Lane, call: Callable[[int], Any], sets: int) -> None:
        """call(i) queues one call on set i. It must have run before: compilation belongs to nobody's time."""
        self.lane, self.sets = lane, sets
        first = min(lane.elapsed_us(lambda: call(0)) for _ in range(2))  # the first may set things up
        calls = min(sets, max(1, int(REPLAY_LIMIT_US / max(first, 1e-3))))

        def walk(number: int) -> None:
            for i in range(number):
                call(i % sets)

        walk(calls)  # what a call sets up for its buffers when it first meets them must not be captured
        self._replay = lane.capture(lambda: walk(calls))
        lane.elapsed_us(self._replay)
        whole = max(lane.elapsed_us(self._replay), 1e-3)
        repeats = min(math.ceil(LONG_ENOUGH_US / whole), MAX_CALLS // calls)
        if repeats > 1:
            calls *= repeats
            walk(min(calls, sets))
            self._replay = lane.capture(lambda: walk(calls))
        self.calls = calls

    def once(self, least_calls: int = 1) -> float:
        """Microseconds of one call, over as many whole replays as hold `least_calls`, queued back to back."""
        replays = -(-least_calls // self.calls)

        def work() -> None:
            for _ in range(replays):
                self._replay()

        return self.lane.elapsed_us(work) / (replays * self.calls)


def race(
    timed: Mapping[str, Timed], errors: Mapping[str, float], rounds: int, least_calls: int = 1
) -> dict[str, Measurement]:
    """Interleaved rounds (and one more first, which warms up): the measurement of each contender."""
    takes = {name: (lambda t=one: t.once(least_calls)) for name, one in timed.items()}
    interleaved(takes, 1)
    return {
        name: Measurement(
            statistics.median(us), min(us), max(us), errors[name],
            -(-least_calls // timed[name].calls) * timed[name].calls,
            min(timed[name].sets, timed[name].calls),
        )
        for name, us in interleaved(takes, rounds).items()
    }  # fmt: skip
