"""The simulator: the engine's own scheduler over predicted step times, in virtual time.

Every decision is the real one: Scheduler, policy, pages, queue, and when each is taken: with overlap a step
is planned while the one before it runs. Only the model is absent: a step takes what StepPredictor says, on
the device and on the host before and after it, and an answer is as long as the workload says. Refuses to know
tokens' values, files and devices.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import numpy as np

from sharp.config import EngineConfig
from sharp.latencies import Spread, TokenClock
from sharp.latency_target import LatencyTarget
from sharp.plan import BatchPlan, SampleOutput
from sharp.policies import SchedulingPolicy
from sharp.predictor import StepWork
from sharp.quiet import quiet_steps, skip
from sharp.request import QueueFull, Request, RequestTooLarge, SamplingParams
from sharp.scheduler import Scheduler
from sharp.workloads import Arrival


class Predictor(Protocol):
    """Gives a step its seconds: StepPredictor, or a device that a test makes up. One that knows the host's
    too has StepPredictor's parts()."""

    def seconds(self, work: StepWork) -> float: ...


Parts = tuple[float, float, float]  # seconds of the host before a step, of the device, of the host after it


def parts_of(predictor: Predictor) -> Callable[[StepWork], Parts]:
    """A predictor's parts(); where it has none, steps take the host no time."""
    known: Callable[[StepWork], Parts] | None = getattr(predictor, "parts", None)
    return known or (lambda work: (0.0, predictor.seconds(work), 0.0))


class Noisy:
    """A predictor whose steps vary as single steps were seen to vary. noise: factors, equally likely (see
    Curves.noise); the same draws for the same seed. Without noise, the predictor itself."""

    def __init__(self, predictor: Predictor, noise: Sequence[float], seed: int = 0) -> None:
        self._predictor, self._noise = predictor, np.array(noise or (1.0,))
        self._parts = parts_of(predictor)
        self._rng = np.random.default_rng(seed)
        self._drawn: list[float] = []

    def _draw(self) -> float:
        if not self._drawn:
            self._drawn = self._noise[self._rng.integers(0, len(self._noise), 4096)].tolist()
        return self._drawn.pop()

    def seconds(self, work: StepWork) -> float:
        return self._predictor.seconds(work) * self._draw()

    def parts(self, work: StepWork) -> Parts:
        before, device, after = self._parts(work)
        return before, device * self._draw(), after


@dataclass(frozen=True)
class Simulated:
    """What a run came to. Seconds are virtual, but for wall_s: what simulating took."""

    policy: str
    requests: int
    completed: int
    refused: dict[str, int]  # by QueueFull and RequestTooLarge
    steps: int
    seconds: float  # from the first arrival to the last token
    prompt_tokens: int  # of completed requests
    output_tokens: int
    itl: Spread
    ttft: Spread
    queue_mean: float  # requests waiting after a step was planned, in the mean over time
    queue_max: int
    running_max: int
    preemptions: int
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens a second."""
        return self.output_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Flight:
    """A step on its way: what it computes, when its planning began, when the device has done it, seconds of
    the host after that, and who waits meanwhile."""

    plan: BatchPlan
    work: StepWork
    began: float
    end: float
    after: float
    waiting: int


class _Quiet:
    """When steps end that decode what the step before them does, with a key more for each, where nobody comes
    or goes. parts: of a step's work."""

    def __init__(self, work: StepWork, parts: Callable[[StepWork], Parts]) -> None:
        self._work, self._parts, self._done = work, parts, 0

    def _next(self) -> Parts:
        self._done += 1
        work, more = self._work, self._done
        keys = work.keys + more * work.decodes
        return self._parts(StepWork(work.decodes, keys, work.longest + more, (), work.rows))

    def one_by_one(self, steps: int, now: float, until: float) -> list[float]:
        """When the tokens of the next `steps` steps are there, of those that begin before `until`."""
        times: list[float] = []
        while len(times) < steps and now < until:
            now += sum(self._next())
            times.append(now)
        return times

    def overlapped(
        self, steps: int, now: float, until: float, behind: _Flight
    ) -> tuple[list[float], float, float]:
        """The same for `behind`, in flight, and the steps after it; and when the step after all of these was
        planned, and the device had done what came before it."""
        times: list[float] = []
        end, after = behind.end, behind.after
        while True:
            began, free = now, end
            host, device, its_after = self._next()
            now = max(began + host, end) + after
            times.append(now)
            end, after = max(began + host, free) + device, its_after
            if len(times) > steps or now >= until:
                return times, began, free


@cache
def _answer(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


def simulate(
    workload: Sequence[Arrival],
    predictor: Predictor,
    config: EngineConfig,
    *,
    num_blocks: int,
    max_model_len: int,
    look: Callable[[Scheduler, float], None] = lambda scheduler, now: None,
) -> Simulated:
    """Run a workload (by time of arrival) to its end.

    Steps overlap if config.overlap is True. Runs of steps that only decode are computed at once: the policy's
    observe() and `look` hear of the first. look: called after a step is planned, with the virtual time at
    which it is. Raises what the scheduler raises, but for requests that it refuses: those are counted.
    """
    began = time.perf_counter()
    # A workload says nothing of what prompts have in common.
    scheduler = Scheduler(replace(config, prefix_caching=False), num_blocks, max_model_len)
    policy, clock = scheduler.policy, TokenClock()
    refused = {"QueueFull": 0, "RequestTooLarge": 0}
    queue_area, queue_max, running_max = 0.0, 0, 0
    now, coming, steps = 0.0, 0, 0
    start = workload[0].arrival_s if workload else 0.0
    completed = prompt_tokens = 0
    # A policy with an observe() of its own hears of every step; others cannot tell what was skipped.
    steps_alike = type(policy).observe is SchedulingPolicy.observe or isinstance(policy, LatencyTarget)
    prompts: dict[int, list[int]] = {}  # token values mean nothing here, and equal lists are one
    no_logprobs: tuple[None, ...] = ()
    ids = np.ones(config.max_num_batched_tokens, np.int32)
    flying: deque[_Flight] = deque()
    most, free = 2 if config.overlap else 1, 0.0  # steps in flight; when the device has done all it has
    parts, landed = parts_of(predictor), 0.0  # when the latest step's tokens were there

    def launch(at: float) -> float | None:
        """Plan a step at a time, to start when the device has done what it has; when the host has done with
        it, None if there is none."""
        nonlocal free
        plan = scheduler.plan()
        if plan is None:
            return None
        look(scheduler, at)
        work = StepWork.of(plan)
        before, device, after = parts(work)
        free = max(at + before, free) + device
        flying.append(_Flight(plan, work, at, free, after, len(scheduler.waiting)))
        return at + before

    while True:
        while coming < len(workload) and workload[coming].arrival_s <= now:
            arrival = workload[coming]
            length = arrival.prompt_tokens
            request = Request(
                request_id=str(coming),
                prompt=None,
                prompt_token_ids=prompts.setdefault(length, [0] * length),
                params=_answer(arrival.output_tokens),
                seed=0,
                priority=arrival.priority,
            )
            coming += 1
            try:
                scheduler.add(request)
                clock.arrive(request.request_id, arrival.arrival_s)
            except (QueueFull, RequestTooLarge) as error:
                refused[type(error).__name__] += 1
        launched = launch(now)
        if launched is not None:
            now = launched
            if len(flying) < most:
                continue
        elif not flying:
            if coming == len(workload):
                break
            now = max(now, workload[coming].arrival_s)
            continue
        flight = flying.popleft()
        plan, now = flight.plan, max(now, flight.end) + flight.after
        took, landed = now - max(flight.began, landed), now
        queue_area += flight.waiting * took
        queue_max = max(queue_max, flight.waiting)
        steps += 1
        rows = len(plan.logits_rows)
        if len(no_logprobs) != rows:
            no_logprobs = (None,) * rows
        ended = 0
        for request in scheduler.commit(plan, SampleOutput(ids[:rows], no_logprobs)):
            clock.token(request.request_id, now)
            if request.finish_reason is not None:
                clock.end(request.request_id)
                ended += 1
                prompt_tokens += len(request.prompt_token_ids)
        completed += ended
        running_max = max(running_max, plan.num_seqs)
        policy.observe(plan, took)
        if ended or not steps_alike or min(plan.num_decodes, rows) < len(scheduler.table):
            continue
        # All that runs has decoded and got a token (a prompt read one token at a time has none yet), and will
        # again until somebody ends or comes: no plan is needed to know.
        next_arrival = workload[coming].arrival_s if coming < len(workload) else math.inf
        quiet = quiet_steps(scheduler)
        if not quiet or now >= next_arrival:
            continue
        behind = flying.pop() if flying else None
        ahead = _Quiet((behind or flight).work, parts)
        again = 0.0
        if behind is None:
            times = ahead.one_by_one(quiet, now, next_arrival)
        else:  # is one of them; the one that is in flight after them is planned anew
            scheduler.rollback(behind.plan)
            times, again, free = ahead.overlapped(quiet, now, next_arrival, behind)
            flight = behind
        skip(scheduler, len(times), 1)
        clock.tokens_of_all(plan.request_ids, times)
        steps += len(times)
        queue_area += flight.waiting * (times[-1] - now)
        now = landed = times[-1]
        if behind is not None:
            launch(again)
    return Simulated(
        policy=policy.name,
        requests=len(workload),
        completed=completed,
        refused=refused,
        steps=steps,
        seconds=now - start,
        prompt_tokens=prompt_tokens,
        output_tokens=clock.tokens,
        itl=clock.itl,
        ttft=clock.ttft_of(),
        queue_mean=queue_area / (now - start) if now > start else 0.0,
        queue_max=queue_max,
        running_max=running_max,
        preemptions=scheduler.preemptions,
        wall_s=time.perf_counter() - began,
    )
