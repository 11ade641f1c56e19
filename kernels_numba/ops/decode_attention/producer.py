"""The producer warp of the tensor-core decode kernel: takes items, posts them, loads their pages.

Knows: which page goes to which stage, and what may be read before the launches before have ended. Refuses to
know: what is done with a page.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import BLOCK_SIZE, ROWS, Build, DecodeConfig, smem_plan
from kernels_numba.ops.decode_attention.feed import (
    PAGE_SHIFT,
    make_feed,
    make_own_page,
    make_stage_of,
    make_wait,
)
from kernels_numba.ops.decode_attention.fold import make_row_tiles
from kernels_numba.ops.decode_attention.schedule import make_ranges, make_schedule
from kernels_numba.ptx.arith import select_i32
from kernels_numba.ptx.atomics import atom_add_i32
from kernels_numba.ptx.debug import make_stress
from kernels_numba.ptx.griddep import griddep_wait
from kernels_numba.ptx.ldst import prefetch_l2, st_global_b32
from kernels_numba.ptx.mbarrier import mbarrier_arrive
from kernels_numba.ptx.shuffle import shfl_idx_i32
from kernels_numba.ptx.tma import tma_prefetch_map
from kernels_numba.ptx.vector import st_shared_v4

L2_LINE = 128


@cache
def make_produce(config: DecodeConfig, window: int | None, build: Build, tokens: int) -> Any:
    """f(smem, maps, k_cache, v_cache, q, lens, table, counters, num_seqs, heads, group, q_stride,
    table_stride, lane): the warp's whole life; arguments as the kernel's.

    Items: a block's first is its own number, the others come from counters[0]; counters[1] counts blocks that
    have none left, and the last of them sets both back to 0. If the first ones are all, nobody counts. A
    posted item: (sequence or -1 for the end, kv head, split, the sequence's splits; splits of the sequences
    before, context length, first row, 0).
    Of dependent launches: lengths and table are read, and as many pages as there are stages fetched, but for
    those of the newest keys (one a query token), before the launches before this one have ended. So those
    must not write these.
    """
    plan, stages, chunk_bytes = smem_plan(config), config.stages, config.chunk_bytes
    chunk_at, record_at = plan.offset("chunk"), plan.offset("record")
    full_at, empty_at = plan.offset("full"), plan.offset("empty")
    posted_at, taken_at = plan.offset("posted"), plan.offset("taken")
    reach = None if window is None else window + tokens - 1  # of all of a sequence's rows
    by_tma, split_pages = config.feed == "tma", build.split // BLOCK_SIZE
    row_bytes = config.head_dim * 2
    dependent, page_off = by_tma and build.pdl, int(build.mutant == "page")
    _, count_units, locate = make_schedule(reach, build.split)
    own_page = make_own_page(reach, build.split)
    row_tiles = make_row_tiles(tokens)
    pages_of, tiles_of = make_ranges(reach, build.split)
    load_chunk, _ = make_feed(config)
    stage_of, pause = make_stage_of(stages), make_stress(build.stress)
    wait_empty, wait_taken = make_wait("empty", config, build), make_wait("taken", config, build)
    int32, int64, uint32 = cuda.types.int32, cuda.types.int64, cuda.types.uint32

    @jit(device=True)
    def produce(
        smem: Any, maps: Any, k_cache: Any, v_cache: Any, q: Any, lens: Any, table: Any, counters: Any,
        num_seqs: Any, heads: Any, group: Any, q_stride: Any, table_stride: Any, lane: Any,
    ) -> None:  # fmt: skip
        if by_tma and lane == 0:
            tma_prefetch_map(maps)
            tma_prefetch_map(int64(maps + 128))
        words = cuda.local.array(4, np.int32)
        e0, e1, e2, e3, e4 = count_units(lens, num_seqs, lane)
        number, tiles = int32(cuda.blockIdx.x), row_tiles(group)
        one_each = e4 * heads * tiles <= cuda.gridDim.x
        kind, kind_start, kind_end = int32(0), int32(0), e0
        chunk, before, before_all = int32(0), int32(0), int32(0)
        stage, phase, slot, slot_phase = int32(0), int32(0), int32(0), int32(0)
        waited = not dependent
        ahead = int32(0)
        working = True
        while working:
            unit = int32(uint32(number) // uint32(heads * tiles))
            head = int32(number - unit * heads * tiles)
            first_row = int32(0)
            if tokens > 1:
                first_row, head = head, int32(uint32(head) // uint32(tiles))
                first_row = int32((first_row - head * tiles) * ROWS)
            seq, split, splits, base, length, page = (
                int32(-1),
                int32(0),
                int32(0),
                int32(0),
                int32(0),
                int32(0),
            )
            if unit < e4:
                while unit >= kind_end:
                    kind, kind_start = int32(kind + 1), kind_end
                    kind_end = select_i32(int32(kind == 1), e1, select_i32(int32(kind == 2), e2, e4))
                    kind_end = select_i32(int32(kind == 3), e3, kind_end)
                    chunk, before, before_all = int32(0), int32(0), int32(0)
                seq, split, splits, base, length, chunk, before, before_all = locate(
                    lens, num_seqs, lane, int32(unit - kind_start), kind, chunk, before, before_all
                )
                page = own_page(table, table_stride, seq, split, length, lane)
                if not waited:
                    # To L2 may come what the launch before still writes: readers see what it is then.
                    for token in range(tokens):
                        at = int64(q + (int64(seq) * tokens + token) * q_stride)
                        at = int64(at + int64(head) * group * row_bytes + lane * L2_LINE)
                        if lane * L2_LINE < group * row_bytes:
                            prefetch_l2(at)
            following = int32(0)
            claimed = waited or one_each
            if one_each:
                following = int32(e4 * heads * tiles)
            elif claimed and seq >= 0 and lane == 0:
                following = int32(atom_add_i32(counters, 1) + cuda.gridDim.x)
            pause(int32(1))
            wait_taken(int32(smem + taken_at + 8 * slot), int32(slot_phase ^ 1))
            if lane == 0:
                to = int32(smem + record_at + 32 * slot)
                words[0], words[1], words[2], words[3] = seq, head, split, splits
                st_shared_v4(to, words)
                words[0], words[1], words[2] = base, length, first_row
                st_shared_v4(int32(to + 16), words)
                mbarrier_arrive(int32(smem + posted_at + 8 * slot))
            slot = int32(slot ^ 1)
            slot_phase = int32(slot_phase ^ (slot ^ 1))
            tile, tile_end = tiles_of(split, length)
            newest = int32(max(int32(length - tokens), int32(0)) >> PAGE_SHIFT)
            while tile < tile_end:
                begin, end = pages_of(tile, length)
                for which in range(2):
                    part = begin
                    while part < end:
                        place = int32(tile * 2 + part)
                        if not waited and (ahead == stages or place >= newest):
                            griddep_wait()
                            waited = True
                        ahead = int32(ahead + 1)
                        from_lane = int32(place & (split_pages - 1))
                        row = int32(((shfl_idx_i32(page, from_lane) + page_off) * heads + head) * BLOCK_SIZE)
                        pause(int32(2))
                        wait_empty(int32(smem + empty_at + 8 * stage), int32(phase ^ 1))
                        to = int32(smem + chunk_at + stage * chunk_bytes)
                        full = int32(smem + full_at + 8 * stage)
                        if which == 0:
                            load_chunk(to, full, maps, k_cache, row, lane)
                        else:
                            load_chunk(to, full, int64(maps + 128), v_cache, row, lane)
                        stage, phase = stage_of(stage, phase, 1)
                        part = int32(part + 1)
                tile = int32(tile + 1)
            if not waited:
                griddep_wait()
                waited = True
            if not claimed and seq >= 0 and lane == 0:
                following = int32(atom_add_i32(counters, 1) + cuda.gridDim.x)
            number = shfl_idx_i32(following, 0)
            working = seq >= 0
        if lane == 0 and not one_each:
            if atom_add_i32(int64(counters + 4), 1) == cuda.gridDim.x - 1:
                st_global_b32(counters, 0)
                st_global_b32(int64(counters + 4), 0)

    return produce
