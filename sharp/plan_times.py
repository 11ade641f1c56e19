"""How long plan() takes with many sequences, without a model and before there is a device.

Knows the scheduler and a clock. Refuses to know rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sharp.config import EngineConfig
from sharp.plan import SampleOutput
from sharp.request import Request, SamplingParams
from sharp.scheduler import Scheduler

PLAN_STEPS, PLAN_CONTEXT = 400, 1024


class PlanTime(NamedTuple):
    """Microseconds of plan(): the median and the least by the wall clock, the median of the thread's own."""

    median: float
    best: float
    cpu: float


def plan_us(running: int, waiting: int, steps: int = PLAN_STEPS) -> PlanTime:
    """plan() with so many decoding behind PLAN_CONTEXT tokens, and so many in the queue for which there are
    no pages."""
    answer = steps + 10
    pages = -(-(PLAN_CONTEXT + answer - 1) // 64)
    config = EngineConfig(
        max_num_seqs=running + waiting, max_num_batched_tokens=running * PLAN_CONTEXT + waiting,
        max_queue_len=max(running, waiting),
    )  # fmt: skip
    scheduler = Scheduler(config, running * pages + pages - 1, PLAN_CONTEXT + answer)
    params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)

    def step() -> tuple[float, float, int]:
        own, start = time.thread_time(), time.perf_counter()
        plan = scheduler.plan()
        taken, own = time.perf_counter() - start, time.thread_time() - own
        assert plan is not None
        rows = len(plan.logits_rows)
        scheduler.commit(plan, SampleOutput(np.ones(rows, np.int32), (None,) * rows))
        return taken, own, plan.num_decodes

    for first, stop in ((0, running), (running, running + waiting)):
        for i in range(first, stop):  # prompts with nothing in common
            scheduler.add(Request(str(i), None, [i] * PLAN_CONTEXT, params, 0))
        step()  # the first one reads all prompts that run
    taken, own, decodes = zip(*(step() for _ in range(steps)), strict=True)
    assert set(decodes) == {running}
    assert len(scheduler.waiting) == waiting
    return PlanTime(
        *(1e6 * value for value in (statistics.median(taken), min(taken), statistics.median(own)))
    )


def plan_times(say: Callable[[str], object]) -> dict[str, PlanTime]:
    """plan() alone. The device plays no part, so there is none yet: no thread of its driver's runs beside,
    and the garbage collector finds little."""
    found = {}
    for case, running, waiting in (("plan/256+1000", 256, 1000), ("plan/1024", 1024, 0)):
        found[case] = plan_us(running, waiting, PLAN_STEPS)
        say(
            f"{case:<16} median {found[case].median:.0f} us ({found[case].cpu:.0f} of its own time), "
            f"best {found[case].best:.0f} us; {PLAN_STEPS} steps"
        )
    return found
