"""How a page of one head comes to shared memory: by the copy engine, or 16 bytes a lane. Both leave the same
picture.

Knows: one chunk, 64 keys x head_dim, as the 128-byte swizzle lays it, 64 columns after another. Refuses to
know: which page, and when.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import (
    BLOCK_SIZE,
    BOX_BYTES,
    BOX_COLUMNS,
    WARP,
    Build,
    DecodeConfig,
)
from kernels_numba.ops.decode_attention.schedule import make_schedule
from kernels_numba.ptx.arith import select_i32
from kernels_numba.ptx.cp_async import cp_async_16_zfill, cp_async_mbarrier_arrive
from kernels_numba.ptx.debug import make_mbarrier_wait
from kernels_numba.ptx.ldst import ld_global_i32
from kernels_numba.ptx.mbarrier import mbarrier_expect_tx
from kernels_numba.ptx.mbarrier_poll import mbarrier_poll
from kernels_numba.ptx.policy import policy_evict_first
from kernels_numba.ptx.shuffle import shfl_idx_i32
from kernels_numba.ptx.tma import tma_load_2d_hint
from kernels_numba.ptx.vector import ld_shared_v4

PAGE_SHIFT = BLOCK_SIZE.bit_length() - 1


@cache
def make_feed(config: DecodeConfig) -> tuple[Any, int]:
    """(f(to, full, tensor_map, cache, row, lane), arrivals that end a phase of `full`), for a whole warp.

    f queues the copy of 64 rows from `row` on of the cache as a matrix [rows, head_dim] to shared address
    `to`; full: the barrier that it ends on."""
    chunk_bytes, boxes = config.chunk_bytes, config.head_dim // BOX_COLUMNS
    row_units, row_bytes = config.head_dim // 8, config.head_dim * 2
    rounds = BLOCK_SIZE * row_units // WARP
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def by_tma(to: Any, full: Any, tensor_map: Any, cache: Any, row: Any, lane: Any) -> None:
        if lane == 0:
            mbarrier_expect_tx(full, chunk_bytes)
            once = policy_evict_first()
            for box in range(boxes):
                column = int32(box * BOX_COLUMNS)
                tma_load_2d_hint(int32(to + box * BOX_BYTES), tensor_map, full, column, row, once)

    @jit(device=True, forceinline=True)
    def by_cp_async(to: Any, full: Any, tensor_map: Any, cache: Any, row: Any, lane: Any) -> None:
        source = int64(cache + int64(row) * row_bytes)
        for i in range(rounds):
            number = int32(lane + i * WARP)
            line, unit = int32(number // row_units), int32(number % row_units)
            place = int32((unit >> 3) * BOX_BYTES + line * 128 + (((unit & 7) ^ (line & 7)) << 4))
            cp_async_16_zfill(int32(to + place), int64(source + number * 16), 16)
        cp_async_mbarrier_arrive(full)

    return (by_tma, 1) if config.feed == "tma" else (by_cp_async, WARP)


@cache
def make_read_record() -> Any:
    """f(record, lane) -> (sequence, kv head, split, splits, splits before, length, first row)
    of a posted item.

    One lane reads, and hands on by shuffles: the lane that waited for the record, and will say that it is
    free again, is then the only one to touch it."""
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def read_record(record: Any, lane: Any) -> Any:
        first = cuda.local.array(4, np.int32)
        second = cuda.local.array(4, np.int32)
        for i in range(4):
            first[i] = second[i] = int32(0)
        if lane == 0:
            ld_shared_v4(first, record)
            ld_shared_v4(second, int32(record + 16))
        return (
            shfl_idx_i32(first[0], 0), shfl_idx_i32(first[1], 0), shfl_idx_i32(first[2], 0),
            shfl_idx_i32(first[3], 0), shfl_idx_i32(second[0], 0), shfl_idx_i32(second[1], 0),
            shfl_idx_i32(second[2], 0),
        )  # fmt: skip

    return read_record


@cache
def make_own_page(window: int | None, split_keys: int) -> Any:
    """f(table, table_stride, seq, split, length, lane) -> the lane's page of a split of so many keys; the
    first or last one that is seen for those that are not."""
    split_pages = split_keys // BLOCK_SIZE
    first_key, _, _ = make_schedule(window, split_keys)
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def own_page(table: Any, table_stride: Any, seq: Any, split: Any, length: Any, lane: Any) -> Any:
        number = int32(split * split_pages + (lane & (split_pages - 1)))
        first, last = int32(first_key(length) >> PAGE_SHIFT), int32((length - 1) >> PAGE_SHIFT)
        number = select_i32(int32(number < first), first, number)
        number = select_i32(int32(number > last), last, number)
        return ld_global_i32(int64(table + (int64(seq) * table_stride + number) * 4))

    return own_page


@cache
def make_stage_of(stages: int) -> Any:
    """f(stage, phase, ahead) -> the stage `ahead` places on in a ring of `stages`, and its phase."""
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def stage_of(stage: Any, phase: Any, ahead: Any) -> Any:
        stage = int32(stage + ahead)
        if stage >= stages:
            return int32(stage - stages), int32(phase ^ 1)
        return stage, phase

    return stage_of


def make_wait(name: str, config: DecodeConfig, build: Build) -> Any:
    """f(bar, parity): the whole warp's wait for a barrier, and that it goes on as one."""
    ask = make_mbarrier_wait(name, build.debug) if config.feed == "tma" or build.debug else mbarrier_poll

    @jit(device=True, forceinline=True)
    def wait(bar: Any, parity: Any) -> None:
        ask(bar, parity)
        cuda.syncwarp()  # what comes next may be an instruction of the whole warp

    return wait
