"""Which work there is and who does it, found by one warp from context_lens on the device.

A unit is one split of one sequence, an item a unit and a kv head; items are numbered, and blocks take
numbers. Units are ordered by size, as far as a class says it: class 0 are whole splits, 1 to CUTS those that
a sequence's end cuts short, by quarters of a split, the longest first; a sequence without keys has none. So
the end is filled with small pieces of work. The order decides when something is computed, never its
bits. Knows: lengths, numbers of splits. Refuses to know: pages, heads of what, tiles.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.attention_contract import SPLIT, TILE
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import BLOCK_SIZE
from kernels_numba.ptx.arith import select_i32
from kernels_numba.ptx.atomics import ballot, popc, shfl_up_i32
from kernels_numba.ptx.ldst import ld_global_i32
from kernels_numba.ptx.shuffle import shfl_idx_i32

EACH = 4  # sequences of one lane
CHUNK = 32 * EACH  # sequences that a warp looks at together
CUTS = 4
TILE_SHIFT = TILE.bit_length() - 1


@cache
def make_schedule(window: int | None, split: int = SPLIT) -> tuple[Any, Any, Any]:
    """(first_key, count_units, locate) for a window, or None, and splits of so many keys.

    first_key(length): the first key that is seen, on numbers of a lane's own.
    count_units(lens, num_seqs, lane) -> how many units the classes up to and with 0, 1, .. CUTS have.
    locate(lens, num_seqs, lane, target, kind, chunk, before, before_all) -> (sequence, split, its number of
    splits, how many splits the sequences before it have, length, chunk, before, before_all): the target-th
    unit of class `kind`, at or after a chunk of CHUNK sequences which `before` units of it, and `before_all`
    of all classes, precede; the last three are where the next search of that class may begin.
    lens: address of i32[num_seqs]; called by whole warps.
    """
    shift, mask, quarter = split.bit_length() - 1, split - 1, (split // CUTS).bit_length() - 1
    has_window, width = window is not None, window or 0
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def first_key(length: Any) -> Any:
        if has_window:
            return select_i32(int32(length > width), int32(length - width), 0)
        return int32(0)

    @jit(device=True)
    def read(lens: Any, num_seqs: Any, lane: Any, chunk: Any, lengths: Any, whole: Any, cut: Any) -> None:
        """Of the lane's EACH sequences: length (0 for negative ones), whole splits, and the class of the cut
        one (0: there is none)."""
        for i in range(EACH):
            seq = int32(chunk + lane * EACH + i)
            inside = int32(seq < num_seqs)
            index = select_i32(inside, seq, int32(num_seqs - 1))
            lengths[i] = ld_global_i32(int64(lens + int64(index) * 4))
            whole[i] = inside
        for i in range(EACH):
            inside = int32(whole[i])
            length = select_i32(int32(lengths[i] > 0), lengths[i], 0)
            begin = int32(first_key(length) >> shift)
            lengths[i] = length
            whole[i] = select_i32(inside, int32((length >> shift) - begin), 0)
            kind = int32(CUTS - ((length & mask) >> quarter))
            cut[i] = select_i32(int32(inside & int32((length & mask) != 0)), kind, 0)

    @jit(device=True, forceinline=True)
    def with_lower(x: Any, lane: Any, delta: Any) -> Any:
        return int32(x + select_i32(int32(lane >= delta), shfl_up_i32(x, delta), 0))

    @jit(device=True, forceinline=True)
    def scan(x: Any, lane: Any) -> Any:
        """Sums up to and with each lane."""
        x = with_lower(with_lower(x, lane, 1), lane, 2)
        return with_lower(with_lower(with_lower(x, lane, 4), lane, 8), lane, 16)

    @jit(device=True, forceinline=True)
    def total(x: Any, lane: Any) -> Any:
        return shfl_idx_i32(scan(x, lane), 31)

    @jit(device=True, forceinline=True)
    def of_kind(kind: Any, whole: Any, cut: Any) -> Any:
        """How many units of a class a sequence has."""
        return select_i32(int32(kind == 0), whole, int32(cut == kind))

    @jit(device=True)
    def count_units(lens: Any, num_seqs: Any, lane: Any) -> Any:
        lengths = cuda.local.array(EACH, np.int32)
        whole = cuda.local.array(EACH, np.int32)
        cut = cuda.local.array(EACH, np.int32)
        n0, n1, n2, n3, n4 = int32(0), int32(0), int32(0), int32(0), int32(0)
        chunk = int32(0)
        while chunk < num_seqs:
            read(lens, num_seqs, lane, chunk, lengths, whole, cut)
            for i in range(EACH):
                n0 = int32(n0 + whole[i])
                n1 = int32(n1 + int32(cut[i] == 1))
                n2 = int32(n2 + int32(cut[i] == 2))
                n3 = int32(n3 + int32(cut[i] == 3))
                n4 = int32(n4 + int32(cut[i] == 4))
            chunk = int32(chunk + CHUNK)
        n1, n2 = int32(n0 + n1), int32(n0 + n1 + n2)
        n3 = int32(n2 + n3)
        n4 = int32(n3 + n4)
        return total(n0, lane), total(n1, lane), total(n2, lane), total(n3, lane), total(n4, lane)

    @jit(device=True)
    def locate(
        lens: Any, num_seqs: Any, lane: Any, target: Any, kind: Any, chunk: Any, before: Any, before_all: Any
    ) -> Any:  # fmt: skip
        lengths = cuda.local.array(EACH, np.int32)
        whole = cuda.local.array(EACH, np.int32)
        cut = cuda.local.array(EACH, np.int32)
        upto, upto_all, own, own_all = int32(0), int32(0), int32(0), int32(0)
        searching = True
        while searching:
            read(lens, num_seqs, lane, chunk, lengths, whole, cut)
            own, own_all = int32(0), int32(0)
            for i in range(EACH):
                own = int32(own + of_kind(kind, whole[i], cut[i]))
                own_all = int32(own_all + whole[i] + int32(cut[i] > 0))
            upto, upto_all = scan(own, lane), scan(own_all, lane)
            here = shfl_idx_i32(upto, 31)
            if target < before + here:
                searching = False
            else:
                before = int32(before + here)
                before_all = int32(before_all + shfl_idx_i32(upto_all, 31))
                chunk = int32(chunk + CHUNK)
        owner = popc(ballot(int32(before + upto <= target)))
        at, at_all = int32(before + upto - own), int32(before_all + upto_all - own_all)
        seq, split, splits, base, length = int32(0), int32(0), int32(0), int32(0), int32(0)
        for i in range(EACH):
            mine = of_kind(kind, whole[i], cut[i])
            both = int32(whole[i] + int32(cut[i] > 0))
            hit = int32(int32(at <= target) & int32(target < at + mine))
            place = select_i32(int32(kind == 0), int32(target - at), whole[i])
            seq = select_i32(hit, int32(chunk + lane * EACH + i), seq)
            split = select_i32(hit, int32((first_key(lengths[i]) >> shift) + place), split)
            splits = select_i32(hit, both, splits)
            base = select_i32(hit, at_all, base)
            length = select_i32(hit, lengths[i], length)
            at, at_all = int32(at + mine), int32(at_all + both)
        return (
            shfl_idx_i32(seq, owner), shfl_idx_i32(split, owner), shfl_idx_i32(splits, owner),
            shfl_idx_i32(base, owner), shfl_idx_i32(length, owner), chunk, before, before_all,
        )  # fmt: skip

    return first_key, count_units, locate


@cache
def make_class_of() -> Any:
    """f(unit, e0, e1, e2, e3) -> (class of the unit, the class's first unit), for count_units' numbers."""
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def class_of(unit: Any, e0: Any, e1: Any, e2: Any, e3: Any) -> Any:
        kind = int32(int32(unit >= e0) + int32(unit >= e1) + int32(unit >= e2) + int32(unit >= e3))
        first = select_i32(int32(kind > 0), e0, 0)
        first = select_i32(int32(kind > 1), e1, first)
        first = select_i32(int32(kind > 2), e2, first)
        return kind, select_i32(int32(kind > 3), e3, first)

    return class_of


@cache
def make_ranges(window: int | None, split: int = SPLIT) -> tuple[Any, Any]:
    """(pages_of, tiles_of) for a window, or None, and splits of so many keys.

    pages_of(tile, length) -> of the tile's pages 0 and 1, the first that is seen, and the one after the last.
    tiles_of(number, length) -> of that split's tiles, the first that is seen, and the one after the last.
    """
    has_window, tiles = window is not None, split // TILE
    first_key, _, _ = make_schedule(window, split)
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def pages_of(tile: Any, length: Any) -> Any:
        begin, end = int32(0), int32(2)
        if has_window and first_key(length) - tile * TILE >= BLOCK_SIZE:
            begin = int32(1)
        if length - tile * TILE <= BLOCK_SIZE:
            end = int32(1)
        return begin, end

    @jit(device=True, forceinline=True)
    def tiles_of(number: Any, length: Any) -> Any:
        begin, end = int32(number * tiles), int32(number * tiles + tiles)
        if has_window:
            begin = int32(max(begin, int32(first_key(length) >> TILE_SHIFT)))
        return begin, int32(min(end, int32((length + TILE - 1) >> TILE_SHIFT)))

    return pages_of, tiles_of
