"""GEMM for many tokens on Hopper: TMA in, wgmma, TMA out, one persistent block per SM.

Knows: one warp-specialised kernel, its shared memory, and which tile suits which shape. Refuses to know what
a row of x belongs to: a row of the result has the same bits whatever the other rows, M and the tile are,
because every tile walks K upward from 0 in steps of 64 and adds the bias after that, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from kernels_numba.checks import fail
from kernels_numba.compiler import cuda, jit
from kernels_numba.launch import Kernel, address
from kernels_numba.ptx.control import (
    dynamic_shared,
    elect_one,
    named_barrier_sync,
    setmaxnreg_dec,
    setmaxnreg_inc,
    warp_uniform,
)
from kernels_numba.ptx.epilogue import make_add_bias, make_stage, make_store_rows
from kernels_numba.ptx.fences import fence_proxy_async
from kernels_numba.ptx.ldst import ld_global_i32
from kernels_numba.ptx.mbarrier import (
    fence_mbarrier_init,
    mbarrier_arrive,
    mbarrier_expect_tx,
    mbarrier_init,
    mbarrier_wait,
)
from kernels_numba.ptx.tma import (
    bulk_commit,
    bulk_wait,
    bulk_wait_read,
    encode_tensor_map,
    tma_load_2d,
    tma_prefetch_map,
    tma_store_2d,
)
from kernels_numba.ptx.wgmma import descriptor_k_major, make_wgmma, make_wgmma_wait
from kernels_numba.smem import SmemPlan

TILE_M, TILE_K = 128, 64
CONSUMERS = 2  # warpgroups, 64 rows of the tile each
WARPGROUP = 128
THREADS = WARPGROUP * (1 + CONSUMERS)
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # 128 x 40 + 256 x 232 registers just fit an SM
ITEM = 2  # bytes of an element of x and weight
SMEM_LIMIT = 232_448


STAGED_LIMIT = 20 << 10  # bytes a consumer may stage for its TMA stores; the rest goes to stages of K
MAX_STAGES = 8


@dataclass(frozen=True)
class HopperConfig:
    """tile_n: columns of a tile, whose rows are 128; group: row tiles walked together, so that the weights'
    columns they share stay in L2."""

    tile_n: int
    group: int = 8

    @property
    def chunk(self) -> int:
        """Columns of one TMA store box: the widest of 64, 32, 16 (128-, 64-, 32-byte swizzle) that divides
        the tile."""
        return next(c for c in (64, 32, 16) if self.tile_n % c == 0)

    @property
    def chunks(self) -> int:
        """Boxes staged in one round: as many as divide the tile and fit STAGED_LIMIT."""
        boxes = self.tile_n // self.chunk
        return max(
            c for c in range(1, boxes + 1) if boxes % c == 0 and c * 64 * self.chunk * ITEM <= STAGED_LIMIT
        )

    @property
    def stages(self) -> int:
        """Tiles of K in flight: what fits beside the staged output and the barriers."""
        staged = CONSUMERS * 64 * self.chunk * self.chunks * ITEM + 16 * MAX_STAGES
        return min(MAX_STAGES, (SMEM_LIMIT - staged) // ((TILE_M + self.tile_n) * TILE_K * ITEM))


WIDTHS = (32, 64, 96, 112, 128, 144, 160, 192, 224, 256)
CONFIGS = {tile_n: HopperConfig(tile_n) for tile_n in WIDTHS}


def tile_cost(config: HopperConfig) -> float:
    """Time of one tile in the units of a column: its columns, a fixed part, and a part for each round of
    staging.

    Fitted to an H200 at M 8192: 128 and 256 wide run alike at full waves, 192 and 224 wide (3 and 7 rounds)
    3 and 5 % slower. Under 48 columns reading x from shared memory takes longer than the products.
    """
    rounds = config.tile_n // (config.chunk * config.chunks)
    return max(config.tile_n, 48) + 8 + 1.5 * rounds


def pick_hopper_config(m: int, n: int, num_sms: int) -> HopperConfig:
    """The tile that finishes m x n outputs first: waves of tiles over the SMs x the cost of one tile.

    No choice shows in a bit; ties go to the wider tile.
    """

    def cost(tile_n: int) -> float:
        tiles = -(-m // TILE_M) * -(-n // tile_n)
        return -(-tiles // num_sms) * tile_cost(CONFIGS[tile_n])

    return CONFIGS[min(reversed(WIDTHS), key=cost)]


@cache
def smem_plan(config: HopperConfig) -> SmemPlan:
    """x stages, weight stages, each consumer's staged output, barriers; see SmemPlan.picture()."""
    return SmemPlan.of(
        ("x", TILE_M * TILE_K * ITEM, 1024, config.stages),
        ("weight", config.tile_n * TILE_K * ITEM, 1024, config.stages),
        ("out", 64 * config.chunk * config.chunks * ITEM, 1024, CONSUMERS),
        ("full", 8, 8, config.stages),
        ("empty", 8, 8, config.stages),
        limit=SMEM_LIMIT,
    )


SIGNATURE = "void(int64, int64, int64, int64, int64, int64, int32, int32, int32)"


def make_gemm_hopper_kernel(config: HopperConfig, dtype: str, out_dtype: str, has_bias: bool) -> Any:
    """out[m, n] = sum over k of x[m, k] weight[n, k] (+ bias[n]), accumulated in float32, rounded once.

    Arguments: x_map, weight_map, out_map: addresses of tensor maps (boxes [128, 64], [tile_n, 64], [64,
    chunk]); out, bias: addresses; num_rows: address of i32[1], the real M; n, k; out_stride: bytes from one
    row of out to the next.
    Who does what: warpgroup 0: one elected thread is the TMA producer; warpgroups 1 and 2: wgmma on 64 rows
    of the tile each, then the epilogue. Blocks walk tiles blockIdx, blockIdx + gridDim, ... in groups of
    `group` row tiles. Shared memory: smem_plan(config). Barriers: full[s] hands a loaded stage to the
    consumers (1 arrival and the bytes), empty[s] hands it back (one arrival a consumer); named barrier 1 +
    consumer keeps a warpgroup's staged output and its TMA store apart.
    A tile whose 64 rows all lie below M leaves through swizzled shared memory and TMA; the last, partial one
    by predicated stores, because the map's extent is the buffer's, not M. float32 results always leave
    directly.
    """
    tile_n, stages, group, chunk, chunks = (
        config.tile_n, config.stages, config.group, config.chunk, config.chunks,
    )  # fmt: skip
    plan = smem_plan(config)
    x_at, weight_at, out_at = plan.offset("x"), plan.offset("weight"), plan.offset("out")
    full_at, empty_at = plan.offset("full"), plan.offset("empty")
    x_bytes, weight_bytes = TILE_M * TILE_K * ITEM, tile_n * TILE_K * ITEM
    stage_bytes = x_bytes + weight_bytes
    chunk_bytes, out_bytes = 64 * chunk * ITEM, 64 * chunk * chunks * ITEM
    rounds = tile_n // (chunk * chunks)
    accumulators = tile_n // 2
    half_x = 64 * TILE_K * ITEM
    item_out = 4 if out_dtype == "float32" else 2
    multiply, finish = make_wgmma(tile_n, 4, dtype, wait=1), make_wgmma_wait(tile_n, 0)
    staged = out_dtype != "float32"
    stage_out = make_stage(tile_n, chunk, chunks, out_dtype if staged else dtype)
    store_rows = make_store_rows(tile_n, out_dtype)
    add_bias = make_add_bias(tile_n, dtype)
    xor_shift, xor_mask = {64: (0, 7), 32: (1, 3), 16: (2, 1)}[chunk]
    int32, int64, uint32 = cuda.types.int32, cuda.types.int64, cuda.types.uint32

    @jit(device=True)
    def tile_of(tile: Any, tiles_m: Any, tiles_n: Any) -> Any:
        """Row and column of the tile-th tile: group row tiles of one column, then the next column."""
        per_group = uint32(uint32(group) * tiles_n)
        which = uint32(tile // per_group)
        first = uint32(which * uint32(group))
        height = uint32(min(uint32(tiles_m - first), uint32(group)))
        rest = uint32(tile - which * per_group)
        return int32(first + rest % height), int32(rest // height)

    def gemm_hopper(
        x_map: Any,
        weight_map: Any,
        out_map: Any,
        out: Any,
        bias: Any,
        num_rows: Any,
        n: Any,
        k: Any,
        out_stride: Any,
    ) -> None:
        smem = int32(dynamic_shared())
        thread = int32(cuda.threadIdx.x)
        warp = int32(warp_uniform(int32(thread >> 5)))
        warpgroup = int32(warp >> 2)
        full = int32(smem + full_at)
        empty = int32(smem + empty_at)
        if thread == 0:
            for i in range(stages):
                mbarrier_init(int32(full + 8 * i), 1)
                mbarrier_init(int32(empty + 8 * i), CONSUMERS)
            fence_mbarrier_init()
            tma_prefetch_map(x_map)
            tma_prefetch_map(weight_map)
        cuda.syncthreads()
        m = int32(ld_global_i32(num_rows))
        k_tiles = int32((k + 63) >> 6)
        tiles_m = uint32((m + 127) >> 7)
        tiles_n = uint32(uint32(n + (tile_n - 1)) // uint32(tile_n))
        tiles = uint32(tiles_m * tiles_n)
        step = uint32(cuda.gridDim.x)
        tile = uint32(cuda.blockIdx.x)
        stage = int32(0)
        phase = int32(0)
        if warpgroup == 0:
            setmaxnreg_dec(PRODUCER_REGISTERS)
            if warp == 0 and elect_one() == 1:
                while tile < tiles:
                    tile_m, tile_col = tile_of(tile, tiles_m, tiles_n)
                    k_tile = int32(0)
                    while k_tile < k_tiles:
                        ready = int32(full + 8 * stage)
                        mbarrier_wait(int32(empty + 8 * stage), int32(phase ^ 1))
                        mbarrier_expect_tx(ready, stage_bytes)
                        k_at = int32(k_tile * 64)
                        tma_load_2d(
                            int32(smem + x_at + stage * x_bytes), x_map, ready, k_at, int32(tile_m * 128)
                        )
                        tma_load_2d(
                            int32(smem + weight_at + stage * weight_bytes),
                            weight_map,
                            ready,
                            k_at,
                            int32(tile_col * tile_n),
                        )
                        stage = int32(stage + 1)
                        if stage == stages:
                            stage = int32(0)
                            phase = int32(phase ^ 1)
                        k_tile = int32(k_tile + 1)
                    tile = uint32(tile + step)
        else:
            setmaxnreg_inc(CONSUMER_REGISTERS)
            acc = cuda.local.array(accumulators, np.float32)
            consumer = int32(warpgroup - 1)
            member = int32(thread & 127)
            lane = int32(thread & 31)
            base = int32(smem + out_at + consumer * out_bytes)
            half = int32(lane >> 4)
            staged_row = int32((warp & 3) * 16 + (lane & 15))
            row_xor = int32((staged_row >> xor_shift) & xor_mask)
            row_bytes = int32(staged_row * (chunk * ITEM))
            previous = int32(0)
            while tile < tiles:
                tile_m, tile_col = tile_of(tile, tiles_m, tiles_n)
                k_tile = int32(0)
                while k_tile < k_tiles:
                    mbarrier_wait(int32(full + 8 * stage), phase)
                    multiply(
                        acc,
                        descriptor_k_major(int32(smem + x_at + stage * x_bytes + consumer * half_x)),
                        descriptor_k_major(int32(smem + weight_at + stage * weight_bytes)),
                        k_tile,
                    )
                    # One product stays in flight: what is handed back is the stage before it.
                    if k_tile > 0 and member == 0:
                        mbarrier_arrive(int32(empty + 8 * previous))
                    previous = stage
                    stage = int32(stage + 1)
                    if stage == stages:
                        stage = int32(0)
                        phase = int32(phase ^ 1)
                    k_tile = int32(k_tile + 1)
                finish(acc)
                if member == 0:
                    mbarrier_arrive(int32(empty + 8 * previous))
                row = int32(tile_m * 128 + consumer * 64)
                col = int32(tile_col * tile_n)
                my_row = int32(row + (warp & 3) * 16 + (lane >> 2))
                my_col = int32(col + (lane & 3) * 2)
                if has_bias:
                    add_bias(acc, int64(bias + int64(my_col) * 2), my_col, n)
                if staged and row + 64 <= m:
                    for turn in range(rounds):
                        if member == 0:
                            bulk_wait_read(0)
                        named_barrier_sync(int32(consumer + 1), 128)
                        stage_out(acc, int32(turn), base, row_bytes, half, row_xor)
                        fence_proxy_async()
                        named_barrier_sync(int32(consumer + 1), 128)
                        if member == 0:
                            for c in range(chunks):
                                box_col = int32(col + (turn * chunks + c) * chunk)
                                if box_col < n:
                                    tma_store_2d(out_map, int32(base + c * chunk_bytes), box_col, row)
                            bulk_commit()
                elif row < m:
                    address = int64(out + int64(my_row) * int64(out_stride) + int64(my_col) * item_out)
                    store_rows(acc, address, out_stride, my_col, n, int32(my_row < m), int32(my_row + 8 < m))
                tile = uint32(tile + step)
            if member == 0:
                bulk_wait(0)

    return gemm_hopper


INPUTS: dict[Any, str] = {np.dtype(np.uint16): "bfloat16", np.dtype(np.float16): "float16"}
OUTPUTS: dict[Any, str] = {**INPUTS, np.dtype(np.float32): "float32"}


@cache
def hopper_kernel(config: HopperConfig, dtype: str, out_dtype: str, has_bias: bool) -> Kernel:
    """The kernel of one specialisation, compiled when first launched."""
    name = f"gemm_hopper_{TILE_M}x{config.tile_n}_{dtype}_{out_dtype}" + ("_bias" if has_bias else "")
    return Kernel(
        name, lambda: make_gemm_hopper_kernel(config, dtype, out_dtype, has_bias),
        (config, dtype, out_dtype, has_bias),
        SIGNATURE, THREADS, smem_plan(config).bytes,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _maps(
    x: tuple[int, int, int], weight: tuple[int, int, int], out: tuple[int, int, int] | None, k: int, n: int,
    config: HopperConfig, dtype: str, out_dtype: str,
) -> Any:  # fmt: skip
    """The three tensor maps on the device, u64[3, 16]; x, weight, out: (address, rows, bytes from row to
    row).

    A map says where a matrix lies, not what is in it: it stays true however often the memory is reused.
    """
    words = np.zeros((3, 16), np.uint64)
    words[0] = encode_tensor_map(x[0], dtype, (x[1], k), (x[2],), (TILE_M, TILE_K))
    words[1] = encode_tensor_map(weight[0], dtype, (weight[1], k), (weight[2],), (config.tile_n, TILE_K))
    if out is not None:
        box = (64, config.chunk)
        words[2] = encode_tensor_map(out[0], out_dtype, (out[1], n), (out[2],), box, config.chunk * ITEM)
    return cuda.to_device(words)


@lru_cache(maxsize=4096)
def _count(m: int) -> Any:
    return cuda.to_device(np.array([m], np.int32))


@cache
def num_sms() -> int:
    """Streaming multiprocessors of the current device."""
    return int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def _matrix(name: str, array: Any, dtypes: Any, rows: int | None, cols: int | None) -> tuple[int, int, int]:
    """(address, rows, bytes from row to row) of a row-major matrix; ValueError for anything else."""
    if array.ndim != 2 or array.dtype not in dtypes:
        fail("gemm", name, f"is {array.ndim}-D {array.dtype}", f"2-D {', '.join(map(str, dtypes))}")
    for axis, (have, want) in enumerate(zip(array.shape, (rows, cols), strict=True)):
        if want is not None and have != want:
            fail("gemm", f"{name}.shape[{axis}]", f"is {have}", str(want))
    if array.shape[1] % 8 or array.shape[1] == 0:
        fail(
            "gemm",
            f"{name}.shape[1]",
            f"is {array.shape[1]}",
            "a positive multiple of 8 (TMA moves 16 bytes)",
        )
    item = array.dtype.itemsize
    stride = array.strides[0] if array.shape[0] > 1 else max(array.strides[0], array.shape[1] * item)
    if array.strides[1] != item or stride % 16 or stride < array.shape[1] * item:
        fail(
            "gemm",
            f"{name}.strides",
            f"are {array.strides}",
            "rows in one piece, a multiple of 16 bytes apart",
        )
    start = address(array)
    if start % 16:
        fail("gemm", name, f"is at {start:#x}", "a multiple of 16")
    return start, int(array.shape[0]), int(stride)


def gemm_hopper(
    out: Any, x: Any, weight: Any, bias: Any = None, *, stream: Any = None, num_rows: Any = None,
    config: HopperConfig | None = None,
) -> None:  # fmt: skip
    """Rung "hopper": out[M, N] = x[M, K] @ weight[N, K]^T (+ bias[N]) on tensor cores, accumulated in
    float32.

    x, weight, bias: bfloat16 (bits as uint16) or float16; out: the same, or float32. N and K are multiples
    of 8. num_rows: device i32[1] with the real M, at most out's rows, read when the kernel runs; rows from
    there on are not written. config forces a tile (tuning, tests). ValueError for wrong dtypes, shapes,
    strides or alignment.
    """
    if x.dtype not in INPUTS:
        fail("gemm", "x.dtype", f"is {x.dtype}", "bfloat16 bits as uint16, or float16")
    dtype, out_dtypes = INPUTS[x.dtype], (x.dtype, np.dtype(np.float32))
    n, k = weight.shape
    rows = out.shape[0]
    if rows == 0:
        return
    out_at = _matrix("out", out, out_dtypes, None, n)
    x_at = _matrix("x", x, (x.dtype,), rows, k)
    weight_at = _matrix("weight", weight, (x.dtype,), n, k)
    out_dtype = OUTPUTS[out.dtype]
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype or address(bias) % 4):
        fail("gemm", "bias", f"is {bias.dtype}{list(bias.shape)}", f"{x.dtype}[{n}], 4-byte aligned")
    config = config or pick_hopper_config(rows, n, num_sms())
    kernel = hopper_kernel(config, dtype, out_dtype, bias is not None)
    maps = address(
        _maps(x_at, weight_at, out_at if out_dtype != "float32" else None, k, n, config, dtype, out_dtype)
    )
    count = address(_count(rows) if num_rows is None else num_rows)
    tiles = -(-rows // TILE_M) * -(-n // config.tile_n)
    bias_at = 0 if bias is None else address(bias)
    arguments = (maps, maps + 128, maps + 256, out_at[0], bias_at, count, n, k, out_at[2])
    kernel.prepare(min(tiles, num_sms()), arguments)(stream)
