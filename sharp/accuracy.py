"""The simulator held against reality: three workloads, each simulated and then run in real time.

Knows what is compared and how far apart it is. Refuses to know devices and rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sharp.config import EngineConfig
from sharp.load import Load, run_load
from sharp.pipeline import overlaps
from sharp.predictor import StepPredictor, StepWork
from sharp.simulate import Noisy, Simulated, simulate
from sharp.stall import with_engine
from sharp.step_times import uniform_step
from sharp.workloads import Arrival, random_traffic

BUSY = (
    0.5  # of the device's time: the same requests take so much of the workload's length if all come at once
)
# name: prompt tokens, answer tokens, requests that come together
KINDS: dict[str, tuple[tuple[int, int], tuple[int, int], int]] = {
    "steady": ((16, 256), (16, 128), 1),
    "bursts": ((32, 512), (8, 64), 8),
    "long-prompts": ((512, 2048), (8, 64), 1),
}
DRIFT_SEQS, DRIFT_ROUNDS = 8, 15
MEASURES = ("p50", "p95")  # compared; p99 and max are single events in a run of seconds


@dataclass(frozen=True)
class Comparison:
    """One workload, simulated and real."""

    name: str
    predicted: Simulated
    real: Load
    drift: float = 1.0  # a step's time around the real run over its predicted time: a device may change

    @property
    def errors(self) -> dict[str, float]:
        """(predicted - real) / real, of TTFT and ITL at each of MEASURES; the drift is not taken out."""
        pairs = {
            "TTFT": (self.predicted.ttft, self.real.ttft_of()),
            "ITL": (self.predicted.itl, self.real.itl),
        }
        return {
            f"{what} {which}": getattr(ours, which) / getattr(theirs, which) - 1
            for what, (ours, theirs) in pairs.items()
            for which in MEASURES
        }

    @property
    def worst(self) -> float:
        return max(map(abs, self.errors.values()))

    def text(self) -> str:
        errors = ", ".join(f"{name} {error:+.1%}" for name, error in self.errors.items())
        return (
            f"simulate/{self.name}: {self.predicted.requests} requests; {errors}; "
            f"around the run a decode step took {self.drift:.2f}x its predicted time\n"
            f"  predicted ITL {self.predicted.itl.ms()}; TTFT {self.predicted.ttft.ms()}; "
            f"{self.predicted.steps} steps in {self.predicted.seconds:.2f} s\n"
            f"  real      ITL {self.real.itl.ms()}; TTFT {self.real.ttft_of().ms()}; "
            f"{self.real.steps} steps in {self.real.seconds:.2f} s"
        )


def workload_of(
    kind: str, seconds: float, predictor: StepPredictor, config: EngineConfig, num_blocks: int, length: int
) -> list[Arrival]:
    """Traffic of a kind that keeps this device busy for about BUSY of `seconds`."""
    prompt, output, together = KINDS[kind]
    prompt = (min(prompt[0], length // 4), min(prompt[1], length // 2))

    def draw(count: int, span: float) -> list[Arrival]:
        traffic = random_traffic(count, span, prompt=prompt, output=output, seed=len(kind))
        first = [traffic[i - i % together].arrival_s for i in range(len(traffic))]
        return [
            Arrival(time, arrival.prompt_tokens, arrival.output_tokens)
            for time, arrival in zip(first, traffic, strict=True)
        ]

    def takes(traffic: Sequence[Arrival]) -> float:
        return simulate(traffic, predictor, config, num_blocks=num_blocks, max_model_len=length).seconds

    # Few requests, none beside another, say what one takes; then as many as keep it busy, all at once.
    each = takes(draw(8, 0.0)) / 8
    count = max(8, int(BUSY * seconds / each))
    return draw(count, max(seconds, takes(draw(count, 0.0)) / BUSY))


def step_drift(model: Any, config: EngineConfig, predictor: StepPredictor) -> float:
    """How long a step of DRIFT_SEQS decodes takes now, over what is predicted."""
    work = StepWork(DRIFT_SEQS, DRIFT_SEQS * 64, 64, (), DRIFT_SEQS)
    plan = uniform_step(DRIFT_SEQS, 1, 64, config.block_size, model.config.vocab_size)
    taken = []
    for _ in range(DRIFT_ROUNDS):
        start = time.perf_counter()
        launched = model.launch(plan)
        model.land(launched)
        taken.append(launched.gpu_s or time.perf_counter() - start)
    return statistics.median(taken) / predictor.device_seconds(work)


def compare_runs(
    model: Any,
    config: EngineConfig,
    predictor: StepPredictor,
    seconds: float,
    noise: Sequence[float] = (),
) -> Iterator[Comparison]:
    """Each workload of KINDS, of about so many seconds. The real run is warmed up by a part of itself."""
    length = config.max_model_len or model.config.max_position_embeddings
    config = replace(config, overlap=overlaps(model, config))
    for kind in KINDS:
        workload = workload_of(kind, seconds, predictor, config, model.num_blocks, length)
        noisy = Noisy(predictor, noise)
        predicted = simulate(workload, noisy, config, num_blocks=model.num_blocks, max_model_len=length)
        warm = [Arrival(0.0, a.prompt_tokens, 2) for a in workload[:4]]
        with_engine(model, config, lambda engine, warm=warm: run_load(engine, warm))  # type: ignore[misc]
        before = step_drift(model, config, predictor)
        real = with_engine(model, config, lambda engine, workload=workload: run_load(engine, workload))  # type: ignore[misc]
        drift = (before + step_drift(model, config, predictor)) / 2
        yield Comparison(kind, predicted, real, drift)
