"""The two products of one warp: scores of 32 keys, and values added up over a page, from shared memory.

Knows: fragments and where ldmatrix finds them. Refuses to know: whose keys, when they came.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import BOX_BYTES
from kernels_numba.ptx.matrix import ldmatrix_x4, ldmatrix_x4_trans
from kernels_numba.ptx.mma import mma_m16n8k16_at, mma_m16n8k16_f16_at
from kernels_numba.ptx.vector import ld_shared_v4


@cache
def make_score(head_dim: int, dtype: str) -> Any:
    """f(s, at, query, keys, lane): s[at : at + 16] = Q K^T of 16 rows and 32 keys; query: A fragments of all
    k-steps; keys: shared address of the first key's row, as the 128-byte swizzle lays a page. Returns
    what no one knows before all products, and so all loads, have ended."""
    k_steps = head_dim // 16
    multiply = mma_m16n8k16_at if dtype == "bfloat16" else mma_m16n8k16_f16_at
    zero = np.float32(0)
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def score(s: Any, at: Any, query: Any, keys: Any, lane: Any) -> Any:
        b = cuda.local.array(4, np.int32)
        base = int32(((lane & 7) + ((lane >> 4) << 3)) * 128 + ((((lane >> 3) & 1) ^ (lane & 7)) << 4))
        for i in range(16):
            s[at + i] = zero
        for k in range(k_steps):
            for pair in range(2):
                row = int32(keys + (k >> 2) * BOX_BYTES + pair * 2048)
                ldmatrix_x4(b, int32((row + base) ^ ((k & 3) << 5)))
                multiply(s, at + 8 * pair, query, 4 * k, b, 0)
                multiply(s, at + 8 * pair + 4, query, 4 * k, b, 2)
        return int32(int32(s[at] == s[at + 4]) + int32(s[at + 8] == s[at + 12]))

    return score


@cache
def make_add_values(dtype: str) -> Any:
    """f(o, weights, values, lane): o[8] += P V of 16 rows and 16 columns over a page's 64 keys; weights: the
    lane's place in P (A fragments, 512 bytes a step); values: shared address of V[64, 16], rows of 32
    bytes."""
    multiply = mma_m16n8k16_at if dtype == "bfloat16" else mma_m16n8k16_f16_at
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def add_values(o: Any, weights: Any, values: Any, lane: Any) -> None:
        a = cuda.local.array(4, np.int32)
        b = cuda.local.array(4, np.int32)
        line = int32(((lane & 7) + (((lane >> 3) & 1) << 3)) * 32 + (lane >> 4) * 16)
        for step in range(4):
            ld_shared_v4(a, int32(weights + 512 * step))
            ldmatrix_x4_trans(b, int32(values + step * 512 + line))
            multiply(o, 0, a, 0, b, 0)
            multiply(o, 4, a, 0, b, 2)

    return add_values
