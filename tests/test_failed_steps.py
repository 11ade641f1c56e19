"""A step that fails ends its own requests, and everybody else gets the right answer; other errors end all."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, FakeTokenizer, engine_config, expected
from late_model import LateModel
from test_engine import GREEDY, TOKENIZER, drain
from test_overlap import eos_prompt
from test_scheduler import prompt_of

from sharp import driver
from sharp.engine import Engine
from sharp.failures import StepFailed
from sharp.llm import LLM
from sharp.plan import BatchPlan, Launched, SampleOutput
from sharp.replay import replay
from sharp.request import EngineDead, RequestOutput, SamplingParams

OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
LOST = (
    RuntimeError("launching gemm: the driver says CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"),
    FloatingPointError("logits row 0 is NaN throughout"),
    MemoryError("no room"),
    driver.CudaOutOfMemory("allocating 8 bytes", "CUDA_ERROR_OUT_OF_MEMORY"),
)


class Failing(FakeModel):
    """Raises `error` in launch() or land() of the steps of `steps`, or samples no token there."""

    where: str = "launch"
    steps: frozenset[int] = frozenset()

    def fail(self) -> None:
        assert self.error is not None
        raise self.error

    def launch(self, plan: BatchPlan) -> Launched:
        if self.where == "launch" and plan.step in self.steps:
            self.fail()
        return super().launch(plan)

    def land(self, launched: Launched) -> SampleOutput:
        sampled = super().land(launched)
        if launched.plan.step not in self.steps or self.where == "launch":
            return sampled
        if self.where == "land":
            self.fail()
        return SampleOutput(np.full_like(sampled.token_ids, -1), sampled.logprobs)  # "ids"


def make_engine(where: str, steps: set[int], overlap: bool, **options: Any) -> Engine:
    model = Failing(num_blocks=64)
    model.where, model.steps, model.error = where, frozenset(steps), LOST[0]
    return Engine(model, FakeTokenizer(), engine_config(overlap=overlap, **options))


def run(engine: Engine) -> tuple[dict[str, RequestOutput], list[StepFailed]]:
    """To the end: the last output of each request, and what steps failed of."""
    last, failures = dict[str, RequestOutput](), list[StepFailed]()
    while engine.has_unfinished:
        try:
            last.update((output.request_id, output) for output in engine.step())
        except StepFailed as failure:
            failures.append(failure)
        engine.scheduler.check()
    assert engine.scheduler.blocks.num_used == 0
    assert engine.alive
    return last, failures


def reasons(last: dict[str, RequestOutput]) -> dict[str, str | None]:
    return {name: output.outputs[0].finish_reason for name, output in last.items()}


@OVERLAP
@pytest.mark.parametrize("where", ["launch", "land"])
@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_its_requests_end_and_others_go_on(error: BaseException, where: str, overlap: bool) -> None:
    engine = make_engine(where, {3}, overlap, max_num_seqs=2)
    engine.model.error = error  # type: ignore[attr-defined]
    for n, name in enumerate("abcd"):
        engine.add_request([5 + n, 6], GREEDY, name)
    last, failures = run(engine)
    (failure,) = failures
    assert str(failure) == f"step 3 (2 tokens of a, b) failed: {type(error).__name__}: {error}"
    assert (failure.step, failure.__cause__) == (3, error)
    assert reasons(last) == {"a": "error", "b": "error", "c": "length", "d": "length"}
    for n, name in enumerate("abcd"):
        ids = list(last[name].outputs[0].token_ids)
        assert ids == expected([5 + n, 6], GREEDY)[: 2 if n < 2 else None]
    engine.add_request([9], GREEDY, "a")  # its name is free
    assert reasons(drain(engine)) == {"a": "length"}


@OVERLAP
def test_no_token_could_be_sampled(overlap: bool) -> None:
    """The scheduler refuses the ids; the step too far counts as any other."""
    engine = make_engine("ids", {2}, overlap, max_num_seqs=1)
    engine.add_request([5, 6], GREEDY, "a")
    engine.add_request([7, 6], GREEDY, "b")
    last, failures = run(engine)
    assert reasons(last) == {"a": "error", "b": "length"}
    assert "step 2 (1 tokens of a) failed: FloatingPointError: request a: no token" in str(failures[0])


@OVERLAP
@pytest.mark.parametrize("where", ["launch", "land"])
def test_all_samples_of_a_prompt(where: str, overlap: bool) -> None:
    """Those that wait for the fork, and one that had no token in that very step."""
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=3, ignore_eos=True)
    for step in (1, 2, 3, 4, 6):
        engine = make_engine(where, {step}, overlap, max_num_batched_tokens=4, max_num_seqs=4)
        engine.add_request(prompt_of(6), params, "a")
        engine.add_request([5], GREEDY, "b")
        last, failures = run(engine)
        told = {answer.finish_reason for answer in last["a"].outputs}
        assert told in ({"error"}, {"length"})
        assert len(failures) == 1
        ids = list(last["b"].outputs[0].token_ids)
        failed = "b" in str(failures[0])
        assert last["b"].outputs[0].finish_reason == ("error" if failed else "length")
        assert ids == expected([5], GREEDY)[: len(ids)]
        assert told == {"error"} or failed
        assert engine.scheduler.pages.forks.copies == {}


def test_what_ended_in_the_step_before_has_ended() -> None:
    """The step that could not be launched was one too far for it."""
    prompt, params = eos_prompt(), SamplingParams(max_tokens=40, temperature=0.0)
    ids = expected(prompt, params)
    engine = make_engine("launch", {len(ids) + 1}, True)
    engine.add_request(prompt, params, "ends")
    engine.add_request([8, 9], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True), "goes on")
    last, failures = run(engine)
    assert len(failures) == 1
    assert reasons(last) == {"ends": "stop", "goes on": "error"}
    assert list(last["ends"].outputs[0].token_ids) == ids
    assert len(last["goes on"].outputs[0].token_ids) == len(ids)  # the step before landed for it, too


def test_what_is_planned_on_top_of_it_is_planned_again() -> None:
    """A newcomer's step was in flight behind the one that failed; it depends on nothing there."""
    engine = make_engine("land", {2}, True)
    engine.add_request([5, 6], GREEDY, "a")
    engine.step()
    engine.step()
    engine.add_request([7, 8], GREEDY, "b")
    with pytest.raises(StepFailed, match="of a\\) failed"):
        engine.step()
    assert engine.last_plan is not None
    assert engine.last_plan.request_ids == ("a", "b")
    assert engine.scheduler.in_flight == ()
    last, failures = run(engine)
    assert failures == []
    assert list(last["b"].outputs[0].token_ids) == expected([7, 8], GREEDY)


def test_both_steps_fail() -> None:
    """The next could not be launched, and the one before did not land: the older one's requests have ended,
    the other's are tried again."""
    engine = make_engine("launch", {2}, True)
    model: Any = engine.model
    land = model.land

    def lost(launched: Launched) -> SampleOutput:
        if launched.plan.step == 1:
            raise MemoryError("one")
        return land(launched)

    model.land = lost
    engine.add_request([5, 6], GREEDY, "a")
    engine.step()
    engine.add_request([7, 8], GREEDY, "b")
    last, failures = run(engine)
    assert [str(f) for f in failures] == ["step 1 (2 tokens of a) failed: MemoryError: one"]
    assert reasons(last) == {"a": "error", "b": "length"}


@OVERLAP
def test_what_may_have_broken_it_is_not_found_again(overlap: bool) -> None:
    """Logits that are not finite may come of pages that an earlier step has filled."""
    prompt = prompt_of(21)
    engine = make_engine("ids", {4}, overlap, max_num_batched_tokens=8)
    engine.add_request(prompt, GREEDY, "a")
    engine.add_request([9, 9, 9, 9, 9], SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0), "b")
    last, failures = run(engine)
    assert len(failures) == 1
    assert last["a"].outputs[0].finish_reason == "error"
    engine.add_request(prompt, GREEDY, "again")
    answer = drain(engine)["again"]
    assert answer.num_cached_tokens == 0
    assert list(answer.outputs[0].token_ids) == expected(prompt, GREEDY)
    engine.add_request(prompt, GREEDY, "found")
    assert drain(engine)["found"].num_cached_tokens == 20


@OVERLAP
def test_callers_of_other_steps_hear_nothing(overlap: bool) -> None:
    """On the engine's thread: one call of two prompts fails, its other prompt is ended; others get
    answers."""
    armed = threading.Event()
    error = MemoryError("no room")

    class Poor(LateModel):
        """Has no room for a step with token 99 in it."""

        def _run(self, plan: BatchPlan, seconds: float) -> Any:
            if armed.is_set() and 99 in plan.token_ids:
                raise error
            return super()._run(plan, seconds)

    with LLM(Poor(num_blocks=512), tokenizer=TOKENIZER, block_size=4, max_num_seqs=1, overlap=overlap) as llm:
        armed.set()
        got: dict[str, Any] = {}

        def call(name: str, prompts: list[list[int]]) -> None:
            try:
                got[name] = llm.generate(prompts, GREEDY, use_tqdm=False)
            except BaseException as caught:
                got[name] = caught

        calls = {"before": [[5], [6]], "fails": [[7], [99, 3], [8]], "after": [[9], [10]]}
        threads = [threading.Thread(target=call, args=pair) for pair in calls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert isinstance(got["fails"], StepFailed)
        assert got["fails"].__cause__ is error
        for name in ("before", "after"):
            assert [list(r.outputs[0].token_ids) for r in got[name]] == [
                expected(prompt, GREEDY) for prompt in calls[name]
            ]
        assert llm.engine.alive
        end = time.monotonic() + 20  # an answer is out a moment before its step is over
        while llm.engine.has_unfinished and time.monotonic() < end:
            time.sleep(0.01)
        assert not llm.engine.has_unfinished
        stream = llm.stream([99], GREEDY)
        with pytest.raises(StepFailed, match="no room"):
            next(stream)


@OVERLAP
@pytest.mark.parametrize("where", ["launch", "land", "ids"])
def test_the_log_runs_again(where: str, overlap: bool, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=4, temperature=1.0, n=2, ignore_eos=True)
    engine = make_engine(where, {3, 7, 8, 15}, overlap, max_num_batched_tokens=8, max_num_seqs=4)
    for number in range(20):
        engine.add_request(prompt_of(3 + number), params, f"r{number}")
    last, failures = run(engine)
    assert len(failures) >= 3
    assert set(reasons(last).values()) == {"error", "length"}
    engine.log.save(tmp_path / "log")
    again = replay(tmp_path / "log")
    assert again.scheduler.step == engine.scheduler.step
    assert not again.scheduler.requests()


# What ends the engine ------------------------------------------------------------------------------


@OVERLAP
@pytest.mark.parametrize("where", ["launch", "land"])
@pytest.mark.parametrize(
    "error", [ValueError("bug"), AssertionError("bug"), RecursionError("bug"), NotImplementedError("bug")]
)
def test_mistakes_end_the_engine(error: BaseException, where: str, overlap: bool) -> None:
    engine = make_engine(where, {2}, overlap)
    engine.model.error = error  # type: ignore[attr-defined]
    engine.add_request([5], GREEDY)
    with pytest.raises(type(error), match="bug"):
        drain(engine)
    with pytest.raises(EngineDead, match="bug"):
        engine.add_request([5])
    assert not engine.has_unfinished


@OVERLAP
@pytest.mark.parametrize("where", ["launch", "land"])
def test_a_lost_context_ends_the_engine(where: str, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that CUDA does not recover from, and any that comes after it."""
    for error in (
        driver.CudaError("waiting", "CUDA_ERROR_ILLEGAL_ADDRESS"),
        driver.CudaError("launching", "CUDA_ERROR_INVALID_VALUE"),
    ):
        engine = make_engine(where, {2}, overlap)
        engine.model.error = error  # type: ignore[attr-defined]
        engine.add_request([5], GREEDY)
        monkeypatch.setattr(driver, "poisoned", lambda: "waiting: CUDA_ERROR_ILLEGAL_ADDRESS")
        with pytest.raises(driver.CudaError, match="the driver says"):
            drain(engine)
        with pytest.raises(EngineDead, match="the driver says"):
            engine.add_request([5])
