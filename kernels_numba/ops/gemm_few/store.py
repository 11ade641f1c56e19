"""Accumulators whose rows are weights and whose columns are tokens, to out[tokens, weights].

Accumulators lie as ptx/epilogue.py says: of 8 tokens j, a lane holds in acc[4 j .. 4 j + 3] weight rows
16 w + lane / 4 and 8 below it, tokens 8 j + 2 (lane % 4) and the next. Every index into them is a constant
once the loops are unrolled. Knows: one warpgroup's 64 columns of out. Refuses to know: where they came from.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.gemm_few.config import GROUP_N, ITEM, STORE_TOKENS, WARPGROUP
from kernels_numba.ops.gemm_few.epilogue import make_finish
from kernels_numba.ops.warp.elements import make_elements
from kernels_numba.ptx.arith import add_f32
from kernels_numba.ptx.control import named_barrier_sync
from kernels_numba.ptx.debug import make_stress
from kernels_numba.ptx.matrix import stmatrix_x2_trans, stmatrix_x4_trans
from kernels_numba.ptx.packs import ld_global_v4_if_at, st_global_v4_if_at
from kernels_numba.ptx.predicated import st_global_f32_if
from kernels_numba.ptx.vector import ld_shared_v4

TOKEN_BYTES = GROUP_N * ITEM  # a staged token: one line of the swizzle
UNIT = 16  # bytes, 8 columns


def make_add_row_bias(tokens: int) -> Any:
    """f(acc, low, high): acc += the bias of a lane's two weight rows."""
    groups = tokens // 8

    @jit(device=True, forceinline=True)
    def add_bias(acc: Any, low: Any, high: Any) -> None:
        for j in range(groups):
            acc[4 * j] = add_f32(acc[4 * j], low)
            acc[4 * j + 1] = add_f32(acc[4 * j + 1], low)
            acc[4 * j + 2] = add_f32(acc[4 * j + 2], high)
            acc[4 * j + 3] = add_f32(acc[4 * j + 3], high)

    return add_bias


def make_store_float32(tokens: int) -> Any:
    """f(acc, at, stride, limit, low, high): to float32 out, straight from the registers.

    at: address of (this lane's first token, its upper row); stride: bytes from token to token; limit: how
    many tokens there are from this lane's first on; low, high: whether the upper row, the one 8 below, exist.
    The 8 lanes of a token write 32 neighbouring bytes at a time: a whole sector.
    """
    groups = tokens // 8
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def store_float32(acc: Any, at: Any, stride: Any, limit: Any, low: Any, high: Any) -> None:
        step = int64(stride)
        for j in range(groups):
            for which in range(2):
                here = int32(8 * j + which < limit)
                to = int64(at + (8 * j + which) * step)
                st_global_f32_if(int32(here & low), to, acc[4 * j + which])
                st_global_f32_if(int32(here & high), int64(to + 32), acc[4 * j + 2 + which])

    return store_float32


def make_stage(first: int, tokens: int, dtype: str) -> Any:
    """f(acc, base, warp, lane): tokens `first` on, rounded, to shared memory: [tokens][64 columns], 16-byte
    units exchanged by the 128-byte swizzle.

    first: a multiple of 16; tokens: a multiple of 8; base: shared address, a multiple of 1024. stmatrix.trans
    turns a matrix of 8 weights x 8 tokens round while it stores it: lanes 8 i to 8 i + 7 say where its 8
    tokens go. In x4 the matrices are (upper, lower 8 rows) x (8 tokens, the next 8), in x2 the last 8 tokens
    alone. Eight tokens of one unit lie in eight different units of banks.
    """
    pairs, odd, at = tokens // 16, tokens % 16 == 8, first // 2
    last = at + 8 * pairs
    pack = make_elements(dtype)[2]
    int32 = cuda.types.int32

    @jit(device=True, forceinline=True)
    def stage(acc: Any, base: Any, warp: Any, lane: Any) -> None:
        row = int32((lane & 7) + ((lane >> 4) & 1) * 8)
        unit = int32(((warp & 3) * 2 + ((lane >> 3) & 1)) ^ (lane & 7))
        to = int32(base + row * TOKEN_BYTES + unit * UNIT)
        for pair in range(pairs):
            stmatrix_x4_trans(
                int32(to + pair * (16 * TOKEN_BYTES)),
                pack(acc[at + 8 * pair], acc[at + 8 * pair + 1]),
                pack(acc[at + 8 * pair + 2], acc[at + 8 * pair + 3]),
                pack(acc[at + 8 * pair + 4], acc[at + 8 * pair + 5]),
                pack(acc[at + 8 * pair + 6], acc[at + 8 * pair + 7]),
            )
        if odd:
            half = int32(base + (lane & 7) * TOKEN_BYTES + unit * UNIT)
            stmatrix_x2_trans(
                int32(half + pairs * (16 * TOKEN_BYTES)),
                pack(acc[last], acc[last + 1]),
                pack(acc[last + 2], acc[last + 3]),
            )

    return stage


def make_send(tokens: int, dtype: str, epilogue: str) -> Any:
    """f(base, member, columns, limit, out, out_stride, residual, residual_stride): staged tokens through
    the epilogue's finish to out, 16 bytes a thread.

    member: thread of the warpgroup; columns: of the product that exist from this warpgroup's first on (a
    multiple of 8; of 16 for silu); limit: how many of the staged tokens exist; out, residual: addresses of
    (first token, first column). Eight threads write a token's 128 bytes side by side; for silu four its 64.
    """
    finish = make_finish(epilogue, dtype)
    silu, residual_added = epilogue == "silu", epilogue == "residual"
    threads_a_token = 4 if silu else 8
    shift, columns_a_thread = (2, 16) if silu else (3, 8)
    at_once = WARPGROUP // threads_a_token
    turns = -(-tokens // at_once)
    held = -(-tokens // STORE_TOKENS) * STORE_TOKENS  # tokens for which there is room
    clamp = turns * at_once > held
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def send(
        base: Any, member: Any, columns: Any, limit: Any, out: Any, out_stride: Any, residual: Any,
        residual_stride: Any,
    ) -> None:  # fmt: skip
        words = cuda.local.array(4, np.int32)
        more = cuda.local.array(4, np.int32)
        mine = int32(member & (threads_a_token - 1))
        for turn in range(turns):
            token = int32((member >> shift) + turn * at_once)
            inside = int32(int32(token < limit) & int32(mine * columns_a_thread < columns))
            line = token
            if clamp:
                line = int32(min(token, int32(held - 1)))
            start = int32(base + line * TOKEN_BYTES)
            if silu:
                ld_shared_v4(words, int32(start + (((2 * mine) ^ (line & 7)) * UNIT)))
                ld_shared_v4(more, int32(start + (((2 * mine + 1) ^ (line & 7)) * UNIT)))
            else:
                ld_shared_v4(words, int32(start + ((mine ^ (line & 7)) * UNIT)))
            if residual_added:
                there = int64(residual + int64(token) * int64(residual_stride) + int64(mine) * UNIT)
                ld_global_v4_if_at(inside, more, 0, there)
            finish(words, more)
            st_global_v4_if_at(
                inside, int64(out + int64(token) * int64(out_stride) + int64(mine) * UNIT), words, 0
            )

    return send


def make_store_staged(
    tokens: int, round_tokens: int, dtype: str, epilogue: str, stress: bool, mutant: str
) -> Any:
    """f(acc, base, consumer, columns, limit, out, out_stride, residual, residual_stride): a warpgroup's
    64 columns of all tokens of a tile, round_tokens at a time; arguments as in make_send.

    Named barrier 1 + consumer keeps a round apart from the one before it, and storing from staging.
    """
    pause, handed = make_stress(stress), mutant != "no_barrier"
    int32, int64 = cuda.types.int32, cuda.types.int64

    def round_from(first: int) -> Any:
        """The rounds from token `first` on, one in another: each has its own registers for constants."""
        now = min(round_tokens, tokens - first)
        stage, send = make_stage(first, now, dtype), make_send(now, dtype, epilogue)
        more_rounds = first + now < tokens
        after: Any = round_from(first + now) if more_rounds else None

        @jit(device=True, forceinline=True)
        def store_round(
            acc: Any, base: Any, consumer: Any, columns: Any, limit: Any, out: Any, out_stride: Any,
            residual: Any, residual_stride: Any,
        ) -> None:  # fmt: skip
            thread = int32(cuda.threadIdx.x)
            member = int32(thread & 127)
            barrier = int32(consumer + 1)
            named_barrier_sync(barrier, 128)
            pause(int32(3))
            stage(acc, base, int32(thread >> 5), int32(thread & 31))
            if handed:
                named_barrier_sync(barrier, 128)
            left = int32(limit - first)
            here = int64(out + int64(first) * int64(out_stride))
            there = int64(residual + int64(first) * int64(residual_stride))
            send(
                base, member, columns, int32(min(left, int32(now))), here, out_stride, there, residual_stride
            )
            if more_rounds:
                after(acc, base, consumer, columns, limit, out, out_stride, residual, residual_stride)

        return store_round

    return round_from(0)
