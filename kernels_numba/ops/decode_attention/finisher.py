"""The finisher warps of the tensor-core decode kernel: they fold the splits of a sequence, and write the
zeros of sequences without keys.

They wait for memory so that the warps that multiply need not. Knows: partial results and counters in global
memory. Refuses to know: how a partial result comes about.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.decode_attention.config import FINISHERS, WARP, Build, DecodeConfig, smem_plan
from kernels_numba.ops.decode_attention.feed import make_read_record, make_wait
from kernels_numba.ops.decode_attention.fold import make_clear, make_fold, make_row_tiles
from kernels_numba.ptx.atomics import atom_add_i32
from kernels_numba.ptx.debug import make_stress
from kernels_numba.ptx.ldst import ld_shared_b32, st_global_b32, st_shared_b32
from kernels_numba.ptx.mbarrier import mbarrier_arrive
from kernels_numba.ptx.named_barrier import named_barrier_sync

MEMBERS = FINISHERS * WARP
BARRIER = 2  # the finishers' own


@cache
def make_finish(config: DecodeConfig, dtype: str, with_lse: bool, build: Build, tokens: int) -> Any:
    """f(smem, out, lse, lens, partial, partial_ml, counters, num_seqs, heads, group, out_stride, thread): the
    warps' whole life; arguments as the kernel's, thread: 0 to 95.

    Of an item that is one of several splits one thread counts that it has begun, in counters[2 + (sequence x
    heads + head) x tiles + tile of rows]. Where it was the last to begin, the counter is 0 again, and once
    the item is stored all of them fold: the others are under way in blocks that wait for nobody, so they
    will be there (fold.py).
    """
    plan, head_dim = smem_plan(config), config.head_dim
    record_at, last_at = plan.offset("record"), plan.offset("last")
    posted_at, taken_at, stored_at = plan.offset("posted"), plan.offset("taken"), plan.offset("stored")
    row_bytes, read_record, pause = head_dim * 2, make_read_record(), make_stress(build.stress)
    voices = WARP if build.every_lane else 1  # lanes of a warp that arrive
    row_tiles, clear = make_row_tiles(tokens), make_clear(head_dim, with_lse, tokens, MEMBERS)
    fold = make_fold(head_dim, dtype, with_lse, tokens, MEMBERS)
    wait_posted, wait_stored = make_wait("posted", config, build), make_wait("stored", config, build)
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True)
    def finish(
        smem: Any, out: Any, lse: Any, lens: Any, partial: Any, partial_ml: Any, counters: Any, num_seqs: Any,
        heads: Any, group: Any, out_stride: Any, thread: Any,
    ) -> None:  # fmt: skip
        clear(out, lse, lens, num_seqs, heads, group, out_stride, thread)
        slot, phase, tiles = int32(0), int32(0), row_tiles(group)
        lane = int32(thread & (WARP - 1))
        working = True
        while working:
            wait_posted(int32(smem + posted_at + 8 * slot), phase)
            seq, head, _, splits, base, _, first_row = read_record(int32(smem + record_at + 32 * slot), lane)
            working = seq >= 0
            if working:
                flag = int32(smem + last_at + 16 * slot)
                if splits > 1 and thread == 0:
                    number = int64((int64(seq) * heads + head) * tiles + (first_row >> 4))
                    begun = int64(counters + 8 + number * 4)
                    is_last = int32(atom_add_i32(begun, 1) == splits - 1)
                    if is_last == 1:
                        st_global_b32(begun, 0)
                    st_shared_b32(flag, is_last)
                wait_stored(int32(smem + stored_at + 8 * slot), phase)
                pause(int32(6))
                if splits > 1:
                    named_barrier_sync(BARRIER, MEMBERS)
                    if ld_shared_b32(flag) == 1:
                        to = int64(out + int64(seq) * tokens * out_stride + int64(head) * group * row_bytes)
                        lse_to = int64(lse + (int64(seq) * tokens * heads + head) * group * 4)
                        first_slot = int32(base * heads + head)
                        fold(
                            to, lse_to, partial, partial_ml, first_slot, splits, heads, group, first_row,
                            out_stride, thread,
                        )  # fmt: skip
            cuda.syncwarp()
            if lane < voices:
                mbarrier_arrive(int32(smem + taken_at + 8 * slot))
            slot = int32(slot ^ 1)
            phase = int32(phase ^ (slot ^ 1))

    return finish
