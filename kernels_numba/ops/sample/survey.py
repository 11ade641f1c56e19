"""Rung "warp", first and last kernel: the best id of every row, and a draw from what a row's cut leaves.

Knows: chunks and their best ids. Refuses to know: how the cut was found (cut.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.sample.nucleus import LOG2_E
from kernels_numba.ops.sample.plain import WORDS, make_better, make_consider, make_truncates
from kernels_numba.ops.sample.warp_tools import (
    BLOCKS,
    COUNTERS,
    MAX_ROWS,
    WARP,
    make_as_float,
    make_best_of_block,
    make_cut_rows,
    make_is_last,
    make_load_share,
)
from kernels_numba.ptx.ldst import ld_global_i32, st_global_b32, st_global_f32

SURVEY_SIGNATURE = "void(" + ", ".join(["int64"] * 11 + ["int32"] * 3) + ")"
DRAW_SIGNATURE = "void(" + ", ".join(["int64"] * 12 + ["int32"] * 4) + ")"


@cache
def _make_walk(threads: int, vector: bool) -> Any:
    """Device function: a thread's best (score, id) of its block's chunk; arguments as make_consider's."""
    load_share, consider, step = make_load_share(threads, vector), make_consider(), np.int32(threads * WORDS)

    def walk(
        row_at: Any, chunk: Any, vocab: Any, noise: Any, cut: Any, bound: Any, best: Any, slope: Any,
        temperature: Any, key_low: Any, key_high: Any, output_index: Any, thread: Any,
    ) -> Any:  # fmt: skip
        words = cuda.local.array(WORDS, np.uint32)
        a = cuda.local.array(WORDS, np.float32)
        b = cuda.local.array(WORDS, np.float32)
        c = cuda.local.array(WORDS, np.float32)
        d = cuda.local.array(WORDS, np.float32)
        first = load_share(a, b, c, d, row_at, chunk, vocab, thread)
        second, third, fourth = np.int32(first + step), np.int32(first + 2 * step), np.int32(first + 3 * step)
        score, token = np.float32(-np.inf), np.int32(-1)
        score, token = consider(
            a, words, first, noise, cut, bound, best, slope, temperature, key_low, key_high, output_index,
            score, token,
        )  # fmt: skip
        score, token = consider(
            b, words, second, noise, cut, bound, best, slope, temperature, key_low, key_high, output_index,
            score, token,
        )  # fmt: skip
        score, token = consider(
            c, words, third, noise, cut, bound, best, slope, temperature, key_low, key_high, output_index,
            score, token,
        )  # fmt: skip
        return consider(
            d, words, fourth, noise, cut, bound, best, slope, temperature, key_low, key_high, output_index,
            score, token,
        )  # fmt: skip

    return jit(device=True)(walk)


@cache
def _make_settle(threads: int) -> Any:
    """Device function: hands a block's best (score, id) in; the row's last block stores the row's best.

    Arguments: out, best (or 0), partial, counters, addresses of the row's own; score, id; chunk, chunks;
    s_score, s_id, s_flag; thread. The best of chunks is folded by the last block's first warp: the better of
    two ids does not depend on who is asked first.
    """
    best_of_block, best_of_warp = make_best_of_block(threads)
    is_last, as_float, better = make_is_last(), make_as_float(), make_better()
    lowest = np.float32(-np.inf)

    def settle(
        out: Any, best: Any, partial: Any, counter: Any, score: Any, token: Any, chunk: Any, chunks: Any,
        s_score: Any, s_id: Any, s_flag: Any, thread: Any,
    ) -> None:  # fmt: skip
        score, token = best_of_block(score, token, s_score, s_id, thread)
        if thread == 0:
            at = np.int64(partial + np.int64(chunk) * 8)
            st_global_f32(at, score)
            st_global_b32(np.int64(at + 4), token)
        if is_last(counter, chunks, s_flag, thread):
            if thread < np.int32(WARP):
                score, token = lowest, np.int32(-1)
                other = np.int32(thread)
                while other < chunks:
                    at = np.int64(partial + np.int64(other) * 8)
                    value, token_id = as_float(ld_global_i32(at)), np.int32(ld_global_i32(np.int64(at + 4)))
                    if better(score, token, value, token_id):
                        score, token = value, token_id
                    other = np.int32(other + WARP)
                score, token = best_of_warp(score, token)
                if thread == 0:
                    st_global_b32(out, token)
                    if best != 0:
                        st_global_f32(best, score)
                        st_global_b32(np.int64(best + 4), token)

    return jit(device=True)(settle)


@cache
def make_survey_kernel(threads: int, vector: bool) -> Any:
    """out[r] = argmax of row r, or its draw where nothing is cut; best[r] = the highest (logit, id) of rows
    that are cut.

    Arguments: addresses of out i32[R], logits f32[R, V], temperatures f32[R], seeds u64[R], output_indices
    i32[R], top_ks i32[R], top_ps f32[R], the real number of rows i32[1] or 0, partial (f32, i32)[R, chunks],
    best (f32, i32)[R], counters i32[R, 4]; vocab, stride (floats from row to row), chunks.
    Who does what: block r x chunks + c has chunk c of row r, 16 logits a thread in quads, thread after
    thread; warps fold their best ids by shuffles, the block through shared memory, the row's last block the
    chunks'. Rows at and past the real number are not touched. Shared memory: a (score, id) a warp, a flag.
    """
    walk, settle, truncates = _make_walk(threads, vector), _make_settle(threads), make_truncates()
    as_float, warps, zero, none = make_as_float(), threads // WARP, np.float32(0), np.uint64(0)

    def sample_survey(
        out: Any, logits: Any, temperatures: Any, seeds: Any, output_indices: Any, top_ks: Any, top_ps: Any,
        num_rows: Any, partial: Any, best: Any, counters: Any, vocab: Any, stride: Any, chunks: Any,
    ) -> None:  # fmt: skip
        s_score = cuda.shared.array(warps, np.float32)
        s_id = cuda.shared.array(warps, np.int32)
        s_flag = cuda.shared.array(1, np.int32)
        thread = np.int32(cuda.threadIdx.x)
        block = np.uint32(cuda.blockIdx.x)
        row = np.int32(block // np.uint32(chunks))
        chunk = np.int32(block - np.uint32(np.uint32(row) * np.uint32(chunks)))
        if num_rows == 0 or row < np.int32(ld_global_i32(num_rows)):
            at = np.int64(row) * 4
            temperature = as_float(ld_global_i32(np.int64(temperatures + at)))
            top_k = np.int32(ld_global_i32(np.int64(top_ks + at)))
            top_p = as_float(ld_global_i32(np.int64(top_ps + at)))
            key_low = np.uint32(ld_global_i32(np.int64(seeds + 2 * at)))
            key_high = np.uint32(ld_global_i32(np.int64(seeds + 2 * at + 4)))
            output_index = np.uint32(ld_global_i32(np.int64(output_indices + at)))
            noise = temperature > zero and not truncates(temperature, top_k, top_p, vocab)
            row_at = np.int64(logits + at * stride)
            score, token = walk(
                row_at, chunk, vocab, noise, False, none, zero, zero, temperature, key_low, key_high,
                output_index, thread,
            )  # fmt: skip
            settle(
                np.int64(out + at), np.int64(best + 2 * at), np.int64(partial + 2 * at * chunks),
                np.int64(counters + COUNTERS * at + BLOCKS), score, token, chunk, chunks, s_score, s_id,
                s_flag, thread,
            )  # fmt: skip

    return sample_survey


@cache
def make_draw_kernel(threads: int, vector: bool) -> Any:
    """out[r] of rows that are cut: the best of logits / T + gumbel over ids of rank bounds[r] and above.

    Arguments: as the survey kernel's, and after counters: bounds u64[R]; vocab, stride, chunks, rows R.
    Who does what: blocks take the cut rows' chunks in turn, (item, item + grid, ...); the rest as there. A
    launch without a cut row reads three numbers a row and is over.
    """
    walk, settle, cut_rows = _make_walk(threads, vector), _make_settle(threads), make_cut_rows(threads)
    as_float, warps, log2_e = make_as_float(), threads // WARP, np.float32(LOG2_E)

    def sample_draw(
        out: Any, logits: Any, temperatures: Any, seeds: Any, output_indices: Any, top_ks: Any, top_ps: Any,
        num_rows: Any, partial: Any, best: Any, counters: Any, bounds: Any, vocab: Any, stride: Any,
        chunks: Any, rows: Any,
    ) -> None:  # fmt: skip
        s_score = cuda.shared.array(warps, np.float32)
        s_id = cuda.shared.array(warps, np.int32)
        s_flag = cuda.shared.array(1, np.int32)
        s_warps = cuda.shared.array(warps, np.int32)
        s_rows = cuda.shared.array(MAX_ROWS, np.uint16)
        thread = np.int32(cuda.threadIdx.x)
        items = np.uint32(
            cut_rows(temperatures, top_ks, top_ps, num_rows, rows, vocab, s_rows, s_warps, thread)
        )
        items = np.uint32(items * np.uint32(chunks))
        item = np.uint32(cuda.blockIdx.x)
        while item < items:
            place = np.uint32(item // np.uint32(chunks))
            chunk = np.int32(item - np.uint32(place * np.uint32(chunks)))
            at = np.int64(s_rows[place]) * 4
            highest = as_float(ld_global_i32(np.int64(best + 2 * at)))
            if np.int32(ld_global_i32(np.int64(best + 2 * at + 4))) >= 0:
                temperature = as_float(ld_global_i32(np.int64(temperatures + at)))
                key_low = np.uint32(ld_global_i32(np.int64(seeds + 2 * at)))
                key_high = np.uint32(ld_global_i32(np.int64(seeds + 2 * at + 4)))
                output_index = np.uint32(ld_global_i32(np.int64(output_indices + at)))
                low = np.uint32(ld_global_i32(np.int64(bounds + 2 * at)))
                high = np.uint32(ld_global_i32(np.int64(bounds + 2 * at + 4)))
                bound = np.uint64(np.uint64(np.uint64(high) << np.uint64(32)) | np.uint64(low))
                score, token = walk(
                    np.int64(logits + at * stride), chunk, vocab, True, True, bound, highest,
                    np.float32(log2_e / temperature), temperature, key_low, key_high, output_index, thread,
                )  # fmt: skip
                settle(
                    np.int64(out + at), np.int64(0), np.int64(partial + 2 * at * chunks),
                    np.int64(counters + COUNTERS * at + BLOCKS), score, token, chunk, chunks, s_score, s_id,
                    s_flag, thread,
                )  # fmt: skip
            item = np.uint32(item + np.uint32(cuda.gridDim.x))
            cuda.syncthreads()

    return sample_draw
