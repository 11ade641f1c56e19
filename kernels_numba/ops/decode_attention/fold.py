"""The splits of one sequence and kv head put together, left to right, by some threads; and the zeros of
sequences without keys.

A partial result is its own flag: memory for it holds UNWRITTEN until its writer's stores arrive, and again
once it has been folded. So nobody counts stores, or waits for memory to acknowledge them: who folds reads
until it is all there. Knows: partial results in global memory, where rows of the result go. Refuses to know:
how a partial result comes about, who folds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.attention_contract import LN2
from kernels_numba.attention_tile import LOWEST, make_fold_factors, make_folded
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import ROWS
from kernels_numba.ptx.arith import add_f32, bits_f32, divide_f32, lg2_f32, mul_f32, select_i32
from kernels_numba.ptx.atomics import ballot
from kernels_numba.ptx.control import nanosleep, trap
from kernels_numba.ptx.ldst import ld_global_i32
from kernels_numba.ptx.mma import pack_bf16, pack_f16
from kernels_numba.ptx.predicated import st_global_b32_if, st_global_f32_if
from kernels_numba.ptx.predicated_vector import st_global_v4_if
from kernels_numba.ptx.relaxed import ld_relaxed_v2, ld_relaxed_v4

# The bits of a word of a partial result that is not there: a NaN that no instruction makes (theirs is
# 0x7FFFFFFF).
UNWRITTEN, UNWRITTEN_BYTE = -1, 0xFF
# Splits, and places of a thread (16 bytes of a row of o each), whose loads are in flight together.
AT_ONCE, PLACES = 4, 3
PAUSE_NS, PATIENCE = 100, 1 << 22  # between two looks at what is missing; looks before the launch is aborted


@cache
def make_row_tiles(tokens: int) -> Any:
    """f(group) -> tiles of ROWS rows that group x tokens rows take; a tile is an item of its own."""
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def row_tiles(group: Any) -> Any:
        return int32(1) if tokens == 1 else int32((group * tokens + (ROWS - 1)) >> 4)

    return row_tiles


@cache
def make_row_of(tokens: int) -> Any:
    """f(row, group) -> (query token of the sequence, query head of the kv head) of a row of its
    group x tokens."""
    int32, uint32 = cuda.types.int32, cuda.types.uint32

    @jit(device=True, forceinline=True)
    def row_of(row: Any, group: Any) -> Any:
        if tokens == 1:
            return int32(0), row
        token = int32(uint32(row) // uint32(group))
        return token, int32(row - token * group)

    return row_of


@cache
def make_clear(head_dim: int, with_lse: bool, tokens: int, members: int) -> Any:
    """f(out, lse, lens, num_seqs, heads, group, out_stride, thread): zeros, and -inf for the log-sum-exp, for
    the block's share of the sequences without keys, by `members` threads; arguments as the kernel's."""
    lowest = np.float32(LOWEST)
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True)
    def clear(
        out: Any, lse: Any, lens: Any, num_seqs: Any, heads: Any, group: Any, out_stride: Any, thread: Any
    ) -> None:
        seq, rows = int32(cuda.blockIdx.x), int32(heads * group)
        while seq < num_seqs:
            if ld_global_i32(int64(lens + int64(seq) * 4)) <= 0:
                for token in range(tokens):
                    row = int64(int64(seq) * tokens + token)
                    first = int32(0)
                    while first < rows * (head_dim // 2):
                        at = int32(first + thread)
                        inside = int32(at < rows * (head_dim // 2))
                        st_global_b32_if(inside, int64(out + row * out_stride + int64(at) * 4), 0)
                        if with_lse:
                            to = int64(lse + (row * rows + at) * 4)
                            st_global_f32_if(int32(at < rows), to, lowest)
                        first = int32(first + members)
            seq = int32(seq + cuda.gridDim.x)

    return clear


@cache
def make_fold(head_dim: int, dtype: str, with_lse: bool, tokens: int, members: int) -> Any:
    """f(out, lse, partial, partial_ml, first_slot, splits, heads, group, first_row, out_stride, thread):
    `members` threads fold the splits of one kv head, up to 16 of its group x tokens rows from first_row on.

    out, lse: of the sequence's first token and the head's first row; first_slot: of the first split, (splits
    of the sequences before) x heads + head; the rest as the kernel's arguments. A row of o is read by lanes
    of one warp, who alone read its (m, l), too."""
    vectors = head_dim // 4  # of 16 bytes, in a row of float32
    vector_shift, row_bytes = vectors.bit_length() - 1, head_dim * 2
    flying, flying_words, held = AT_ONCE * PLACES, 4 * AT_ONCE * PLACES, 4 * PLACES
    pack = pack_bf16 if dtype == "bfloat16" else pack_f16
    fold_factors, folded, row_of = make_fold_factors(), make_folded(), make_row_of(tokens)
    lowest, zero, one, ln2 = np.float32(LOWEST), np.float32(0), np.float32(1), np.float32(LN2)
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def place_of(at: Any, k: Any, words: Any) -> Any:
        """The thread's k-th place from `at` on; past the end the last, which is then computed in vain."""
        place = int32(at + k * members)
        return select_i32(int32(place < words), place, int32(words - 1))

    @jit(device=True)
    def fold(
        out: Any, lse: Any, partial: Any, partial_ml: Any, first_slot: Any, splits: Any, heads: Any,
        group: Any, first_row: Any, out_stride: Any, thread: Any,
    ) -> None:  # fmt: skip
        ml = cuda.local.array(2, np.float32)
        loaded = cuda.local.array(4, np.float32)
        unwritten = cuda.local.array(4, np.int32)
        ms = cuda.local.array(flying, np.float32)
        ls = cuda.local.array(flying, np.float32)
        os = cuda.local.array(flying_words, np.float32)
        m = cuda.local.array(PLACES, np.float32)
        l_sum = cuda.local.array(PLACES, np.float32)
        o = cuda.local.array(held, np.float32)
        for j in range(4):
            unwritten[j] = int32(UNWRITTEN)
        rows = int32(group * tokens)
        words = int32(min(int32(rows - first_row), int32(ROWS)) * vectors)
        first = int32(0)
        while first < words:
            at = int32(first + thread)
            for k in range(PLACES):
                m[k], l_sum[k] = lowest, zero
                for j in range(4):
                    o[4 * k + j] = zero
            split = int32(0)
            while split < splits:
                looks, missing = int32(0), True
                while missing:
                    absent = int32(0)
                    for i in range(AT_ONCE):
                        index = int64(first_slot) + int64(min(int32(split + i), int32(splits - 1))) * heads
                        index = int64(index * rows + first_row)
                        for k in range(PLACES):
                            place = place_of(at, k, words)
                            ld_relaxed_v2(ml, int64(partial_ml + (index + (place >> vector_shift)) * 8))
                            ld_relaxed_v4(loaded, int64(partial + (index * vectors + place) * 16))
                            ms[PLACES * i + k], ls[PLACES * i + k] = ml[0], ml[1]
                            hole = int32(
                                int32(bits_f32(ml[0]) == UNWRITTEN) | int32(bits_f32(ml[1]) == UNWRITTEN)
                            )
                            for j in range(4):
                                os[4 * (PLACES * i + k) + j] = loaded[j]
                                hole = int32(hole | int32(bits_f32(loaded[j]) == UNWRITTEN))
                            absent = int32(absent | (hole & int32(at + k * members < words)))
                    missing = ballot(absent) != 0
                    if missing:
                        looks = int32(looks + 1)
                        if looks == PATIENCE:
                            trap()
                        nanosleep(PAUSE_NS)
                for i in range(AT_ONCE):
                    if split + i < splits:
                        index = int64((int64(first_slot) + int64(split + i) * heads) * rows + first_row)
                        for k in range(PLACES):
                            m[k], a, b = fold_factors(m[k], ms[PLACES * i + k])
                            l_sum[k] = folded(l_sum[k], a, ls[PLACES * i + k], b)
                            for j in range(4):
                                o[4 * k + j] = folded(o[4 * k + j], a, os[4 * (PLACES * i + k) + j], b)
                            place, inside = place_of(at, k, words), int32(at + k * members < words)
                            st_global_v4_if(
                                inside, int64(partial + (index * vectors + place) * 16), unwritten
                            )
                            to = int64(partial_ml + (index + (place >> vector_shift)) * 8)
                            first_lane = int32(inside & int32((place & (vectors - 1)) == 0))
                            st_global_b32_if(first_lane, to, UNWRITTEN)
                            st_global_b32_if(first_lane, int64(to + 4), UNWRITTEN)
                split = int32(split + AT_ONCE)
            for k in range(PLACES):
                inside = int32(at + k * members < words)
                place = place_of(at, k, words)
                row = int32(place >> vector_shift)
                column = int32(place - row * vectors)
                token, row = row_of(int32(row + first_row), group)
                inverse = divide_f32(one, l_sum[k])
                to = int64(out + int64(token) * out_stride + int64(row) * row_bytes + column * 8)
                first_pair = pack(mul_f32(o[4 * k], inverse), mul_f32(o[4 * k + 1], inverse))
                second = pack(mul_f32(o[4 * k + 2], inverse), mul_f32(o[4 * k + 3], inverse))
                st_global_b32_if(inside, to, first_pair)
                st_global_b32_if(inside, int64(to + 4), second)
                if with_lse:
                    to = int64(lse + (int64(token) * heads * group + row) * 4)
                    value = mul_f32(add_f32(m[k], lg2_f32(l_sum[k])), ln2)
                    st_global_f32_if(int32(inside & int32(column == 0)), to, value)
            first = int32(first + PLACES * members)

    return fold
