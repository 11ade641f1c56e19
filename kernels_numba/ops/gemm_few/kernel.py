"""The GEMM for few tokens on Hopper: weights as wgmma's rows, tokens as its columns, a persistent grid.

Knows: one warp-specialised kernel. Refuses to know what a token belongs to: its bits are the same whatever
the other tokens, their number and the tile are, because every tile walks K upward from 0 in steps of 64 and
adds the bias after that, in float32. That is the many-token kernel's order, too (ops/gemm/hopper.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.gemm.boxes import MAP_BYTES, MAPS, make_boxes_of_tile
from kernels_numba.ops.gemm_few.config import (
    GROUP_N,
    ITEM,
    PRODUCT,
    ROW,
    Build,
    FewConfig,
    smem_plan,
)
from kernels_numba.ops.gemm_few.epilogue import make_bias_of
from kernels_numba.ops.gemm_few.store import make_add_row_bias, make_store_float32, make_store_staged
from kernels_numba.ops.warp.elements import make_real_rows
from kernels_numba.ptx.control import dynamic_shared, elect_one, griddep_launch, griddep_wait, warp_uniform
from kernels_numba.ptx.debug import make_mbarrier_wait, make_stress
from kernels_numba.ptx.mbarrier import (
    fence_mbarrier_init,
    mbarrier_arrive,
    mbarrier_expect_tx,
    mbarrier_init,
)
from kernels_numba.ptx.policy import policy_evict_first, policy_evict_last, policy_evict_normal
from kernels_numba.ptx.tma import tma_load_2d_hint, tma_prefetch_map
from kernels_numba.ptx.wgmma import descriptor_k_major, make_wgmma, make_wgmma_wait

SIGNATURE = "void(int64, int64, int64, int64, int64, int32, int32, int32, int32, int32)"


def make_gemm_few_kernel(
    config: FewConfig, dtype: str, out_dtype: str, epilogue: str, has_bias: bool, build: Build = PRODUCT
) -> Any:
    """out[m, n] = finish(sum over k of x[m, k] weight[n, k] (+ bias[n])), accumulated in float32; epilogue:
    of epilogue.py.

    Arguments: maps: address of tensor maps u64[4, 16]: weight (boxes [tile_n, 64], then those of the last
    tile), x ([tile_t, 64], likewise); out, bias, residual: addresses (0 if unused); num_rows: address of
    i32[1], the real M, or 0 for `rows`; rows: of x and out, the most that M can be; n: rows of weights; k;
    out_stride, residual_stride: bytes from one token to the next.
    Who does what: warpgroups 0 to consumers - 1: wgmma on 64 rows of the tile's weights each, then the
    epilogue; one elected thread of the warp after them: the TMA producer. Blocks walk tiles blockIdx,
    blockIdx + gridDim, ...; neighbours have the same weights where there are several tiles of tokens.
    Shared memory: smem_plan(config). Barriers: full[s] hands a loaded stage to the consumers (1 arrival and
    the bytes), empty[s] hands it back (one arrival a consumer's warp); named barrier 1 + consumer: store.py.
    Weights are read once and leave L2 first, unless several tiles of tokens want them; tokens leave it last.
    Rows of x at and past the real M may be read and multiplied, but decide nothing; nothing of out outside
    [M, N] is written.
    Programmatic dependent launch: the block lets the next launch start at once, and itself fetches its first
    weights before it waits for the launches before it, where the first tile does not depend on M. So only
    weights must have been written before the chain of dependent launches began; x, num_rows, bias, residual
    and out may be written by it.
    """
    tile_n, tile_t, stages, consumers = config.tile_n, config.tile_t, config.stages, config.consumers
    plan = smem_plan(config)
    weight_at, x_at, out_at = plan.offset("weight"), plan.offset("x"), plan.offset("out")
    full_at, empty_at = plan.offset("full"), plan.offset("empty")
    weight_bytes, x_bytes, x_map = tile_n * ROW, tile_t * ROW, MAPS * MAP_BYTES
    boxes_of_tile = make_boxes_of_tile(tile_t, tile_n, MAPS, 0)
    staged_bytes, accumulators, consumer_weight = config.staged_bytes, tile_t // 2, GROUP_N * ROW
    narrow = out_dtype != "float32"
    out_item = ITEM if narrow else 4
    column_shift = 1 if epilogue == "silu" else 0
    multiply, finish = make_wgmma(tile_t, 4, dtype, wait=1), make_wgmma_wait(tile_t, 0)
    bias_of, add_bias = make_bias_of(dtype), make_add_row_bias(tile_t)
    store_staged = make_store_staged(tile_t, config.round_tokens, dtype, epilogue, build.stress, build.mutant)
    store_float32 = make_store_float32(tile_t)
    real_rows = make_real_rows()
    wait_full, wait_empty = make_mbarrier_wait("full", build.debug), make_mbarrier_wait("empty", build.debug)
    pause, debug = make_stress(build.stress), build.debug
    wrong_phase, descending = int(build.mutant == "wrong_phase"), build.mutant == "descending"
    early_arrival, handed_back = build.mutant == "early_arrival", build.mutant != "lost_arrival"
    int32, int64, uint32 = cuda.types.int32, cuda.types.int64, cuda.types.uint32

    @jit(device=True)
    def token_tiles_of(m: Any) -> Any:
        """Tiles of tokens; one also of none, so that what was fetched early is always used."""
        return uint32(uint32(max(int32(m), int32(1)) + (tile_t - 1)) // uint32(tile_t))

    @jit(device=True)
    def k_of(k_tile: Any, k_tiles: Any) -> Any:
        if descending:
            return int32((k_tiles - 1 - k_tile) * 64)
        return int32(k_tile * 64)

    @jit(device=True)
    def load_weight(
        smem: Any, weights: Any, stage: Any, k_at: Any, row: Any, policy: Any, stage_bytes: Any
    ) -> None:
        """Arm a stage's full barrier for all its bytes, and fetch its weights; weights: their map."""
        ready = int32(smem + full_at + 8 * stage)
        mbarrier_expect_tx(ready, stage_bytes)
        tma_load_2d_hint(int32(smem + weight_at + stage * weight_bytes), weights, ready, k_at, row, policy)

    @jit(device=True)
    def produce(smem: Any, maps: Any, num_rows: Any, rows: Any, n: Any, k_tiles: Any, tiles_n: Any) -> None:
        """The producer: every stage of every tile of this block, as fast as stages are handed back."""
        tile = uint32(cuda.blockIdx.x)
        once, keep = policy_evict_first(), policy_evict_last()
        early = int32(0)
        if rows <= tile_t and tile < tiles_n:
            # One tile of tokens whatever M is: this block's first weights depend on no launch.
            early = int32(min(k_tiles, int32(stages)))
            row = int32(tile * tile_n)
            _, weights, _, stage_bytes = boxes_of_tile(maps, int32(0), rows, row, n)
            for i in range(early):
                load_weight(smem, weights, int32(i), k_of(int32(i), k_tiles), row, once, stage_bytes)
        griddep_wait()
        token_tiles = token_tiles_of(real_rows(num_rows, rows))
        if token_tiles > 1:
            once = policy_evict_normal()
        tiles = uint32(token_tiles * tiles_n)
        stage = int32(0)
        phase = int32(0)
        while tile < tiles:
            tile_row = uint32(tile // token_tiles)
            row = int32(tile_row * tile_n)
            token = int32((tile - tile_row * token_tiles) * tile_t)
            tokens, weights, _, stage_bytes = boxes_of_tile(maps, token, rows, row, n)
            k_tile = int32(0)
            while k_tile < k_tiles:
                k_at = k_of(k_tile, k_tiles)
                pause(int32(1))
                if early > 0:
                    early = int32(early - 1)
                else:
                    wait_empty(int32(smem + empty_at + 8 * stage), int32(phase ^ 1))
                    load_weight(smem, weights, stage, k_at, row, once, stage_bytes)
                to = int32(smem + x_at + stage * x_bytes)
                ready = int32(smem + full_at + 8 * stage)
                tma_load_2d_hint(to, tokens, ready, k_at, token, keep)
                stage = int32(stage + 1)
                if stage == stages:
                    stage = int32(0)
                    phase = int32(phase ^ 1)
                k_tile = int32(k_tile + 1)
            tile = uint32(tile + uint32(cuda.gridDim.x))

    @jit(device=True, forceinline=True)
    def store(
        acc: Any, base: Any, consumer: Any, row: Any, token: Any, m: Any, n: Any, out: Any, bias: Any,
        residual: Any, out_stride: Any, residual_stride: Any,
    ) -> None:  # fmt: skip
        """The epilogue of a warpgroup's 64 rows of weights from `row` and the tile's tokens from `token`."""
        thread = int32(cuda.threadIdx.x)
        lane = int32(thread & 31)
        my_row = int32(row + ((thread >> 5) & 3) * 16 + (lane >> 2))
        if has_bias:
            add_bias(acc, bias_of(bias, my_row, n), bias_of(bias, int32(my_row + 8), n))
        limit = int32(min(int32(m - token), int32(tile_t)))
        if narrow:
            first = int64(int64(row >> column_shift) * out_item)
            here = int64(out + int64(token) * int64(out_stride) + first)
            there = int64(residual + int64(token) * int64(residual_stride) + first)
            store_staged(acc, base, consumer, int32(n - row), limit, here, out_stride, there, residual_stride)
        else:
            mine = int32((lane & 3) * 2)
            here = int64(out + int64(token + mine) * int64(out_stride) + int64(my_row) * out_item)
            store_float32(
                acc, here, out_stride, int32(limit - mine), int32(my_row < n), int32(my_row + 8 < n)
            )

    def gemm_few(
        maps: Any, out: Any, bias: Any, residual: Any, num_rows: Any, rows: Any, n: Any, k: Any,
        out_stride: Any, residual_stride: Any,
    ) -> None:  # fmt: skip
        griddep_launch()
        smem = int32(dynamic_shared())
        thread = int32(cuda.threadIdx.x)
        consumer = int32(int32(warp_uniform(int32(thread >> 5))) >> 2)
        full = int32(smem + full_at)
        empty = int32(smem + empty_at)
        if thread == 0:
            for i in range(stages):
                mbarrier_init(int32(full + 8 * i), 1)
                mbarrier_init(int32(empty + 8 * i), 4 * consumers)
            fence_mbarrier_init()
            tma_prefetch_map(maps)
            tma_prefetch_map(int64(maps + x_map))
        cuda.syncthreads()
        k_tiles = int32((k + 63) >> 6)
        tiles_n = uint32(uint32(n + (tile_n - 1)) // uint32(tile_n))
        if consumer == consumers:
            if elect_one() == 1:
                produce(smem, maps, num_rows, rows, n, k_tiles, tiles_n)
        else:
            griddep_wait()
            m = real_rows(num_rows, rows)
            token_tiles = token_tiles_of(m)
            tiles = uint32(token_tiles * tiles_n)
            tile = uint32(cuda.blockIdx.x)
            stage = int32(0)
            phase = int32(0)
            previous = int32(0)
            acc = cuda.local.array(accumulators, np.float32)
            lane = int32(thread & 31)
            base = int32(smem + out_at + consumer * staged_bytes)
            while tile < tiles:
                tile_row = uint32(tile // token_tiles)
                k_tile = int32(0)
                while k_tile < k_tiles:
                    wait_full(int32(full + 8 * stage), int32(phase ^ wrong_phase))
                    if debug:
                        cuda.syncwarp()  # a bounded wait lets lanes go on apart
                    pause(int32(2))
                    weight = int32(smem + weight_at + stage * weight_bytes + consumer * consumer_weight)
                    x = int32(smem + x_at + stage * x_bytes)
                    multiply(acc, descriptor_k_major(weight), descriptor_k_major(x), k_tile)
                    # One product stays in flight: what is handed back is the stage before it, a warp at a
                    # time.
                    if early_arrival:
                        previous = stage
                    if handed_back and lane == 0 and (k_tile > 0 or early_arrival):
                        mbarrier_arrive(int32(empty + 8 * previous))
                    previous = stage
                    stage = int32(stage + 1)
                    if stage == stages:
                        stage = int32(0)
                        phase = int32(phase ^ 1)
                    k_tile = int32(k_tile + 1)
                finish(acc)
                if lane == 0 and not early_arrival:
                    mbarrier_arrive(int32(empty + 8 * previous))
                row = int32(tile_row * tile_n + consumer * 64)
                token = int32((tile - tile_row * token_tiles) * tile_t)
                store(acc, base, consumer, row, token, m, n, out, bias, residual, out_stride, residual_stride)
                tile = uint32(tile + uint32(cuda.gridDim.x))

    return gemm_few
