"""The engine and LLM over a fake model: text, stop strings, streams, threads, errors, interruptions."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fake_model import (
    VOCAB,
    FakeModel,
    FakeTokenizer,
    draw,
    engine_config,
    expected,
    model_config,
    next_logits,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sharp.answer import AnswerText
from sharp.door import derive_seed
from sharp.engine import Engine
from sharp.llm import LLM, prompt_index
from sharp.policies import POLICIES
from sharp.request import QueueFull, RequestOutput, RequestTooLarge, SamplingParams

TOKENIZER = FakeTokenizer()
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def make_engine(model: FakeModel | None = None, **options: Any) -> Engine:
    model = model or FakeModel()
    return Engine(model, TOKENIZER, engine_config(block_size=model.block_size, **options))


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(
        FakeModel(num_blocks=1024),
        tokenizer=TOKENIZER,
        block_size=4,
        max_num_batched_tokens=32,
        max_num_seqs=8,
    ) as made:
        yield made


def drain(engine: Engine) -> dict[str, RequestOutput]:
    """Step by hand to the end; the last output of every request."""
    last = {}
    for _ in range(10_000):
        if not engine.has_unfinished:
            break
        last.update((output.request_id, output) for output in engine.step())
        engine.scheduler.check()
    assert not engine.has_unfinished
    assert engine.scheduler.blocks.num_used == 0
    return last


def eventually(condition: Callable[[], bool], seconds: float = 2.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


# By hand -----------------------------------------------------------------------------------------


def test_step_by_hand() -> None:
    engine = make_engine()
    assert engine.add_request("hello", GREEDY, "a") == "a"
    engine.add_request([5, 6, 7], SamplingParams(max_tokens=3, temperature=0.0), "b")
    assert engine.has_unfinished
    first = engine.step()
    assert [len(o.outputs[0].token_ids) for o in first] == [1, 1]
    assert not first[0].finished
    last = drain(engine)
    assert list(last["a"].outputs[0].token_ids) == expected(TOKENIZER.encode("hello"), GREEDY)
    assert last["a"].outputs[0].text == TOKENIZER.decode(last["a"].outputs[0].token_ids)
    assert (last["a"].prompt, last["b"].prompt) == ("hello", None)
    assert last["b"].prompt_token_ids == (5, 6, 7)
    assert engine.step() == []
    record = engine.last_step
    assert record is not None
    assert (record.num_tokens, record.num_seqs, record.num_decodes, record.running) == (1, 1, 1, 0)
    assert record.seconds > 0
    assert "<table>" in record._repr_html_()
    stats = engine.stats
    # The last token of an answer is never fed back.
    assert (stats.steps, stats.tokens, stats.sampled) == (8, 5 + 7 + 3 + 2, 11)
    assert stats.padded_tokens == 2 * 5 + 2 + 2 + 5
    assert stats.padding_saved == 2
    assert stats.peak_blocks == 4  # step 3: seven tokens of a, five of b, in pages of four


def test_seeds_come_from_the_order() -> None:
    """Without a seed of its own a request gets one from the engine's seed and its order, so runs repeat."""
    params = SamplingParams(max_tokens=6, temperature=1.0, ignore_eos=True)

    def answers(seed: int) -> list[tuple[int, ...]]:
        engine = make_engine(seed=seed)
        names = [engine.add_request([9, 9], params) for _ in range(3)]
        last = drain(engine)
        return [last[name].outputs[0].token_ids for name in names]

    assert answers(1) == answers(1)
    assert len({*answers(1), *answers(2)}) == 6
    assert list(answers(7)[1]) == expected([9, 9], params, derive_seed(7, 1))
    engine = make_engine(seed=7)
    with pytest.raises(ValueError):
        engine.add_request([])  # does not count
    engine.add_request([9, 9], params)
    assert drain(engine)["request-0"].outputs[0].token_ids == answers(7)[0]


def test_logprobs() -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=4, temperature=1.5, seed=3, logprobs=2, ignore_eos=True)
    engine.add_request([8, 8], params, "a")
    engine.add_request([8, 8], GREEDY, "b")
    last = drain(engine)
    assert last["b"].outputs[0].logprobs is None
    answer = last["a"].outputs[0]
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 4
    tokens = [8, 8]
    for token, logprobs in zip(answer.token_ids, answer.logprobs, strict=True):
        logits = next_logits(tokens, range(len(tokens))).astype(np.float64)
        best = np.argsort(-logits)[:2].tolist()
        assert set(logprobs) == {*best, token}
        assert logprobs[token] == pytest.approx(logits[token] - np.log(np.exp(logits).sum()))
        tokens.append(token)


BAD_PROMPTS: list[tuple[Any, type[Exception], str]] = [
    ("", ValueError, "empty"),
    ([], ValueError, "empty"),
    ([VOCAB], ValueError, rf"{VOCAB} is outside \[0, {VOCAB}\)"),
    ([3, -1], ValueError, "-1 is outside"),
    ([3, True], TypeError, "True"),
    ([3, 1.0], TypeError, "1.0"),
    ([3, None], TypeError, "None"),
    ([3, "a"], TypeError, "'a'"),
    (b"bytes", TypeError, "bytes"),
    (7, TypeError, "int"),
    (None, TypeError, "NoneType"),
    ({"prompt": "x"}, TypeError, "dict"),
    ("\ud800", ValueError, "surrogate"),
    ([3] * 50, RequestTooLarge, "50 tokens.*max_model_len 50"),
]


@pytest.mark.parametrize(("prompt", "error", "told"), BAD_PROMPTS, ids=lambda value: repr(value)[:20])
def test_bad_prompts(prompt: Any, error: type[Exception], told: str) -> None:
    """Refused at the door: nothing is queued, and the engine goes on."""
    engine = make_engine(FakeModel(model_config(50)))
    with pytest.raises(error, match=told):
        engine.add_request(prompt)
    assert not engine.has_unfinished
    with LLM(FakeModel(model_config(50)), tokenizer=TOKENIZER, block_size=4) as llm:
        for call in (llm.generate, llm.stream):
            with pytest.raises(error, match=f"(?s)prompt 1: .*{told}"):
                call(["fine", prompt], GREEDY)
        assert not llm.engine.has_unfinished
        assert llm.generate("fine", GREEDY, use_tqdm=False)[0].finished


def test_bad_requests() -> None:
    engine = make_engine(FakeModel(num_blocks=4), max_queue_len=2)
    with pytest.raises(RequestTooLarge, match=r"5 KV pages.*4 in all"):
        engine.add_request([4] * 10, SamplingParams(max_tokens=8))
    with pytest.raises(TypeError, match="dict"):
        engine.add_request([4], {"max_tokens": 3})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="7"):
        engine.add_request([4], GREEDY, 7)  # type: ignore[arg-type]
    engine.add_request([4], GREEDY, "a")
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add_request([4], GREEDY, "a")
    engine.add_request([4], GREEDY)
    with pytest.raises(QueueFull, match="2"):
        engine.add_request([4], GREEDY)
    assert len(drain(engine)) == 2
    engine.add_request([4], GREEDY, "a")  # free again
    with pytest.raises(ValueError, match=r"max_model_len 5000 .* 4096"):
        make_engine(max_model_len=5000)
    with pytest.raises(ValueError, match="block_size is 8"):
        Engine(FakeModel(), TOKENIZER, engine_config(block_size=8))


def test_queue_full_tells_the_wait() -> None:
    engine = make_engine(FakeModel(num_blocks=4), max_queue_len=2, max_num_seqs=1)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for _ in range(2):
        engine.add_request([4], params)
    with pytest.raises(QueueFull) as caught:
        engine.add_request([4], params)
    assert (caught.value.length, caught.value.limit, caught.value.estimated_wait_s) == (2, 2, None)
    engine.step()  # one token of 8: its request runs, the other waits
    engine.add_request([4], params)
    with pytest.raises(QueueFull, match=r"all of them end in about .* s") as caught:
        engine.add_request([4], params)
    assert engine.scheduler.tokens_ahead() == 7 + 8 + 8
    assert engine.last_step is not None
    assert caught.value.estimated_wait_s == pytest.approx(23 * engine.last_step.seconds)
    drain(engine)


def test_priorities_by_hand() -> None:
    engine = make_engine(max_num_seqs=1, scheduling_policy="priority")
    for name, priority in (("late", 3), ("urgent", -1), ("normal", 0)):
        engine.add_request([4], GREEDY, name, priority=priority)
    done: list[str] = []
    while engine.has_unfinished:
        done += [output.request_id for output in engine.step() if output.finished]
    assert done == ["urgent", "normal", "late"]
    for bad, error in ((1.5, TypeError), (True, TypeError), (2**31, ValueError)):
        with pytest.raises(error, match=f"priority.*{bad}"):
            engine.add_request([4], GREEDY, priority=bad)  # type: ignore[arg-type]


def test_priorities_of_prompts() -> None:
    with LLM(
        FakeModel(delay=0.002),
        tokenizer=TOKENIZER,
        block_size=4,
        max_num_seqs=1,
        scheduling_policy="priority",
    ) as llm:
        params = SamplingParams(max_tokens=9, ignore_eos=True)
        done = [
            prompt_index(output)
            for output in llm.stream([[4]] * 4, params, priority=[0, 3, 1, 2])
            if output.finished
        ]
        assert done == [0, 2, 3, 1]  # the first runs before the others are queued, and is first anyway
        talks = [[{"role": "user", "content": "hi"}]] * 4
        talked = llm.chat_stream(talks, params, priority=[0, 3, 1, 2])
        assert [prompt_index(output) for output in talked if output.finished] == [0, 2, 3, 1]
        with pytest.raises(ValueError, match="2 priorities for 4 prompts"):
            llm.chat(talks, params, priority=[1, 2])
        with pytest.raises(ValueError, match="2 priorities for 1 prompts"):
            llm.generate([[4]], params, priority=[1, 2])
        with pytest.raises(TypeError, match=r"prompt 1: priority must be a whole number, not 1\.5"):
            llm.generate([[4]] * 2, params, priority=[1, 1.5])  # type: ignore[list-item]


@pytest.mark.parametrize("policy", POLICIES)
def test_preempted_answers_are_given_once(policy: str) -> None:
    """Under page pressure every output extends the last one by a token, text and log-probabilities too."""
    engine = make_engine(FakeModel(num_blocks=9), admission="optimistic", scheduling_policy=policy)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=1)
    prompts = {f"r{i}": [4 + i, 7, 9] for i in range(6)}
    for name, prompt in prompts.items():
        engine.add_request(prompt, params, name)
    got: dict[str, tuple[int, ...]] = dict.fromkeys(prompts, ())
    while engine.has_unfinished:
        for output in engine.step():
            answer = output.outputs[0]
            assert answer.token_ids[:-1] == got[output.request_id]
            assert answer.logprobs is not None
            assert len(answer.logprobs) == len(answer.token_ids)
            got[output.request_id] = answer.token_ids
    assert engine.scheduler.preemptions > 0
    records = list(engine.stats.history)
    assert sum(record.num_tokens for record in records) == sum(n for r in records for _, n in r.scheduled)
    assert "preempted" in {why for record in records for why in record.not_scheduled.values()}
    assert {"pages", "preemption"} & {record.waiting_for for record in records}
    assert records[-1].preemptions == engine.scheduler.preemptions
    assert records[-1].free_blocks + records[-1].cached_blocks == 9
    assert {n: list(ids) for n, ids in got.items()} == {n: expected(p, params) for n, p in prompts.items()}


def test_abort_by_hand() -> None:
    engine = make_engine()
    engine.add_request([4], SamplingParams(max_tokens=50, ignore_eos=True), "a")
    engine.add_request([4], GREEDY, "b")
    engine.step()
    assert engine.abort("a")
    assert not engine.abort("a")
    assert not engine.abort("nobody")
    last = drain(engine)
    assert last["a"].outputs[0].finish_reason == "abort"
    assert len(last["a"].outputs[0].token_ids) == 1
    assert last["b"].outputs[0].finish_reason == "length"


# Text --------------------------------------------------------------------------------------------


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """`text` before the stop string that begins first in it."""
    hits = [(text.index(stop), stop) for stop in stops if stop in text]
    return (text[: min(hits)[0]], min(hits)[1]) if hits else (text, None)


def naive_answer(ids: list[int], stops: tuple[str, ...]) -> tuple[int, str, str | None]:
    """Decode everything again after every token: number of tokens until the stop, text, stop string."""
    for count in range(1, len(ids) + 1):
        detokenizer = TOKENIZER.detokenizer()
        text = "".join(map(detokenizer.push, ids[:count]))
        if count == len(ids):
            text += detokenizer.flush()
        text, stop = cut(text, stops)
        if stop is not None or count == len(ids):
            return count, text, stop
    raise AssertionError


STOP_IDS = [*range(258, VOCAB), *TOKENIZER.encode("é日xabEND")]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(STOP_IDS), min_size=1, max_size=30),
    st.lists(st.text("abENDéstop\n ", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_against_a_naive_oracle(ids: list[int], stops: list[str]) -> None:
    count, final, stopped_by = naive_answer(ids, tuple(stops))
    text = AnswerText(TOKENIZER.detokenizer(), tuple(stops))
    detokenizer, raw, shown = TOKENIZER.detokenizer(), "", [""]
    for token_id in ids[:count]:
        text.push(token_id)
        shown.append(text.visible)
        raw += detokenizer.push(token_id)
        parts = [s[:n] for s in stops for n in range(1, len(s)) if raw.endswith(s[:n])]
        if text.stopped_by is None:  # all that is final is shown, and nothing that may become a stop string
            assert text.visible == raw[: len(raw) - max(map(len, parts), default=0)]
    text.finish()
    shown.append(text.visible)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    assert (text.visible, text.stopped_by) == (final, stopped_by)


@pytest.mark.parametrize(
    "stops", [("a",), ("ab", "ba"), ("stop", "END"), ("日本",), ("é",), ("dab", "ca"), ("\n\n",)]
)
def test_stop_strings_in_the_engine(stops: tuple[str, ...]) -> None:
    """Tokens, text and reasons agree with a plain loop; pages are free; packed with others of other stops."""
    engine = make_engine(FakeModel(num_blocks=512))
    wanted = {}
    for n in range(12):
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop=stops)
        name = engine.add_request([5 + n, 6], params, f"{n}")
        wanted[name] = naive_answer(expected([5 + n, 6], params), stops)
    shown: dict[str, str] = dict.fromkeys(wanted, "")
    last = {}
    while engine.has_unfinished:
        for output in engine.step():
            answer = output.outputs[0]
            assert answer.text.startswith(shown[output.request_id]), "text was taken back"
            shown[output.request_id] = answer.text
            last[output.request_id] = output
    for name, (count, text, stop) in wanted.items():
        answer = last[name].outputs[0]
        assert (len(answer.token_ids), answer.text, answer.stop_reason) == (count, text, stop)
        assert answer.finish_reason == ("length" if stop is None else "stop")
    assert any(stop for _, _, stop in wanted.values()) or stops in {
        ("日本",),
        ("é",),
        ("\n\n",),
        ("dab", "ca"),
    }
    assert engine.scheduler.blocks.num_used == 0


def test_end_of_sequence_is_no_text() -> None:
    prompt = next([2, n, 3] for n in range(2, 300) if 0 in expected([2, n, 3], SamplingParams(40, 0.0)))
    engine = make_engine()
    engine.add_request(prompt, SamplingParams(40, 0.0), "eos")
    ids = expected(prompt, SamplingParams(40, 0.0))
    engine.add_request(prompt, SamplingParams(40, 0.0, stop_token_ids=(ids[0],)), "id")
    last = drain(engine)
    eos, by_id = last["eos"].outputs[0], last["id"].outputs[0]
    assert (eos.finish_reason, eos.stop_reason, list(eos.token_ids)) == ("stop", None, ids)
    assert eos.text == TOKENIZER.decode(ids[:-1])
    assert (by_id.finish_reason, by_id.stop_reason, by_id.token_ids) == ("stop", ids[0], (ids[0],))
    assert by_id.text == ""


def test_no_half_characters() -> None:
    """A model that says exactly this text, byte by byte."""
    wanted = "né 日本語 🙂!"
    ids = TOKENIZER.encode(wanted)

    class Says(FakeModel):
        def sample(self, logits: Any, plan: Any) -> Any:
            sampled = super().sample(logits, plan)
            sampled.token_ids[:] = [ids[i] for i in plan.output_indices]
            return sampled

    engine = make_engine(Says())
    engine.add_request([5], SamplingParams(max_tokens=len(ids), temperature=0.0), "a")
    engine.add_request([5], SamplingParams(max_tokens=2, temperature=0.0), "half")
    texts = []
    while engine.has_unfinished:
        for output in engine.step():
            if output.request_id == "a":
                texts.append(output.outputs[0].text)
            elif output.finished:
                assert output.outputs[0].text == "n\ufffd"  # the end came in the middle of a character
    assert texts[-1] == wanted
    assert all(wanted.startswith(text) for text in texts)
    assert "\ufffd" not in "".join(texts)


def test_a_scheduler_without_a_plan_is_an_error() -> None:
    """Unfinished requests and nothing to do would be a loop for ever: the engine ends instead."""
    engine = make_engine()
    engine.add_request([4], GREEDY)
    engine.scheduler.plan = lambda: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="1 requests are unfinished"):
        engine.step()


# LLM ---------------------------------------------------------------------------------------------


def test_generate_keeps_the_order(llm: LLM) -> None:
    prompts = ["a", [5, 6, 7], "a longer prompt", np.array([9, 9])]
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (9, 1, 4, 2)]
    results = llm.generate(prompts, params, use_tqdm=False)
    for prompt, own, result in zip(prompts, params, results, strict=True):
        ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else list(prompt)
        assert list(result.outputs[0].token_ids) == expected(ids, own)
        assert result.finished
    assert [len(r.outputs[0].token_ids) for r in llm.generate([3, 4], use_tqdm=False)] == [16]
    assert llm.generate([], use_tqdm=False) == []


def test_generate_starts_the_longest_answers_first() -> None:
    model = FakeModel()
    with LLM(model, tokenizer=TOKENIZER, block_size=4, max_num_seqs=1) as llm:
        params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (2, 5, 3, 5)]
        results = llm.generate([[10], [11], [12], [13]], params, priority=[0, 0, 0, 1], use_tqdm=False)
        prompts = [int(plan.token_ids[0]) for plan in model.plans if plan.positions[0] == 0]
    assert prompts == [11, 12, 10, 13]  # a priority goes before any length
    for first, own, result in zip((10, 11, 12, 13), params, results, strict=True):
        assert list(result.outputs[0].token_ids) == expected([first], own)


@pytest.mark.parametrize(
    ("params", "error", "told"),
    [
        ([GREEDY], ValueError, "1 sampling parameters for 2 prompts"),
        ([GREEDY, 3], TypeError, "prompt 1: .*int"),
    ],
)
def test_bad_params_of_generate(llm: LLM, params: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        llm.generate(["a", "b"], params)
    with pytest.raises(TypeError, match="dict"):
        llm.generate("a", {"max_tokens": 3})  # type: ignore[arg-type]
    assert not llm.engine.has_unfinished


def test_more_prompts_than_the_queue_holds() -> None:
    with LLM(FakeModel(), tokenizer=TOKENIZER, block_size=4, max_num_seqs=2, max_queue_len=3) as llm:
        results: list[RequestOutput] = []
        prompts = [[5, n] for n in range(40)]
        work = threading.Thread(
            target=lambda: results.extend(llm.generate(prompts, GREEDY, use_tqdm=False)), daemon=True
        )
        work.start()
        work.join(10)
        assert [list(r.outputs[0].token_ids) for r in results] == [
            expected([5, n], GREEDY) for n in range(40)
        ]


def test_stream_is_final_in_the_end(llm: LLM) -> None:
    prompts = [[7, n] for n in range(6)]
    final = llm.generate(prompts, GREEDY, use_tqdm=False)
    seen: dict[int, list[RequestOutput]] = {}
    order = []
    for output in llm.stream(prompts, GREEDY):
        seen.setdefault(prompt_index(output), []).append(output)
        order.append(prompt_index(output))
    for index, outputs in seen.items():
        texts = [o.outputs[0].text for o in outputs]
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].outputs == final[index].outputs
    assert sorted(order[:6]) == list(range(6)), "everybody is heard before anybody is heard twice"


def test_chat(llm: LLM) -> None:
    talk = [{"role": "user", "content": "hi"}]
    wanted = expected(TOKENIZER.encode("user: hi\nassistant:"), GREEDY)
    assert list(llm.chat(talk, GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == wanted
    assert len(llm.chat([talk, talk], GREEDY, use_tqdm=False)) == 2
    *_, last = llm.chat_stream(talk, GREEDY)
    assert list(last.outputs[0].token_ids) == wanted
    with pytest.raises(ValueError, match="non-empty"):
        llm.chat([])


def test_many_threads(llm: LLM) -> None:
    answers: dict[int, list[list[int]]] = {}

    def work(n: int) -> None:
        prompts = [[5 + n, k] for k in range(4)]
        if n % 2:
            results = llm.generate(prompts, GREEDY, use_tqdm=False)
        else:
            results = [o for o in llm.stream(prompts, GREEDY) if o.finished]
            results.sort(key=prompt_index)
        answers[n] = [list(r.outputs[0].token_ids) for r in results]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for n in range(8):
        assert answers[n] == [expected([5 + n, k], GREEDY) for k in range(4)]
    assert not llm.engine.has_unfinished


def test_abort_ends_the_caller(llm: LLM) -> None:
    forever = SamplingParams(max_tokens=900, ignore_eos=True)
    stream = llm.stream([5], forever)
    name = next(stream).request_id
    assert llm.abort(name)
    *_, last = stream
    assert last.outputs[0].finish_reason == "abort"
    assert not llm.abort(name)


@pytest.mark.parametrize("how", ["close", "del", "del unstarted", "break", "cycle"])
def test_dropped_stream_ends_its_requests(how: str) -> None:
    # At 5 ms a step the requests themselves would take longer than `eventually` waits.
    model = FakeModel(num_blocks=1024, delay=0.005)
    with LLM(model, tokenizer=TOKENIZER, block_size=4, max_num_batched_tokens=32, max_num_seqs=8) as llm:
        forever = SamplingParams(max_tokens=900, ignore_eos=True)
        stream = llm.stream([[5], [6]], forever)
        if how != "del unstarted":
            next(stream)
        if how == "close":
            stream.close()  # type: ignore[attr-defined]
            assert not llm.engine.has_unfinished
        elif how == "break":
            for _ in llm.stream([7], forever):
                break
        elif how == "cycle":
            stream.me = stream  # type: ignore[attr-defined]
        del stream
        gc.collect()
        eventually(lambda: not llm.engine.has_unfinished)
        assert llm.engine.scheduler.blocks.num_used == 0
        assert llm.generate([5], GREEDY, use_tqdm=False)[0].finished


def test_rollback_keeps_the_answers() -> None:
    """An interruption before, in or after the forward, at any step: the step is done again, answers are the
    same."""

    class Interrupted(FakeModel):
        at: tuple[str, int] = ("", 0)

        def _maybe_fail(self, phase: str) -> None:
            if (phase, len(self.plans)) == self.at:
                self.at = ("", 0)
                raise KeyboardInterrupt

    for phase in ("stage", "forward", "sample"):
        for step in (1, 2, 3, 6):
            model = Interrupted()
            model.at = (phase, step)
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
                    if phase == "forward":
                        engine.abort("12")
                engine.scheduler.check()
            assert interruptions == 1
            for n in (3, 1):
                assert list(last[str(n)].outputs[0].token_ids) == expected([5] * n, GREEDY)
            assert engine.scheduler.blocks.num_used == 0


def test_fake_sampling_is_what_the_oracle_says() -> None:
    logits = next_logits([5], [0])
    assert draw(logits, 0.0, 0, 0) == int(np.argmax(logits))
    assert len({draw(logits, 1.0, seed, 0) for seed in range(50)}) > 10


@pytest.mark.parametrize("overlap", [False, True])
def test_progress_tells_each_steps_tokens_in_one_call(overlap: bool) -> None:
    """Ids of all that have new tokens, once a step and before outputs; the end without a token is none."""
    heard: list[Any] = []

    class Both:
        def put(self, output: Any) -> None:
            heard.append(output)

        def progress(self, names: list[str]) -> None:
            heard.append(names)

    engine, both = make_engine(overlap=overlap), Both()
    for name, tokens, n in (("a", 5, 1), ("b", 9, 1), ("c", 4, 3), ("d", 200, 1)):
        params = SamplingParams(max_tokens=tokens, n=n, seed=1, ignore_eos=True)
        request = engine.make_request([3, 4], params, name)
        engine.submit(request, both, final_only=True, progress=both.progress)  # type: ignore[arg-type]
    engine.submit(engine.make_request([5], GREEDY, "silent"), None)
    while len(heard) < 12:
        engine.step()
    engine.abort("d")
    names = [one for one in heard if isinstance(one, list)]
    outputs = {one.request_id: one for one in heard if isinstance(one, RequestOutput)}
    assert all(len(set(one)) == len(one) for one in names)
    assert set(outputs) == {"a", "b", "c", "d"}
    assert all(one.finished for one in outputs.values())
    counts = {name: sum(name in one for one in names) for name in "abd"}
    assert counts == {name: len(outputs[name].outputs[0].token_ids) for name in "abd"}
    assert (counts["a"], counts["b"]) == (5, 9)
    assert sum("c" in one for one in names) >= 4  # any of its samples
    assert heard.index(outputs["a"]) > max(i for i, one in enumerate(heard) if one in names and "a" in one)
    assert all("silent" not in one for one in names)
    engine.close()
