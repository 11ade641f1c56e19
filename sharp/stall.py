"""The stall scenario: streams that decode while long prompts arrive, the same for every policy.

Knows what is run and how answers are compared. Refuses to know kernels, and how a row is recorded.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sharp.config import EngineConfig
from sharp.engine import Engine
from sharp.latency_target import LatencyTarget
from sharp.load import Load, run_load
from sharp.plan import StepModel
from sharp.policies import Blocking
from sharp.predictor import StepPredictor
from sharp.random_model import IdTokenizer
from sharp.trace import StepRecord
from sharp.workloads import Arrival, every

ANSWER = 32  # tokens of the answer to a long prompt
PAGE = 64  # tokens: prompts of whole pages and one token are found but for that
AIM = 1.4  # of decode-only's p99: where latency-target aims, to stay under 1.5 times


@dataclass(frozen=True)
class Scenario:
    """streams decode at about `context` tokens for `duration` seconds; a prompt of `prompt` tokens arrives
    every `prompt_s` seconds, one of `long` tokens every `long_s`.

    A stream would grow by thousands of tokens in that time. So it is a row of requests: the same prompt again
    and again, which after the first time is in the prefix cache but for one token, and answers of `answer`
    tokens, `context` in the middle of them. All streams begin anew at once.
    """

    streams: int
    context: int
    answer: int
    prompt: int
    prompt_s: float
    long: int
    long_s: float
    duration: float

    def standing(self) -> list[Arrival]:
        """A request of each stream."""
        before = max(0, self.context - self.answer // 2) // PAGE * PAGE
        return [Arrival(0.0, before + 1, self.answer)] * self.streams

    def __str__(self) -> str:
        return (
            f"{self.duration:g} s, {self.streams} streams at {self.context}, a prompt of {self.prompt} every "
            f"{self.prompt_s:g} s, of {self.long} every {self.long_s:g} s"
        )

    def arrivals(self, max_model_len: int) -> list[Arrival]:
        """The prompts, cut to what fits beside their answers."""
        most = max_model_len - ANSWER
        found = every(
            self.prompt_s, self.duration, prompt_tokens=min(self.prompt, most), output_tokens=ANSWER,
            start=self.prompt_s / 2,
        )  # fmt: skip
        found += every(
            self.long_s, self.duration, prompt_tokens=min(self.long, most), output_tokens=ANSWER,
            start=self.long_s / 4,
        )  # fmt: skip
        return sorted(found, key=lambda arrival: arrival.arrival_s)


GPU = Scenario(
    streams=32, context=1024, answer=512, prompt=8192, prompt_s=2, long=32768, long_s=10, duration=60
)
# What two cores can follow: fewer streams, of a sixteenth.
CPU = Scenario(streams=4, context=128, answer=126, prompt=256, prompt_s=4, long=1024, long_s=12, duration=60)


class Borrowed:
    """A model that outlives the engines it is lent to."""

    def __init__(self, model: StepModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def close(self) -> None:
        """Left to the owner."""


def with_engine(model: StepModel, config: EngineConfig, work: Callable[[Engine], Load]) -> Load:
    """Run `work` on a new engine over a lent model."""
    engine = Engine(Borrowed(model), IdTokenizer(), config)
    try:
        return work(engine)
    finally:
        engine.close()


def run_stall(
    scenario: Scenario,
    model: StepModel,
    config: EngineConfig,
    predictor: StepPredictor,
    *,
    say: Callable[[str], object] = lambda text: None,
) -> Iterator[tuple[str, Load]]:
    """Decode-only, latency-target, first come first served, and blocking, each as soon as it has run; all
    with config's step budget."""
    length = config.max_model_len or model.config.max_position_embeddings
    standing, arrivals = scenario.standing(), scenario.arrivals(length)
    alone = [Arrival(0.0, 16, 2)] * 2  # compiles and touches all that a first step needs

    def run(name: str, policy: Any, workload: list[Arrival]) -> Load:
        records: list[StepRecord] = []

        def work(engine: Engine) -> Load:
            run_load(engine, alone, seed=1)
            load = run_load(engine, workload, standing=standing, again=True, duration=scenario.duration)
            records.extend(engine.stats.history)
            return load

        load = with_engine(model, replace(config, scheduling_policy=policy), work)
        ttft = load.ttft_of()
        say(
            f"{name:<20} ITL {load.itl.ms()}; TTFT p50 {ttft.p50:.3f} s, p95 {ttft.p95:.3f} s, "
            f"{ttft.count} of {len(workload)} begun; {load.tokens_per_s:,.0f} tokens/s "
            f"({load.answer_tokens / load.seconds:,.0f} of answers), {load.steps} steps; {_shares(records)}"
        )
        return load

    only = run("decode-only", "fcfs", [])
    yield "decode-only", only
    target_ms = AIM * 1e3 * only.itl.p99
    yield "chunked-latency", run(f"latency {target_ms:.2f} ms", LatencyTarget(target_ms, predictor), arrivals)
    yield "chunked-throughput", run("chunked-throughput", "fcfs", arrivals)
    yield "blocking", run("blocking", Blocking(), arrivals)


def _shares(records: Iterable[StepRecord]) -> str:
    """What the latest steps took of host and device, in words."""
    alone = [record for record in records if record.num_tokens == record.num_decodes]
    if not alone:
        return "no step that decodes alone"
    host = statistics.median(record.host_s for record in alone)
    device = statistics.median(record.gpu_s or 0.0 for record in alone)
    return f"a step of decodes: host {1e6 * host:.0f} us, device {1e6 * device:.0f} us"


def disagreements(runs: Iterable[Mapping[int, tuple[int, ...]]]) -> int:
    """How many requests' answers differ between runs, as far as both go."""
    first, *others = [dict(run) for run in runs]
    wrong = set()
    for other in others:
        for place in first.keys() & other.keys():
            length = min(len(first[place]), len(other[place]))
            if first[place][:length] != other[place][:length]:
                wrong.add(place)
        first.update({place: ids for place, ids in other.items() if len(ids) > len(first.get(place, ()))})
    return len(wrong)
