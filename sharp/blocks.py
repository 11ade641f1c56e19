"""BlockAllocator: which KV pages are free. Knows page numbers; refuses to know what is in them or whose they
are."""

from __future__ import annotations


class BlockAllocator:
    """Hands out page ids 0..num_blocks - 1; the page freed last is reused first (it is the warmest)."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def allocate(self, count: int) -> list[int]:
        """`count` pages at once, or none: raises MemoryError naming needed and free."""
        if count < 0:
            raise ValueError(f"cannot allocate {count} pages")
        if count > len(self._free):
            raise MemoryError(f"{count} KV pages needed, {len(self._free)} of {self.num_blocks} free")
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """Give pages back. Raises ValueError, changing nothing, for a page that is not in use or given
        twice."""
        if len(set(pages)) != len(pages):
            raise ValueError(f"a page is given back twice in {pages}")
        foreign = [page for page in pages if page not in self._used]
        if foreign:
            raise ValueError(f"pages {foreign} are not in use")
        self._used.difference_update(pages)
        self._free.extend(reversed(pages))

    def check(self) -> None:
        """Raise AssertionError unless every page is either free or used, exactly once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert not free & self._used, f"pages {sorted(free & self._used)} are free and used"
        assert len(free) + len(self._used) == self.num_blocks, "pages are lost"
