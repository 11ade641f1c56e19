"""GEMM, step 4: Hopper's matrix instruction, a warpgroup at a time (wgmma), fed by the copy engine (TMA).

New against step 3 (mma_step.py): one thread asks for a whole tile and the copy engine fetches and swizzles
it, so nobody computes addresses; and wgmma reads both operands from shared memory itself, so none passes
through registers. sm_90a. Knows: one tile shape. Refuses to know: what a row belongs to; K is walked upward
from 0, 16 at a time, so a row's bits depend on itself, the weights and K alone.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.cost import ITEMSIZE
from kernels_numba.launch import Kernel, address
from kernels_numba.ops.gemm.door import operands, require_capability
from kernels_numba.ptx.control import dynamic_shared, warp_uniform
from kernels_numba.ptx.epilogue import make_add_bias, make_store_rows
from kernels_numba.ptx.mbarrier import fence_mbarrier_init, mbarrier_expect_tx, mbarrier_init, mbarrier_wait
from kernels_numba.ptx.residual import make_add_rows
from kernels_numba.ptx.tma import encode_tensor_map, tma_load_2d
from kernels_numba.ptx.wgmma import descriptor_k_major, make_wgmma
from kernels_numba.smem import SmemPlan

TILE_M, TILE_N, TILE_K = 128, 128, 64
GROUP_M = 64  # rows of the tile that one warpgroup makes: wgmma's M
THREADS = 256  # two warpgroups
ROW = TILE_K * 2  # bytes of a tile's row: one line of the 128-byte swizzle
STAGES = 3  # so that two blocks fit an SM: while one waits or stores, the other multiplies
PLAN = SmemPlan.of(
    ("x", TILE_M * ROW, 1024, STAGES),
    ("weight", TILE_N * ROW, 1024, STAGES),
    ("full", 8, 8, STAGES),
    limit=232_448,
)
SIGNATURE = "void(int64, int64, int64, int64, int64, int32, int32, int32, int32, int32)"


def make_wgmma_kernel(out_dtype: str, has_bias: bool, has_residual: bool = False) -> Any:
    """out[m, n] = sum over k of x[m, k] weight[n, k] (+ bias[n]), accumulated in float32, rounded once; with
    has_residual, residual[m, n] + that, rounded.

    Arguments: x_map, weight_map: addresses of tensor maps (boxes [128, 64]); addresses of out O[M, N], bias
    bf16[N], residual bf16[M, N], which may be out; m, n, k; bytes from one row of out, residual to the next.
    Who does what: a block makes one 128 x 128 tile, block b that of row tile b % tiles_m. Thread 0 asks the
    copy engine for tiles; warpgroup g multiplies rows 64 g on: one wgmma m64n128k16 for 16 of K.
    Shared memory: x bf16[3][128, 64] at 0, weight the same at 49,152, barriers full[3] at 98,304. Tiles lie
    as in mma_step.py (unit u of row r at u ^ (r % 8)): here the copy engine does it, and wgmma knows it. Past
    M, N and K the copy engine delivers zeros.
    Hand-overs: full[s] (one arrival and the bytes): stage s has arrived; the block's barrier: both
    warpgroups have multiplied stage s, thread 0 may refill it.
    """
    s_x, s_weight, s_full = PLAN.offset("x"), PLAN.offset("weight"), PLAN.offset("full")
    tile_bytes = TILE_M * ROW
    held = TILE_N // 2  # outputs of a thread: 64 x 128 over 128 threads
    item = ITEMSIZE[out_dtype]
    multiply = make_wgmma(TILE_N, TILE_K // 16, "bfloat16", wait=0)
    add_bias, store_rows = make_add_bias(TILE_N, "bfloat16"), make_store_rows(TILE_N, out_dtype)
    add_rows = make_add_rows(TILE_N, "bfloat16")
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def load(smem: Any, stage: Any, x_map: Any, weight_map: Any, row0: Any, col0: Any, k_at: Any) -> None:
        """Ask for the tiles of x and weight from k_at on; their bytes count on full[stage]."""
        full = int32(smem + s_full + 8 * stage)
        mbarrier_expect_tx(full, 2 * tile_bytes)
        tma_load_2d(int32(smem + s_x + stage * tile_bytes), x_map, full, k_at, row0)
        tma_load_2d(int32(smem + s_weight + stage * tile_bytes), weight_map, full, k_at, col0)

    def wgmma_kernel(
        x_map: Any, weight_map: Any, out: Any, bias: Any, residual: Any, m: Any, n: Any, k: Any,
        out_stride: Any, residual_stride: Any,
    ) -> None:  # fmt: skip
        smem = int32(dynamic_shared())
        thread, block = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        warp, lane = int32(warp_uniform(int32(thread >> 5))), int32(thread & 31)
        tiles_m = int32((m + TILE_M - 1) // TILE_M)
        row0, col0 = int32(block % tiles_m * TILE_M), int32(block // tiles_m * TILE_N)
        group_row = int32((warp >> 2) * GROUP_M)
        if thread == 0:
            for stage in range(STAGES):
                mbarrier_init(int32(smem + s_full + 8 * stage), 1)
            fence_mbarrier_init()
            for stage in range(STAGES):
                if stage * TILE_K < k:
                    load(smem, int32(stage), x_map, weight_map, row0, col0, int32(stage * TILE_K))
        cuda.syncthreads()

        acc = cuda.local.array(held, np.float32)
        stage = int32(0)
        phase = int32(0)
        k_at = int32(0)
        while k_at < k:
            mbarrier_wait(int32(smem + s_full + 8 * stage), phase)
            x_tile = int32(smem + s_x + stage * tile_bytes + group_row * ROW)
            w_tile = int32(smem + s_weight + stage * tile_bytes)
            multiply(acc, descriptor_k_major(x_tile), descriptor_k_major(w_tile), k_at)  # k_at 0: acc starts
            cuda.syncthreads()
            k_refill = int32(k_at + STAGES * TILE_K)
            if thread == 0 and k_refill < k:
                load(smem, stage, x_map, weight_map, row0, col0, k_refill)
            k_at = int32(k_at + TILE_K)
            stage = int32(stage + 1)
            if stage == STAGES:
                stage = int32(0)
                phase = int32(phase ^ 1)

        row = int32(row0 + group_row + (warp & 3) * 16 + (lane >> 2))
        col = int32(col0 + (lane & 3) * 2)
        if has_bias:
            add_bias(acc, bias + int64(col) * 2, col, n)
        if has_residual:
            there = int64(residual + int64(row) * int64(residual_stride) + int64(col) * item)
            add_rows(acc, there, residual_stride, col, n, int32(row < m), int32(row + 8 < m))
        at = int64(out + int64(row) * out_stride + int64(col) * item)
        store_rows(acc, at, out_stride, col, n, int32(row < m), int32(row + 8 < m))

    return wgmma_kernel


@cache
def wgmma_kernel(out_dtype: str, has_bias: bool, has_residual: bool = False) -> Kernel:
    """The kernel of one specialisation, compiled when first launched."""
    name = f"gemm_wgmma_{out_dtype}" + "_bias" * has_bias + "_residual" * has_residual
    key = (out_dtype, has_bias, has_residual)
    return Kernel(name, lambda: make_wgmma_kernel(*key), key, SIGNATURE, THREADS, PLAN.bytes)


@lru_cache(maxsize=4096)
def _maps(x: tuple[int, int, int], weight: tuple[int, int, int], k: int) -> Any:
    """The two tensor maps on the device, u64[2, 16]; x, weight: (address, rows, bytes from row to row).

    A map says where a matrix lies, not what is in it: it stays true however often the memory is reused.
    """
    words = [
        encode_tensor_map(start, "bfloat16", (rows, k), (stride,), (TILE_M, TILE_K))
        for start, rows, stride in (x, weight)
    ]
    return cuda.to_device(np.stack(words))


def gemm_wgmma(
    out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None, stream: Any = None
) -> None:
    """Rung "wgmma": out[M, N] = x[M, K] @ weight[N, K]^T (+ bias[N]) on tensor cores, compute capability 9.0.

    x, weight, bias: bfloat16 bits as uint16; out: the same, or float32. N and K are multiples of 8. residual
    bf16[M, N], which may be out: out = residual + the rounded product. ValueError for wrong dtypes, shapes,
    strides, alignment, or another GPU.
    """
    require_capability("wgmma")
    given = operands(out, x, weight, bias, residual=residual)
    if given.m == 0:
        return
    kernel = wgmma_kernel(given.out_dtype, bias is not None, residual is not None)
    maps = address(
        _maps((given.x, given.m, given.x_stride), (given.weight, given.n, given.weight_stride), given.k)
    )
    arguments = (
        maps, maps + 128, given.out, given.bias, given.residual, given.m, given.n, given.k, given.out_stride,
        given.residual_stride,
    )  # fmt: skip
    kernel.prepare(-(-given.m // TILE_M) * -(-given.n // TILE_N), arguments)(stream)
