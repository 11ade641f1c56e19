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
    PANEL_BYTES,
    RECORDS,
    ROWS,
    TILE_ROWS,
    WARP,
    Build,
    PrefillConfig,
    smem_plan,
)
from kernels_numba.ops.prefill_attention.schedule import TOP, make_schedule
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
def make_producers(config: PrefillConfig, window: int | None, build: Build) -> tuple[Any, Any, Any]:
    """(schedule, load_queries, load_keys), each for one whole warp, until there are no more items.

    schedule(smem, cu, lens, counters, num_seqs, heads, group, lane) takes items and posts them: i32[8] of
    sequence (-1: no more), head, first row, rows of the sequence, its first token, the position of that.
    load_queries(smem, q, group, q_stride, consumer, lane): a consumer's rows, zeros past the sequence's last.
    load_keys(smem, maps, table, heads, group, table_stride, lane): K, then V of each tile of keys that a row
    of the item sees, by TMA, page by page.
    """
    head_dim, tile_rows, stages = config.head_dim, TILE_ROWS, config.stages
    plan = smem_plan(config)
    q_at, k_at, v_at = plan.offset("q"), plan.offset("k"), plan.offset("v")
    k_full, k_empty = plan.offset("k_full"), plan.offset("k_empty")
    v_full, v_empty = plan.offset("v_full"), plan.offset("v_empty")
    q_full, q_empty = plan.offset("q_full"), plan.offset("q_empty")
    record_at, posted_at, taken_at = plan.offset("record"), plan.offset("posted"), plan.offset("taken")
    tile_bytes, part_bytes, boxes = config.tile_bytes, config.tile_bytes // 2, head_dim // BOX_COLUMNS
    units, row_bytes, q_panel = head_dim // 8, head_dim * 2, tile_rows * 128
    unit_shift, lines = units.bit_length() - 1, WARP // units  # rows that a warp copies at once
    by_page, pdl, page_off = config.source == "pages", build.pdl, int(build.mutant == "page")
    has_window, width = window is not None, window or 0
    locate = make_schedule(tile_rows)
    wait_empty = make_mbarrier_wait("empty", build.debug)
    wait_posted, wait_taken = (
        make_mbarrier_wait("posted", build.debug),
        make_mbarrier_wait("taken", build.debug),
    )
    pause = make_stress(build.stress)
    int32, int64, uint32 = cuda.types.int32, cuda.types.int64, cuda.types.uint32

    @jit(device=True)
    def schedule(
        smem: Any, cu: Any, lens: Any, counters: Any, num_seqs: Any, heads: Any, group: Any, lane: Any
    ) -> None:  # fmt: skip
        target = int32(cuda.blockIdx.x)
        level, chunk, before, lower = int32(TOP), int32(0), int32(0), int32(-1)
        slot, phase = int32(0), int32(0)
        waited = False
        working = True
        while working:
            found, seq, head, row0, rows, token0, start, level, chunk, before, lower = locate(
                cu, lens, num_seqs, heads, group, lane, target, level, chunk, before, lower
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
            slot = int32(slot + 1)
            if slot == RECORDS:
                slot, phase = int32(0), int32(phase ^ 1)
            working = found == 1
        # Who leaves last sets the counters back, for the next launch.
        if lane == 0:
            if atom_add_i32(int64(counters + 4), 1) == cuda.gridDim.x - 1:
                st_global_b32(counters, 0)
                st_global_b32(int64(counters + 4), 0)

    @jit(device=True)
    def load_queries(smem: Any, q: Any, group: Any, q_stride: Any, consumer: Any, lane: Any) -> None:
        full, empty = int32(smem + q_full + 8 * consumer), int32(smem + q_empty + 8 * consumer)
        slot, phase, q_phase = int32(0), int32(0), int32(0)
        unit, first_line = int32(lane & (units - 1)), int32(lane >> unit_shift)
        to = int32(smem + q_at + consumer * (ROWS * 128) + (unit >> 3) * q_panel)
        if pdl:
            griddep_wait()
        working = True
        while working:
            wait_posted(int32(smem + posted_at + 8 * slot), phase)
            record = int32(smem + record_at + 32 * slot)
            head, row0 = ld_shared_b32(int32(record + 4)), ld_shared_b32(int32(record + 8))
            rows, token0 = ld_shared_b32(int32(record + 12)), ld_shared_b32(int32(record + 16))
            working = ld_shared_b32(record) >= 0
            cuda.syncwarp()
            if lane == 0:
                mbarrier_arrive(int32(smem + taken_at + 8 * slot))
            slot = int32(slot + 1)
            if slot == RECORDS:
                slot, phase = int32(0), int32(phase ^ 1)
            if working:
                source = int64(q + int64(token0) * q_stride + int64(head) * group * row_bytes)
                first_row = int32(row0 + consumer * ROWS)
                for part in range(ROWS // WARP):
                    # Into L2 while the queries of the item before this one are still in use.
                    row = int32(first_row + part * WARP + lane)
                    row = select_i32(int32(row < rows), row, 0)
                    token = int32(uint32(row) // uint32(group))
                    at = int64(token) * q_stride + (row - token * group) * row_bytes
                    for line in range(boxes):
                        prefetch_l2(int64(source + at + line * 128))
                pause(int32(6))
                wait_empty(empty, int32(q_phase ^ 1))
                row, line = int32(first_row + first_line), first_line
                token = int32(uint32(row) // uint32(group))
                member = int32(row - token * group)  # head of the group
                while line < ROWS:
                    inside = int32(row < rows)
                    at = int64(select_i32(inside, token, 0)) * q_stride + (member * row_bytes + unit * 16)
                    place = int32(to + line * 128 + (((unit & 7) ^ (line & 7)) << 4))
                    cp_async_16_zfill(place, int64(source + at), select_i32(inside, 16, 0))
                    row, line, member = int32(row + lines), int32(line + lines), int32(member + lines)
                    for _ in range(lines):
                        over = int32(member >= group)
                        member = select_i32(over, int32(member - group), member)
                        token = int32(token + over)
                cp_async_commit()
                cp_async_wait(0)
                fence_proxy_async()  # wgmma reads what was copied
                cuda.syncwarp()
                if lane == 0:
                    mbarrier_arrive(full)
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
        if pdl:
            griddep_wait()
        working = True
        while working:
            wait_posted(int32(smem + posted_at + 8 * slot), slot_phase)
            record = int32(smem + record_at + 32 * slot)
            seq = ld_shared_b32(record)
            head, row0 = ld_shared_b32(int32(record + 4)), ld_shared_b32(int32(record + 8))
            rows, start = ld_shared_b32(int32(record + 12)), ld_shared_b32(int32(record + 20))
            working = seq >= 0
            cuda.syncwarp()
            if lane == 0:
                mbarrier_arrive(int32(smem + taken_at + 8 * slot))
            slot = int32(slot + 1)
            if slot == RECORDS:
                slot, slot_phase = int32(0), int32(slot_phase ^ 1)
            if working:
                last = int32(min(int32(row0 + tile_rows), rows) - 1)
                least = int32(start + 1 + int32(uint32(row0) // uint32(group)))
                most = int32(start + 1 + int32(uint32(last) // uint32(group)))
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
