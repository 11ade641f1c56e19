"""PageBook: the pages of running requests: booked, found in the prefix cache, grown, given back.

Whole pages that another sequence with the same beginning has computed are taken instead of computed again
(prefix.py says when two beginnings are the same), and samples share those of their prompt (forks.py). A page
can be found once the step that filled it is committed, never from its plan on: a step may not happen.
Refuses to know queues, budgets and who is preempted.
"""

from __future__ import annotations

from sharp.batching import Rows
from sharp.blocks import BlockAllocator
from sharp.config import EngineConfig
from sharp.forks import Forks
from sharp.prefix import extend_keys
from sharp.request import Request, Status
from sharp.running import RunningTable
from sharp.sizes import Sizes

# Optimistic admission leaves 1 % of the pages free, at least one: those that run grow by a page every
# block_size steps, and a newcomer that took the last page would be preempted as soon as it had been read.
WATERMARK = 0.01


class PageBook:
    """Moves pages between `blocks` and the requests of `table`."""

    def __init__(
        self, config: EngineConfig, sizes: Sizes, blocks: BlockAllocator, table: RunningTable
    ) -> None:
        self.block_size, self.max_num_seqs = config.block_size, config.max_num_seqs
        self.prefix_caching = config.prefix_caching
        self.sizes, self.blocks, self.table = sizes, blocks, table
        self.forks = Forks(blocks, table, sizes)
        self.watermark = max(1, int(WATERMARK * blocks.num_blocks))  # pages
        self.hit_tokens = 0  # that did not have to be computed, since the start

    def extend_keys(self, request: Request) -> None:
        """Keys for all whole pages of its known tokens; at the door and as pages fill, so not in plan()."""
        if self.prefix_caching:
            start = len(request.page_keys) * self.block_size
            tokens = request.known_tokens(start, request.num_tokens)
            extend_keys(request.page_keys, tokens, start, self.block_size)

    def start(self, request: Request) -> bool:
        """Book the pages of a waiting request and let it run, if there are pages and seats for it now.

        The watermark is hysteresis too: what was preempted does not come back to the very page that it was
        preempted for. Pages that another sequence uses already cost nothing; one token at least is computed.
        """
        if len(self.table) + self.table.promised + 1 + len(request.samples) > self.max_num_seqs:
            return False
        own, each = self.sizes.booking(request)
        extra = each * len(request.samples)
        # Alone, everything is free or cached and it always fits.
        spare = 0 if self.sizes.reserve or not len(self.table) else self.watermark
        if own - self._most_found(request) + extra + spare > self.blocks.num_available:
            return False
        hits = self.blocks.find(self._useful_keys(request))
        request.num_found = len(hits)
        need = own - len(hits) + extra
        if need + self.blocks.count_cached(hits) + spare > self.blocks.num_available:
            return False
        self.blocks.share(hits)  # first: allocating may throw out what nobody uses
        pages = self.blocks.allocate(need)
        request.booked, request.block_ids = pages[:extra], hits + pages[extra:]
        computed = len(hits) * self.block_size
        self.hit_tokens += computed
        if request.num_preemptions == 0:
            request.num_cached_tokens = computed
        request.status = Status.RUNNING
        limit = self.sizes.worst_tokens(request)
        self.table.add(request, limit, computed=computed, published=len(hits))
        return True

    def _useful_keys(self, request: Request) -> list[bytes]:
        return request.page_keys[
            : (request.num_tokens - 1) // self.block_size
        ]  # one token is computed at least

    def _most_found(self, request: Request) -> int:
        """Pages that could be found, at most, without looking for all of them: no more than the last time, as
        long as the next one is not there. A queue that waits for pages is looked through in every step."""
        keys = self._useful_keys(request)
        last = request.num_found
        return last if last < len(keys) and not self.blocks.holds(keys[last]) else len(keys)

    def grow(self, request: Request) -> bool:
        """One more page; False if there is none."""
        if not self.blocks.num_available:
            return False
        self.table.add_pages(request, self.blocks.allocate(1))
        return True

    def release(self, request: Request) -> None:
        """Take all pages from a running request, and its row."""
        self.table.remove(request)
        self.forks.forget(request.block_ids)
        self.blocks.free(request.block_ids + request.booked)
        request.block_ids, request.booked = [], []

    def publish(self, planned: Rows, context_lens: Rows) -> None:
        """Let the pages that a step has filled be found: they are written now, and will not change.

        planned: rows of the step that still run, context_lens: tokens in their pages after it. A step in
        flight behind it has a token more in a page of its own; whether that one counts is not known yet.
        """
        if not self.prefix_caching:
            return
        table, whole = self.table, context_lens // self.block_size
        filled = (whole > table.published[planned]).nonzero()[0]
        for row, stop in zip(planned[filled].tolist(), whole[filled].tolist(), strict=True):
            request: Request = table.request[row]
            if len(request.page_keys) < stop:
                self.extend_keys(request)
            for page in range(int(table.published[row]), stop):
                self.blocks.publish(request.block_ids[page], request.page_keys[page])
            table.published[row] = stop

    def num_written(self) -> int:
        """Pages in use that have content, each once; booked ones may be empty."""
        each = int((-(-self.table.computed[self.table.rows] // self.block_size)).sum())
        return each - (self.blocks.num_shared - len(self.forks.copies))

    def check(self) -> None:
        """Raise AssertionError unless pages and what runs agree."""
        running = self.table.requests()
        owned = [page for request in running for page in request.block_ids + request.booked]
        self.blocks.check([*owned, *self.forks.copies.values()])
        for request in running:
            name, computed = request.request_id, request.num_computed_tokens
            assert len(request.block_ids) * self.block_size >= computed, f"{name}: pages too few"
            assert self.table.published[request.row] * self.block_size <= computed, f"{name}: published early"
