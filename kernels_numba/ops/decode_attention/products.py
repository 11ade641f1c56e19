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

# By blocks that share an SM (and its registers): of how many steps a warp holds the operands. While one
# multiplies, loads of the next ones are under way.
STEPS_HELD = {1: 4, 2: 2}
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
def make_score(head_dim: int, dtype: str, blocks: int) -> Any:
    """f(s, query, keys, lane): s[16] = Q K^T of 16 rows and 32 keys; query: shared address of the rows, keys:
    of the first key's, both as the 128-byte swizzle lays 64 columns after another."""
    k_steps, depth = head_dim // 16, STEPS_HELD[blocks]
    ahead, held = depth - 1, 12 * depth
    multiply = mma_m16n8k16_at if dtype == "bfloat16" else mma_m16n8k16_f16_at
    zero = np.float32(0)
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def load(to: Any, k: Any, query: Any, keys: Any) -> None:
        """Step k's fragments to its place in `to`: A, then B of keys 0 to 15 and 16 to 31."""
        four = cuda.local.array(4, np.int32)
        turned, place = int32((k & 3) << 5), 12 * (k & ahead)
        ldmatrix_x4(four, int32((query + (k >> 2) * QUERY_BOX) ^ turned))
        for i in range(4):
            to[place + i] = four[i]
        for pair in range(2):
            ldmatrix_x4(four, int32((keys + (k >> 2) * BOX_BYTES + pair * 2048) ^ turned))
            for i in range(4):
                to[place + 4 + 4 * pair + i] = four[i]

    @jit(device=True, forceinline=True)
    def score(s: Any, query: Any, keys: Any, lane: Any) -> Any:
        steps = cuda.local.array(held, np.int32)
        query = int32(query + (lane & 15) * 128 + (((lane >> 4) ^ (lane & 7)) << 4))
        line = int32(((lane & 7) + ((lane >> 4) << 3)) * 128)
        keys = int32(keys + line + ((((lane >> 3) & 1) ^ (lane & 7)) << 4))
        for i in range(16):
            s[i] = zero
        for k in range(ahead):
            load(steps, k, query, keys)
        for k in range(k_steps):
            if k + ahead < k_steps:
                load(steps, k + ahead, query, keys)
            a = 12 * (k & ahead)
            for half in range(4):
                multiply(s, 4 * half, steps, a, steps, a + 4 + 2 * half)
        return int32(int32(s[0] == s[4]) + int32(s[8] == s[12]))

    return score


@cache
def make_accumulate(head_dim: int, dtype: str, blocks: int) -> Any:
    """f(o, weights, values, warp, lane): o += P V over a page's 64 keys, for the warp's columns of o;
    weights: the lane's place in P, values: shared address of the page."""
    warp_columns = head_dim // ADDERS
    pairs, units = warp_columns // 16, warp_columns // 8  # of 16 columns, of 8
    box_shift, depth = (64 // warp_columns).bit_length() - 1, STEPS_HELD[blocks]
    ahead, words = depth - 1, 4 + 4 * pairs
    held = words * depth
    multiply = mma_m16n8k16_at if dtype == "bfloat16" else mma_m16n8k16_f16_at
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def load(to: Any, step: Any, weights: Any, values: Any, unit: Any, swizzle: Any) -> None:
        """A step's fragments to its place in `to`: A, then B of each pair of 8 columns."""
        four = cuda.local.array(4, np.int32)
        place = words * (step & ahead)
        ld_shared_v4(four, int32(weights + 512 * step))
        for i in range(4):
            to[place + i] = four[i]
        for pair in range(pairs):
            ldmatrix_x4_trans(four, int32(values + step * 2048 + (((unit + 2 * pair) ^ swizzle) << 4)))
            for i in range(4):
                to[place + 4 + 4 * pair + i] = four[i]

    @jit(device=True, forceinline=True)
    def accumulate(o: Any, weights: Any, values: Any, warp: Any, lane: Any) -> Any:
        steps = cuda.local.array(held, np.int32)
        line = int32(((lane & 7) + (((lane >> 3) & 1) << 3)) * 128 + (warp >> box_shift) * BOX_BYTES)
        unit, swizzle = int32((warp & ((1 << box_shift) - 1)) * units + (lane >> 4)), int32(lane & 7)
        values = int32(values + line)
        for step in range(ahead):
            load(steps, step, weights, values, unit, swizzle)
        for step in range(4):
            if step + ahead < 4:
                load(steps, step + ahead, weights, values, unit, swizzle)
            a = words * (step & ahead)
            for half in range(2 * pairs):
                multiply(o, 4 * half, steps, a, steps, a + 4 + 2 * half)
        loaded = int32(0)
        for pair in range(pairs):
            loaded = int32(loaded + int32(o[8 * pair] == o[8 * pair + 4]))
        return loaded

    return accumulate
