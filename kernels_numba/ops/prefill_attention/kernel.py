"""Causal attention of packed rows on Hopper, over pages or packed rows, in the order of
attention_contract.py.

Knows: one warp-specialised kernel. Refuses to know whether a sequence is a prompt, a later chunk of one or
one new token: a row's bits depend on its query, the keys and values it sees, their positions and the window
alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.attention_contract import GROUP_KEYS, LN2, TILE
from kernels_numba.attention_tile import LOWEST
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.prefill_attention.config import (
    LOADERS,
    PANEL_BYTES,
    PRODUCT,
    RECORDS,
    REGISTERS,
    ROW_STATE_BYTES,
    ROWS,
    WARPGROUP,
    Build,
    PrefillConfig,
    smem_plan,
)
from kernels_numba.ops.prefill_attention.producers import make_producers, make_records
from kernels_numba.ops.prefill_attention.rows import (
    STAGE_BYTES,
    WARP_ROWS,
    make_pack,
    make_rescale,
    make_stage,
    make_state,
    make_weigh,
)
from kernels_numba.ops.prefill_attention.schedule import make_quotient
from kernels_numba.ptx.arith import (
    add_f32,
    divide_f32,
    lg2_f32,
    mul_f32,
    select_f32,
    select_i32,
)
from kernels_numba.ptx.atomics import ballot
from kernels_numba.ptx.control import (
    dynamic_shared,
    griddep_launch,
    griddep_wait,
    setmaxnreg_dec,
    setmaxnreg_inc,
    warp_uniform,
)
from kernels_numba.ptx.debug import make_mbarrier_wait, make_stress
from kernels_numba.ptx.fences import fence_proxy_async
from kernels_numba.ptx.mbarrier import fence_mbarrier_init, mbarrier_arrive, mbarrier_init
from kernels_numba.ptx.named_barrier import named_barrier_arrive, named_barrier_sync
from kernels_numba.ptx.predicated import st_global_f32_if, st_shared_zero_16_if
from kernels_numba.ptx.predicated_vector import st_global_v4_if
from kernels_numba.ptx.vector import ld_shared_v4
from kernels_numba.ptx.wgmma import descriptor_k_major, make_descriptor_mn_major, make_wgmma, make_wgmma_wait
from kernels_numba.ptx.wgmma_panels import make_hold, make_wgmma_panels

SIGNATURE = f"void({', '.join(['int64'] * 8 + ['int32'] * 6 + ['float32'])})"
TILE_SHIFT = TILE.bit_length() - 1
GROUPS = TILE // GROUP_KEYS
TURN, OWN = 1, 5  # named barriers: from here on, one a consumer


def make_prefill_kernel(
    config: PrefillConfig, dtype: str, window: int | None = None, with_lse: bool = False,
    build: Build = PRODUCT,
) -> Any:  # fmt: skip
    """out[t, h] = softmax(softmax_scale q[t, h] k^T + causal mask) v for the rows of all sequences.

    Arguments: addresses of: tensor maps u64[2, 16] of K and V, boxes of 64 x 64, as matrices: of pages
    [num_blocks num_kv_heads 64, D], of rows [total keys, num_kv_heads D]; q and out T[tokens, num_q_heads,
    D]; lse f32[tokens, num_q_heads] (with_lse); cu_seqlens_q i32[num_seqs + 1]; context_lens i32[num_seqs];
    block_table i32[num_seqs, ..], or with rows cu_seqlens_k i32[num_seqs + 1]; counters i32[2], both 0, and 0
    again at the end. Then num_seqs, num_kv_heads, group, bytes from one token to the next of q and of out,
    entries from one row to the next of block_table; c (attention_contract.py).
    Who does what: warpgroups 0 to consumers - 1: 64 rows of a tile each; then a warpgroup of producers
    (producers.py): warp 0 keys and values, warp 1 which item comes next (schedule.py), warps 2 and 3 the
    queries of a consumer each. A row is (token, head of the group), token first: a tile is full where tokens
    are few.
    A consumer issues S of tile t + 1, then P V of tile t; while both run it makes t + 1's weights, and while
    it does that the other consumer's products run: they take turns (named barriers TURN + consumer). Tiles
    in which none of its 64 rows sees anything it only hands back.
    At the end of a split o is folded into what the consumer has kept in shared memory (a thread's own words,
    16 bytes at a time): a second o beside the first, S and P would make 224 registers a thread.
    Shared memory: smem_plan(config); K, V and q in panels of 64 columns, 128-byte swizzle. Barriers:
    k_full[s], v_full[s] hand a tile of keys, of values to the consumers, k_empty[s], v_empty[s] hand it back
    (an arrival a warp); q_full[w], q_empty[w] the same of a consumer's queries; posted[r] an item, taken[r]
    back. Named barriers OWN + consumer are a consumer's own: around cleaned values and staged output.
    V rows that no row of the block sees are zeroed in shared memory (0 x NaN is NaN), scores hidden by
    selection. Pages in which nothing is seen, and table entries of such, are never read.
    Dependent launches: lengths and tables are read before the launches before this one have ended, so they
    must not be written by one of those; everything else may be.
    """
    head_dim, stages, consumers = config.head_dim, config.stages, config.consumers
    plan = smem_plan(config)
    q_at, k_at, v_at, state_at = (plan.offset(name) for name in ("q", "k", "v", "state"))
    k_full, k_empty = plan.offset("k_full"), plan.offset("k_empty")
    v_full, v_empty = plan.offset("v_full"), plan.offset("v_empty")
    q_full, q_empty = plan.offset("q_full"), plan.offset("q_empty")
    posted_at, taken_at = plan.offset("posted"), plan.offset("taken")
    rows_at = plan.offset("row_state")
    tile_bytes, state_bytes = config.tile_bytes, ROWS * head_dim * 4
    q_panel = config.tile_rows * 128
    scores, outputs, weights = TILE // 2, head_dim // 2, TILE // 4  # numbers a thread
    panels, units = head_dim // 64, head_dim // 8
    unit_shift, lines = units.bit_length() - 1, 32 // units  # rows that a warp stores at once
    few, many = REGISTERS[consumers]
    turn_threads, row_bytes = 2 * WARPGROUP, head_dim * 2
    turns, short_turns = config.turns, config.short_turns
    has_window, width = window is not None, window or 0
    multiply_k = make_wgmma_panels(TILE, head_dim, dtype, "shared", q_panel, PANEL_BYTES)
    multiply_v = make_wgmma(head_dim, TILE // 16, dtype, a="registers", b_major="mn")
    descriptor_v = make_descriptor_mn_major(PANEL_BYTES)
    scores_ready, scores_alone = make_wgmma_wait(TILE, 1), make_wgmma_wait(TILE, 0)
    output_ready = make_wgmma_wait(head_dim, 0)
    hold, early_groups = make_hold(TILE), config.early or 0
    largest, weigh, hide = make_weigh(window, int(build.mutant == "mask"))
    pack_weights, rescale = make_pack(dtype), make_rescale(head_dim)
    stage_out = make_stage(head_dim, dtype)
    sums, keep, end_split, fold_into = make_state(head_dim)
    wait_full, (take, after) = make_mbarrier_wait("full", build.debug), make_records(config, build)
    inverse, quotient = make_quotient()
    schedule, load_queries, load_keys = make_producers(config, window, build)
    pause = make_stress(build.stress)
    wrong_phase, handed_back = int(build.mutant == "wrong_phase"), build.mutant != "lost_arrival"
    cleaned, folds = build.mutant != "stale_tail", build.mutant != "no_fold"
    early = build.mutant == "early_release"
    scaled = np.float32(1.25 if build.mutant == "scale" else 1)
    lowest, zero, one, ln2 = np.float32(LOWEST), np.float32(0), np.float32(1), np.float32(LN2)
    int32, int64 = cuda.types.int32, cuda.types.int64
    pdl, split_tiles = build.pdl, build.split // TILE

    @jit(device=True, forceinline=True)
    def following(stage: Any, phase: Any) -> Any:
        """The next stage and its phase."""
        stage = int32(stage + 1)
        if stage == stages:
            return int32(0), int32(phase ^ 1)
        return stage, phase

    @jit(device=True, forceinline=True)
    def hand_back(barrier: Any, lane: Any) -> None:
        cuda.syncwarp()
        if lane == 0:
            mbarrier_arrive(barrier)

    @jit(device=True, forceinline=True)
    def take_turn(consumer: Any) -> None:
        if turns:
            named_barrier_sync(int32(consumer + TURN), turn_threads)

    @jit(device=True, forceinline=True)
    def pass_turn(consumer: Any) -> None:
        if turns:
            named_barrier_arrive(
                select_i32(int32(consumer == consumers - 1), TURN, int32(consumer + TURN + 1)), turn_threads
            )

    @jit(device=True, forceinline=True)
    def first_tile(length: Any) -> Any:
        """The first tile of keys that a row of `length` keys sees."""
        if has_window:
            return int32(select_i32(int32(length > width), int32(length - width), 0) >> TILE_SHIFT)
        return int32(0)

    @jit(device=True, forceinline=True)
    def tiles_of(length: Any) -> Any:
        """The tile after the last one in which a row of `length` keys sees anything."""
        return int32(select_i32(int32(length > 0), int32(length + (TILE - 1)), 0) >> TILE_SHIFT)

    @jit(device=True)
    def clean(values: Any, seen_from: Any, seen_to: Any, consumer: Any, member: Any) -> None:
        """Zero the rows of V outside [seen_from, seen_to); each consumer for itself, since the zeros are the
        same. 16 rows at once: lanes that zero the same columns of 32 rows would meet in four banks."""
        row, to = int32(member >> 3), int32(values + member * 16)
        for k in range(TILE // 16):
            key = int32(row + 16 * k)
            unseen = int32(int32(key < seen_from) | int32(key >= seen_to))
            for panel in range(panels):
                st_shared_zero_16_if(unseen, int32(to + panel * PANEL_BYTES + k * 2048))
        fence_proxy_async()
        named_barrier_sync(int32(consumer + OWN), WARPGROUP)

    @jit(device=True)
    def pass_by(
        smem: Any, stage: Any, phase: Any, v_stage: Any, v_phase: Any, consumer: Any, lane: Any
    ) -> None:  # fmt: skip
        """A tile of which this warpgroup's rows see nothing: hand it back, and the turn on."""
        wait_full(int32(smem + k_full + 8 * stage), phase)
        take_turn(consumer)
        pass_turn(consumer)
        hand_back(int32(smem + k_empty + 8 * stage), lane)
        wait_full(int32(smem + v_full + 8 * v_stage), v_phase)
        hand_back(int32(smem + v_empty + 8 * v_stage), lane)

    @jit(device=True)
    def consume(
        smem: Any, out: Any, lse: Any, heads: Any, group: Any, out_stride: Any, c: Any, thread: Any,
        consumer: Any, warp: Any, lane: Any,
    ) -> None:  # fmt: skip
        """One consumer warpgroup: every item that is posted, until one says that there are no more."""
        r, i = int32(lane >> 2), int32(lane & 3)
        member = int32(thread & (WARPGROUP - 1))
        s = cuda.local.array(scores, np.float32)
        o = cuda.local.array(outputs, np.float32)
        p = cuda.local.array(weights, np.int32)
        l_low = cuda.local.array(4, np.float32)
        l_high = cuda.local.array(4, np.float32)
        words = cuda.local.array(4, np.int32)
        for k in range(scores):
            s[k] = zero
        queries = descriptor_k_major(int32(smem + q_at + consumer * (ROWS * 128)))
        my_state = int32(smem + state_at + warp * (state_bytes // 4))  # of this warp alone
        mine = int32(my_state + lane * 16)
        my_rows = int32(smem + rows_at + warp * ROW_STATE_BYTES + r * 16)
        factor = inverse(group)
        stage, phase, v_stage, v_phase = int32(0), int32(0), int32(0), int32(0)
        slot, slot_phase, q_phase = int32(0), int32(0), int32(0)
        if turns and consumer == consumers - 1:
            pass_turn(consumer)
        working = True
        while working:
            seq, head, row0, rows, token0, start = take(smem, slot, slot_phase, group, lane)
            slot, slot_phase = after(slot, slot_phase)
            working = seq >= 0
            if working:
                # Keys that the first and last row see: of the block, of this warpgroup, of this thread's
                # rows.
                last = int32(min(int32(row0 + consumers * ROWS), rows) - 1)
                my_first = int32(row0 + consumer * ROWS)
                my_last = int32(min(int32(my_first + (ROWS - 1)), last))
                least = int32(start + 1 + quotient(row0, factor))
                most = int32(start + 1 + quotient(last, factor))
                my_least = int32(start + 1 + quotient(my_first, factor))
                my_most = int32(start + 1 + quotient(my_last, factor))
                row = int32(my_first + (warp & 3) * 16 + r)
                low_row = select_i32(int32(row < my_last), row, my_last)
                high_row = select_i32(int32(row + 8 < my_last), int32(row + 8), my_last)
                low = int32(start + 1 + quotient(low_row, factor))
                high = int32(start + 1 + quotient(high_row, factor))
                tile, tile_end = first_tile(least), tiles_of(most)
                my_tile, my_end = first_tile(my_least), tiles_of(my_most)
                if my_first > last or my_tile >= my_end:
                    my_tile, my_end = tile, tile
                m_low, m_high = lowest, lowest
                splits = int32(0)  # folded so far
                for k in range(outputs):
                    o[k] = zero
                for k in range(4):
                    l_low[k] = zero
                    l_high[k] = zero
                wait_full(int32(smem + q_full + 8 * consumer), q_phase)
                # Tiles before the window of this warpgroup's rows.
                while has_window and tile < my_tile:
                    pass_by(smem, stage, phase, v_stage, v_phase, consumer, lane)
                    stage, phase = following(stage, phase)
                    v_stage, v_phase = following(v_stage, v_phase)
                    tile = int32(tile + 1)
                if tile < my_end:
                    wait_full(int32(smem + k_full + 8 * stage), int32(phase ^ wrong_phase))
                    pause(int32(3))
                    take_turn(consumer)
                    multiply_k(s, queries, descriptor_k_major(int32(smem + k_at + stage * tile_bytes)), 0)
                    pass_turn(consumer)
                    scores_alone(s)
                    hand_back(int32(smem + k_empty + 8 * stage), lane)
                    stage, phase = following(stage, phase)
                    at = int32(tile * TILE + 2 * i)
                    if tile * TILE + TILE > my_least or (has_window and tile * TILE < my_most - width):
                        hide(s, at, low, high)
                    m_low, m_high, n_low, n_high, f_low, f_high = largest(s, m_low, m_high, c)
                    weigh(s, 0, GROUPS, l_low, l_high, c, n_low, n_high, f_low, f_high)
                    pack_weights(s, p)
                    tile = int32(tile + 1)
                    while tile < my_end:
                        # S of this tile, then P V of the one before it, whose weights p holds.
                        wait_full(int32(smem + k_full + 8 * stage), phase)
                        pause(int32(4))
                        take_turn(consumer)
                        multiply_k(s, queries, descriptor_k_major(int32(smem + k_at + stage * tile_bytes)), 0)
                        if short_turns:
                            pass_turn(consumer)
                        wait_full(int32(smem + v_full + 8 * v_stage), v_phase)
                        values = int32(smem + v_at + v_stage * tile_bytes)
                        if has_window and cleaned:
                            seen_from = int32(least - width - (tile - 1) * TILE)
                            if seen_from > 0:
                                clean(values, seen_from, int32(TILE), consumer, member)
                        multiply_v(o, p, descriptor_v(values), 1)
                        if not short_turns:
                            pass_turn(consumer)
                        if early:
                            hand_back(int32(smem + v_empty + 8 * v_stage), lane)
                        scores_ready(s)
                        hand_back(int32(smem + k_empty + 8 * stage), lane)
                        stage, phase = following(stage, phase)
                        at = int32(tile * TILE + 2 * i)
                        if tile * TILE + TILE > my_least or (has_window and tile * TILE < my_most - width):
                            hide(s, at, low, high)
                        ended = (tile & (split_tiles - 1)) == 0  # the split of the tile before this one
                        if ended:
                            end_split(m_low, m_high, sums(l_low), sums(l_high), my_rows)
                            m_low, m_high = lowest, lowest
                            for k in range(4):
                                l_low[k] = zero
                                l_high[k] = zero
                        m_low, m_high, n_low, n_high, f_low, f_high = largest(s, m_low, m_high, c)
                        weigh(s, 0, early_groups, l_low, l_high, c, n_low, n_high, f_low, f_high)
                        # ptxas puts the wait for P V at the beginning of its block, before the weights that
                        # are to be made meanwhile. A wait that is over ends the block that they are in; that
                        # it needs their sums, which are never negative, keeps them there.
                        unmade = int32(0)
                        for g in range(early_groups):
                            unmade = int32(unmade | int32(l_low[g] < zero) | int32(l_high[g] < zero))
                        hold(s)
                        wait_full(int32(smem + q_full + 8 * consumer), int32(q_phase ^ unmade))
                        output_ready(o)
                        if not early and handed_back:
                            hand_back(int32(smem + v_empty + 8 * v_stage), lane)
                        v_stage, v_phase = following(v_stage, v_phase)
                        weigh(s, early_groups, GROUPS, l_low, l_high, c, n_low, n_high, f_low, f_high)
                        pack_weights(s, p)
                        if ended:
                            fold_into(o, mine, my_rows, splits, folds)
                            keep(o, mine)
                            splits = int32(splits + 1)
                            for k in range(outputs):
                                o[k] = zero
                        elif ballot(int32(int32(f_low != one) | int32(f_high != one))) != 0:
                            rescale(o, f_low, f_high)  # times 1 changes nothing
                        tile = int32(tile + 1)
                    wait_full(int32(smem + v_full + 8 * v_stage), v_phase)
                    values = int32(smem + v_at + v_stage * tile_bytes)
                    seen_from, seen_to = int32(0), int32(most - (tile - 1) * TILE)
                    if has_window:
                        seen_from = int32(least - width - (tile - 1) * TILE)
                    if cleaned and (seen_to < TILE or seen_from > 0):
                        clean(values, seen_from, seen_to, consumer, member)
                    multiply_v(o, p, descriptor_v(values), 1)
                    output_ready(o)
                    hand_back(int32(smem + v_empty + 8 * v_stage), lane)
                    v_stage, v_phase = following(v_stage, v_phase)
                # No product of this warpgroup reads the queries any more.
                hand_back(int32(smem + q_empty + 8 * consumer), lane)
                q_phase = int32(q_phase ^ 1)
                # Tiles that other warpgroups' rows see.
                while tile < tile_end:
                    pass_by(smem, stage, phase, v_stage, v_phase, consumer, lane)
                    stage, phase = following(stage, phase)
                    v_stage, v_phase = following(v_stage, v_phase)
                    tile = int32(tile + 1)
                last_low, last_high = sums(l_low), sums(l_high)
                if splits > 0:
                    end_split(m_low, m_high, last_low, last_high, my_rows)
                    m_low, m_high, last_low, last_high = fold_into(o, mine, my_rows, splits, folds)
                low_inverse = select_f32(int32(last_low > zero), divide_f32(one, last_low), zero)
                high_inverse = select_f32(int32(last_high > zero), divide_f32(one, last_high), zero)
                # Through this warp's shared memory, so that rows leave 16 bytes a lane.
                cuda.syncwarp()
                stage_out(o, my_state, low_inverse, high_inverse, lane)
                cuda.syncwarp()
                place = int64(head) * group
                # head >> 24 is 0, which no compiler can know: places worked out ahead would be held in
                # registers all along.
                own = int32(lane + (head >> 24))
                unit, line = int32(own & (units - 1)), int32(own >> unit_shift)
                for k in range(WARP_ROWS // lines):
                    within = int32(line + k * lines)
                    at = int32(my_state + (unit >> 3) * STAGE_BYTES + within * 128)
                    ld_shared_v4(words, int32(at + (((unit & 7) ^ (within & 7)) << 4)))
                    row = int32(my_first + (warp & 3) * WARP_ROWS + within)
                    token = quotient(row, factor)
                    column = int64(place + (row - token * group)) * row_bytes + unit * 16
                    address = int64(out + (int64(token0) + token) * out_stride + column)
                    st_global_v4_if(int32(row <= my_last), address, words)
                cuda.syncwarp()
                if with_lse:
                    for half in range(2):
                        row = int32(my_first + (warp & 3) * 16 + r + 8 * half)
                        token = quotient(row, factor)
                        value = mul_f32(add_f32(m_low, lg2_f32(last_low)), ln2)
                        if half == 1:
                            value = mul_f32(add_f32(m_high, lg2_f32(last_high)), ln2)
                        index = (
                            (int64(token0) + token) * (int64(heads) * group) + place + (row - token * group)
                        )
                        written = int32(int32(i == 0) & int32(row <= my_last))
                        st_global_f32_if(written, int64(lse + index * 4), value)
        if turns and consumer == 0:
            take_turn(consumer)  # the last turn, which nobody needs

    def prefill_kernel(
        maps: Any, q: Any, out: Any, lse: Any, cu: Any, lens: Any, table: Any, counters: Any, num_seqs: Any,
        heads: Any, group: Any, q_stride: Any, out_stride: Any, table_stride: Any, c: Any,
    ) -> None:  # fmt: skip
        if pdl:
            griddep_launch()
        smem = int32(dynamic_shared())
        thread = int32(cuda.threadIdx.x)
        warp = int32(warp_uniform(int32(thread >> 5)))
        lane = int32(thread & 31)
        consumer = int32(warp >> 2)
        if thread == 0:
            for k in range(stages):
                mbarrier_init(int32(smem + k_full + 8 * k), 1)
                mbarrier_init(int32(smem + v_full + 8 * k), 1)
                mbarrier_init(int32(smem + k_empty + 8 * k), 4 * consumers)
                mbarrier_init(int32(smem + v_empty + 8 * k), 4 * consumers)
            for k in range(consumers):
                mbarrier_init(int32(smem + q_full + 8 * k), LOADERS)
                mbarrier_init(int32(smem + q_empty + 8 * k), 4)
            for k in range(RECORDS):
                mbarrier_init(int32(smem + posted_at + 8 * k), 1)
                mbarrier_init(int32(smem + taken_at + 8 * k), 4 * consumers + LOADERS + 1)
            fence_mbarrier_init()
        cuda.syncthreads()
        if consumer == consumers:
            setmaxnreg_dec(few)
            role = int32(warp & 3)
            if role == 0:
                load_keys(smem, maps, table, heads, group, table_stride, lane)
            elif role == 1:
                schedule(smem, cu, lens, counters, num_seqs, heads, group, lane)
            else:
                load_queries(smem, q, group, q_stride, int32(role - 2), lane)
        else:
            setmaxnreg_inc(many)
            if pdl:
                griddep_wait()
            consume(
                smem, out, lse, heads, group, out_stride, mul_f32(c, scaled), thread, consumer, warp, lane
            )

    return prefill_kernel
