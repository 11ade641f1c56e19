"""What the engine itself takes in a step (planning, committing, handing over), over a model of no time.

Knows the engine's loop and a clock. Refuses to know devices: what stands in for a model does nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np

from sharp.config import EngineConfig, ModelConfig
from sharp.eager import Eager
from sharp.engine import Engine
from sharp.live import Sink
from sharp.plan import BatchPlan, SampleOutput
from sharp.random_model import IdTokenizer
from sharp.request import SamplingParams

STEPS = 60  # of each size; the median counts
PROMPT = 64  # tokens: the tables of pages have a few columns


class NoModel(Eager):
    """Satisfies sharp.plan.StepModel and computes nothing."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int) -> None:
        self.config, self.num_blocks, self.block_size = config, num_blocks, block_size

    def stage(self, plan: BatchPlan) -> BatchPlan:
        return plan

    def forward(self, plan: BatchPlan) -> BatchPlan:
        return plan

    def sample(self, logits: Any, plan: BatchPlan) -> SampleOutput:
        rows = len(plan.logits_rows)
        return SampleOutput(np.ones(rows, np.int32), (None,) * rows)

    def close(self) -> None: ...


def measure_host(
    config: ModelConfig, num_seqs: int = 32, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Seconds of the engine for a step, and for each sequence of it: of steps that decode, with every token
    handed to a queue. From steps of 1 and of num_seqs sequences (at least 2)."""
    few, many = (_step_seconds(config, count, clock) for count in (1, num_seqs))
    each = max(0.0, (many - few) / (num_seqs - 1))
    return max(0.0, few - each), each


def _step_seconds(model: ModelConfig, num_seqs: int, clock: Callable[[], float]) -> float:
    block_size = 64
    tokens = PROMPT + STEPS + 10
    config = EngineConfig(
        max_num_seqs=num_seqs, max_num_batched_tokens=num_seqs * PROMPT, block_size=block_size,
        max_model_len=tokens + 2,
    )  # fmt: skip
    pages = num_seqs * (tokens // block_size + 2)
    engine = Engine(NoModel(model, pages, block_size), IdTokenizer(), config)
    params = SamplingParams(max_tokens=STEPS + 5, temperature=0.0, ignore_eos=True)
    sink: Sink = SimpleQueue()
    for _ in range(num_seqs):
        engine.submit(engine.make_request([1] * PROMPT, params), sink)
    engine.step()
    taken = []
    for _ in range(STEPS):
        start = clock()
        engine.step()
        taken.append(clock() - start)
    engine.close()
    return statistics.median(taken)
