"""n samples of one prompt: read once, pages shared, one copied; each as a request of its own would be."""

from __future__ import annotations

import dataclasses

import pytest
from fake_model import FakeModel, expected
from test_admission import MODES, Bench
from test_engine import TOKENIZER, cut, drain, make_engine, naive_answer
from test_scheduler import prompt_of

from sharp.door import sample_seed
from sharp.llm import LLM
from sharp.request import RequestTooLarge, SamplingParams, Status

HOT = SamplingParams(max_tokens=9, temperature=1.0, top_k=60, top_p=0.9, seed=5, n=4, ignore_eos=True)
ALONE = dataclasses.replace(HOT, n=1)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 14])
def test_as_n_requests_of_these_seeds(length: int, mode: str, caching: bool) -> None:
    """Around the page size of 4; the prompt is computed once, its last token once more a sample."""
    prompt = prompt_of(length)
    engine = make_engine(FakeModel(), admission=mode, prefix_caching=caching)
    engine.add_request(prompt, HOT, "a")
    output = drain(engine)["a"]
    seeds = [sample_seed(5, index) for index in range(4)]
    assert len(set(seeds)) == 4
    assert seeds[0] == 5
    ids = [list(answer.token_ids) for answer in output.outputs]
    assert ids == [expected(prompt, dataclasses.replace(ALONE, seed=seed)) for seed in seeds]
    assert [answer.index for answer in output.outputs] == [0, 1, 2, 3]
    assert engine.stats.tokens == length + 3 + 4 * 8
    copies = sum(len(plan.page_copies) for plan in engine.model.plans)  # type: ignore[attr-defined]
    assert copies == (0 if (length - 1) % 4 == 0 else 3)
    separate = make_engine()
    for seed in seeds:
        separate.add_request(prompt, dataclasses.replace(ALONE, seed=seed), str(seed))
    last = drain(separate)
    assert ids == [list(last[str(seed)].outputs[0].token_ids) for seed in seeds]


def test_pages_are_shared_and_given_back() -> None:
    bench = Bench(num_blocks=20, max_num_seqs=3)
    first = bench.ask("a", prompt_of(10), n=3, max_tokens=7, temperature=1.0)
    bench.step()
    samples = bench.seen
    assert [item.status for item in samples] == [Status.RUNNING] * 3
    assert len({tuple(item.block_ids[:2]) for item in samples}) == 1
    assert len({page for item in samples for page in item.block_ids}) == 2 + 3 * 2  # 16 stored tokens each
    assert len(bench.scheduler.pages.forks.copies) == 3 - 1
    bench.step()
    assert bench.scheduler.pages.forks.copies == {}
    assert first.samples == []
    bench.finish()


def test_outputs_come_together() -> None:
    """One output a step for all samples; finished when the last of them is."""
    wanted = [
        naive_answer(expected([9, 9], dataclasses.replace(ALONE, seed=sample_seed(5, i))), ("a",))
        for i in range(4)
    ]
    assert len({count for count, _, _ in wanted}) > 1  # they end in different steps
    engine = make_engine(FakeModel(num_blocks=128))
    engine.add_request([9, 9], dataclasses.replace(HOT, stop="a"), "x")
    outputs = []
    while engine.has_unfinished:
        step = engine.step()
        assert len(step) <= 1
        outputs += step
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for answer, (count, text, stop) in zip(outputs[-1].outputs, wanted, strict=True):
        assert (len(answer.token_ids), answer.text, answer.stop_reason) == (count, text, stop)
        assert cut(text, ("a",)) == (text, None)
    for output in outputs:
        assert len(output.outputs) == 4


def test_one_token_each() -> None:
    """The first sample ends in the step that the others fork in; their pages outlive it."""
    for length in (6, 9):
        engine = make_engine(FakeModel(num_blocks=8), prefix_caching=False)
        prompt = prompt_of(length)
        engine.add_request(prompt, dataclasses.replace(HOT, max_tokens=1), "a")
        engine.step()
        engine.add_request(prompt_of(4, 3), dataclasses.replace(ALONE, max_tokens=2), "other")
        output = drain(engine)["a"]
        seeds = [sample_seed(5, index) for index in range(4)]
        one = dataclasses.replace(ALONE, max_tokens=1)
        assert [list(answer.token_ids) for answer in output.outputs] == [
            expected(prompt, dataclasses.replace(one, seed=seed)) for seed in seeds
        ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moment", ["waiting", "reading", "forked", "copied"])
def test_cancel_and_preempt_at_any_point(moment: str, mode: str) -> None:
    for who in range(3):
        for what in ("cancel", "preempt"):
            bench = Bench(num_blocks=24, admission=mode, max_num_batched_tokens=8)
            other = bench.ask("other", prompt_of(5, 8), max_tokens=12)
            bench.ask("a", prompt_of(14), n=3, max_tokens=6, temperature=1.0)
            steps = {"waiting": 0, "reading": 1, "forked": 3, "copied": 4}[moment]
            for _ in range(steps):
                bench.step()
            item = bench.seen[1 + who]
            forked = moment in ("forked", "copied")
            assert item.status is (
                Status.RUNNING if forked or (moment == "reading" and who == 0) else Status.WAITING
            )
            if what == "cancel":
                bench.scheduler.finish(item, "abort")
                gone = 3 if who == 0 and not forked else 1  # before the fork the first takes the others along
                assert sum(one.finish_reason == "abort" for one in bench.seen) == gone
            elif item.status is Status.RUNNING:
                bench.scheduler.preempt(item)
            bench.scheduler.check()
            bench.finish()
            assert other.finish_reason == "length"


def test_a_copy_is_made_again_after_a_rollback() -> None:
    """The first sample has ended, its page may be somebody else's soon; the step with the copy is undone."""
    bench = Bench(num_blocks=8, prefix_caching=False)
    bench.ask("a", prompt_of(6), n=2, max_tokens=4, temperature=1.0)
    bench.step()
    bench.scheduler.finish(bench.seen[0], "abort")
    bench.add("new", 15, max_tokens=2)
    for _ in range(2):
        plan = bench.plan()
        assert plan is not None
        assert len(plan.page_copies) == 1
        bench.model.forward(plan)
        bench.scheduler.rollback(plan)
    bench.finish()


def test_cancelled_samples_leave_nothing() -> None:
    """Right after they forked, with their copies still to be made, and no step to come."""
    bench = Bench(num_blocks=8, prefix_caching=False)
    bench.ask("a", prompt_of(6), n=2)
    bench.step()
    for item in bench.seen:
        bench.scheduler.finish(item, "abort")
    bench.scheduler.check()
    assert bench.scheduler.blocks.num_free == 8
    assert bench.plan() is None


def test_seats_are_kept_for_samples() -> None:
    """Four seats, three of them for samples to come: what arrives meanwhile gets one and not more."""
    bench = Bench(num_blocks=40, max_num_seqs=4, max_num_batched_tokens=4, max_bypass=8)
    bench.ask("a", prompt_of(10), n=3)
    bench.step()
    for i in range(3):
        bench.add(f"r{i}", 2)
    bench.finish()
    most = max(plan.num_seqs for plan in bench.model.plans)
    assert most <= 4


def test_too_many_samples() -> None:
    engine = make_engine(FakeModel(num_blocks=8), max_num_seqs=4)
    with pytest.raises(RequestTooLarge, match=r"n is 5, but max_num_seqs is 4.*lower n"):
        engine.add_request([4], dataclasses.replace(HOT, n=5))
    told = r"4 samples together need 13 KV pages \(14 tokens each\), but there are 8 in all.*or n"
    with pytest.raises(RequestTooLarge, match=told):
        engine.add_request([4] * 5, HOT)
    engine.add_request([4], dataclasses.replace(ALONE, seed=1), "a#1")
    with pytest.raises(ValueError, match="'a#1' is in use"):
        engine.add_request([4], dataclasses.replace(HOT, n=2, max_tokens=4), "a")
    drain(engine)


def test_samples_through_the_front_door() -> None:
    with LLM(FakeModel(num_blocks=256), tokenizer=TOKENIZER, block_size=4, max_num_seqs=8) as llm:
        outputs = llm.generate(["hello", "you"], HOT, use_tqdm=False)
        for output, prompt in zip(outputs, ("hello", "you"), strict=True):
            for index, answer in enumerate(output.outputs):
                alone = dataclasses.replace(ALONE, seed=sample_seed(5, index))
                assert list(answer.token_ids) == expected(TOKENIZER.encode(prompt), alone)
        stream = llm.stream([5], dataclasses.replace(HOT, max_tokens=200))
        assert llm.abort(next(stream).request_id)
        *_, last = stream
        assert {answer.finish_reason for answer in last.outputs} == {"abort"}
        assert llm.engine.scheduler.blocks.num_used == 0
