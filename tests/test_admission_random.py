"""Random workloads over admission modes and policies: cancel and preempt at any point."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_admission import MODES, Bench

from sharp.plan import BatchPlan
from sharp.policies import POLICIES
from sharp.request import QueueFull, Request, RequestTooLarge, Status


class Workload(RuleBasedStateMachine):
    """Answers are compared with each request alone, at the end; pages and plans after every step."""

    @initialize(
        mode=st.sampled_from(MODES),
        policy=st.sampled_from(sorted(POLICIES)),
        budget=st.sampled_from([1, 3, 16, 40]),
        seqs=st.integers(1, 6),
        blocks=st.sampled_from([3, 8, 24]),
        block_size=st.sampled_from([1, 2, 4]),
        bypass=st.sampled_from([0, 1, 8]),
        threshold=st.sampled_from([None, 2]),
    )
    def start(
        self,
        mode: str,
        policy: str,
        budget: int,
        seqs: int,
        blocks: int,
        block_size: int,
        bypass: int,
        threshold: int | None,
    ) -> None:
        self.flying: BatchPlan | None = None
        self.added = 0
        self.bench = Bench(
            blocks,
            block_size,
            admission=mode,
            scheduling_policy=policy,
            max_num_batched_tokens=budget,
            max_num_seqs=min(seqs, budget),
            max_bypass=bypass,
            long_prefill_token_threshold=threshold,
            max_queue_len=6,
        )

    @rule(size=st.integers(1, 12), tokens=st.integers(1, 24), priority=st.integers(-1, 1), hot=st.booleans())
    def add(self, size: int, tokens: int, priority: int, hot: bool) -> None:
        self.added += 1
        model = self.bench.model
        try:
            self.bench.add(f"r{self.added}", size, tokens, priority, temperature=float(hot), logprobs=1)
        except RequestTooLarge:
            assert size + tokens - 1 > model.num_blocks * model.block_size
        except QueueFull:
            assert len(self.bench.scheduler.waiting) >= 6

    @rule()
    def begin(self) -> None:
        if self.flying is None:
            self.flying = self.bench.plan()

    @rule(happens=st.booleans())
    def end(self, happens: bool) -> None:
        plan, self.flying = self.flying, None
        if plan is None:
            return
        if happens:
            self.bench.run(plan)
        else:
            self.bench.model.forward(plan)
            self.bench.scheduler.rollback(plan)

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        self.end(True)
        for _ in range(count):
            self.bench.step()

    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        live = list(self.bench.scheduler.requests())
        if live:
            self.bench.scheduler.finish(live[which % len(live)], "abort")

    @rule(which=st.integers(0, 99))
    def preempt(self, which: int) -> None:
        running = self.bench.scheduler.running
        if running:
            self.bench.scheduler.preempt(running[which % len(running)])

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.scheduler.check()
        live = list(self.bench.scheduler.requests())
        assert len(live) == len(set(map(id, live)))
        assert {id(r) for r in live} == {id(r) for r in self.bench.seen if r.status is not Status.FINISHED}

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.end(True)
            self.bench.finish()


TestWorkload = Workload.TestCase
TestWorkload.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", POLICIES)
def test_tiny_budgets_complete(mode: str, policy: str) -> None:
    """16 tokens a step, 3 pages of 4 tokens: everything ends."""
    bench = Bench(3, 4, admission=mode, scheduling_policy=policy, max_num_batched_tokens=16, max_bypass=2)
    items: list[Request] = []
    for i in range(40):
        items.append(bench.add(f"r{i}", 1 + i % 8, max_tokens=1 + i % 5, priority=i % 3))
    bench.finish()
    assert {item.finish_reason for item in items} == {"length"}
