"""Pages found by content: what is shared, when it can be found, what goes first, what must never happen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_admission import MODES, Bench
from test_scheduler import prompt_of

from sharp.blocks import BlockAllocator
from sharp.prefix import KEY_BYTES, extend_keys
from sharp.request import Status

PROMPT = prompt_of(17, 5)  # four whole pages of four tokens, and one token


def keys_of(tokens: list[int], block_size: int = 4) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, tokens, 0, block_size)
    return keys


# Keys --------------------------------------------------------------------------------------------


def test_a_key_holds_all_tokens_up_to_its_page() -> None:
    keys = keys_of(PROMPT)
    assert [len(key) for key in keys] == [KEY_BYTES] * 4
    for place in range(16):
        other = [*PROMPT]
        other[place] += 1
        same = [a == b for a, b in zip(keys, keys_of(other), strict=True)]
        assert same == [page < place // 4 for page in range(4)], place
    assert keys_of(PROMPT[4:]) != keys[1:]  # the same tokens at other positions
    assert len(set(keys_of([7] * 16))) == 4


def test_keys_grow_as_tokens_do() -> None:
    keys: list[bytes] = []
    for stop in range(1, 18):
        start = 4 * len(keys)
        extend_keys(keys, PROMPT[start:stop], start, 4)
        assert keys == keys_of(PROMPT[:stop])
    with pytest.raises(ValueError, match="4 pages of 4 tokens have keys, not 12 tokens"):
        extend_keys(keys, PROMPT[12:], 12, 4)


def test_token_ids_are_not_cut_to_bytes() -> None:
    assert keys_of([1, 0, 0, 0]) != keys_of([257, 0, 0, 0]) != keys_of([65537, 0, 0, 0])


# The allocator -----------------------------------------------------------------------------------


def test_published_pages_are_kept_until_their_room_is_needed() -> None:
    blocks = BlockAllocator(4)
    pages = blocks.allocate(3)
    for page, key in zip(pages, (b"a", b"b", b"c"), strict=True):
        blocks.publish(page, key)
    blocks.free(pages)
    blocks.check([])
    assert (blocks.num_free, blocks.num_cached, blocks.num_used, blocks.num_available) == (1, 3, 0, 4)
    assert blocks.find([b"a", b"b", b"x", b"c"]) == pages[:2]
    assert blocks.find([b"x", b"a"]) == []
    blocks.allocate(2)  # the empty one, and the room of the last page: the first ones are of use without it
    assert blocks.find([b"a", b"b", b"c"]) == pages[:2]
    assert blocks.evictions == 1
    blocks.check()


def test_what_was_used_longest_ago_goes_first() -> None:
    blocks = BlockAllocator(3)
    pages = blocks.allocate(3)
    for page, key in zip(pages, (b"a", b"b", b"c"), strict=True):
        blocks.publish(page, key)
    for page in pages:
        blocks.free([page])
    blocks.share(blocks.find([b"a"]))  # used again
    blocks.free(pages[:1])
    blocks.allocate(1)
    assert [bool(blocks.find([key])) for key in (b"a", b"b", b"c")] == [True, False, True]
    blocks.allocate(1)
    assert [bool(blocks.find([key])) for key in (b"a", b"b", b"c")] == [True, False, False]


def test_a_page_in_use_is_never_thrown_out() -> None:
    blocks = BlockAllocator(2)
    page = blocks.allocate(1)[0]
    blocks.publish(page, b"a")
    blocks.share([page])
    blocks.free([page])
    assert (blocks.num_used, blocks.num_available) == (1, 1)
    with pytest.raises(MemoryError, match="2 KV pages needed, 1 of 2 free and 0 cached"):
        blocks.allocate(2)
    blocks.allocate(1)
    assert blocks.find([b"a"]) == [page]
    blocks.check()


def test_sharing_and_publishing_wrongly() -> None:
    blocks = BlockAllocator(3)
    first, second = blocks.allocate(2)
    with pytest.raises(ValueError, match="page 2 is neither in use nor cached"):
        blocks.share([2])
    with pytest.raises(ValueError, match="page 2 is not in use"):
        blocks.publish(2, b"a")
    blocks.publish(first, b"a")
    with pytest.raises(ValueError, match="published already"):
        blocks.publish(first, b"b")
    blocks.publish(second, b"a")  # the same content twice: the first one stays
    assert blocks.find([b"a"]) == [first]
    blocks.free([first, second])
    assert (blocks.num_free, blocks.num_cached) == (2, 1)
    blocks.check([])


def test_content_can_be_forgotten() -> None:
    blocks = BlockAllocator(4)
    page, other = blocks.allocate(2)
    blocks.publish(page, b"a")
    blocks.free([page])
    with pytest.raises(RuntimeError, match="1 pages are in use"):
        blocks.forget_content()
    blocks.free([other])
    blocks.forget_content()
    blocks.check([])
    assert (blocks.num_free, blocks.num_cached, blocks.find([b"a"])) == (4, 0, [])


MOVE = st.tuples(st.sampled_from(["allocate", "free", "share", "publish"]), st.integers(0, 9))


@settings(max_examples=100, deadline=None)
@given(st.lists(MOVE, max_size=80))
def test_random_histories(moves: list[tuple[str, int]]) -> None:
    blocks, owned = BlockAllocator(8), list[list[int]]()
    for move, size in moves:
        if move == "allocate" and size <= blocks.num_available:
            taken = {page for own in owned for page in own}
            owned.append(blocks.allocate(size))
            assert not taken & set(owned[-1]), "a page with two owners"
        elif move == "free" and owned:
            blocks.free(owned.pop(size % len(owned)))
        elif move == "share":
            found = blocks.find([b"%d" % size])
            blocks.share(found)
            owned.append(found)
        elif move == "publish":
            pages = [page for own in owned for page in own if page not in blocks._key_of]
            if pages:
                blocks.publish(pages[0], b"%d" % size)
        blocks.check([page for own in owned for page in own])
        assert blocks.num_free + blocks.num_used + blocks.num_cached == 8


@pytest.mark.parametrize("damage", ["key lost", "cached without key", "cached and free", "reference"])
def test_check_sees_damage(damage: str) -> None:
    blocks = BlockAllocator(3)
    page, other = blocks.allocate(2)
    blocks.publish(page, b"a")
    blocks.free([page])
    blocks.check([other])
    if damage == "key lost":
        blocks._page_of.clear()
    elif damage == "cached without key":
        blocks._page_of.clear()
        blocks._key_of.clear()
    elif damage == "cached and free":
        blocks._free.append(page)
    else:
        blocks._references[other] += 1
    with pytest.raises(AssertionError):
        blocks.check([other])


# The scheduler -----------------------------------------------------------------------------------


def read(bench: Bench, name: str) -> list[int]:
    """Tokens of each step that `name` was in, up to its first answer token."""
    counts = []
    for plan in bench.model.plans:
        if name in plan.request_ids:
            seq = plan.request_ids.index(name)
            counts.append(int(np.diff(plan.cu_seqlens_q)[seq]))
            if plan.cu_seqlens_q[seq + 1] - 1 in plan.logits_rows:
                break
    return counts


def test_a_beginning_is_computed_once() -> None:
    bench = Bench(num_blocks=20)
    bench.ask("first", PROMPT)
    bench.step()
    second = bench.ask("second", [*PROMPT[:10], 3, 4, 5])  # two whole pages in common
    bench.step()
    assert second.block_ids[:2] == bench.seen[0].block_ids[:2]
    assert bench.scheduler.blocks.num_used == 6 + 5 - 2  # reserve: 21 and 17 stored tokens
    bench.finish()
    assert (read(bench, "first"), read(bench, "second")) == ([17], [13 - 8])
    assert second.num_cached_tokens == 8
    assert bench.scheduler.pages.hit_tokens == 8
    third = bench.ask("third", [*PROMPT, 9])  # long after the others ended
    bench.finish()
    assert (third.num_cached_tokens, read(bench, "third")) == (16, [2])


@pytest.mark.parametrize(("length", "cached"), [(15, 12), (16, 12), (17, 16), (4, 0), (5, 4), (1, 0)])
def test_the_last_token_is_always_computed(length: int, cached: int) -> None:
    bench = Bench(num_blocks=20)
    bench.ask("first", PROMPT)
    bench.finish()
    again = bench.ask("again", PROMPT[:length])
    bench.finish()
    assert again.num_cached_tokens == cached
    assert read(bench, "again") == [length - cached]


def test_answers_are_found_as_well() -> None:
    """The next turn of a chat begins with the prompt and the answer of the last one."""
    bench = Bench(num_blocks=20)
    turn = bench.ask("turn", PROMPT[:6], max_tokens=9)
    bench.finish()
    more = bench.ask("more", turn.prompt_token_ids + turn.output_token_ids + [4, 4])
    bench.finish()
    assert more.num_cached_tokens == 12  # of 15 tokens the last was never computed


def test_a_page_is_found_after_its_commit_and_not_before() -> None:
    bench = Bench(num_blocks=20, max_num_batched_tokens=32)
    first = bench.ask("first", PROMPT)
    plan = bench.plan()
    assert plan is not None
    blocks = bench.scheduler.blocks
    assert blocks.find(first.page_keys) == []
    bench.scheduler.rollback(plan)  # the step did not happen
    assert blocks.find(first.page_keys) == []
    plan = bench.plan()
    assert plan is not None
    bench.scheduler.finish(first, "abort")  # it has happened, but nobody says so of this request any more
    bench.run(plan)
    assert blocks.find(first.page_keys) == []
    assert blocks.num_free == 20
    second = bench.ask("second", PROMPT)
    bench.step()
    assert blocks.find(second.page_keys) == second.block_ids[:4]
    bench.finish()


def test_in_one_step_both_compute() -> None:
    """Two equal prompts that arrive together: nothing is written yet that the second could take."""
    bench = Bench(num_blocks=20, max_num_batched_tokens=40)
    for name in ("a", "b"):
        bench.ask(name, PROMPT)
    bench.step()
    assert bench.model.plans[0].num_tokens == 34
    bench.finish()
    assert bench.scheduler.blocks.num_cached == 5  # the copies of the second were not kept


def test_a_preempted_request_finds_its_own_pages() -> None:
    bench = Bench(num_blocks=20, admission="optimistic")
    item = bench.ask("a", PROMPT, max_tokens=9, logprobs=1)
    for _ in range(4):
        bench.step()
    bench.scheduler.preempt(item)
    assert bench.scheduler.blocks.num_cached == 5
    bench.step()
    plan = bench.model.plans[-1]
    assert plan.num_tokens == 1  # 17 + 4 known tokens, five whole pages of them found
    assert item.num_cached_tokens == 0  # when it first started
    bench.finish()


@pytest.mark.parametrize("mode", MODES)
def test_cached_pages_count_as_free(mode: str) -> None:
    """All memory is cached and nothing runs: the next request starts at once, whatever it needs."""
    bench = Bench(num_blocks=8, admission=mode)
    for i in range(3):
        bench.ask(f"r{i}", prompt_of(25, i), max_tokens=4)
        bench.finish()
    assert bench.scheduler.blocks.num_cached >= 7
    big = bench.ask("big", prompt_of(28, 9), max_tokens=5)  # all eight pages
    bench.step()
    assert big.output_token_ids
    bench.finish()
    assert bench.scheduler.blocks.evictions >= 7


def test_what_others_use_costs_nothing() -> None:
    """Eight pages, six in use by the first; the second needs six too, and four of them are the same."""
    bench = Bench(num_blocks=8)
    bench.ask("first", PROMPT, max_tokens=8)
    bench.step()
    second = bench.ask("second", PROMPT, max_tokens=8)
    assert bench.scheduler.sizes.worst_pages(second) == 6
    bench.step()
    assert second.status is Status.RUNNING
    assert bench.scheduler.blocks.num_available == 0
    bench.finish()


def test_pages_that_are_found_are_not_thrown_out_to_make_room() -> None:
    """The request's own beginning is what was used longest ago, and it needs all other pages besides."""
    bench = Bench(num_blocks=6)
    bench.ask("old", PROMPT[:9], max_tokens=1)
    bench.finish()
    bench.ask("newer", prompt_of(16, 8), max_tokens=1)
    bench.finish()
    bench.scheduler.blocks.check([])
    item = bench.ask("a", PROMPT, max_tokens=8)
    bench.step()
    assert item.num_cached_tokens == 8
    bench.finish()


def test_a_waiting_request_sees_what_comes_to_be_found() -> None:
    """It is looked at when there is nothing to find, and waits; it starts beside the one it shares with."""
    bench = Bench(num_blocks=9)
    bench.ask("runs", prompt_of(9, 3), max_tokens=3)  # three pages
    first = bench.ask("first", PROMPT, max_tokens=8, ignore_eos=True)  # six
    waits = bench.ask("waits", [*PROMPT, 4, 4], max_tokens=6)  # six, of which four will be the first one's
    bench.step()
    assert (waits.status, waits.num_found) == (Status.WAITING, 0)
    while waits.status is Status.WAITING:
        bench.step()
    assert first.status is Status.RUNNING
    assert waits.block_ids[:4] == first.block_ids[:4]
    bench.finish()
    bench.scheduler.blocks.forget_content()
    assert bench.scheduler.blocks.num_free == 9


@pytest.mark.parametrize("mode", MODES)
def test_off(mode: str) -> None:
    bench = Bench(num_blocks=20, admission=mode, prefix_caching=False)
    items = [bench.ask(name, PROMPT) for name in "ab"]
    bench.finish()
    again = bench.ask("c", PROMPT)
    bench.finish()
    assert [item.num_cached_tokens for item in (*items, again)] == [0, 0, 0]
    assert again.page_keys == []
    assert (bench.scheduler.blocks.num_cached, bench.scheduler.pages.hit_tokens) == (0, 0)


def test_engines_tell_what_was_found() -> None:
    from test_engine import GREEDY, drain, make_engine

    engine = make_engine()
    engine.add_request(PROMPT, GREEDY, "a")
    drain(engine)
    engine.add_request(PROMPT, GREEDY, "b")
    last: dict[str, Any] = drain(engine)
    assert last["b"].num_cached_tokens == 16
    record = engine.last_step
    assert record is not None
    assert (record.hit_tokens, record.cached_blocks + record.free_blocks) == (16, 64)
    assert record.cached_blocks == 6  # 17 + 7 stored tokens, once
