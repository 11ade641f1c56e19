"""The only loop: plan, stage, forward, sample, commit; and the promise that nobody who waits on it hangs.

By hand (notebooks, tests): add_request(), then step() until has_unfinished is False. Behind LLM: start() runs the
same step() on a thread, and callers wait on the sinks of their requests. If a step raises, the engine is dead: every
caller gets that very error, later ones EngineDead. Refuses to know files, devices and chat.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from sharp.answer import AnswerText
from sharp.config import EngineConfig, ModelConfig
from sharp.plan import BatchPlan, SampleOutput
from sharp.request import (
    CompletionOutput,
    EngineClosed,
    EngineDead,
    Request,
    RequestOutput,
    SamplingParams,
    Status,
)
from sharp.scheduler import Scheduler
from sharp.trace import RunStats, StepRecord

Sink = SimpleQueue["RequestOutput | BaseException"]


class StepModel(Protocol):
    """What the engine asks of a model; see sharp/model.py."""

    config: ModelConfig
    num_blocks: int
    block_size: int

    def stage(self, plan: BatchPlan) -> Any: ...

    def forward(self, batch: Any) -> Any: ...

    def sample(self, logits: Any, batch: Any) -> SampleOutput: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class _Live:
    """A request that has not finished, its text, and who wants to hear of it."""

    request: Request
    text: AnswerText
    sink: Sink | None
    final_only: bool
    num_seen: int = 0  # output tokens already in the text


class Engine:
    """One model, one scheduler, any number of requests. Safe to call from several threads."""

    def __init__(self, model: StepModel, tokenizer: Any, config: EngineConfig) -> None:
        if model.block_size != config.block_size:
            raise ValueError(f"the model's pages hold {model.block_size} tokens, block_size is {config.block_size}")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.max_model_len = config.max_model_len or model.config.max_position_embeddings
        self.scheduler = Scheduler(config, model.num_blocks, self.max_model_len, model.config.eos_token_ids)
        self.stats = RunStats()
        self.last_plan: BatchPlan | None = None
        self._live: dict[str, _Live] = {}
        self._outbox: list[RequestOutput] = []
        self._order = itertools.count()
        self._lock = threading.RLock()  # guards the scheduler and _live; never held during a forward
        self._work = threading.Condition(self._lock)
        self._step_lock = threading.Lock()  # one step at a time
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closed = False

    # Requests ---------------------------------------------------------------------------------------------------

    def make_request(
        self, prompt: str | list[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> Request:
        """Check a prompt and its parameters at the door, and give them a Request that is not yet queued.

        Raises TypeError or ValueError naming the value and the limit; RequestTooLarge if it could never fit.
        """
        params = params if params is not None else SamplingParams()
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling parameters must be SamplingParams, not {type(params).__name__}")
        order = next(self._order)
        request = Request(
            request_id=request_id if request_id is not None else f"request-{order}",
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=self._token_ids(prompt),
            params=params,
            seed=derive_seed(self.config.seed, order) if params.seed is None else params.seed,
        )
        self.scheduler.refuse_if_too_large(request)
        return request

    def _token_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            token_ids: list[int] = self.tokenizer.encode(prompt)
        elif isinstance(prompt, (list, tuple, np.ndarray)):
            token_ids = []
            for token_id in prompt:
                if isinstance(token_id, (bool, np.bool_)) or not isinstance(token_id, (int, np.integer)):
                    raise TypeError(f"token ids must be whole numbers, not {token_id!r}")
                if not 0 <= token_id < self.model.config.vocab_size:
                    raise ValueError(f"token id {token_id} is outside [0, {self.model.config.vocab_size})")
                token_ids.append(int(token_id))
        else:
            raise TypeError(f"a prompt must be text or a list of token ids, not {type(prompt).__name__}")
        if not token_ids:
            raise ValueError("the prompt is empty: at least one token is needed")
        return token_ids

    def submit(self, request: Request, sink: Sink | None = None, *, final_only: bool = False) -> str:
        """Queue a request made by make_request. Its outputs (or the engine's error) go to `sink` as well.

        Raises EngineDead, EngineClosed, QueueFull, or ValueError for an id that is in use.
        """
        with self._lock:
            self._raise_if_over()
            if request.request_id in self._live:
                raise ValueError(f"request id {request.request_id!r} is in use")
            text = AnswerText(self.tokenizer.detokenizer(), request.params.stop_strings)
            self.scheduler.add(request)
            self._live[request.request_id] = _Live(request, text, sink, final_only)
            self._work.notify_all()
        return request.request_id

    def add_request(
        self, prompt: str | list[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Check and queue a request; returns its id. Raises what make_request and submit raise."""
        with self._lock:
            self._raise_if_over()
        return self.submit(self.make_request(prompt, params, request_id))

    def abort(self, request_id: str) -> bool:
        """End a request and free its pages; False if there is no such unfinished request."""
        with self._lock:
            live = self._live.get(request_id)
            if live is None or self._error is not None:
                return False
            self.scheduler.finish(live.request, "abort")
            self._deliver([live])
        return True

    @property
    def has_unfinished(self) -> bool:
        with self._lock:
            return bool(self._live) or bool(self._outbox)

    # A step -------------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one step; returns the outputs of the requests that moved, empty if there is nothing to do.

        An interruption (Ctrl-C) leaves the engine as it was before the step. Any other error is the engine's end:
        it is raised here and in every caller that waits.
        """
        with self._step_lock:
            clock = [time.perf_counter()]
            plan = None
            try:
                with _uninterrupted(), self._lock:
                    self._raise_if_over()
                    plan = self.scheduler.plan()
                    self.last_plan = plan or self.last_plan
                if plan is not None:
                    clock.append(time.perf_counter())
                    batch = self.model.stage(plan)
                    clock.append(time.perf_counter())
                    logits = self.model.forward(batch)
                    clock.append(time.perf_counter())
                    sampled = self.model.sample(logits, batch)
                    clock.append(time.perf_counter())
                    executed, plan = plan, None  # from here on the step has happened: never roll it back
                    with _uninterrupted(), self._lock:
                        self._commit(executed, sampled, clock)
            except KeyboardInterrupt:
                if plan is not None:
                    with self._lock:
                        self.scheduler.rollback(plan)
                raise
            except (EngineDead, EngineClosed):
                raise
            except BaseException as error:
                self._die(error)
                raise
        outputs, self._outbox = self._outbox, []
        return outputs

    def _commit(self, plan: BatchPlan, sampled: SampleOutput, clock: list[float]) -> None:
        updated = self.scheduler.commit(plan, sampled)
        moved = [self._live[request.request_id] for request in updated]
        for live in moved:
            self._read(live)
        pages = self.scheduler.blocks  # counted before finished ones are forgotten, so that a peak is a peak
        clock.append(time.perf_counter())
        plan_s, stage_s, forward_s, sample_s, commit_s = np.diff(clock).tolist()
        self.stats.add(
            StepRecord(
                step=plan.step, plan_s=plan_s, stage_s=stage_s, forward_s=forward_s, sample_s=sample_s,
                commit_s=commit_s, num_tokens=plan.num_tokens, num_seqs=plan.num_seqs,
                num_decodes=plan.num_decodes, num_sampled=len(sampled.token_ids),
                padded_tokens=plan.padded_tokens, blocks_used=int((plan.block_table >= 0).sum()),
                blocks_total=pages.num_blocks, running=len(self.scheduler.running),
                waiting=len(self.scheduler.waiting),
            )
        )  # fmt: skip
        self._deliver(moved)

    def _read(self, live: _Live) -> None:
        """Turn a request's new tokens into text, and end the request where a stop string appears."""
        request = live.request
        token_ids = request.output_token_ids
        while live.num_seen < len(token_ids):
            # The id that ended an answer (eos or a stop id) is no part of its text.
            ended_it = request.finish_reason == "stop" and live.num_seen == len(token_ids) - 1
            if not ended_it:
                live.text.push(token_ids[live.num_seen])
            live.num_seen += 1
        if request.status is Status.FINISHED:
            live.text.finish()
        if live.text.stopped_by is not None and request.stop_reason != live.text.stopped_by:
            self.scheduler.stop_on_text(request, live.text.stopped_by)
            live.text.finish()

    def _deliver(self, moved: list[_Live]) -> None:
        for live in moved:
            finished = live.request.status is Status.FINISHED
            if finished:
                live.text.finish()
                del self._live[live.request.request_id]
            if live.final_only and not finished:
                continue
            output = _snapshot(live)
            if live.sink is not None:
                live.sink.put(output)
            else:
                self._outbox.append(output)

    @property
    def last_step(self) -> StepRecord | None:
        """The record of the latest step."""
        return self.stats.history[-1] if self.stats.history else None

    # The loop thread, the end -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run steps on a thread whenever there is work. Outputs then reach sinks only."""
        with self._lock:
            self._raise_if_over()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="sharp-engine", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                with self._work:
                    while not self._closed and not self._live:
                        self._work.wait()
                    if self._closed:
                        return
                self.step()
        except (EngineDead, EngineClosed):
            return
        except BaseException as error:  # step() has told the callers; this is for an error outside of it
            self._die(error)

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
        if self._error is not None:
            raise EngineDead(f"the engine is dead: {type(self._error).__name__}: {self._error}") from self._error
        if self._closed:
            raise EngineClosed("the engine is closed")

    def _die(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
            self._tell_all(self._error)

    def _tell_all(self, error: BaseException) -> None:
        """Hand `error` to every caller that waits on a sink; each sink hears it once."""
        sinks = {id(live.sink): live.sink for live in self._live.values() if live.sink is not None}
        for sink in sinks.values():
            sink.put(error)
        self._live.clear()

    def close(self, timeout: float = 10.0) -> None:
        """End the loop; callers that still wait get EngineClosed. The model is closed too. May be called twice."""
        with self._lock:
            already, self._closed = self._closed, True
            self._tell_all(EngineClosed("the engine was closed while the request was running"))
            self._work.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        if not already and (self._thread is None or not self._thread.is_alive()):
            self.model.close()


def _snapshot(live: _Live) -> RequestOutput:
    request = live.request
    answer = CompletionOutput(
        index=0,
        text=live.text.visible,
        token_ids=tuple(request.output_token_ids),
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        logprobs=tuple(request.logprobs) if request.params.logprobs is not None else None,
    )
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=tuple(request.prompt_token_ids),
        outputs=(answer,),
        finished=request.status is Status.FINISHED,
    )


def derive_seed(seed: int, order: int) -> int:
    """A 64-bit seed for the engine's `order`-th request, well mixed (numpy's SeedSequence)."""
    return int(np.random.SeedSequence([seed, order]).generate_state(1, np.uint64)[0])


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the end of the block: lengths, pages and texts change together or not at all.

    Only the main thread can be interrupted, so elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[Any] = []
    previous = signal.signal(signal.SIGINT, lambda *args: pressed.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        if callable(previous):
            previous(*pressed[0])
        elif previous is not signal.SIG_IGN:
            raise KeyboardInterrupt
