"""The two products of one warp, from shared memory: scores of 32 keys, and values added up over a page.

Both return a number that no one knows before all their products, and so all their loads, have ended
(make_read_by). Knows: fragments and where ldmatrix finds them. Refuses to know: whose keys, when they came.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import ADDERS, BOX_BYTES, ROWS
from kernels_numba.ptx.matrix import ldmatrix_x4, ldmatrix_x4_trans
from kernels_numba.ptx.mma import mma_m16n8k16_at, mma_m16n8k16_f16_at
from kernels_numba.ptx.vector import ld_shared_v4

QUERY_BOX = ROWS * 128  # bytes of 64 columns of the query's rows


@cache
def make_read_by() -> Any:
    """f(bar, loaded, nothing): the address `bar`, but not before `loaded` is there.

    An arrival does not wait for loads that are still under way, and the copy engine may then overwrite what
    they were to read: seen on an H100, where a neighbour's stores keep shared memory busy for longer than a
    page takes to come from L2. loaded: of the products, for the assembler changes the loads' order; nothing:
    0, which no compiler can know."""
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def read_by(bar: Any, loaded: Any, nothing: Any) -> Any:
        return int32(bar + int32(loaded & nothing))

    return read_by


@cache
def make_score(head_dim: int, dtype: str) -> Any:
    """f(s, query, keys, lane): s[16] = Q K^T of 16 rows and 32 keys; query: shared address of the rows, keys:
    of the first key's, both as the 128-byte swizzle lays 64 columns after another."""
    k_steps = head_dim // 16
    multiply = mma_m16n8k16_at if dtype == "bfloat16" else mma_m16n8k16_f16_at
    zero = np.float32(0)
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def score(s: Any, query: Any, keys: Any, lane: Any) -> Any:
        a = cuda.local.array(4, np.int32)
        b = cuda.local.array(4, np.int32)
        of_a = int32((lane & 15) * 128 + (((lane >> 4) ^ (lane & 7)) << 4))
        of_b = int32(((lane & 7) + ((lane >> 4) << 3)) * 128 + ((((lane >> 3) & 1) ^ (lane & 7)) << 4))
        for i in range(16):
            s[i] = zero
        for k in range(k_steps):
            turned = int32((k & 3) << 5)
            ldmatrix_x4(a, int32((query + (k >> 2) * QUERY_BOX + of_a) ^ turned))
            for pair in range(2):
                row = int32(keys + (k >> 2) * BOX_BYTES + pair * 2048)
                ldmatrix_x4(b, int32((row + of_b) ^ turned))
                multiply(s, 8 * pair, a, 0, b, 0)
                multiply(s, 8 * pair + 4, a, 0, b, 2)
        return int32(int32(s[0] == s[4]) + int32(s[8] == s[12]))

    return score


@cache
def make_accumulate(head_dim: int, dtype: str) -> Any:
    """f(o, weights, values, warp, lane): o += P V over a page's 64 keys, for the warp's columns of o;
    weights: the lane's place in P, values: shared address of the page."""
    warp_columns = head_dim // ADDERS
    pairs, units = warp_columns // 16, warp_columns // 8  # of 16 columns, of 8
    box_shift = (64 // warp_columns).bit_length() - 1
    multiply = mma_m16n8k16_at if dtype == "bfloat16" else mma_m16n8k16_f16_at
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def accumulate(o: Any, weights: Any, values: Any, warp: Any, lane: Any) -> Any:
        a = cuda.local.array(4, np.int32)
        b = cuda.local.array(4, np.int32)
        line = int32(((lane & 7) + (((lane >> 3) & 1) << 3)) * 128 + (warp >> box_shift) * BOX_BYTES)
        unit, swizzle = int32((warp & ((1 << box_shift) - 1)) * units + (lane >> 4)), int32(lane & 7)
        for step in range(4):
            ld_shared_v4(a, int32(weights + 512 * step))
            for pair in range(pairs):
                at = int32(values + step * 2048 + line + (((unit + 2 * pair) ^ swizzle) << 4))
                ldmatrix_x4_trans(b, at)
                multiply(o, 8 * pair, a, 0, b, 0)
                multiply(o, 8 * pair + 4, a, 0, b, 2)
        loaded = int32(0)
        for pair in range(pairs):
            loaded = int32(loaded + int32(o[8 * pair] == o[8 * pair + 4]))
        return loaded

    return accumulate
