"""Wrong prefix caches and forks: the random workloads, or the test that is named, must see each of these."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import test_forks
import test_prefix_cache
from random_workloads import run_workloads

from sharp import blocks, pagebook, prefix
from sharp.blocks import BlockAllocator
from sharp.forks import Forks
from sharp.pagebook import PageBook
from sharp.request import Request
from sharp.running import RunningTable
from sharp.scheduler import Scheduler

Patch = Callable[[pytest.MonkeyPatch], None]
# Most that a mutant may need to be seen; the dearest need some 200. Which ones are drawn depends on the
# modules that are loaded (hypothesis takes constants from them), so it must be far from the mean.
WORKLOADS = 2000


def key_without_parent(patch: pytest.MonkeyPatch) -> None:
    def extend(keys: list[bytes], token_ids: list[int], start: int, block_size: int) -> None:
        for at in range(0, len(token_ids) // block_size * block_size, block_size):
            own: list[bytes] = []
            prefix.extend_keys(own, token_ids[at : at + block_size], 0, block_size)
            keys += own

    patch.setattr(pagebook, "extend_keys", extend)


def key_of_the_first_token(patch: pytest.MonkeyPatch) -> None:
    def extend(keys: list[bytes], token_ids: list[int], start: int, block_size: int) -> None:
        firsts = [token_ids[i // block_size * block_size] for i in range(len(token_ids))]
        prefix.extend_keys(keys, firsts, start, block_size)

    patch.setattr(pagebook, "extend_keys", extend)


def hit_not_capped(patch: pytest.MonkeyPatch) -> None:
    known = Request.num_tokens.fget  # type: ignore[attr-defined]
    start = PageBook.start

    def uncapped(self: PageBook, request: Request) -> bool:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Request, "num_tokens", property(lambda item: known(item) + 1))
            return start(self, request)

    patch.setattr(PageBook, "start", uncapped)
    patch.setattr(RunningTable, "check", lambda self: None)


def published_when_planned(patch: pytest.MonkeyPatch) -> None:
    plan = Scheduler.plan

    def early(self: Scheduler) -> Any:
        made = plan(self)
        if made is not None:
            self.pages.publish(self.flights._flights[-1].rows, made.context_lens)
        return made

    patch.setattr(Scheduler, "plan", early)


def reference_leaks(patch: pytest.MonkeyPatch) -> None:
    share = BlockAllocator.share
    patch.setattr(BlockAllocator, "share", lambda self, pages: (share(self, pages), share(self, pages)))
    patch.setattr(BlockAllocator, "check", lambda self, owned=None: None)


def hit_without_reference(patch: pytest.MonkeyPatch) -> None:
    def share(self: BlockAllocator, pages: list[int]) -> None:
        for page in pages:
            if page in self._cached:
                del self._cached[page]
                self._references[page] = 1

    patch.setattr(BlockAllocator, "share", share)
    patch.setattr(BlockAllocator, "check", lambda self, owned=None: None)


def used_page_thrown_out(patch: pytest.MonkeyPatch) -> None:
    allocate = BlockAllocator.allocate

    def ruthless(self: BlockAllocator, count: int) -> list[int]:
        while len(self._free) < count and self._key_of:
            page = next(iter(self._key_of))
            del self._page_of[self._key_of.pop(page)]
            self._cached.pop(page, None)
            self._references.pop(page, None)
            self._free.append(page)
            self.evictions += 1
        return allocate(self, count)

    patch.setattr(BlockAllocator, "allocate", ruthless)
    patch.setattr(BlockAllocator, "check", lambda self, owned=None: None)


def key_outlives_its_page(patch: pytest.MonkeyPatch) -> None:
    allocate = BlockAllocator.allocate

    def forgetful(self: BlockAllocator, count: int) -> list[int]:
        kept = dict(self._page_of)
        pages = allocate(self, count)
        self._page_of.update(kept)
        return pages

    patch.setattr(BlockAllocator, "allocate", forgetful)
    patch.setattr(BlockAllocator, "check", lambda self, owned=None: None)


def hits_are_free_of_charge(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockAllocator, "count_cached", lambda self, pages: 0)


def cached_pages_do_not_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockAllocator, "num_available", property(lambda self: self.num_free))


def last_page_shared(patch: pytest.MonkeyPatch) -> None:
    fork = Forks.fork

    def all_shared(self: Forks, first: Request) -> None:
        samples, page = first.samples[:], first.block_ids[self.sizes.shared_pages(first)]
        fork(self, first)
        for sample in samples:
            own = sample.block_ids[self.sizes.shared_pages(first)]
            self.forget([own])
            self.blocks.share([page])
            self.blocks.free([own])
            place = sample.block_ids.index(own)
            sample.block_ids[place] = page
            self.table.pages[sample.row, place] = page

    patch.setattr(Forks, "fork", all_shared)


def nothing_copied(patch: pytest.MonkeyPatch) -> None:
    take = Forks.take
    patch.setattr(Forks, "take", lambda self: take(self)[:0])


def copied_once_though_rolled_back(patch: pytest.MonkeyPatch) -> None:
    rollback = Scheduler.rollback

    def hasty(self: Scheduler, plan: Any) -> Any:
        requests = rollback(self, plan)
        self.pages.forks.made(plan.page_copies)
        return requests

    patch.setattr(Scheduler, "rollback", hasty)


def source_not_held(patch: pytest.MonkeyPatch) -> None:
    fork = Forks.fork

    def careless(self: Forks, first: Request) -> None:
        before = dict(self.copies)
        fork(self, first)
        for page, source in self.copies.items():
            if page not in before:
                self.blocks.free([source])

    def gone(self: Forks, pages: list[int]) -> None:
        for page in pages:
            self.copies.pop(page, None)

    patch.setattr(Forks, "fork", careless)
    patch.setattr(Forks, "forget", gone)
    patch.setattr(BlockAllocator, "check", lambda self, owned=None: None)


def copies_outlive_their_samples(patch: pytest.MonkeyPatch) -> None:
    release = PageBook.release

    def keep(self: PageBook, request: Request) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Forks, "forget", lambda self, pages: None)
            release(self, request)

    patch.setattr(PageBook, "release", keep)


def booked_pages_leak(patch: pytest.MonkeyPatch) -> None:
    release = PageBook.release

    def leak(self: PageBook, request: Request) -> None:
        request.booked = []
        release(self, request)

    patch.setattr(PageBook, "release", leak)


def seats_not_kept(patch: pytest.MonkeyPatch) -> None:
    start = PageBook.start

    def crowd(self: PageBook, request: Request) -> bool:
        most, self.max_num_seqs = self.max_num_seqs, 99
        try:
            return start(self, request)
        finally:
            self.max_num_seqs = most

    patch.setattr(PageBook, "start", crowd)


def samples_lost_at_preemption(patch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler.preempt

    def lose(self: Scheduler, request: Request) -> None:
        preempt(self, request)
        request.samples = []

    patch.setattr(Scheduler, "preempt", lose)


def latest_goes_first(patch: pytest.MonkeyPatch) -> None:
    class Reversed(OrderedDict[int, None]):
        def popitem(self, last: bool = True) -> tuple[int, None]:
            return super().popitem(not last)

    patch.setattr(blocks, "OrderedDict", Reversed)


def first_page_goes_first(patch: pytest.MonkeyPatch) -> None:
    free = BlockAllocator.free
    patch.setattr(BlockAllocator, "free", lambda self, pages: free(self, pages[::-1]))


def ids_cut_to_a_byte(patch: pytest.MonkeyPatch) -> None:
    def extend(keys: list[bytes], token_ids: list[int], start: int, block_size: int) -> None:
        prefix.extend_keys(keys, [token & 255 for token in token_ids], start, block_size)

    patch.setattr(test_prefix_cache, "extend_keys", extend)


def never_looked_for_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageBook, "_most_found", lambda self, request: request.num_found)


MUTANTS: tuple[Patch, ...] = (
    key_without_parent,
    key_of_the_first_token,
    hit_not_capped,
    published_when_planned,
    reference_leaks,
    hit_without_reference,
    used_page_thrown_out,
    key_outlives_its_page,
    hits_are_free_of_charge,
    cached_pages_do_not_count,
    last_page_shared,
    nothing_copied,
    booked_pages_leak,
    seats_not_kept,
)


RARE: dict[Patch, Callable[[], None]] = {
    copied_once_though_rolled_back: test_forks.test_a_copy_is_made_again_after_a_rollback,
    source_not_held: test_forks.test_a_copy_is_made_again_after_a_rollback,
    copies_outlive_their_samples: test_forks.test_cancelled_samples_leave_nothing,
    samples_lost_at_preemption: partial(
        test_forks.test_cancel_and_preempt_at_any_point, "reading", "reserve"
    ),
    latest_goes_first: test_prefix_cache.test_what_was_used_longest_ago_goes_first,
    first_page_goes_first: test_prefix_cache.test_published_pages_are_kept_until_their_room_is_needed,
    never_looked_for_again: test_prefix_cache.test_a_waiting_request_sees_what_comes_to_be_found,
    ids_cut_to_a_byte: test_prefix_cache.test_token_ids_are_not_cut_to_bytes,
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_workloads_see(mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ValueError, MemoryError, RuntimeError, KeyError, IndexError)):
        run_workloads(WORKLOADS, same=True)


@pytest.mark.parametrize("mutant", RARE, ids=lambda mutant: mutant.__name__)
def test_a_test_of_its_own_sees(mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    RARE[mutant]()
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        RARE[mutant]()
