"""What the warp kernels share: the real number of rows, elements out of words and back, sums over lanes.

Knows: device helpers. Refuses to know: any op.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ptx.arith import add_f32, fma_f32, mul_f32
from kernels_numba.ptx.halves import bf16_high, bf16_low, f16_high, f16_low
from kernels_numba.ptx.ldst import ld_global_i32
from kernels_numba.ptx.mma import pack_bf16, pack_f16
from kernels_numba.ptx.shuffle import shfl_xor_f32

WARP = 32
PACK = 16  # bytes a lane moves at once: 8 elements of 16 bits
ELEMENTS = 8  # of a pack
PACK_WORDS = 4  # 32-bit words of a pack
NAN = {"bfloat16": 0x7FC07FC0, "float16": 0x7E007E00, "float32": 0x7FC00000}  # a word of NaN elements


def make_real_rows() -> Any:
    """real_rows(num_rows, rows) -> int32: what the i32 at address num_rows says, at most rows; rows if the
    address is 0."""
    int32 = cuda.types.int32

    @jit(device=True)
    def real_rows(num_rows: Any, rows: Any) -> Any:
        real = int32(rows)
        if num_rows != 0:
            told = int32(ld_global_i32(num_rows))
            if told < real:
                real = told
        return real

    return real_rows


def make_elements(dtype: str) -> tuple[Any, Any, Any]:
    """(low, high, pack) of "bfloat16" or "float16": the halves of a word as float32, and a word of two,
    rounded to nearest even."""
    return (bf16_low, bf16_high, pack_bf16) if dtype == "bfloat16" else (f16_low, f16_high, pack_f16)


def make_sum_of_squares(dtype: str) -> Any:
    """sum_of_squares(words, at, total) -> total + the squares of the 8 elements from words[at], one fma each,
    ascending."""
    low, high, _ = make_elements(dtype)

    @jit(device=True)
    def sum_of_squares(words: Any, at: Any, total: Any) -> Any:
        for word in range(4):
            first = low(words[at + word])
            second = high(words[at + word])
            total = fma_f32(first, first, total)
            total = fma_f32(second, second, total)
        return total

    return sum_of_squares


def make_scale_pack(dtype: str) -> Any:
    """scale_pack(words, at, scale, weight, weight_at): the 8 elements from words[at] become x scale weight,
    two products in that order, rounded once."""
    low, high, pack = make_elements(dtype)

    @jit(device=True)
    def scale_pack(words: Any, at: Any, scale: Any, weight: Any, weight_at: Any) -> None:
        for word in range(4):
            held = words[at + word]
            by = weight[weight_at + word]
            first = mul_f32(mul_f32(low(held), scale), low(by))
            second = mul_f32(mul_f32(high(held), scale), high(by))
            words[at + word] = pack(first, second)

    return scale_pack


def make_lane_sum(lanes: int) -> Any:
    """lane_sum(x) -> the sum over each group of `lanes` neighbours (a power of two up to 32), the same bits
    in all of them: halves are added, from the widest apart to neighbours."""
    steps = lanes.bit_length() - 1

    @jit(device=True)
    def lane_sum(x: Any) -> Any:
        for step in range(steps):
            x = add_f32(x, shfl_xor_f32(x, lanes >> (step + 1)))
        return x

    return lane_sum


def make_block_sum(warps: int) -> Any:
    """block_sum(x) -> the sum over a block of `warps` warps, the same bits in all threads: each warp's
    lane_sum, then the warps' ascending. Shared memory: f32[warps] partial sums; one barrier hands them
    over."""
    lane_sum = make_lane_sum(WARP)

    @jit(device=True)
    def block_sum(x: Any) -> Any:
        x = lane_sum(x)
        if warps > 1:
            s_partial = cuda.shared.array(warps, np.float32)
            s_partial[cuda.threadIdx.x >> 5] = x  # 32 lanes write the same
            cuda.syncthreads()
            x = s_partial[0]
            for warp in range(1, warps):
                x = add_f32(x, s_partial[warp])
        return x

    return block_sum
