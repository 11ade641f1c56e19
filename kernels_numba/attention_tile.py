"""Device functions of attention on tensor cores, shared by all kernels that keep attention_contract.py's
order.

All act on a warp's 16 rows in the accumulator layout of mma.sync and wgmma: lane 4 r + i holds rows r and r +
8 (called low and high), of 8 keys j the keys 2 i and 2 i + 1: s[4 j], s[4 j + 1] low, s[4 j + 2], s[4 j + 3]
high. A group is 32 keys, j = 0 to 3, 16 numbers from s[at] on. Knows: scores, weights, folds. Refuses to
know: where scores come from, which warp has which keys.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import jit
from kernels_numba.ptx.arith import add_f32, ex2_f32, fma_f32, max_f32, mul_f32, select_f32
from kernels_numba.ptx.mma import pack_bf16, pack_f16
from kernels_numba.ptx.shuffle import shfl_xor_f32

LOWEST = float("-inf")


@cache
def make_quad() -> tuple[Any, Any]:
    """(max, sum) over the four lanes that share a row: f(x) -> the same number in all four."""

    @jit(device=True, forceinline=True)
    def quad_max(x: Any) -> Any:
        x = max_f32(x, shfl_xor_f32(x, 1))
        return max_f32(x, shfl_xor_f32(x, 2))

    @jit(device=True, forceinline=True)
    def quad_sum(x: Any) -> Any:
        x = add_f32(x, shfl_xor_f32(x, 1))
        return add_f32(x, shfl_xor_f32(x, 2))

    return quad_max, quad_sum


@cache
def make_negated() -> Any:
    """f(m) -> -m, and 0 for m = -inf."""
    lowest, zero = np.float32(LOWEST), np.float32(0)

    @jit(device=True, forceinline=True)
    def negated(m: Any) -> Any:
        return select_f32(m == lowest, zero, -m)

    return negated


@cache
def make_group_max() -> Any:
    """f(s, at) -> (low, high): the lane's largest scores of a group."""

    @jit(device=True, forceinline=True)
    def group_max(s: Any, at: Any) -> Any:
        low = max_f32(s[at], s[at + 1])
        high = max_f32(s[at + 2], s[at + 3])
        for j in range(1, 4):
            low = max_f32(low, max_f32(s[at + 4 * j], s[at + 4 * j + 1]))
            high = max_f32(high, max_f32(s[at + 4 * j + 2], s[at + 4 * j + 3]))
        return low, high

    return group_max


@cache
def make_group_weights(dtype: str) -> Any:
    """f(s, at, p, p_at, c, n_low, n_high) -> (t_low, t_high): the lane's sums of a group's weights
    ex2(fma(s, c, n)), unrounded; p[p_at : p_at + 8] i32: the weights rounded, as A of two k-steps of 16
    keys."""
    pack = pack_bf16 if dtype == "bfloat16" else pack_f16
    zero = np.float32(0)

    @jit(device=True, forceinline=True)
    def group_weights(s: Any, at: Any, p: Any, p_at: Any, c: Any, n_low: Any, n_high: Any) -> Any:
        t_low = zero
        t_high = zero
        for j in range(4):
            a = ex2_f32(fma_f32(s[at + 4 * j], c, n_low))
            b = ex2_f32(fma_f32(s[at + 4 * j + 1], c, n_low))
            x = ex2_f32(fma_f32(s[at + 4 * j + 2], c, n_high))
            y = ex2_f32(fma_f32(s[at + 4 * j + 3], c, n_high))
            p[p_at + 2 * j] = pack(a, b)
            p[p_at + 2 * j + 1] = pack(x, y)
            t_low = add_f32(t_low, add_f32(a, b))  # 0 + the first pair is the pair
            t_high = add_f32(t_high, add_f32(x, y))
        return t_low, t_high

    return group_weights


@cache
def make_fold_factors() -> Any:
    """f(m1, m2) -> (m, a, b): the larger, and what sums and outputs of either side are multiplied by."""
    negated = make_negated()

    @jit(device=True, forceinline=True)
    def fold_factors(m1: Any, m2: Any) -> Any:
        m = max_f32(m1, m2)
        n = negated(m)
        return m, ex2_f32(add_f32(m1, n)), ex2_f32(add_f32(m2, n))

    return fold_factors


@cache
def make_folded() -> Any:
    """f(x1, a, x2, b) -> fma(x1, a, x2 b): a sum or an output of two ranges of splits."""

    @jit(device=True, forceinline=True)
    def folded(x1: Any, a: Any, x2: Any, b: Any) -> Any:
        return fma_f32(x1, a, mul_f32(x2, b))

    return folded
