"""Decode attention of few sequences: the blocks of a cluster share a split, and the bits stay the contract's.

In attention_contract.py the tiles of a split follow each other twice only: in the running maximum, which
takes any order, and where a tile's P V is added to o. So keys are divided by tiles, values by columns, and
every byte is read by one block. A split that one block reads takes about 0.8 us a tile (512 KB at what an SM
can read); here all of it is asked for at once, by 64 KB a block. What stays in turn is 64 tensor-core steps
of o, about 1.2 us.
Knows: one item of a cluster after another. Refuses to know: windows, several query tokens, what kernel.py
refuses to.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.attention_contract import LN2, SPLIT, TILE
from kernels_numba.attention_tile import LOWEST, make_group_max, make_group_weights, make_negated, make_quad
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import (
    BLOCK_SIZE,
    BOX_BYTES,
    BOX_COLUMNS,
    CLUSTER_COLUMNS,
    CLUSTER_THREADS,
    ROWS,
    SPLIT_TILES,
    WARP,
    Build,
    ClusterConfig,
    cluster_plan,
)
from kernels_numba.ops.decode_attention.feed import PAGE_SHIFT, make_own_page
from kernels_numba.ops.decode_attention.fold import make_fold
from kernels_numba.ops.decode_attention.products import make_add_values, make_score
from kernels_numba.ops.decode_attention.schedule import make_class_of, make_ranges, make_schedule
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
from kernels_numba.ptx.atomics import atom_add_acq_rel_i32
from kernels_numba.ptx.cluster import (
    cluster_address,
    cluster_arrive_relaxed,
    cluster_rank,
    cluster_wait,
)
from kernels_numba.ptx.control import dynamic_shared, griddep_launch, griddep_wait, trap, warp_uniform
from kernels_numba.ptx.debug import make_mbarrier_wait, make_stress
from kernels_numba.ptx.distributed import ld_shared_f32, st_async_f32, st_async_v2_f32, st_async_v4
from kernels_numba.ptx.fences import fence_proxy_async
from kernels_numba.ptx.ldst import ld_global_i32, ld_shared_b32, st_global_b32, st_shared_b32
from kernels_numba.ptx.mbarrier import (
    fence_mbarrier_init,
    mbarrier_arrive,
    mbarrier_expect_tx,
    mbarrier_init,
)
from kernels_numba.ptx.mma import pack_bf16, pack_f16
from kernels_numba.ptx.named_barrier import named_barrier_sync
from kernels_numba.ptx.predicated import (
    st_global_b32_if,
    st_global_f32_if,
    st_global_v2_f32_if,
    st_shared_f32_if,
    st_shared_zero_16_if,
)
from kernels_numba.ptx.shuffle import shfl_idx_i32
from kernels_numba.ptx.tma import tma_load_2d, tma_prefetch_map
from kernels_numba.ptx.vector import ld_shared_v4

TOP_BYTES = ROWS * SPLIT_TILES * 4
TILE_WEIGHTS = CLUSTER_THREADS * 40  # bytes of a tile's weights and parts of sums
PAGE_VALUES = BLOCK_SIZE * CLUSTER_COLUMNS * 2  # bytes of a page's V of one block


def make_cluster_kernel(config: ClusterConfig, dtype: str, with_lse: bool, build: Build) -> Any:
    """kernel.make_decode_kernel's arguments and results, for one token a sequence and no window; the tensor
    map of V has boxes of 64 x 16, not swizzled.

    A cluster takes the items cluster, cluster + clusters, ..; an item is as in schedule.py. Of its split a
    block loads the keys of its own tiles (rank x own_tiles on) and CLUSTER_COLUMNS columns of all values,
    scores its tiles, and gives everybody their maxima; so all know every tile's running maximum. Then it
    gives everybody its tiles' rounded weights and sums of weights, and makes its columns of o.
    Barriers: keys_full, values_full and weights_full, one a tile, and top_full, end on bytes that come from
    the copy engine or from other blocks' st.async. Nobody overwrites what another may still read: weights of
    the next item are sent after all have sent its maxima, and so are done with this item's weights; maxima
    have two places in turn, for they are sent when the sender has all weights, and who has no tile sends
    none.
    A sequence of several splits is folded by the block that leaves the last of its results.
    """
    own, blocks, chunk_bytes = config.own_tiles, config.blocks, config.chunk_bytes
    block_shift, head_dim, row_bytes = blocks.bit_length() - 1, config.head_dim, config.head_dim * 2
    boxes, k_steps, fragments = head_dim // BOX_COLUMNS, head_dim // 16, head_dim // 4
    scores, packed = 16 * own, 8 * own
    plan = cluster_plan(config)
    keys_at, values_at, weights_at = plan.offset("keys"), plan.offset("values"), plan.offset("weights")
    parts_at, top_at, factor_at = plan.offset("parts"), plan.offset("top"), plan.offset("factor")
    warp_top_at, sum_at, last_at = plan.offset("warp_top"), plan.offset("sum"), plan.offset("last")
    keys_full_at, values_full_at = plan.offset("keys_full"), plan.offset("values_full")
    weights_full_at, top_full_at = plan.offset("weights_full"), plan.offset("top_full")
    _, count_units, locate = make_schedule(None)
    _, tiles_of = make_ranges(None)
    class_of, own_page = make_class_of(), make_own_page(None, SPLIT)
    score, add_values = make_score(head_dim, dtype), make_add_values(dtype)
    fold = make_fold(head_dim, dtype, with_lse, 1, CLUSTER_THREADS)
    wait_keys = make_mbarrier_wait("keys_full", build.debug)
    wait_values = make_mbarrier_wait("values_full", build.debug)
    wait_top = make_mbarrier_wait("top_full", build.debug)
    wait_weights = make_mbarrier_wait("weights_full", build.debug)
    pause, pdl = make_stress(build.stress), build.pdl
    pack = pack_bf16 if dtype == "bfloat16" else pack_f16
    quad_max, quad_sum = make_quad()
    group_max, group_weights, negated = make_group_max(), make_group_weights(dtype), make_negated()
    lowest, zero, one, ln2 = np.float32(LOWEST), np.float32(0), np.float32(1), np.float32(LN2)
    int32, int64, uint32 = cuda.types.int32, cuda.types.int64, cuda.types.uint32

    @jit(device=True)
    def load(
        smem: Any, maps: Any, page: Any, heads: Any, head: Any, rank: Any, pages: Any, newest: Any, lane: Any
    ) -> None:  # fmt: skip
        """One warp asks for the block's part of a split; page: each lane's; newest: the split's page that the
        launch before may have written, or one past the last."""
        waited = not pdl
        for j in range(own):
            tile = int32(rank * own + j)
            have = max(int32(0), min(int32(2), int32(pages - 2 * tile)))
            full = int32(smem + keys_full_at + 8 * j)
            if lane == 0:
                if have == 0:
                    mbarrier_arrive(full)  # nothing comes: the phase ends all the same
                else:
                    mbarrier_expect_tx(full, int32(have * chunk_bytes))
            part = int32(0)
            while part < have:
                place = int32(2 * tile + part)
                if not waited and place == newest:
                    griddep_wait()
                    waited = True
                row = int32((shfl_idx_i32(page, place) * heads + head) * BLOCK_SIZE)
                to = int32(smem + keys_at + (2 * j + part) * chunk_bytes)
                if lane == 0:
                    for box in range(boxes):
                        column = int32(box * BOX_COLUMNS)
                        tma_load_2d(int32(to + box * BOX_BYTES), maps, full, column, row)
                part = int32(part + 1)
        tile = int32(0)
        while tile < SPLIT_TILES:
            have = max(int32(0), min(int32(2), int32(pages - 2 * tile)))
            full = int32(smem + values_full_at + 8 * tile)
            if lane == 0:
                if have == 0:
                    mbarrier_arrive(full)
                else:
                    mbarrier_expect_tx(full, int32(have * PAGE_VALUES))
            part = int32(0)
            while part < have:
                place = int32(2 * tile + part)
                if not waited and place == newest:
                    griddep_wait()
                    waited = True
                row = int32((shfl_idx_i32(page, place) * heads + head) * BLOCK_SIZE)
                to = int32(smem + values_at + place * PAGE_VALUES)
                if lane == 0:
                    tma_load_2d(to, int64(maps + 128), full, int32(rank * CLUSTER_COLUMNS), row)
                part = int32(part + 1)
            tile = int32(tile + 1)

    @jit(device=True, forceinline=True)
    def read_query(query: Any, q: Any, group: Any, r: Any, i: Any) -> None:
        """query: A fragments of the head's 16 rows, zeros past the group; q: of its first row."""
        low_in, high_in = int32(r < group), int32(r + 8 < group)
        low = int64(q + int64(select_i32(low_in, r, int32(group - 1))) * row_bytes + i * 4)
        high = int64(q + int64(select_i32(high_in, int32(r + 8), int32(group - 1))) * row_bytes + i * 4)
        for k in range(k_steps):
            query[4 * k] = ld_global_i32(int64(low + 32 * k))
            query[4 * k + 1] = ld_global_i32(int64(high + 32 * k))
            query[4 * k + 2] = ld_global_i32(int64(low + 32 * k + 16))
            query[4 * k + 3] = ld_global_i32(int64(high + 32 * k + 16))
        for k in range(fragments // 2):
            query[2 * k] = select_i32(low_in, query[2 * k], 0)
            query[2 * k + 1] = select_i32(high_in, query[2 * k + 1], 0)

    def cluster_kernel(
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
        r, i = int32(lane >> 2), int32(lane & 3)
        factors = int32(smem + factor_at + warp * 512 + r * 4)  # each warp has its own
        rank = int32(cluster_rank())
        query = cuda.local.array(fragments, np.int32)
        s = cuda.local.array(scores, np.float32)
        p = cuda.local.array(packed, np.int32)
        o = cuda.local.array(8, np.float32)
        four = cuda.local.array(4, np.float32)
        top_low = cuda.local.array(SPLIT_TILES, np.float32)
        top_high = cuda.local.array(SPLIT_TILES, np.float32)
        n_low = cuda.local.array(own, np.float32)
        n_high = cuda.local.array(own, np.float32)
        words = cuda.local.array(4, np.int32)
        if thread == 0:
            tma_prefetch_map(maps)
            tma_prefetch_map(int64(maps + 128))
            for j in range(own):
                mbarrier_init(int32(smem + keys_full_at + 8 * j), 1)
            for j in range(SPLIT_TILES):
                mbarrier_init(int32(smem + values_full_at + 8 * j), 1)
                mbarrier_init(int32(smem + weights_full_at + 8 * j), 1)
            for j in range(2):
                mbarrier_init(int32(smem + top_full_at + 8 * j), 1)
            fence_mbarrier_init()
        cuda.syncthreads()
        cluster_arrive_relaxed()
        e0, e1, e2, e3, e4 = count_units(lens, num_seqs, lane)
        cluster_wait()  # all blocks of the cluster run: their shared memory may be written
        number, clusters = int32(cuda.blockIdx.x >> block_shift), int32(cuda.gridDim.x >> block_shift)
        phase, turn = int32(0), int32(0)
        while number < e4 * heads:
            unit = int32(uint32(number) // uint32(heads))
            head = int32(number - unit * heads)
            kind, first_unit = class_of(unit, e0, e1, e2, e3)
            seq, split, splits, base, length, _, _, _ = locate(
                lens, num_seqs, lane, int32(unit - first_unit), kind, int32(0), int32(0), int32(0)
            )
            first_tile, tile_end = tiles_of(split, length)
            tiles = int32(tile_end - first_tile)
            tops, top_full = int32(smem + top_at + turn * TOP_BYTES), int32(smem + top_full_at + 8 * turn)
            if thread == WARP:  # not of the warp that loads
                mbarrier_expect_tx(top_full, TOP_BYTES)
                for j in range(SPLIT_TILES):
                    mbarrier_expect_tx(
                        int32(smem + weights_full_at + 8 * j), select_i32(int32(j < tiles), TILE_WEIGHTS, 0)
                    )
            if warp == 0:
                page = own_page(table, table_stride, seq, split, length, lane)
                pages = int32((length + (BLOCK_SIZE - 1)) >> PAGE_SHIFT)
                newest = int32(pages - 1 - first_tile * 2)
                pages = int32(min(int32(pages - first_tile * 2), int32(2 * SPLIT_TILES)))
                load(smem, maps, page, heads, head, rank, pages, newest, lane)
            if pdl:
                griddep_wait()
            first_row = int64(q + int64(seq) * q_stride + int64(head) * group * row_bytes)
            read_query(query, first_row, group, r, i)
            pause(int32(1))
            # Scores of the block's own tiles, and every row's largest.
            for j in range(own):
                tile = int32(rank * own + j)
                wait_keys(int32(smem + keys_full_at + 8 * j), int32(phase & 1))
                cuda.syncwarp()
                if tile < tiles:
                    keys = int32(smem + keys_at + 2 * j * chunk_bytes + (warp >> 1) * chunk_bytes)
                    score(s, 16 * j, query, int32(keys + (warp & 1) * 4096), lane)
                    seen_to = int32(length - (first_tile + tile) * TILE)
                    key = int32(warp * 32 + 2 * i)
                    for k in range(16):
                        seen = int32(key + (k >> 2) * 8 + (k & 1) < seen_to)
                        s[16 * j + k] = select_f32(seen, s[16 * j + k], lowest)
                else:
                    for k in range(16):
                        s[16 * j + k] = lowest
                low, high = group_max(s, 16 * j)
                low, high = quad_max(low), quad_max(high)
                to = int32(smem + warp_top_at + 256 * j + r * 16 + warp * 4)
                st_shared_f32_if(int32(i == 0), to, low)
                st_shared_f32_if(int32(i == 0), int32(to + 128), high)
            named_barrier_sync(1, CLUSTER_THREADS)
            # A thread tells one block the largest score of one row in one tile.
            row, other = int32(thread & 15), int32(thread >> 4)
            which, peer = int32(other >> block_shift), int32(other & (blocks - 1))
            ld_shared_v4(four, int32(smem + warp_top_at + 256 * which + row * 16))
            top = mul_f32(max_f32(max_f32(four[0], four[1]), max_f32(four[2], four[3])), c)
            to = int32(tops + (row * SPLIT_TILES + rank * own + which) * 4)
            st_async_f32(cluster_address(to, peer), top, cluster_address(top_full, peer))
            pause(int32(2))
            wait_top(top_full, int32(phase >> 1))
            cuda.syncwarp()
            for half in range(2):
                ld_shared_v4(four, int32(tops + r * 32 + half * 16))
                for k in range(4):
                    top_low[4 * half + k] = four[k]
                ld_shared_v4(four, int32(tops + (r + 8) * 32 + half * 16))
                for k in range(4):
                    top_high[4 * half + k] = four[k]
            m_low, m_high = lowest, lowest
            for j in range(own):
                n_low[j], n_high[j] = zero, zero
            for tile in range(SPLIT_TILES):
                new_low, new_high = max_f32(m_low, top_low[tile]), max_f32(m_high, top_high[tile])
                low, high = negated(new_low), negated(new_high)
                f_low, f_high = ex2_f32(add_f32(m_low, low)), ex2_f32(add_f32(m_high, high))
                st_shared_f32_if(int32(i == 0), int32(factors + tile * 64), f_low)
                st_shared_f32_if(int32(i == 0), int32(factors + tile * 64 + 32), f_high)
                for j in range(own):
                    mine = int32(rank * own + j == tile)
                    n_low[j] = select_f32(mine, low, n_low[j])
                    n_high[j] = select_f32(mine, high, n_high[j])
                m_low, m_high = new_low, new_high
            # Weights of the block's own tiles, and what each lane adds to its places, to everybody.
            for j in range(own):
                tile = int32(rank * own + j)
                if tile < tiles:
                    t_low, t_high = group_weights(s, 16 * j, p, 8 * j, c, n_low[j], n_high[j])
                    for k in range(blocks):
                        there = cluster_address(smem, int32((rank + k) & (blocks - 1)))
                        full = int32(there + weights_full_at + 8 * tile)
                        to = int32(there + weights_at + tile * 4096 + warp * 1024 + lane * 16)
                        for step in range(2):
                            for word in range(4):
                                words[word] = p[8 * j + 4 * step + word]
                            st_async_v4(int32(to + step * 512), words, full)
                        to = int32(there + parts_at + tile * 1024 + thread * 8)
                        st_async_v2_f32(to, t_low, t_high, full)
            if tiles > 0:
                seen_to = int32(length - (tile_end - 1) * TILE)
                if seen_to < TILE:
                    # Row `thread` of the last tile is this thread's to clean: 0 x NaN is NaN.
                    wait_values(int32(smem + values_full_at + 8 * (tiles - 1)), int32(phase & 1))
                    to = int32(smem + values_at + (tiles - 1) * 2 * PAGE_VALUES + thread * 32)
                    st_shared_zero_16_if(int32(thread >= seen_to), to)
                    st_shared_zero_16_if(int32(thread >= seen_to), int32(to + 16))
                    fence_proxy_async()  # the copy engine will write there next
            pause(int32(3))
            cuda.syncwarp()
            l_low, l_high = zero, zero
            tile = int32(0)
            while tile < tiles:
                wait_weights(int32(smem + weights_full_at + 8 * tile), int32(phase & 1))
                at = int32(factors + tile * 64)
                f_low, f_high = ld_shared_f32(at), ld_shared_f32(int32(at + 32))
                at = int32(smem + parts_at + tile * 1024 + thread * 8)
                l_low = fma_f32(l_low, f_low, ld_shared_f32(at))
                l_high = fma_f32(l_high, f_high, ld_shared_f32(int32(at + 4)))
                tile = int32(tile + 1)
            cuda.syncwarp()
            sums = int32(smem + sum_at + r * 16)
            l_low, l_high = quad_sum(l_low), quad_sum(l_high)
            st_shared_f32_if(int32(i == 0), int32(sums + warp * 4), l_low)
            st_shared_f32_if(int32(i == 0), int32(sums + 128 + warp * 4), l_high)
            named_barrier_sync(1, CLUSTER_THREADS)
            if warp == 0:
                for k in range(8):
                    o[k] = zero
                tile = int32(0)
                while tile < tiles:
                    at = int32(factors + tile * 64)
                    f_low, f_high = ld_shared_f32(at), ld_shared_f32(int32(at + 32))
                    wait_values(int32(smem + values_full_at + 8 * tile), int32(phase & 1))
                    cuda.syncwarp()
                    for k in range(2):
                        o[4 * k], o[4 * k + 1] = mul_f32(o[4 * k], f_low), mul_f32(o[4 * k + 1], f_low)
                        o[4 * k + 2] = mul_f32(o[4 * k + 2], f_high)
                        o[4 * k + 3] = mul_f32(o[4 * k + 3], f_high)
                    at, weights = int32(smem + values_at + tile * 2 * PAGE_VALUES), int32(smem + weights_at)
                    weights = int32(weights + tile * 4096 + lane * 16)
                    add_values(o, weights, at, lane)
                    if length - (first_tile + tile) * TILE > BLOCK_SIZE:
                        add_values(o, int32(weights + 2048), int32(at + PAGE_VALUES), lane)
                    tile = int32(tile + 1)
                ld_shared_v4(four, sums)
                l_low = add_f32(add_f32(four[0], four[1]), add_f32(four[2], four[3]))
                ld_shared_v4(four, int32(sums + 128))
                l_high = add_f32(add_f32(four[0], four[1]), add_f32(four[2], four[3]))
                low_in, high_in = int32(r < group), int32(r + 8 < group)
                column = int32(rank * CLUSTER_COLUMNS + 2 * i)
                writer = int32(int32(rank == 0) & int32(i == 0))
                if splits == 1:
                    low_inverse = select_f32(int32(l_low > zero), divide_f32(one, l_low), zero)
                    high_inverse = select_f32(int32(l_high > zero), divide_f32(one, l_high), zero)
                    to = int64(out + int64(seq) * out_stride + (int64(head) * group + r) * row_bytes)
                    to = int64(to + column * 2)
                    for k in range(2):
                        pair = pack(mul_f32(o[4 * k], low_inverse), mul_f32(o[4 * k + 1], low_inverse))
                        st_global_b32_if(low_in, int64(to + 16 * k), pair)
                        pair = pack(mul_f32(o[4 * k + 2], high_inverse), mul_f32(o[4 * k + 3], high_inverse))
                        st_global_b32_if(high_in, int64(to + 16 * k + 8 * row_bytes), pair)
                    if with_lse:
                        to = int64(lse + ((int64(seq) * heads + head) * group + r) * 4)
                        value = mul_f32(add_f32(m_low, lg2_f32(l_low)), ln2)
                        st_global_f32_if(int32(writer & low_in), to, value)
                        value = mul_f32(add_f32(m_high, lg2_f32(l_high)), ln2)
                        st_global_f32_if(int32(writer & high_in), int64(to + 32), value)
                else:
                    if base + splits > capacity:
                        trap()
                    row_at = int64((int64(base + split) * heads + head) * group + r)
                    to = int64(partial + row_at * (head_dim * 4) + column * 4)
                    for k in range(2):
                        st_global_v2_f32_if(low_in, int64(to + 32 * k), o[4 * k], o[4 * k + 1])
                        high_to = int64(to + 32 * k + 8 * head_dim * 4)
                        st_global_v2_f32_if(high_in, high_to, o[4 * k + 2], o[4 * k + 3])
                    to = int64(partial_ml + row_at * 8)
                    st_global_v2_f32_if(int32(writer & low_in), to, m_low, l_low)
                    st_global_v2_f32_if(int32(writer & high_in), int64(to + 64), m_high, l_high)
                    cuda.syncwarp()
                    if lane == 0:
                        done = int64(counters + 8 + (int64(seq) * heads + head) * 4)
                        is_last = int32(atom_add_acq_rel_i32(done, 1) == splits * blocks - 1)
                        if is_last == 1:
                            st_global_b32(done, 0)
                        st_shared_b32(int32(smem + last_at), is_last)
            if splits > 1:
                named_barrier_sync(1, CLUSTER_THREADS)
                if ld_shared_b32(int32(smem + last_at)) == 1:
                    to = int64(out + int64(seq) * out_stride + int64(head) * group * row_bytes)
                    lse_to = int64(lse + (int64(seq) * heads + head) * group * 4)
                    fold(
                        to, lse_to, partial, partial_ml, int32(base * heads + head), splits, heads, group,
                        int32(0), out_stride, thread,
                    )  # fmt: skip
            phase, turn = int32((phase + 1) & 3), int32(turn ^ 1)
            number = int32(number + clusters)

    return cluster_kernel
