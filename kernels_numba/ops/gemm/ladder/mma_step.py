"""GEMM, step 3: tensor cores, a warp at a time (mma.sync), and loads that run while the warps multiply.

New against the tiled step (../__init__.py): the products are instructions on 16 x 8 x 16 blocks (mma.sync),
whose operands ldmatrix deals out of shared memory, and tiles arrive in the background (cp.async), one ahead.
sm_80 and newer. Knows: one tile shape. Refuses to know: what a row belongs to; K is walked upward from 0, 16
at a time, so a row's bits depend on itself, the weights and K alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.cost import ITEMSIZE
from kernels_numba.launch import Kernel
from kernels_numba.ops.gemm.door import operands, require_capability
from kernels_numba.ptx.control import dynamic_shared
from kernels_numba.ptx.cp_async import cp_async_16_zfill, cp_async_commit, cp_async_wait
from kernels_numba.ptx.epilogue import make_add_bias, make_store_rows
from kernels_numba.ptx.matrix import ldmatrix_x4
from kernels_numba.ptx.mma import mma_m16n8k16_at
from kernels_numba.ptx.residual import make_add_rows
from kernels_numba.smem import SmemPlan

TILE_M, TILE_N, TILE_K = 128, 128, 64
WARP_M, WARP_N = 32, 64  # outputs of one warp: 4 x 2 warps make the tile
THREADS = 256
ROW = TILE_K * 2  # bytes of a tile's row: 8 units of 16
STAGES = 2  # one tile being multiplied, one on its way
PLAN = SmemPlan.of(
    ("x", TILE_M * ROW, 1024, STAGES),
    ("weight", TILE_N * ROW, 1024, STAGES),
    limit=101_376,  # of a block on sm_86, 89 and 120
)
SIGNATURE = "void(int64, int64, int64, int64, int64, int32, int32, int32, int32, int64, int64, int32)"


def make_mma_step_kernel(out_dtype: str, has_bias: bool, has_residual: bool = False) -> Any:
    """out[m, n] = sum over k of x[m, k] weight[n, k] (+ bias[n]), accumulated in float32, rounded once; with
    has_residual, residual[m, n] + that, rounded.

    Arguments: addresses of out O[M, N], x bf16[M, K], weight bf16[N, K], bias bf16[N], residual bf16[M, N],
    which may be out; m, n, k; bytes from one row to the next of out, x, weight, residual.
    Who does what: a block makes one 128 x 128 tile, block b that of row tile b % tiles_m. All threads copy
    (16 bytes a cp.async); warp w multiplies rows 32 (w / 2) and columns 64 (w % 2) on: 2 x 8 mma.sync a step.
    Shared memory: x bf16[2][128, 64] at 0 and 16,384, weight the same at 32,768 and 49,152. Unit u (16 bytes)
    of row r lies at place u ^ (r % 8) of its row: so the 8 rows of an 8 x 8 matrix, read at the same u, come
    from 8 different groups of banks. Past M, N and K the tiles hold zeros.
    Hand-overs: cp_async_wait(1) and the first barrier: this tile has arrived, everybody's part of it; the
    second barrier: everybody has read it, the copy after next may overwrite it.
    """
    s_x, s_weight, tile_bytes = PLAN.offset("x"), PLAN.offset("weight"), TILE_M * ROW
    held = WARP_N // 2  # outputs of 16 rows that a thread holds
    item = ITEMSIZE[out_dtype]
    add_bias, store_rows = make_add_bias(WARP_N, "bfloat16"), make_store_rows(WARP_N, out_dtype)
    add_rows = make_add_rows(WARP_N, "bfloat16")
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def load(tile: Any, matrix: Any, stride: Any, first: Any, rows: Any, k_at: Any, k: Any) -> None:
        """Queue the copy of 128 rows of 64 elements: a thread takes unit t % 8 of rows t / 8, + 32, ..."""
        thread = int32(cuda.threadIdx.x)
        unit, line = int32(thread & 7), int32(thread >> 3)
        k_mine = int32(k_at + unit * 8)
        to = int32(tile + line * ROW + ((unit ^ (line & 7)) << 4))
        for i in range(4):
            row = int32(first + line + 32 * i)
            # Of no valid bytes nothing is read, and 16 zeros are written.
            valid = int32(16 * int32(row < rows) * int32(k_mine < k))
            cp_async_16_zfill(int32(to + 32 * ROW * i), matrix + int64(row) * stride + k_mine * 2, valid)

    def mma_step_kernel(
        out: Any, x: Any, weight: Any, bias: Any, residual: Any, m: Any, n: Any, k: Any,
        out_stride: Any, x_stride: Any, weight_stride: Any, residual_stride: Any,
    ) -> None:  # fmt: skip
        smem = int32(dynamic_shared())
        thread, block = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        warp, lane = int32(thread >> 5), int32(thread & 31)
        tiles_m = int32((m + TILE_M - 1) // TILE_M)
        row0, col0 = int32(block % tiles_m * TILE_M), int32(block // tiles_m * TILE_N)
        warp_row, warp_col = int32((warp >> 1) * WARP_M), int32((warp & 1) * WARP_N)
        # Which row and half of a 16 x 16 block this lane names to ldmatrix, in the order of mma's registers.
        x_line, x_half = int32(warp_row + (lane & 15)), int32(lane >> 4)
        w_line, w_half = int32(warp_col + (lane & 7) + ((lane >> 4) << 3)), int32((lane >> 3) & 1)
        swizzle = int32(lane & 7)  # of both lines: their row % 8

        top = cuda.local.array(held, np.float32)  # the warp's upper 16 rows
        bottom = cuda.local.array(held, np.float32)
        a_top = cuda.local.array(4, np.int32)
        a_bottom = cuda.local.array(4, np.int32)
        b = cuda.local.array(4, np.int32)
        for i in range(held):
            top[i] = np.float32(0)
            bottom[i] = np.float32(0)

        load(smem + s_x, x, x_stride, row0, m, int32(0), k)
        load(smem + s_weight, weight, weight_stride, col0, n, int32(0), k)
        cp_async_commit()
        stage = int32(0)
        k_at = int32(0)
        while k_at < k:
            k_next = int32(k_at + TILE_K)
            if k_next < k:
                other = int32(smem + (stage ^ 1) * tile_bytes)
                load(other + s_x, x, x_stride, row0, m, k_next, k)
                load(other + s_weight, weight, weight_stride, col0, n, k_next, k)
            cp_async_commit()  # an empty group at the end keeps the count
            cp_async_wait(1)
            cuda.syncthreads()
            x_tile = int32(smem + s_x + stage * tile_bytes + x_line * ROW)
            w_tile = int32(smem + s_weight + stage * tile_bytes + w_line * ROW)
            for step in range(TILE_K // 16):
                x_at = int32(x_tile + (((2 * step + x_half) ^ swizzle) << 4))
                w_at = int32(w_tile + (((2 * step + w_half) ^ swizzle) << 4))
                ldmatrix_x4(a_top, x_at)
                ldmatrix_x4(a_bottom, int32(x_at + 16 * ROW))
                for pair in range(WARP_N // 16):  # 16 columns: b[0:2] the first 8, b[2:4] the others
                    ldmatrix_x4(b, int32(w_at + 16 * ROW * pair))
                    mma_m16n8k16_at(top, 8 * pair, a_top, 0, b, 0)
                    mma_m16n8k16_at(top, 8 * pair + 4, a_top, 0, b, 2)
                    mma_m16n8k16_at(bottom, 8 * pair, a_bottom, 0, b, 0)
                    mma_m16n8k16_at(bottom, 8 * pair + 4, a_bottom, 0, b, 2)
            cuda.syncthreads()
            stage = int32(stage ^ 1)
            k_at = k_next

        # Accumulators lie as wgmma's (ptx/epilogue.py): rows lane / 4 and 8 below, columns 2 (lane % 4) on.
        row = int32(row0 + warp_row + (lane >> 2))
        col = int32(col0 + warp_col + (lane & 3) * 2)
        if has_bias:
            add_bias(top, bias + int64(col) * 2, col, n)
            add_bias(bottom, bias + int64(col) * 2, col, n)
        if has_residual:
            there = int64(residual + int64(row) * int64(residual_stride) + int64(col) * item)
            add_rows(top, there, residual_stride, col, n, int32(row < m), int32(row + 8 < m))
            there = int64(there + int64(16) * int64(residual_stride))
            add_rows(bottom, there, residual_stride, col, n, int32(row + 16 < m), int32(row + 24 < m))
        at = int64(out + int64(row) * out_stride + int64(col) * item)
        store_rows(top, at, out_stride, col, n, int32(row < m), int32(row + 8 < m))
        at = int64(at + int64(16) * out_stride)
        store_rows(bottom, at, out_stride, col, n, int32(row + 16 < m), int32(row + 24 < m))

    return mma_step_kernel


@cache
def mma_step_kernel(out_dtype: str, has_bias: bool, has_residual: bool = False) -> Kernel:
    """The kernel of one specialisation, compiled when first launched."""
    name = f"gemm_mma_step_{out_dtype}" + "_bias" * has_bias + "_residual" * has_residual
    key = (out_dtype, has_bias, has_residual)
    return Kernel(name, lambda: make_mma_step_kernel(*key), key, SIGNATURE, THREADS, PLAN.bytes)


def gemm_mma_step(
    out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None, stream: Any = None
) -> None:
    """Rung "mma_step": out[M, N] = x[M, K] @ weight[N, K]^T (+ bias[N]) on tensor cores, sm_80 and newer.

    x, weight, bias: bfloat16 bits as uint16; out: the same, or float32. N and K are multiples of 8. residual
    bf16[M, N], which may be out: out = residual + the rounded product. ValueError for wrong dtypes, shapes,
    strides, alignment, or an older GPU.
    """
    require_capability("mma_step")
    given = operands(out, x, weight, bias, residual=residual)
    if given.m == 0:
        return
    kernel = mma_step_kernel(given.out_dtype, bias is not None, residual is not None)
    arguments = (
        given.out, given.x, given.weight, given.bias, given.residual, given.m, given.n, given.k,
        given.out_stride, given.x_stride, given.weight_stride, given.residual_stride,
    )  # fmt: skip
    kernel.prepare(-(-given.m // TILE_M) * -(-given.n // TILE_N), arguments)(stream)
