"""Work and operands of the mma.sync prefill kernel: which item is next, its keys and values by cp.async.

Knows: how they come to shared memory, and the barriers that say so. Refuses to know: what is done with them.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.attention_contract import TILE
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.prefill_attention.config import BLOCK_SIZE, BOX_BYTES, Build
from kernels_numba.ops.prefill_attention.mma_config import (
    RECORD_SHIFT,
    RECORDS,
    THREADS,
    TILE_ROWS,
    MmaConfig,
    smem_plan,
)
from kernels_numba.ops.prefill_attention.schedule import TOP, make_schedule
from kernels_numba.ptx.arith import select_i32
from kernels_numba.ptx.atomics import atom_add_i32
from kernels_numba.ptx.cp_async import cp_async_16_zfill, cp_async_mbarrier_arrive
from kernels_numba.ptx.debug import make_mbarrier_wait, make_stress
from kernels_numba.ptx.ldst import ld_global_i32, ld_shared_b32, st_shared_b32
from kernels_numba.ptx.mbarrier import mbarrier_arrive
from kernels_numba.ptx.mbarrier_poll import mbarrier_poll


def make_wait(name: str, build: Build) -> Any:
    """f(bar, parity): the whole warp's wait for a barrier, and that it goes on as one."""
    ask = make_mbarrier_wait(name, True) if build.debug else mbarrier_poll

    @jit(device=True, forceinline=True)
    def wait(bar: Any, parity: Any) -> None:
        ask(bar, parity)
        cuda.syncwarp()  # what comes next may be an instruction of the whole warp

    return wait


def make_post(config: MmaConfig, build: Build) -> tuple[Any, Any]:
    """(start(smem), post(smem, cu, lens, counters, num_seqs, heads, group, number, lane)).

    post, of one warp: finds the block's next item (schedule.py) and posts it as its number-th: i32[8] of
    sequence (-1: no more), head, first row, rows of the sequence, its first token, the position of that.
    Where the search goes on stays in shared memory, where start, of one thread, puts its beginning.
    """
    plan = smem_plan(config)
    record_at, search_at = plan.offset("record"), plan.offset("search")
    posted_at, taken_at = plan.offset("posted"), plan.offset("taken")
    locate, pause = make_schedule(TILE_ROWS), make_stress(build.stress)
    wait_taken = make_wait("taken", build)
    int32 = cuda.types.int32

    @jit(device=True)
    def start(smem: Any) -> None:
        to = int32(smem + search_at)
        st_shared_b32(to, int32(cuda.blockIdx.x))
        st_shared_b32(int32(to + 4), int32(TOP))
        st_shared_b32(int32(to + 8), int32(0))
        st_shared_b32(int32(to + 12), int32(0))
        st_shared_b32(int32(to + 16), int32(-1))

    @jit(device=True)
    def post(
        smem: Any, cu: Any, lens: Any, counters: Any, num_seqs: Any, heads: Any, group: Any, number: Any,
        lane: Any,
    ) -> None:  # fmt: skip
        search, slot = int32(smem + search_at), int32(number & (RECORDS - 1))
        cuda.syncwarp()
        target, level = ld_shared_b32(search), ld_shared_b32(int32(search + 4))
        chunk, before = ld_shared_b32(int32(search + 8)), ld_shared_b32(int32(search + 12))
        lower = ld_shared_b32(int32(search + 16))
        found, seq, head, row0, rows, token0, first, level, chunk, before, lower = locate(
            cu, lens, int32(0), num_seqs, heads, group, lane, target, level, chunk, before, lower
        )
        pause(int32(1))
        wait_taken(int32(smem + taken_at + 8 * slot), int32(((number >> RECORD_SHIFT) & 1) ^ 1))
        if lane == 0:
            to = int32(smem + record_at + 32 * slot)
            st_shared_b32(to, select_i32(found, seq, -1))
            st_shared_b32(int32(to + 4), head)
            st_shared_b32(int32(to + 8), row0)
            st_shared_b32(int32(to + 12), rows)
            st_shared_b32(int32(to + 16), token0)
            st_shared_b32(int32(to + 20), first)
            mbarrier_arrive(int32(smem + posted_at + 8 * slot))
            if found == 1:
                st_shared_b32(search, int32(atom_add_i32(counters, 1) + cuda.gridDim.x))
                st_shared_b32(int32(search + 4), level)
                st_shared_b32(int32(search + 8), chunk)
                st_shared_b32(int32(search + 12), before)
                st_shared_b32(int32(search + 16), lower)

    return start, post


def make_fill(config: MmaConfig, window: int | None, build: Build) -> Any:
    """fill(smem, k, v, table, record, heads, table_stride, first_key, most, thread, next, ahead, stage,
    phase) -> (next, ahead), for all warps alike.

    Queues chunks of 64 keys of one item until config.ahead of them are on their way or there: of each tile
    K's first half, its second, V's first, its second, without those of which no row sees anything. Keys that
    no row sees, outside [first_key, most), are zeros: 0 x NaN would be NaN, and a page's old tail must not
    reach another request. table: block_table, or cu_seqlens_k; next: 4 tile + 2 (of V) + half; stage, phase:
    of the chunk that is taken next, `ahead` before the one that is loaded next.
    """
    head_dim, stages, chunk_bytes = config.head_dim, config.stages, config.chunk_bytes
    plan, most_ahead = smem_plan(config), config.ahead
    chunk_at, full_at, empty_at = plan.offset("chunk"), plan.offset("full"), plan.offset("empty")
    units, row_bytes = head_dim // 8, head_dim * 2
    unit_shift, lines = units.bit_length() - 1, THREADS // units  # rows that a block copies at once
    rounds, by_page = BLOCK_SIZE // lines, config.source == "pages"
    has_window = window is not None
    page_off, cleaned = int(build.mutant == "page"), build.mutant != "stale_tail"
    wait_empty, pause = make_wait("empty", build), make_stress(build.stress)
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True)
    def fill(
        smem: Any, k: Any, v: Any, table: Any, record: Any, heads: Any, table_stride: Any, first_key: Any,
        most: Any, thread: Any, next: Any, ahead: Any, stage: Any, phase: Any,
    ) -> Any:  # fmt: skip
        while ahead < most_ahead and int32(int32(next >> 2) * TILE) < most:
            tile, part = int32(next >> 2), int32(next & 1)
            seq, head = ld_shared_b32(record), ld_shared_b32(int32(record + 4))
            first = int32(tile * TILE + part * BLOCK_SIZE)
            step = int32(row_bytes)
            if by_page:
                entry = int64(table + (int64(seq) * table_stride + (tile * 2 + part)) * 4)
                number = int32(ld_global_i32(entry) + page_off)
                at = int64((int64(number) * heads + head) * (BLOCK_SIZE * row_bytes))
            else:
                step = int32(heads * row_bytes)
                base = ld_global_i32(int64(table + int64(seq) * 4))
                at = int64((int64(base + first) * heads + head) * row_bytes)
            source = int64(k + at)
            if int32(next & 2) != 0:
                source = int64(v + at)
            seen_from, seen_to = int32(first_key - first), int32(most - first)
            if not cleaned:
                seen_from, seen_to = int32(0), int32(BLOCK_SIZE)
            to_stage, to_phase = int32(stage + ahead), phase
            if to_stage >= stages:
                to_stage, to_phase = int32(to_stage - stages), int32(phase ^ 1)
            pause(int32(2))
            wait_empty(int32(smem + empty_at + 8 * to_stage), int32(to_phase ^ 1))
            unit, line = int32(thread & (units - 1)), int32(thread >> unit_shift)
            to = int32(smem + chunk_at + to_stage * chunk_bytes + (unit >> 3) * BOX_BYTES)
            to = int32(to + line * 128 + (((unit & 7) ^ (line & 7)) << 4))
            source = int64(source + int64(line) * step + unit * 16)
            for _ in range(rounds):
                seen = int32(int32(seen_from <= line) & int32(line < seen_to))
                cp_async_16_zfill(to, source, int32(seen * 16))
                to, source = int32(to + lines * 128), int64(source + int64(step) * lines)
                line = int32(line + lines)
            cp_async_mbarrier_arrive(int32(smem + full_at + 8 * to_stage))
            ahead = int32(ahead + 1)
            if part == 1 or int32(first + BLOCK_SIZE) >= most:
                next = int32((next | 1) + 1)  # the first half of V, or of the next tile's K
                if has_window and int32(first_key - int32(next >> 2) * TILE) >= BLOCK_SIZE:
                    next = int32(next + 1)
            else:
                next = int32(next + 1)
        return next, ahead

    return fill
