"""Random workloads: `python tests/random_workloads.py 5000` runs so many, and prints what they reached.

Requests with shared beginnings and several samples arrive, are cancelled, time out, fail and are preempted at
any point, in steps that happen or are rolled back, one at a time or the next one behind the one that runs,
over admission modes, policies, page sizes and the prefix cache on and off. Answers end by length, by eos or
by their text. After every move: free + used + cached = total, references are those of the requests, nothing
is lost or duplicated. At the end: every answer as if its request were alone.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter, deque
from typing import ClassVar

import numpy as np
from fake_model import EOS, FakeModel, engine_config, expected
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from sharp.door import Door
from sharp.plan import BatchPlan, Launched
from sharp.policies import POLICIES
from sharp.request import QueueFull, Request, RequestTooLarge, SamplingParams, Status
from sharp.scheduler import Scheduler

MODES = ("reserve", "optimistic")
FAMILIES = [random.Random(family).choices(range(2, 300), k=60) for family in range(3)]  # beginnings to share


class Workload(RuleBasedStateMachine):
    """A scheduler over the fake model; `reached` counts over all examples of a run."""

    reached: ClassVar[Counter[str]] = Counter()

    @initialize(
        mode=st.sampled_from(MODES),
        policy=st.sampled_from(sorted(POLICIES)),
        budget=st.sampled_from([1, 3, 16, 40]),
        seqs=st.integers(1, 6),
        blocks=st.sampled_from([3, 8, 24]),
        block_size=st.sampled_from([1, 2, 4]),
        bypass=st.sampled_from([0, 1, 8]),
        threshold=st.sampled_from([None, 2]),
        caching=st.sampled_from([True, True, False]),
        depth=st.sampled_from([1, 2, 2]),
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
        caching: bool,
        depth: int,
    ) -> None:
        self.depth = depth  # steps in flight
        self.flying: deque[Launched] = deque()
        self.text_ends: dict[str, int] = {}  # tokens after which an answer's text holds its stop string
        self.seen: list[Request] = []
        self.model = FakeModel(num_blocks=blocks, block_size=block_size)
        self.door = Door(None, 300, 0)
        config = engine_config(
            block_size=block_size,
            admission=mode,
            scheduling_policy=policy,
            max_num_batched_tokens=budget,
            max_num_seqs=min(seqs, budget),
            max_bypass=bypass,
            long_prefill_token_threshold=threshold,
            max_queue_len=6,
            prefix_caching=caching,
        )
        self.scheduler = Scheduler(config, blocks, 4096, (EOS,))
        self.reached["workloads"] += 1

    @rule(seed=st.integers(0, 2**32), count=st.integers(1, 6))
    def arrive(self, seed: int, count: int) -> None:
        """Several at once: hypothesis draws few things in an example, and pressure takes many requests."""
        rng = random.Random(seed)
        for _ in range(count):
            self.add(rng, rng.randint(1, 12), rng.choice([1, 1, 2, 3]))

    def add(self, rng: random.Random, size: int, n: int) -> None:
        own = rng.choice([0, 1, 3])  # last tokens that are this request's alone; the others are its family's
        tokens, hot = rng.randint(1, 24), rng.randint(0, 1)
        family, priority = rng.randrange(3), rng.randint(-1, 1)
        prompt = FAMILIES[family][:size]
        for place in range(max(0, size - own), size):
            prompt[place] = rng.randrange(2, 300)
        params = SamplingParams(
            max_tokens=tokens, temperature=float(hot), ignore_eos=rng.random() < 0.7, logprobs=1, n=n
        )
        first = self.door.make_request(prompt, params, None, priority)
        waiting = len(self.scheduler.waiting)
        try:
            self.scheduler.add(first)
        except RequestTooLarge:
            each, shared = self.scheduler.sizes.worst_pages(first), (size - 1) // self.model.block_size
            seats = n > self.scheduler.config.max_num_seqs
            assert seats or shared + n * (each - shared) > self.model.num_blocks
        except QueueFull:
            assert waiting >= 6
        else:
            self.seen += [first, *first.samples]
            if rng.random() < 0.2:
                self.text_ends[first.request_id] = rng.randint(1, tokens)

    def plan(self) -> BatchPlan | None:
        scheduler, config = self.scheduler, self.scheduler.config
        before = (scheduler.pages.hit_tokens, scheduler.blocks.evictions, scheduler.preemptions)
        plan = scheduler.plan()
        after = (scheduler.pages.hit_tokens, scheduler.blocks.evictions, scheduler.preemptions)
        for name, a, b in zip(("hit tokens", "evictions", "preemptions"), before, after, strict=True):
            self.reached[name] += b - a
        if plan is None:
            assert self.flying or not scheduler.requests(), "unfinished requests, but no plan"
            return None
        self.reached["steps"] += 1
        self.check_unknown_ids(plan)
        self.reached["copied pages"] += len(plan.page_copies)
        assert 1 <= plan.num_tokens <= config.max_num_batched_tokens
        content = {page for item in scheduler.running for page in item.block_ids[: self.pages_of(item)]}
        content |= set(scheduler.pages.forks.copies.values())
        assert scheduler.pages.num_written() == len(content)
        by_id = {item.request_id: item for item in scheduler.running}
        for seq, name in enumerate(plan.request_ids):  # pages of a plan are those of its own request
            pages = plan.block_table[seq]
            assert pages[pages >= 0].tolist() == by_id[name].block_ids[: len(pages)]
        written = plan.slot_mapping // self.model.block_size
        assert len(set(plan.slot_mapping.tolist())) == plan.num_tokens, "a slot is written twice"
        owners = Counter(page for item in scheduler.running for page in set(item.block_ids))
        assert all(owners[page] == 1 for page in set(written.tolist())), "a shared page is written"
        found = set(scheduler.blocks._key_of)
        assert not found & set(written.tolist()), "a page is written that others may have found"
        planned = set(plan.request_ids)
        for item in scheduler.running:
            why = scheduler.not_scheduled.get(item.request_id)
            assert (why is None) == (item.request_id in planned), f"{item.request_id}: {why}"
        return plan

    def pages_of(self, item: Request) -> int:
        return -(-item.num_computed_tokens // self.model.block_size)

    def check_unknown_ids(self, plan: BatchPlan) -> None:
        """They are of the step right before, of the same request."""
        for token in np.flatnonzero(plan.token_ids < 0).tolist():
            before = self.flying[-1].plan
            seq = before.logits_seqs[~plan.token_ids[token]]
            name = plan.request_ids[np.searchsorted(plan.cu_seqlens_q, token, side="right") - 1]
            assert before.request_ids[seq] == name, "another request's token"
            self.reached["unknown ids"] += 1

    def launch(self) -> bool:
        """One more step in flight, if there may be one and there is one."""
        plan = self.plan() if len(self.flying) < self.depth else None
        if plan is not None:
            self.flying.append(self.model.launch(plan))
        return plan is not None

    @rule()
    def begin(self) -> None:
        self.launch()

    def land(self) -> None:
        """The oldest step in flight has happened."""
        launched, forks = self.flying.popleft(), self.scheduler.pages.forks
        forked, sampled = forks.forked, self.model.land(launched)
        updated = self.scheduler.commit(launched.plan, sampled)
        self.reached["forks"] += forks.forked - forked
        self.reached["dropped tokens"] += len(sampled.token_ids) - len(updated)
        for item in updated:
            if len(item.output_token_ids) == self.text_ends.get(item.request_id):
                self.scheduler.stop_on_text(item, "stop")

    def undo(self, launched: bool) -> list[Request]:
        """No step in flight happens (nor one that was planned and not launched); requests of the oldest."""
        if not launched and len(self.flying) < self.depth:
            self.plan()
        requests: list[Request] = []
        for plan in reversed(self.scheduler.in_flight):
            requests = self.scheduler.rollback(plan)
            self.reached["rollbacks"] += 1
        self.flying.clear()
        return requests

    @rule(happens=st.sampled_from(["all", "all", "all", "launched", "planned", "fails"]))
    def end(self, happens: str) -> None:
        if happens == "all":
            if self.flying:
                self.land()
        elif happens == "fails":
            for item in self.undo(launched=True):
                if item.status is not Status.FINISHED:
                    self.scheduler.fail(item)
                    self.reached["failed"] += 1
        else:
            self.undo(happens == "launched")

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.turn()

    def turn(self) -> None:
        """As the engine does: the next step behind the one that runs, then that one lands."""
        more = self.launch()
        if self.flying and (not more or len(self.flying) == self.depth):
            self.land()
        self.nothing_is_lost()

    @rule(
        seed=st.integers(0, 2**32),
        count=st.integers(1, 6),
        happens=st.sampled_from(["launched", "planned", "fails"]),
    )
    def traffic(self, seed: int, count: int, happens: str) -> None:
        """Arrivals, then steps of which one is interrupted or fails."""
        self.arrive(seed, count)
        self.steps(count)
        self.launch()
        self.end(happens)
        self.steps(1)

    @rule(which=st.integers(0, 99), whole=st.booleans())
    def cancel(self, which: int, whole: bool) -> None:
        """One sample, or (as a timeout does) all that has not finished of its prompt."""
        live = self.scheduler.requests()
        if not live:
            return
        item = live[which % len(live)]
        name = item.request_id.partition("#")[0]
        group = [other for other in live if whole and other.request_id.partition("#")[0] == name]
        for one in group or [item]:
            if one.status is not Status.FINISHED:
                self.scheduler.finish(one, "timeout" if whole else "abort")
                self.reached["timeouts" if whole else "cancelled"] += 1

    @rule()
    def forget(self) -> None:
        if not self.scheduler.blocks.num_used:
            self.scheduler.blocks.forget_content()

    @rule(which=st.integers(0, 99))
    def preempt(self, which: int) -> None:
        running = self.scheduler.running
        if running:
            self.scheduler.preempt(running[which % len(running)])

    def obeys(self, item: Request) -> bool:
        return not item.params.ignore_eos

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        blocks = self.scheduler.blocks
        assert blocks.num_free + blocks.num_used + blocks.num_cached == blocks.num_blocks
        live = self.scheduler.requests()
        assert len(live) == len(set(map(id, live)))
        assert {id(r) for r in live} == {id(r) for r in self.seen if r.status is not Status.FINISHED}

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            self.turn()
            if not self.scheduler.requests() and not self.flying:
                break
        else:
            raise AssertionError("no end in sight")
        assert self.scheduler.blocks.num_available == self.model.num_blocks
        for item in self.seen:
            assert item.status is Status.FINISHED, item.request_id
            alone = expected(item.prompt_token_ids, item.params, item.seed)
            if item.stop_reason is not None:
                alone = alone[: self.text_ends[item.request_id]]
            elif item.finish_reason in ("abort", "timeout", "error"):
                alone = alone[: len(item.output_token_ids)]
            else:
                assert item.finish_reason == ("stop" if alone[-1] == EOS and self.obeys(item) else "length")
            assert item.output_token_ids == alone
            assert len(item.logprobs) == len(item.output_token_ids)
        self.reached["requests"] += len(self.seen)


def run_workloads(count: int, *, same: bool = False) -> Counter[str]:
    """Run `count` random workloads and return what they reached; fails as the first of them does.

    same: the same ones in every run, and a failure as it comes, not made small (for mutants).
    """
    Workload.reached = Counter()
    run_state_machine_as_test(
        Workload,
        settings=settings(
            max_examples=count,
            stateful_step_count=30,
            deadline=None,
            phases=(Phase.generate,) if same else tuple(Phase),
            derandomize=same,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return Workload.reached


if __name__ == "__main__":
    start = time.monotonic()
    reached = run_workloads(int(sys.argv[1]))
    print(", ".join(f"{name} {number:,}" for name, number in sorted(reached.items())))
    print(f"{time.monotonic() - start:.0f} s")
