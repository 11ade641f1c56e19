"""The engine with a step in flight: the same outputs as without, by hand, on its thread, and interrupted."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from typing import Any

import pytest
from fake_model import FakeModel, engine_config, expected
from hypothesis import given, settings
from hypothesis import strategies as st
from late_model import LateModel
from test_engine import GREEDY, TOKENIZER, drain
from test_overlap import eos_prompt
from test_scheduler import prompt_of

from sharp.config import EngineConfig
from sharp.engine import Engine
from sharp.llm import LLM, prompt_index
from sharp.plan import BatchPlan, Launched, SampleOutput
from sharp.policies import POLICIES, SchedulingPolicy
from sharp.request import QueueFull, RequestOutput, RequestTooLarge, SamplingParams


def make_engine(model: FakeModel | None = None, overlap: bool | None = True, **options: Any) -> Engine:
    model = model or FakeModel(num_blocks=256)
    return Engine(model, TOKENIZER, engine_config(block_size=model.block_size, overlap=overlap, **options))


# By hand -----------------------------------------------------------------------------------------


def test_a_step_launches_one_and_lands_the_one_before() -> None:
    engine = make_engine()
    engine.add_request([5, 6, 7], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True), "a")
    assert engine.step() == []
    assert (engine.last_plan is None, engine.last_step) == (False, None)
    assert engine.scheduler.in_flight == (engine.last_plan,)
    (output,) = engine.step()  # launches the second token, lands the first
    assert len(output.outputs[0].token_ids) == 1
    assert engine.last_step is not None
    assert engine.last_step.step == 1
    assert engine.has_unfinished
    (output,) = engine.step()  # nothing to launch: a's last token is in flight
    assert output.finished
    assert not engine.has_unfinished
    assert engine.step() == []
    assert engine.stats.steps == 2


def test_the_step_too_far_is_landed() -> None:
    """All have ended, but a step is in flight: there is a step to take, of which nothing comes."""
    engine = make_engine()
    prompt, params = eos_prompt(), SamplingParams(max_tokens=40, temperature=0.0)
    engine.add_request(prompt, params, "a")
    outputs: list[RequestOutput] = []
    while not outputs or not outputs[-1].finished:
        outputs += engine.step()
    ids = expected(prompt, params)
    assert list(outputs[-1].outputs[0].token_ids) == ids
    assert engine.has_unfinished
    assert engine.step() == []
    assert not engine.has_unfinished
    assert engine.last_step is not None
    assert (engine.last_step.num_tokens, engine.last_step.num_sampled) == (1, 0)
    assert engine.stats.sampled == len(ids)
    assert engine.scheduler.blocks.num_used == 0


def test_overlap_is_the_models_unless_asked_for() -> None:
    assert not make_engine(overlap=None).overlap
    late = LateModel()
    assert make_engine(late, overlap=None).overlap
    assert not make_engine(late, overlap=False).overlap
    late.close()
    with pytest.raises(TypeError, match="overlap must be True, False or None, not 1"):
        EngineConfig(overlap=1)  # type: ignore[arg-type]


def run_moves(engine: Engine, moves: list[tuple[str, int]]) -> dict[str, list[Any]]:
    """Let moves happen between steps, and return what came out of each answer in the end."""
    count, last = 0, dict[str, RequestOutput]()

    def step() -> None:
        for output in engine.step():
            before = last.get(output.request_id)
            if before is not None:
                assert not before.finished
                for old, new in zip(before.outputs, output.outputs, strict=True):
                    assert new.text.startswith(old.text)
                    assert new.token_ids[: len(old.token_ids)] == old.token_ids
            last[output.request_id] = output
        engine.scheduler.check()

    for what, number in moves:
        if what == "step":
            step()
            continue
        length, tokens, kind = number % 40 + 1, number % 23 + 1, number % 6
        params = SamplingParams(
            max_tokens=tokens, temperature=float(number % 2), ignore_eos=kind == 0, seed=number,
            stop_token_ids=(270, 280) if kind == 1 else (), stop=["a", "stop"] if kind == 2 else None,
            n=2 if kind == 3 else 1, logprobs=2 if kind == 4 else None,
        )  # fmt: skip
        prompt = [4 + number % 2] * min(length, 10) + [4 + number % 250] * max(0, length - 10)
        try:
            engine.add_request(prompt, params, f"r{count}", priority=number % 3)
        except (QueueFull, RequestTooLarge):
            continue
        count += 1
    while engine.has_unfinished:
        step()
    assert engine.scheduler.blocks.num_used == 0
    assert all(output.finished for output in last.values())
    return {
        name: [(a.token_ids, a.text, a.finish_reason, a.stop_reason, a.logprobs) for a in output.outputs]
        for name, output in last.items()
    }


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "add", "step"]), st.integers(0, 10_000)), min_size=5, max_size=50
    ),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(["reserve", "optimistic"]),
    st.booleans(),
    st.sampled_from([12, 60]),
    st.booleans(),
)
def test_the_same_outputs(
    moves: list[tuple[str, int]], policy: str, admission: str, caching: bool, pages: int, late: bool
) -> None:
    """Texts, ids, reasons and log-probabilities, of any requests that come at any step. (The queue is long:
    how full it is when a request comes depends on the step.)"""
    found = []
    for overlap in (False, True):
        # Hypothesis measures nothing here: a device that is late now and then is as good as one always late.
        model = LateModel(num_blocks=pages, latency=1e-4) if late and overlap else FakeModel(num_blocks=pages)
        engine = make_engine(
            model, overlap, scheduling_policy=policy, admission=admission, prefix_caching=caching,
            max_queue_len=100,
        )  # fmt: skip
        found.append(run_moves(engine, moves))
        engine.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("phase", ["launch", "land"])
@pytest.mark.parametrize("late", [False, True])
def test_an_interruption_leaves_things_as_before_the_steps_in_flight(phase: str, late: bool) -> None:
    """At any step, before or after the model has been asked: both steps are done again, answers are the
    same."""
    kind = LateModel if late else FakeModel

    class Interrupted(kind):  # type: ignore[misc, valid-type]
        at, calls, after = 0, 0, False

        def _call(self, what: str, call: Any) -> Any:
            self.calls += what == phase
            now = what == phase and self.calls == self.at
            if now and not self.after:
                raise KeyboardInterrupt
            result = call()
            if now:
                raise KeyboardInterrupt
            return result

        def launch(self, plan: BatchPlan) -> Launched:
            return self._call("launch", lambda: kind.launch(self, plan))

        def land(self, launched: Launched) -> SampleOutput:
            return self._call("land", lambda: kind.land(self, launched))

    for at in (1, 2, 3, 6):
        for after in (False, True):
            model = Interrupted(num_blocks=64)
            model.at, model.after = at, after
            engine = make_engine(model, max_num_batched_tokens=8)
            for n in (3, 12, 1):
                engine.add_request([5] * n, GREEDY, str(n))
            last: dict[str, RequestOutput] = {}
            interruptions = 0
            while engine.has_unfinished:
                try:
                    last.update((o.request_id, o) for o in engine.step())
                except KeyboardInterrupt:
                    interruptions += 1
                    assert engine.scheduler.in_flight == ()
                    engine.abort("12")
                engine.scheduler.check()
            assert interruptions == 1
            for n in (3, 1):
                assert list(last[str(n)].outputs[0].token_ids) == expected([5] * n, GREEDY)
            assert engine.scheduler.blocks.num_used == 0
            engine.close()


def test_an_interruption_of_the_rollback() -> None:
    """A second Ctrl-C right after the first: the steps in flight are undone by the next step()."""
    model = FakeModel(num_blocks=64)
    engine = make_engine(model)
    engine.add_request([5, 6], GREEDY, "a")
    engine.step()
    roll_back, land = engine._pipeline.roll_back, model.land

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    model.land = interrupted  # type: ignore[method-assign]
    engine._pipeline.roll_back = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert len(engine.scheduler.in_flight) == 2
    model.land, engine._pipeline.roll_back = land, roll_back  # type: ignore[method-assign]
    assert list(drain(engine)["a"].outputs[0].token_ids) == expected([5, 6], GREEDY)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_plan_made_by_hand_and_left(overlap: bool) -> None:
    """As in a notebook: it is undone, and nobody's token is taken for another's."""
    engine = make_engine(overlap=overlap)
    engine.add_request([5, 6], GREEDY, "a")
    engine.scheduler.plan()
    engine.step()
    engine.step()
    if overlap:
        engine.scheduler.plan()
    assert list(drain(engine)["a"].outputs[0].token_ids) == expected([5, 6], GREEDY)


def test_ctrl_c_while_a_step_is_committed() -> None:
    """It counts, and its outputs come with the next step()."""
    engine = make_engine()
    engine.add_request([4], SamplingParams(max_tokens=1, temperature=0.0), "a")
    original = engine.scheduler.commit

    def commit(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    engine.scheduler.commit = commit  # type: ignore[method-assign]
    assert engine.step() == []
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.has_unfinished
    (output,) = engine.step()
    assert output.finished
    assert not engine.has_unfinished


# The device works while the host does ----------------------------------------------------------------------


class Watched(LateModel):
    """Notes what it is asked, and when its device has computed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heard: list[str] = []

    def launch(self, plan: BatchPlan) -> Launched:
        self.heard.append(f"launch {plan.step}")
        return super().launch(plan)

    def land(self, launched: Launched) -> SampleOutput:
        self.heard.append(f"land {launched.plan.step}")
        return super().land(launched)


def test_the_next_step_is_launched_before_the_host_waits() -> None:
    model = Watched(num_blocks=64)
    engine = make_engine(model)

    class Heard(list[Any]):
        def push(self, token_id: int) -> str:
            model.heard.append("text")
            return "x"

        def flush(self) -> str:
            return ""

    engine.tokenizer = type("Tokenizer", (), {"detokenizer": lambda self: Heard()})()
    engine.add_request([4, 5], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    drain(engine)
    wanted = "launch 1, launch 2, land 1, text, launch 3, land 2, text, land 3, text"
    assert ", ".join(model.heard) == wanted
    engine.close()


def test_the_device_does_not_wait_for_the_host() -> None:
    """A device of 4 ms a step and a host of 3 ms: with overlap they take little more than 4 ms a step
    together, without it 7."""

    class Slow(LateModel):
        def _run(self, plan: BatchPlan, seconds: float) -> Any:
            return super()._run(plan, 0.004)

    def took(overlap: bool) -> tuple[float, Engine]:
        engine = make_engine(Slow(num_blocks=64), overlap)
        commit = engine.scheduler.commit

        def busy(*args: Any) -> Any:
            time.sleep(0.003)
            return commit(*args)

        engine.scheduler.commit = busy  # type: ignore[method-assign]
        engine.add_request([4], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
        start = time.perf_counter()
        drain(engine)
        seconds = time.perf_counter() - start
        engine.close()
        assert 0.7 * seconds < sum(record.seconds for record in engine.stats.history) <= seconds
        return seconds, engine

    # The better of a few: other work on this machine only adds.
    alone, _ = min((took(False) for _ in range(3)), key=lambda pair: pair[0])
    ahead, engine = min((took(True) for _ in range(3)), key=lambda pair: pair[0])
    print(f"{alone / 40 * 1e3:.2f} ms a step without overlap, {ahead / 40 * 1e3:.2f} with")
    assert alone > 40 * 0.007
    assert ahead < 0.8 * alone
    records = list(engine.stats.history)[2:-2]
    # Most of its 3 ms of host falls into the device's time.
    assert statistics.median(record.wait_s for record in records) < 0.003
    for record in records:
        assert record.gpu_s is not None
        assert record.gpu_s >= 0.004
        assert record.commit_s >= 0.003
        assert record.host_s == record.plan_s + record.launch_s + record.commit_s


def test_a_policy_hears_what_the_landed_step_took() -> None:
    class Listens(SchedulingPolicy):
        def __init__(self) -> None:
            self.heard: list[tuple[int, float]] = []

        def observe(self, plan: BatchPlan, seconds: float) -> None:
            self.heard.append((plan.step, seconds))

    policy = Listens()
    engine = make_engine(scheduling_policy=policy)
    engine.add_request([4], GREEDY)
    drain(engine)
    assert policy.heard == [(record.step, record.seconds) for record in engine.stats.history]
    assert [step for step, _ in policy.heard] == list(range(1, 9))


def test_time_between_steps_by_hand_is_nobodys() -> None:
    engine = make_engine()
    engine.add_request([4], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
        time.sleep(0.2)
    assert len(engine.stats.history) == 4
    assert all(0 < record.seconds < 0.2 for record in engine.stats.history)


# On its thread ---------------------------------------------------------------------------------------------


@pytest.fixture
def llm() -> Any:
    with LLM(
        LateModel(num_blocks=1024, latency=0.001), tokenizer=TOKENIZER, block_size=4,
        max_num_batched_tokens=32, max_num_seqs=8,
    ) as made:  # fmt: skip
        assert made.engine.overlap
        yield made


def test_many_threads(llm: LLM) -> None:
    answers: dict[int, list[list[int]]] = {}
    obeys = SamplingParams(max_tokens=30, temperature=0.0)

    def work(n: int) -> None:
        prompts = [[5 + n, k] for k in range(4)]
        if n % 2:
            results = llm.generate(prompts, obeys, use_tqdm=False)
        else:
            results = [o for o in llm.stream(prompts, obeys) if o.finished]
            results.sort(key=prompt_index)
        answers[n] = [list(r.outputs[0].token_ids) for r in results]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for n in range(8):
        assert answers[n] == [expected([5 + n, k], obeys) for k in range(4)]
    wait = time.monotonic() + 2
    while llm.engine.has_unfinished and time.monotonic() < wait:
        time.sleep(0.002)
    assert not llm.engine.has_unfinished  # the thread lands a step too far, too
    assert llm.engine.scheduler.blocks.num_used == 0


def test_aborts_and_time_limits(llm: LLM) -> None:
    forever = SamplingParams(max_tokens=900, ignore_eos=True)
    stream = llm.stream([5], forever)
    assert llm.abort(next(stream).request_id)
    *_, last = stream
    assert last.outputs[0].finish_reason == "abort"
    late, whole = llm.generate(
        ["a", "b"],
        [SamplingParams(max_tokens=900, ignore_eos=True, timeout_s=0.1), GREEDY],
        use_tqdm=False,
    )
    assert late.outputs[0].finish_reason == "timeout"
    assert list(whole.outputs[0].token_ids) == expected(TOKENIZER.encode("b"), GREEDY)


def test_close_with_steps_in_flight() -> None:
    for by_hand in (True, False):
        model = LateModel(num_blocks=256, latency=0.01)
        engine = make_engine(model)
        engine.add_request(prompt_of(9), SamplingParams(max_tokens=200, ignore_eos=True))
        if by_hand:
            engine.step()
            engine.step()
        else:
            engine.start()
            time.sleep(0.02)
        engine.close()
        assert model.closed
        assert not engine.has_unfinished
        assert engine.scheduler.blocks.num_used == 0
