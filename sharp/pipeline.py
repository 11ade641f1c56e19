"""The steps of an engine: plan and launch one, land and commit one.

Without overlap that is one and the same step. With it, a call of step() plans and launches the next step
while the one before still runs, and then lands that one: the device has its next work before the host waits,
and planning, committing and texts take place while it computes. Two steps at most are in flight; the first
call lands nothing, the last launches nothing.

Knows the order of things, the clock, and what becomes of a step that fails. Refuses to know threads, callers
and when to step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from sharp.config import EngineConfig
from sharp.event_log import EventLog
from sharp.failures import StepFailed, ends_the_step_only
from sharp.interrupts import uninterrupted
from sharp.live import LiveRequests
from sharp.plan import BatchPlan, Launched, SampleOutput, StepModel
from sharp.request import Request, Status
from sharp.scheduler import Scheduler
from sharp.trace import Phases, RunStats, StepRecord
from sharp.watch import Watch
from sharp.watchdog import expected_seconds


@dataclass
class _Flight:
    """A step on its way, and what is known of it so far."""

    plan: BatchPlan
    began: float
    launched: Launched
    phases: Phases
    not_scheduled: dict[str, str] = field(default_factory=dict)
    waiting_for: str | None = None


def overlaps(model: StepModel, config: EngineConfig) -> bool:
    """Whether steps overlap: as config says, or else as the model does (StepModel tells how)."""
    return bool(getattr(model, "overlaps", False)) if config.overlap is None else config.overlap


class Pipeline:
    """Steps of `scheduler` through `model`. lock: guards scheduler and live; never held while the model
    works. die: called with an error after which requests and texts may disagree, before it is raised."""

    def __init__(
        self,
        model: StepModel,
        scheduler: Scheduler,
        live: LiveRequests,
        lock: threading.RLock,
        die: Callable[[BaseException], None],
        *,
        overlap: bool,
    ) -> None:
        self.model, self.scheduler, self.live = model, scheduler, live
        self.overlap = overlap
        self.stats = RunStats()
        self.log = EventLog(scheduler)
        self.watch = Watch(partial(expected_seconds, scheduler, self.stats))  # is told of each phase
        self.last_plan: BatchPlan | None = None
        self._lock, self._die = lock, die
        self._flights: deque[_Flight] = deque()  # launched, oldest first
        self._settled = True  # False: a step was begun and has not come to its end
        self._landed = 0.0  # when the latest step was committed, by _lap()
        self._left, self._away = 0.0, 0.0  # when step() was last left; seconds between calls of it

    @property
    def busy(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._flights)

    def step(self) -> None:
        """Launch the next step, and land the one before it; or the same one without overlap, or whatever is
        in flight when there is nothing to launch.

        Raises StepFailed for a step whose requests alone have ended by it. After any other error nothing here
        may be relied on, but for KeyboardInterrupt: then call roll_back().
        """
        if not self._settled or len(self.scheduler.in_flight) != len(self._flights):
            self.roll_back()  # a second Ctrl-C came in the way of it, or a plan was made by hand and left
        self._settled = False
        if self._flights:
            self._away += time.perf_counter() - self._left
        flight, failure = self._launch()
        while len(self._flights) > (1 if self.overlap and flight is not None else 0):
            self._land()
        if failure is not None:
            # Only now: what ended in the step before does not depend on this one.
            self._fail(*failure)
        self._left, self._settled = time.perf_counter(), True

    def _lap(self, phase: str | None, step: int | None = None) -> float:
        """Now, where one phase ends and the next begins, see Watch.lap; in seconds, those between two calls
        of step() left out: a notebook's reader is no part of a step."""
        return self.watch.lap(phase, step) - self._away

    def _moves(self) -> tuple[int, int]:
        return self.scheduler.preemptions, len(self.scheduler.table)

    def _launch(self) -> tuple[_Flight | None, tuple[BatchPlan, BaseException] | None]:
        """The step that was launched, or None; and the plan that could not be, with its error."""
        began = self._lap("plan")
        with uninterrupted(), self._lock:
            before = self._moves()
            plan = self.scheduler.plan()
            if plan is None and self.live and not self._flights:
                # Rather an error that reaches everybody than a loop for ever.
                raise RuntimeError(
                    f"{len(self.live)} requests are unfinished, but the scheduler plans nothing"
                )
            if plan is None:
                if self._moves() != before:
                    self.log.plan_nothing()
                self.watch.cut()
                return None, None
            self.log.plan(plan)
            not_scheduled, waiting_for = self.scheduler.not_scheduled, self.scheduler.waiting_for
        self.last_plan = plan
        self.watch.planned(plan)
        planned = self._lap("launch", plan.step)
        try:
            launched = self.model.launch(plan)
        except Exception as error:
            if not ends_the_step_only(error):
                raise
            self.watch.cut()
            return None, (plan, error)
        phases = Phases(plan_s=planned - began, launch_s=self._lap(None) - planned)
        flight = _Flight(plan, began, launched, phases, not_scheduled, waiting_for)
        self._flights.append(flight)
        return flight, None

    def _land(self) -> None:
        flight = self._flights[0]
        waiting = self._lap("wait", flight.plan.step)
        try:
            sampled = self.model.land(flight.launched)
        except Exception as error:
            if not ends_the_step_only(error):
                raise
            self._fail(flight.plan, error)
        flight.phases.wait_s = self._lap(None) - waiting
        flight.phases.gpu_s = flight.launched.gpu_s
        with uninterrupted(), self._lock:
            try:
                self._commit(flight, sampled)
            except StepFailed:
                raise
            except BaseException as error:  # no Ctrl-C gets here: lengths and texts may disagree now
                self._die(error)
                raise

    def _commit(self, flight: _Flight, sampled: SampleOutput) -> None:
        scheduler, plan = self.scheduler, flight.plan
        began = self._lap("commit", plan.step)
        blocks_used = scheduler.pages.num_written()  # before finished requests give theirs back
        try:
            updated = scheduler.commit(plan, sampled)
        except FloatingPointError as error:  # nothing has changed
            self._fail(plan, error)
        self._flights.popleft()
        moved, stopped = self.live.of(updated), []
        self.watch.enter("detokenise")
        for _, sample in moved:
            stop = sample.read()
            if stop is not None:
                scheduler.stop_on_text(sample.request, stop)
                stopped.append((sample.request.request_id, stop))
        self.watch.leave()
        now = self._lap(None)
        flight.phases.commit_s = now - began
        # Since the step before was committed, if this one waited for it: so all of them add up to the whole.
        flight.phases.seconds = now - max(flight.began, self._landed)
        self._landed = now
        record = StepRecord.of(
            plan,
            flight.phases,
            scheduler,
            blocks_used=blocks_used,
            num_sampled=len(updated),
            not_scheduled=flight.not_scheduled,
            waiting_for=flight.waiting_for,
        )
        self.stats.add(record)
        self.log.commit(plan, sampled, stopped, record)
        scheduler.policy.observe(plan, record.seconds)
        self.watch.committed(record, flight.launched.streams)
        lives = [live for live, _ in moved]
        self.live.tell_progress(lives)
        self.live.deliver(lives)

    # What goes wrong ------------------------------------------------------------------------------

    def roll_back(self) -> None:
        """Forget the steps in flight: their tokens will be planned again, and come out the same."""
        with uninterrupted(), self._lock:
            for plan in reversed(self.scheduler.in_flight):
                self.scheduler.rollback(plan)
                self.log.rollback()
            self._flights.clear()
            self.watch.gave_up()
            self._settled = True

    def forget(self) -> None:
        """Nothing is in flight any more: the engine has ended."""
        self._flights.clear()
        self.watch.gave_up()

    def _fail(self, plan: BatchPlan, error: BaseException) -> NoReturn:
        """End the requests of a plan in flight and raise StepFailed. A step planned on top of it is undone:
        what it has of other requests is planned again, without the copies or ids that it may have lacked."""
        failed = StepFailed(plan, error)
        with uninterrupted(), self._lock:
            requests: list[Request] = []
            for newest in reversed(self.scheduler.in_flight):
                requests = self.scheduler.rollback(newest)  # in the end: those of `plan`, the oldest
                self.log.rollback()
            self._flights.clear()
            self.watch.gave_up()
            ended = list(dict.fromkeys(live for live, _ in self.live.of(requests)))
            for request in (request for live in ended for request in live.unfinished()):
                if request.status is not Status.FINISHED:  # it may have ended with one it was to fork from
                    self.scheduler.fail(request)
                    self.log.end(request, "error")
            self.live.fail(ended, failed)
            self._settled = True
        raise failed from error
