"""Admission, preemption and policies with the fake model: pages hold, nobody starves, answers stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from fake_model import EOS, FakeModel, engine_config, expected
from test_scheduler import prompt_of, request

from sharp.door import Door
from sharp.plan import BatchPlan
from sharp.policies import POLICIES, Blocking, PriorityPolicy, SchedulingPolicy, ShortestPromptFirst
from sharp.request import Request, SamplingParams, Status
from sharp.scheduler import Scheduler
from sharp.waiting import LOOK_AHEAD

MODES = ("reserve", "optimistic")


class Bench:
    """A scheduler over a fake model; `step` checks what must hold in every mode under every policy."""

    def __init__(self, num_blocks: int = 8, block_size: int = 4, **options: Any) -> None:
        self.model = FakeModel(num_blocks=num_blocks, block_size=block_size)
        config = engine_config(block_size=block_size, **options)
        self.scheduler = Scheduler(config, num_blocks, 4096, (EOS,))
        self.seen: list[Request] = []

    def add(self, name: str, length: int, max_tokens: int = 5, priority: int = 0, **params: Any) -> Request:
        return self.ask(name, prompt_of(length, len(self.seen)), priority, max_tokens=max_tokens, **params)

    def ask(self, name: str, prompt: list[int], priority: int = 0, **params: Any) -> Request:
        """Queue a prompt of one's own; the first of its samples."""
        own = SamplingParams(**{"max_tokens": 5, "temperature": 0.0, "ignore_eos": True, **params})
        item = Door(None, 300, 0).make_request(prompt, own, name, priority)
        self.scheduler.add(item)
        self.seen += [item, *item.samples]
        return item

    def plan(self) -> BatchPlan | None:
        scheduler, config = self.scheduler, self.scheduler.config
        plan = scheduler.plan()
        scheduler.check()
        blocks = scheduler.blocks
        assert blocks.num_free + blocks.num_used + blocks.num_cached == self.model.num_blocks
        if plan is None:
            assert not scheduler.requests(), "unfinished requests, but no plan"
            return None
        assert 1 <= plan.num_tokens <= config.max_num_batched_tokens
        by_id = {item.request_id: item for item in scheduler.running}
        for seq, name in enumerate(plan.request_ids):  # pages of a plan are those of its own request
            pages = plan.block_table[seq]
            assert set(pages[pages >= 0].tolist()) <= set(by_id[name].block_ids)
        planned = set(plan.request_ids)
        for item in scheduler.running:
            why = scheduler.not_scheduled.get(item.request_id)
            assert (why is None) == (item.request_id in planned), f"{item.request_id}: {why}"
            if why is not None and not scheduler.policy.prompts_first:
                first = item.num_computed_tokens < len(item.prompt_token_ids) or item.num_preemptions
                assert first, "a decode is stalled"
        assert (scheduler.waiting_for is not None) >= bool(scheduler.waiting)
        return plan

    def run(self, plan: BatchPlan) -> None:
        batch = self.model.stage(plan)
        self.scheduler.commit(plan, self.model.sample(self.model.forward(batch), batch))
        self.scheduler.check()

    def step(self) -> bool:
        plan = self.plan()
        if plan is not None:
            self.run(plan)
        return plan is not None

    def finish(self, limit: int = 5000) -> None:
        steps = 0
        while self.step():
            steps += 1
            assert steps < limit, "no end in sight"
        assert self.scheduler.blocks.num_available == self.model.num_blocks
        for item in self.seen:
            assert item.status is Status.FINISHED, item.request_id
            if item.finish_reason != "abort":
                assert item.output_token_ids == expected(item.prompt_token_ids, item.params, item.seed)
                if item.params.logprobs is not None:
                    assert len(item.logprobs) == len(item.output_token_ids)

    def order(self) -> list[str]:
        """Names in the order in which they first had a token."""
        return list(dict.fromkeys(name for plan in self.model.plans for name in plan.request_ids))

    def running(self) -> list[str]:
        return [item.request_id for item in self.scheduler.running]

    def waiting(self) -> list[str]:
        return [item.request_id for item in self.scheduler.waiting]


# Optimistic admission ----------------------------------------------------------------------------


def test_optimistic_admits_more_than_reserve() -> None:
    """8 pages, worst case 4 pages each but 1 of prompt: reserve runs two at once, optimistic more."""
    together = {}
    for mode in MODES:
        bench = Bench(admission=mode)
        for i in range(6):
            bench.add(f"r{i}", 4, max_tokens=13)
        bench.step()
        together[mode] = len(bench.running())
        bench.finish()
    assert together == {"reserve": 2, "optimistic": 6}


def test_optimistic_leaves_the_watermark_free() -> None:
    bench = Bench(num_blocks=400, admission="optimistic", max_num_batched_tokens=4096)
    assert bench.scheduler.pages.watermark == 4
    bench.add("a", 4 * 390, max_tokens=1)
    bench.add("b", 4 * 7, max_tokens=1)  # 7 + 4 pages of the 10 that are left
    bench.add("c", 4 * 6, max_tokens=1)
    bench.step()
    assert bench.order() == ["a"]  # strictly in order here: c would fit but may not pass b
    bench.finish()


def test_pages_grow_with_the_answer() -> None:
    bench = Bench(admission="optimistic")
    item = bench.add("a", 5, max_tokens=9)
    pages = []
    while bench.step():
        pages.append(len(item.block_ids))
    assert pages == [2, 2, 2, 2, 3, 3, 3, 3, 0]


def test_the_lowest_priority_then_the_youngest_gives_way() -> None:
    bench = Bench(num_blocks=6, admission="optimistic")
    important = bench.add("important", 4, max_tokens=17, priority=-1)
    old = bench.add("old", 4, max_tokens=17)
    young = bench.add("young", 4, max_tokens=17)
    bench.step()
    assert bench.running() == ["important", "old", "young"]
    first: list[str] = []
    while bench.step():
        for item in (important, old, young):
            if item.num_preemptions and item.request_id not in first:
                first.append(item.request_id)
    assert first == ["young", "old"]
    assert important.num_preemptions == 0
    bench.finish()


def test_preempted_keeps_its_answer_and_goes_to_the_front() -> None:
    bench = Bench(admission="optimistic", max_num_seqs=2, prefix_caching=False)
    first = bench.add("first", 6, max_tokens=20, logprobs=2)
    bench.add("second", 3, max_tokens=3)
    bench.add("third", 3, max_tokens=3)
    for _ in range(2):
        bench.step()
    given = list(first.output_token_ids)
    bench.scheduler.preempt(first)
    assert (first.status, first.block_ids, first.num_computed_tokens) == (Status.WAITING, [], 0)
    assert first.output_token_ids == given
    assert bench.waiting() == ["first", "third"]
    bench.step()
    plan = bench.model.plans[-1]
    seq = plan.request_ids.index("first")
    read = plan.token_ids[plan.cu_seqlens_q[seq] : plan.cu_seqlens_q[seq + 1]].tolist()
    assert read == first.prompt_token_ids + given  # all of it in one chunk, and one new token
    assert len(first.output_token_ids) == len(given) + 1
    bench.finish()
    with pytest.raises(ValueError, match="first is finished, not running"):
        bench.scheduler.preempt(first)


def test_hysteresis() -> None:
    """What was preempted comes back when all it knows and the watermark fit, not at the first free page."""
    bench = Bench(num_blocks=8, admission="optimistic")
    item = bench.add("a", 8, max_tokens=8)
    other = bench.add("b", 21, max_tokens=4)  # six of the eight pages
    bench.step()
    bench.scheduler.preempt(item)  # nine tokens: three pages and the watermark, two are free
    while other.status is Status.RUNNING:
        assert bench.step()
        assert item.status is Status.WAITING
    bench.finish()
    assert item.num_preemptions == 1


@pytest.mark.parametrize("mode", MODES)
def test_preempt_while_its_step_runs(mode: str) -> None:
    """The token sampled meanwhile is dropped, and comes out the same when it is sampled again."""
    bench = Bench(admission=mode)
    item = bench.add("a", 3, temperature=1.0)
    other = bench.add("b", 3)
    plan = bench.plan()
    assert plan is not None
    bench.scheduler.preempt(item)
    sampled = bench.model.sample(bench.model.forward(bench.model.stage(plan)), plan)
    assert bench.scheduler.commit(plan, sampled) == [other]
    assert item.output_token_ids == []
    bench.finish()


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    bench = Bench(num_blocks=5, admission="optimistic")
    bench.add("a", 8, max_tokens=8)
    bench.step()
    bench.add("b", 3, max_tokens=12)
    bench.step()
    bench.add("c", 1, max_tokens=1)
    while bench.scheduler.preemptions == 0:
        before = set(bench.running())
        assert bench.step()
        if bench.scheduler.preemptions:
            assert set(bench.running()) < before
            assert bench.scheduler.waiting_for == "preemption"
    bench.finish()


# Policies ----------------------------------------------------------------------------------------


def test_priorities() -> None:
    bench = Bench(max_num_seqs=1, scheduling_policy="priority")
    for name, priority in (("late", 5), ("normal", 0), ("urgent", -3), ("normal too", 0)):
        bench.add(name, 3, priority=priority)
    bench.finish()
    assert bench.order() == ["urgent", "normal", "normal too", "late"]


def test_a_preempted_request_stays_behind_higher_priorities() -> None:
    bench = Bench(max_num_seqs=1, scheduling_policy="priority")
    item = bench.add("a", 3, priority=1)
    bench.step()
    bench.add("same", 3, priority=1)
    bench.add("higher", 3, priority=0)
    bench.scheduler.preempt(item)
    assert bench.waiting() == ["higher", "a", "same"]
    bench.finish()


def test_a_preempted_request_goes_before_all_that_never_ran() -> None:
    bench = Bench(max_num_seqs=1, scheduling_policy="shortest-prompt-first")
    item = bench.add("long", 20)
    bench.step()
    bench.add("short", 1)  # ranks before it: 1 + 16 against 20
    bench.scheduler.preempt(item)
    assert bench.waiting() == ["long", "short"]
    bench.finish()


def test_shortest_prompt_first_ages() -> None:
    """Prompts of 3 pass one of 23 twice at 8 tokens a place, and no more."""
    policy = ShortestPromptFirst(tokens_per_arrival=8)
    bench = Bench(max_num_seqs=1, scheduling_policy=policy)
    bench.add("long", 23)
    for i in range(5):
        bench.add(f"s{i}", 3)
    bench.finish()
    assert bench.order() == ["s0", "s1", "long", "s2", "s3", "s4"]
    with pytest.raises(ValueError, match="tokens_per_arrival must be at least 1, not 0"):
        ShortestPromptFirst(0)


def test_how_policies_share_a_step() -> None:
    """By default all get on and the shortest ends first; by rank, priority or arrival where that is asked."""
    long, short, other = (
        request("long", prompt_of(30)),
        request("short", prompt_of(4)),
        request("o", [3] * 20),
    )
    long.arrival, short.arrival, other.arrival = 0, 1, 2
    prompts = [(long, 30), (short, 4), (other, 20)]
    assert SchedulingPolicy().share(prompts, 24) == [2, 4, 18]
    assert SchedulingPolicy().share(prompts, 3) == [1, 1, 1]
    assert SchedulingPolicy().share(prompts, 60) == [30, 4, 20]
    assert SchedulingPolicy().share([(long, 30)], 10) == [10]
    assert SchedulingPolicy().share([(long, 5), (other, 5)], 8) == [3, 5]  # capped chunks: the shorter first
    assert ShortestPromptFirst().share(prompts, 10) == [6, 4, 0]
    assert Blocking().share(prompts, 32) == [30, 2, 0]
    other.priority = -1
    assert PriorityPolicy().share(prompts, 24) == [1, 3, 20]


def test_a_short_prompt_passes_long_ones_that_get_on() -> None:
    """Behind three long prompts a short one is read at once; in every step each prompt reads something."""
    for policy in ("fcfs", "latency-target"):
        bench = Bench(num_blocks=400, max_num_batched_tokens=64, scheduling_policy=policy)
        for i in range(3):
            bench.add(f"long{i}", 400, max_tokens=1)
        bench.step()
        short = bench.add("short", 30, max_tokens=1)
        steps = 0
        while short.finish_reason is None:
            before = {r.request_id: r.num_computed_tokens for r in bench.scheduler.running}
            bench.step()
            steps += 1
            running = bench.scheduler.running
            assert all(r.num_computed_tokens > before.get(r.request_id, 0) for r in running)
        assert steps == 1
        bench.finish()


def test_as_many_prompts_side_by_side_as_the_policy_says() -> None:
    for policy, readers in (("fcfs", 4), ("shortest-prompt-first", 4), ("blocking", 1)):
        bench = Bench(num_blocks=400, max_num_batched_tokens=16, scheduling_policy=policy)
        for i in range(6):
            bench.add(f"long{i}", 100, max_tokens=1)
        bench.step()
        assert len(bench.scheduler.running) == readers
        assert bench.scheduler.waiting_for == "token budget"
        bench.finish()


def test_blocking_stalls_decodes_and_others_do_not() -> None:
    stalled = {}
    for policy in POLICIES:
        bench = Bench(num_blocks=40, scheduling_policy=policy, max_num_batched_tokens=8)
        answer = bench.add("answer", 3, max_tokens=30)
        bench.step()
        bench.add("prompt", 40, max_tokens=2)
        for _ in range(5):
            bench.step()
        stalled[policy] = 6 - len(answer.output_token_ids)
        bench.finish()
    assert stalled == {
        "fcfs": 0,
        "priority": 0,
        "shortest-prompt-first": 0,
        "latency-target": 0,
        "blocking": 5,
    }


def test_a_policy_of_ones_own() -> None:
    class LongAnswersLast(SchedulingPolicy):
        name = "long answers last"

        def rank(self, request: Request) -> int:
            return request.params.max_tokens

    bench = Bench(max_num_seqs=1, scheduling_policy=LongAnswersLast())
    for tokens in (9, 2, 5):
        bench.add(f"t{tokens}", 3, max_tokens=tokens)
    bench.finish()
    assert bench.order() == ["t2", "t5", "t9"]


@pytest.mark.parametrize(
    ("shares", "error", "told"),
    [
        ([99], ValueError, r"'bad' shares out \[99\] tokens.*\[3\].*budget is 32"),
        ([-1], ValueError, r"\[-1\]"),
        ([], ValueError, r"shares out \[\]"),
        ([0], RuntimeError, "'bad' gives no prompt any token"),
    ],
)
def test_a_wrong_policy_is_told(shares: list[int], error: type[Exception], told: str) -> None:
    class Bad(SchedulingPolicy):
        name = "bad"

        def share(self, prompts: Sequence[tuple[Request, int]], budget: int) -> list[int]:
            return shares

    bench = Bench(scheduling_policy=Bad())
    bench.add("a", 3)
    with pytest.raises(error, match=told):
        bench.scheduler.plan()


# Bounded bypass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_head_that_does_not_fit_is_passed_so_often_and_no_more(mode: str, limit: int) -> None:
    bench = Bench(num_blocks=8, admission=mode, max_bypass=limit, max_num_seqs=3)
    bench.add("runs", 12, max_tokens=9)
    bench.step()
    big = bench.add("big", 27, max_tokens=2)
    for i in range(8):
        bench.add(f"s{i}", 2, max_tokens=1)
    most = 0
    while big.status is Status.WAITING:
        assert bench.step()
        most = max(most, big.num_passed)
    assert most == limit
    before = bench.order().index("big") - 1
    assert before == limit  # small ones that went first
    bench.finish()


def test_looking_ahead_is_bounded() -> None:
    bench = Bench(num_blocks=8, max_bypass=100, max_queue_len=100)
    bench.add("runs", 12, max_tokens=5)
    bench.step()
    for i in range(LOOK_AHEAD):
        bench.add(f"big{i}", 27, max_tokens=2)
    bench.add("small", 1, max_tokens=1)
    bench.step()
    assert "small" in bench.waiting()
    bench.finish()


def test_why_not() -> None:
    bench = Bench(num_blocks=80, max_num_batched_tokens=8)
    for name in "abcde":
        bench.add(name, 30, max_tokens=1)
    bench.step()
    assert bench.scheduler.waiting_for == "token budget"
    bench.finish()
    bench = Bench(num_blocks=40, max_num_seqs=2)
    for name in "abc":
        bench.add(name, 2)
    bench.step()
    assert bench.scheduler.waiting_for == "max_num_seqs"
    bench.finish()
    bench = Bench(num_blocks=4)
    bench.add("a", 12, max_tokens=3)
    bench.add("b", 2)
    bench.step()
    assert bench.scheduler.waiting_for == "pages"
    bench.finish()
