"""StepPredictor: pure steps are the curves', mixed ones the sum of their parts, and nothing falls."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_latency_target import curves_of, gpu_like

from sharp.config import EngineConfig
from sharp.curves import StepCurve
from sharp.predictor import HostTime, Line, StepPredictor, StepWork
from sharp.request import Request, SamplingParams
from sharp.scheduler import Scheduler

PREDICTOR = StepPredictor(*curves_of(gpu_like))


def chunk(tokens: int, context: int) -> StepWork:
    return StepWork(0, 0, 0, ((tokens, context),), 1)


def decode(count: int, context: int) -> StepWork:
    return StepWork(count, count * context, context, (), count)


def test_pure_steps_are_the_curves() -> None:
    for tokens, context, seconds in PREDICTOR.prefill.points:
        assert PREDICTOR.seconds(chunk(tokens, context)) == pytest.approx(seconds)
    for count, context, seconds in PREDICTOR.decode.points:
        assert PREDICTOR.seconds(decode(count, context)) == pytest.approx(seconds)
    assert PREDICTOR.seconds(StepWork(0, 0, 0, (), 0)) == 0
    assert PREDICTOR.seconds(chunk(512, 4096)) == pytest.approx(gpu_like(chunk(512, 4096)), rel=1e-3)
    assert PREDICTOR.seconds(decode(16, 8000)) == pytest.approx(gpu_like(decode(16, 8000)), rel=1e-3)


def test_mixed_steps() -> None:
    for work in (
        StepWork(16, 16 * 300, 300, ((512, 0),), 17),
        StepWork(64, 64 * 1000, 1000, ((512, 2000), (64, 0)), 65),
        StepWork(4, 4 * 64, 64, tuple((64, 64 * i) for i in range(8)), 5),
    ):
        assert PREDICTOR.seconds(work) == pytest.approx(gpu_like(work), rel=0.02)


def test_one_long_sequence_bounds_a_step() -> None:
    """A device that reads sequences side by side waits for the longest."""

    def side_by_side(work: StepWork) -> float:
        return 1e-3 + 1e-6 * work.longest + 1e-8 * sum(t * (c + t / 2) for t, c in work.chunks)

    predictor = StepPredictor(*curves_of(side_by_side))
    even, uneven = StepWork(16, 16_000, 1000, (), 16), StepWork(16, 16_000, 8000, (), 16)
    assert predictor.seconds(even) == pytest.approx(2e-3)
    assert predictor.seconds(uneven) == pytest.approx(9e-3)


def test_rows_of_logits_cost() -> None:
    def with_rows(work: StepWork) -> float:
        return gpu_like(work) + 1e-3 * (work.rows - 1)

    predictor = StepPredictor(*curves_of(with_rows))
    for rows in (1, 4, 16):
        work = StepWork(0, 0, 0, tuple((64, 0) for _ in range(16)), rows)
        assert predictor.seconds(work) == pytest.approx(with_rows(work), rel=0.02)


def test_what_the_engine_itself_takes() -> None:
    predictor = StepPredictor(*curves_of(gpu_like), host_s=HostTime(1e-3, 1e-4))
    work = StepWork(3, 300, 100, ((64, 0),), 3)
    assert predictor.seconds(work) - PREDICTOR.seconds(work) == pytest.approx(1e-3 + 4e-4)


def test_sizes_that_were_not_measured_at_every_context() -> None:
    """The far context stops at 512 tokens: pairs go on costing what they did, and do not count as tokens'."""
    prefill, decode_curve = curves_of(gpu_like)
    fewer = StepCurve.of(point for point in prefill.points if point[:2] != (4096, 1024))
    predictor = StepPredictor(fewer, decode_curve)
    for work in (
        chunk(4096, 0),
        chunk(2048, 6000),
        StepWork(0, 0, 0, tuple((128, 0) for _ in range(16)), 16),
    ):
        assert predictor.seconds(work) == pytest.approx(gpu_like(work), rel=0.05)


def test_a_single_point_is_enough() -> None:
    one = StepCurve.of([(1, 0, 0.01)])
    predictor = StepPredictor(one, one)
    assert predictor.seconds(chunk(1, 0)) == pytest.approx(0.01)
    assert predictor.seconds(decode(8, 5000)) >= 0.01
    # What was not measured is never for free: a chunk of 100 tokens takes a hundred times as long.
    assert predictor.seconds(chunk(100, 0)) == pytest.approx(1.0)
    assert predictor.largest_chunk(0.05, 1, 64, 64, [], 4096) <= 4


def test_lines() -> None:
    line = Line([1, 3, 5], [10, 20, 40])
    assert [line.at(x) for x in (0, 1, 2, 3, 4, 5, 7)] == [10, 10, 15, 20, 30, 40, 60]
    assert Line([2], [7]).at(100) == 7


points = st.lists(
    st.tuples(st.sampled_from([1, 4, 16, 64, 256]), st.sampled_from([0, 500]), st.floats(1e-4, 1.0)),
    min_size=1, max_size=10, unique_by=lambda p: p[:2],
)  # fmt: skip


@given(points, points, st.integers(0, 40), st.integers(0, 3000), st.integers(1, 4000), st.floats(1e-3, 3))
def test_the_largest_chunk_is_the_largest(prefill, decode_points, decodes, keys, most, limit) -> None:  # type: ignore[no-untyped-def]
    """On any measured curves, however noisy: one token more takes longer than the limit, or is not there."""
    predictor = StepPredictor(StepCurve.of(prefill), StepCurve.of(decode_points))
    longest = keys if decodes else 0
    prompts = [(3000, 200)]

    def took(tokens: int) -> float:
        chunks = [(min(tokens, 3000), 200), (tokens - 3000, 0)] if tokens > 3000 else [(tokens, 200)]
        chunks = chunks if tokens else []
        return predictor.seconds(StepWork(decodes, keys * decodes, longest, tuple(chunks), decodes))

    found = predictor.largest_chunk(limit, decodes, keys * decodes, longest, prompts, most)
    assert 0 <= found <= most
    assert found == 0 or took(found) <= limit * (1 + 1e-9)
    assert found == most or took(found + 1) > limit * (1 - 1e-9)
    times = [took(t) for t in range(1, 3000, 97)]
    assert all(b >= a * (1 - 1e-9) for a, b in pairwise(times))


def test_the_work_of_a_plan() -> None:
    scheduler = Scheduler(EngineConfig(max_num_batched_tokens=64, block_size=4), 100, 4096)
    for name, length in (("a", 5), ("b", 9), ("c", 100)):
        params = SamplingParams(max_tokens=9, temperature=0.0)
        scheduler.add(Request(name, None, list(range(length)), params, 0))
    plan = scheduler.plan()
    assert plan is not None
    first = StepWork.of(plan)
    assert first == StepWork(0, 0, 0, ((5, 0), (9, 0), (50, 0)), 2)
    from sharp.plan import SampleOutput

    scheduler.commit(plan, SampleOutput(np.array([1, 1], np.int32), (None, None)))
    plan = scheduler.plan()
    assert plan is not None
    assert StepWork.of(plan) == StepWork(2, 14, 9, ((50, 50),), 3)
