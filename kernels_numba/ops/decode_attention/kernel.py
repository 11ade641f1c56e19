"""Decode attention on tensor cores, over pages, in the order of attention_contract.py: one text, two ways to
feed it.

Knows: one warp-specialised kernel. Refuses to know how many sequences share it, in the strict sense: a row's
bits depend on its query, its keys and values, their positions and the window alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.attention_contract import LN2, TILE
from kernels_numba.attention_tile import LOWEST, make_group_max, make_group_weights, make_negated, make_quad
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import (
    BOX_BYTES,
    CONSUMERS,
    FINISHERS,
    PRODUCT,
    Build,
    DecodeConfig,
    smem_plan,
)
from kernels_numba.ops.decode_attention.feed import make_feed, make_read_record, make_stage_of, make_wait
from kernels_numba.ops.decode_attention.finisher import make_finish
from kernels_numba.ops.decode_attention.fold import make_row_of
from kernels_numba.ops.decode_attention.producer import make_produce
from kernels_numba.ops.decode_attention.products import make_score
from kernels_numba.ops.decode_attention.schedule import make_ranges, make_schedule
from kernels_numba.ptx.arith import (
    add_f32,
    divide_f32,
    ex2_f32,
    fma_f32,
    lg2_f32,
    max_f32,
    mul_f32,
    select_f32,
    select_i32,
)
from kernels_numba.ptx.control import dynamic_shared, griddep_launch, griddep_wait, trap, warp_uniform
from kernels_numba.ptx.debug import make_stress
from kernels_numba.ptx.fences import fence_proxy_async
from kernels_numba.ptx.ldst import ld_global_i32
from kernels_numba.ptx.matrix import ldmatrix_x4_trans
from kernels_numba.ptx.mbarrier import fence_mbarrier_init, mbarrier_arrive, mbarrier_init
from kernels_numba.ptx.mma import mma_m16n8k16_at, mma_m16n8k16_f16_at, pack_bf16, pack_f16
from kernels_numba.ptx.named_barrier import named_barrier_sync
from kernels_numba.ptx.predicated import (
    st_global_b32_if,
    st_global_f32_if,
    st_global_v2_f32_if,
    st_shared_f32_if,
    st_shared_zero_16_if,
)
from kernels_numba.ptx.vector import ld_shared_v4, st_shared_v4

SIGNATURE = f"void({', '.join(['int64'] * 11 + ['int32'] * 7 + ['float32'])})"


def make_decode_kernel(
    config: DecodeConfig, dtype: str, window: int | None = None, with_lse: bool = False,
    build: Build = PRODUCT, tokens: int = 1,
) -> Any:  # fmt: skip
    """out[b T + i, h] = softmax(softmax_scale q[b T + i, h] k^T) v over the keys of sequence b that token i
    of its last T = tokens (1 to 8) sees: all but the T - 1 - i newest, with a window the last of those.

    Arguments: addresses of: tensor maps u64[2, 16] of the K and V cache as matrices of rows of head_dim,
    boxes of 64 x 64 (fed by TMA); k_cache, v_cache T[num_blocks, num_kv_heads, 64, D] (fed by cp.async); q
    and out T[num_seqs T, num_q_heads, D]; lse f32[num_seqs T, num_q_heads] (with_lse); context_lens
    i32[num_seqs]; block_table i32[num_seqs, ..]; partial o f32[capacity, num_kv_heads, group, D] and (m, l)
    f32[capacity, num_kv_heads, group, 2]; counters i32[2 + num_seqs num_kv_heads], all 0, and 0 again at the
    end. Then num_seqs, num_kv_heads, group, bytes from one row to the next of q and of out, entries from one
    row to the next of block_table, capacity; c (attention_contract.py).
    Who does what: warp 4 takes items (schedule.py), tells the others which, and loads their pages, K then V
    of each tile of 128 keys, page by page (producer.py). Of a tile warp w < 4 scores keys 32 w on for the
    group's rows (16, those past the group are zeros), and after the weights have been exchanged makes
    head_dim / 4 columns of o. What is one split goes straight to out; of several, each leaves its (m, l, o),
    and warps 5 to 7 of the block that was last fold them (finisher.py).
    Shared memory: smem_plan(config). Chunks lie as the 128-byte swizzle puts them, 64 columns at a time.
    Barriers: full[s] hands a loaded page to the consumers, empty[s] hands it back (one arrival a warp);
    posted[r] hands an item to consumers and finishers, taken[r] back, stored[r] its stored result to the
    finishers. Named barrier 1 is the consumers' own: after the maxima, after the weights, after the sums. The
    weights are overwritten only after the barrier of the next maxima, which everybody reaches after reading
    them. V rows that are not seen are zeroed in shared memory (0 x NaN is NaN), scores of K's by selection.
    Pages in which nothing is seen, and table entries of such, are never read.
    Dependent launches: context_lens, block_table and all keys and values but each sequence's newest, one a
    query token, may be read before the launches before this one have ended, so those must not write them: a
    step's are written by copies and by earlier steps.
    """
    head_dim, stages, chunk_bytes = config.head_dim, config.stages, config.chunk_bytes
    plan = smem_plan(config)
    chunk_at, weights_at = plan.offset("chunk"), plan.offset("weights")
    max_at, sum_at, record_at = plan.offset("max"), plan.offset("sum"), plan.offset("record")
    posted_at, taken_at, stored_at = plan.offset("posted"), plan.offset("taken"), plan.offset("stored")
    full_at, empty_at = plan.offset("full"), plan.offset("empty")
    by_tma = config.feed == "tma"
    pdl = by_tma and build.pdl
    k_steps, fragments = head_dim // 16, head_dim // 4
    warp_columns = head_dim // CONSUMERS
    pairs = warp_columns // 16  # of 8 columns of o each
    held = warp_columns // 2
    row_bytes, item, split_shift = head_dim * 2, 2, build.split.bit_length() - 1
    # Of o's columns: which box a warp's are in, and from which unit on.
    units, box_shift = warp_columns // 8, (64 // warp_columns).bit_length() - 1
    reach = None if window is None else window + tokens - 1  # of all of a sequence's rows
    first_key, _, _ = make_schedule(reach, build.split)
    first_of, _, _ = make_schedule(window, build.split)
    pages_of, tiles_of = make_ranges(reach, build.split)
    row_of = make_row_of(tokens)
    _, full_arrivals = make_feed(config)
    stage_of, pause, read_record = make_stage_of(stages), make_stress(build.stress), make_read_record()
    produce, finish = (
        make_produce(config, reach, build, tokens),
        make_finish(config, dtype, with_lse, build, tokens),
    )
    wait_full, wait_posted = make_wait("full", config, build), make_wait("posted", config, build)
    multiply = mma_m16n8k16_at if dtype == "bfloat16" else mma_m16n8k16_f16_at
    pack = pack_bf16 if dtype == "bfloat16" else pack_f16
    quad_max, quad_sum = make_quad()
    group_max, group_weights = make_group_max(), make_group_weights(dtype)
    negated, score = make_negated(), make_score(head_dim, dtype)
    wrong_phase, handed_back = int(build.mutant == "wrong_phase"), build.mutant != "lost_arrival"
    cleaned, too_many = build.mutant != "stale_tail", int(build.mutant == "mask")
    scaled = np.float32(1.25 if build.mutant == "scale" else 1)
    lowest, zero, one, ln2 = np.float32(LOWEST), np.float32(0), np.float32(1), np.float32(LN2)
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def read_by(bar: Any, loaded: Any, nothing: Any) -> Any:
        """The address `bar`, but not before `loaded` is there; nothing: 0, which no compiler can know.

        An arrival does not wait for loads that are still under way, and the copy engine may then overwrite
        what they were to read: seen on an H100, where a neighbour's stores keep shared memory busy for longer
        than a page takes to come from L2. loaded: of the products, for the assembler changes the loads'
        order."""
        return int32(bar + int32(loaded & nothing))

    @jit(device=True, forceinline=True)
    def accumulate(o: Any, weights: Any, values: Any, line: Any, unit: Any, swizzle: Any) -> Any:
        """o += P V over a page's 64 keys; weights: the lane's place in P, values: the page's, the warp's
        box. Returns what no one knows before all products, and so all loads, have ended (read_by)."""
        a = cuda.local.array(4, np.int32)
        b = cuda.local.array(4, np.int32)
        for step in range(4):
            ld_shared_v4(a, int32(weights + 512 * step))
            for pair in range(pairs):
                at = int32(values + step * 2048 + line + (((unit + 2 * pair) ^ swizzle) << 4))
                ldmatrix_x4_trans(b, at)
                multiply(o, 8 * pair, a, 0, b, 0)
                multiply(o, 8 * pair + 4, a, 0, b, 2)
        loaded = int32(0)
        for pair in range(pairs):
            loaded = int32(loaded + int32(o[8 * pair] == o[8 * pair + 4]))
        return loaded

    @jit(device=True)
    def consume(
        smem: Any, q: Any, out: Any, lse: Any, partial: Any, partial_ml: Any, heads: Any,
        group: Any, q_stride: Any, out_stride: Any, capacity: Any, c: Any, warp: Any, lane: Any,
    ) -> None:  # fmt: skip
        """The four consumer warps: every item that is posted, until one says that there are no more."""
        r, i = int32(lane >> 2), int32(lane & 3)
        query = cuda.local.array(fragments, np.int32)
        s = cuda.local.array(16, np.float32)
        o = cuda.local.array(held, np.float32)
        p = cuda.local.array(8, np.int32)
        words = cuda.local.array(4, np.int32)
        four = cuda.local.array(4, np.float32)
        # The lane's places: as ldmatrix wants V's keys and columns.
        swizzle = int32(lane & 7)
        my_part = int32(warp >> 1)
        k_rows = int32((warp & 1) * 4096)
        v_line = int32(((lane & 7) + (((lane >> 3) & 1) << 3)) * 128)
        v_box = int32((warp >> box_shift) * BOX_BYTES)
        v_unit = int32((warp & ((1 << box_shift) - 1)) * units + (lane >> 4))
        rows = int32(group * tokens)
        my_weights = int32(smem + weights_at + lane * 16)
        clean_at = int32(smem + chunk_at + (warp & 1) * 4096 + lane * 16)
        nothing = int32(group >> 16)
        stage, phase, slot, slot_phase = int32(0), int32(0), int32(0), int32(0)
        working = True
        while working:
            wait_posted(int32(smem + posted_at + 8 * slot), slot_phase)
            seq, head, split, splits, base, length, first_row = read_record(
                int32(smem + record_at + 32 * slot), lane
            )
            if tokens == 1:
                first_row = int32(0)  # known when compiled: a register less
            if lane == 0:
                mbarrier_arrive(int32(smem + taken_at + 8 * slot))
            mine_slot = slot
            slot = int32(slot ^ 1)
            slot_phase = int32(slot_phase ^ (slot ^ 1))
            working = seq >= 0
            if working:
                # Rows past the last have the last one's place, and are zeros.
                low_in, high_in = int32(first_row + r < rows), int32(first_row + r + 8 < rows)
                row = select_i32(low_in, int32(first_row + r), int32(rows - 1))
                low_token, row = row_of(row, group)
                at = int64(q + (int64(seq) * tokens + low_token) * q_stride + i * 4)
                at = int64(at + (int64(head) * group + row) * row_bytes)
                row = select_i32(high_in, int32(first_row + r + 8), int32(rows - 1))
                high_token, row = row_of(row, group)
                high_at = int64(q + (int64(seq) * tokens + high_token) * q_stride + i * 4)
                high_at = int64(high_at + (int64(head) * group + row) * row_bytes)
                # What a row sees: all but the tokens after its own.
                low_length = int32(length - (tokens - 1) + low_token)
                high_length = int32(length - (tokens - 1) + high_token)
                for k in range(k_steps):
                    query[4 * k] = ld_global_i32(int64(at + 32 * k))
                    query[4 * k + 1] = ld_global_i32(int64(high_at + 32 * k))
                    query[4 * k + 2] = ld_global_i32(int64(at + 32 * k + 16))
                    query[4 * k + 3] = ld_global_i32(int64(high_at + 32 * k + 16))
                for k in range(fragments // 2):
                    query[2 * k] = select_i32(low_in, query[2 * k], 0)
                    query[2 * k + 1] = select_i32(high_in, query[2 * k + 1], 0)
                for k in range(held):
                    o[k] = zero
                m_low, m_high, l_low, l_high = lowest, lowest, zero, zero
                first = first_key(length)
                tile, tile_end = tiles_of(split, length)
                while tile < tile_end:
                    begin, end = pages_of(tile, length)
                    count = int32(end - begin)
                    seen_from, seen_to = int32(first - tile * TILE), int32(length - tile * TILE)
                    edge = first_of(length) > tile * TILE or seen_to - (tokens - 1) < TILE
                    loaded = int32(0)
                    if begin <= my_part and my_part < end:
                        mine, mine_phase = stage_of(stage, phase, int32(my_part - begin))
                        wait_full(int32(smem + full_at + 8 * mine), int32(mine_phase ^ wrong_phase))
                        pause(int32(3))
                        keys = int32(smem + chunk_at + mine * chunk_bytes + k_rows)
                        loaded = score(s, 0, query, keys, lane)
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
                    cuda.syncwarp()
                    if lane == 0:
                        for part in range(2):
                            if part < count:
                                freed, _ = stage_of(stage, phase, int32(part))
                                mbarrier_arrive(read_by(int32(smem + empty_at + 8 * freed), loaded, nothing))
                    top_low, top_high = group_max(s, 0)
                    top_low, top_high = quad_max(top_low), quad_max(top_high)
                    st_shared_f32_if(int32(i == 0), int32(smem + max_at + r * 16 + warp * 4), top_low)
                    st_shared_f32_if(int32(i == 0), int32(smem + max_at + 128 + r * 16 + warp * 4), top_high)
                    pause(int32(4))
                    named_barrier_sync(1, CONSUMERS * 32)
                    ld_shared_v4(four, int32(smem + max_at + r * 16))
                    top_low = max_f32(max_f32(four[0], four[1]), max_f32(four[2], four[3]))
                    ld_shared_v4(four, int32(smem + max_at + 128 + r * 16))
                    top_high = max_f32(max_f32(four[0], four[1]), max_f32(four[2], four[3]))
                    new_low, new_high = (
                        max_f32(m_low, mul_f32(top_low, c)),
                        max_f32(m_high, mul_f32(top_high, c)),
                    )
                    n_low, n_high = negated(new_low), negated(new_high)
                    f_low, f_high = ex2_f32(add_f32(m_low, n_low)), ex2_f32(add_f32(m_high, n_high))
                    m_low, m_high = new_low, new_high
                    t_low, t_high = group_weights(s, 0, p, 0, c, n_low, n_high)
                    l_low, l_high = fma_f32(l_low, f_low, t_low), fma_f32(l_high, f_high, t_high)
                    for step in range(2):
                        for j in range(4):
                            words[j] = p[4 * step + j]
                        st_shared_v4(int32(my_weights + (2 * warp + step) * 512), words)
                    v_stage, v_phase = stage_of(stage, phase, count)
                    if edge and cleaned:
                        # The warp's 32 rows of the tile, four at a time: no two lanes meet in a bank.
                        if begin <= my_part and my_part < end:
                            mine, mine_phase = stage_of(v_stage, v_phase, int32(my_part - begin))
                            wait_full(int32(smem + full_at + 8 * mine), mine_phase)
                            for j in range(8):
                                key = int32(warp * 32 + 4 * j + (lane >> 3))
                                unseen = int32(int32(key < seen_from) | int32(key >= seen_to))
                                to = int32(clean_at + mine * chunk_bytes + j * 512)
                                for box in range(head_dim // 64):
                                    st_shared_zero_16_if(unseen, int32(to + box * BOX_BYTES))
                            if by_tma:
                                fence_proxy_async()  # the copy engine will write there next
                    pause(int32(5))
                    named_barrier_sync(1, CONSUMERS * 32)
                    for k in range(held // 4):
                        o[4 * k], o[4 * k + 1] = mul_f32(o[4 * k], f_low), mul_f32(o[4 * k + 1], f_low)
                        o[4 * k + 2], o[4 * k + 3] = (
                            mul_f32(o[4 * k + 2], f_high),
                            mul_f32(o[4 * k + 3], f_high),
                        )
                    part = begin
                    while part < end:
                        wait_full(int32(smem + full_at + 8 * v_stage), v_phase)
                        values = int32(smem + chunk_at + v_stage * chunk_bytes + v_box)
                        loaded = accumulate(
                            o, int32(my_weights + part * 2048), values, v_line, v_unit, swizzle
                        )
                        cuda.syncwarp()
                        if lane == 0 and handed_back:
                            mbarrier_arrive(read_by(int32(smem + empty_at + 8 * v_stage), loaded, nothing))
                        v_stage, v_phase = stage_of(v_stage, v_phase, 1)
                        part = int32(part + 1)
                    stage, phase = v_stage, v_phase
                    tile = int32(tile + 1)
                # The end of the split: quads, then groups of keys, which the four warps hold. Two places in
                # turn: behind an item without keys nobody has waited since the last sums were read.
                sums = int32(smem + sum_at + slot * 256 + r * 16)
                l_low, l_high = quad_sum(l_low), quad_sum(l_high)
                st_shared_f32_if(int32(i == 0), int32(sums + warp * 4), l_low)
                st_shared_f32_if(int32(i == 0), int32(sums + 128 + warp * 4), l_high)
                named_barrier_sync(1, CONSUMERS * 32)
                ld_shared_v4(four, sums)
                l_low = add_f32(add_f32(four[0], four[1]), add_f32(four[2], four[3]))
                ld_shared_v4(four, int32(sums + 128))
                l_high = add_f32(add_f32(four[0], four[1]), add_f32(four[2], four[3]))
                column = int32(warp * warp_columns + 2 * i)
                low_token, low_head = row_of(int32(first_row + r), group)
                high_token, high_head = row_of(int32(first_row + r + 8), group)
                first_head = int64(int64(head) * group)
                if splits == 1:
                    low_inverse = select_f32(int32(l_low > zero), divide_f32(one, l_low), zero)
                    high_inverse = select_f32(int32(l_high > zero), divide_f32(one, l_high), zero)
                    to = int64(out + (int64(seq) * tokens + low_token) * out_stride + column * item)
                    to = int64(to + (first_head + low_head) * row_bytes)
                    high_to = int64(out + (int64(seq) * tokens + high_token) * out_stride + column * item)
                    high_to = int64(high_to + (first_head + high_head) * row_bytes)
                    for k in range(held // 4):
                        pair = pack(mul_f32(o[4 * k], low_inverse), mul_f32(o[4 * k + 1], low_inverse))
                        st_global_b32_if(low_in, int64(to + 16 * k), pair)
                        pair = pack(mul_f32(o[4 * k + 2], high_inverse), mul_f32(o[4 * k + 3], high_inverse))
                        st_global_b32_if(high_in, int64(high_to + 16 * k), pair)
                    if with_lse:
                        writer = int32(int32(warp == 0) & int32(i == 0))
                        low_lse = mul_f32(add_f32(m_low, lg2_f32(l_low)), ln2)
                        high_lse = mul_f32(add_f32(m_high, lg2_f32(l_high)), ln2)
                        at = int64((int64(seq) * tokens + low_token) * heads * group + first_head + low_head)
                        to = int64(lse + at * 4)
                        st_global_f32_if(int32(writer & low_in), to, low_lse)
                        at = int64(
                            (int64(seq) * tokens + high_token) * heads * group + first_head + high_head
                        )
                        to = int64(lse + at * 4)
                        st_global_f32_if(int32(writer & high_in), to, high_lse)
                else:
                    if base + splits > capacity:
                        trap()
                    first_slot = int32(base * heads + head)
                    index = int64(first_slot) + int64(split - (first >> split_shift)) * heads
                    to = int64(partial + (index * rows + first_row + r) * (head_dim * 4) + column * 4)
                    for k in range(held // 4):
                        st_global_v2_f32_if(low_in, int64(to + 32 * k), o[4 * k], o[4 * k + 1])
                        high_to = int64(to + 32 * k + 8 * head_dim * 4)
                        st_global_v2_f32_if(high_in, high_to, o[4 * k + 2], o[4 * k + 3])
                    writer = int32(int32(warp == 0) & int32(i == 0))
                    to = int64(partial_ml + (index * rows + first_row + r) * 8)
                    st_global_v2_f32_if(int32(writer & low_in), to, m_low, l_low)
                    st_global_v2_f32_if(int32(writer & high_in), int64(to + 64), m_high, l_high)
                cuda.syncwarp()
                if lane == 0:
                    mbarrier_arrive(int32(smem + stored_at + 8 * mine_slot))

    def decode_kernel(
        maps: Any, k_cache: Any, v_cache: Any, q: Any, out: Any, lse: Any, lens: Any, table: Any,
        partial: Any, partial_ml: Any, counters: Any, num_seqs: Any, heads: Any, group: Any, q_stride: Any,
        out_stride: Any, table_stride: Any, capacity: Any, c: Any,
    ) -> None:  # fmt: skip
        if pdl:
            griddep_launch()
        smem = int32(dynamic_shared())
        thread = int32(cuda.threadIdx.x)
        warp = int32(warp_uniform(int32(thread >> 5)))
        lane = int32(thread & 31)
        if thread == 0:
            for i in range(stages):
                mbarrier_init(int32(smem + full_at + 8 * i), full_arrivals)
                mbarrier_init(int32(smem + empty_at + 8 * i), CONSUMERS)
            for i in range(2):
                mbarrier_init(int32(smem + posted_at + 8 * i), 1)
                mbarrier_init(int32(smem + taken_at + 8 * i), CONSUMERS + FINISHERS)
                mbarrier_init(int32(smem + stored_at + 8 * i), CONSUMERS)
            if by_tma:
                fence_mbarrier_init()
        cuda.syncthreads()
        if warp == CONSUMERS:
            produce(
                smem,
                maps,
                k_cache,
                v_cache,
                lens,
                table,
                counters,
                num_seqs,
                heads,
                group,
                table_stride,
                lane,
            )
        else:
            if pdl:
                griddep_wait()
            if warp < CONSUMERS:
                consume(
                    smem, q, out, lse, partial, partial_ml, heads, group, q_stride, out_stride, capacity,
                    mul_f32(c, scaled), warp, lane,
                )  # fmt: skip
            else:
                own = int32(thread - (CONSUMERS + 1) * 32)
                finish(smem, out, lse, partial, partial_ml, counters, heads, group, out_stride, own)

    return decode_kernel
