"""The page allocator: no page lost, none given out twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharp.blocks import BlockAllocator


def test_allocate_and_free() -> None:
    blocks = BlockAllocator(4)
    first = blocks.allocate(3)
    assert len(set(first)) == 3
    assert set(first) <= set(range(4))
    assert (blocks.num_free, blocks.num_used, blocks.num_blocks) == (1, 3, 4)
    blocks.free(first[:1])
    blocks.check()
    assert blocks.num_free == 2
    assert blocks.allocate(0) == []


def test_too_many_changes_nothing() -> None:
    blocks = BlockAllocator(3)
    blocks.allocate(2)
    with pytest.raises(MemoryError, match=r"2 KV pages needed, 1 of 3 free and 0 cached"):
        blocks.allocate(2)
    assert blocks.num_free == 1
    blocks.check()


@pytest.mark.parametrize("pages", [[3], [-1], [0, 3], [0, 0], [99]])
def test_foreign_and_double_free_change_nothing(pages: list[int]) -> None:
    blocks = BlockAllocator(4)
    used = blocks.allocate(1)
    assert used == [0]
    with pytest.raises(ValueError):
        blocks.free(pages)
    assert blocks.num_used == 1
    blocks.check()
    blocks.free(used)
    with pytest.raises(ValueError, match="not in use"):
        blocks.free(used)


@pytest.mark.parametrize("count", [0, -1])
def test_no_pages_at_all(count: int) -> None:
    with pytest.raises(ValueError, match=str(count)):
        BlockAllocator(count)


def test_negative_count() -> None:
    with pytest.raises(ValueError, match="-1"):
        BlockAllocator(2).allocate(-1)


def test_check_sees_damage() -> None:
    blocks = BlockAllocator(3)
    page = blocks.allocate(1)[0]
    blocks._free.append(page)  # given back behind the allocator's back
    with pytest.raises(AssertionError):
        blocks.check()
    blocks._free.pop()
    blocks._references.clear()  # forgotten
    with pytest.raises(AssertionError, match="lost"):
        blocks.check()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_random_histories(moves: list[tuple[bool, int]]) -> None:
    blocks, owned = BlockAllocator(10), []
    for allocate, count in moves:
        if allocate and count <= blocks.num_free:
            pages = blocks.allocate(count)
            assert len(pages) == count
            assert not {p for own in owned for p in own} & set(pages), "a page with two owners"
            owned.append(pages)
        elif not allocate and owned:
            blocks.free(owned.pop(count % len(owned)))
        blocks.check()
        assert blocks.num_used == sum(map(len, owned))
        assert blocks.num_free + blocks.num_used == 10
