"""Causal attention of packed rows by mma.sync, over pages or packed rows, in the order of
attention_contract.py.

Knows: one kernel for sm_80 and newer. Refuses to know whether a sequence is a prompt, a later chunk of one or
one new token: a row's bits depend on its query, the keys and values it sees, their positions and the window
alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.attention_contract import LN2, TILE
from kernels_numba.attention_tile import LOWEST, make_fold_factors, make_folded
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.prefill_attention.config import (
    BLOCK_SIZE,
    BOX_BYTES,
    PRODUCT,
    Build,
)
from kernels_numba.ops.prefill_attention.mma_config import (
    CONSUMERS,
    RECORD_SHIFT,
    RECORDS,
    THREADS,
    TILE_ROWS,
    WARP_ROWS,
    MmaConfig,
    smem_plan,
)
from kernels_numba.ops.prefill_attention.mma_loads import make_fill, make_post, make_wait
from kernels_numba.ops.prefill_attention.rows import make_pack, make_rescale, make_state, make_weigh
from kernels_numba.ptx.arith import add_f32, divide_f32, lg2_f32, mul_f32, select_f32, select_i32
from kernels_numba.ptx.atomics import atom_add_i32, ballot
from kernels_numba.ptx.control import dynamic_shared
from kernels_numba.ptx.debug import make_stress
from kernels_numba.ptx.ldst import ld_global_i32, ld_shared_b32, st_global_b32, st_shared_b32
from kernels_numba.ptx.matrix import ldmatrix_x4, ldmatrix_x4_trans
from kernels_numba.ptx.mbarrier import mbarrier_arrive, mbarrier_init
from kernels_numba.ptx.mma import mma_m16n8k16_at, mma_m16n8k16_f16_at, pack_bf16, pack_f16
from kernels_numba.ptx.predicated import st_global_b32_if, st_global_f32_if
from kernels_numba.ptx.vector import ld_global_v4, st_global_v4

SIGNATURE = f"void({', '.join(['int64'] * 10 + ['int32'] * 6 + ['float32'])})"
TILE_SHIFT, PAGE_SHIFT = TILE.bit_length() - 1, BLOCK_SIZE.bit_length() - 1
STATE_STRIDE = THREADS * 16  # bytes from one of a thread's vectors to its next: a block's lie together


def make_score(head_dim: int, dtype: str, part: int) -> Any:
    """f(s, query, keys, base): S = Q K^T of 64 keys at shared address `keys`, the tile's part-th, to s[32
    part : 32 part + 32]; base: the lane's place among a chunk's rows and units."""
    k_steps, first = head_dim // 16, 32 * part
    multiply = mma_m16n8k16_at if dtype == "bfloat16" else mma_m16n8k16_f16_at
    int32, zero = cuda.types.int32, np.float32(0)

    @jit(device=True, forceinline=True)
    def score(s: Any, query: Any, keys: Any, base: Any) -> None:
        b = cuda.local.array(4, np.int32)
        for i in range(32):
            s[first + i] = zero
        for k in range(k_steps):
            at = int32(((keys + base) ^ ((k & 3) << 5)) + (k >> 2) * BOX_BYTES)
            for pair in range(4):
                ldmatrix_x4(b, int32(at + pair * 2048))
                multiply(s, first + 8 * pair, query, 4 * k, b, 0)
                multiply(s, first + 8 * pair + 4, query, 4 * k, b, 2)

    return score


def make_accumulate(head_dim: int, dtype: str, part: int) -> Any:
    """f(o, p, values, base): o[head_dim / 2] += P V over the tile's part-th 64 keys, whose weights are p[16
    part : 16 part + 16]; values: their shared address; base: the lane's place among a chunk's rows and
    units."""
    pairs, first = head_dim // 16, 16 * part
    multiply = mma_m16n8k16_at if dtype == "bfloat16" else mma_m16n8k16_f16_at
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def accumulate(o: Any, p: Any, values: Any, base: Any) -> None:
        b = cuda.local.array(4, np.int32)
        for step in range(4):
            for pair in range(pairs):
                at = int32((values + base) ^ ((pair & 3) << 5))
                ldmatrix_x4_trans(b, int32(at + (pair >> 2) * BOX_BYTES + step * 2048))
                multiply(o, 8 * pair, p, first + 4 * step, b, 0)
                multiply(o, 8 * pair + 4, p, first + 4 * step, b, 2)

    return accumulate


def make_kept(head_dim: int) -> tuple[Any, Any]:
    """(keep, fold_into): a thread's rows of splits that have ended, in global memory, 16 bytes at a time from
    address `state` on. All of a block's would fill two thirds of its shared memory, and are needed once in
    1,024 keys.

    keep(o, state, m_low, m_high, l_low, l_high) puts them there; fold_into, of the same -> (m_low, m_high,
    l_low, l_high): what is there, folded with them; o becomes that.
    """
    vectors, fold_factors, folded = head_dim // 8, make_fold_factors(), make_folded()
    int64 = cuda.types.int64

    @jit(device=True, forceinline=True)
    def keep(o: Any, state: Any, m_low: Any, m_high: Any, l_low: Any, l_high: Any) -> None:
        four = cuda.local.array(4, np.float32)
        four[0], four[1], four[2], four[3] = m_low, m_high, l_low, l_high
        st_global_v4(state, four)
        for k in range(vectors):
            for j in range(4):
                four[j] = o[4 * k + j]
            st_global_v4(int64(state + (k + 1) * STATE_STRIDE), four)

    @jit(device=True, forceinline=True)
    def fold_into(o: Any, state: Any, m_low: Any, m_high: Any, l_low: Any, l_high: Any) -> Any:
        four = cuda.local.array(4, np.float32)
        ld_global_v4(four, state)
        m_low, a_low, b_low = fold_factors(four[0], m_low)
        m_high, a_high, b_high = fold_factors(four[1], m_high)
        l_low, l_high = folded(four[2], a_low, l_low, b_low), folded(four[3], a_high, l_high, b_high)
        for k in range(vectors):
            ld_global_v4(four, int64(state + (k + 1) * STATE_STRIDE))
            o[4 * k] = folded(four[0], a_low, o[4 * k], b_low)
            o[4 * k + 1] = folded(four[1], a_low, o[4 * k + 1], b_low)
            o[4 * k + 2] = folded(four[2], a_high, o[4 * k + 2], b_high)
            o[4 * k + 3] = folded(four[3], a_high, o[4 * k + 3], b_high)
        return m_low, m_high, l_low, l_high

    return keep, fold_into


def make_prefill_mma_kernel(
    config: MmaConfig, dtype: str, window: int | None = None, with_lse: bool = False, build: Build = PRODUCT
) -> Any:
    """out[t, h] = softmax(softmax_scale q[t, h] k^T + causal mask) v for the rows of all sequences.

    Arguments: addresses of: k and v: caches T[num_blocks, num_kv_heads, 64, D], or with rows T[total keys,
    num_kv_heads, D]; q and out T[tokens, num_q_heads, D]; lse f32[tokens, num_q_heads] (with_lse);
    cu_seqlens_q i32[num_seqs + 1]; context_lens i32[num_seqs]; block_table i32[num_seqs, ..], or with rows
    cu_seqlens_k i32[num_seqs + 1]; counters i32[2], both 0, and 0 again at the end; state f32[blocks,
    state_words]. Then num_seqs, num_kv_heads, group, bytes from one token to the next of q and of out,
    entries from one row to the next of block_table; c (attention_contract.py).
    Who does what: each of eight warps has 16 rows of an item's 128 (a row is (token, head of the group),
    token first), their queries in registers, and goes its own way; all load together what the item sees, an
    eighth each (make_fill). Of a tile of 128 keys a warp makes S, then weights, then adds P V; halves of a
    tile in which its rows see nothing it hands back unread. Warp 0 also finds the next item while this one is
    computed (make_post).
    At the end of a split m, l and o are folded into what the thread has kept in global memory (make_kept).
    Shared memory: smem_plan(config), chunks of 64 keys. Barriers: full[s] hands a loaded chunk to all (each
    thread arrives when its copies have landed), empty[s] hands it back (an arrival a warp); posted[r] an
    item, taken[r] back. Scores that a row does not see are hidden by selection.
    Registers: with head_dim 128 S, o and the queries are 160 of a thread's 255. So numbers that are needed
    once a tile or an item are read anew from shared memory, the record and the warp's own.
    """
    head_dim, stages, chunk_bytes, plan = (
        config.head_dim,
        config.stages,
        config.chunk_bytes,
        smem_plan(config),
    )
    chunk_at, full_at, empty_at = plan.offset("chunk"), plan.offset("full"), plan.offset("empty")
    record_at, posted_at, taken_at = plan.offset("record"), plan.offset("posted"), plan.offset("taken")
    own_at = plan.offset("own")
    scores, outputs, weights = TILE // 2, head_dim // 2, TILE // 4  # numbers a thread
    k_steps, fragments = head_dim // 16, head_dim // 4
    row_bytes, block_state = head_dim * 2, config.state_words * 4
    has_window, width, split_tiles = window is not None, window or 0, build.split // TILE
    split_shift = split_tiles.bit_length() - 1
    score_first, score_second = (make_score(head_dim, dtype, part) for part in range(2))
    add_first, add_second = (make_accumulate(head_dim, dtype, part) for part in range(2))
    largest, weigh, hide = make_weigh(window, int(build.mutant == "mask"))
    pack_weights, rescale, sums = make_pack(dtype), make_rescale(head_dim), make_state(head_dim)[0]
    keep, fold_into = make_kept(head_dim)
    pack = pack_bf16 if dtype == "bfloat16" else pack_f16
    fill, pause = make_fill(config, window, build), make_stress(build.stress)
    start_search, post = make_post(config, build)
    wait_full, wait_posted = make_wait("full", build), make_wait("posted", build)
    wrong_phase, handed_back = int(build.mutant == "wrong_phase"), build.mutant != "lost_arrival"
    early, folds = build.mutant == "early_release", build.mutant != "no_fold"
    wrong_scale = build.mutant == "scale"
    lowest, zero, one, ln2 = np.float32(LOWEST), np.float32(0), np.float32(1), np.float32(LN2)
    int32, int64, uint32 = cuda.types.int32, cuda.types.int64, cuda.types.uint32

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
    def first_seen(least: Any) -> Any:
        """The first tile of keys that a row of `least` keys sees."""
        if has_window:
            return int32(select_i32(int32(least > width), int32(least - width), 0) >> TILE_SHIFT)
        return int32(0)

    @jit(device=True, forceinline=True)
    def halves_of(tile: Any, least: Any, most: Any) -> Any:
        """Whether the first, whether the second half of a tile has keys that one of some rows sees, of which
        the first sees `least` keys, the last `most`."""
        key = int32(tile << TILE_SHIFT)
        middle, end, first_key = int32(key + BLOCK_SIZE), int32(key + TILE), int32(least - width)
        first, second = int32(key < most), int32(middle < most)
        if has_window:
            first, second = int32(first & int32(middle > first_key)), int32(second & int32(end > first_key))
        return first, second

    @jit(device=True, forceinline=True)
    def pass_by(smem: Any, stage: Any, phase: Any, lane: Any) -> Any:
        """A chunk of which this warp's rows see nothing: hand it back."""
        wait_full(int32(smem + full_at + 8 * stage), phase)
        hand_back(int32(smem + empty_at + 8 * stage), lane)
        return following(stage, phase)

    def prefill_mma_kernel(
        k: Any, v: Any, q: Any, out: Any, lse: Any, cu: Any, lens: Any, table: Any, counters: Any,
        state: Any, num_seqs: Any, heads: Any, group: Any, q_stride: Any, out_stride: Any, table_stride: Any,
        scale: Any,
    ) -> None:  # fmt: skip
        smem = int32(dynamic_shared())
        thread = int32(cuda.threadIdx.x)
        warp = int32(thread >> 5)
        lane = int32(thread & 31)
        if lane == 0:
            st_shared_b32(int32(smem + own_at + 16 * warp + 8), int32(0))
        if thread == 0:
            for n in range(stages):
                mbarrier_init(int32(smem + full_at + 8 * n), THREADS)
                mbarrier_init(int32(smem + empty_at + 8 * n), CONSUMERS)
            for n in range(RECORDS):
                mbarrier_init(int32(smem + posted_at + 8 * n), 1)
                mbarrier_init(int32(smem + taken_at + 8 * n), CONSUMERS)
            start_search(smem)
        cuda.syncthreads()
        c = scale
        if wrong_scale:
            c = mul_f32(scale, np.float32(1.25))
        r, i = int32(lane >> 2), int32(lane & 3)
        query = cuda.local.array(fragments, np.int32)
        s = cuda.local.array(scores, np.float32)
        o = cuda.local.array(outputs, np.float32)
        p = cuda.local.array(weights, np.int32)
        l_low = cuda.local.array(4, np.float32)
        l_high = cuda.local.array(4, np.float32)
        # The lane's places: as ldmatrix wants K's rows and halves, V's keys and columns.
        swizzle = int32(lane & 7)
        k_base = int32(((lane & 7) + ((lane >> 4) << 3)) * 128 + ((((lane >> 3) & 1) ^ swizzle) << 4))
        v_base = int32(((lane & 7) + (((lane >> 3) & 1) << 3)) * 128 + (((lane >> 4) ^ swizzle) << 4))
        mine = int64(state + int64(cuda.blockIdx.x) * block_state + thread * 16)
        if warp == 0:
            post(smem, cu, lens, counters, num_seqs, heads, group, int32(0), lane)
        stage, phase, ahead = int32(0), int32(0), int32(0)
        while True:
            own = int32(smem + own_at + 16 * warp)
            number = ld_shared_b32(int32(own + 8))
            slot = int32(number & (RECORDS - 1))
            record = int32(smem + record_at + 32 * slot)
            wait_posted(int32(smem + posted_at + 8 * slot), int32((number >> RECORD_SHIFT) & 1))
            if ld_shared_b32(record) < 0:
                break
            number = int32(number + 1)
            cuda.syncwarp()
            if lane == 0:
                st_shared_b32(int32(own + 8), number)
            head, row0 = ld_shared_b32(int32(record + 4)), ld_shared_b32(int32(record + 8))
            rows, token0 = ld_shared_b32(int32(record + 12)), ld_shared_b32(int32(record + 16))
            start = ld_shared_b32(int32(record + 20))
            # Keys that the first and last row see: of the block, of this warp, of this thread's rows. A
            # warp past the sequence's last row does as if it had that one, and sees nothing of its own.
            last = int32(min(int32(row0 + TILE_ROWS), rows) - 1)
            my_first = int32(row0 + warp * WARP_ROWS)
            my_last = int32(min(int32(my_first + (WARP_ROWS - 1)), last))
            least = int32(start + 1 + int32(uint32(row0) // uint32(group)))
            most = int32(start + 1 + int32(uint32(last) // uint32(group)))
            first_key = int32(0)
            if has_window:
                first_key = select_i32(int32(least > width), int32(least - width), 0)
            first_page = int32(first_key >> PAGE_SHIFT)
            next = int32(4 * (first_page >> 1) + (first_page & 1))
            next, ahead = fill(
                smem, k, v, table, record, heads, table_stride, first_key, most, thread, next, ahead,
                stage, phase,
            )  # fmt: skip
            if warp == 0:
                post(smem, cu, lens, counters, num_seqs, heads, group, number, lane)
            my_least = int32(start + 1 + int32(uint32(my_first) // uint32(group)))
            my_most = int32(start + 1 + int32(uint32(my_last) // uint32(group)))
            low_row = select_i32(int32(my_first + r < my_last), int32(my_first + r), my_last)
            high_row = select_i32(int32(my_first + r + 8 < my_last), int32(my_first + r + 8), my_last)
            low_token = int32(uint32(low_row) // uint32(group))
            high_token = int32(uint32(high_row) // uint32(group))
            low_head = int32(head * group + (low_row - low_token * group))
            high_head = int32(head * group + (high_row - high_token * group))
            low_at = int64(q + (int64(token0) + low_token) * q_stride + (low_head * row_bytes + i * 4))
            high_at = int64(q + (int64(token0) + high_token) * q_stride + (high_head * row_bytes + i * 4))
            for n in range(k_steps):
                query[4 * n] = ld_global_i32(int64(low_at + 32 * n))
                query[4 * n + 1] = ld_global_i32(int64(high_at + 32 * n))
                query[4 * n + 2] = ld_global_i32(int64(low_at + 32 * n + 16))
                query[4 * n + 3] = ld_global_i32(int64(high_at + 32 * n + 16))
            m_low, m_high = lowest, lowest
            for n in range(outputs):
                o[n] = zero
            for n in range(4):
                l_low[n] = zero
                l_high[n] = zero
            if my_first > last:
                my_most = int32(0)
            if lane == 0:
                st_shared_b32(own, my_least)
                st_shared_b32(int32(own + 4), my_most)
                st_shared_b32(int32(own + 12), most)
            cuda.syncwarp()
            tile = int32(first_key >> TILE_SHIFT)
            while int32(tile << TILE_SHIFT) < ld_shared_b32(int32(own + 12)):
                most = ld_shared_b32(int32(own + 12))
                my_least, my_most = ld_shared_b32(own), ld_shared_b32(int32(own + 4))
                there_first, there_second = halves_of(tile, least, most)
                my_half, my_other = halves_of(tile, my_least, my_most)
                next, ahead = fill(
                    smem, k, v, table, record, heads, table_stride, first_key, most, thread, next, ahead,
                    stage, phase,
                )  # fmt: skip
                if int32(my_half | my_other) == 0:
                    for _ in range(2):
                        if there_first != 0:
                            stage, phase = pass_by(smem, stage, phase, lane)
                            ahead = int32(ahead - 1)
                        if there_second != 0:
                            stage, phase = pass_by(smem, stage, phase, lane)
                            ahead = int32(ahead - 1)
                else:
                    if int32(tile & (split_tiles - 1)) == 0 and tile > first_seen(my_least):
                        # The split of the tile before this one has ended.
                        l_first, l_second = sums(l_low), sums(l_high)
                        if (
                            int32((tile >> split_shift) - 1) > int32(first_seen(my_least) >> split_shift)
                            and folds
                        ):
                            m_low, m_high, l_first, l_second = fold_into(
                                o, mine, m_low, m_high, l_first, l_second
                            )
                        keep(o, mine, m_low, m_high, l_first, l_second)
                        m_low, m_high = lowest, lowest
                        for n in range(4):
                            l_low[n] = zero
                            l_high[n] = zero
                        for n in range(outputs):
                            o[n] = zero
                    if there_first != 0:
                        wait_full(int32(smem + full_at + 8 * stage), int32(phase ^ wrong_phase))
                    pause(int32(3))
                    if my_half != 0:
                        score_first(s, query, int32(smem + chunk_at + stage * chunk_bytes), k_base)
                    else:
                        for n in range(scores // 2):
                            s[n] = lowest
                    if there_first != 0:
                        hand_back(int32(smem + empty_at + 8 * stage), lane)
                        stage, phase = following(stage, phase)
                        ahead = int32(ahead - 1)
                    if there_second != 0:
                        wait_full(int32(smem + full_at + 8 * stage), phase)
                    pause(int32(4))
                    if my_other != 0:
                        score_second(s, query, int32(smem + chunk_at + stage * chunk_bytes), k_base)
                    else:
                        for n in range(scores // 2):
                            s[scores // 2 + n] = lowest
                    if there_second != 0:
                        hand_back(int32(smem + empty_at + 8 * stage), lane)
                        stage, phase = following(stage, phase)
                        ahead = int32(ahead - 1)
                    key = int32(tile << TILE_SHIFT)
                    edge = int32(key + TILE) > my_least
                    if has_window:
                        edge = edge or key < int32(my_most - width)
                    if edge:
                        # Read anew: it need not be held until now.
                        position = ld_shared_b32(int32(record + 20))
                        row = int32(ld_shared_b32(int32(record + 8)) + warp * WARP_ROWS + r)
                        low = int32(position + 1 + int32(uint32(row) // uint32(group)))
                        high = int32(position + 1 + int32(uint32(row + 8) // uint32(group)))
                        hide(s, int32(key + 2 * i), low, high)
                    m_low, m_high, n_low, n_high, f_low, f_high = largest(s, m_low, m_high, c)
                    weigh(s, 0, TILE // 32, l_low, l_high, c, n_low, n_high, f_low, f_high)
                    pack_weights(s, p)
                    if ballot(int32(int32(f_low != one) | int32(f_high != one))) != 0:
                        rescale(o, f_low, f_high)  # times 1 changes nothing
                    next, ahead = fill(
                        smem, k, v, table, record, heads, table_stride, first_key, most, thread, next, ahead,
                        stage, phase,
                    )  # fmt: skip
                    if there_first != 0:
                        wait_full(int32(smem + full_at + 8 * stage), phase)
                        values = int32(smem + chunk_at + stage * chunk_bytes)
                        if early:
                            hand_back(int32(smem + empty_at + 8 * stage), lane)
                        pause(int32(5))
                        if my_half != 0:
                            add_first(o, p, values, v_base)
                        if not early and handed_back:
                            hand_back(int32(smem + empty_at + 8 * stage), lane)
                        stage, phase = following(stage, phase)
                        ahead = int32(ahead - 1)
                    if there_second != 0:
                        wait_full(int32(smem + full_at + 8 * stage), phase)
                        values = int32(smem + chunk_at + stage * chunk_bytes)
                        pause(int32(6))
                        if my_other != 0:
                            add_second(o, p, values, v_base)
                        hand_back(int32(smem + empty_at + 8 * stage), lane)
                        stage, phase = following(stage, phase)
                        ahead = int32(ahead - 1)
                tile = int32(tile + 1)
            last_low, last_high = sums(l_low), sums(l_high)
            my_least, my_most = ld_shared_b32(own), ld_shared_b32(int32(own + 4))
            last_split = int32(int32(my_most - 1) >> (TILE_SHIFT + split_shift))
            if last_split > int32(first_seen(my_least) >> split_shift) and folds:
                m_low, m_high, last_low, last_high = fold_into(o, mine, m_low, m_high, last_low, last_high)
            # Where the rows go is read anew: it need not be held until now.
            head, token0 = ld_shared_b32(int32(record + 4)), ld_shared_b32(int32(record + 16))
            row0, rows = ld_shared_b32(int32(record + 8)), ld_shared_b32(int32(record + 12))
            for half in range(2):
                row = int32(row0 + warp * WARP_ROWS + r + 8 * half)
                token = int32(uint32(row) // uint32(group))
                of_head = int32(head * group + (row - token * group))
                inside = int32(int32(row < row0 + TILE_ROWS) & int32(row < rows))
                to = int64(out + (int64(token0) + token) * out_stride + (of_head * row_bytes + i * 4))
                m, total = m_low, last_low
                if half == 1:
                    m, total = m_high, last_high
                inverse = select_f32(int32(total > zero), divide_f32(one, total), zero)
                for n in range(outputs // 4):
                    word = pack(
                        mul_f32(o[4 * n + 2 * half], inverse), mul_f32(o[4 * n + 2 * half + 1], inverse)
                    )
                    st_global_b32_if(inside, int64(to + 16 * n), word)
                if with_lse:
                    to = int64(lse + ((int64(token0) + token) * (int64(heads) * group) + of_head) * 4)
                    value = mul_f32(add_f32(m, lg2_f32(total)), ln2)
                    st_global_f32_if(int32(int32(i == 0) & inside), to, value)
            slot = int32(int32(ld_shared_b32(int32(own + 8)) - 1) & (RECORDS - 1))
            hand_back(int32(smem + taken_at + 8 * slot), lane)
        # Who leaves last sets the counters back, for the next launch.
        if thread == 0:
            if atom_add_i32(int64(counters + 4), 1) == cuda.gridDim.x - 1:
                st_global_b32(counters, 0)
                st_global_b32(int64(counters + 4), 0)

    return prefill_mma_kernel
