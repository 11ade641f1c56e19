"""The only loop: plan, launch, land, commit; and the promise that nobody who waits on it hangs.

By hand (notebooks, tests): add_request(), then step() until has_unfinished is False. Behind LLM: start() runs
the same step() on a thread, and callers wait on the sinks of their requests. A step that fails ends its own
requests: who waits for them gets StepFailed, and the loop goes on. Any other error is the engine's end
(failures.py says which): every caller gets that very error, later ones EngineDead. Refuses to know files,
devices and chat, and what a step is made of (pipeline.py).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from sharp import driver, interpreter
from sharp.answer import AnswerText
from sharp.config import EngineConfig
from sharp.door import Door
from sharp.event_log import EventLog
from sharp.failures import StepFailed
from sharp.interrupts import uninterrupted
from sharp.live import LiveRequest, LiveRequests, Progress, Sample, Sink
from sharp.pipeline import Pipeline, overlaps
from sharp.plan import BatchPlan, StepModel
from sharp.request import (
    EngineClosed,
    EngineDead,
    QueueFull,
    Request,
    RequestOutput,
    SamplingParams,
    Status,
)
from sharp.scheduler import Scheduler
from sharp.trace import RunStats, StepRecord
from sharp.trace_events import Trace


class Engine:
    """One model, one scheduler, any number of requests. Safe to call from several threads."""

    def __init__(self, model: StepModel, tokenizer: Any, config: EngineConfig) -> None:
        if model.block_size != config.block_size:
            raise ValueError(
                f"the model's pages hold {model.block_size} tokens, block_size is {config.block_size}"
            )
        self.model, self.tokenizer, self.config = model, tokenizer, config
        trained = model.config.max_position_embeddings
        self.max_model_len = config.max_model_len or trained
        if self.max_model_len > trained:
            raise ValueError(
                f"max_model_len {self.max_model_len} is over the model's limit of {trained} positions"
            )
        self.scheduler = Scheduler(config, model.num_blocks, self.max_model_len, model.config.eos_token_ids)
        self.door = Door(tokenizer, model.config.vocab_size, config.seed)
        self._live = LiveRequests()
        self._lock = threading.RLock()  # guards the scheduler and _live; never held while the model works
        self.overlap = overlaps(model, config)
        self._pipeline = Pipeline(
            model, self.scheduler, self._live, self._lock, self._die, overlap=self.overlap
        )
        self._work = threading.Condition(self._lock)
        self._step_lock = threading.Lock()  # one step at a time
        self._dropped: deque[str] = deque()  # ids to abort before the next plan, see abort_soon
        self._thread: threading.Thread | None = None
        self._collected = 0  # steps when garbage was last collected in a pause
        self._error: BaseException | None = None
        self._closed = False
        self._model_closed = False

    # Requests --------------------------------------------------------------------------------

    def make_request(
        self,
        prompt: str | list[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Request:
        """Check a prompt and its parameters at the door, and give them a Request that is not yet queued.

        priority: a lower number goes first, as in vLLM, under scheduling_policy "priority"; under every
        policy the highest numbers are preempted first.
        Raises TypeError or ValueError naming the value and the limit; RequestTooLarge if it could never fit.
        """
        request = self.door.make_request(prompt, params, request_id, priority)
        self.scheduler.sizes.refuse_if_too_large(request)
        self.scheduler.pages.extend_keys(request)  # here, where no lock is held: long prompts take a while
        return request

    def submit(
        self,
        request: Request,
        sink: Sink | None = None,
        *,
        final_only: bool = False,
        progress: Progress | None = None,
    ) -> str:
        """Queue a request made by make_request. Its outputs (or the engine's error) go to `sink`: one for
        each token, or the finished one alone. progress: called on the engine's thread once a step with the
        ids of all its requests that have new tokens, which costs next to nothing where outputs are final.

        Raises EngineDead, EngineClosed, QueueFull, or ValueError for an id that is in use.
        """
        with uninterrupted(), self._lock:
            self._raise_if_over()
            taken = self._live.in_use(request)
            if taken is not None:
                raise ValueError(f"request id {taken!r} is in use")
            samples = [
                Sample(one, AnswerText(self.tokenizer.detokenizer(), one.params.stop_strings))
                for one in (request, *request.samples)
            ]
            try:
                self.scheduler.add(request)
            except QueueFull as full:
                wait = self.stats.estimate_seconds(self.scheduler.tokens_ahead())
                raise QueueFull(full.length, full.limit, wait) from None
            self.log.arrive(request)
            limit = request.params.timeout_s
            deadline = None if limit is None else time.monotonic() + limit
            self._live.add(LiveRequest(samples, sink, final_only, deadline, progress))
            self._work.notify_all()
        return request.request_id

    def add_request(
        self,
        prompt: str | list[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Check and queue a request and return its id. Raises what make_request and submit raise."""
        with self._lock:
            self._raise_if_over()
        return self.submit(self.make_request(prompt, params, request_id, priority))

    def abort(self, request_id: str) -> bool:
        """End a request and free its pages; False if there is no such unfinished request."""
        with uninterrupted(), self._lock:
            return self._abort(request_id)

    def _abort(self, request_id: str) -> bool:
        live = self._live.get(request_id)
        if live is None or self._error is not None:
            return False
        self._end(live, "abort")
        return True

    def _end(self, live: LiveRequest, reason: str) -> None:
        for request in live.unfinished():
            if request.status is not Status.FINISHED:  # a sample that has not forked ends with the first one
                self.scheduler.finish(request, reason)
                self.log.end(request, reason)
        self._live.deliver([live])

    def abort_soon(self, request_ids: Iterable[str]) -> None:
        """End requests before the next step is planned. Takes no lock.

        For finalizers: the garbage collector may run one in the middle of plan(), in the thread that holds
        the lock.
        """
        self._dropped.extend(request_ids)

    @property
    def has_unfinished(self) -> bool:
        """Whether step() has something to do or to return: also the last step in flight, though all may have
        ended before it."""
        with self._lock:
            return bool(self._live) or self._live.unfetched or self._pipeline.busy

    # A step ----------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one step; returns the outputs of the requests that moved, empty if there is nothing to do.

        With overlap: launch the next step and land the one before, whose outputs are returned; the first call
        returns none, and the last one launches nothing.

        An interruption (Ctrl-C) leaves the engine as it was before the steps in flight. StepFailed says that
        a step's requests have ended by it; the outputs so far come with the next call, and the engine goes
        on. Any other error is the engine's end: it is raised here and in every caller that waits.
        """
        was_alive = self._error is None
        with self._step_lock:
            if was_alive and self._error is not None:
                raise self._error  # it died in another thread's step while this one waited
            with self._lock:
                self._raise_if_over()
            try:
                self._end_what_is_over()
                self._pipeline.step()
            except KeyboardInterrupt:
                self._pipeline.roll_back()
                raise
            except StepFailed:
                raise
            except BaseException as error:
                self._die(error)
                raise
        with self._lock:
            return self._live.fetch()

    def _end_what_is_over(self) -> None:
        with uninterrupted(), self._lock:
            while self._dropped:
                self._abort(self._dropped.popleft())
            for live in self._live.overdue(time.monotonic()):
                self._end(live, "timeout")

    @property
    def stats(self) -> RunStats:
        """Totals, and the latest steps."""
        return self._pipeline.stats

    @property
    def log(self) -> EventLog:
        """All that the scheduler was asked and said: log.save(path)."""
        return self._pipeline.log

    @property
    def trace(self) -> Trace:
        """When each phase of the latest steps ran: trace.save(path)."""
        return self._pipeline.watch.trace

    @property
    def last_plan(self) -> BatchPlan | None:
        """The latest plan; with overlap it may still be in flight."""
        return self._pipeline.last_plan

    @property
    def last_step(self) -> StepRecord | None:
        """The record of the latest step that has landed."""
        return self.stats.history[-1] if self.stats.history else None

    # The loop thread, the end ----------------------------------------------------------------------------

    def start(self) -> None:
        """Run steps on a thread whenever there is work. Outputs then reach sinks only."""
        with self._lock:
            self._raise_if_over()
            if self._thread is None:
                interpreter.hold()  # the thread releases it
                self._thread = threading.Thread(target=self._run, name="sharp-engine", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                if not self._wait_for_work():
                    return
                with suppress(StepFailed):  # its requests have been told
                    self.step()
        except (EngineDead, EngineClosed):
            return
        except BaseException as error:  # step() has told the callers; this is for an error outside of it
            self._die(error)
        finally:
            interpreter.release()
            if self._closed:
                self._close_model()

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; False once the engine is closed. What a collection of garbage
        takes is taken here, where nobody waits for it."""
        steps = self.stats.steps
        while True:
            due = steps >= self._collected + interpreter.STEPS
            with self._work:
                if self._work.wait_for(
                    lambda: self._closed or self._live or self._pipeline.busy,
                    interpreter.IDLE_S if due else None,
                ):
                    return not self._closed
            interpreter.collect()
            self._collected = steps

    @property
    def error(self) -> BaseException | None:
        """What the engine died of."""
        return self._error

    @property
    def alive(self) -> bool:
        """False once the engine is dead or closed, or its thread has ended."""
        return self._error is None and not self._closed and (self._thread is None or self._thread.is_alive())

    def raise_if_over(self) -> None:
        """Raise EngineDead or EngineClosed unless requests can be taken."""
        with self._lock:
            self._raise_if_over()
            if not self.alive:
                raise EngineDead("the engine's thread has ended without an error of its own")

    def _raise_if_over(self) -> None:
        if self._error is None and getattr(self.model, "uses_cuda", False):
            try:
                driver.refuse_if_lost()  # through this engine's work or another's
            except driver.CudaError as error:
                self._die(error)
        if self._error is not None:
            raise EngineDead(
                f"the engine is dead: {type(self._error).__name__}: {self._error}"
            ) from self._error
        if self._closed:
            raise EngineClosed("the engine is closed")

    def _die(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None and not self._closed:
                self._error = error
            self._live.tell_all(error)
            self._pipeline.forget()

    def close(self, timeout: float = 10.0) -> None:
        """End the loop; callers that still wait get EngineClosed. The model is closed too. May be called
        twice."""
        with uninterrupted(), self._lock:
            self._closed = True
            for request in [*self.scheduler.running, *self.scheduler.waiting]:
                self.scheduler.finish(request, "abort")  # a step that is under way passes it over
            self._live.tell_all(EngineClosed("the engine was closed while the request was running"))
            self._work.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        if self._thread is None or not self._thread.is_alive():
            if self._step_lock.acquire(
                timeout=timeout
            ):  # a step by hand in another thread still uses the model
                self._close_model()
                self._step_lock.release()

    def _close_model(self) -> None:
        with self._lock:
            already, self._model_closed = self._model_closed, True
            self._pipeline.forget()
        if not already:
            self.model.close()
