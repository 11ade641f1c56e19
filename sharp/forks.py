"""Forks: n samples of one prompt, which is read once. Whole pages are shared; the last one is copied.

The first sample reads the prompt. When that is committed, each of the others starts beside it: with the
whole pages before the prompt's last token, by reference, a copy of the page that this token is in, and the
token itself still to compute, so that its first step is its own. Nobody writes into a shared page: writing
begins at the last token. Copies are part of the next plan and happen on the device before anything else of
that step. By then the first sample may be a token ahead, in a step that was in flight: the copied page has
that token too, behind all that the other reads before it writes there itself.
Refuses to know when to fork, and how bytes are moved.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sharp.blocks import BlockAllocator
from sharp.request import Request, Status
from sharp.running import RunningTable
from sharp.sizes import Sizes


class Forks:
    """Starts samples in `table` with pages of `blocks`, and remembers what is still to be copied."""

    def __init__(self, blocks: BlockAllocator, table: RunningTable, sizes: Sizes) -> None:
        self.blocks, self.table, self.sizes = blocks, table, sizes
        self.forked = 0  # since the start
        # Destination -> source. A source has a reference for each copy: the owner may end before it is made,
        # and a step that was rolled back makes it again.
        self.copies: dict[int, int] = {}
        self._flying: set[int] = set()  # destinations whose copies are part of a step in flight

    def fork(self, first: Request) -> None:
        """Start the other samples of a request whose prompt is in its pages."""
        shared, prompt = self.sizes.shared_pages(first), len(first.prompt_token_ids)
        each = self.sizes.booking(first)[1]
        for sample in first.samples:
            own, first.booked = first.booked[:each], first.booked[each:]
            self.blocks.share(first.block_ids[:shared])
            sample.block_ids = first.block_ids[:shared] + own
            if (prompt - 1) % self.sizes.block_size:
                self.blocks.share(first.block_ids[shared : shared + 1])
                self.copies[own[0]] = first.block_ids[shared]
            sample.page_keys, sample.first = first.page_keys[:], None
            sample.status = Status.RUNNING
            self.table.add(sample, self.sizes.worst_tokens(sample), computed=prompt - 1, published=shared)
            self.forked += 1
        self.blocks.free(first.booked)  # of samples that ended before they began
        first.booked, first.samples = [], []
        self.table.promise(first)

    def take(self) -> npt.NDArray[np.int32]:
        """i32[C, 2]: (source, destination) of the copies that no plan has yet; the next one has them now."""
        if len(self.copies) == len(self._flying):
            return np.empty((0, 2), np.int32)
        pairs = [(source, to) for to, source in self.copies.items() if to not in self._flying]
        self._flying.update(to for _, to in pairs)
        return np.array(pairs, np.int32)

    def forget(self, pages: list[int]) -> None:
        """No copies to these pages: their owner has gone, or they are made."""
        for page in pages:
            if page in self.copies:
                self.blocks.free([self.copies.pop(page)])
                self._flying.discard(page)

    def made(self, copies: npt.NDArray[np.int32]) -> None:
        """The copies of a plan are made: it was committed."""
        if len(copies):
            self.forget([to for source, to in copies.tolist() if self.copies.get(to) == source])

    def undo(self, copies: npt.NDArray[np.int32]) -> None:
        """The copies of a plan are not made: the next one has them again."""
        self._flying.difference_update(copies[:, 1].tolist())
