"""The finisher warps of the tensor-core decode kernel: they see which sequence's splits are all there, and
fold them.

They wait for memory so that the warps that multiply need not. Knows: partial results and counters in global
memory. Refuses to know: how a partial result comes about.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.attention_contract import LN2
from kernels_numba.attention_tile import LOWEST, make_fold_factors, make_folded
from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import FINISHERS, WARP, Build, DecodeConfig, smem_plan
from kernels_numba.ops.decode_attention.feed import make_wait
from kernels_numba.ptx.arith import add_f32, divide_f32, lg2_f32, mul_f32, select_i32
from kernels_numba.ptx.atomics import atom_add_acq_rel_i32
from kernels_numba.ptx.debug import make_stress
from kernels_numba.ptx.ldst import ld_shared_b32, st_global_b32, st_shared_b32
from kernels_numba.ptx.mbarrier import mbarrier_arrive
from kernels_numba.ptx.mma import pack_bf16, pack_f16
from kernels_numba.ptx.named_barrier import named_barrier_sync
from kernels_numba.ptx.predicated import st_global_b32_if, st_global_f32_if
from kernels_numba.ptx.vector import ld_global_v2, ld_global_v4, ld_shared_v4

MEMBERS = FINISHERS * WARP
# Of a fold: splits, and places of a thread (16 bytes of a row of o each), whose loads are in flight together.
AT_ONCE, PLACES = 3, 3
BARRIER = 2  # the finishers' own


@cache
def make_finish(config: DecodeConfig, dtype: str, with_lse: bool, build: Build) -> Any:
    """f(smem, out, lse, partial, partial_ml, counters, heads, group, out_stride, thread): the warps' whole
    life; arguments as the kernel's, thread: 0 to 95.

    Of every item they wait until the consumers have stored its result. If that was one of several splits, one
    thread counts it in counters[2 + sequence x heads + head] (acquire and release: what the block stored is
    seen by whoever finds a higher count), and where it was the last, all of them fold, and the counter is 0
    again.
    """
    plan, head_dim = smem_plan(config), config.head_dim
    record_at, last_at = plan.offset("record"), plan.offset("last")
    posted_at, taken_at, stored_at = plan.offset("posted"), plan.offset("taken"), plan.offset("stored")
    vectors = head_dim // 4  # of 16 bytes, in a row of float32
    vector_shift, row_bytes = vectors.bit_length() - 1, head_dim * 2
    flying, flying_words, held = AT_ONCE * PLACES, 4 * AT_ONCE * PLACES, 4 * PLACES
    pack = pack_bf16 if dtype == "bfloat16" else pack_f16
    fold_factors, folded, pause = make_fold_factors(), make_folded(), make_stress(build.stress)
    wait_posted, wait_stored = make_wait("posted", config, build), make_wait("stored", config, build)
    lowest, zero, one, ln2 = np.float32(LOWEST), np.float32(0), np.float32(1), np.float32(LN2)
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def place_of(at: Any, k: Any, words: Any) -> Any:
        """The thread's k-th place from `at` on; past the end the last, which is then computed in vain."""
        place = int32(at + k * MEMBERS)
        return select_i32(int32(place < words), place, int32(words - 1))

    @jit(device=True)
    def fold(
        out: Any, lse: Any, partial: Any, partial_ml: Any, first_slot: Any, splits: Any, heads: Any,
        group: Any, thread: Any,
    ) -> None:  # fmt: skip
        """All of a sequence's splits of one kv head, left to right; out, lse: of its first row of this
        head."""
        ml = cuda.local.array(2, np.float32)
        loaded = cuda.local.array(4, np.float32)
        ms = cuda.local.array(flying, np.float32)
        ls = cuda.local.array(flying, np.float32)
        os = cuda.local.array(flying_words, np.float32)
        m = cuda.local.array(PLACES, np.float32)
        l_sum = cuda.local.array(PLACES, np.float32)
        o = cuda.local.array(held, np.float32)
        words = int32(group * vectors)
        at = int32(thread)
        while at - thread < words:
            for k in range(PLACES):
                m[k], l_sum[k] = lowest, zero
                for j in range(4):
                    o[4 * k + j] = zero
            split = int32(0)
            while split < splits:
                for i in range(AT_ONCE):
                    index = int64(first_slot) + int64(min(int32(split + i), int32(splits - 1))) * heads
                    for k in range(PLACES):
                        place = place_of(at, k, words)
                        ld_global_v2(ml, int64(partial_ml + (index * group + (place >> vector_shift)) * 8))
                        ms[PLACES * i + k], ls[PLACES * i + k] = ml[0], ml[1]
                        ld_global_v4(loaded, int64(partial + (index * words + place) * 16))
                        for j in range(4):
                            os[4 * (PLACES * i + k) + j] = loaded[j]
                for i in range(AT_ONCE):
                    if split + i < splits:
                        for k in range(PLACES):
                            m[k], a, b = fold_factors(m[k], ms[PLACES * i + k])
                            l_sum[k] = folded(l_sum[k], a, ls[PLACES * i + k], b)
                            for j in range(4):
                                o[4 * k + j] = folded(o[4 * k + j], a, os[4 * (PLACES * i + k) + j], b)
                split = int32(split + AT_ONCE)
            for k in range(PLACES):
                inside = int32(at + k * MEMBERS < words)
                place = place_of(at, k, words)
                row = int32(place >> vector_shift)
                column = int32(place - row * vectors)
                inverse = divide_f32(one, l_sum[k])
                to = int64(out + int64(row) * row_bytes + column * 8)
                first = pack(mul_f32(o[4 * k], inverse), mul_f32(o[4 * k + 1], inverse))
                second = pack(mul_f32(o[4 * k + 2], inverse), mul_f32(o[4 * k + 3], inverse))
                st_global_b32_if(inside, to, first)
                st_global_b32_if(inside, int64(to + 4), second)
                if with_lse:
                    value = mul_f32(add_f32(m[k], lg2_f32(l_sum[k])), ln2)
                    st_global_f32_if(int32(inside & int32(column == 0)), int64(lse + int64(row) * 4), value)
            at = int32(at + PLACES * MEMBERS)

    @jit(device=True)
    def finish(
        smem: Any, out: Any, lse: Any, partial: Any, partial_ml: Any, counters: Any, heads: Any, group: Any,
        out_stride: Any, thread: Any,
    ) -> None:  # fmt: skip
        words = cuda.local.array(4, np.int32)
        slot, phase = int32(0), int32(0)
        working = True
        while working:
            wait_posted(int32(smem + posted_at + 8 * slot), phase)
            record = int32(smem + record_at + 32 * slot)
            ld_shared_v4(words, record)
            seq, head, splits = int32(words[0]), int32(words[1]), int32(words[3])
            ld_shared_v4(words, int32(record + 16))
            base = int32(words[0])
            working = seq >= 0
            if working:
                wait_stored(int32(smem + stored_at + 8 * slot), phase)
                pause(int32(6))
                if splits > 1:
                    flag = int32(smem + last_at + 16 * slot)
                    if thread == 0:
                        done = int64(counters + 8 + (int64(seq) * heads + head) * 4)
                        is_last = int32(atom_add_acq_rel_i32(done, 1) == splits - 1)
                        if is_last == 1:
                            st_global_b32(done, 0)
                        st_shared_b32(flag, is_last)
                    named_barrier_sync(BARRIER, MEMBERS)
                    if ld_shared_b32(flag) == 1:
                        to = int64(out + int64(seq) * out_stride + int64(head) * group * row_bytes)
                        lse_to = int64(lse + (int64(seq) * heads + head) * group * 4)
                        first_slot = int32(base * heads + head)
                        fold(to, lse_to, partial, partial_ml, first_slot, splits, heads, group, thread)
            cuda.syncwarp()
            if thread & (WARP - 1) == 0:
                mbarrier_arrive(int32(smem + taken_at + 8 * slot))
            slot = int32(slot ^ 1)
            phase = int32(phase ^ (slot ^ 1))

    return finish
