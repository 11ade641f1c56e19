"""The scheduler with a fake model: what it plans is exact, fair and complete, whatever arrives when."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_model import EOS, FakeModel, engine_config, expected
from hypothesis import given, settings
from hypothesis import strategies as st

from sharp.plan import BatchPlan, SampleOutput
from sharp.request import QueueFull, Request, RequestTooLarge, SamplingParams, Status
from sharp.scheduler import Scheduler


def request(name: str, prompt: list[int], **params: Any) -> Request:
    own = SamplingParams(**{"max_tokens": 5, "temperature": 0.0, "ignore_eos": True, **params})
    return Request(name, None, prompt, own, seed=len(prompt))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(2, 300, length).tolist()


class Harness:
    """A scheduler and a model, and after every step everything that must hold whatever was asked."""

    def __init__(self, model: FakeModel | None = None, max_model_len: int = 4096, **options: Any) -> None:
        self.model = model or FakeModel()
        self.scheduler = Scheduler(
            engine_config(block_size=self.model.block_size, **options),
            self.model.num_blocks,
            max_model_len,
            (EOS,),
        )
        self.computed: dict[str, int] = {}  # tokens each request has had in plans, counted independently
        self.seen: list[Request] = []
        self.corrupt: Callable[[BatchPlan], BatchPlan] = lambda plan: plan

    def add(self, *requests: Request) -> None:
        for item in requests:
            self.scheduler.add(item)
            self.seen.append(item)

    def step(self) -> bool:
        """One step; False if there was nothing to do."""
        scheduler, config = self.scheduler, self.scheduler.config
        decoding = {
            r.request_id
            for r in scheduler.running
            if r.output_token_ids and r.num_computed_tokens < r.num_tokens
        }
        prefilling = [r.request_id for r in scheduler.running if r.request_id not in decoding]
        plan = scheduler.plan()
        scheduler.check()
        if plan is None:
            assert not scheduler.running, "running requests, but no plan"
            assert not scheduler.waiting, "waiting requests, but no plan"
            return False
        plan.check(self.model.block_size)
        by_id = {r.request_id: r for r in scheduler.running}
        lens = np.diff(plan.cu_seqlens_q).tolist()
        assert 1 <= plan.num_tokens <= config.max_num_batched_tokens
        assert len(scheduler.running) <= config.max_num_seqs
        assert decoding <= set(plan.request_ids), "a running sequence did not decode"
        new = [name for name in plan.request_ids if name not in decoding]
        admitted = [r.request_id for r in scheduler.running if r.request_id not in decoding | set(prefilling)]
        order = [*prefilling, *admitted]
        assert sorted(new, key=order.index) == order[: len(new)], (
            "prompts are not served in the order of arrival"
        )
        for seq, (name, count) in enumerate(zip(plan.request_ids, lens, strict=True)):
            own = by_id[name]
            first = int(plan.positions[plan.cu_seqlens_q[seq]])
            start = self.computed.get(name, own.num_cached_tokens)
            assert first == start, "a token was skipped or computed twice"
            assert own.num_cached_tokens < len(own.prompt_token_ids)
            assert own.num_cached_tokens % config.block_size == 0
            self.computed[name] = first + count
            assert own.num_computed_tokens == first + count
            if name in decoding:
                assert count == 1
            assert count <= (config.long_prefill_token_threshold or count)
            pages = plan.block_table[seq]
            assert set(pages[pages >= 0].tolist()) <= set(own.block_ids)
            complete = first + count == own.num_tokens
            assert complete == (plan.cu_seqlens_q[seq + 1] - 1 in plan.logits_rows)
        batch = self.model.stage(self.corrupt(plan))
        scheduler.commit(plan, self.model.sample(self.model.forward(batch), batch))
        scheduler.check()
        return True

    def finish(self, limit: int = 10_000) -> None:
        steps = 0
        while self.step():
            steps += 1
            assert steps < limit, "no end in sight"
        assert self.scheduler.blocks.num_available == self.model.num_blocks
        for item in self.seen:
            assert item.status is Status.FINISHED
            if item.finish_reason != "abort":
                self.check_answer(item)

    def check_answer(self, item: Request) -> None:
        wanted = expected(item.prompt_token_ids, item.params, item.seed, self.scheduler.max_model_len)
        assert item.output_token_ids == wanted, item.request_id


def test_one_request() -> None:
    harness = Harness()
    item = request("a", [5, 6, 7])
    harness.add(item)
    harness.finish()
    assert len(item.output_token_ids) == 5
    assert item.finish_reason == "length"
    assert harness.scheduler.step == 5


def test_several_prompts_share_one_step() -> None:
    harness = Harness()
    harness.add(request("a", prompt_of(3)), request("b", prompt_of(9)), request("c", prompt_of(1)))
    harness.step()
    plan = harness.model.plans[0]
    assert plan.request_ids == ("c", "a", "b")  # the one-token sequence first, then the order of arrival
    assert (plan.num_tokens, plan.num_decodes, len(plan.logits_rows)) == (13, 1, 3)
    assert plan.padded_tokens == 27
    harness.step()
    assert harness.model.plans[1].num_decodes == 3
    harness.finish()


def test_decodes_and_chunks_share_a_step() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add(request("short", prompt_of(4), max_tokens=8))
    harness.step()
    harness.add(request("long", prompt_of(20)))
    harness.step()
    mixed = harness.model.plans[1]
    assert mixed.request_ids == ("short", "long")
    assert np.diff(mixed.cu_seqlens_q).tolist() == [1, 7]
    assert mixed.logits_rows.tolist() == [0]  # the long prompt is not complete yet
    harness.finish()


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_prompt_cut_anywhere(cut: int) -> None:
    """Every chunk length gives the ids of the whole prompt, alone and beside a stranger."""
    for strangers in ((), (request("s", prompt_of(13), max_tokens=9),)):
        harness = Harness(long_prefill_token_threshold=cut)
        harness.add(request("a", prompt_of(23)), *strangers)
        harness.finish()


def test_packed_equals_alone() -> None:
    """Greedy and sampled answers of a ragged batch are those of one by one (and of the oracle)."""
    items = [
        request(f"r{i}", prompt_of(n), temperature=t, max_tokens=m, top_k=k, top_p=p)
        for i, (n, t, m, k, p) in enumerate(
            [
                (1, 0, 3, 9, 0.5),
                (30, 1.0, 9, 4, 1.0),
                (7, 0.7, 1, None, 1.0),
                (40, 0, 12, 0, 1.0),
                (2, 1.3, 20, 0, 0.4),
                (5, 0, 2, 3, 0.9),
                (11, 1.1, 15, 30, 0.7),
            ]
        )
    ]
    packed = Harness(max_num_batched_tokens=16)
    packed.add(*items)
    packed.finish()
    for item in items:
        alone = Harness()
        copy = Request(item.request_id, None, item.prompt_token_ids, item.params, item.seed)
        alone.add(copy)
        alone.finish()
        assert copy.output_token_ids == item.output_token_ids


# The end of a request ----------------------------------------------------------------------------


def test_finish_reasons() -> None:
    wanted = expected([9, 9], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    harness = Harness()
    by_id = request("stop id", [9, 9], max_tokens=4, stop_token_ids=(wanted[2],))
    harness.add(by_id, request("length", [9, 9], max_tokens=4))
    harness.finish()
    first = wanted.index(wanted[2])
    assert by_id.output_token_ids == wanted[: first + 1]
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", wanted[2])


def test_eos_and_ignore_eos() -> None:
    """A prompt whose greedy answer holds the end-of-sequence id early: found by looking."""
    prompt = next(
        p for p in ([2, n, m] for n in range(2, 300) for m in (2, 3)) if expected(p, GREEDY_60)[-1] == EOS
    )
    harness = Harness()
    obeys, ignores = (
        request("a", prompt, max_tokens=60, ignore_eos=False),
        request("b", prompt, max_tokens=60),
    )
    harness.add(obeys, ignores)
    harness.finish()
    assert (obeys.finish_reason, obeys.stop_reason, obeys.output_token_ids[-1]) == ("stop", None, EOS)
    assert EOS not in obeys.output_token_ids[:-1]
    assert len(ignores.output_token_ids) == 60
    assert ignores.output_token_ids[: len(obeys.output_token_ids)] == obeys.output_token_ids


GREEDY_60 = SamplingParams(max_tokens=60, temperature=0.0)


def test_max_model_len() -> None:
    harness = Harness(max_model_len=10)
    item = request("a", prompt_of(7), max_tokens=100)
    harness.add(item)
    harness.finish()
    assert len(item.output_token_ids) == 3
    assert item.finish_reason == "length"
    with pytest.raises(RequestTooLarge, match=r"10 tokens.*max_model_len 10"):
        harness.scheduler.add(request("b", prompt_of(10)))
    longest = request("c", prompt_of(9), max_tokens=100)
    harness.add(longest)
    harness.finish()
    assert len(longest.output_token_ids) == 1


# Admission ---------------------------------------------------------------------------------------


def test_what_can_never_fit_is_refused() -> None:
    harness = Harness(FakeModel(num_blocks=3))
    with pytest.raises(RequestTooLarge, match=r"4 KV pages.*3 in all; lower max_tokens"):
        harness.scheduler.add(request("a", prompt_of(9), max_tokens=5))  # 13 stored tokens
    assert not harness.scheduler.waiting
    harness.add(request("b", prompt_of(9), max_tokens=4))  # 12 stored tokens: exactly three pages
    harness.finish()


def test_queue_is_bounded() -> None:
    harness = Harness(max_queue_len=2)
    harness.add(request("a", [3]), request("b", [3]))
    with pytest.raises(QueueFull, match=r"2 .*max_queue_len 2") as caught:
        harness.scheduler.add(request("c", [3]))
    assert (caught.value.length, caught.value.limit) == (2, 2)
    harness.step()
    harness.add(request("c", [3]))
    harness.finish()


def test_big_head_waits_and_is_served() -> None:
    """First come, first served: the head that does not fit waits for pages, those behind it wait for it."""
    harness = Harness(FakeModel(num_blocks=4))
    harness.add(request("a", prompt_of(8), max_tokens=4), request("big", prompt_of(12), max_tokens=5))
    harness.add(request("small", [4], max_tokens=2))
    harness.step()
    assert [r.request_id for r in harness.scheduler.running] == ["a"]
    harness.finish()
    order = [name for plan in harness.model.plans for name in plan.request_ids]
    assert order.index("big") < order.index("small")


def test_tiny_budget_completes() -> None:
    """16 tokens a step, 3 pages: everything still ends, one after the other if it must."""
    harness = Harness(FakeModel(num_blocks=3, block_size=4), max_num_batched_tokens=8, max_num_seqs=8)
    harness.add(*(request(f"r{i}", prompt_of(1 + i % 9), max_tokens=1 + i % 4) for i in range(40)))
    harness.finish()


def test_a_stream_of_prompts_never_stalls_a_decode() -> None:
    harness = Harness(max_num_batched_tokens=8, max_num_seqs=4)
    harness.add(request("answer", [5], max_tokens=30))
    for i in range(30):
        harness.add(request(f"p{i}", prompt_of(11), max_tokens=1))
        harness.step()
    answer = harness.seen[0]
    assert len(answer.output_token_ids) == 30  # one token in every step since the first
    harness.finish()


# Aborts, rollbacks, wrong use -------------------------------------------------------------------------------


def test_abort_in_every_state() -> None:
    harness = Harness(max_num_batched_tokens=8, max_num_seqs=2)
    waiting, chunked, decoding = (
        request("w", [3]),
        request("c", prompt_of(30)),
        request("d", [3], max_tokens=50),
    )
    harness.add(decoding)
    harness.step()
    harness.add(chunked, waiting)
    harness.step()
    assert [r.status.value for r in (waiting, chunked, decoding)] == ["waiting", "running", "running"]
    for item in (waiting, chunked, decoding):
        harness.scheduler.finish(item, "abort")
        harness.scheduler.check()
        assert item.status is Status.FINISHED
        assert item.block_ids == []
    with pytest.raises(ValueError, match="finished already"):
        harness.scheduler.finish(waiting, "abort")
    harness.finish()


def test_abort_while_its_step_runs() -> None:
    """Its sampled token is dropped; a newcomer of the same name is not mistaken for it."""
    harness = Harness()
    first, other = request("a", [3, 4]), request("b", [5])
    harness.add(first, other)
    plan = harness.scheduler.plan()
    assert plan is not None
    harness.scheduler.finish(first, "abort")
    second = request("a", [8, 9, 10])
    harness.add(second)
    sampled = harness.model.sample(harness.model.forward(harness.model.stage(plan)), plan)
    assert harness.scheduler.commit(plan, sampled) == [other]
    assert first.output_token_ids == second.output_token_ids == []
    harness.computed = {"b": 1}
    harness.finish()


def test_rollback_plans_the_same_again() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add(request("a", [3, 4, 5]), request("b", prompt_of(21)))
    for _ in range(4):
        plan = harness.scheduler.plan()
        assert plan is not None
        harness.model.forward(plan)  # half of the step has happened
        harness.scheduler.rollback(plan)
        harness.scheduler.check()
        again = harness.scheduler.plan()
        assert again is not None
        for item in dataclasses.fields(BatchPlan):
            if item.name != "step":
                assert np.array_equal(getattr(plan, item.name), getattr(again, item.name)), item.name
        harness.scheduler.rollback(again)
        harness.step()
    harness.finish()


def test_wrong_use() -> None:
    """What is refused changes nothing: the plan can still be committed."""
    harness = Harness()
    harness.add(request("a", [3]))
    plan = harness.scheduler.plan()
    assert plan is not None
    behind = harness.scheduler.plan()
    assert behind is not None
    with pytest.raises(RuntimeError, match="steps 1 and 2 are neither committed nor rolled back"):
        harness.scheduler.plan()
    nothing, one = SampleOutput(np.zeros(0, np.int32), ()), SampleOutput(np.array([7], np.int32), (None,))
    with pytest.raises(ValueError, match="0 tokens sampled for 1"):
        harness.scheduler.commit(plan, nothing)
    with pytest.raises(ValueError, match="step 2 is not the oldest one in flight"):
        harness.scheduler.commit(behind, one)
    with pytest.raises(ValueError, match="step 1 is not the newest one in flight"):
        harness.scheduler.rollback(plan)
    harness.scheduler.check()
    harness.scheduler.rollback(behind)
    harness.scheduler.commit(plan, one)
    for call in (lambda: harness.scheduler.commit(plan, one), lambda: harness.scheduler.rollback(plan)):
        with pytest.raises(ValueError, match="step 1 is not the one in flight"):
            call()


def test_no_token_sampled() -> None:
    harness = Harness()
    harness.add(request("a", [3]))
    plan = harness.scheduler.plan()
    assert plan is not None
    with pytest.raises(FloatingPointError, match="request a"):
        harness.scheduler.commit(plan, SampleOutput(np.array([-1], np.int32), (None,)))
    assert harness.scheduler.in_flight == (plan,)  # nothing has changed
    harness.scheduler.rollback(plan)
    harness.finish()


# Random histories --------------------------------------------------------------------------------

EVENT = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 12)),
    st.tuples(st.just("abort"), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 3), st.just(0)),
    st.tuples(st.just("interrupt"), st.just(0), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(EVENT, max_size=40),
    budget=st.integers(1, 40),
    seqs=st.integers(1, 8),
    blocks=st.integers(3, 30),
    block_size=st.sampled_from([1, 2, 4, 16]),
    threshold=st.sampled_from([None, 1, 3, 7]),
)
def test_random_histories(
    events: list[tuple[str, int, int]],
    budget: int,
    seqs: int,
    blocks: int,
    block_size: int,
    threshold: int | None,
) -> None:
    """Arrivals, aborts and interruptions at any time: all invariants, and every answer as if it were
    alone."""
    harness = Harness(
        FakeModel(num_blocks=blocks, block_size=block_size),
        max_model_len=60,
        max_num_batched_tokens=budget,
        max_num_seqs=min(seqs, budget),
        long_prefill_token_threshold=threshold,
        max_queue_len=5,
    )
    for number, (kind, size, tokens) in enumerate(events):
        if kind == "add":
            item = request(
                f"r{number}", prompt_of(size, number), max_tokens=tokens, temperature=float(number % 2),
                top_k=(None, 5, 40)[number % 3], top_p=(1.0, 0.6)[number // 2 % 2],
            )  # fmt: skip
            try:
                harness.add(item)
            except RequestTooLarge:
                assert size + tokens - 1 > blocks * block_size
            except QueueFull:
                assert len(harness.scheduler.waiting) == 5
        elif kind == "abort":
            live = harness.scheduler.requests()
            if live:
                harness.scheduler.finish(live[size % len(live)], "abort")
        elif kind == "interrupt":
            plan = harness.scheduler.plan()
            if plan is not None:
                harness.model.forward(plan)
                harness.scheduler.rollback(plan)
        else:
            for _ in range(size):
                harness.step()
        harness.scheduler.check()
    harness.finish()


# Mutants: the harness and the fake model must see each of these ---------------------------------------------


def shift(name: str, amount: int, decodes_only: bool = False) -> Callable[[BatchPlan], BatchPlan]:
    def corrupt(plan: BatchPlan) -> BatchPlan:
        array = getattr(plan, name).copy()
        array[: plan.num_decodes if decodes_only else None] += amount
        return dataclasses.replace(plan, **{name: array})

    return corrupt


def other_pages(plan: BatchPlan) -> BatchPlan:
    return dataclasses.replace(plan, block_table=plan.block_table[::-1].copy())


def last_slot_of_neighbour(plan: BatchPlan) -> BatchPlan:
    slots = plan.slot_mapping.copy()
    slots[-1] = slots[0]
    return dataclasses.replace(plan, slot_mapping=slots)


MUTANT_PLANS = {
    "positions one too far": shift("positions", 1),
    "decode positions one short": shift("positions", -1, decodes_only=True),
    "slots one too far": shift("slot_mapping", 1),
    "contexts one short": shift("context_lens", -1),
    "contexts one too long": shift("context_lens", 1),
    "output index off": shift("output_indices", 1),
    "pages of a neighbour": other_pages,
    "a neighbour's slot overwritten": last_slot_of_neighbour,
    "wrong tokens": shift("token_ids", 1),
}


def mixed_work(harness: Harness) -> None:
    harness.add(*(request(f"r{i}", prompt_of(n), temperature=1.0) for i, n in enumerate((3, 17, 1, 6))))
    harness.finish()


@pytest.mark.parametrize("mutant", MUTANT_PLANS)
def test_wrong_plans_change_the_answers(mutant: str) -> None:
    """Without any check of the plan itself, the fake model's answers alone give each of these away."""
    mixed_work(Harness(FakeModel(check_plans=False)))
    harness = Harness(FakeModel(check_plans=False))
    harness.corrupt = MUTANT_PLANS[mutant]
    with pytest.raises((AssertionError, IndexError)):
        mixed_work(harness)


class SkipsAToken(Scheduler):
    def plan(self) -> BatchPlan | None:
        plan = super().plan()
        for item in self.running:
            if item.num_computed_tokens == 6:
                self.table.computed[item.row] += 1
        return plan


class FreesTooEarly(Scheduler):
    def commit(self, plan: BatchPlan, sampled: SampleOutput) -> list[Request]:
        updated = super().commit(plan, sampled)
        for item in self.running:
            if len(item.block_ids) > 2:
                self.blocks.free(item.block_ids[-1:])
                item.block_ids.pop()
                self.table.num_pages[item.row] -= 1
                self.table.pages[item.row, len(item.block_ids)] = -1
        return updated


class ForgetsPages(Scheduler):
    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        request.block_ids = request.block_ids[1:]
        super().finish(request, reason, stop_reason)


class OneTokenTooMany(Scheduler):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        worst = self.sizes.worst_tokens
        self.sizes.worst_tokens = lambda request: worst(request) + 1  # type: ignore[method-assign]


class StallsDecodes(Scheduler):
    def plan(self) -> BatchPlan | None:
        self.policy.prompts_first = bool(self.waiting)
        return super().plan()


@pytest.mark.parametrize("mutant", [SkipsAToken, FreesTooEarly, ForgetsPages, OneTokenTooMany, StallsDecodes])
def test_wrong_schedulers_are_seen(mutant: type[Scheduler]) -> None:
    def work(kind: type[Scheduler]) -> None:
        harness = Harness(max_num_batched_tokens=8, max_num_seqs=3)
        harness.scheduler = kind(harness.scheduler.config, harness.model.num_blocks, 4096, (EOS,))
        harness.add(request("first", [9], max_tokens=12))
        harness.step()
        harness.add(*(request(f"r{i}", prompt_of(20 + i), max_tokens=3) for i in range(4)))
        harness.finish()

    work(Scheduler)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        work(mutant)
