"""The simulator: the engine's own scheduler over predicted step times, in virtual time.

Every decision is the real one: Scheduler, policy, pages, queue, and when each is taken: with overlap a step
is planned when the one before it starts. Only the model is absent: a step takes what StepPredictor says, and
an answer is as long as the workload says. Refuses to know tokens' values, files and devices.
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
    """Gives a step its seconds: StepPredictor, or a device that a test makes up."""

    def seconds(self, work: StepWork) -> float: ...


class Noisy:
    """A predictor whose steps vary as single steps were seen to vary. noise: factors, equally likely (see
    Curves.noise); the same draws for the same seed. Without noise, the predictor itself."""

    def __init__(self, predictor: Predictor, noise: Sequence[float], seed: int = 0) -> None:
        self._predictor, self._noise = predictor, np.array(noise or (1.0,))
        self._rng = np.random.default_rng(seed)
        self._drawn: list[float] = []

    def seconds(self, work: StepWork) -> float:
        if not self._drawn:
            self._drawn = self._noise[self._rng.integers(0, len(self._noise), 4096)].tolist()
        return self._predictor.seconds(work) * self._drawn.pop()


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
    """A step on the device: what it computes, seconds that it takes, when it ends, and who waits
    meanwhile."""

    plan: BatchPlan
    work: StepWork
    seconds: float
    end: float
    waiting: int


def _quiet_times(work: StepWork, steps: int, now: float, until: float, predictor: Predictor) -> list[float]:
    """When each of the next `steps` steps ends, if each begins before `until` and has the decodes of `work`
    with one more key each than the step before it."""
    times: list[float] = []
    while len(times) < steps and now < until:
        done = len(times) + 1
        keys = work.keys + done * work.decodes
        now += predictor.seconds(StepWork(work.decodes, keys, work.longest + done, (), work.rows))
        times.append(now)
    return times


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

    def launch(at: float) -> bool:
        """Plan a step at a time, to start when the device has done what it has; False if there is none."""
        nonlocal free
        plan = scheduler.plan()
        if plan is None:
            return False
        look(scheduler, at)
        work = StepWork.of(plan)
        seconds = predictor.seconds(work)
        free = max(at, free) + seconds
        flying.append(_Flight(plan, work, seconds, free, len(scheduler.waiting)))
        return True

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
        if launch(now):
            if len(flying) < most:
                continue
        elif not flying:
            if coming == len(workload):
                break
            now = max(now, workload[coming].arrival_s)
            continue
        flight = flying.popleft()
        plan, now = flight.plan, flight.end
        queue_area += flight.waiting * flight.seconds
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
        policy.observe(plan, flight.seconds)
        if ended or not steps_alike or plan.num_decodes < len(scheduler.table):
            continue
        # All that runs has decoded, and will again until somebody ends or comes: no plan is needed to know.
        next_arrival = workload[coming].arrival_s if coming < len(workload) else math.inf
        quiet, times = quiet_steps(scheduler), [now]
        if not quiet or now >= next_arrival:
            continue
        behind = flying.pop() if flying else None
        if behind is not None:  # is one of them; the one that is in flight after them is planned anew
            scheduler.rollback(behind.plan)
            times.append(behind.end)
            flight = behind
        times += _quiet_times(flight.work, quiet, times[-1], next_arrival, predictor)
        skip(scheduler, len(times) - 1, 1)
        clock.tokens_of_all(plan.request_ids, times[1:])
        steps += len(times) - 1
        queue_area += flight.waiting * (times[-1] - now)
        now = free = times[-1]
        if behind is not None:
            launch(times[-2])
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
