"""A fake model with a device of its own: a thread that computes steps in order, each after some random time.

launch() returns at once and land() waits, as on a GPU: the ids that a plan does not have are known to the
thread alone, and a step that is never landed is computed all the same, before those behind it.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from fake_model import FakeModel

from sharp.plan import BatchPlan, Launched, SampleOutput


@dataclass
class LateModel(FakeModel):
    """latency: the longest that a step takes before it is computed, in seconds."""

    latency: float = 0.002
    seed: int = 0
    overlaps: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rng = random.Random(self.seed)
        self.device = ThreadPoolExecutor(1, "device")

    def _run(self, plan: BatchPlan, seconds: float) -> tuple[SampleOutput, float]:
        start = time.perf_counter()
        time.sleep(seconds)
        sampled = super().launch(plan).state
        return sampled, time.perf_counter() - start

    def launch(self, plan: BatchPlan) -> Launched:
        return Launched(plan, self.device.submit(self._run, plan, self.rng.uniform(0, self.latency)))

    def land(self, launched: Launched) -> SampleOutput:
        done: Future[tuple[SampleOutput, float]] = launched.state
        sampled, launched.gpu_s = done.result()
        return sampled

    def close(self) -> None:
        self.device.shutdown()
        super().close()
