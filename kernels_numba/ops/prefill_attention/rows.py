"""What a consumer warpgroup does with its rows between the products: masks, weights, P, folds, staging.

All act on a warp's 16 rows in the accumulator layout of wgmma, low and high, as attention_tile.py says.
Knows: registers. Refuses to know: which tile, who else is there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.attention_contract import TILE
from kernels_numba.attention_tile import (
    LOWEST,
    make_fold_factors,
    make_folded,
    make_group_max,
    make_negated,
    make_quad,
)
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.prefill_attention.config import ROW_STATE_BYTES
from kernels_numba.ptx.arith import add_f32, ex2_f32, fma_f32, max_f32, mul_f32, select_f32
from kernels_numba.ptx.matrix import stmatrix_x4
from kernels_numba.ptx.mma import pack_bf16, pack_f16
from kernels_numba.ptx.vector import ld_shared_v4, st_shared_v4

WARP_ROWS = 16
STAGE_BYTES = WARP_ROWS * 128  # of a panel of what a warp's rows have become
VECTOR_STRIDE = 32 * 16  # bytes from one of a thread's vectors to its next: a warp's lie side by side


@cache
def make_weigh(window: int | None, extra: int = 0) -> tuple[Any, Any, Any]:
    """(largest, weigh, hide) of a tile's 128 scores a row, s[64] of a lane.

    largest(s, m_low, m_high, c) -> (m_low, m_high, n_low, n_high, f_low, f_high): m, -m and f as the contract
    has them. weigh(s, first, last, l_low, l_high, c, n_low, n_high, f_low, f_high): of the groups of 32 keys
    from `first` up to `last`, s becomes the unrounded weights, l_low, l_high f32[4] the lane's places.
    hide(s, key, low, high): -inf where a row does not see; key: of s[0]; low, high: how many keys the rows
    see. extra: keys too many (a mutant).
    """
    group_max, negated, quad = make_group_max(), make_negated(), make_quad()
    quad_max = quad[0]
    lowest = np.float32(LOWEST)
    has_window, width = window is not None, window or 0
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def hide(s: Any, key: Any, low: Any, high: Any) -> None:
        low, high = int32(low + extra - key), int32(high + extra - key)
        for j in range(TILE // 8):
            for which in range(2):
                at = 8 * j + which
                s[4 * j + which] = select_f32(int32(at < low), s[4 * j + which], lowest)
                s[4 * j + 2 + which] = select_f32(int32(at < high), s[4 * j + 2 + which], lowest)
        if has_window:
            low, high = int32(low - extra - width), int32(high - extra - width)
            for j in range(TILE // 8):
                for which in range(2):
                    at = 8 * j + which
                    s[4 * j + which] = select_f32(int32(at >= low), s[4 * j + which], lowest)
                    s[4 * j + 2 + which] = select_f32(int32(at >= high), s[4 * j + 2 + which], lowest)

    @jit(device=True, forceinline=True)
    def largest(s: Any, m_low: Any, m_high: Any, c: Any) -> Any:
        top_low, top_high = group_max(s, 0)
        for g in range(1, 4):
            low, high = group_max(s, 16 * g)
            top_low, top_high = max_f32(top_low, low), max_f32(top_high, high)
        top_low, top_high = quad_max(top_low), quad_max(top_high)
        new_low, new_high = max_f32(m_low, mul_f32(top_low, c)), max_f32(m_high, mul_f32(top_high, c))
        n_low, n_high = negated(new_low), negated(new_high)
        f_low, f_high = ex2_f32(add_f32(m_low, n_low)), ex2_f32(add_f32(m_high, n_high))
        return new_low, new_high, n_low, n_high, f_low, f_high

    @jit(device=True, forceinline=True)
    def weigh(
        s: Any, first: Any, last: Any, l_low: Any, l_high: Any, c: Any, n_low: Any, n_high: Any, f_low: Any,
        f_high: Any,
    ) -> None:  # fmt: skip
        for g in range(first, last):
            t_low, t_high = f_low, f_high
            for j in range(4):
                a = ex2_f32(fma_f32(s[16 * g + 4 * j], c, n_low))
                b = ex2_f32(fma_f32(s[16 * g + 4 * j + 1], c, n_low))
                x = ex2_f32(fma_f32(s[16 * g + 4 * j + 2], c, n_high))
                y = ex2_f32(fma_f32(s[16 * g + 4 * j + 3], c, n_high))
                s[16 * g + 4 * j] = a
                s[16 * g + 4 * j + 1] = b
                s[16 * g + 4 * j + 2] = x
                s[16 * g + 4 * j + 3] = y
                low, high = add_f32(a, b), add_f32(x, y)
                t_low = low if j == 0 else add_f32(t_low, low)
                t_high = high if j == 0 else add_f32(t_high, high)
            l_low[g] = fma_f32(l_low[g], f_low, t_low)
            l_high[g] = fma_f32(l_high[g], f_high, t_high)

    return largest, weigh, hide


@cache
def make_pack(dtype: str) -> Any:
    """f(s, p): weights s[64] rounded to p[32] i32, A of the eight products P V of 16 keys each."""
    pack = pack_bf16 if dtype == "bfloat16" else pack_f16

    @jit(device=True, forceinline=True)
    def pack_weights(s: Any, p: Any) -> None:
        for j in range(TILE // 4):
            p[j] = pack(s[2 * j], s[2 * j + 1])

    return pack_weights


@cache
def make_rescale(head_dim: int) -> Any:
    """f(o, f_low, f_high): o[head_dim / 2] times its row's factor, rounded."""
    pairs = head_dim // 8

    @jit(device=True, forceinline=True)
    def rescale(o: Any, f_low: Any, f_high: Any) -> None:
        for k in range(pairs):
            o[4 * k] = mul_f32(o[4 * k], f_low)
            o[4 * k + 1] = mul_f32(o[4 * k + 1], f_low)
            o[4 * k + 2] = mul_f32(o[4 * k + 2], f_high)
            o[4 * k + 3] = mul_f32(o[4 * k + 3], f_high)

    return rescale


@cache
def make_state(head_dim: int) -> tuple[Any, Any, Any, Any]:
    """(sums, keep, end_split, fold_into): what the end of a split does to a thread's rows.

    sums(places) -> l of a row, from the lane's four places. keep(o, state): o[head_dim / 2] to shared memory,
    16 bytes at a time from address `state` on, for this thread alone. end_split(m_low, m_high, sum_low,
    sum_high, rows): a split's m and l to shared memory, from address `rows` on, the same 16 bytes for a quad.
    fold_into(o, state, rows, splits, folds) -> (m_low, m_high, sum_low, sum_high): o becomes what was kept of
    `splits` splits folded with the one that ended, m and l too: kept beside it, and returned. What is kept in
    shared memory is held by no register while the next tile's weights are made.
    """
    vectors, folded, fold_factors, quad = head_dim // 8, make_folded(), make_fold_factors(), make_quad()
    quad_sum = quad[1]
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def sums(places: Any) -> Any:
        left = add_f32(quad_sum(places[0]), quad_sum(places[1]))
        return add_f32(left, add_f32(quad_sum(places[2]), quad_sum(places[3])))

    @jit(device=True, forceinline=True)
    def keep(o: Any, state: Any) -> None:
        four = cuda.local.array(4, np.float32)
        for k in range(vectors):
            for j in range(4):
                four[j] = o[4 * k + j]
            st_shared_v4(int32(state + k * VECTOR_STRIDE), four)

    @jit(device=True, forceinline=True)
    def end_split(m_low: Any, m_high: Any, sum_low: Any, sum_high: Any, rows: Any) -> None:
        four = cuda.local.array(4, np.float32)
        four[0], four[1], four[2], four[3] = m_low, m_high, sum_low, sum_high
        st_shared_v4(rows, four)
        cuda.syncwarp()

    @jit(device=True, forceinline=True)
    def fold_into(o: Any, state: Any, rows: Any, splits: Any, folds: Any) -> Any:
        ended = cuda.local.array(4, np.float32)
        four = cuda.local.array(4, np.float32)
        ld_shared_v4(ended, rows)
        m_low, m_high, sum_low, sum_high = ended[0], ended[1], ended[2], ended[3]
        if splits > 0:
            ld_shared_v4(four, int32(rows + ROW_STATE_BYTES // 2))
            m_low, a_low, b_low = fold_factors(four[0], m_low)
            m_high, a_high, b_high = fold_factors(four[1], m_high)
            sum_low = folded(four[2], a_low, sum_low, b_low)
            sum_high = folded(four[3], a_high, sum_high, b_high)
            if folds:
                for k in range(vectors):
                    ld_shared_v4(four, int32(state + k * VECTOR_STRIDE))
                    o[4 * k] = folded(four[0], a_low, o[4 * k], b_low)
                    o[4 * k + 1] = folded(four[1], a_low, o[4 * k + 1], b_low)
                    o[4 * k + 2] = folded(four[2], a_high, o[4 * k + 2], b_high)
                    o[4 * k + 3] = folded(four[3], a_high, o[4 * k + 3], b_high)
            cuda.syncwarp()
        four[0], four[1], four[2], four[3] = m_low, m_high, sum_low, sum_high
        st_shared_v4(int32(rows + ROW_STATE_BYTES // 2), four)
        cuda.syncwarp()
        return m_low, m_high, sum_low, sum_high

    return sums, keep, end_split, fold_into


@cache
def make_stage(head_dim: int, dtype: str) -> Any:
    """f(o, to, low_inverse, high_inverse, lane): o times its row's factor, rounded to the element type, to
    shared memory: a warp's 16 rows in panels of 64 columns, 16-byte units exchanged by the 128-byte
    swizzle."""
    pack = pack_bf16 if dtype == "bfloat16" else pack_f16
    panels = head_dim // 64
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def stage(o: Any, to: Any, low: Any, high: Any, lane: Any) -> None:
        swizzle, half = int32(lane & 7), int32(lane >> 4)
        row = int32((lane & 7) + ((lane >> 3) & 1) * 8)
        base = int32(to + row * 128)
        for panel in range(panels):
            for pair in range(4):
                at = 32 * panel + 8 * pair
                stmatrix_x4(
                    int32(base + panel * STAGE_BYTES + (((2 * pair + half) ^ swizzle) << 4)),
                    pack(mul_f32(o[at], low), mul_f32(o[at + 1], low)),
                    pack(mul_f32(o[at + 2], high), mul_f32(o[at + 3], high)),
                    pack(mul_f32(o[at + 4], low), mul_f32(o[at + 5], low)),
                    pack(mul_f32(o[at + 6], high), mul_f32(o[at + 7], high)),
                )  # fmt: skip

    return stage
