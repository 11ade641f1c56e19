"""launch and land over stage, forward and sample: for a model that computes while it is called.

Knows that the ids a plan does not have are those sampled last. Refuses to know what is computed. A model on a
GPU has a `runtime` (runtime.py), which does both instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from sharp.plan import BatchPlan, Int32, Launched, SampleOutput


class Eager(ABC):
    """A model of three verbs, driven by two: the whole step is computed in launch()."""

    runtime: Any = None
    _latest: Int32 = np.empty(0, np.int32)  # [R] ids of the latest step

    @abstractmethod
    def stage(self, plan: BatchPlan) -> Any: ...

    @abstractmethod
    def forward(self, batch: Any) -> Any: ...

    @abstractmethod
    def sample(self, logits: Any, batch: Any) -> SampleOutput: ...

    def launch(self, plan: BatchPlan) -> Launched:
        """Compute a step. Raises what stage, forward and sample raise."""
        if self.runtime is not None:
            queued: Launched = self.runtime.launch(plan)
            return queued
        batch = self.stage(plan.with_ids(self._latest))
        sampled = self.sample(self.forward(batch), batch)
        self._latest = sampled.token_ids
        return Launched(plan, sampled)

    def land(self, launched: Launched) -> SampleOutput:
        """What the step has sampled."""
        sampled: SampleOutput = launched.state if self.runtime is None else self.runtime.land(launched)
        return sampled

    def capture(self, progress: bool = False) -> None:
        """Make ready what would cost time within steps: nothing, where they are computed here."""
        if self.runtime is not None:
            self.runtime.capture(progress)
