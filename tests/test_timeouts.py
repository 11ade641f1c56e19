"""Requests that have a time limit end at a step's boundary, wherever they are, and give everything back."""

from __future__ import annotations

import dataclasses
import time

import pytest
from fake_model import FakeModel, expected
from test_engine import GREEDY, TOKENIZER, drain, make_engine

from sharp import engine as engine_module
from sharp.engine import Engine
from sharp.llm import LLM
from sharp.request import SamplingParams

LIMITED = dataclasses.replace(GREEDY, max_tokens=50, timeout_s=10.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[now], in seconds: what the engine's time.monotonic() gives."""
    now = [1000.0]

    class Time:
        perf_counter = staticmethod(time.perf_counter)

        @staticmethod
        def monotonic() -> float:
            return now[0]

    monkeypatch.setattr(engine_module, "time", Time)
    return now


def reasons(engine: Engine) -> dict[str, tuple[str | None, int]]:
    return {
        name: (output.outputs[0].finish_reason, len(output.outputs[0].token_ids))
        for name, output in drain(engine).items()
    }


def test_running_waiting_and_reading(clock: list[float]) -> None:
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=4)
    engine.add_request([5, 6], LIMITED, "runs")
    engine.step()
    clock[0] += 4
    engine.add_request([5] * 40, LIMITED, "reads")
    engine.add_request([7] * 40, LIMITED, "reads too")
    engine.add_request([8], GREEDY, "no limit")
    engine.step()
    clock[0] += 6  # the first one's time is up, in the moment itself; the others have four seconds left
    outputs = engine.step()
    assert [o.request_id for o in outputs if o.finished] == ["runs"]
    assert outputs[0].outputs[0].finish_reason == "timeout"
    answer = list(outputs[0].outputs[0].token_ids)
    assert answer == expected([5, 6], LIMITED)[:2]
    clock[0] += 3.9
    assert not any(o.finished for o in engine.step())
    assert [r.request_id for r in engine.scheduler.running] == ["reads", "reads too"]
    engine.add_request([7], dataclasses.replace(LIMITED, timeout_s=0.1), "never ran")
    clock[0] += 0.2
    late = dict.fromkeys(("reads", "reads too", "never ran"), ("timeout", 0))
    assert reasons(engine) == {**late, "no limit": ("length", 8)}
    assert engine.scheduler.blocks.num_used == 0


def test_all_samples_of_a_prompt(clock: list[float]) -> None:
    for steps in (0, 1, 4):
        engine = make_engine(max_num_batched_tokens=8)
        engine.add_request([5] * 14, dataclasses.replace(LIMITED, n=3), "a")
        for _ in range(steps):
            engine.step()
        clock[0] += 11
        output = drain(engine)["a"]
        assert [answer.finish_reason for answer in output.outputs] == ["timeout"] * 3
        assert engine.scheduler.requests() == []


def test_what_has_ended_does_not_time_out(clock: list[float]) -> None:
    engine = make_engine()
    engine.add_request([5], dataclasses.replace(LIMITED, max_tokens=2), "a")
    assert reasons(engine) == {"a": ("length", 2)}
    engine.add_request(
        [5], dataclasses.replace(LIMITED, max_tokens=3, timeout_s=100.0), "a"
    )  # its name again
    clock[0] += 11
    assert reasons(engine) == {"a": ("length", 3)}


def test_a_step_that_outlasts_the_limit() -> None:
    """On the engine's thread, by the real clock: the limit is seen at the next boundary, others go on."""
    with LLM(FakeModel(num_blocks=512, delay=0.01), tokenizer=TOKENIZER, block_size=4) as llm:
        params = [
            SamplingParams(max_tokens=900, ignore_eos=True, timeout_s=0.1),
            dataclasses.replace(GREEDY, max_tokens=20),
        ]
        late, whole = llm.generate(["a", "b"], params, use_tqdm=False)
        assert late.outputs[0].finish_reason == "timeout"
        assert 1 <= len(late.outputs[0].token_ids) < 100
        assert whole.outputs[0].finish_reason == "length"
        assert llm.engine.scheduler.blocks.num_used == 0
