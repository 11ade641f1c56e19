"""Watchdog: names a step that takes far longer than predicted, while it runs. It never ends one.

One thread for all engines of a process looks at the steps in flight a few times a second; it ends when
nothing has been in flight for a while, and a step's begin starts it again. The loop pays two appends.
Refuses to know why a step is late: a hanging kernel, a device that somebody else uses, a machine that swaps.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharp.plan import BatchPlan
    from sharp.scheduler import Scheduler
    from sharp.trace import RunStats, StepRecord

TIMES = 20.0  # its prediction: then a step is named,
FLOOR_S = 1.0  # and after so many seconds at least: pauses of a busy host are no news
FIRST_S = 60.0  # of a step before any was measured: kernels may be compiled in it
RECENT = 64  # steps that a prediction looks back on
POLL_S = 0.25
IDLE_POLLS = 20  # without a step in flight, then the thread ends
NAMES = 4  # requests that a warning names

logger = logging.getLogger("sharp")


def pace(records: Iterable[StepRecord], num_tokens: int) -> float | None:
    """Seconds that a step of so many tokens takes by the latest steps (newest first); None without any.

    The median of their times, each stretched by as many times as it had fewer tokens: too long for steps that
    are bound by reading weights, which a watchdog may be, never too short for larger ones."""
    recent = [r.seconds * max(1.0, num_tokens / r.num_tokens) for r in islice(records, RECENT)]
    return statistics.median(recent) if recent else None


def expected_seconds(scheduler: Scheduler, stats: RunStats, plan: BatchPlan) -> float | None:
    """What an engine expects of a step: what its policy says, else the pace of its latest steps."""
    said = scheduler.policy.predict(plan)
    return pace(reversed(list(stats.history)), plan.num_tokens) if said is None else said


class Watchdog:
    """The steps in flight of one engine. predict: seconds of a plan, None if nobody can say; asked from the
    watching thread, and only for a step that is late enough to matter."""

    def __init__(
        self,
        predict: Callable[[BatchPlan], float | None],
        *,
        warn: Callable[[str], object] = logger.warning,
        clock: Callable[[], float] = time.perf_counter,
        floor_s: float = FLOOR_S,
        first_s: float = FIRST_S,
    ) -> None:
        self._predict, self._warn, self._clock = predict, warn, clock
        self._floor_s, self._first_s = floor_s, first_s
        self._flying: deque[tuple[BatchPlan, float]] = deque()
        self._named = -1  # the latest step that was named: once is enough
        PATROL.watch(self)

    def begin(self, plan: BatchPlan) -> None:
        """A step is about to be queued."""
        self._flying.append((plan, self._clock()))
        if not PATROL.running:  # asked after the step is in flight, see Patrol._run
            PATROL.start()

    def end(self) -> None:
        """The oldest step in flight is committed."""
        if self._flying:
            self._flying.popleft()

    def clear(self) -> None:
        """No step is in flight any more: they were given up."""
        self._flying.clear()

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    def look(self) -> None:
        """Name the oldest step in flight if it is late. The patrol calls this."""
        try:
            plan, since = self._flying[0]
        except IndexError:
            return
        elapsed = self._clock() - since
        if elapsed < self._floor_s or plan.step <= self._named:
            return
        predicted = self._predict(plan)
        limit = self._first_s if predicted is None else max(self._floor_s, TIMES * predicted)
        if elapsed < limit:
            return
        self._named = plan.step
        self._warn(describe(plan, elapsed, predicted))


def describe(plan: BatchPlan, elapsed: float, predicted: float | None) -> str:
    """The warning: which step, what is in it, how long it has taken, what was expected."""
    names: Sequence[str] = plan.request_ids[:NAMES]
    more = f" and {plan.num_seqs - NAMES} more" if plan.num_seqs > NAMES else ""
    expected = "no step was measured before it" if predicted is None else f"predicted were {predicted:.3g} s"
    return (
        f"step {plan.step} has been running for {elapsed:.1f} s, {expected}: {plan.num_tokens} tokens of "
        f"{plan.num_seqs} sequences ({plan.num_decodes} decodes), requests {', '.join(names)}{more}"
    )


class Patrol:
    """The thread that looks at every watchdog of the process."""

    def __init__(self, poll_s: float = POLL_S) -> None:
        self.running = False
        self.poll_s = poll_s
        self._watched: weakref.WeakSet[Watchdog] = weakref.WeakSet()
        self._lock = threading.Lock()

    def watch(self, dog: Watchdog) -> None:
        """Look at this one too, as long as anybody else holds it."""
        with self._lock:
            self._watched.add(dog)

    def start(self) -> None:
        """Start the thread, unless it runs."""
        with self._lock:
            if not self.running:
                self.running = True
                threading.Thread(target=self._run, name="sharp-watchdog", daemon=True).start()

    def _run(self) -> None:
        idle = 0
        while True:
            time.sleep(self.poll_s)
            idle = 0 if self._look() else idle + 1
            if idle < IDLE_POLLS:
                continue
            # A step that begins before this line is seen below; one that begins after it starts a thread.
            self.running = False
            if not self._look():
                return
            with self._lock:
                if self.running:
                    return  # that thread is there
                self.running = True

    def _look(self) -> int:
        """Look at all; how many steps are in flight."""
        with self._lock:
            dogs = list(self._watched)
        for dog in dogs:
            dog.look()
        return sum(dog.in_flight for dog in dogs)


PATROL = Patrol()
