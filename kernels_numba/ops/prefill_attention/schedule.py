"""Which work there is and who does it, found by one warp from the lengths on the device.

An item is a kv head of one sequence and a tile of its rows (a row is a token's query of one of the group's
heads). Items are numbered by how many tiles of 128 keys they see, the most first, so that what is short fills
the end; blocks take numbers. The order decides when something is computed, never its bits. Knows: lengths.
Refuses to know: pages, tiles of keys, what an item costs beside their number.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from kernels_numba.attention_contract import TILE
from kernels_numba.compiler import cuda, jit
from kernels_numba.ptx.arith import select_i32
from kernels_numba.ptx.atomics import ballot, popc, shfl_up_i32
from kernels_numba.ptx.ldst import ld_global_i32
from kernels_numba.ptx.shuffle import shfl_idx_i32, shfl_xor_i32

LANES = 32
SHIFT = TILE.bit_length() - 1
TOP = 1 << 20  # more tiles of keys than any sequence has


@cache
def make_quotient() -> tuple[Any, Any]:
    """inverse(group) -> u32, and quotient(row, inverse) -> row // group, in three instructions.

    Of group up to 16 and rows from 0 up to 2^28 - 2: with 2^32 - 1 = M group + r the number M (row + 1) 2^-32
    is less than (row + 1) / group, by (row + 1) (1 + r) 2^-32 / group, which is at most 1 / group.
    """
    int32, int64, uint32 = cuda.types.int32, cuda.types.int64, cuda.types.uint32

    @jit(device=True, forceinline=True)
    def inverse(group: Any) -> Any:
        return uint32(uint32(0xFFFFFFFF) // uint32(group))

    @jit(device=True, forceinline=True)
    def quotient(row: Any, factor: Any) -> Any:
        return int32((int64(uint32(row + 1)) * int64(uint32(factor))) >> 32)

    return inverse, quotient


@cache
def make_span() -> Any:
    """span(cu, num_seqs, lane) -> (begin, end): all sequences with rows are in range(begin, end), for a whole
    warp.

    In front of a mixed step's prompts are decodes, which have no rows here, behind them what the bucket has
    beyond the step. Few sequences are not worth a look. cu never falls.
    """
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True)
    def span(cu: Any, num_seqs: Any, lane: Any) -> Any:
        begin, end = int32(0), num_seqs
        if num_seqs > LANES:
            lowest, highest = ld_global_i32(cu), ld_global_i32(int64(cu + int64(num_seqs) * 4))
            # The first offset over the lowest is in (below, begin], the first of the highest in (under, end].
            below, begin, under = int32(0), num_seqs, int32(-1)
            while begin - below > 1 or end - under > 1:
                step, stride = int32((begin - below + 31) >> 5), int32((end - under + 31) >> 5)
                at, place = int32(below + step * (lane + 1)), int32(under + stride * (lane + 1))
                at, place = (
                    select_i32(int32(at < begin), at, begin),
                    select_i32(int32(place < end), place, end),
                )
                first, second = (
                    ld_global_i32(int64(cu + int64(at) * 4)),
                    ld_global_i32(int64(cu + int64(place) * 4)),
                )
                before = popc(ballot(int32(int32(first == lowest) & int32(at < begin))))
                less = popc(ballot(int32(int32(second < highest) & int32(place < end))))
                below, under = int32(below + step * before), int32(under + stride * less)
                begin = int32(min(begin, int32(below + step)))
                end = int32(min(end, int32(under + stride)))
            begin = int32(begin - 1)
            if begin >= end:
                begin, end = int32(0), int32(1)  # no rows at all
        return begin, end

    return span


@cache
def make_schedule(tile_rows: int) -> Any:
    """locate(cu, lens, begin, end, heads, group, lane, target, level, chunk, before, lower) -> (found, seq,
    head, first row, rows, first token, start, level, chunk, before, lower), for a whole warp.

    The target-th item, searched from (level, chunk, before, lower) on: items of `level` tiles of keys in
    sequences from `chunk` on have the numbers from `before`; lower is the next level met so far. Searches of
    one block begin at (TOP, begin, 0, -1), and each goes on where the last ended. found is 0 behind the last
    item. rows: of the sequence; first token: of it, in q; start: its position. cu, lens: addresses of
    i32[num_seqs + 1] and i32[num_seqs]; begin, end: of the sequences that are looked at (make_span).
    """
    int32, int64, uint32 = cuda.types.int32, cuda.types.int64, cuda.types.uint32

    @jit(device=True, forceinline=True)
    def with_lower(x: Any, lane: Any, delta: Any) -> Any:
        return int32(x + select_i32(int32(lane >= delta), shfl_up_i32(x, delta), 0))

    @jit(device=True, forceinline=True)
    def scan(x: Any, lane: Any) -> Any:
        """Sums up to and with each lane."""
        x = with_lower(with_lower(x, lane, 1), lane, 2)
        return with_lower(with_lower(with_lower(x, lane, 4), lane, 8), lane, 16)

    @jit(device=True, forceinline=True)
    def largest(x: Any) -> Any:
        for turn in range(5):
            other = shfl_xor_i32(x, int32(1 << turn))
            x = select_i32(int32(other > x), other, x)
        return x

    @jit(device=True, forceinline=True)
    def tiles_upto(level: Any, tiles: Any, start: Any, length: Any, group: Any) -> Any:
        """How many of a sequence's tiles see at most `level` tiles of keys: the first ones."""
        keys = int32(level << SHIFT)
        rows = int32(group * (keys - start))  # these see no more than `keys`
        rows = select_i32(int32(rows > 0), rows, 0)
        some = int32(uint32(rows) // uint32(tile_rows))
        return select_i32(int32(level < 0), 0, select_i32(int32(keys >= length), tiles, some))

    @jit(device=True)
    def locate(
        cu: Any, lens: Any, begin: Any, end: Any, heads: Any, group: Any, lane: Any, target: Any,
        level: Any, chunk: Any, before: Any, lower: Any,
    ) -> Any:  # fmt: skip
        found = int32(-1)
        tokens, length, first, mine, below, upto = int32(0), int32(0), int32(0), int32(0), int32(0), int32(0)
        while found < 0:
            seq = int32(chunk + lane)
            inside = int32(seq < end)
            index = select_i32(inside, seq, int32(end - 1))
            first = ld_global_i32(int64(cu + int64(index) * 4))
            tokens = int32(ld_global_i32(int64(cu + int64(index) * 4 + 4)) - first)
            length = ld_global_i32(int64(lens + int64(index) * 4))
            tokens = select_i32(int32(inside & int32(tokens > 0)), tokens, 0)
            start, rows = int32(length - tokens), int32(tokens * group)
            tiles = int32(uint32(rows + (tile_rows - 1)) // uint32(tile_rows))
            below = tiles_upto(int32(level - 1), tiles, start, length, group)
            mine = int32(heads * (tiles_upto(level, tiles, start, length, group) - below))
            upto = scan(mine, lane)
            # The highest level under this one.
            last = int32(below * tile_rows)
            last = select_i32(int32(last < rows), last, rows)
            limit = int32(start + int32(uint32(last + group - 1) // uint32(group)))
            limit = select_i32(int32(limit > 0), int32((limit + (TILE - 1)) >> SHIFT), 0)
            best = largest(select_i32(int32(below > 0), limit, -1))
            lower = select_i32(int32(best > lower), best, lower)
            here = shfl_idx_i32(upto, 31)
            if target < before + here:
                found = int32(1)
            else:
                before, chunk = int32(before + here), int32(chunk + LANES)
                if chunk >= end:
                    level, chunk, lower = lower, begin, int32(-1)
                    if level < 0:
                        found = int32(0)
        owner = int32(popc(ballot(int32(before + upto <= target))) & 31)
        rest = int32(target - before - shfl_idx_i32(int32(upto - mine), owner))
        each = uint32(uint32(shfl_idx_i32(mine, owner)) // uint32(heads))
        each = uint32(max(each, uint32(1)))
        head = int32(uint32(rest) // each)
        tile = int32(shfl_idx_i32(below, owner) + rest - head * int32(each))
        tokens, length = shfl_idx_i32(tokens, owner), shfl_idx_i32(length, owner)
        return (
            found, int32(chunk + owner), head, int32(tile * tile_rows), int32(tokens * group),
            shfl_idx_i32(first, owner), int32(length - tokens), level, chunk, before, lower,
        )  # fmt: skip

    return locate
