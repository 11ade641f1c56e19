"""When each item of the Hopper prefill kernel runs, and on which SM: clock reads of a debug build.

The warp that hands items out (producers.py) notes what it posts, and when: a slot is free again once every
warp has taken the item that was in it, and there are RECORDS slots. So an item has begun when the note
RECORDS later is written, and is over when the next one has begun. Knows: the notes behind the counters.
Refuses to know: how a picture is drawn (notebooks/03_attention.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.prefill_attention.config import RECORDS, Build, PrefillConfig
from kernels_numba.ops.prefill_attention.door import Workspace
from kernels_numba.ptx.clock import now_ns, sm_id
from kernels_numba.ptx.ldst import st_global_b32

NOTES, NOTE_WORDS, FIRST_WORD = 1024, 8, 16  # of a block; words of a note; words in front of all notes
ITEM = np.dtype(
    [("block", "i4"), ("sm", "i4"), ("seq", "i4"), ("head", "i4"), ("first_row", "i4"), ("start_us", "f8"),
     ("end_us", "f8")]
)  # fmt: skip


@cache
def make_note(clock: bool) -> Any:
    """note(counters, number, seq, head, row0), for one thread: what the block posts as its number-th record
    (seq -1: none), when and where. Nothing without clock."""
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def nothing(counters: Any, number: Any, seq: Any, head: Any, row0: Any) -> None:
        pass

    @jit(device=True, forceinline=True)
    def note(counters: Any, number: Any, seq: Any, head: Any, row0: Any) -> None:
        if number < NOTES:
            place = int64(int64(cuda.blockIdx.x) * NOTES + number)
            at = int64(counters + (place * NOTE_WORDS + FIRST_WORD) * 4)
            st_global_b32(at, seq)
            st_global_b32(int64(at + 4), head)
            st_global_b32(int64(at + 8), row0)
            st_global_b32(int64(at + 12), sm_id())
            st_global_b32(int64(at + 16), int32(now_ns()))

    return note if clock else nothing


def blank_notes(blocks: int) -> Any:
    """i32: the two counters, 0, and room for the notes of so many blocks, all -1."""
    words = np.full(FIRST_WORD + blocks * NOTES * NOTE_WORDS, -1, np.int32)
    words[:2] = 0
    return words


def read_notes(words: Any) -> Any:
    """ITEM[number of items], by their starts: what a launch has written over blank_notes. Times are from the
    first start. ValueError for more than NOTES - 1 - RECORDS items of one block, whose last notes are
    missing."""
    found = []
    for block, notes in enumerate(words[FIRST_WORD:].reshape(-1, NOTES, NOTE_WORDS)):
        written = notes[notes[:, 3] >= 0]
        if len(written) == NOTES:
            most = NOTES - 1 - RECORDS
            raise ValueError(f"block {block} had over {most} items; notes hold {most}: take a smaller batch")
        # Items, the record that there are no more, and RECORDS notes of when the last ones had begun.
        for number in range(len(written) - 1 - RECORDS):
            begun, over = written[number + RECORDS], written[number + RECORDS + 1]
            where = written[number]
            found.append((block, where[3], where[0], where[1], where[2], begun[4], over[4]))
    items = np.array(found, ITEM)
    if len(items):
        first = np.int64(items["start_us"][0])
        for name in ("start_us", "end_us"):  # the clock may pass 2**32 ns in between
            since = (items[name].astype(np.int64) - first).astype(np.int32)
            items[name] = since
        items["end_us"] -= items["start_us"].min()
        items["start_us"] -= items["start_us"].min()
        items["start_us"] /= 1e3
        items["end_us"] /= 1e3
    return np.sort(items, order="start_us")


def attend_clocked(
    out: Any, q: Any, k_cache: Any, v_cache: Any, cu_seqlens_q: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, config: PrefillConfig | None = None,
) -> Any:  # fmt: skip
    """hopper.attend of the same operands by the debug build, waited for; returns ITEM[number of items].
    ValueError as attend and read_notes."""
    from kernels_numba.ops.prefill_attention.hopper import attend, num_sms

    words = cuda.to_device(blank_notes(num_sms()))
    attend(
        out, q, k_cache, v_cache, cu_seqlens_q, context_lens, block_table, softmax_scale=softmax_scale,
        window=window, workspace=Workspace(words), build=Build(clock=True), config=config,
    )  # fmt: skip
    cuda.synchronize()
    return read_notes(words.copy_to_host())
