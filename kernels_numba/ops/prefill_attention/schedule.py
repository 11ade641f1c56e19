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
def make_schedule(tile_rows: int) -> Any:
    """locate(cu, lens, num_seqs, heads, group, lane, target, level, chunk, before, lower) -> (found, seq,
    head, first row, rows, first token, start, level, chunk, before, lower), for a whole warp.

    The target-th item, searched from (level, chunk, before, lower) on: items of `level` tiles of keys in
    sequences from `chunk` on have the numbers from `before`; lower is the next level met so far. Searches of
    one block begin at (TOP, 0, 0, -1), and each goes on where the last ended. found is 0 behind the last
    item. rows: of the sequence; first token: of it, in q; start: its position. cu, lens: addresses of
    i32[num_seqs + 1] and i32[num_seqs].
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
        cu: Any, lens: Any, num_seqs: Any, heads: Any, group: Any, lane: Any, target: Any, level: Any,
        chunk: Any, before: Any, lower: Any,
    ) -> Any:  # fmt: skip
        found = int32(-1)
        tokens, length, first, mine, below, upto = int32(0), int32(0), int32(0), int32(0), int32(0), int32(0)
        while found < 0:
            seq = int32(chunk + lane)
            inside = int32(seq < num_seqs)
            index = select_i32(inside, seq, int32(num_seqs - 1))
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
                if chunk >= num_seqs:
                    level, chunk, lower = lower, int32(0), int32(-1)
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
