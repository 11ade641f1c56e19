"""LatencyTarget: prompts get as many tokens as keep each step under a time between two tokens of an answer.

Knows predicted and measured seconds of steps. Refuses to know pages and queues, and what a prediction rests
on (predictor.py). A policy like any other: see policies.py.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sharp.curves import StepCurve
from sharp.policies import SchedulingPolicy
from sharp.predictor import Chunk, StepPredictor, StepWork
from sharp.request import Request

if TYPE_CHECKING:
    from sharp.config import EngineConfig
    from sharp.plan import BatchPlan, Int32

LEAST_CHUNK = 16  # prompt tokens that a step has whatever it takes: a prompt is read in the end
HEADROOM = 0.95  # of the target: noise of single steps is not in a prediction
WINDOW = 32  # measured steps of a kind that the correction looks back on
OVER = 1 / 150  # of the steps with decodes may miss the target where a prompt cannot be read within it
SAVED = 16  # such steps that may come in a row, saved while none was needed
QUANTILE = 0.9  # of measured over predicted: steps are longer than a median in half of all cases
BOUND = 8.0  # a correction is no larger, and no smaller than 1 / BOUND
# Without a probe: a laptop's CPU, slower than most. Measured steps then may correct it as far down as a GPU.
GUESS_FLOOR_S, GUESS_TOKEN_S, GUESS_TOKENS = 0.005, 0.001, 1024
GUESS_BOUND = 4096.0


class LatencyTarget(SchedulingPolicy):
    """First come, first served, with chunks that follow the predicted step time.

    While anything decodes, prompts get the most tokens with which the step is predicted to take at most
    target_itl_ms, corrected by measured steps. When nothing decodes they get all.

    Behind many keys even LEAST_CHUNK tokens may take too long: a chunk too small to fill the device takes as
    long as one that does. Many small chunks would miss the target in as many steps. So these prompts wait
    while others are read, and once in a while there is a step that all prompts share, as large as can be: the
    target is missed by OVER of the steps, which the 99th percentile does not see. Where decodes alone miss
    it, or a large step brings a prompt less than many small ones, prompts get LEAST_CHUNK in each step.
    One engine an instance: it remembers that engine's steps.
    """

    name = "latency-target"

    def __init__(self, target_itl_ms: float, predictor: StepPredictor | None = None) -> None:
        """target_itl_ms: milliseconds between two tokens of an answer. predictor: of this model and device;
        None: guesses of a slow device, which measured steps correct.

        Raises TypeError or ValueError for a target that is no positive number, or under the time that the
        predictor gives a step of one decode alone.
        """
        check_target(target_itl_ms)
        self.target_itl_ms, self.guessing = float(target_itl_ms), predictor is None
        self.predictor = guessed_predictor() if predictor is None else predictor
        floor_ms = 1e3 * self.predictor.seconds(StepWork(1, 1, 1, (), 1))
        if not self.guessing and floor_ms > target_itl_ms:
            raise ValueError(
                f"target_itl_ms {target_itl_ms:g} cannot be met: a step that decodes one token and reads no "
                f"prompt takes {floor_ms:.3g} ms here"
            )
        bound = GUESS_BOUND if self.guessing else BOUND
        self._low, self._high = 1 / bound, BOUND
        self._saved = 1.0  # steps that may miss the target now
        self._paused: set[str] = set()  # ids of prompts that this step cannot read within the target
        # Steps with and without prompts apart: the curves may be wrong about one of them alone.
        self._ratios = {kind: deque[float](maxlen=WINDOW) for kind in ("decode", "mixed")}
        self._factors = {"decode": 1.0, "mixed": 1.0}

    @property
    def factor(self) -> float:
        """By what predictions of steps with prompts are multiplied now."""
        return self._factors["mixed"] if self._ratios["mixed"] else self._factors["decode"]

    def budget(self, contexts: Int32, prompts: Sequence[Request], most: int) -> int:
        if not len(contexts):
            self._paused.clear()
            return most
        limit_s = HEADROOM * self.target_itl_ms / 1e3 / self.factor
        decodes = len(contexts), int(contexts.sum()), int(contexts.max())
        least = min(LEAST_CHUNK, most)
        self._paused.clear()
        alone = self._takes(*decodes)
        for request in prompts if alone <= limit_s else ():
            left, context = request.num_tokens - request.num_computed_tokens, request.num_computed_tokens
            took = self._takes(*decodes, (min(least, left), context))
            # Waiting is for those that are read sooner by it, in a large step once in a while.
            if took > limit_s and OVER * most * took > least * alone:
                self._paused.add(request.request_id)
        if self._paused and self._saved >= 1:
            self._saved -= 1
            self._paused.clear()
            return most
        left_of = [
            (r.num_tokens - r.num_computed_tokens, r.num_computed_tokens)
            for r in prompts
            if r.request_id not in self._paused
        ]
        return max(self.predictor.largest_chunk(limit_s, *decodes, left_of, most), least)

    def _takes(self, decodes: int, keys: int, longest: int, *chunks: Chunk) -> float:
        """Predicted seconds, not corrected."""
        return self.predictor.seconds(StepWork(decodes, keys, longest, chunks, decodes))

    def share(self, prompts: Sequence[tuple[Request, int]], budget: int) -> list[int]:
        served = [place for place, (r, _) in enumerate(prompts) if r.request_id not in self._paused]
        counts = [0] * len(prompts)
        if served:
            given = super().share([prompts[place] for place in served], budget)
            for place, count in zip(served, given, strict=True):
                counts[place] = count
        return counts

    def observe(self, plan: BatchPlan, seconds: float) -> None:
        work = StepWork.of(plan)
        kind = "mixed" if work.chunks else "decode"
        if not work.decodes:
            return  # nobody waited for a token in this step, and its size is not what is asked for
        self._saved = min(self._saved + OVER, SAVED)
        ratio = seconds / self.predictor.seconds(work)
        ratios = self._ratios[kind]
        ratios.append(min(max(ratio, self._low), self._high))
        ordered = sorted(ratios)
        self._factors[kind] = ordered[math.ceil(QUANTILE * len(ordered)) - 1]

    def predict(self, plan: BatchPlan) -> float | None:
        work = StepWork.of(plan)
        return self._factors["mixed" if work.chunks else "decode"] * self.predictor.seconds(work)

    def options(self) -> dict[str, Any]:
        curves: dict[str, Any] = {}
        if not self.guessing:
            curves = {"prefill": self.predictor.prefill.points, "decode": self.predictor.decode.points}
            curves |= {"host_s": self.predictor.host_s, "overlap": self.predictor.overlap}
        return {"target_itl_ms": self.target_itl_ms, **curves}


def check_target(target_itl_ms: Any) -> None:
    """Raise TypeError or ValueError unless it is a positive, finite number of milliseconds."""
    if isinstance(target_itl_ms, bool) or not isinstance(target_itl_ms, (int, float)):
        raise TypeError(f"target_itl_ms must be a number of milliseconds, not {target_itl_ms!r}")
    if not 0 < target_itl_ms < math.inf:
        raise ValueError(f"target_itl_ms must be a positive number of milliseconds, not {target_itl_ms}")


def guessed_predictor() -> StepPredictor:
    """What is assumed of a device that was not probed."""
    points = [(t, 0, GUESS_FLOOR_S + t * GUESS_TOKEN_S) for t in (1, GUESS_TOKENS)]
    return StepPredictor(StepCurve.of(points), StepCurve.of(points))


def with_step_times(config: EngineConfig, predictor: StepPredictor | None, found: str) -> EngineConfig:
    """`config` with a policy that knows this model's step times, or warns once that it guesses (found: why).

    Raises what LatencyTarget raises.
    """
    policy = LatencyTarget(config.target_itl_ms or 0.0, predictor)
    if predictor is None:
        warnings.warn(
            "scheduling_policy 'latency-target' begins with the step times of a slow device and corrects "
            f"them by measured steps ({found}); `sharp probe MODEL` measures them",
            stacklevel=3,
        )
    return replace(config, scheduling_policy=policy, target_itl_ms=None)
