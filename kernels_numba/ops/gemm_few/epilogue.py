"""What a product becomes on its way out: a bias added, rounded, then nothing, a residual added, or SiLU.

    bias      product + bias[n] in float32, before the rounding
    ""        rounded once
    residual  residual + rounded, in float32, rounded again: what the rms_norm after a gemm does with its
              delta
    silu      rounded; then silu(gate) up in float32, rounded again: what silu_mul does after a gemm. Rows of
              weights are gates and ups in turn, 8 of each, so out has half as many columns

The roundings are those of the unfused composition (the table in sharp/model.py), so its bits are, too. A
finish acts on packs of 16 bytes of the rounded product, 8 neighbours along n of one token, and not on
accumulators: a kernel with tokens as rows of its accumulators can take the same ones where it stores. Knows:
packs. Refuses to know: which thread has them, and from where.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.warp.elements import make_elements
from kernels_numba.ptx.arith import add_f32, ex2_f32, mul_f32, select_f32, select_i32
from kernels_numba.ptx.ldst import ld_global_i32
from kernels_numba.ptx.quotients import divide_full_f32

EPILOGUES = ("", "residual", "silu")
LOG2_E = 1.4426950408889634


def make_bias_of(dtype: str) -> Any:
    """f(bias, at, length) -> bias[at] as float32, 0 from `length` on. bias: address, a multiple of 4, of
    T[length], length even."""
    low, high, _ = make_elements(dtype)
    int32, int64 = cuda.types.int32, cuda.types.int64
    zero = np.float32(0)

    @jit(device=True, forceinline=True)
    def bias_of(bias: Any, at: Any, length: Any) -> Any:
        inside = int32(at < length)
        word = ld_global_i32(int64(bias + int64(select_i32(inside, int32(at & -2), 0)) * 2))
        return select_f32(inside, select_f32(int32(at & 1), high(word), low(word)), zero)

    return bias_of


def make_finish_residual(dtype: str) -> Any:
    """f(words, more): words[0..3], 8 rounded products, become more[0..3] + them, rounded."""
    low, high, pack = make_elements(dtype)

    @jit(device=True, forceinline=True)
    def finish(words: Any, more: Any) -> None:
        for i in range(4):
            first = add_f32(low(more[i]), low(words[i]))
            second = add_f32(high(more[i]), high(words[i]))
            words[i] = pack(first, second)

    return finish


def make_silu_mul_one() -> Any:
    """f(gate, up): g / (1 + 2^(-g log2 e)) times up, in float32; the operations are those of silu_mul's rung
    "warp"."""

    @jit(device=True, forceinline=True)
    def silu_mul_one(gate: Any, up: Any) -> Any:
        power = ex2_f32(mul_f32(gate, np.float32(-LOG2_E)))
        return mul_f32(divide_full_f32(gate, add_f32(np.float32(1), power)), up)

    return silu_mul_one


def make_finish_silu(dtype: str) -> Any:
    """f(words, more): words[0..3], 8 rounded gates, become silu(gate) times the ups more[0..3], rounded."""
    low, high, pack = make_elements(dtype)
    silu_mul_one = make_silu_mul_one()

    @jit(device=True, forceinline=True)
    def finish(words: Any, more: Any) -> None:
        for i in range(4):
            first = silu_mul_one(low(words[i]), low(more[i]))
            second = silu_mul_one(high(words[i]), high(more[i]))
            words[i] = pack(first, second)

    return finish


def make_finish(epilogue: str, dtype: str) -> Any:
    """The finish of "residual" or "silu"; of "" one that does nothing."""
    if epilogue == "residual":
        return make_finish_residual(dtype)
    if epilogue == "silu":
        return make_finish_silu(dtype)

    @jit(device=True, forceinline=True)
    def finish(words: Any, more: Any) -> None:
        pass

    return finish
