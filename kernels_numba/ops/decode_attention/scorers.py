"""The four warps of the tensor-core decode kernel that make weights of scores: queries, keys, maxima, sums.

They go on to the next tile while the adders (adders.py) still add up values by this one's weights: a tile's
chain of products, exchanges and exponentials is longer than its reading, so the two halves of it overlap.
Knows: the rows' scores. Refuses to know: values.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.attention_contract import TILE
from kernels_numba.attention_tile import LOWEST, make_group_max, make_group_weights, make_negated, make_quad
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import (
    ADDERS,
    ROWS,
    SCORERS,
    WARP,
    Build,
    DecodeConfig,
    smem_plan,
)
from kernels_numba.ops.decode_attention.feed import make_read_record, make_stage_of, make_wait
from kernels_numba.ops.decode_attention.fold import make_row_of
from kernels_numba.ops.decode_attention.products import QUERY_BOX, make_read_by, make_score
from kernels_numba.ops.decode_attention.schedule import make_ranges, make_schedule
from kernels_numba.ptx.arith import add_f32, ex2_f32, fma_f32, max_f32, mul_f32, select_f32, select_i32
from kernels_numba.ptx.debug import make_stress
from kernels_numba.ptx.ldst import ld_global_i32, st_shared_b32
from kernels_numba.ptx.mbarrier import mbarrier_arrive
from kernels_numba.ptx.named_barrier import named_barrier_sync
from kernels_numba.ptx.predicated import st_shared_f32_if
from kernels_numba.ptx.vector import ld_shared_v4, st_shared_v4

MEMBERS = SCORERS * WARP
BARRIER = 1  # the scorers' own: after the query has come, after each tile's maxima


@cache
def make_weigh(config: DecodeConfig, dtype: str, window: int | None, build: Build, tokens: int) -> Any:
    """f(smem, q, heads, group, q_stride, c, warp, lane): the warps' whole life; arguments as the kernel's,
    warp: 0 to 3.

    Of a tile warp w scores keys 32 w on for the item's 16 rows (those past the last are zeros), the warps
    exchange their maxima, and each leaves the weights of its keys, all of them the factor of o. The query's
    rows are asked for with 128 bytes a warp, and lie in shared memory as ldmatrix wants them: fragments asked
    for by the lanes that hold them would take 32 times as many of them, each over 8 rows.
    """
    plan, head_dim, stages, chunk_bytes = (
        smem_plan(config),
        config.head_dim,
        config.stages,
        config.chunk_bytes,
    )
    chunk_at, query_at, weights_at = plan.offset("chunk"), plan.offset("query"), plan.offset("weights")
    factor_at, max_at, sum_at = plan.offset("factor"), plan.offset("max"), plan.offset("sum")
    top_at, record_at = plan.offset("top"), plan.offset("record")
    full_at, empty_at = plan.offset("full"), plan.offset("empty")
    weighed_at, added_at = plan.offset("weighed"), plan.offset("added")
    posted_at, taken_at, summed_at = plan.offset("posted"), plan.offset("taken"), plan.offset("summed")
    row_bytes, row_words = head_dim * 2, head_dim // 2
    word_shift, fetches = row_words.bit_length() - 1, ROWS * row_words // MEMBERS
    reach = None if window is None else window + tokens - 1  # of all of a sequence's rows
    first_of, _, _ = make_schedule(window, build.split)
    pages_of, tiles_of = make_ranges(reach, build.split)
    row_of, read_by = make_row_of(tokens), make_read_by()
    stage_of, pause, read_record = make_stage_of(stages), make_stress(build.stress), make_read_record()
    wait_full, wait_posted = make_wait("full", config, build), make_wait("posted", config, build)
    wait_added = make_wait("added", config, build)
    quad_max, quad_sum = make_quad()
    group_max, group_weights = make_group_max(), make_group_weights(dtype)
    negated, score = make_negated(), make_score(head_dim, dtype)
    voices = WARP if build.every_lane else 1  # lanes of a warp that arrive
    wrong_phase, too_many = int(build.mutant == "wrong_phase"), int(build.mutant == "mask")
    lowest, zero = np.float32(LOWEST), np.float32(0)
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def fetch(
        to: Any, q: Any, seq: Any, head: Any, group: Any, first_row: Any, q_stride: Any, thread: Any
    ) -> None:
        """The item's rows to shared memory; rows past the last have the last one's place, and are zeros."""
        words = cuda.local.array(fetches, np.int32)
        rows = int32(group * tokens)
        for k in range(fetches):
            number = int32(thread + k * MEMBERS)
            row = int32(first_row + (number >> word_shift))
            token, mine = row_of(select_i32(int32(row < rows), row, int32(rows - 1)), group)
            at = int64(q + (int64(seq) * tokens + token) * q_stride)
            at = int64(at + (int64(head) * group + mine) * row_bytes + (number & (row_words - 1)) * 4)
            words[k] = ld_global_i32(at)
        for k in range(fetches):
            number = int32(thread + k * MEMBERS)
            row, word = int32(number >> word_shift), int32(number & (row_words - 1))
            unit = int32(((word >> 2) & 7) ^ (row & 7))
            place = int32((word >> 5) * QUERY_BOX + row * 128 + unit * 16 + (word & 3) * 4)
            value = select_i32(int32(first_row + row < rows), words[k], 0)
            st_shared_b32(int32(to + place), value)

    @jit(device=True)
    def weigh(smem: Any, q: Any, heads: Any, group: Any, q_stride: Any, c: Any, warp: Any, lane: Any) -> None:
        r, i = int32(lane >> 2), int32(lane & 3)
        s = cuda.local.array(16, np.float32)
        p = cuda.local.array(8, np.int32)
        words = cuda.local.array(4, np.int32)
        four = cuda.local.array(4, np.float32)
        my_part = int32(warp >> 1)
        query, first_keys = int32(smem + query_at), int32(smem + chunk_at + (warp & 1) * 4096)
        my_weights = int32(smem + weights_at + 2 * warp * 512 + lane * 16)
        my_max, row_max = int32(smem + max_at + r * 16 + warp * 4), int32(smem + max_at + r * 16)
        first_lane, writer = int32(i == 0), int32(int32(warp == 0) & int32(i == 0))
        nothing = int32(group >> 16)
        stage, phase, slot, slot_phase = int32(0), int32(0), int32(0), int32(0)
        turn, turn_phase = int32(0), int32(0)
        working = True
        while working:
            wait_posted(int32(smem + posted_at + 8 * slot), slot_phase)
            seq, head, split, _, _, length, first_row = read_record(int32(smem + record_at + 32 * slot), lane)
            if tokens == 1:
                first_row = int32(0)  # known when compiled: a register less
            if lane < voices:
                mbarrier_arrive(int32(smem + taken_at + 8 * slot))
            working = seq >= 0
            if working:
                fetch(query, q, seq, head, group, first_row, q_stride, int32(warp * WARP + lane))
                # What a row sees: all but the tokens after its own.
                low_token, _ = row_of(int32(first_row + r), group)
                high_token, _ = row_of(int32(first_row + r + 8), group)
                low_length = int32(length - (tokens - 1) + low_token)
                high_length = int32(length - (tokens - 1) + high_token)
                m_low, m_high, l_low, l_high = lowest, lowest, zero, zero
                tile, tile_end = tiles_of(split, length)
                named_barrier_sync(BARRIER, MEMBERS)
                while tile < tile_end:
                    begin, end = pages_of(tile, length)
                    count = int32(end - begin)
                    edge = first_of(length) > tile * TILE or length - (tokens - 1) - tile * TILE < TILE
                    # Before the keys, not only before the weights: no further ahead of the adders, for in a
                    # short ring the stage of these keys may be that of values which have yet to come, and a
                    # barrier that is asked for a phase too early says yes.
                    wait_added(int32(smem + added_at + 8 * turn), int32(turn_phase ^ 1))
                    if begin <= my_part and my_part < end:
                        mine, mine_phase = stage_of(stage, phase, int32(my_part - begin))
                        wait_full(int32(smem + full_at + 8 * mine), int32(mine_phase ^ wrong_phase))
                        pause(int32(3))
                        loaded = score(s, query, int32(first_keys + mine * chunk_bytes), lane)
                        # Two warps read a page of keys, four one of values: each arrives twice here. On the
                        # other page nobody may arrive who has not seen it come.
                        cuda.syncwarp()
                        if lane < voices:
                            for _ in range(ADDERS // 2):
                                mbarrier_arrive(read_by(int32(smem + empty_at + 8 * mine), loaded, nothing))
                        if edge:
                            key = int32(tile * TILE + warp * 32 + 2 * i)
                            low_first, high_first = first_of(low_length), first_of(high_length)
                            for j in range(16):
                                mine_key = int32(key + (j >> 2) * 8 + (j & 1))
                                from_key, to_key = low_first, low_length
                                if j & 2:
                                    from_key, to_key = high_first, high_length
                                seen = int32(
                                    int32(from_key <= mine_key) & int32(mine_key < to_key + too_many)
                                )
                                s[j] = select_f32(seen, s[j], lowest)
                    else:
                        for j in range(16):
                            s[j] = lowest
                    # Maxima have two places in turn: who writes the next ones has met all who read these.
                    top_low, top_high = group_max(s, 0)
                    top_low, top_high = quad_max(top_low), quad_max(top_high)
                    st_shared_f32_if(first_lane, int32(my_max + turn * 256), top_low)
                    st_shared_f32_if(first_lane, int32(my_max + turn * 256 + 128), top_high)
                    pause(int32(4))
                    named_barrier_sync(BARRIER, MEMBERS)
                    ld_shared_v4(four, int32(row_max + turn * 256))
                    top_low = max_f32(max_f32(four[0], four[1]), max_f32(four[2], four[3]))
                    ld_shared_v4(four, int32(row_max + turn * 256 + 128))
                    top_high = max_f32(max_f32(four[0], four[1]), max_f32(four[2], four[3]))
                    new_low = max_f32(m_low, mul_f32(top_low, c))
                    new_high = max_f32(m_high, mul_f32(top_high, c))
                    n_low, n_high = negated(new_low), negated(new_high)
                    f_low, f_high = ex2_f32(add_f32(m_low, n_low)), ex2_f32(add_f32(m_high, n_high))
                    m_low, m_high = new_low, new_high
                    t_low, t_high = group_weights(s, 0, p, 0, c, n_low, n_high)
                    l_low, l_high = fma_f32(l_low, f_low, t_low), fma_f32(l_high, f_high, t_high)
                    for step in range(2):
                        for j in range(4):
                            words[j] = p[4 * step + j]
                        st_shared_v4(int32(my_weights + turn * 4096 + step * 512), words)
                    factors = int32(smem + factor_at + turn * 64 + r * 4)
                    st_shared_f32_if(writer, factors, f_low)
                    st_shared_f32_if(writer, int32(factors + 32), f_high)
                    pause(int32(5))
                    cuda.syncwarp()
                    if lane < voices:
                        mbarrier_arrive(int32(smem + weighed_at + 8 * turn))
                    turn = int32(turn ^ 1)
                    turn_phase = int32(turn_phase ^ (turn ^ 1))
                    stage, phase = stage_of(stage, phase, int32(2 * count))
                    tile = int32(tile + 1)
                # The end of the split: quads here, the four warps' groups of keys by the adders.
                l_low, l_high = quad_sum(l_low), quad_sum(l_high)
                sums, tops = int32(smem + sum_at + slot * 256), int32(smem + top_at + slot * 64 + r * 4)
                st_shared_f32_if(first_lane, int32(sums + r * 16 + warp * 4), l_low)
                st_shared_f32_if(first_lane, int32(sums + r * 16 + 128 + warp * 4), l_high)
                st_shared_f32_if(writer, tops, m_low)
                st_shared_f32_if(writer, int32(tops + 32), m_high)
                cuda.syncwarp()
                if lane < voices:
                    mbarrier_arrive(int32(smem + summed_at + 8 * slot))
            slot = int32(slot ^ 1)
            slot_phase = int32(slot_phase ^ (slot ^ 1))

    return weigh
