"""Scheduling over steps as a GPU runs them: short, replayed as graphs, one launched while another runs.

The device is made up (graph_times.py) and has a clock of its own, so that all of this is the same each time.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from graph_times import GAP, HOST, AnyMeter, GraphDevice, OnItsClock, graph_like, probed, run_engine

from sharp.accuracy import KINDS, workload_of
from sharp.buckets import Buckets
from sharp.config import EngineConfig
from sharp.curves import StepCurve
from sharp.latencies import Spread
from sharp.plan import BatchPlan, Launched
from sharp.policies import Blocking, SchedulingPolicy
from sharp.predictor import StepPredictor, StepWork
from sharp.simulate import simulate
from sharp.stall import AIM, GPU
from sharp.step_times import measure_curves
from sharp.workloads import Arrival

LENGTH = 33024
CONFIG = EngineConfig(
    max_num_batched_tokens=2048, max_num_seqs=64, max_model_len=LENGTH, prefix_caching=False, overlap=True
)
SCENARIO = replace(GPU, duration=7.0)
NOISE = 0.03


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_predicted_steps(noise: float) -> None:
    """Decodes, mixed steps of any size, chunks far behind: within 5 % of what they take, 10 % under noise. A
    chunk too small to fill the device is not taken for cheap."""
    predictor, rng = probed(noise=noise), np.random.default_rng(1)
    bound = 0.05 if not noise else 0.10
    for _ in range(300):
        decodes, context = int(rng.integers(1, 64)), int(rng.integers(64, 3000))
        chunks = [
            (int(2 ** rng.uniform(1, 9)), int(rng.integers(0, 32000))) for _ in range(rng.integers(0, 3))
        ]
        work = StepWork(decodes, decodes * context, context, tuple(chunks), decodes)
        took = graph_like(work) + GAP
        assert predictor.device_seconds(work) == pytest.approx(took, rel=bound), work
        assert predictor.seconds(work) == max(predictor.device_seconds(work), HOST.total(work.num_seqs))


def test_a_probe_times_what_the_engine_runs() -> None:
    """Both edges of every bucket, near and far; a time is from one step's tokens to the next's, the gap
    between two steps in it and the host's part hidden; a graph's capture, by a size's first step, is not."""
    device, seen = GraphDevice(), set()
    launch = device.launch

    def capturing(plan: BatchPlan) -> Launched:
        launched, bucket = launch(plan), Buckets(2048, 64).of(plan)
        if bucket not in seen:
            seen.add(bucket)
            device.now = device.free = device.free + 0.1
        return launched

    device.launch = capturing  # type: ignore[method-assign]
    config = EngineConfig(max_num_batched_tokens=2048, max_num_seqs=64)
    found = measure_curves(
        device, config, AnyMeter(), max_model_len=LENGTH, kind="cuda", clock=device.clock, limit_s=6.0
    )
    assert seen == set(Buckets(2048, 64).all())
    assert found.skipped == ()
    assert {c for _, c, _ in found.prefill} == {0, 8192}
    sizes = {t for t, c, _ in found.prefill if c == 8192}
    assert {1, 2, 16, 17, 24, 25, 1024, 1025, 1536, 1537, 2048} <= sizes
    assert {n for n, c, _ in found.decode if c == 64} >= {1, 2, 3, 4, 5, 32, 33, 48, 49, 64}
    for tokens, context, seconds in found.prefill[2:]:
        work = StepWork(0, 0, 0, ((tokens, context),), 1)
        if tokens > 1:
            assert seconds == pytest.approx(graph_like(work) + GAP, rel=1e-6), (tokens, context)
    assert max(found.noise) < 1.001


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_simulator_beside_the_engine(kind: str) -> None:
    """Steps from a probe of the device, steps of the device, the engine's own time: 10 % of TTFT and ITL."""
    predictor = probed()
    workload = workload_of(kind, 4.0, predictor, CONFIG, 40_000, LENGTH)
    predicted = simulate(workload, predictor, CONFIG, num_blocks=40_000, max_model_len=LENGTH)
    real, engine = run_engine(workload, CONFIG, GraphDevice())
    assert predicted.completed == len(workload) == len(real.ttft)
    assert predicted.steps == pytest.approx(engine.stats.steps, rel=0.02)
    for ours, theirs in ((predicted.ttft, real.ttft_of()), (predicted.itl, real.itl)):
        for which in ("p50", "p95"):
            assert getattr(ours, which) == pytest.approx(getattr(theirs, which), rel=0.1), which


def stall(policy: str | SchedulingPolicy, arrivals: list[Arrival]) -> tuple[Spread, Spread, float]:
    """ITL, TTFT of the prompts, tokens a second."""
    config = replace(CONFIG, prefix_caching=True, scheduling_policy=policy)
    times, engine = run_engine(arrivals, config, GraphDevice(noise=NOISE), SCENARIO)
    begun = times.ttft_of([str(place) for place in range(len(arrivals))])
    assert begun.count == len(arrivals)
    return times.itl, begun, engine.stats.tokens / SCENARIO.duration


def test_the_two_points() -> None:
    """Prompts of 8k and 32k beside 32 streams: latency-target's p99 stays under 1.5 times decode-only's, also
    with curves off by far; first come, first served has the throughput and blocking's TTFT."""
    arrivals = SCENARIO.arrivals(LENGTH)
    assert {one.prompt_tokens for one in arrivals} == {8192, 32768}
    alone, _, _ = stall("fcfs", [])
    assert 1.9e-3 < alone.p50 < 2.2e-3
    chunked, chunked_ttft, chunked_rate = stall("fcfs", arrivals)
    blocked, blocked_ttft, blocked_rate = stall(Blocking(), arrivals)
    assert blocked.max > 5 * chunked.max > 0.05
    assert chunked_ttft.p95 < 1.2 * blocked_ttft.p95
    probe = probed(noise=NOISE)
    rates = [chunked_rate, blocked_rate]
    for wrong in (1.0, 1.4, 1 / 3):
        curves = [
            StepCurve.of((t, c, wrong * s) for t, c, s in curve.points)
            for curve in (probe.prefill, probe.decode)
        ]
        policy = OnItsClock(1e3 * AIM * alone.p99, StepPredictor(*curves, HOST, overlap=True))
        itl, ttft, rate = stall(policy, arrivals)
        assert alone.p99 < itl.p99 <= 1.5 * alone.p99, wrong
        assert itl.max < 2 * chunked.max
        assert ttft.max < SCENARIO.duration / 2
        rates.append(rate)
    assert chunked_rate >= 0.97 * max(rates)


def test_what_cannot_be_read_in_time_waits_and_holds_up_nobody() -> None:
    """A prompt of 32k beside streams: no small chunks behind many keys, a few large ones; and a short prompt
    that comes meanwhile is read at once."""
    policy = OnItsClock(2.9, probed())
    config = replace(CONFIG, prefix_caching=True, scheduling_policy=policy)
    short = [Arrival(1.0 + 0.1 * i, 60, 4) for i in range(20)]
    arrivals = sorted([Arrival(0.5, 32768, 4), *short], key=lambda one: one.arrival_s)
    times, engine = run_engine(arrivals, config, GraphDevice(), replace(SCENARIO, duration=4.0))
    others = times.ttft_of([str(place) for place in range(1, 21)])
    assert others.p50 < 0.012
    assert others.max < 0.1  # a few meet large steps
    assert times.ttft["0"] < 3.5
    sizes = [count for record in engine.stats.history for name, count in record.scheduled if name == "0"]
    assert sum(sizes) == 32768 + 3
    assert sum(count > 1000 for count in sizes) <= 17
    assert np.median([count for count in sizes if count > 1][-10:]) > 1900
