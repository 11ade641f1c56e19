"""The scheduler with a step in flight: the next one is planned with what is known, and nothing goes
astray."""

from __future__ import annotations

import dataclasses
from collections import deque
from functools import partial
from typing import Any

import numpy as np
import pytest
from fake_model import expected
from hypothesis import given, settings
from hypothesis import strategies as st
from random_workloads import run_workloads
from test_admission import MODES, Bench
from test_scheduler import prompt_of

from sharp.plan import BatchPlan, Launched
from sharp.policies import POLICIES
from sharp.request import Request, SamplingParams, Status
from sharp.scheduler import Scheduler


class Ahead(Bench):
    """A bench with up to two steps in flight; step() plans and launches one and lands the one before."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.flying: deque[Launched] = deque()

    def launch(self) -> BatchPlan | None:
        """Plan and launch the next step."""
        plan = self.scheduler.plan()
        self.scheduler.check()
        if plan is None:
            assert self.flying or not self.scheduler.requests(), "unfinished requests, but no plan"
            return None
        by_id = {item.request_id: item for item in self.scheduler.running}
        for seq, name in enumerate(plan.request_ids):
            pages = plan.block_table[seq]
            assert pages[pages >= 0].tolist() == by_id[name].block_ids[: len(pages)]
        self.flying.append(self.model.launch(plan))
        return plan

    def land(self) -> list[Request]:
        """Commit the oldest step in flight."""
        launched = self.flying.popleft()
        updated = self.scheduler.commit(launched.plan, self.model.land(launched))
        self.scheduler.check()
        return updated

    def step(self) -> bool:
        plan = self.launch() if len(self.flying) < 2 else None
        if self.flying and (plan is None or len(self.flying) == 2):
            self.land()
        return bool(self.flying or self.scheduler.requests())

    def undo(self) -> None:
        """No step in flight has happened."""
        for launched in reversed(self.flying):
            self.scheduler.rollback(launched.plan)
            self.scheduler.check()
        self.flying.clear()


def counts(plan: BatchPlan | None) -> dict[str, int]:
    """Who has how many tokens."""
    assert plan is not None
    return dict(zip(plan.request_ids, np.diff(plan.cu_seqlens_q).tolist(), strict=True))


# What is planned ---------------------------------------------------------------------------------


def test_a_token_in_flight_is_named_by_its_row() -> None:
    bench = Ahead(num_blocks=64, max_num_batched_tokens=12)
    items = [bench.add(name, n) for name, n in (("a", 3), ("long", 20), ("b", 1))]
    first, second = bench.launch(), bench.launch()
    assert first is not None
    assert second is not None
    assert counts(first) == {"b": 1, "a": 3, "long": 8}
    assert counts(second) == {"b": 1, "a": 1, "long": 10}
    assert second.request_ids[:2] == ("a", "b")  # decodes by admission, then the chunk
    rows = [first.request_ids[i] for i in first.logits_seqs]
    assert [rows[~token] for token in second.token_ids[:2]] == ["a", "b"]
    assert (second.token_ids[2:] >= 0).all()  # of a prompt all is known
    assert second.output_indices.tolist() == [1, 1]
    assert second.positions[:2].tolist() == [3, 1]
    assert [item.output_token_ids for item in items] == [[], [], []]
    bench.land()
    third = bench.launch()
    assert third is not None
    assert third.logits_seqs.tolist() == [0, 1, 2]  # the long prompt's end
    assert third.output_indices.tolist() == [2, 2, 0]
    bench.finish()


def test_the_last_token_is_in_flight() -> None:
    """Nothing is planned behind it; a step too far would have no page either."""
    bench = Ahead(num_blocks=2, max_num_seqs=2)
    item = bench.add("a", 3, max_tokens=2)  # four tokens are stored: one page, all of it
    assert counts(bench.launch()) == {"a": 3}
    assert counts(bench.launch()) == {"a": 1}
    bench.land()
    assert bench.launch() is None
    assert bench.scheduler.not_scheduled == {"a": "last token in flight"}
    bench.add("b", 3, max_tokens=1)
    assert counts(bench.launch()) == {"b": 3}
    bench.land()
    assert item.status is Status.FINISHED
    assert bench.launch() is None  # b's only token is in flight
    bench.finish()


def test_max_model_len_is_a_last_token_too() -> None:
    bench = Ahead(num_blocks=8)
    bench.scheduler.sizes.max_model_len = 5
    item = bench.add("a", 3, max_tokens=50)
    for _ in range(2):
        bench.launch()
    bench.land()
    assert bench.launch() is None
    bench.land()
    assert (item.finish_reason, len(item.output_token_ids)) == ("length", 2)


def test_a_prompt_in_chunks() -> None:
    """Every chunk follows the one in flight; a short prompt that arrives is not kept by it."""
    bench = Ahead(num_blocks=64, max_num_batched_tokens=8)
    bench.add("long", 30)
    assert counts(bench.launch()) == {"long": 8}
    bench.add("short", 2)
    second = bench.launch()
    assert counts(second) == {"long": 6, "short": 2}
    bench.land()
    third = bench.launch()
    assert third is not None
    assert third.request_ids == ("short", "long")
    assert third.token_ids[0] == ~0
    bench.finish()


@pytest.mark.parametrize("blocking", [False, True])
def test_nothing_to_plan_before_a_step_has_landed(blocking: bool) -> None:
    """One seat: the next request cannot start before the last token of the first is there."""
    bench = Ahead(max_num_seqs=1, scheduling_policy="blocking" if blocking else "fcfs")
    bench.add("a", 2, max_tokens=1)
    bench.add("b", 2, max_tokens=1)
    bench.launch()
    assert bench.launch() is None
    assert bench.scheduler.waiting_for == "max_num_seqs"
    bench.land()
    assert counts(bench.launch()) == {"b": 2}
    bench.finish()


# Ends --------------------------------------------------------------------------------------------


def eos_prompt() -> list[int]:
    """A prompt whose greedy answer ends by eos after three tokens or more."""
    greedy = SamplingParams(max_tokens=40, temperature=0.0)
    prompts = ([2, n, m] for n in range(2, 300) for m in (2, 3))
    return next(p for p in prompts if 3 <= len(expected(p, greedy)) < 40)


@pytest.mark.parametrize("how", ["eos", "stop id"])
def test_one_step_too_far(how: str) -> None:
    """The step behind the end is in flight: its token is dropped, the pages are free at once and go to
    another in the next plan, and what the other finds there is its own."""
    prompt = eos_prompt()
    params: dict[str, Any] = {"max_tokens": 40, "ignore_eos": False}
    ids = expected(prompt, SamplingParams(temperature=0.0, **params))
    if how == "stop id":
        params = {"max_tokens": 40, "stop_token_ids": (ids[-1],)}
    stored = len(prompt) + 39
    pages = -(-stored // 4)
    bench = Ahead(num_blocks=pages, max_bypass=0)
    item = bench.ask("a", prompt, **params)
    other = bench.add("other", stored, max_tokens=1)  # needs every page
    while item.status is Status.RUNNING or not item.output_token_ids:
        assert other.status is Status.WAITING
        bench.step()
    assert (item.finish_reason, item.output_token_ids) == ("stop", ids)
    assert counts(bench.flying[0].plan) == {"a": 1}  # the step too far
    assert bench.scheduler.blocks.num_used == 0
    assert counts(bench.launch())["other"] >= 30
    assert bench.land() == []
    bench.finish()
    assert other.output_token_ids == expected(other.prompt_token_ids, other.params, other.seed)


def test_a_stop_string_in_the_text() -> None:
    """The engine reads texts after a commit, with a step behind it in flight."""
    bench = Ahead(num_blocks=24)
    item, other = bench.add("a", 3, max_tokens=30), bench.add("b", 3, max_tokens=9)
    while len(item.output_token_ids) < 4:
        bench.step()
    bench.scheduler.stop_on_text(item, "stop")
    assert counts(bench.flying[0].plan) == {"a": 1, "b": 1}
    assert bench.land() == [other]
    assert (item.finish_reason, len(item.output_token_ids)) == ("stop", 4)
    while bench.step():
        pass
    assert other.output_token_ids == expected(other.prompt_token_ids, other.params, other.seed)


def test_dropped_tokens_are_not_published() -> None:
    """The step too far fills a page: it would be found under a token that the answer does not have."""
    bench = Ahead(num_blocks=24)
    item = bench.add("a", 4, max_tokens=30)
    for _ in range(5):
        bench.launch()
        if len(bench.flying) == 2:
            bench.land()
    # Eight tokens are planned: a second page is full when the step in flight has happened.
    assert (item.num_computed_tokens, len(item.output_token_ids)) == (8, 4)
    keys = list(item.page_keys)
    bench.scheduler.finish(item, "stop")
    bench.land()
    assert len(bench.scheduler.blocks.find(keys)) == 1
    assert bench.scheduler.blocks.num_cached == 1
    more = bench.ask("more", item.prompt_token_ids + item.output_token_ids + [9])
    while bench.step():
        pass
    assert more.finish_reason == "length"
    assert more.num_cached_tokens == 4


def test_a_page_is_found_once_its_step_is_committed() -> None:
    """And the step behind it, in flight, writes into the next page."""
    bench = Ahead(num_blocks=24)
    item = bench.add("a", 8, max_tokens=9)
    bench.launch()
    bench.launch()
    assert bench.scheduler.blocks.find(item.page_keys) == []
    bench.land()
    found = bench.scheduler.blocks.find(item.page_keys)
    assert found == item.block_ids[:2]
    assert not set(bench.flying[0].plan.slot_mapping // 4) & set(found)
    bench.finish()


@pytest.mark.parametrize("landed", [0, 1])
def test_abort_with_two_steps_in_flight(landed: int) -> None:
    """Its row and its name are another's in the next plan, and nobody takes its tokens for the other's."""
    bench = Ahead(num_blocks=24, max_num_seqs=2)
    first, other = bench.add("a", 3, max_tokens=9), bench.add("b", 5, max_tokens=9)
    bench.launch()
    if landed:
        bench.launch()
        bench.land()
    row = first.row
    bench.scheduler.finish(first, "abort")
    second = bench.add("a", 6, max_tokens=9)
    plan = bench.launch()
    assert counts(plan) == {"b": 1, "a": 6}
    assert second.row == row
    assert bench.land() == [other]
    assert len(first.output_token_ids) == landed
    assert second.output_token_ids == []
    assert set(bench.land()) == {other, second}
    bench.finish()


# Pages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_preempt_with_two_steps_in_flight(mode: str) -> None:
    """Both have a token of a time before: they are dropped, though it runs again when the second one
    lands."""
    bench = Ahead(num_blocks=24, admission=mode)
    item, other = bench.add("a", 3, max_tokens=9, temperature=1.0), bench.add("b", 3, max_tokens=9)
    bench.launch()
    bench.launch()
    bench.scheduler.preempt(item)
    assert bench.land() == [other]
    assert counts(bench.launch()) == {"b": 1, "a": 3}
    assert bench.land() == [other]
    assert set(bench.land()) == {item, other}
    bench.finish()
    assert item.num_preemptions == 1


def test_pages_grow_a_token_ahead() -> None:
    bench = Ahead(num_blocks=8, admission="optimistic")
    item = bench.add("a", 4, max_tokens=9)
    bench.launch()
    assert len(item.block_ids) == 1
    bench.launch()  # a page for a token that nobody knows yet
    assert len(item.block_ids) == 2
    bench.undo()
    assert len(item.block_ids) == 2  # it stays booked
    bench.finish()


def test_who_ends_in_the_step_in_flight_is_not_preempted() -> None:
    """Two of two pages are used and the older one needs another: the younger one's last token is in flight,
    so its page is free in a moment. The older one waits a step, and nothing is read twice."""
    bench = Ahead(num_blocks=2, admission="optimistic", prefix_caching=False)
    bench.scheduler.pages.watermark = 0
    old = bench.add("old", 2, max_tokens=6)
    bench.launch()
    bench.add("young", 2, max_tokens=2)  # in one page
    assert counts(bench.launch()) == {"old": 1, "young": 2}
    bench.land()
    assert counts(bench.launch()) == {"old": 1, "young": 1}
    bench.land()
    assert bench.launch() is None
    assert bench.scheduler.not_scheduled == {"old": "pages", "young": "last token in flight"}
    assert bench.scheduler.preemptions == 0
    bench.finish()
    assert bench.scheduler.preemptions == 0
    assert len(old.output_token_ids) == 6


# Forks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 14])
def test_samples_start_a_step_later(length: int, mode: str, caching: bool) -> None:
    """When the prompt's step lands the first sample is a token ahead, in the page that is then copied."""
    bench = Ahead(num_blocks=40, admission=mode, prefix_caching=caching)
    bench.ask("a", prompt_of(length), n=3, max_tokens=6, temperature=1.0)
    bench.launch()
    assert counts(bench.launch()) == {"a": 1}
    bench.land()
    plan = bench.launch()
    assert counts(plan) == {"a": 1, "a#1": 1, "a#2": 1}
    assert plan is not None
    assert len(plan.page_copies) == (0 if (length - 1) % 4 == 0 else 2)
    bench.land()
    after = bench.launch()
    assert after is not None
    assert len(after.page_copies) == 0  # they are made in the step in flight
    bench.finish()


def test_copies_of_steps_that_did_not_happen_are_made_again() -> None:
    """They belong to one plan at a time; the sample's own tokens come after its copy, whatever is undone."""
    bench = Ahead(num_blocks=40, prefix_caching=False)
    bench.ask("a", prompt_of(6), n=2, max_tokens=6, temperature=1.0)
    bench.launch()
    bench.launch()
    bench.land()
    for _ in range(2):
        plan = bench.launch()
        assert plan is not None
        assert len(plan.page_copies) == 1
        bench.undo()
    again, behind = bench.launch(), bench.launch()
    assert again is not None
    assert behind is not None
    assert (len(again.page_copies), len(behind.page_copies)) == (1, 0)
    bench.finish()


def test_copies_outlive_the_step_before_theirs() -> None:
    """They are in a plan that is in flight when the step before it lands, and then undone."""
    bench = Ahead(num_blocks=40, prefix_caching=False)
    bench.ask("a", prompt_of(6), n=2, max_tokens=6, temperature=1.0)
    bench.launch()
    bench.launch()
    bench.land()
    plan = bench.scheduler.plan()
    assert plan is not None
    assert len(plan.page_copies) == 1
    bench.land()
    bench.scheduler.rollback(plan)
    bench.scheduler.check()
    again = bench.launch()
    assert again is not None
    assert len(again.page_copies) == 1
    bench.finish()


def test_the_first_sample_is_preempted_before_the_fork() -> None:
    """The step that read the prompt lands for nobody: it is read again, and the samples fork then."""
    bench = Ahead(num_blocks=40)
    first = bench.ask("a", prompt_of(6), n=3, max_tokens=6, temperature=1.0)
    bench.launch()
    bench.launch()
    bench.scheduler.preempt(first)
    assert bench.land() == []
    assert len(first.samples) == 2
    bench.finish()


# Undone ------------------------------------------------------------------------------------------


def test_rollback_of_two_plans_the_same_again() -> None:
    bench = Ahead(num_blocks=40, max_num_batched_tokens=8)
    bench.add("a", 3, max_tokens=12)
    bench.add("b", 21)
    for _ in range(5):
        plans = [bench.launch(), bench.launch()]
        bench.undo()
        again = [bench.launch(), bench.launch()]
        for before, after in zip(plans, again, strict=True):
            assert before is not None
            assert after is not None
            for item in dataclasses.fields(BatchPlan):
                if item.name != "step":
                    assert np.array_equal(getattr(before, item.name), getattr(after, item.name)), item.name
        bench.land()
        bench.land()
    bench.finish()


def test_rollback_of_the_newer_alone() -> None:
    """The next plan goes on from the rows of the one that is still in flight."""
    bench = Ahead(num_blocks=40)
    bench.add("a", 3)
    bench.add("b", 1)
    bench.launch()
    bench.land()
    bench.launch()
    bench.add("c", 1)  # a logits row that moves those of the others
    before = bench.launch()
    assert before is not None
    bench.scheduler.rollback(bench.flying.pop().plan)
    bench.scheduler.check()
    plan = bench.scheduler.plan()
    assert plan is not None
    assert plan.token_ids.tolist() == before.token_ids.tolist()
    assert plan.token_ids[:2].tolist() == [~0, ~1]


def test_ids_of_rows_that_are_not_there() -> None:
    bench = Ahead(num_blocks=40)
    bench.add("a", 3)
    bench.launch()
    plan = bench.scheduler.plan()
    assert plan is not None
    assert plan.with_ids(np.array([7], np.int32)).token_ids.tolist() == [7]
    with pytest.raises(ValueError, match=r"step 2 goes on from logits row 0 .* sampled 0 rows"):
        plan.with_ids(np.empty(0, np.int32))


# Everything --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=12),
    policy=st.sampled_from(sorted(POLICIES)),
    mode=st.sampled_from(MODES),
    budget=st.integers(2, 20),
)
def test_as_without_a_step_in_flight(
    sizes: list[tuple[int, int]], policy: str, mode: str, budget: int
) -> None:
    """The same requests, one step at a time and one behind the other: the same answers, logprobs and ends."""
    results = []
    for kind in (Bench, Ahead):
        bench = kind(
            10, admission=mode, scheduling_policy=policy, max_num_batched_tokens=budget,
            max_num_seqs=min(8, budget),
        )  # fmt: skip
        for number, (length, tokens) in enumerate(sizes):
            bench.add(
                f"r{number}", length, max_tokens=tokens, temperature=float(number % 2), logprobs=1,
                ignore_eos=number % 3 > 0, stop_token_ids=(270, 280) if number % 4 == 0 else (),
            )  # fmt: skip
        bench.finish()
        results.append([(r.output_token_ids, r.logprobs, r.finish_reason) for r in bench.seen])
    assert results[0] == results[1]


# Mutants -----------------------------------------------------------------------------------------


def rows_by_number(patch: pytest.MonkeyPatch) -> None:
    from sharp.flights import Flight

    patch.setattr(Flight, "alive", lambda self, table: table.live[self.rows])


def planned_past_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_last_is_coming", lambda self, rows: np.zeros(len(rows), bool))


def ids_of_another_row(patch: pytest.MonkeyPatch) -> None:
    from sharp.flights import Flights

    add = Flights.add

    def turned(self: Flights, plan: BatchPlan, rows: Any, sampled: Any) -> None:
        add(self, plan, rows, sampled)
        own = rows[sampled]
        self._table.logits_row[own] = np.roll(self._table.logits_row[own], 1)

    patch.setattr(Flights, "add", turned)


def output_index_of_known_tokens(patch: pytest.MonkeyPatch) -> None:
    plan = Scheduler.plan

    def behind(self: Scheduler) -> BatchPlan | None:
        made = plan(self)
        if made is None or len(self.flights) == 1:
            return made
        changed = dataclasses.replace(made, output_indices=np.maximum(made.output_indices - 1, 0))
        flight = self.flights._flights.pop()
        self.flights._flights.append(dataclasses.replace(flight, plan=changed))
        return changed

    patch.setattr(Scheduler, "plan", behind)


def copied_in_both_steps(patch: pytest.MonkeyPatch) -> None:
    from sharp.forks import Forks

    take = Forks.take

    def again(self: Forks) -> Any:
        self._flying.clear()
        return take(self)

    patch.setattr(Forks, "take", again)


def copies_of_the_next_step_forgotten(patch: pytest.MonkeyPatch) -> None:
    from sharp.forks import Forks

    patch.setattr(Forks, "made", lambda self, copies: self.forget(list(self.copies)))


def published_as_planned(patch: pytest.MonkeyPatch) -> None:
    """As far as the step behind has got, too."""
    from sharp.pagebook import PageBook

    publish = PageBook.publish
    patch.setattr(
        PageBook, "publish", lambda self, rows, lens: publish(self, rows, self.table.computed[rows])
    )


def still_coming_after_a_rollback(patch: pytest.MonkeyPatch) -> None:
    rollback = Scheduler.rollback

    def forgetful(self: Scheduler, plan: BatchPlan) -> list[Request]:
        coming = self.table.coming.copy()
        requests = rollback(self, plan)
        self.table.coming[:] = coming
        return requests

    patch.setattr(Scheduler, "rollback", forgetful)
    patch.setattr("sharp.flights.Flights.check", lambda self: None)


MUTANTS = (
    rows_by_number,
    planned_past_the_end,
    ids_of_another_row,
    output_index_of_known_tokens,
    published_as_planned,
    still_coming_after_a_rollback,
)
RARE = {
    copied_in_both_steps: partial(test_samples_start_a_step_later, 6, "reserve", False),
    copies_of_the_next_step_forgotten: test_copies_outlive_the_step_before_theirs,
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_workloads_see(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ValueError, RuntimeError, KeyError, IndexError, AttributeError)):
        run_workloads(2000, same=True)


@pytest.mark.parametrize("mutant", RARE, ids=lambda mutant: mutant.__name__)
def test_a_test_of_its_own_sees(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    RARE[mutant]()
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        RARE[mutant]()
