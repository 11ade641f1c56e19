"""Decode attention on tensor cores, over pages, in the order of attention_contract.py: one text, two ways to
feed it.

Knows: one warp-specialised kernel, whose warps' lives are scorers.py, adders.py, producer.py, finisher.py.
Refuses to know how many sequences share it, in the strict sense: a row's bits depend on its query, its keys
and values, their positions and the window alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.compiler import cuda
from kernels_numba.ops.decode_attention.adders import make_add_up
from kernels_numba.ops.decode_attention.config import (
    ADDERS,
    FINISHERS,
    PRODUCT,
    RECORDS,
    SCORERS,
    TURNS,
    WARP,
    Build,
    DecodeConfig,
    smem_plan,
)
from kernels_numba.ops.decode_attention.feed import make_feed
from kernels_numba.ops.decode_attention.finisher import make_finish
from kernels_numba.ops.decode_attention.producer import make_produce
from kernels_numba.ops.decode_attention.scorers import make_weigh
from kernels_numba.ptx.arith import mul_f32
from kernels_numba.ptx.control import dynamic_shared, griddep_launch, griddep_wait, warp_uniform
from kernels_numba.ptx.mbarrier import fence_mbarrier_init, mbarrier_init

SIGNATURE = f"void({', '.join(['int64'] * 11 + ['int32'] * 7 + ['float32'])})"
PRODUCER = SCORERS + ADDERS  # the warp's number


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
    f32[capacity, num_kv_heads, group, 2], all fold.UNWRITTEN, and again at the end; counters
    i32[2 + num_seqs num_kv_heads], all 0, and 0 again at the end. Then num_seqs, num_kv_heads, group, bytes
    from one row to the next of q and of out, entries from one row to the next of block_table, capacity; c
    (attention_contract.py).
    Who does what: warp 8 takes items (schedule.py), tells the others which, and loads their pages, K then V
    of each tile of 128 keys, page by page (producer.py). Warps 0 to 3 make each tile's weights (scorers.py),
    warps 4 to 7 add up values by them (adders.py), a tile behind: so products and exchanges of two tiles
    overlap. What is one split goes straight to out; of several, each leaves its (m, l, o), and warps 9 to 11
    of the block that was last to start one fold them (finisher.py), and write the zeros of sequences without
    keys.
    Shared memory: smem_plan(config). Chunks lie as the 128-byte swizzle puts them, 64 columns at a time.
    Barriers: full[s] hands a loaded page to who reads it, empty[s] hands it back;
    weighed[t] hands a tile's weights to the adders, added[t] back, summed[r] a split's sums; posted[r] hands
    an item to everybody, taken[r] back, stored[r] its stored result to the finishers.
    Pages in which nothing is seen, and table entries of such, are never read.
    Dependent launches: context_lens, block_table and all keys and values but each sequence's newest, one a
    query token, may be read before the launches before this one have ended, so those must not write them: a
    step's are written by copies and by earlier steps.
    """
    stages, plan = config.stages, smem_plan(config)
    full_at, empty_at = plan.offset("full"), plan.offset("empty")
    weighed_at, added_at, summed_at = plan.offset("weighed"), plan.offset("added"), plan.offset("summed")
    posted_at, taken_at, stored_at = plan.offset("posted"), plan.offset("taken"), plan.offset("stored")
    by_tma, voices = config.feed == "tma", WARP if build.every_lane else 1
    pdl = by_tma and build.pdl
    _, full_arrivals = make_feed(config)
    produce, weigh = (
        make_produce(config, window, build, tokens),
        make_weigh(config, dtype, window, build, tokens),
    )
    add_up = make_add_up(config, dtype, window, with_lse, build, tokens)
    finish = make_finish(config, dtype, with_lse, build, tokens)
    scaled = np.float32(1.25 if build.mutant == "scale" else 1)
    int32 = cuda.types.int32

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
                mbarrier_init(int32(smem + empty_at + 8 * i), ADDERS * voices)
            for i in range(TURNS):
                mbarrier_init(int32(smem + weighed_at + 8 * i), SCORERS * voices)
                mbarrier_init(int32(smem + added_at + 8 * i), ADDERS * voices)
            for i in range(RECORDS):
                mbarrier_init(int32(smem + posted_at + 8 * i), 1)
                mbarrier_init(int32(smem + taken_at + 8 * i), (SCORERS + ADDERS + FINISHERS) * voices)
                mbarrier_init(int32(smem + summed_at + 8 * i), SCORERS * voices)
                mbarrier_init(int32(smem + stored_at + 8 * i), ADDERS * voices)
            if by_tma:
                fence_mbarrier_init()
        cuda.syncthreads()
        if warp == PRODUCER:
            produce(
                smem, maps, k_cache, v_cache, q, lens, table, counters, num_seqs, heads, group, q_stride,
                table_stride, lane,
            )  # fmt: skip
        else:
            if pdl:
                griddep_wait()
            if warp < SCORERS:
                weigh(smem, q, heads, group, q_stride, mul_f32(c, scaled), warp, lane)
            elif warp < PRODUCER:
                add_up(
                    smem, out, lse, partial, partial_ml, heads, group, out_stride, capacity,
                    int32(warp - SCORERS), lane,
                )  # fmt: skip
            else:
                own = int32(thread - (PRODUCER + 1) * WARP)
                finish(
                    smem, out, lse, lens, partial, partial_ml, counters, num_seqs, heads, group, out_stride,
                    own,
                )  # fmt: skip

    return decode_kernel
