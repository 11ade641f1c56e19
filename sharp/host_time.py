"""What the engine itself takes in a step: planning, launching, committing, handing over.

Knows the engine's loop and a clock. Refuses to know devices: waiting for one is no part of it, and where a
model computes on the host, one that does nothing stands in.
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
from sharp.plan import BatchPlan, SampleOutput, StepModel
from sharp.predictor import HostTime
from sharp.random_model import IdTokenizer
from sharp.request import SamplingParams
from sharp.stall import Borrowed

STEPS = 60  # of each size; the median counts
WARM = 4  # steps before: prompts are read, what is used for the first time is found
PROMPT = 64  # tokens: the tables of pages have a few columns
TOKENS = PROMPT + STEPS + 20  # of a whole request


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
    config: ModelConfig,
    num_seqs: int = 32,
    clock: Callable[[], float] = time.perf_counter,
    *,
    model: StepModel | None = None,
    max_tokens: int = 0,
) -> HostTime:
    """Seconds of the engine for a step, and for each sequence of it: of steps that decode, with every token
    handed to a queue. From steps of 1 and of num_seqs sequences (at least 2).

    model: whose steps run beside the host, so that launching and landing them is a part, max_tokens the most
    of a step; None, or one too small for num_seqs prompts at once: one that does nothing."""
    if model is not None and (
        max_tokens < num_seqs * PROMPT
        or model.config.max_position_embeddings < TOKENS
        or model.num_blocks < num_seqs * (TOKENS // model.block_size + 1)
    ):
        model = None
    few, many = (_step_seconds(config, count, clock, model) for count in (1, num_seqs))
    found = []
    for small, large in zip(few, many, strict=True):
        each = max(0.0, (large - small) / (num_seqs - 1))
        found += [max(0.0, small - each), each]
    return HostTime(*found)


def _step_seconds(
    config: ModelConfig, num_seqs: int, clock: Callable[[], float], model: StepModel | None
) -> tuple[float, float]:
    """Before and after a step, waiting for it left out."""
    block_size = 64 if model is None else model.block_size
    options = EngineConfig(
        max_num_seqs=num_seqs, max_num_batched_tokens=num_seqs * PROMPT, block_size=block_size,
        max_model_len=min(TOKENS, config.max_position_embeddings), prefix_caching=False,
    )  # fmt: skip
    pages = num_seqs * (TOKENS // block_size + 1)
    lent = NoModel(config, pages, block_size) if model is None else Borrowed(model)
    engine = Engine(lent, IdTokenizer(), options)
    params = SamplingParams(max_tokens=TOKENS - PROMPT, temperature=0.0, ignore_eos=True)
    sink: Sink = SimpleQueue()
    for _ in range(num_seqs):
        engine.submit(engine.make_request([1] * PROMPT, params), sink)
    for _ in range(WARM):
        engine.step()
    before, both = [], []
    for _ in range(STEPS):
        start = clock()
        engine.step()
        record = engine.last_step
        assert record is not None
        before.append(record.plan_s + record.launch_s)
        both.append(clock() - start - record.wait_s)
    engine.close()
    first = statistics.median(before)
    return first, max(0.0, statistics.median(both) - first)
