"""The four warps of the tensor-core decode kernel that add up values by the scorers' weights, and store what
comes of an item.

Knows: columns of o. Refuses to know: scores.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.attention_contract import LN2, TILE
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import (
    ADDERS,
    BOX_BYTES,
    WARP,
    Build,
    DecodeConfig,
    smem_plan,
)
from kernels_numba.ops.decode_attention.feed import make_read_record, make_stage_of, make_wait
from kernels_numba.ops.decode_attention.fold import make_row_of
from kernels_numba.ops.decode_attention.products import make_accumulate, make_read_by
from kernels_numba.ops.decode_attention.schedule import make_ranges, make_schedule
from kernels_numba.ptx.arith import add_f32, divide_f32, lg2_f32, mul_f32, select_f32
from kernels_numba.ptx.control import trap
from kernels_numba.ptx.debug import make_stress
from kernels_numba.ptx.fences import fence_proxy_async
from kernels_numba.ptx.ldst import ld_shared_f32
from kernels_numba.ptx.mbarrier import mbarrier_arrive
from kernels_numba.ptx.mma import pack_bf16, pack_f16
from kernels_numba.ptx.named_barrier import named_barrier_sync
from kernels_numba.ptx.predicated import st_global_b32_if, st_global_f32_if, st_shared_zero_16_if
from kernels_numba.ptx.relaxed import st_relaxed_v2_f32_if
from kernels_numba.ptx.vector import ld_shared_v4

MEMBERS = ADDERS * WARP
BARRIER = 3  # the adders' own: after a tile's unseen values are zeros


@cache
def make_add_up(
    config: DecodeConfig, dtype: str, window: int | None, with_lse: bool, build: Build, tokens: int
) -> Any:
    """f(smem, out, lse, partial, partial_ml, heads, group, out_stride, capacity, warp, lane): the warps'
    whole life; arguments as the kernel's, warp: 0 to 3.

    Warp w makes head_dim / 4 columns of o. What is one split goes straight to out; of several, each leaves
    its (m, l, o), which the finishers fold. V rows that are not seen are zeroed in shared memory (0 x NaN is
    NaN).
    """
    plan, head_dim, stages, chunk_bytes = (
        smem_plan(config),
        config.head_dim,
        config.stages,
        config.chunk_bytes,
    )
    chunk_at, weights_at, factor_at = plan.offset("chunk"), plan.offset("weights"), plan.offset("factor")
    sum_at, top_at, record_at = plan.offset("sum"), plan.offset("top"), plan.offset("record")
    full_at, empty_at = plan.offset("full"), plan.offset("empty")
    weighed_at, added_at = plan.offset("weighed"), plan.offset("added")
    posted_at, taken_at = plan.offset("posted"), plan.offset("taken")
    summed_at, stored_at = plan.offset("summed"), plan.offset("stored")
    by_tma, row_bytes, item = config.feed == "tma", head_dim * 2, 2
    voices = WARP if build.every_lane else 1  # lanes of a warp that arrive
    warp_columns, split_shift = head_dim // ADDERS, build.split.bit_length() - 1
    held = warp_columns // 2
    reach = None if window is None else window + tokens - 1
    first_key, _, _ = make_schedule(reach, build.split)
    first_of, _, _ = make_schedule(window, build.split)
    pages_of, tiles_of = make_ranges(reach, build.split)
    row_of, read_by, accumulate = (
        make_row_of(tokens),
        make_read_by(),
        make_accumulate(head_dim, dtype),
    )
    stage_of, pause, read_record = make_stage_of(stages), make_stress(build.stress), make_read_record()
    wait_full, wait_posted = make_wait("full", config, build), make_wait("posted", config, build)
    wait_weighed, wait_summed = make_wait("weighed", config, build), make_wait("summed", config, build)
    pack = pack_bf16 if dtype == "bfloat16" else pack_f16
    handed_back, cleaned = build.mutant != "lost_arrival", build.mutant != "stale_tail"
    zero, one, ln2 = np.float32(0), np.float32(1), np.float32(LN2)
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True)
    def add_up(
        smem: Any, out: Any, lse: Any, partial: Any, partial_ml: Any, heads: Any, group: Any,
        out_stride: Any, capacity: Any, warp: Any, lane: Any,
    ) -> None:  # fmt: skip
        r, i = int32(lane >> 2), int32(lane & 3)
        o = cuda.local.array(held, np.float32)
        four = cuda.local.array(4, np.float32)
        my_part = int32(warp >> 1)
        rows = int32(group * tokens)
        column = int32(warp * warp_columns + 2 * i)
        my_weights = int32(smem + weights_at + lane * 16)
        clean_at = int32(smem + chunk_at + (warp & 1) * 4096 + lane * 16)
        writer = int32(int32(warp == 0) & int32(i == 0))
        nothing = int32(group >> 16)
        stage, phase, slot, slot_phase = int32(0), int32(0), int32(0), int32(0)
        turn, turn_phase = int32(0), int32(0)
        working = True
        while working:
            wait_posted(int32(smem + posted_at + 8 * slot), slot_phase)
            seq, head, split, splits, base, length, first_row = read_record(
                int32(smem + record_at + 32 * slot), lane
            )
            if tokens == 1:
                first_row = int32(0)  # known when compiled: a register less
            working = seq >= 0
            loaded = int32(0)
            if working:
                for k in range(held):
                    o[k] = zero
                first = first_key(length)
                tile, tile_end = tiles_of(split, length)
                while tile < tile_end:
                    begin, end = pages_of(tile, length)
                    stage, phase = stage_of(stage, phase, int32(end - begin))  # behind the tile's keys
                    seen_from, seen_to = int32(first - tile * TILE), int32(length - tile * TILE)
                    edge = first_of(length) > tile * TILE or seen_to - (tokens - 1) < TILE
                    if edge and cleaned:
                        # The warp's 32 rows of the tile, four at a time: no two lanes meet in a bank.
                        if begin <= my_part and my_part < end:
                            mine, mine_phase = stage_of(stage, phase, int32(my_part - begin))
                            wait_full(int32(smem + full_at + 8 * mine), mine_phase)
                            for j in range(8):
                                key = int32(warp * 32 + 4 * j + (lane >> 3))
                                unseen = int32(int32(key < seen_from) | int32(key >= seen_to))
                                to = int32(clean_at + mine * chunk_bytes + j * 512)
                                for box in range(head_dim // 64):
                                    st_shared_zero_16_if(unseen, int32(to + box * BOX_BYTES))
                            if by_tma:
                                fence_proxy_async()  # the copy engine will write there next
                        named_barrier_sync(BARRIER, MEMBERS)
                    wait_weighed(int32(smem + weighed_at + 8 * turn), turn_phase)
                    pause(int32(7))
                    factors = int32(smem + factor_at + turn * 64 + r * 4)
                    f_low, f_high = ld_shared_f32(factors), ld_shared_f32(int32(factors + 32))
                    for k in range(held // 4):
                        o[4 * k], o[4 * k + 1] = mul_f32(o[4 * k], f_low), mul_f32(o[4 * k + 1], f_low)
                        o[4 * k + 2] = mul_f32(o[4 * k + 2], f_high)
                        o[4 * k + 3] = mul_f32(o[4 * k + 3], f_high)
                    part = begin
                    while part < end:
                        wait_full(int32(smem + full_at + 8 * stage), phase)
                        weights = int32(my_weights + turn * 4096 + part * 2048)
                        values = int32(smem + chunk_at + stage * chunk_bytes)
                        loaded = accumulate(o, weights, values, warp, lane)
                        cuda.syncwarp()
                        if lane < voices and handed_back:
                            mbarrier_arrive(read_by(int32(smem + empty_at + 8 * stage), loaded, nothing))
                        stage, phase = stage_of(stage, phase, 1)
                        part = int32(part + 1)
                    if lane < voices:
                        mbarrier_arrive(read_by(int32(smem + added_at + 8 * turn), loaded, nothing))
                    turn = int32(turn ^ 1)
                    turn_phase = int32(turn_phase ^ (turn ^ 1))
                    tile = int32(tile + 1)
                # The end of the split: groups of keys, which the four scorers hold.
                wait_summed(int32(smem + summed_at + 8 * slot), slot_phase)
                sums, tops = int32(smem + sum_at + slot * 256 + r * 16), int32(smem + top_at + slot * 64)
                ld_shared_v4(four, sums)
                l_low = add_f32(add_f32(four[0], four[1]), add_f32(four[2], four[3]))
                ld_shared_v4(four, int32(sums + 128))
                l_high = add_f32(add_f32(four[0], four[1]), add_f32(four[2], four[3]))
                m_low, m_high = ld_shared_f32(int32(tops + r * 4)), ld_shared_f32(int32(tops + r * 4 + 32))
                loaded = int32(int32(l_low == m_low) + int32(l_high == m_high))
                low_in, high_in = int32(first_row + r < rows), int32(first_row + r + 8 < rows)
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
                        low_lse = mul_f32(add_f32(m_low, lg2_f32(l_low)), ln2)
                        high_lse = mul_f32(add_f32(m_high, lg2_f32(l_high)), ln2)
                        at = int64((int64(seq) * tokens + low_token) * heads * group + first_head + low_head)
                        st_global_f32_if(int32(writer & low_in), int64(lse + at * 4), low_lse)
                        at = int64(
                            (int64(seq) * tokens + high_token) * heads * group + first_head + high_head
                        )
                        st_global_f32_if(int32(writer & high_in), int64(lse + at * 4), high_lse)
                else:
                    if base + splits > capacity:
                        trap()
                    index = int64(base * heads + head) + int64(split - (first >> split_shift)) * heads
                    row_at = int64(index * rows + first_row + r)
                    to = int64(partial + row_at * (head_dim * 4) + column * 4)
                    for k in range(held // 4):
                        st_relaxed_v2_f32_if(low_in, int64(to + 32 * k), o[4 * k], o[4 * k + 1])
                        high_to = int64(to + 32 * k + 8 * head_dim * 4)
                        st_relaxed_v2_f32_if(high_in, high_to, o[4 * k + 2], o[4 * k + 3])
                    to = int64(partial_ml + row_at * 8)
                    st_relaxed_v2_f32_if(int32(writer & low_in), to, m_low, l_low)
                    st_relaxed_v2_f32_if(int32(writer & high_in), int64(to + 64), m_high, l_high)
            cuda.syncwarp()
            if lane < voices:
                if working:
                    mbarrier_arrive(int32(smem + stored_at + 8 * slot))
                mbarrier_arrive(read_by(int32(smem + taken_at + 8 * slot), loaded, nothing))
            slot = int32(slot ^ 1)
            slot_phase = int32(slot_phase ^ (slot ^ 1))

    return add_up
