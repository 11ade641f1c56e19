"""GEMM for many tokens on Hopper: TMA in, wgmma, TMA out, a persistent grid.

Knows: one warp-specialised kernel and its launch. Refuses to know what a row of x belongs to: a row of the
result has the same bits whatever the other rows, M and the tile are, because every tile walks K upward from
0 in steps of 64 and adds the bias after that, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from kernels_numba.checks import fail
from kernels_numba.compiler import cuda, jit
from kernels_numba.launch import Kernel, Launch, address
from kernels_numba.ops.gemm.boxes import MAP_BYTES, MAPS, encode_boxes, make_boxes_of_tile
from kernels_numba.ops.gemm.door import (
    ACTIVATIONS,
    BFLOAT16,
    FLOAT16,
    Operands,
    gated_operands,
    operands,
    require_capability,
)
from kernels_numba.ops.gemm.gate import PAIR, make_gate
from kernels_numba.ops.gemm.hopper_config import (
    CONFIGS,
    GATED_CONFIGS,
    ITEM,
    TABLE_ONLY,
    TILE_K,
    HopperConfig,
    pick_hopper_config,
    smem_plan,
)
from kernels_numba.ptx.cluster import cluster_rank, cluster_sync
from kernels_numba.ptx.control import (
    dynamic_shared,
    elect_one,
    griddep_launch,
    griddep_wait,
    named_barrier_sync,
    warp_uniform,
)
from kernels_numba.ptx.debug import make_mbarrier_wait, make_stress
from kernels_numba.ptx.epilogue import (
    BOX_COLUMNS,
    make_add_bias,
    make_send_rows,
    make_stage,
    make_store_boxes,
    make_store_rows,
)
from kernels_numba.ptx.fences import fence_proxy_async
from kernels_numba.ptx.ldst import ld_global_i32
from kernels_numba.ptx.mbarrier import (
    fence_mbarrier_init,
    mbarrier_arrive,
    mbarrier_arrive_remote,
    mbarrier_expect_tx,
    mbarrier_init,
)
from kernels_numba.ptx.residual import Source, make_stage_sum, make_store_sum_rows
from kernels_numba.ptx.tma import (
    bulk_commit,
    bulk_wait_read,
    encode_tensor_map,
    tma_load_2d,
    tma_load_2d_multicast,
    tma_prefetch_2d,
    tma_prefetch_map,
)
from kernels_numba.ptx.wgmma import descriptor_k_major, make_wgmma, make_wgmma_wait

SIGNATURE = "void(int64, int64, int64, int64, int32, int32, int32, int32, int32)"
X_MAP = len(BOX_COLUMNS)  # the tensor maps before those of x, then those of weight: MAPS each
RESIDUAL_MAP = X_MAP + 2 * MAPS
MUTANTS = ("", "wrong_phase", "lost_arrival", "no_fence")


@dataclass(frozen=True)
class Build:
    """How a kernel is built beside its numbers. debug: every wait for a barrier is bounded and fails with the
    barrier's name; stress: warps pause at random; pdl: the launch may begin while the one before it ends;
    mutant: one known mistake, which the tests must catch: consumers that wait for the wrong phase, or never
    hand a stage back, or a store by TMA without the fence."""

    debug: bool = False
    stress: bool = False
    pdl: bool = True
    mutant: str = ""

    def __post_init__(self) -> None:
        if self.mutant not in MUTANTS:
            raise ValueError(f"mutant is {self.mutant!r}; there are {', '.join(MUTANTS[1:])}")


PRODUCT = Build()


def make_gemm_hopper_kernel(
    config: HopperConfig, dtype: str, out_dtype: str, has_bias: bool, build: Build = PRODUCT,
    epilogue: str = "",
) -> Any:  # fmt: skip
    """out[m, n] = sum over k of x[m, k] weight[n, k] (+ bias[n]), accumulated in float32, rounded once.
    epilogue "silu": of gates and ups in turn, 8 of each, rounded, silu(gate) up, rounded: N / 2 columns;
    "residual": residual[m, n] + that, rounded again.

    Arguments: maps: address of tensor maps u64[8, 16]: out in boxes of 64, 32 and 16 columns, x (boxes
    [tile_m / cluster, 64], then those of the last tile), weight ([tile_n, 64], likewise), residual ([tile_m,
    64]); out, bias: addresses; num_rows: address of i32[1], the real M; rows: of x, the most that M can be;
    n, k; out_stride: bytes from one row of out to the next; group: row tiles walked together.
    Who does what: warpgroups 0 to consumers - 1: wgmma on 64 rows of the tile each, then the epilogue; one
    elected thread of the warp after them: the TMA producer. Blocks walk tiles blockIdx, blockIdx + gridDim,
    ... in groups of `group` row tiles, so that operands that neighbours share stay in L2.
    In a cluster each block's producer fetches a part of x into all its blocks; tiles then count clusters.
    Shared memory: smem_plan(config). Barriers: full[s] hands a loaded stage to the consumers (1 arrival and
    the bytes), empty[s] hands it back to the cluster (one arrival a consumer's warp); named barrier 1 +
    consumer keeps a warpgroup's staged output and its TMA store apart.
    A residual comes through the same stages, as one or two more steps after those of K: in boxes of 64
    columns, the first where a step's x would be, the others where its weights would; a tile begins with
    bringing them to the L2 cache. So it is there when the product is done, and out may be the residual
    itself: a tile is read before it is written.
    64 rows leave through swizzled shared memory: by TMA if all lie below M; the last, partial ones by
    predicated stores of 16 bytes, because the map's extent is the buffer's, not M; a consumer whose rows are
    all at or past M neither multiplies nor stores. float32 results, and partial rows of the widest tiles
    (config.sends_rows), leave directly.
    Programmatic dependent launch: the block lets the next launch start at once, and itself fetches weights
    before it waits for the launches before it. So weights and num_rows must have been written before the
    chain of dependent launches began (a copy is never part of one); x, out, residual and bias may be written
    by it.
    """
    tile_m, tile_n, stages, consumers = config.tile_m, config.tile_n, config.stages, config.consumers
    staged_bytes, gated, added = config.staged_bytes, epilogue == "silu", epilogue == "residual"
    out_n, rounds, sends_rows = config.out_columns(gated), config.rounds_of(gated), config.sends_rows
    plan = smem_plan(config)
    x_at, weight_at, out_at = plan.offset("x"), plan.offset("weight"), plan.offset("out")
    full_at, empty_at = plan.offset("full"), plan.offset("empty")
    row_bytes, cluster, everyone = TILE_K * ITEM, config.cluster, (1 << config.cluster) - 1
    shares = cluster > 1
    x_bytes, weight_bytes = tile_m * row_bytes, tile_n * row_bytes
    num_rounds, accumulators, consumer_x = len(rounds), tile_n // 2, 64 * row_bytes
    item_out = 4 if out_dtype == "float32" else 2
    multiply, finish = make_wgmma(tile_n, 4, dtype, wait=1), make_wgmma_wait(tile_n, 0)
    staged = out_dtype != "float32"
    stage_out = make_stage(out_n, rounds, out_dtype if staged else dtype)
    store_boxes, send_rows = make_store_boxes(rounds), make_send_rows(rounds)
    store_rows, add_bias = make_store_rows(out_n, out_dtype), make_add_bias(tile_n, dtype)
    gate, halved = make_gate(tile_n if gated else PAIR, dtype), int(gated)
    wait_full, wait_empty = make_mbarrier_wait("full", build.debug), make_mbarrier_wait("empty", build.debug)
    pause, debug = make_stress(build.stress), build.debug
    fenced, wrong_phase = build.mutant != "no_fence", int(build.mutant == "wrong_phase")
    handed_back = build.mutant != "lost_arrival"
    x_map, weight_map = MAP_BYTES * X_MAP, MAP_BYTES * (X_MAP + MAPS)
    residual_map = MAP_BYTES * RESIDUAL_MAP
    boxes_of_tile = make_boxes_of_tile(tile_m, tile_n, X_MAP, X_MAP + MAPS, cluster)
    num_boxes, residual_steps, boxes_a_step = config.residual_boxes if added else (0, 0, 1)
    source = Source(boxes_a_step, x_bytes)
    stage_sum = make_stage_sum(out_n, rounds, dtype, source)
    store_sum_rows = make_store_sum_rows(out_n, dtype, source)
    # The round that is the last to read a step of the residual.
    read_in = [
        max(turn for turn, boxes in enumerate(rounds) if boxes[0].first < step * boxes_a_step * TILE_K)
        for step in range(1, residual_steps + 1)
    ]
    first_read, second_read = (*read_in, -1, -1)[:2]
    int32, int64, uint32 = cuda.types.int32, cuda.types.int64, cuda.types.uint32

    @jit(device=True)
    def tile_of(tile: Any, tiles_m: Any, tiles_n: Any, group: Any) -> Any:
        """Row and column of the tile-th tile: group row tiles of one column, then the next column; tile and
        columns count clusters."""
        per_group = uint32(uint32(group) * tiles_n)
        which = uint32(tile // per_group)
        first = uint32(which * uint32(group))
        height = uint32(min(uint32(tiles_m - first), uint32(group)))
        rest = uint32(tile - which * per_group)
        if shares:
            return int32(first + rest % height), int32(rest // height * uint32(cluster) + cluster_rank())
        return int32(first + rest % height), int32(rest // height)

    @jit(device=True, forceinline=True)
    def next_stage(stage: Any, phase: Any) -> Any:
        """The stage after `stage`, and the phase it has then."""
        if stage == stages - 1:
            return int32(0), int32(phase ^ 1)
        return int32(stage + 1), phase

    @jit(device=True)
    def load_weight(smem: Any, weights: Any, stage: Any, k_at: Any, col: Any, stage_bytes: Any) -> None:
        """Arm a stage's full barrier for all its bytes, and fetch its weights; weights: their map."""
        ready = int32(smem + full_at + 8 * stage)
        mbarrier_expect_tx(ready, stage_bytes)
        tma_load_2d(int32(smem + weight_at + stage * weight_bytes), weights, ready, k_at, col)

    @jit(device=True)
    def load_residual(smem: Any, maps: Any, stage: Any, step: Any, row: Any, col: Any) -> None:
        """The boxes of a step of the residual; row, col: where the tile begins."""
        ready = int32(smem + full_at + 8 * stage)
        first = int32(step * boxes_a_step)
        count = int32(min(int32(boxes_a_step), int32(num_boxes - first)))
        mbarrier_expect_tx(ready, int32(count * x_bytes))
        to = int32(smem + x_at + stage * x_bytes)
        for box in range(count):
            tma_load_2d(to, int64(maps + residual_map), ready, int32(col + (first + box) * 64), row)
            to = int32(smem + weight_at + stage * weight_bytes + box * x_bytes)

    @jit(device=True)
    def load(
        smem: Any, maps: Any, rows: Any, n: Any, k_tiles: Any, tiles_m: Any, tiles_n: Any, group: Any
    ) -> None:
        """The producer: every stage of every tile of this block, as fast as stages are handed back."""
        tiles = uint32(tiles_m * tiles_n)
        tile = uint32(cuda.blockIdx.x // uint32(cluster))
        ahead = int32(0)
        if tile < tiles:
            # Weights depend on no launch: the first stages are on their way before the wait.
            tile_row, tile_col = tile_of(tile, tiles_m, tiles_n, group)
            col = int32(tile_col * tile_n)
            _, weights, _, stage_bytes = boxes_of_tile(maps, int32(tile_row * tile_m), rows, col, n)
            ahead = int32(min(k_tiles, int32(stages)))
            for early in range(ahead):
                load_weight(smem, weights, int32(early), int32(early * 64), col, stage_bytes)
        griddep_wait()
        stage = int32(0)
        phase = int32(0)
        while tile < tiles:
            tile_row, tile_col = tile_of(tile, tiles_m, tiles_n, group)
            row = int32(tile_row * tile_m)
            col = int32(tile_col * tile_n)
            tokens, weights, begin, stage_bytes = boxes_of_tile(maps, row, rows, col, n)
            for box in range(num_boxes):  # to the L2 cache: all blocks will want theirs at one time
                tma_prefetch_2d(int64(maps + residual_map), int32(col + box * 64), row)
            k_tile = int32(0)
            while k_tile < k_tiles:
                k_at = int32(k_tile * 64)
                pause(int32(1))
                if ahead > 0:
                    ahead = int32(ahead - 1)
                else:
                    wait_empty(int32(smem + empty_at + 8 * stage), int32(phase ^ 1))
                    load_weight(smem, weights, stage, k_at, col, stage_bytes)
                to = int32(smem + x_at + stage * x_bytes + begin * row_bytes)
                ready = int32(smem + full_at + 8 * stage)
                if shares:
                    tma_load_2d_multicast(to, tokens, ready, k_at, int32(row + begin), everyone)
                else:
                    tma_load_2d(to, tokens, ready, k_at, row)
                stage = int32(stage + 1)
                if stage == stages:
                    stage = int32(0)
                    phase = int32(phase ^ 1)
                k_tile = int32(k_tile + 1)
            if added:
                for step in range(residual_steps):
                    pause(int32(1))
                    wait_empty(int32(smem + empty_at + 8 * stage), int32(phase ^ 1))
                    load_residual(smem, maps, stage, int32(step), row, col)
                    stage, phase = next_stage(stage, phase)
            tile = uint32(tile + uint32(cuda.gridDim.x) // uint32(cluster))

    @jit(device=True, forceinline=True)
    def hand_back(barrier: Any, lane: Any) -> None:
        """A warp has done with a stage: every block that fetches into it is told."""
        if shares:
            if lane < cluster:
                mbarrier_arrive_remote(barrier, lane)
        elif lane == 0:
            mbarrier_arrive(barrier)

    @jit(device=True, forceinline=True)
    def store(
        acc: Any, base: Any, row: Any, col: Any, m: Any, n: Any, maps: Any, out: Any, bias: Any,
        out_stride: Any, consumer: Any, smem: Any, stage: Any, phase: Any,
    ) -> None:  # fmt: skip
        """The epilogue of a warpgroup's 64 rows from `row`, columns from `col`; base: its staging memory;
        stage, phase: where a residual comes."""
        member = int32(cuda.threadIdx.x & 127)
        lane = int32(member & 31)
        my_row = int32(row + (member >> 5) * 16 + (lane >> 2))
        if has_bias:
            biased = int32(col + (lane & 3) * 2)
            add_bias(acc, int64(bias + int64(biased) * 2), biased, n)
        line, half = int32((member >> 5) * 16 + (lane & 15)), int32(lane >> 4)
        other = stage
        if added:
            wait_full(int32(smem + full_at + 8 * stage), phase)
            if residual_steps > 1:
                other, other_phase = next_stage(stage, phase)
                wait_full(int32(smem + full_at + 8 * other), other_phase)
            if debug:
                cuda.syncwarp()  # a bounded wait lets lanes go on apart
            pause(int32(2))
        rows_at = int32(smem + consumer * consumer_x)
        first, first_2 = int32(rows_at + x_at + stage * x_bytes), int32(rows_at + x_at + other * x_bytes)
        rows_at = int32(rows_at + weight_at)
        rest, rest_2 = int32(rows_at + stage * weight_bytes), int32(rows_at + other * weight_bytes)
        if gated:
            gate(acc)
        n = int32(n >> halved)
        col = int32(col >> halved)
        my_col = int32(col + (lane & 3) * 2)
        whole = int32(row + 64 <= m)
        if staged and row < m and (sends_rows or whole != 0):
            here = int64(out + int64(row) * int64(out_stride) + int64(col) * item_out)
            for turn in range(num_rounds):
                if member == 0:
                    bulk_wait_read(0)
                named_barrier_sync(int32(consumer + 1), 128)
                pause(int32(3))
                if added:
                    stage_sum(acc, turn, base, line, half, first, rest, first_2, rest_2)
                else:
                    stage_out(acc, turn, base, line, half)
                if fenced:
                    fence_proxy_async()
                named_barrier_sync(int32(consumer + 1), 128)
                if sends_rows and whole == 0:
                    send_rows(turn, base, member, here, out_stride, int32(m - row), int32(n - col))
                elif member == 0:
                    store_boxes(maps, turn, base, row, col, n)
                    bulk_commit()
                if turn == first_read:
                    hand_back(int32(smem + empty_at + 8 * stage), lane)
                if turn == second_read:
                    hand_back(int32(smem + empty_at + 8 * other), lane)
        else:
            if row < m:
                to = int64(out + int64(my_row) * int64(out_stride) + int64(my_col) * item_out)
                low, high = int32(my_row < m), int32(my_row + 8 < m)
                if added:
                    store_sum_rows(
                        acc, to, out_stride, my_col, n, low, high, line, half, first, rest, first_2, rest_2
                    )
                else:
                    store_rows(acc, to, out_stride, my_col, n, low, high)
            if added:
                hand_back(int32(smem + empty_at + 8 * stage), lane)
                if residual_steps > 1:
                    hand_back(int32(smem + empty_at + 8 * other), lane)

    def gemm_hopper(
        maps: Any, out: Any, bias: Any, num_rows: Any, rows: Any, n: Any, k: Any, out_stride: Any, group: Any
    ) -> None:
        griddep_launch()
        m = int32(ld_global_i32(num_rows))
        smem = int32(dynamic_shared())
        thread = int32(cuda.threadIdx.x)
        warp = int32(warp_uniform(int32(thread >> 5)))
        consumer = int32(warp >> 2)
        full = int32(smem + full_at)
        empty = int32(smem + empty_at)
        if thread == 0:
            for i in range(stages):
                mbarrier_init(int32(full + 8 * i), 1)
                mbarrier_init(int32(empty + 8 * i), 4 * consumers * cluster)
            fence_mbarrier_init()
            tma_prefetch_map(int64(maps + x_map))
            tma_prefetch_map(int64(maps + weight_map))
        if shares:
            cuda.syncwarp()
            cluster_sync()  # the other blocks' barriers are ready, too
        else:
            cuda.syncthreads()
        k_tiles = int32((k + 63) >> 6)
        tiles_m = uint32(uint32(m + (tile_m - 1)) // uint32(tile_m))
        tiles_n = uint32(uint32(n + (cluster * tile_n - 1)) // uint32(cluster * tile_n))
        if consumer == consumers:
            if elect_one() == 1:
                load(smem, maps, rows, n, k_tiles, tiles_m, tiles_n, group)
        else:
            griddep_wait()
            tiles = uint32(tiles_m * tiles_n)
            tile = uint32(cuda.blockIdx.x // uint32(cluster))
            stage = int32(0)
            phase = int32(0)
            acc = cuda.local.array(accumulators, np.float32)
            lane = int32(thread & 31)
            base = int32(smem + out_at + consumer * staged_bytes)
            previous = int32(0)
            while tile < tiles:
                tile_row, tile_col = tile_of(tile, tiles_m, tiles_n, group)
                row = int32(tile_row * tile_m + consumer * 64)
                k_tile = int32(0)
                while k_tile < k_tiles:
                    wait_full(int32(full + 8 * stage), int32(phase ^ wrong_phase))
                    pause(int32(2))
                    if row < m:
                        x = int32(smem + x_at + stage * x_bytes + consumer * consumer_x)
                        weight = int32(smem + weight_at + stage * weight_bytes)
                        multiply(acc, descriptor_k_major(x), descriptor_k_major(weight), k_tile)
                    # One product stays in flight: what is handed back is the stage before it. Each warp hands
                    # back for itself: under stress, one that dawdled before its wait missed the phase else.
                    if handed_back and k_tile > 0:
                        hand_back(int32(empty + 8 * previous), lane)
                    previous = stage
                    stage = int32(stage + 1)
                    if stage == stages:
                        stage = int32(0)
                        phase = int32(phase ^ 1)
                    k_tile = int32(k_tile + 1)
                finish(acc)
                hand_back(int32(empty + 8 * previous), lane)
                col = int32(tile_col * tile_n)
                store(acc, base, row, col, m, n, maps, out, bias, out_stride, consumer, smem, stage, phase)
                for _ in range(residual_steps):
                    stage, phase = next_stage(stage, phase)
                tile = uint32(tile + uint32(cuda.gridDim.x) // uint32(cluster))
            if thread & 127 == 0:
                # Shared memory must outlive the reads; the writes end before the grid does.
                bulk_wait_read(0)
        if shares:
            cuda.syncwarp()
            cluster_sync()  # nobody fetches into this block's memory, or arrives there, any more

    return gemm_hopper


INPUTS = (BFLOAT16, FLOAT16)


@cache
def hopper_kernel(
    config: HopperConfig, dtype: str, out_dtype: str, has_bias: bool, build: Build = PRODUCT,
    epilogue: str = "",
) -> Kernel:  # fmt: skip
    """The kernel of one specialisation, compiled when first launched."""
    words = [str(config), dtype, out_dtype]
    words += ["bias"] if has_bias else []
    words += [epilogue] if epilogue else []
    words += [name for name in ("debug", "stress") if getattr(build, name)]
    words += [build.mutant] if build.mutant else []
    return Kernel(
        "_".join(["gemm_hopper", *words]),
        lambda: make_gemm_hopper_kernel(config, dtype, out_dtype, has_bias, build, epilogue),
        (config, dtype, out_dtype, has_bias, build, epilogue),
        SIGNATURE, config.threads, smem_plan(config).bytes, config.cluster, build.pdl, ("sm_90a",),
    )  # fmt: skip


def kernels() -> Iterator[Kernel]:
    """Every kernel that an engine in bfloat16 can pick, for building them ahead; float16 is built when it is
    first used."""
    for out_dtype, has_bias in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
        for config in (*CONFIGS, *TABLE_ONLY):
            yield hopper_kernel(config, "bfloat16", out_dtype, has_bias)
    for config in (*CONFIGS, *TABLE_ONLY):
        yield hopper_kernel(config, "bfloat16", "bfloat16", False, epilogue="residual")
    for config in GATED_CONFIGS:
        yield hopper_kernel(config, "bfloat16", "bfloat16", False, epilogue="silu")


@lru_cache(maxsize=4096)
def prepared(
    o: Operands, num_rows: int, config: HopperConfig, group: int, build: Build = PRODUCT,
    activation: str = "",
) -> tuple[Launch, Any]:  # fmt: skip
    """A launch ready to be repeated, and the tensor maps it reads, u64[8, 16] on the device.

    num_rows: address of the real M. ValueError on another GPU than Hopper, or for a tile that the activation
    cannot have.

    A map says where a matrix lies, not what is in it: it stays true however often the memory is reused. Who
    captures a launch into a graph keeps what this returns as long as the graph.
    """
    require_capability("hopper")
    if activation and config.tile_n % (2 * PAIR):
        raise ValueError(f"config is {config}; with an activation tile_n must be a multiple of {2 * PAIR}")
    columns = o.n // 2 if activation else o.n
    words = np.zeros((RESIDUAL_MAP + 1, 16), np.uint64)
    boxes = encode_boxes(o.x, o.dtype, (o.m, o.k), o.x_stride, config.tile_m, config.cluster)
    words[X_MAP : X_MAP + MAPS] = boxes
    boxes = encode_boxes(o.weight, o.dtype, (o.n, o.k), o.weight_stride, config.tile_n)
    words[X_MAP + MAPS : RESIDUAL_MAP] = boxes
    if o.residual:
        box = (config.tile_m, TILE_K)
        words[RESIDUAL_MAP] = encode_tensor_map(o.residual, o.dtype, (o.m, o.n), (o.residual_stride,), box)
    if o.out_dtype != "float32":
        for place, width in enumerate(BOX_COLUMNS):
            words[place] = encode_tensor_map(
                o.out, o.out_dtype, (o.m, columns), (o.out_stride,), (64, width), width * ITEM
            )
    maps = cuda.to_device(words)
    epilogue = "residual" if o.residual else activation
    kernel = hopper_kernel(config, o.dtype, o.out_dtype, o.bias != 0, build, epilogue)
    columns_of_tiles = -(-o.n // config.tile_n)
    if columns_of_tiles % config.cluster:
        raise ValueError(
            f"config is {config}; {columns_of_tiles} tiles along n cannot be shared out over clusters of "
            f"{config.cluster}"
        )
    tiles = -(-o.m // config.tile_m) * columns_of_tiles
    blocks = min(tiles, num_sms() // config.cluster * config.cluster)
    arguments = (address(maps), o.out, o.bias, num_rows, o.m, o.n, o.k, o.out_stride, group)
    return kernel.prepare(blocks, arguments), maps


@lru_cache(maxsize=4096)
def _count(m: int) -> Any:
    return cuda.to_device(np.array([m], np.int32))


@cache
def num_sms() -> int:
    """Streaming multiprocessors of the current device."""
    return int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def gemm_hopper(
    out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None, stream: Any = None,
    num_rows: Any = None, config: HopperConfig | None = None, group: int = 0, build: Build = PRODUCT,
    activation: str = "",
) -> None:  # fmt: skip
    """Rung "hopper": out[M, N] = x[M, K] @ weight[N, K]^T (+ bias[N]) on tensor cores, accumulated in
    float32.

    x, weight, bias: bfloat16 (bits as uint16) or float16; out: the same, or float32. N and K are multiples
    of 8. residual: of x's dtype, T[M, N], which may be out: out = residual + the rounded product. num_rows:
    device i32[1] with the real M, at most out's rows, read when the kernel runs; rows from there on are not
    written. Weights and num_rows must not be written by a launch right before this one (see
    make_gemm_hopper_kernel). activation "silu": weight's rows are gates and ups in blocks of 8, and out[M, N
    / 2], of x's dtype, is what silu_mul's rung "warp" makes of the product, in its bits. config, group and
    build force a tile, its order and a kind of kernel (tuning, tests). ValueError for wrong dtypes, shapes,
    strides or alignment.
    """
    if activation not in ACTIVATIONS:
        fail("gemm", "activation", f"is {activation!r}", '"" or "silu"')
    if activation and residual is not None:
        fail("gemm", "residual", f"is given beside activation {activation!r}", "one of the two")
    gated = activation != ""
    o = (
        gated_operands(out, x, weight, bias, INPUTS)
        if gated
        else operands(out, x, weight, bias, INPUTS, residual)
    )
    if o.m == 0:
        return
    picked, order = pick_hopper_config(o.m, o.n, o.k, num_sms(), activation)
    count = address(_count(o.m) if num_rows is None else num_rows)
    launch, _ = prepared(o, count, config or picked, group or order, build, activation)
    launch(stream)
