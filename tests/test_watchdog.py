"""The watchdog names a late step once, says what is in it, and ends nothing."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from fake_model import FakeModel, FakeTokenizer, engine_config, expected

from sharp import watchdog
from sharp.engine import Engine
from sharp.latency_target import LatencyTarget
from sharp.plan import BatchPlan
from sharp.request import SamplingParams
from sharp.step_times import uniform_step
from sharp.watch import Watch
from sharp.watchdog import FIRST_S, FLOOR_S, TIMES, Patrol, Watchdog, pace

PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def plan(step: int = 7, seqs: int = 2, tokens: int = 3) -> BatchPlan:
    return uniform_step(seqs, tokens, 0, 64, 100, step)


def record(seconds: float, tokens: int) -> Any:
    return SimpleNamespace(seconds=seconds, num_tokens=tokens)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def kennel(predicted: float | None) -> tuple[Watchdog, Clock, list[str]]:
    """A watchdog with a clock that stands still."""
    clock, said = Clock(), []
    return Watchdog(lambda plan: predicted, warn=said.append, clock=clock), clock, said


@pytest.mark.parametrize(
    ("predicted", "limit"), [(0.3, TIMES * 0.3), (1e-3, FLOOR_S), (0.0, FLOOR_S), (None, FIRST_S)]
)
def test_a_step_is_late_after_so_long(predicted: float | None, limit: float) -> None:
    dog, clock, said = kennel(predicted)
    dog.look()  # nothing is in flight
    dog.begin(plan())
    clock.now += limit * 0.9999
    dog.look()
    assert said == []
    clock.now += limit * 0.0002
    dog.look()
    dog.look()
    [text] = said
    expectation = "no step was measured before it" if predicted is None else f"predicted were {predicted:g} s"
    assert f"step 7 has been running for {limit:.1f} s, {expectation}: 6 tokens of 2 sequences" in text
    assert "(0 decodes), requests probe-0, probe-1" in text


def test_each_late_step_once_and_the_oldest_first() -> None:
    dog, clock, said = kennel(0.01)
    dog.begin(plan(1))
    clock.now += 5
    dog.begin(plan(2))  # planned behind it
    dog.look()
    clock.now += 5
    dog.look()
    assert [text.split()[1] for text in said] == ["1"]
    dog.end()
    dog.look()
    assert [text.split()[1] for text in said] == ["1", "2"]
    dog.end()
    dog.look()
    dog.end()  # one more than began: a step that was given up in between
    dog.begin(plan(3, seqs=9, tokens=1))
    clock.now += 5
    dog.clear()
    dog.look()
    assert len(said) == 2
    dog.begin(plan(4, seqs=9, tokens=1))
    clock.now += 2
    dog.look()
    assert said[-1].endswith("9 tokens of 9 sequences (9 decodes), requests probe-0, probe-1, probe-2, "
                             "probe-3 and 5 more")  # fmt: skip


def test_the_pace_of_the_latest_steps() -> None:
    assert pace([], 5) is None
    decodes = [record(0.01, 1)] * 9
    assert pace(decodes, 1) == 0.01
    assert pace(decodes, 100) == 1.0  # never too short for a larger step
    assert pace([record(1.0, 1000)], 1) == 1.0  # too long for a small one: it reads the same weights
    assert pace([record(0.01, 1)] * 64 + [record(9.0, 1)] * 100, 1) == 0.01


def test_the_policy_is_asked_first() -> None:
    config = engine_config(scheduling_policy=LatencyTarget(1000.0))
    engine = Engine(FakeModel(), FakeTokenizer(), config)
    policy: Any = engine.scheduler.policy
    one = plan()
    assert watchdog.expected_seconds(engine.scheduler, engine.stats, one) == policy.predict(one) > 0
    engine = Engine(FakeModel(), FakeTokenizer(), engine_config())
    assert watchdog.expected_seconds(engine.scheduler, engine.stats, one) is None
    engine.stats.history.append(record(0.5, 6))
    assert watchdog.expected_seconds(engine.scheduler, engine.stats, one) == 0.5


class Stalls(FakeModel):
    """Stands still in the forward of one step."""

    def forward(self, plan: BatchPlan) -> Any:
        if len(self.plans) == 4:
            time.sleep(1.0)
        return super().forward(plan)


def test_an_engine_whose_model_stalls(caplog: pytest.LogCaptureFixture) -> None:
    """Told while the step runs, once; the answer is what it is without a stall."""
    engine = Engine(Stalls(), FakeTokenizer(), engine_config())
    engine._pipeline.watch.watchdog._floor_s = 0.3  # a second of FLOOR_S would take this test as long again
    engine.add_request([5, 6, 7], PARAMS, "slow one")
    told_in_time = threading.Event()

    def watch(logged: logging.LogRecord) -> bool:
        if len(engine.model.plans) == 4:  # type: ignore[attr-defined]
            told_in_time.set()
        return True

    logger = logging.getLogger("sharp")
    logger.addFilter(watch)
    outputs = []
    try:
        while engine.has_unfinished:
            outputs += engine.step()
    finally:
        logger.removeFilter(watch)
    engine.close()
    assert told_in_time.is_set()
    [message] = [logged.message for logged in caplog.records if logged.name == "sharp"]
    assert f"step {engine.stats.history[3].step} has been running for" in message
    assert "requests slow one" in message
    assert outputs[-1].outputs[0].token_ids == tuple(expected([5, 6, 7], PARAMS))
    assert engine.alive is False  # closed, not killed
    assert engine.error is None


def test_the_thread_ends_and_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    patrol = Patrol(poll_s=0.001)
    monkeypatch.setattr(watchdog, "PATROL", patrol)
    dog, clock, said = kennel(0.01)
    for number in (1, 2):
        dog.begin(plan(number))
        assert patrol.running
        clock.now += 3
        until = time.monotonic() + 20
        while len(said) < number and time.monotonic() < until:
            time.sleep(0.001)
        assert len(said) == number
        time.sleep(0.03)
        assert patrol.running, "a step is in flight"
        dog.end()
        while patrol.running and time.monotonic() < until:
            time.sleep(0.001)
        assert not patrol.running


def test_the_patrol_keeps_nobody() -> None:
    """What a watchdog was given to ask with goes with its engine's last reference, no garbage collection."""

    class Asked:
        def __call__(self, plan: BatchPlan) -> float:
            return 1.0

    watch = Watch(asked := Asked())
    gone = weakref.ref(asked)
    watch.planned(plan())
    del watch, asked
    assert gone() is None
