"""Watch: what the engine's loop says of its phases, told on to the trace, to NVTX and to the watchdog.

The loop calls lap() at each border between two phases, and uses the time that it returns: one clock for step
records and trace alike. Refuses to influence the loop, and to know what a phase does.

NVTX ranges show in NVIDIA's profilers. They need the package nvtx, and a profiler that is attached when the
engine is made; otherwise there is nothing to call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sharp.trace_events import Trace
from sharp.watchdog import Watchdog

if TYPE_CHECKING:
    from sharp.plan import BatchPlan
    from sharp.trace import StepRecord

NVTX_DOMAIN = "sharp"


def nvtx_domain() -> Any:
    """NVTX's domain of this engine; None without the package, or without a profiler that would hear."""
    try:
        from nvtx import get_domain
    except ImportError:
        return None
    domain = get_domain(NVTX_DOMAIN)
    # Without a tool the package hands out a stand-in, whose calls do nothing.
    return None if type(domain).__name__ == "DummyDomain" else domain


class Watch:
    """The phases of one engine's loop. Called by one thread at a time."""

    def __init__(
        self,
        predict: Callable[[BatchPlan], float | None],
        *,
        clock: Callable[[], float] = time.perf_counter,
        domain: Any = None,
    ) -> None:
        """predict: see Watchdog. domain: NVTX's, or what stands in for it; None: looked for."""
        self.trace = Trace()
        self.watchdog = Watchdog(predict)
        self._clock = clock
        self._domain = nvtx_domain() if domain is None else domain
        self._attributes: dict[str, Any] = {}  # of NVTX, by phase
        self._phase: tuple[str, float, int | None] | None = None  # the open one
        self._inner: tuple[str, float] | None = None  # and what is open in it

    def lap(self, phase: str | None, step: int | None = None) -> float:
        """Now: the end of the phase before, if one is open, and the begin of `phase` (None: of none).

        step: of the phase that begins. One that began without, because it was not planned yet, has this."""
        now = self._clock()
        before, domain = self._phase, self._domain
        if before is not None:
            name, start, own = before
            self.trace.add(name, start, now, step if own is None else own)
            if domain is not None:
                domain.pop_range()
        self._phase = None if phase is None else (phase, now, step)
        if domain is not None and phase is not None:
            domain.push_range(self._attributes_of(phase))
        return now

    def enter(self, part: str) -> None:
        """A part of the open phase begins. Parts do not nest."""
        self._inner = (part, self._clock())
        if self._domain is not None:
            self._domain.push_range(self._attributes_of(part))

    def leave(self) -> None:
        """The part is over."""
        if self._inner is None or self._phase is None:
            return
        (part, start), self._inner = self._inner, None
        self.trace.add(part, start, self._clock(), self._phase[2])
        if self._domain is not None:
            self._domain.pop_range()

    def cut(self) -> None:
        """Whatever is open ends without a span: the step was given up, or there was nothing to plan."""
        for open_one in (self._inner, self._phase):
            if open_one is not None and self._domain is not None:
                self._domain.pop_range()
        self._inner = self._phase = None

    def planned(self, plan: BatchPlan) -> None:
        """A step is about to be queued: from now on it is in flight."""
        self.watchdog.begin(plan)

    def committed(self, record: StepRecord, streams: Iterable[tuple[str, str, float, float]] = ()) -> None:
        """The oldest step in flight is over. streams: what a device did for it, as (row, name, start, end) in
        seconds of this clock, where a model knows."""
        self.watchdog.end()
        for row, name, start, end in streams:
            self.trace.add_stream(row, name, start, end, record.step)
        self.trace.count(self._clock(), record)

    def gave_up(self) -> None:
        """No step is in flight any more: they were rolled back, or failed."""
        self.cut()
        self.watchdog.clear()

    def _attributes_of(self, name: str) -> Any:
        if name not in self._attributes:
            self._attributes[name] = self._domain.get_event_attributes(message=name)
        return self._attributes[name]
