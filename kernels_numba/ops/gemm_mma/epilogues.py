"""What happens to a finished product before it leaves: nothing, a residual added, or SiLU-and-multiply.

Each works on packs of 8 elements that the product's epilogue has rounded and staged, and rounds where the
unfused composition does (the table in sharp/model.py): so a fused product has the bits of gemm followed by
rms_norm's addition, or by rung "warp" of silu_mul. Knows: arithmetic on 16-bit elements. Refuses to know:
tiles, addresses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.compiler import jit
from kernels_numba.ops.warp.elements import make_elements
from kernels_numba.ptx.arith import add_f32, ex2_f32, mul_f32
from kernels_numba.ptx.quotients import divide_full_f32

EPILOGUES = ("none", "residual", "silu_mul")
LOG2_E = 1.4426950408889634


def make_add_pack(dtype: str) -> Any:
    """add_pack(words, other, at): the 8 elements in words i32[4] become x + those in other[at .. at + 3],
    added in float32, rounded once more."""
    low, high, pack = make_elements(dtype)

    @jit(device=True, forceinline=True)
    def add_pack(words: Any, other: Any, at: Any) -> None:
        for word in range(4):
            mine = words[word]
            theirs = other[at + word]
            words[word] = pack(add_f32(low(theirs), low(mine)), add_f32(high(theirs), high(mine)))

    return add_pack


def make_silu_mul_pack(dtype: str) -> Any:
    """silu_mul_pack(gates, ups): the 8 gates in gates i32[4] become g / (1 + 2^(-g log2 e)) * u.

    Instruction for instruction rung "warp" of silu_mul (ops/warp/silu_mul.py); rounded once.
    """
    low, high, pack = make_elements(dtype)

    @jit(device=True, forceinline=True)
    def silu_mul_one(gate: Any, up: Any) -> Any:
        power = ex2_f32(mul_f32(gate, np.float32(-LOG2_E)))
        return mul_f32(divide_full_f32(gate, add_f32(np.float32(1), power)), up)

    @jit(device=True, forceinline=True)
    def silu_mul_pack(gates: Any, ups: Any) -> None:
        for word in range(4):
            gate = gates[word]
            up = ups[word]
            gates[word] = pack(silu_mul_one(low(gate), low(up)), silu_mul_one(high(gate), high(up)))

    return silu_mul_pack
