"""Memory over many requests: `python tests/many_requests.py 1000000` prints it every tenth of the way.

A whole engine by hand, texts and outputs included, over a model that answers at once: any id, no logits.
What is measured is the process's resident memory after a garbage collection. The first tenths fill the
history of 4,096 steps and the log of events.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fake_model import FakeTokenizer, engine_config, model_config

from sharp.engine import Engine
from sharp.host_time import NoModel
from sharp.plan import BatchPlan, SampleOutput
from sharp.request import SamplingParams

BEGINNINGS = [random.Random(i).choices(range(2, 300), k=12) for i in range(50)]


class InstantModel(NoModel):
    """Ids from nothing but the row: fast enough for a million requests."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(model_config(), num_blocks, 4)

    def sample(self, logits: Any, plan: BatchPlan) -> SampleOutput:
        rows = len(plan.logits_rows)
        ids = (plan.seeds % np.uint64(200)).astype(np.int32) + plan.output_indices % 7 + 2
        return SampleOutput(ids.astype(np.int32), (None,) * rows)


def resident_bytes() -> int:
    """Of this process, after a garbage collection (Linux)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def run(
    requests: int,
    measure: Callable[[], int] = resident_bytes,
    admission: str = "optimistic",
    overlap: bool = False,
) -> list[tuple[int, int]]:
    """(requests finished, bytes) at ten moments of one engine; some are cancelled, some fork, many share."""
    config = engine_config(
        admission=admission, max_num_seqs=128, max_num_batched_tokens=2048, max_queue_len=256, max_bypass=8,
        overlap=overlap,
    )  # fmt: skip
    engine = Engine(InstantModel(512), FakeTokenizer(), config)
    rng, added, finished, found = random.Random(0), 0, 0, list[tuple[int, int]]()
    while finished < requests:
        while added < requests and len(engine.scheduler.waiting) < 200:
            prompt = [*BEGINNINGS[rng.randrange(50)], rng.randrange(2, 300), rng.randrange(2, 300)]
            n = 3 if added % 50 == 0 else 1
            params = SamplingParams(max_tokens=2 + added % 5, n=n, timeout_s=3600.0)
            engine.add_request(prompt, params, f"{added}")
            added += 1
        if added % 97 == 0:
            engine.abort(f"{added - 1}")
        finished += sum(output.finished for output in engine.step())
        if finished >= (len(found) + 1) * requests // 10:
            found.append((finished, measure()))
    while engine.has_unfinished:  # a step in flight
        engine.step()
    engine.scheduler.check()
    assert engine.scheduler.blocks.num_used == 0
    assert engine.scheduler.pages.hit_tokens > 0
    assert engine.scheduler.blocks.evictions > 0
    assert engine.scheduler.pages.forks.forked > 0
    return found


if __name__ == "__main__":
    start = time.monotonic()
    for count, size in run(int(sys.argv[1])):
        print(f"{count:>9,} requests  {size / 2**20:7.1f} MiB")
    print(f"{time.monotonic() - start:.0f} s")
