"""Rotary embedding of q and k in place, and k and v to their pages, in one pass over the packed rows.

Knows: one kernel and its launch. Refuses to know: how angles were made, whose pages they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np

from kernels_numba.checks import check, fail
from kernels_numba.compiler import cuda, jit
from kernels_numba.launch import Kernel, Launch
from kernels_numba.ops.warp.door import (
    FLOAT32,
    HALVES,
    HEAD_DIMS,
    LIMIT,
    NAMES,
    Plan,
    View,
    count_address,
    indices,
    packed,
    plan_and_prepare,
    power_of_two,
    row_bytes,
    view,
    view_count,
    warp_kernel,
)
from kernels_numba.ops.warp.elements import ELEMENTS, PACK, make_elements, make_real_rows
from kernels_numba.ptx.arith import fma_f32, mul_f32, select_f32
from kernels_numba.ptx.griddep import griddep_launch, griddep_wait
from kernels_numba.ptx.ldst import ld_global_i32
from kernels_numba.ptx.packs import ld_global_nc_v4_if_at, ld_global_v4_if_at, st_global_v4_if_at

OP = "rope_store_kv"
SIGNATURE = (
    "void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int32, int32, int32, int32, int32, "
    "int32, int32, int32, int32)"
)
THREADS = 128
HELD = 2  # heads of which a thread holds eight pairs at once
HELD_WORDS = 4 * HELD


def make_rope_store_kv_kernel(head_dim: int, dtype: str, pdl: bool = False) -> Any:
    """x'[i] = x[i] cos[i] - x[i + D/2] sin[i], x'[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i] for the heads of
    q and k, in place; then k' and v of row t to page slot / block_size, key slot % block_size, of k_cache and
    v_cache, where slot = slot_mapping[t].

    Arguments: q, k, v: addresses of T[rows, num_q_heads, D], T[rows, num_kv_heads, D] twice; k_cache,
    v_cache: of T[num_blocks, num_kv_heads, block_size, D]; positions, slot_mapping: of i32[rows]; cos_sin: of
    f32[max_pos, D]; num_rows: of i32[1], the real number of rows, or 0; rows; num_q_heads; num_kv_heads;
    q_stride, k_stride, v_stride: bytes from row to row; max_pos; slots: num_blocks x block_size; shift:
    log2 of block_size.
    Who does what: block t takes row t. D / 16 neighbouring threads take a head, eight pairs each: 16 bytes
    of its lower and 16 of its upper half, with the same 8 cosines and sines for every head that a thread
    meets; 2,048 / D heads go at once, two such rounds are loaded before the first is turned. The row's first
    128 packs of v are on their way before that. Rows at and past the real number are neither read nor
    written; a slot below 0 or past the cache stores nothing; a position outside the table turns to NaN.
    Rounding: fma(x, cos, -(y sin)) and fma(y, cos, x sin), once to T: the bits of rope, then store_kv.
    Dependent launches (pdl): the next launch may begin at once, and this one waits for those before it before
    it reads or writes anything; so it may be anywhere in a chain of them.
    Registers: 96 at most. No shared memory.
    """
    int32, int64 = cuda.types.int32, cuda.types.int64
    lanes = head_dim // (2 * ELEMENTS)
    at_once = THREADS // lanes
    head_bytes, half_bytes, head_packs = head_dim * 2, head_dim, head_dim // ELEMENTS
    low, high, pack = make_elements(dtype)
    real_rows = make_real_rows()

    @jit(device=True)
    def turn(x: Any, y: Any, at: Any, cos: Any, sin: Any) -> None:
        """The eight pairs of (x, y)[at .. at + 3], in place."""
        for word in range(4):
            c0 = cos[2 * word]
            c1 = cos[2 * word + 1]
            s0 = sin[2 * word]
            s1 = sin[2 * word + 1]
            x0 = low(x[at + word])
            x1 = high(x[at + word])
            y0 = low(y[at + word])
            y1 = high(y[at + word])
            x[at + word] = pack(fma_f32(x0, c0, -mul_f32(y0, s0)), fma_f32(x1, c1, -mul_f32(y1, s1)))
            y[at + word] = pack(fma_f32(y0, c0, mul_f32(x0, s0)), fma_f32(y1, c1, mul_f32(x1, s1)))

    def rope_store_kv(
        q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, positions: Any, slot_mapping: Any, cos_sin: Any,
        num_rows: Any, rows: Any, num_q_heads: Any, num_kv_heads: Any, q_stride: Any, k_stride: Any,
        v_stride: Any, max_pos: Any, slots: Any, shift: Any,
    ) -> None:  # fmt: skip
        if pdl:
            griddep_launch()
            griddep_wait()
        row = int32(cuda.blockIdx.x)
        if row < real_rows(num_rows, rows):
            thread = int32(cuda.threadIdx.x)
            position = int32(ld_global_i32(positions + int64(row) * 4))
            slot = int32(ld_global_i32(slot_mapping + int64(row) * 4))
            stored = int32(int32(slot >= 0) & int32(slot < slots))
            known = int32(int32(position >= 0) & int32(position < max_pos))
            # Of key `slot % block_size` in the first head of its page, and from there from head to head.
            page = int64(slot >> shift) * int64(num_kv_heads) << int64(shift)
            key = int64(page + int64(slot & ((1 << shift) - 1))) * head_bytes
            cache_head = int64(int64(1) << int64(shift)) * head_bytes

            v_at = int64(v + int64(row) * int64(v_stride))
            v_packs = int32(num_kv_heads * head_packs)
            v_words = cuda.local.array(4, np.int32)
            take_v = int32(int32(thread < v_packs) & stored)
            ld_global_v4_if_at(take_v, v_words, 0, int64(v_at + int64(thread) * PACK))

            within = int32(thread & (lanes - 1))
            cos = cuda.local.array(8, np.float32)
            sin = cuda.local.array(8, np.float32)
            angles = int64(cos_sin + int64(position) * (4 * head_dim) + int64(within) * 32)
            for part in range(2):
                ld_global_nc_v4_if_at(known, cos, 4 * part, int64(angles + 16 * part))
                ld_global_nc_v4_if_at(known, sin, 4 * part, int64(angles + 2 * head_dim + 16 * part))
            for i in range(8):
                cos[i] = select_f32(known, cos[i], np.float32(np.nan))
                sin[i] = select_f32(known, sin[i], np.float32(np.nan))

            q_at = int64(q + int64(row) * int64(q_stride) + int64(within) * PACK)
            k_at = int64(k + int64(row) * int64(k_stride) + int64(within) * PACK)
            k_at = int64(k_at - int64(num_q_heads) * head_bytes)  # so that heads count on from those of q
            k_to = int64(k_cache + key + int64(within) * PACK - int64(num_q_heads) * cache_head)
            num_heads = int32(num_q_heads + num_kv_heads)
            first = int32(thread // lanes)
            x = cuda.local.array(HELD_WORDS, np.int32)
            y = cuda.local.array(HELD_WORDS, np.int32)
            base = int32(0)
            while base < num_heads:
                for i in range(HELD):
                    head = int32(base + first + i * at_once)
                    at = int64(k_at + int64(head < num_q_heads) * (q_at - k_at) + int64(head) * head_bytes)
                    mine = int32(head < num_heads)
                    ld_global_v4_if_at(mine, x, 4 * i, at)
                    ld_global_v4_if_at(mine, y, 4 * i, int64(at + half_bytes))
                for i in range(HELD):
                    head = int32(base + first + i * at_once)
                    at = int64(k_at + int64(head < num_q_heads) * (q_at - k_at) + int64(head) * head_bytes)
                    mine = int32(head < num_heads)
                    turn(x, y, 4 * i, cos, sin)
                    st_global_v4_if_at(mine, at, x, 4 * i)
                    st_global_v4_if_at(mine, int64(at + half_bytes), y, 4 * i)
                    to = int64(k_to + int64(head) * cache_head)
                    to_page = int32(int32(int32(head >= num_q_heads) & mine) & stored)
                    st_global_v4_if_at(to_page, to, x, 4 * i)
                    st_global_v4_if_at(to_page, int64(to + half_bytes), y, 4 * i)
                base = int32(base + HELD * at_once)

            v_to = int64(v_cache + key)
            item = int32(thread)
            more = int32(0)
            while more < v_packs:
                head = int32(item // head_packs)
                inside = int64(item & (head_packs - 1)) * PACK
                take_v = int32(int32(item < v_packs) & stored)
                if more > 0:
                    ld_global_v4_if_at(take_v, v_words, 0, int64(v_at + int64(item) * PACK))
                st_global_v4_if_at(take_v, int64(v_to + int64(head) * cache_head + inside), v_words, 0)
                item = int32(item + THREADS)
                more = int32(more + THREADS)

    return rope_store_kv


@cache
def rope_store_kv_kernel(head_dim: int, dtype: str, pdl: bool) -> Kernel:
    """The kernel of one specialisation, compiled when first launched."""
    name = f"rope_store_kv_warp_d{head_dim}_{dtype}"
    return warp_kernel(name, make_rope_store_kv_kernel, (head_dim, dtype), SIGNATURE, THREADS, pdl)


def kernels() -> Iterator[Kernel]:
    """Every kernel that an engine in bfloat16 can pick, for building them ahead."""
    for pdl in (False, True):
        for head_dim in HEAD_DIMS:
            yield rope_store_kv_kernel(head_dim, "bfloat16", pdl)


def plan_rope_store_kv(
    q: View, k: View, v: View, positions: View, cos_sin: View, k_cache: View, v_cache: View,
    slot_mapping: View, num_rows: View | None, pdl: bool = False
) -> Plan | None:  # fmt: skip
    """The launch for these operands; None for nothing to do.

    q T[rows, Hq, D], k, v T[rows, Hkv, D], caches T[num_blocks, Hkv, block_size, D], T bfloat16 bits or
    float16, D 64, 128 or 256, block_size a power of two; cos_sin f32[max_pos, D]; positions, slot_mapping
    i32[rows]. Rows of q, k and v may be cut from wider ones. ValueError names what is wrong.
    """
    check(OP, "q", q, HALVES, (None, None, None), rows=1)
    rows, num_q_heads, head_dim = q.shape
    check(OP, "k", k, (q.dtype,), (rows, None, head_dim), rows=1)
    check(OP, "v", v, (q.dtype,), k.shape, rows=1)
    num_kv_heads = k.shape[1]
    check(OP, "cos_sin", cos_sin, (FLOAT32,), (None, head_dim))
    check(OP, "k_cache", k_cache, (q.dtype,), (None, num_kv_heads, None, head_dim))
    check(OP, "v_cache", v_cache, (q.dtype,), k_cache.shape)
    if head_dim not in HEAD_DIMS:
        fail(OP, "q.shape[2]", f"is {head_dim}", f"head_dim {' or '.join(map(str, HEAD_DIMS))}")
    num_blocks, block_size = k_cache.shape[0], k_cache.shape[2]
    if not power_of_two(block_size):
        fail(OP, "k_cache.shape[2]", f"is {block_size}", "a power of two of keys a page")
    if num_blocks * block_size >= LIMIT:
        fail(OP, "k_cache", f"has {num_blocks * block_size:,} slots", "fewer than 2**31")
    ids = [
        indices(OP, name, one, rows)
        for name, one in (("positions", positions), ("slot_mapping", slot_mapping))
    ]
    if rows * (num_q_heads + num_kv_heads) == 0:
        return None
    at = [packed(OP, name, one, rows=1) for name, one in (("q", q), ("k", k), ("v", v))]
    at += [packed(OP, name, one) for name, one in (("k_cache", k_cache), ("v_cache", v_cache))]
    arguments = (
        *at, *ids, packed(OP, "cos_sin", cos_sin), count_address(OP, num_rows), rows, num_q_heads,
        num_kv_heads, row_bytes(q), row_bytes(k), row_bytes(v), cos_sin.shape[0], num_blocks * block_size,
        block_size.bit_length() - 1,
    )  # fmt: skip
    return Plan(rope_store_kv_kernel(head_dim, NAMES[q.dtype], pdl), rows, arguments)


@lru_cache(maxsize=4096)
def prepared(
    q: View, k: View, v: View, positions: View, cos_sin: View, k_cache: View, v_cache: View,
    slot_mapping: View, num_rows: View | None,
) -> Launch | None:  # fmt: skip
    """plan_rope_store_kv's launch, ready to be repeated. ValueError on a GPU that is too old."""
    return plan_and_prepare(
        OP, plan_rope_store_kv, q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, num_rows
    )


def rope_store_kv_warp(
    q: Any, k: Any, v: Any, positions: Any, cos_sin: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, *,
    stream: Any = None, num_rows: Any = None,
) -> None:  # fmt: skip
    """Rung "warp" of rope_store_kv; see make_rope_store_kv_kernel and plan_rope_store_kv. num_rows: device
    i32[1]."""
    launch = prepared(
        view(OP, "q", q), view(OP, "k", k), view(OP, "v", v), view(OP, "positions", positions),
        view(OP, "cos_sin", cos_sin), view(OP, "k_cache", k_cache), view(OP, "v_cache", v_cache),
        view(OP, "slot_mapping", slot_mapping), view_count(OP, num_rows),
    )  # fmt: skip
    if launch is not None:
        launch(stream)
