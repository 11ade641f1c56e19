"""The splits of one sequence and kv head put together, left to right, by some threads.

Knows: partial results in global memory, where rows of the result go. Refuses to know: how a partial result
comes about, who waits for the last one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.attention_contract import LN2
from kernels_numba.attention_tile import LOWEST, make_fold_factors, make_folded
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import ROWS
from kernels_numba.ptx.arith import add_f32, divide_f32, lg2_f32, mul_f32, select_i32
from kernels_numba.ptx.mma import pack_bf16, pack_f16
from kernels_numba.ptx.predicated import st_global_b32_if, st_global_f32_if
from kernels_numba.ptx.vector import ld_global_v2, ld_global_v4

# Splits, and places of a thread (16 bytes of a row of o each), whose loads are in flight together.
AT_ONCE, PLACES = 3, 3


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
def make_fold(head_dim: int, dtype: str, with_lse: bool, tokens: int, members: int) -> Any:
    """f(out, lse, partial, partial_ml, first_slot, splits, heads, group, first_row, out_stride, thread):
    `members` threads fold the splits of one kv head, up to 16 of its group x tokens rows from first_row on.

    out, lse: of the sequence's first token and the head's first row; first_slot: of the first split, (splits
    of the sequences before) x heads + head; the rest as the kernel's arguments."""
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
        ms = cuda.local.array(flying, np.float32)
        ls = cuda.local.array(flying, np.float32)
        os = cuda.local.array(flying_words, np.float32)
        m = cuda.local.array(PLACES, np.float32)
        l_sum = cuda.local.array(PLACES, np.float32)
        o = cuda.local.array(held, np.float32)
        rows = int32(group * tokens)
        words = int32(min(int32(rows - first_row), int32(ROWS)) * vectors)
        at = int32(thread)
        while at - thread < words:
            for k in range(PLACES):
                m[k], l_sum[k] = lowest, zero
                for j in range(4):
                    o[4 * k + j] = zero
            split = int32(0)
            while split < splits:
                for i in range(AT_ONCE):
                    index = int64(first_slot) + int64(min(int32(split + i), int32(splits - 1))) * heads
                    index = int64(index * rows + first_row)
                    for k in range(PLACES):
                        place = place_of(at, k, words)
                        ld_global_v2(ml, int64(partial_ml + (index + (place >> vector_shift)) * 8))
                        ms[PLACES * i + k], ls[PLACES * i + k] = ml[0], ml[1]
                        ld_global_v4(loaded, int64(partial + (index * vectors + place) * 16))
                        for j in range(4):
                            os[4 * (PLACES * i + k) + j] = loaded[j]
                for i in range(AT_ONCE):
                    if split + i < splits:
                        for k in range(PLACES):
                            m[k], a, b = fold_factors(m[k], ms[PLACES * i + k])
                            l_sum[k] = folded(l_sum[k], a, ls[PLACES * i + k], b)
                            for j in range(4):
                                o[4 * k + j] = folded(o[4 * k + j], a, os[4 * (PLACES * i + k) + j], b)
                split = int32(split + AT_ONCE)
            for k in range(PLACES):
                inside = int32(at + k * members < words)
                place = place_of(at, k, words)
                row = int32(place >> vector_shift)
                column = int32(place - row * vectors)
                token, row = row_of(int32(row + first_row), group)
                inverse = divide_f32(one, l_sum[k])
                to = int64(out + int64(token) * out_stride + int64(row) * row_bytes + column * 8)
                first = pack(mul_f32(o[4 * k], inverse), mul_f32(o[4 * k + 1], inverse))
                second = pack(mul_f32(o[4 * k + 2], inverse), mul_f32(o[4 * k + 3], inverse))
                st_global_b32_if(inside, to, first)
                st_global_b32_if(inside, int64(to + 4), second)
                if with_lse:
                    to = int64(lse + (int64(token) * heads * group + row) * 4)
                    value = mul_f32(add_f32(m[k], lg2_f32(l_sum[k])), ln2)
                    st_global_f32_if(int32(inside & int32(column == 0)), to, value)
            at = int32(at + PLACES * members)

    return fold
