"""What the four kernels of rung "warp" have in common: a thread's share of a chunk, a block's best id, who is
the last block of a row, which rows are cut.

Knows: addresses, chunks of the vocabulary, warps. Refuses to know: what a rank is for.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.sample.plain import WORDS, make_better, make_truncates
from kernels_numba.ptx.atomics import atom_add_acq_rel_i32, ballot, popc
from kernels_numba.ptx.ldst import ld_global_i32, st_global_b32
from kernels_numba.ptx.shuffle import shfl_xor_f32, shfl_xor_i32
from kernels_numba.ptx.vector import ld_global_nc_v4

WARP = 32
THREADS = 512
QUADS = 4  # of a thread: 16 logits, whose loads are in flight together
MAX_ROWS = 4096  # of a launch: each block holds the list of those that are cut
COUNTERS = 4  # a row's: blocks that are done, entries of its list
BLOCKS, GATHERED, LISTED = 0, 4, 8  # byte offsets: of survey, weigh and draw; of gather; the list's length


def chunk_of(threads: int) -> int:
    """Ids of a chunk: one block's part of a row."""
    return threads * QUADS * WORDS


@cache
def make_as_float() -> Any:
    """Device function int32 bits -> float32."""

    def as_float(bits: Any) -> Any:
        return np.uint32(bits).view(np.float32)

    return jit(device=True)(as_float)


@cache
def make_load(vector: bool) -> Any:
    """Device function (values f32[4], row's address, first id, vocab) -> None: four logits, NaN past the end.

    vector: one load of 16 bytes; the row starts at a multiple of them, and vocab is a multiple of 4.
    """
    nothing = np.float32(np.nan)
    as_float = make_as_float()

    def load_vector(values: Any, row_at: Any, first: Any, vocab: Any) -> None:
        for i in range(WORDS):
            values[i] = nothing
        if first < vocab:
            ld_global_nc_v4(values, np.int64(row_at + np.int64(first) * 4))

    def load_single(values: Any, row_at: Any, first: Any, vocab: Any) -> None:
        for i in range(WORDS):
            values[i] = nothing
            if first + i < vocab:
                values[i] = as_float(ld_global_i32(np.int64(row_at + np.int64(first + i) * 4)))

    return jit(device=True)(load_vector if vector else load_single)


@cache
def make_load_share(threads: int, vector: bool) -> Any:
    """Device function (a, b, c, d f32[4], row's address, chunk, vocab, thread) -> the first id of `a`: a
    thread's four quads of a chunk, `threads` quads apart, asked for before any is used."""
    load, step = make_load(vector), np.int32(threads * WORDS)

    def load_share(
        a: Any, b: Any, c: Any, d: Any, row_at: Any, chunk: Any, vocab: Any, thread: Any
    ) -> Any:  # fmt: skip
        first = np.int32(np.int32(np.int32(chunk * QUADS * threads) + thread) * WORDS)
        load(a, row_at, first, vocab)
        load(b, row_at, np.int32(first + step), vocab)
        load(c, row_at, np.int32(first + 2 * step), vocab)
        load(d, row_at, np.int32(first + 3 * step), vocab)
        return first

    return jit(device=True)(load_share)


@cache
def make_best_of_block(threads: int) -> Any:
    """Device function (score, id, s_score f32[warps], s_id i32[warps], thread) -> the block's best (score,
    id), in warp 0. Needs a barrier before s_score and s_id are used again."""
    better, warps = make_better(), threads // WARP
    lowest = np.float32(-np.inf)

    @jit(device=True)
    def best_of_warp(score: Any, token: Any) -> Any:
        mask = np.int32(WARP // 2)
        while mask > np.int32(0):
            other, other_id = shfl_xor_f32(score, mask), np.int32(shfl_xor_i32(token, mask))
            if better(score, token, other, other_id):
                score, token = other, other_id
            mask = np.int32(mask >> 1)
        return score, token

    @jit(device=True)
    def best_of_block(score: Any, token: Any, s_score: Any, s_id: Any, thread: Any) -> Any:
        score, token = best_of_warp(score, token)
        if thread % np.int32(WARP) == 0:
            s_score[thread // np.int32(WARP)] = score
            s_id[thread // np.int32(WARP)] = token
        cuda.syncthreads()
        if thread < np.int32(WARP):
            score, token = lowest, np.int32(-1)
            if thread < np.int32(warps):
                score, token = s_score[thread], s_id[thread]
            score, token = best_of_warp(score, token)
        return score, token

    return best_of_block, best_of_warp


@cache
def make_is_last() -> Any:
    """Device function (counter's address, count, s_flag i32[1], thread) -> whether this is the last of a
    row's `count` blocks, for a whole block.

    All that the row's blocks stored before is seen by the last one: their threads meet at a barrier, one
    counts with release, the last acquires, and its threads meet again. The counter is 0 again for the next
    launch. It begins with a barrier.
    """

    def is_last(counter: Any, count: Any, s_flag: Any, thread: Any) -> Any:
        cuda.syncthreads()
        if thread == 0:
            last = np.int32(0)
            if atom_add_acq_rel_i32(counter, 1) == count - 1:
                last = np.int32(1)
                st_global_b32(counter, 0)
            s_flag[0] = last
        cuda.syncthreads()
        return s_flag[0] == 1

    return jit(device=True)(is_last)


@cache
def make_cut_rows(threads: int) -> Any:
    """Device function (temperatures, top_ks, top_ps, num_rows, rows, vocab, s_rows u16[MAX_ROWS], s_warps
    i32[warps], thread) -> how many of a launch's rows are cut, for a whole block; s_rows lists them, in
    order. num_rows: address of the real number of rows, or 0. It ends with a barrier.
    """
    as_float, truncates, warps = make_as_float(), make_truncates(), threads // WARP

    def cut_rows(
        temperatures: Any, top_ks: Any, top_ps: Any, num_rows: Any, rows: Any, vocab: Any, s_rows: Any,
        s_warps: Any, thread: Any,
    ) -> Any:  # fmt: skip
        real = np.int32(rows)
        if num_rows != 0:
            real = np.int32(min(real, np.int32(ld_global_i32(num_rows))))
        lane, warp = np.int32(thread % np.int32(WARP)), np.int32(thread // np.int32(WARP))
        found, base = np.int32(0), np.int32(0)
        while base < real:
            row, flag = np.int32(base + thread), np.int32(0)
            if row < real:
                at = np.int64(row) * 4
                temperature = as_float(ld_global_i32(np.int64(temperatures + at)))
                top_p = as_float(ld_global_i32(np.int64(top_ps + at)))
                if truncates(temperature, np.int32(ld_global_i32(np.int64(top_ks + at))), top_p, vocab):
                    flag = np.int32(1)
            mine = ballot(flag)
            if lane == 0:
                s_warps[warp] = np.int32(popc(mine))
            cuda.syncthreads()
            before = found
            for other in range(warps):
                if other < warp:
                    before = np.int32(before + s_warps[other])
                found = np.int32(found + s_warps[other])
            if flag == 1:
                lower = np.int32(mine & np.int32((np.int64(1) << np.int64(lane)) - 1))
                s_rows[before + np.int32(popc(lower))] = np.uint16(row)
            cuda.syncthreads()
            base = np.int32(base + threads)
        return found

    return jit(device=True)(cut_rows)
