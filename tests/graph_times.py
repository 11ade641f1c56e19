"""A made-up GPU: what steps of a model of 1 B parameters take as graphs, in its own time.

Its figures are round ones near what an H100 was seen to take; nothing here is a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from fake_model import model_config

from sharp.buckets import bucket_sizes
from sharp.config import EngineConfig
from sharp.curves import StepCurve
from sharp.engine import Engine
from sharp.host_time import NoModel
from sharp.latencies import TokenClock
from sharp.latency_target import LatencyTarget
from sharp.plan import BatchPlan, Launched, SampleOutput
from sharp.predictor import HostTime, StepPredictor, StepWork
from sharp.random_model import IdTokenizer
from sharp.request import RequestOutput, SamplingParams
from sharp.stall import Scenario
from sharp.step_times import measure_curves
from sharp.workloads import Arrival

HOST = HostTime(4e-4, 4e-6, 2e-4, 6e-6)
GAP = 30e-6  # of the device between two steps
BUCKETS, SMALL = np.array(bucket_sizes(16384)), 16
SMS, TILE, HEADS, LAYERS = 132, 32, 8, 16  # tokens of a tile of attention; of keys and values; layers


def graph_like(work: StepWork) -> float:
    """Seconds on the device. Weights take 0.9 ms, tokens 3.2 us each where that is more, and a part of what
    their bucket has too much; a tile of a chunk reads its keys alone, SMS of them at once."""
    tokens = work.decodes + sum(count for count, _ in work.chunks)
    bucket = int(BUCKETS[np.searchsorted(BUCKETS, max(tokens, SMALL if work.chunks else 1))])
    seconds = 0.7e-3 + max(0.9e-3, 3.2e-6 * (tokens + 0.15 * (bucket - tokens)))
    seconds += max(12e-9 * work.keys, 1.5e-9 * work.longest) + 1e-6 * work.rows
    if work.chunks:
        each = [(context + count / 2) * 10e-9 * LAYERS for count, context in work.chunks]
        tiles = [HEADS * math.ceil(count / TILE) for count, _ in work.chunks]
        seconds += 0.1e-3 + max(*each, sum(np.multiply(each, tiles)) / SMS, 0.0)
    return seconds


class GraphDevice(NoModel):
    """A model whose steps take such times on a clock of its own, one in flight behind another, and the engine
    HOST. Answers are a hash of token and position, whoever shares the step."""

    overlaps = True

    def __init__(
        self, seconds: Callable[[StepWork], float] = graph_like, num_blocks: int = 40_000, noise: float = 0.0
    ) -> None:
        super().__init__(model_config(131072), num_blocks, 64)
        self.seconds, self.now, self.free, self.noise = seconds, 0.0, 0.0, noise
        self.rng, self.last = np.random.default_rng(0), np.empty(0, np.int32)

    def clock(self) -> float:
        return self.now

    def launch(self, plan: BatchPlan) -> Launched:
        ids = plan.with_ids(self.last).token_ids
        places = 7 * ids[plan.logits_rows].astype(np.int64) + plan.context_lens[plan.logits_seqs]
        self.last = (places % (self.config.vocab_size - 2) + 2).astype(np.int32)
        self.now += HOST.of(plan.num_seqs)[0]
        took = self.seconds(StepWork.of(plan)) * math.exp(self.noise * self.rng.standard_normal())
        self.free = max(self.now, self.free) + GAP + took
        return Launched(plan, (self.free, self.last))

    def land(self, launched: Launched) -> SampleOutput:
        end, ids = launched.state
        self.now = max(self.now, end) + HOST.of(launched.plan.num_seqs)[1]
        return SampleOutput(ids, (None,) * len(ids))


class AnyMeter:
    """Of memory that nobody asks about. Satisfies what measure_curves needs of a meter."""

    def look(self) -> None: ...

    def free(self) -> int:
        return 0

    total = used = peak = free

    def start_peak(self) -> None: ...


def probed(tokens: int = 2048, seqs: int = 64, noise: float = 0.0) -> StepPredictor:
    """What a probe of that device comes to."""
    device = GraphDevice(noise=noise)
    config = EngineConfig(max_num_batched_tokens=tokens, max_num_seqs=seqs)
    found = measure_curves(
        device,
        config,
        AnyMeter(),
        max_model_len=33024,
        kind="cuda",
        clock=device.clock,
        limit_s=60.0,
    )
    assert found.skipped == ()
    return StepPredictor(StepCurve(found.prefill), StepCurve(found.decode), HOST, overlap=True)


class OnItsClock(LatencyTarget):
    """The policy told the device's time of each step instead of this machine's."""

    device: GraphDevice
    landed = 0.0

    def observe(self, plan: BatchPlan, seconds: float) -> None:
        super().observe(plan, self.device.now - self.landed)
        self.landed = self.device.now


def run_engine(
    workload: Sequence[Arrival],
    config: EngineConfig,
    device: GraphDevice,
    scenario: Scenario | None = None,
) -> tuple[TokenClock, Engine]:
    """The real engine over that device, in the device's time: requests come when the workload says; the
    scenario's streams decode beside them until its duration is over."""
    engine, times = Engine(device, IdTokenizer(), config), TokenClock()
    if isinstance(engine.scheduler.policy, OnItsClock):
        engine.scheduler.policy.device = device
    seen: dict[str, int] = {}
    streams = scenario.standing() if scenario else []
    over: list[int] = list(range(len(streams)))

    class Sink:
        def put(self, output: RequestOutput | BaseException) -> None:
            if not isinstance(output, RequestOutput):
                return  # the engine was closed
            name, count = output.request_id, len(output.outputs[0].token_ids)
            if count > seen.get(name, 0):
                times.token(name, device.now)
                seen[name] = count
            if output.finished:
                times.end(name)
                if name.startswith("stream"):
                    over.append(int(name.split()[1]))

    def submit(name: str, one: Arrival, token: int) -> None:
        params = SamplingParams(max_tokens=one.output_tokens, temperature=0.0, ignore_eos=True)
        engine.submit(engine.make_request([token] * one.prompt_tokens, params, name), cast(Any, Sink()))

    coming = 0
    end = scenario.duration if scenario else math.inf
    while device.now < end and (coming < len(workload) or engine.has_unfinished or streams):
        if len(over) == len(streams):  # all at once
            for number in over:
                name = f"stream {number} {len(seen)}"
                times.arrive(name, device.now)
                submit(name, streams[number], 2 + number)
            over.clear()
        while coming < len(workload) and workload[coming].arrival_s <= device.now:
            times.arrive(str(coming), workload[coming].arrival_s)
            submit(str(coming), workload[coming], 200 + coming % 50)
            coming += 1
        if engine.has_unfinished:
            engine.step()
        else:
            device.now = max(device.now, workload[coming].arrival_s)
    engine.close()
    return times, engine
