"""The mma.sync GEMM: cp.async stages, fragments one step ahead, one tile a block.

Knows: one kernel for many tokens and few, all tiles of config.py. Refuses to know what a row of x belongs to:
an output is one chain of m16n8k16 products over K, ascending from 0, whatever the tile, the other rows and M.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.launch import Kernel
from kernels_numba.ops.gemm_few.epilogue import EPILOGUES, make_finish
from kernels_numba.ops.gemm_mma.config import ITEM, MmaConfig, smem_plan
from kernels_numba.ops.warp.door import ARCHS
from kernels_numba.ops.warp.elements import make_real_rows
from kernels_numba.ptx.control import dynamic_shared
from kernels_numba.ptx.cp_async import cp_async_16_zfill, cp_async_commit, cp_async_wait
from kernels_numba.ptx.mma_tile import (
    make_add_bias_tile,
    make_load_fragments,
    make_mma_tile,
    make_stage_tile,
    make_store_tile,
)
from kernels_numba.ptx.packs import ld_global_v4_if_at, st_global_v4_if_at
from kernels_numba.ptx.vector import ld_shared_v4

SIGNATURE = (
    "void(int64, int64, int64, int64, int64, int64, int32, int32, int32, int32, int32, int32, int32, int32)"
)
HELD = 4  # packs of the residual that a thread has on their way


def make_gemm_mma_kernel(
    config: MmaConfig, dtype: str, out_dtype: str, has_bias: bool, epilogue: str = ""
) -> Any:
    """out[m, n] = finish(sum over k of x[m, k] weight[n, k] (+ bias[n])), accumulated in float32.

    Arguments: addresses of out O[rows, N] (silu: [rows, N / 2]), x T[rows, K], weight T[N, K], bias T[N],
    residual T[rows, N] (may be out), num_rows i32[1] with the real number of rows, or 0; rows; n; k; bytes
    from row to row of out, x, weight and residual; group: row tiles walked together.
    finish: rounding to O; residual: rounding to T, then residual + that in float32, rounded; silu: gate
    and up rounded to T, then silu(gate) up, rounded, of columns 16 j + c and 16 j + 8 + c.
    Who does what: a block makes one tile_m x tile_n tile, warp w the warp_m x warp_n outputs at rows (w /
    warps_n) warp_m and columns (w % warps_n) warp_n. All threads copy, 16 bytes a cp.async: thread t unit t %
    units of rows t / units, + lines, ... Blocks are numbered along `group` row tiles of one column tile, then
    the next column; blocks past the real rows leave at once.
    Shared memory: stage s at s stage_bytes, tile_m rows of x, then tile_n rows of weight, of 4 or 8 units of
    16 bytes. Unit u of row r lies at place u ^ (r % 8) of its 128 bytes (tile_k 64), or u ^ (r / 2 % 4) of
    its 64: the 8 rows of an 8 x 8 matrix, at one u, then fill all 32 banks. Past M, N and K the tiles hold
    zeros, which are not read from anywhere. In the end the first tile_m pitch bytes hold the rounded results.
    Hand-overs, once a step of K: cp_async_wait(stages - 2) and the barrier say that the next stage has
    arrived from everybody, and that everybody has taken its last fragments out of the stage before, which the
    next copies overwrite. The fragments of a step are loaded while the step before is multiplied, across
    stages too (after the last step they come from a stage that is not needed, and are not used).
    """
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue is {epilogue!r}; there are {', '.join(map(repr, EPILOGUES))}")
    if out_dtype != dtype and (out_dtype != "float32" or epilogue):
        raise ValueError(f"epilogue {epilogue!r} from {dtype} to {out_dtype}: {dtype} is required")
    tile_m, tile_n, tile_k, stages = config.tile_m, config.tile_n, config.tile_k, config.stages
    warps_n, warp_m, warp_n = config.warps_n, config.warp_m, config.warp_n
    row_bytes, lines, threads, pitch = config.row_bytes, config.lines, config.threads, config.pitch
    stage_bytes, stages_end, weight_at = config.stage_bytes, stages * config.stage_bytes, tile_m * row_bytes
    units, swizzle_shift = row_bytes // 16, 0 if tile_k == 64 else 1
    ahead, pending, last_step, more_pairs = stages - 1, stages - 2, tile_k // 16 - 1, tile_k // 32 - 1
    row_blocks, column_blocks = warp_m // 16, warp_n // 8
    accumulators, a_words, b_words = 4 * row_blocks * column_blocks, 4 * row_blocks, 2 * column_blocks
    load_a = make_load_fragments(row_blocks, row_bytes)
    load_b = make_load_fragments(column_blocks // 2, row_bytes)
    multiply = make_mma_tile(row_blocks, column_blocks // 2, dtype)
    add_bias = make_add_bias_tile(row_blocks, column_blocks, dtype)
    stage_tile = make_stage_tile(row_blocks, column_blocks, dtype, pitch)
    store_tile = make_store_tile(row_blocks, column_blocks)
    staged, gated, added = out_dtype != "float32", epilogue == "silu", epilogue == "residual"
    out_units = tile_n // 16 if gated else tile_n // 8
    out_lines = threads // out_units
    held = min(HELD, -(-tile_m // out_lines))
    rounds = -(-tile_m // (out_lines * held))
    held_words, unit_bytes = 4 * held, 32 if gated else 16
    real_rows, finish = make_real_rows(), make_finish(epilogue, dtype)
    int32, int64, uint32 = cuda.types.int32, cuda.types.int64, cuda.types.uint32

    @jit(device=True)
    def tile_of(tile: Any, tiles_m: Any, tiles_n: Any, group: Any) -> Any:
        """Row and column of the tile-th tile: group row tiles of one column, then the next column."""
        per_group = uint32(uint32(group) * tiles_n)
        which = uint32(tile // per_group)
        first = uint32(which * uint32(group))
        height = uint32(min(uint32(tiles_m - first), uint32(group)))
        rest = uint32(tile - which * per_group)
        return int32(first + rest % height), int32(rest // height)

    @jit(device=True, forceinline=True)
    def copy(to: Any, source: Any, step: Any, left: Any, valid: Any, count: Any) -> None:
        """Queue this thread's 16 bytes of `count` rows, `lines` apart; of rows from `left` on, zeros."""
        for i in range(count):
            there = int32(valid * int32(int32(lines * i) < left))
            cp_async_16_zfill(int32(to + lines * row_bytes * i), source, there)
            source = int64(source + step)

    @jit(device=True, forceinline=True)
    def load_step(a: Any, b: Any, a_at: Any, b_at: Any, a_unit: Any, b_unit: Any, step: Any) -> None:
        """The fragments of 16 of K; a_unit, b_unit: where this lane's unit of step 0 lies in its row."""
        load_a(a, int32(a_at + (a_unit ^ (32 * step))))
        load_b(b, int32(b_at + (b_unit ^ (32 * step))))

    @jit(device=True, forceinline=True)
    def store_staged(
        smem: Any, thread: Any, out: Any, residual: Any, rows: Any, cols: Any, out_stride: Any,
        residual_stride: Any,
    ) -> None:  # fmt: skip
        """The staged tile to global memory, 16 bytes a store; out, residual: addresses of the tile's corner;
        rows, cols: how many rows of the tile and columns of out there are from there on."""
        unit, line = int32(thread % out_units), int32(thread // out_units)
        words = cuda.local.array(4, np.int32)
        others = cuda.local.array(4, np.int32)
        more = cuda.local.array(held_words, np.int32)
        inside = int32(unit * 8 < cols)
        for turn in range(rounds):
            first = int32(turn * (held * out_lines) + line)
            if added:
                for i in range(held):
                    row = int32(first + i * out_lines)
                    may = int32(inside * int32(row < rows))
                    at = int64(residual + int64(row) * int64(residual_stride) + int64(unit) * 16)
                    ld_global_v4_if_at(may, more, 4 * i, at)
            for i in range(held):
                row = int32(first + i * out_lines)
                may = int32(inside * int32(row < rows))
                if may != 0:
                    at = int32(smem + row * pitch + unit * unit_bytes)
                    ld_shared_v4(words, at)
                    if added:
                        for word in range(4):
                            others[word] = more[4 * i + word]
                    if gated:
                        ld_shared_v4(others, int32(at + 16))
                    finish(words, others)
                    to = int64(out + int64(row) * int64(out_stride) + int64(unit) * 16)
                    st_global_v4_if_at(may, to, words, 0)

    def gemm_mma(
        out: Any, x: Any, weight: Any, bias: Any, residual: Any, num_rows: Any, rows: Any, n: Any, k: Any,
        out_stride: Any, x_stride: Any, weight_stride: Any, residual_stride: Any, group: Any,
    ) -> None:  # fmt: skip
        m = int32(real_rows(num_rows, rows))
        tiles_m = uint32(uint32(m + (tile_m - 1)) // uint32(tile_m))
        tiles_n = uint32(uint32(n + (tile_n - 1)) // uint32(tile_n))
        block = uint32(cuda.blockIdx.x)
        if m > 0 and block < uint32(tiles_m * tiles_n):
            tile_row, tile_col = tile_of(block, tiles_m, tiles_n, group)
            row0, col0 = int32(tile_row * tile_m), int32(tile_col * tile_n)
            smem, thread = int32(dynamic_shared()), int32(cuda.threadIdx.x)
            warp, lane = int32(thread >> 5), int32(thread & 31)

            # What this thread copies.
            unit, line = int32(thread % units), int32(thread // units)
            to = int32(smem + line * row_bytes + ((unit ^ ((line >> swizzle_shift) & (units - 1))) << 4))
            x_left, weight_left = int32(m - row0 - line), int32(n - col0 - line)
            x_from = int64(x + int64(row0 + line) * int64(x_stride) + int64(unit) * 16)
            weight_from = int64(weight + int64(col0 + line) * int64(weight_stride) + int64(unit) * 16)
            x_step, weight_step = int64(x_stride) * lines, int64(weight_stride) * lines
            k_mine, k_left = int32(unit * 8), int32(k)  # k_left: of K, not asked for yet

            # Which row and half of a 16 x 16 block this lane names to ldmatrix, in the order of mma's
            # registers.
            warp_row, warp_col = int32(warp // warps_n * warp_m), int32(warp % warps_n * warp_n)
            a_line, a_half = int32(warp_row + (lane & 15)), int32(lane >> 4)
            b_line, b_half = int32(warp_col + (lane & 7) + ((lane >> 4) << 3)), int32((lane >> 3) & 1)
            swizzle = int32(((lane & 7) >> swizzle_shift) & (units - 1))  # of both lines: they differ by 8s
            a_unit, b_unit = int32((a_half ^ swizzle) << 4), int32((b_half ^ swizzle) << 4)
            a_at = int32(smem + a_line * row_bytes)
            b_at = int32(smem + weight_at + b_line * row_bytes)

            acc = cuda.local.array(accumulators, np.float32)
            a_even = cuda.local.array(a_words, np.int32)
            b_even = cuda.local.array(b_words, np.int32)
            a_odd = cuda.local.array(a_words, np.int32)
            b_odd = cuda.local.array(b_words, np.int32)
            for i in range(accumulators):
                acc[i] = np.float32(0)

            fetch = int32(0)  # bytes from the first stage to the one that is filled next
            for _ in range(ahead):
                if k_left > 0:
                    valid = int32(16 * int32(k_mine < k_left))
                    copy(int32(to + fetch), x_from, x_step, x_left, valid, tile_m // lines)
                    copy(
                        int32(to + fetch + weight_at), weight_from, weight_step, weight_left, valid,
                        tile_n // lines,
                    )  # fmt: skip
                cp_async_commit()  # an empty group at the end keeps the count
                x_from, weight_from = int64(x_from + tile_k * ITEM), int64(weight_from + tile_k * ITEM)
                k_left = int32(k_left - tile_k)
                fetch = int32(fetch + stage_bytes)
            cp_async_wait(pending)
            cuda.syncthreads()
            stage = int32(0)
            load_step(a_even, b_even, a_at, b_at, a_unit, b_unit, 0)
            k_at = int32(0)
            while k_at < k:
                a_stage, b_stage = int32(a_at + stage), int32(b_at + stage)
                for pair in range(more_pairs):
                    load_step(a_odd, b_odd, a_stage, b_stage, a_unit, b_unit, 2 * pair + 1)
                    multiply(acc, a_even, b_even)
                    load_step(a_even, b_even, a_stage, b_stage, a_unit, b_unit, 2 * pair + 2)
                    multiply(acc, a_odd, b_odd)
                load_step(a_odd, b_odd, a_stage, b_stage, a_unit, b_unit, last_step)
                if k_left > 0:
                    valid = int32(16 * int32(k_mine < k_left))
                    copy(int32(to + fetch), x_from, x_step, x_left, valid, tile_m // lines)
                    copy(
                        int32(to + fetch + weight_at), weight_from, weight_step, weight_left, valid,
                        tile_n // lines,
                    )  # fmt: skip
                cp_async_commit()
                x_from, weight_from = int64(x_from + tile_k * ITEM), int64(weight_from + tile_k * ITEM)
                k_left = int32(k_left - tile_k)
                fetch = int32(fetch + stage_bytes)
                if fetch == stages_end:
                    fetch = int32(0)
                multiply(acc, a_even, b_even)
                cp_async_wait(pending)
                cuda.syncthreads()
                stage = int32(stage + stage_bytes)
                if stage == stages_end:
                    stage = int32(0)
                load_step(a_even, b_even, int32(a_at + stage), int32(b_at + stage), a_unit, b_unit, 0)
                multiply(acc, a_odd, b_odd)
                k_at = int32(k_at + tile_k)

            my_row, my_col = int32(warp_row + (lane >> 2)), int32(warp_col + (lane & 3) * 2)
            if has_bias:
                add_bias(acc, int64(bias + int64(col0 + my_col) * ITEM), int32(n - col0 - warp_col))
            if staged:
                # Nobody reads anything that counts behind the loop's last barrier.
                stage_tile(acc, int32(smem + my_row * pitch + my_col * ITEM))
                cuda.syncthreads()
                first = int32(col0 >> 1) if gated else col0
                cols = int32(((n - col0) >> 1) if gated else n - col0)
                corner = int64(out + int64(row0) * int64(out_stride) + int64(first) * ITEM)
                other = int64(residual + int64(row0) * int64(residual_stride) + int64(first) * ITEM)
                mine = int32(min(int32(m - row0), int32(tile_m)))
                store_staged(smem, thread, corner, other, mine, cols, out_stride, residual_stride)
            else:
                at = int64(out + int64(row0 + my_row) * int64(out_stride) + int64(col0 + my_col) * 4)
                store_tile(acc, at, out_stride, int32(m - row0 - my_row), int32(n - col0 - warp_col))

    return gemm_mma


@cache
def mma_kernel(config: MmaConfig, dtype: str, out_dtype: str, has_bias: bool, epilogue: str = "") -> Kernel:
    """The kernel of one specialisation, compiled when first launched."""
    words = [str(config), dtype, out_dtype, *(["bias"] if has_bias else [])]
    words += [epilogue] if epilogue else []
    return Kernel(
        "_".join(["gemm_mma", *words]),
        lambda: make_gemm_mma_kernel(config, dtype, out_dtype, has_bias, epilogue),
        (config, dtype, out_dtype, has_bias, epilogue),
        SIGNATURE, config.threads, smem_plan(config).bytes, archs=(*ARCHS[False], *ARCHS[True]),
    )  # fmt: skip
