"""Rung "warp", the two kernels between: where in a row's order top-k and top-p cut it.

The first makes a histogram of the weights by their logarithm, 32 bins an octave, and says in which bins the
borders are; the second gathers the ids of these bins, of a real row a few hundred at most, sorts them and
finds the ids. Knows: ranks and weights of nucleus.py. Refuses to know: noise.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.sample.nucleus import (
    BIN_BITS,
    DIGIT_BITS,
    FRACTION_BITS,
    GROUPS,
    ID_BITS,
    LOG2_E,
    NUM_BINS,
    Y_BITS,
    make_border,
    make_cross,
    make_fixed,
    make_rank,
    make_share,
    make_steps,
)
from kernels_numba.ops.sample.plain import WORDS
from kernels_numba.ops.sample.warp_tools import (
    BLOCKS,
    COUNTERS,
    GATHERED,
    LISTED,
    MAX_ROWS,
    WARP,
    make_as_float,
    make_cut_rows,
    make_is_last,
    make_load_share,
)
from kernels_numba.ptx.atomics import atom_add_i32
from kernels_numba.ptx.ldst import ld_global_i32, st_global_b32
from kernels_numba.ptx.reduce import red_add_i32, red_add_i64

CAPACITY = 1024  # ids of a row's list; a row with more of them at its borders goes the slower way
RECORD = 8  # words: bins of top-p's border (first, last), of top-k's; ids needed there; two weights
HALF = FRACTION_BITS // 2  # a weight's halves are added up apart: a chunk's sum of each fits 32 bits
HUGE = 1 << 62  # more than any sum
WEIGH_SIGNATURE = "void(" + ", ".join(["int64"] * 10 + ["int32"] * 4) + ")"
GATHER_SIGNATURE = "void(" + ", ".join(["int64"] * 10 + ["int32"] * 4) + ")"


@cache
def _make_words() -> Any:
    """(load, store): device functions of a u64 in two words: (address) -> u64, (address, u64) -> None."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)

    def load_u64(at: Any) -> Any:
        first = np.uint64(np.uint32(ld_global_i32(at)))
        second = np.uint64(np.uint32(ld_global_i32(np.int64(at + 4))))
        return np.uint64(np.uint64(second << half) | first)

    def store_u64(at: Any, value: Any) -> None:
        st_global_b32(at, np.uint32(np.uint64(value & low)))
        st_global_b32(np.int64(at + 4), np.uint32(np.uint64(value >> half)))

    return jit(device=True)(load_u64), jit(device=True)(store_u64)


@cache
def make_weigh_kernel(threads: int, vector: bool) -> Any:
    """records[r] of rows that are cut: which bins hold the borders of top-k and top-p.

    Arguments: addresses of logits f32[R, V], temperatures f32[R], top_ks i32[R], top_ps f32[R], the real
    number of rows i32[1] or 0, best (f32, i32)[R], numbers i32[R, NUM_BINS] and weights u64[R, NUM_BINS] (0,
    and left so), records i32[R, 8], counters i32[R, 4]; vocab, stride, chunks, rows R.
    Who does what: blocks take the cut rows' chunks in turn; a block makes its chunk's histogram in shared
    memory and adds what is in it to the row's. The row's last block reads that: top-k's border lies in the
    bin where the number reaches k. Top-p's share is of the weight that top-k leaves, which is known only up
    to the ids in that bin: so its border lies between the bin that reaches the share of what is surely left
    and the bin that reaches the share of all that may be.
    Shared memory: three u32 histograms, one of u64, the list of rows.
    """
    load_share, steps_of, fixed, share = (
        make_load_share(threads, vector), make_steps(), make_fixed(), make_share(),
    )  # fmt: skip
    cut_rows, is_last, as_float = make_cut_rows(threads), make_is_last(), make_as_float()
    cross, (load_u64, store_u64) = make_cross(threads, NUM_BINS), _make_words()
    warps, log2_e, bin_shift = threads // WARP, np.float32(LOG2_E), np.int32(Y_BITS - BIN_BITS)
    half, low_half, huge, none = np.uint64(HALF), np.uint64((1 << HALF) - 1), np.uint64(HUGE), np.uint64(0)
    answers = 3

    @jit(device=True)
    def count(values: Any, highest: Any, slope: Any, s_number: Any, s_low: Any, s_high: Any) -> None:
        for i in range(WORDS):
            steps = steps_of(values[i], highest, slope)
            if steps >= np.int32(0):
                weight, b = fixed(steps), np.int32(steps >> bin_shift)
                cuda.atomic.add(s_number, b, np.uint32(1))
                cuda.atomic.add(s_low, b, np.uint32(weight & low_half))
                cuda.atomic.add(s_high, b, np.uint32(weight >> half))

    def sample_weigh(
        logits: Any, temperatures: Any, top_ks: Any, top_ps: Any, num_rows: Any, best: Any, numbers: Any,
        weights: Any, records: Any, counters: Any, vocab: Any, stride: Any, chunks: Any, rows: Any,
    ) -> None:  # fmt: skip
        s_number = cuda.shared.array(NUM_BINS, np.uint32)
        s_low = cuda.shared.array(NUM_BINS, np.uint32)
        s_high = cuda.shared.array(NUM_BINS, np.uint32)
        s_values = cuda.shared.array(NUM_BINS, np.uint64)
        s_groups = cuda.shared.array(GROUPS, np.uint64)
        s_answer = cuda.shared.array(answers, np.uint64)
        s_rows = cuda.shared.array(MAX_ROWS, np.uint16)
        s_warps = cuda.shared.array(warps, np.int32)
        s_flag = cuda.shared.array(1, np.int32)
        q0 = cuda.local.array(WORDS, np.float32)
        q1 = cuda.local.array(WORDS, np.float32)
        q2 = cuda.local.array(WORDS, np.float32)
        q3 = cuda.local.array(WORDS, np.float32)
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
            item = np.uint32(item + np.uint32(cuda.gridDim.x))
            if np.int32(ld_global_i32(np.int64(best + 2 * at + 4))) >= 0:  # the same for all threads
                highest = as_float(ld_global_i32(np.int64(best + 2 * at)))
                slope = np.float32(log2_e / as_float(ld_global_i32(np.int64(temperatures + at))))
                numbers_at, weights_at = (
                    np.int64(numbers + at * NUM_BINS),
                    np.int64(weights + 2 * at * NUM_BINS),
                )
                for b in range(thread, NUM_BINS, threads):
                    s_number[b] = np.uint32(0)
                    s_low[b] = np.uint32(0)
                    s_high[b] = np.uint32(0)
                cuda.syncthreads()
                load_share(q0, q1, q2, q3, np.int64(logits + at * stride), chunk, vocab, thread)
                count(q0, highest, slope, s_number, s_low, s_high)
                count(q1, highest, slope, s_number, s_low, s_high)
                count(q2, highest, slope, s_number, s_low, s_high)
                count(q3, highest, slope, s_number, s_low, s_high)
                cuda.syncthreads()
                for b in range(thread, NUM_BINS, threads):
                    if s_number[b] != np.uint32(0):
                        weight = np.uint64(np.uint64(np.uint64(s_high[b]) << half) + np.uint64(s_low[b]))
                        red_add_i32(np.int64(numbers_at + np.int64(b) * 4), np.int32(s_number[b]))
                        red_add_i64(np.int64(weights_at + np.int64(b) * 8), np.int64(weight))
                if is_last(np.int64(counters + COUNTERS * at + BLOCKS), chunks, s_flag, thread):
                    top_k = np.int32(ld_global_i32(np.int64(top_ks + at)))
                    top_p = as_float(ld_global_i32(np.int64(top_ps + at)))
                    for b in range(thread, NUM_BINS, threads):
                        where = np.int64(numbers_at + np.int64(b) * 4)
                        s_values[b] = np.uint64(ld_global_i32(where))
                        st_global_b32(where, 0)
                    cuda.syncthreads()
                    k_bin, k_need = np.int32(-1), np.int32(0)
                    if top_k > 0:
                        cross(s_values, s_groups, s_answer, thread, np.uint64(top_k))
                        if np.uint64(top_k) < s_answer[2]:
                            k_bin, k_need = np.int32(s_answer[0]), np.int32(np.uint64(top_k) - s_answer[1])
                    for b in range(thread, NUM_BINS, threads):
                        where = np.int64(weights_at + np.int64(b) * 8)
                        weight = load_u64(where)
                        store_u64(where, none)
                        s_values[b] = none if k_bin >= 0 and b > k_bin else weight
                    cuda.syncthreads()
                    cross(s_values, s_groups, s_answer, thread, huge)
                    most = s_answer[2]
                    least = most
                    if k_bin >= 0:
                        least = np.uint64(most - s_values[k_bin])
                    p_first, p_last, before = np.int32(-1), np.int32(-1), none
                    if top_p < np.float32(1):
                        cross(s_values, s_groups, s_answer, thread, share(least, top_p))
                        p_first, before = np.int32(s_answer[0]), s_answer[1]
                        cross(s_values, s_groups, s_answer, thread, share(most, top_p))
                        p_last = np.int32(s_answer[0])
                    if thread == 0:
                        record = np.int64(records + RECORD * at)
                        st_global_b32(record, p_first)
                        st_global_b32(np.int64(record + 4), p_last)
                        st_global_b32(np.int64(record + 8), k_bin)
                        st_global_b32(np.int64(record + 12), k_need)
                        store_u64(np.int64(record + 16), least)
                        store_u64(np.int64(record + 24), before)
            cuda.syncthreads()

    return sample_weigh


@cache
def make_sort(threads: int, length: int) -> Any:
    """Device function (s_values u64[length], count, thread) -> None: the first `count` (a power of two, at
    most length) in descending order, for a whole block, by a bitonic network; it ends with a barrier."""

    def sort(s_values: Any, count: Any, thread: Any) -> None:
        size = np.int32(2)
        while size <= count:
            apart = np.int32(size >> 1)
            while apart > np.int32(0):
                i = np.int32(thread)
                while i < count:
                    other = np.int32(i ^ apart)
                    if other > i:
                        a, b = s_values[i], s_values[other]
                        if (a < b) == (np.int32(i & size) == 0):
                            s_values[i] = b
                            s_values[other] = a
                    i = np.int32(i + threads)
                cuda.syncthreads()
                apart = np.int32(apart >> 1)
            size = np.int32(size << 1)

    return jit(device=True)(sort)


def _make_place_of() -> Any:
    """Device function (rank, highest logit, slope) -> steps, as make_steps of the rank's logit."""
    steps_of, as_float = make_steps(), make_as_float()
    sign, id_bits = np.uint32(0x80000000), np.uint64(ID_BITS)

    def place_of(rank: Any, best: Any, slope: Any) -> Any:
        key = np.uint32(np.uint64(rank >> id_bits))
        bits = np.uint32(key ^ sign) if key & sign else np.uint32(~key)
        return steps_of(as_float(bits), best, slope)

    return jit(device=True)(place_of)


@cache
def make_gather_kernel(threads: int, vector: bool, capacity: int = CAPACITY) -> Any:
    """bounds[r] of rows that are cut: the lowest rank that stays.

    Arguments: addresses of logits f32[R, V], temperatures f32[R], top_ks i32[R], top_ps f32[R], the real
    number of rows i32[1] or 0, best (f32, i32)[R], records i32[R, 8], lists u64[R, capacity], bounds u64[R],
    counters i32[R, 4]; vocab, stride, chunks, rows R.
    Who does what: blocks take the cut rows' chunks in turn and append to the row's list the ranks whose bins
    the record names, in any order. The row's last block sorts the list. Of the ids in top-k's bin the record
    says how many are needed, so the list has the last one, and what its like weigh; that makes top-p's share,
    and the list has the id that reaches it. If the list was too short (equal logits by the thousand), that
    block walks the row again, digit by digit (make_border).
    Shared memory: ranks and weights of the list, the list of rows, what make_border needs.
    """
    load_share, steps_of, rank_of = make_load_share(threads, vector), make_steps(), make_rank()
    fixed, step = make_fixed(), np.int32(threads * WORDS)
    share, place_of, sort = make_share(), _make_place_of(), make_sort(threads, capacity)
    cut_rows, is_last, as_float = make_cut_rows(threads), make_is_last(), make_as_float()
    cross, (load_u64, store_u64) = make_cross(threads, capacity), _make_words()
    warps, log2_e, bin_shift = threads // WARP, np.float32(LOG2_E), np.int32(Y_BITS - BIN_BITS)
    huge, none, digits, answers = np.uint64(HUGE), np.uint64(0), 1 << DIGIT_BITS, 3

    def load_one(row_at: Any, row: Any, token_id: Any) -> Any:
        return as_float(ld_global_i32(np.int64(row_at + np.int64(token_id) * 4)))

    border = make_border(threads, jit(device=True)(load_one))

    @jit(device=True)
    def append(
        values: Any, first: Any, highest: Any, slope: Any, k_bin: Any, p_first: Any, p_last: Any, listed: Any,
        list_at: Any,
    ) -> None:  # fmt: skip
        for i in range(WORDS):
            steps = steps_of(values[i], highest, slope)
            if steps >= np.int32(0):
                b = np.int32(steps >> bin_shift)
                if b == k_bin or (p_first <= b and b <= p_last):
                    entry = np.int32(atom_add_i32(listed, 1))
                    if entry < capacity:
                        rank = rank_of(values[i], np.int32(first + i))
                        store_u64(np.int64(list_at + np.int64(entry) * 8), rank)

    def sample_gather(
        logits: Any, temperatures: Any, top_ks: Any, top_ps: Any, num_rows: Any, best: Any, records: Any,
        lists: Any, bounds: Any, counters: Any, vocab: Any, stride: Any, chunks: Any, rows: Any,
    ) -> None:  # fmt: skip
        s_ranks = cuda.shared.array(capacity, np.uint64)
        s_values = cuda.shared.array(capacity, np.uint64)
        s_counts = cuda.shared.array(digits, np.uint64)
        s_weights = cuda.shared.array(digits, np.uint64)
        s_groups = cuda.shared.array(GROUPS, np.uint64)
        s_answer = cuda.shared.array(answers, np.uint64)
        s_rows = cuda.shared.array(MAX_ROWS, np.uint16)
        s_warps = cuda.shared.array(warps, np.int32)
        s_flag = cuda.shared.array(1, np.int32)
        s_start = cuda.shared.array(1, np.int32)
        q0 = cuda.local.array(WORDS, np.float32)
        q1 = cuda.local.array(WORDS, np.float32)
        q2 = cuda.local.array(WORDS, np.float32)
        q3 = cuda.local.array(WORDS, np.float32)
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
            item = np.uint32(item + np.uint32(cuda.gridDim.x))
            if np.int32(ld_global_i32(np.int64(best + 2 * at + 4))) >= 0:  # the same for all threads
                highest = as_float(ld_global_i32(np.int64(best + 2 * at)))
                slope = np.float32(log2_e / as_float(ld_global_i32(np.int64(temperatures + at))))
                record = np.int64(records + RECORD * at)
                p_first, p_last = (
                    np.int32(ld_global_i32(record)),
                    np.int32(ld_global_i32(np.int64(record + 4))),
                )
                k_bin = np.int32(ld_global_i32(np.int64(record + 8)))
                row_at, list_at = np.int64(logits + at * stride), np.int64(lists + 2 * at * capacity)
                listed = np.int64(counters + COUNTERS * at + LISTED)
                first = load_share(q0, q1, q2, q3, row_at, chunk, vocab, thread)
                second, third = np.int32(first + step), np.int32(first + 2 * step)
                fourth = np.int32(first + 3 * step)
                append(q0, first, highest, slope, k_bin, p_first, p_last, listed, list_at)
                append(q1, second, highest, slope, k_bin, p_first, p_last, listed, list_at)
                append(q2, third, highest, slope, k_bin, p_first, p_last, listed, list_at)
                append(q3, fourth, highest, slope, k_bin, p_first, p_last, listed, list_at)
                if is_last(np.int64(counters + COUNTERS * at + GATHERED), chunks, s_flag, thread):
                    top_k = np.int32(ld_global_i32(np.int64(top_ks + at)))
                    top_p = as_float(ld_global_i32(np.int64(top_ps + at)))
                    count = np.int32(ld_global_i32(listed))
                    k_need = np.int32(ld_global_i32(np.int64(record + 12)))
                    total, before = load_u64(np.int64(record + 16)), load_u64(np.int64(record + 24))
                    bound = none
                    cuda.syncthreads()  # all have read the count
                    if thread == 0:
                        st_global_b32(listed, 0)
                    if count > capacity:
                        if k_bin >= 0:
                            bound, total = border(
                                row_at, 0, vocab, highest, slope, bound, False, np.uint64(top_k), s_counts,
                                s_weights, s_groups, s_answer,
                            )  # fmt: skip
                        if top_p < np.float32(1):
                            bound, total = border(
                                row_at, 0, vocab, highest, slope, bound, True, share(total, top_p), s_counts,
                                s_weights, s_groups, s_answer,
                            )  # fmt: skip
                    elif count > 0:
                        size = np.int32(1)
                        while size < count:
                            size = np.int32(size << 1)
                        for i in range(thread, size, threads):
                            s_ranks[i] = none
                            if i < count:
                                s_ranks[i] = load_u64(np.int64(list_at + np.int64(i) * 8))
                        cuda.syncthreads()
                        sort(s_ranks, size, thread)
                        last = np.int32(count - 1)
                        if k_bin >= 0:
                            for i in range(thread, count, threads):
                                b = np.int32(place_of(s_ranks[i], highest, slope) >> bin_shift)
                                previous = np.int32(-1)
                                if i > 0:
                                    previous = np.int32(place_of(s_ranks[i - 1], highest, slope) >> bin_shift)
                                if b == k_bin and previous != b:  # one thread: bins ascend
                                    s_start[0] = np.int32(i)
                            cuda.syncthreads()
                            start = s_start[0]
                            last = np.int32(start + k_need - 1)
                            bound = s_ranks[last]
                            for i in range(thread, capacity, threads):
                                s_values[i] = none
                                if start <= i and i <= last:
                                    s_values[i] = fixed(place_of(s_ranks[i], highest, slope))
                            cuda.syncthreads()
                            cross(s_values, s_groups, s_answer, thread, huge)
                            total = np.uint64(total + s_answer[2])
                        if top_p < np.float32(1):
                            for i in range(thread, capacity, threads):
                                s_values[i] = none
                                if i <= last:
                                    steps = place_of(s_ranks[i], highest, slope)
                                    b = np.int32(steps >> bin_shift)
                                    if p_first <= b and b <= p_last:
                                        s_values[i] = fixed(steps)
                            cuda.syncthreads()
                            need = np.uint64(share(total, top_p) - before)
                            cross(s_values, s_groups, s_answer, thread, need)
                            bound = s_ranks[np.int32(s_answer[0])]
                    if thread == 0:
                        store_u64(np.int64(bounds + 2 * at), bound)
            cuda.syncthreads()

    return sample_gather
