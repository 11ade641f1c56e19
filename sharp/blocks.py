"""BlockAllocator: which KV pages are free, in use, or kept for their content. Knows page numbers and opaque
keys; refuses to know what is in a page, how a key is made, and whose a page is."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockAllocator:
    """Hands out page ids 0..num_blocks - 1. A page is in use while it has references; one that was published
    under a key is kept without any, until its room is needed: then the one that was used longest ago goes.

    Of empty pages the one freed last is reused first (it is the warmest).
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        self.num_blocks = num_blocks
        self.evictions = 0  # since the start
        self.num_shared = 0  # references beyond the first of each page
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references: dict[int, int] = {}  # of pages in use
        self._cached: OrderedDict[int, None] = OrderedDict()  # without references, longest unused first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Empty pages."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that nobody uses and that keep their content until they are needed."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return len(self._references)

    @property
    def num_available(self) -> int:
        """Pages that allocate() can give: empty and cached ones."""
        return len(self._free) + len(self._cached)

    def references(self) -> list[int]:
        """Of every page: how many use it; 0 for an empty one, -1 for a cached one."""
        counts = [0] * self.num_blocks
        for page, count in self._references.items():
            counts[page] = count
        for page in self._cached:
            counts[page] = -1
        return counts

    def allocate(self, count: int) -> list[int]:
        """`count` pages at once, or none: raises MemoryError naming needed and available."""
        if count < 0:
            raise ValueError(f"cannot allocate {count} pages")
        if count > self.num_available:
            raise MemoryError(
                f"{count} KV pages needed, {len(self._free)} of {self.num_blocks} free and "
                f"{len(self._cached)} cached"
            )
        while len(self._free) < count:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            self._free.append(page)
            self.evictions += 1
        pages = [self._free.pop() for _ in range(count)]
        self._references.update(dict.fromkeys(pages, 1))
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each page, in use or cached. Raises ValueError for an empty one."""
        for page in pages:
            if page in self._references:
                self._references[page] += 1
                self.num_shared += 1
            elif page in self._cached:
                del self._cached[page]
                self._references[page] = 1
            else:
                raise ValueError(f"page {page} is neither in use nor cached")

    def free(self, pages: Sequence[int]) -> None:
        """Give back one reference to each page; the last one leaves it cached if it has a key, else empty.

        The first pages of a sequence count as used last: they are of use without the later ones, never the
        other way round. Raises ValueError, changing nothing, for a page that is not in use or given twice.
        """
        if len(set(pages)) != len(pages):
            raise ValueError(f"a page is given back twice in {pages}")
        foreign = [page for page in pages if page not in self._references]
        if foreign:
            raise ValueError(f"pages {foreign} are not in use")
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                self.num_shared -= 1
                continue
            del self._references[page]
            if page in self._key_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    # Content ------------------------------------------------------------------------------------------

    def publish(self, page: int, key: bytes) -> None:
        """Let a page in use be found under `key`, unless another page is found under it already. Raises
        ValueError for a page that is not in use or has a key."""
        if page not in self._references or page in self._key_of:
            raise ValueError(f"page {page} is not in use, or published already")
        if key not in self._page_of:
            self._page_of[key], self._key_of[page] = page, key

    def unpublish(self, pages: Iterable[int]) -> None:
        """Let pages in use be found no more. Raises ValueError for a page that is not in use."""
        for page in pages:
            if page not in self._references:
                raise ValueError(f"page {page} is not in use")
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest run of `keys` from the first on that are all there."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def holds(self, key: bytes) -> bool:
        """Whether a page would be found under the key."""
        return key in self._page_of

    def forget_content(self) -> None:
        """Empty all cached pages. For who changes what K and V depend on: another kernel, other weights.

        Raises RuntimeError while pages are in use: what is computed from them is made of both.
        """
        if self._references:
            raise RuntimeError(f"{len(self._references)} pages are in use: let their requests end first")
        self._free.extend(self._cached)
        self._cached.clear()
        self._page_of.clear()
        self._key_of.clear()

    def count_cached(self, pages: Iterable[int]) -> int:
        """How many of the pages have no reference: sharing them takes them from what is available."""
        return sum(page in self._cached for page in pages)

    def check(self, owned: Iterable[int] | None = None) -> None:
        """Raise AssertionError unless every page is free, used or cached, exactly once, and keys and pages
        match. owned: all references there should be, a page as often as it has any."""
        free, used, cached = set(self._free), set(self._references), set(self._cached)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert not free & used, f"pages {sorted(free & used)} are free and used"
        assert not cached & (free | used), (
            f"pages {sorted(cached & (free | used))} are cached and free or used"
        )
        assert len(free) + len(used) + len(cached) == self.num_blocks, "pages are lost"
        assert {page: key for key, page in self._page_of.items()} == self._key_of, "keys and pages disagree"
        assert cached <= set(self._key_of), "a cached page has no key"
        assert not free & set(self._key_of), "an empty page has a key"
        assert min(self._references.values(), default=1) >= 1, "a page in use has no reference"
        assert self.num_shared == sum(self._references.values()) - len(used), "shared references"
        if owned is not None:
            assert Counter(owned) == self._references, "references are not those of running requests"
