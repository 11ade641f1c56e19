"""DeviceClock: when a device's timing events happened, by the host's clock.

A driver tells milliseconds between two events, as float32: exact to a microsecond over seconds, useless over
hours. So times are counted from a base event that is renewed every REBASE_S. Host and device clocks drift
apart; a step cannot have begun on the device before it was queued, nor have ended after the host saw its end,
and what contradicts that is shifted. Knows events by `elapsed_ms`, `done` and `synchronize` (driver.Event);
refuses to know what lies between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

REBASE_S = 8.0  # float32 milliseconds are exact to 0.5 us up to here, as the events themselves are


class DeviceClock:
    """The events of one stream on the host's clock."""

    def __init__(
        self,
        new_event: Callable[[], Any],
        record: Callable[[Any], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """new_event: makes a timing event; record: records one on the stream. Waits for the stream once."""
        self._record, self._clock = record, clock
        self._base, self._next = new_event(), new_event()
        record(self._base)
        self._base.synchronize()
        self._base_time = clock()  # late by the host's waking up, which the first step's end shows
        self._renewing = False

    def interval(self, start: Any, end: Any, queued: float, *, more: bool = False) -> tuple[float, float]:
        """The host's times of two events that have both happened, `start` before `end`. queued: the host's
        time before `start` was recorded. more: events of the same step will be asked for, so the base stays
        one that was recorded before them."""
        now = self._clock()
        begin = self._base_time + self._base.elapsed_ms(start) / 1e3
        finish = begin + start.elapsed_ms(end) / 1e3
        shift = max(0.0, queued - begin)
        shift += min(0.0, now - (finish + shift))  # if both cannot hold, the end does
        self._base_time += shift
        if not more:
            self._renew(begin + shift - self._base_time)
        return begin + shift, finish + shift

    def _renew(self, age: float) -> None:
        if self._renewing and self._next.done:
            self._base_time += self._base.elapsed_ms(self._next) / 1e3
            self._base, self._next = self._next, self._base
            self._renewing = False
        elif not self._renewing and age > REBASE_S:
            self._record(self._next)
            self._renewing = True
