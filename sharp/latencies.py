"""Latencies: when each token of each answer came, and what percentiles that makes.

Knows times alone, real ones or a simulator's. Refuses to know where they come from.

TTFT: from a request's arrival to its first token. ITL: from one token of an answer to its next.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 95, 99, 100)


@dataclass(frozen=True)
class Spread:
    """Percentiles of some times, in seconds; count: of how many. All 0 for none."""

    count: int
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Any, weights: Any = None) -> Spread:
        """weights: how often each time occurred (whole numbers); None: once."""
        values = np.asarray(seconds, float)
        if not len(values):
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        order = np.argsort(values)
        times = np.ones(len(values), np.int64) if weights is None else np.asarray(weights, np.int64)
        upto = np.cumsum(times[order])
        # The smallest time that at least so many percent do not exceed.
        places = np.searchsorted(upto, np.array(PERCENTILES) / 100 * upto[-1] - 1e-9)
        return cls(int(upto[-1]), *(float(values[order[place]]) for place in places))

    def ms(self) -> str:
        return f"p50 {self.p50 * 1e3:.2f}, p95 {self.p95 * 1e3:.2f}, p99 {self.p99 * 1e3:.2f}, " + (
            f"max {self.max * 1e3:.2f} ms"
        )


class TokenClock:
    """Collects arrivals and tokens as they come; memory grows by a few bytes a step, not by a token's."""

    def __init__(self) -> None:
        self.tokens = 0
        self._arrived: dict[Hashable, float] = {}
        self._last: dict[Hashable, float] = {}
        self._gaps, self._gap_counts = array("d"), array("q")
        self._fresh: set[Hashable] = set()
        self.ttft: dict[Hashable, float] = {}

    def arrive(self, request: Hashable, now: float) -> None:
        self._arrived[request] = now

    def token(self, request: Hashable, now: float) -> None:
        """A token of a request that has arrived."""
        self.tokens += 1
        last = self._last.get(request)
        self._last[request] = now
        if last is None:
            self.ttft[request] = now - self._arrived.pop(request)
            return
        if request in self._fresh:
            self._fresh.discard(request)
            return
        gap = now - last
        # All that decode in a step see the same gap: one entry for all of them.
        if self._gaps and self._gaps[-1] == gap:
            self._gap_counts[-1] += 1
        else:
            self._gaps.append(gap)
            self._gap_counts.append(1)

    def tokens_of_all(self, requests: Collection[Hashable], times: Sequence[float]) -> None:
        """At each of these times a token of each of the requests, whose last tokens came together."""
        last = self._last[next(iter(requests))]
        for now in times:
            self._gaps.append(now - last)
            self._gap_counts.append(len(requests))
            last = now
        self._last.update(dict.fromkeys(requests, last))
        self.tokens += len(requests) * len(times)

    def forget_gaps(self) -> None:
        """Count times between tokens from the next token on, those that reach over this moment left out."""
        self._gaps, self._gap_counts = array("d"), array("q")
        self._fresh = set(self._last)

    def end(self, request: Hashable) -> None:
        """No more tokens of this one."""
        self._last.pop(request, None)
        self._arrived.pop(request, None)

    @property
    def itl(self) -> Spread:
        return Spread.of(self._gaps, self._gap_counts)

    def ttft_of(self, requests: Any = None) -> Spread:
        """Of all requests that had a token, or of those given."""
        chosen = self.ttft.keys() if requests is None else requests
        return Spread.of([self.ttft[request] for request in chosen if request in self.ttft])
