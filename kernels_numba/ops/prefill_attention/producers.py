"""The producer warps of the Hopper prefill kernel: which item is next, its queries, its keys and
values.

Knows: how work and operands come to shared memory, and the barriers that say so. Refuses to know: what is
done with them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from kernels_numba.attention_contract import TILE
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.prefill_attention.config import (
    BLOCK_SIZE,
    BOX_BYTES,
    BOX_COLUMNS,
    LOADERS,
    PANEL_BYTES,
    RECORDS,
    ROWS,
    WARP,
    Build,
    PrefillConfig,
    smem_plan,
)
from kernels_numba.ops.prefill_attention.schedule import TOP, make_quotient, make_schedule, make_span
from kernels_numba.ptx.arith import select_i32
from kernels_numba.ptx.atomics import atom_add_i32
from kernels_numba.ptx.control import griddep_wait
from kernels_numba.ptx.cp_async import cp_async_16_zfill, cp_async_commit, cp_async_wait
from kernels_numba.ptx.debug import make_mbarrier_wait, make_stress
from kernels_numba.ptx.fences import fence_proxy_async
from kernels_numba.ptx.ldst import ld_global_i32, ld_shared_b32, prefetch_l2, st_global_b32, st_shared_b32
from kernels_numba.ptx.mbarrier import mbarrier_arrive, mbarrier_expect_tx
from kernels_numba.ptx.shuffle import shfl_idx_i32
from kernels_numba.ptx.tma import tma_load_2d

PAGE_SHIFT, TILE_SHIFT = BLOCK_SIZE.bit_length() - 1, TILE.bit_length() - 1


@cache
def make_records(config: PrefillConfig, build: Build) -> tuple[Any, Any]:
    """take(smem, slot, phase, group, lane) -> (sequence, head, first row, rows, first token, start): the item
    posted in a slot, which is handed back; for a whole warp. after(slot, phase): the next slot, its phase."""
    plan = smem_plan(config)
    record_at, posted_at, taken_at = plan.offset("record"), plan.offset("posted"), plan.offset("taken")
    wait_posted = make_mbarrier_wait("posted", build.debug)
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def take(smem: Any, slot: Any, phase: Any, group: Any, lane: Any) -> Any:
        wait_posted(int32(smem + posted_at + 8 * slot), phase)
        record = int32(smem + record_at + 32 * slot)
        seq, head = ld_shared_b32(record), ld_shared_b32(int32(record + 4))
        row0, rows = ld_shared_b32(int32(record + 8)), ld_shared_b32(int32(record + 12))
        token0, start = ld_shared_b32(int32(record + 16)), ld_shared_b32(int32(record + 20))
        # An arrival does not wait for loads under way; group >> 16 is 0, which no compiler can know.
        nothing = int32(int32(seq | start) & int32(group >> 16))
        cuda.syncwarp()
        if lane == 0:
            mbarrier_arrive(int32(smem + taken_at + 8 * slot + nothing))
        return seq, head, row0, rows, token0, start

    @jit(device=True, forceinline=True)
    def after(slot: Any, phase: Any) -> Any:
        slot = int32(slot + 1)
        if slot == RECORDS:
            return int32(0), int32(phase ^ 1)
        return slot, phase

    return take, after


@cache
def make_producers(config: PrefillConfig, window: int | None, build: Build) -> tuple[Any, Any, Any]:
    """(schedule, load_queries, load_keys), each for one whole warp, until there are no more items.

    schedule(smem, cu, lens, counters, num_seqs, heads, group, lane) takes items and posts them: i32[8] of
    sequence (-1: no more), head, first row, rows of the sequence, its first token, the position of that.
    load_queries(smem, q, group, q_stride, loader, lane): of each consumer's rows this loader's half, zeros
    past the sequence's last.
    load_keys(smem, maps, table, heads, group, table_stride, lane): K, then V of each tile of keys that a row
    of the item sees, by TMA, page by page.
    """
    head_dim, tile_rows, stages, consumers = (
        config.head_dim,
        config.tile_rows,
        config.stages,
        config.consumers,
    )
    plan = smem_plan(config)
    q_at, k_at, v_at = plan.offset("q"), plan.offset("k"), plan.offset("v")
    k_full, k_empty = plan.offset("k_full"), plan.offset("k_empty")
    v_full, v_empty = plan.offset("v_full"), plan.offset("v_empty")
    q_full, q_empty = plan.offset("q_full"), plan.offset("q_empty")
    record_at, posted_at, taken_at = plan.offset("record"), plan.offset("posted"), plan.offset("taken")
    tile_bytes, part_bytes, boxes = config.tile_bytes, config.tile_bytes // 2, head_dim // BOX_COLUMNS
    units, row_bytes, q_panel = head_dim // 8, head_dim * 2, tile_rows * 128
    unit_shift, lines = units.bit_length() - 1, WARP // units  # rows that a warp copies at once
    share = ROWS // LOADERS
    by_page, pdl, page_off = config.source == "pages", build.pdl, int(build.mutant == "page")
    has_window, width = window is not None, window or 0
    locate, span, (inverse, quotient) = make_schedule(tile_rows), make_span(), make_quotient()
    wait_empty = make_mbarrier_wait("empty", build.debug)
    wait_taken, (take, after) = make_mbarrier_wait("taken", build.debug), make_records(config, build)
    pause = make_stress(build.stress)
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True)
    def schedule(
        smem: Any, cu: Any, lens: Any, counters: Any, num_seqs: Any, heads: Any, group: Any, lane: Any
    ) -> None:  # fmt: skip
        target = int32(cuda.blockIdx.x)
        begin, end = span(cu, num_seqs, lane)
        level, chunk, before, lower = int32(TOP), begin, int32(0), int32(-1)
        slot, phase = int32(0), int32(0)
        waited = False
        working = True
        while working:
            found, seq, head, row0, rows, token0, start, level, chunk, before, lower = locate(
                cu, lens, begin, end, heads, group, lane, target, level, chunk, before, lower
            )
            if pdl and not waited:
                griddep_wait()  # a launch before this one may still count
            waited = True
            pause(int32(1))
            wait_taken(int32(smem + taken_at + 8 * slot), int32(phase ^ 1))
            following = int32(0)
            if lane == 0:
                to = int32(smem + record_at + 32 * slot)
                st_shared_b32(to, select_i32(found, seq, -1))
                st_shared_b32(int32(to + 4), head)
                st_shared_b32(int32(to + 8), row0)
                st_shared_b32(int32(to + 12), rows)
                st_shared_b32(int32(to + 16), token0)
                st_shared_b32(int32(to + 20), start)
                mbarrier_arrive(int32(smem + posted_at + 8 * slot))
                if found == 1:
                    following = int32(atom_add_i32(counters, 1) + cuda.gridDim.x)
            target = shfl_idx_i32(following, 0)
            slot, phase = after(slot, phase)
            working = found == 1
        # Who leaves last sets the counters back, for the next launch.
        if lane == 0:
            if atom_add_i32(int64(counters + 4), 1) == cuda.gridDim.x - 1:
                st_global_b32(counters, 0)
                st_global_b32(int64(counters + 4), 0)

    @jit(device=True, forceinline=True)
    def arrive_at_queries(full: Any, lane: Any) -> None:
        fence_proxy_async()  # wgmma reads what was copied
        cuda.syncwarp()
        if lane == 0:
            mbarrier_arrive(full)

    @jit(device=True)
    def load_queries(smem: Any, q: Any, group: Any, q_stride: Any, loader: Any, lane: Any) -> None:
        slot, phase, q_phase = int32(0), int32(0), int32(0)
        factor = inverse(group)
        unit, first_line = int32(lane & (units - 1)), int32(loader * share + (lane >> unit_shift))
        to = int32(smem + q_at + (unit >> 3) * q_panel + first_line * 128)
        if pdl:
            griddep_wait()
        working = True
        while working:
            seq, head, row0, rows, token0, _ = take(smem, slot, phase, group, lane)
            slot, phase = after(slot, phase)
            working = seq >= 0
            if working:
                source = int64(q + int64(token0) * q_stride + int64(head) * group * row_bytes)
                for consumer in range(consumers):
                    # Into L2 while the queries of the item before this one are still in use.
                    row = int32(row0 + consumer * ROWS + loader * share + lane)
                    row = select_i32(int32(row < rows), row, 0)
                    token = quotient(row, factor)
                    at = int64(token) * q_stride + (row - token * group) * row_bytes
                    for line in range(boxes):
                        prefetch_l2(int64(source + at + line * 128))
                pause(int32(6))
                for consumer in range(consumers):
                    wait_empty(int32(smem + q_empty + 8 * consumer), int32(q_phase ^ 1))
                    for k in range(share // lines):
                        row = int32(row0 + consumer * ROWS + first_line + k * lines)
                        inside = int32(row < rows)
                        row = select_i32(inside, row, 0)
                        token = quotient(row, factor)
                        at = int64(token) * q_stride + ((row - token * group) * row_bytes + unit * 16)
                        swizzle = int32((first_line + k * lines) & 7)
                        place = int32(
                            to + (consumer * ROWS + k * lines) * 128 + (((unit & 7) ^ swizzle) << 4)
                        )
                        cp_async_16_zfill(place, int64(source + at), select_i32(inside, 16, 0))
                    cp_async_commit()
                    if consumer > 0:  # the one before has had time to come
                        cp_async_wait(1)
                        arrive_at_queries(int32(smem + q_full + 8 * (consumer - 1)), lane)
                cp_async_wait(0)
                arrive_at_queries(int32(smem + q_full + 8 * (consumers - 1)), lane)
                q_phase = int32(q_phase ^ 1)

    @jit(device=True, forceinline=True)
    def load_parts(
        to: Any, full: Any, tensor_map: Any, x: Any, y_first: Any, y_second: Any, begin: Any, end: Any
    ) -> None:  # fmt: skip
        """One thread: 64 keys from row y_first or y_second on, for each part from begin to end."""
        mbarrier_expect_tx(full, int32((end - begin) * part_bytes))
        for box in range(boxes):
            at = int32(to + box * PANEL_BYTES)
            if begin == 0:
                tma_load_2d(at, tensor_map, full, int32(x + box * BOX_COLUMNS), y_first)
            if end == 2:
                tma_load_2d(int32(at + BOX_BYTES), tensor_map, full, int32(x + box * BOX_COLUMNS), y_second)

    @jit(device=True)
    def load_keys(
        smem: Any, maps: Any, table: Any, heads: Any, group: Any, table_stride: Any, lane: Any
    ) -> None:  # fmt: skip
        slot, slot_phase, stage, phase = int32(0), int32(0), int32(0), int32(0)
        factor = inverse(group)
        if pdl:
            griddep_wait()
        working = True
        while working:
            seq, head, row0, rows, _, start = take(smem, slot, slot_phase, group, lane)
            slot, slot_phase = after(slot, slot_phase)
            working = seq >= 0
            if working:
                last = int32(min(int32(row0 + tile_rows), rows) - 1)
                least = int32(start + 1 + quotient(row0, factor))
                most = int32(start + 1 + quotient(last, factor))
                first_key = int32(0)
                if has_window:
                    first_key = select_i32(int32(least > width), int32(least - width), 0)
                tile = int32(first_key >> TILE_SHIFT)
                tile_end = int32(select_i32(int32(most > 0), int32(most + (TILE - 1)), 0) >> TILE_SHIFT)
                x, base = int32(0), int32(0)
                if not by_page:
                    x = int32(head * head_dim)
                    base = ld_global_i32(int64(table + int64(seq) * 4))
                held = int32(tile - 1)  # entries of the table for 16 tiles are held, before this one
                page = int32(0)
                while tile < tile_end:
                    begin, end = int32(0), int32(2)
                    if has_window and first_key - tile * TILE >= BLOCK_SIZE:
                        begin = int32(1)
                    if most - tile * TILE <= BLOCK_SIZE:
                        end = int32(1)
                    y_first = int32(base + tile * TILE)
                    y_second = int32(y_first + BLOCK_SIZE)
                    if by_page:
                        if tile > held:
                            # The lane's entry of the next 32; one that nobody sees is not read.
                            number = int32(tile * 2 + lane)
                            first_page, last_page = (
                                int32(first_key >> PAGE_SHIFT),
                                int32((most - 1) >> PAGE_SHIFT),
                            )
                            number = select_i32(int32(number < first_page), first_page, number)
                            number = select_i32(int32(number > last_page), last_page, number)
                            page = ld_global_i32(int64(table + (int64(seq) * table_stride + number) * 4))
                            held = int32(tile + (WARP // 2 - 1))
                        which = int32((tile + (WARP // 2 - 1) - held) * 2)
                        first, second = shfl_idx_i32(page, which), shfl_idx_i32(page, int32(which + 1))
                        y_first = int32(((first + page_off) * heads + head) * BLOCK_SIZE)
                        y_second = int32(((second + page_off) * heads + head) * BLOCK_SIZE)
                    pause(int32(2))
                    wait_empty(int32(smem + k_empty + 8 * stage), int32(phase ^ 1))
                    if lane == 0:
                        to = int32(smem + k_at + stage * tile_bytes)
                        full = int32(smem + k_full + 8 * stage)
                        load_parts(to, full, maps, x, y_first, y_second, begin, end)
                    wait_empty(int32(smem + v_empty + 8 * stage), int32(phase ^ 1))
                    if lane == 0:
                        to = int32(smem + v_at + stage * tile_bytes)
                        full = int32(smem + v_full + 8 * stage)
                        load_parts(to, full, int64(maps + 128), x, y_first, y_second, begin, end)
                    stage = int32(stage + 1)
                    if stage == stages:
                        stage, phase = int32(0), int32(phase ^ 1)
                    tile = int32(tile + 1)

    return schedule, load_queries, load_keys
