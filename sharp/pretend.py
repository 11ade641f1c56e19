"""PretendDevice: a model that computes nothing, whose steps take a set time beside the host, as a GPU's do.

For pictures and tests of the loop where there is no GPU: launch() puts a step behind the one that runs,
land() sleeps until it would be over, and says when it ran. Answers are a hash of token and position, whoever
shares the step. Refuses to know kernels: nothing that it says is a measurement of any.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from sharp.config import ModelConfig
from sharp.host_time import NoModel
from sharp.plan import BatchPlan, Launched, SampleOutput
from sharp.trace_events import COMPUTE


class PretendDevice(NoModel):
    """One stream of work, played by the clock. Satisfies sharp.plan.StepModel."""

    overlaps = True
    device_name = "a pretended device"

    def __init__(
        self,
        config: ModelConfig,
        seconds: Callable[[BatchPlan], float],
        *,
        num_blocks: int = 4096,
        block_size: int = 64,
        launch_s: float = 0.0,
    ) -> None:
        """seconds: of a step on the device; launch_s: of the host for queueing one, as launches one by one
        take it."""
        super().__init__(config, num_blocks, block_size)
        self._seconds, self._launch_s = seconds, launch_s
        self._free_at = 0.0  # when all that is queued will be over
        self._last: np.ndarray = np.empty(0, np.int32)  # ids of the step launched last

    def launch(self, plan: BatchPlan) -> Launched:
        begun = time.perf_counter()
        ids = plan.token_ids.copy()
        unknown = ids < 0  # ~row of the step before
        ids[unknown] = self._last[~ids[unknown]]
        places = 7 * ids[plan.logits_rows].astype(np.int64) + plan.context_lens[plan.logits_seqs]
        self._last = (places % (self.config.vocab_size - 2) + 2).astype(np.int32)
        _wait_until(begun + self._launch_s)
        start = max(time.perf_counter(), self._free_at)
        self._free_at = start + self._seconds(plan)
        return Launched(plan, (start, self._free_at, self._last))

    def land(self, launched: Launched) -> SampleOutput:
        start, end, ids = launched.state
        _wait_until(end)
        launched.gpu_s = end - start
        launched.streams = ((COMPUTE, "step", start, end),)
        return SampleOutput(ids, (None,) * len(ids))


def _wait_until(moment: float) -> None:
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)
