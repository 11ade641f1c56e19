"""How long plan() and commit() take, without a model: `python tests/plan_times.py`.

A steady state of decoding sequences in front of a full queue; every round is a whole step, with its
BatchPlan; with and without a step in flight when it is planned. Minima over rounds, by the wall clock and by
the process's own CPU time: other work only adds.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from sharp.config import EngineConfig
from sharp.plan import SampleOutput
from sharp.request import Request, SamplingParams
from sharp.scheduler import Scheduler

# Running, waiting, and what those wait for: 32 of them are looked at when it is pages.
CASES = {"256+1000": (256, 1000, "seats"), "256+1000 pages": (256, 1000, "pages"), "1024": (1024, 0, "seats")}
CONTEXT = 300  # tokens of a prompt: five pages
ANSWER = 4000  # tokens, so that nothing ends while it is measured
WORST = 68  # pages of a request


def steady(running: int, waiting: int, lack: str, **options: Any) -> Scheduler:
    """A scheduler whose `running` sequences have read their prompts, `waiting` others behind them for lack of
    "seats" or "pages"."""
    seats = running if lack == "seats" else 2 * running
    config = EngineConfig(
        max_num_batched_tokens=8192, max_num_seqs=seats, max_queue_len=running + waiting, **options
    )
    scheduler = Scheduler(config, running * WORST, 8192)
    params = SamplingParams(max_tokens=ANSWER, temperature=0.7, ignore_eos=True)
    rng = np.random.default_rng(0)
    for number in range(running + waiting):
        prompt = rng.integers(0, 30_000, CONTEXT).tolist()
        scheduler.add(Request(f"request-{number}", None, prompt, params, seed=number))
    while len(scheduler.running) < running or scheduler.running[-1].num_tokens == CONTEXT:
        step(scheduler)
    assert (len(scheduler.running), len(scheduler.waiting)) == (running, waiting)
    return scheduler


def step(scheduler: Scheduler, ahead: bool = False) -> tuple[float, float, float]:
    """One step with made-up tokens: seconds of plan(), its CPU seconds, seconds of commit().

    ahead: what is committed is the step before the one that is planned; the first call commits nothing.
    """
    start, cpu = time.perf_counter(), time.process_time()
    plan = scheduler.plan()
    planned, cpu = time.perf_counter(), time.process_time() - cpu
    assert plan is not None
    oldest, committing = scheduler.in_flight[0], time.perf_counter()
    if not ahead or oldest is not plan:
        rows = len(oldest.logits_rows)
        sampled = SampleOutput(np.full(rows, 7, np.int32), (None,) * rows)
        committing = time.perf_counter()
        scheduler.commit(oldest, sampled)
    return planned - start, cpu, time.perf_counter() - committing


def measure(
    running: int, waiting: int, lack: str, rounds: int = 600, ahead: bool = False
) -> dict[str, float]:
    """Microseconds: plan (least), plan median, plan cpu (least), commit (least), commit median."""
    scheduler = steady(running, waiting, lack)
    if ahead:
        step(scheduler, ahead)
    plans, cpus, commits = zip(*(step(scheduler, ahead) for _ in range(rounds)), strict=True)
    return {
        "plan": 1e6 * min(plans),
        "plan median": 1e6 * statistics.median(plans),
        "plan cpu": 1e6 * min(cpus),
        "commit": 1e6 * min(commits),
        "commit median": 1e6 * statistics.median(commits),
    }


if __name__ == "__main__":
    for name, case in CASES.items():
        for ahead in (False, True):
            figures = measure(*case, ahead=ahead)
            shown = "  ".join(f"{key} {value:.0f}" for key, value in figures.items())
            print(f"{name:>14}{' ahead' if ahead else '':6}  {shown}")
