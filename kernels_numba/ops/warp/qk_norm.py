"""RMSNorm of every head of q and k, in place, a few lanes a head.

Knows: one kernel and its launch. Refuses to know: positions, layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np

from kernels_numba.checks import check, fail
from kernels_numba.compiler import cuda
from kernels_numba.launch import Kernel, Launch
from kernels_numba.ops.warp.door import (
    HALVES,
    HEAD_DIMS,
    NAMES,
    Plan,
    View,
    count_address,
    packed,
    plan_and_prepare,
    row_bytes,
    view,
    view_count,
    warp_kernel,
)
from kernels_numba.ops.warp.elements import (
    ELEMENTS,
    PACK,
    make_lane_sum,
    make_real_rows,
    make_scale_pack,
    make_sum_of_squares,
)
from kernels_numba.ptx.arith import add_f32, divide_f32, select_i32
from kernels_numba.ptx.griddep import griddep_launch, griddep_wait
from kernels_numba.ptx.packs import ld_global_nc_v4_if_at, ld_global_v4_if_at, st_global_v4_if_at
from kernels_numba.ptx.quotients import sqrt_f32

OP = "qk_norm"
SIGNATURE = "void(int64, int64, int64, int64, int64, int32, int32, int32, int32, int32, float32)"
THREADS = 128
HELD = 3  # heads of which a lane holds a pack at once
HELD_WORDS = 4 * HELD


def make_qk_norm_kernel(head_dim: int, dtype: str, pdl: bool = False) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight for every head of q and k, in place.

    Arguments: q, k: addresses of T[rows, num_q_heads, D], T[rows, num_kv_heads, D]; q_weight, k_weight: of
    T[D]; num_rows: address of i32[1], the real number of rows, or 0; rows; num_q_heads; num_heads: of q and
    k together; q_stride, k_stride: bytes from row to row; eps.
    Who does what: block t takes row t; D / 8 neighbouring lanes take a head, one pack of 8 elements each, and
    1024 / D heads go at once; three such rounds are loaded before the first is computed. Heads count over
    those of q, then those of k. Rows at and past the real number are neither read nor written.
    The order of the sum of squares: a lane's elements ascending, one fma each, then lanes D / 16, ..., 2, 1
    apart. It depends on D alone.
    Dependent launches (pdl): the next launch may begin at once, and this one waits for those before it before
    it reads or writes anything; so it may be anywhere in a chain of them.
    Rounding: as in rms_norm's warp kernel. Registers: 64 at most. No shared memory.
    """
    int32, int64 = cuda.types.int32, cuda.types.int64
    lanes = head_dim // ELEMENTS
    at_once = THREADS // lanes
    width, head_bytes = float(head_dim), head_dim * 2
    real_rows, lane_sum = make_real_rows(), make_lane_sum(lanes)
    sum_of_squares, scale_pack = make_sum_of_squares(dtype), make_scale_pack(dtype)

    def qk_norm(
        q: Any, k: Any, q_weight: Any, k_weight: Any, num_rows: Any, rows: Any, num_q_heads: Any,
        num_heads: Any, q_stride: Any, k_stride: Any, eps: Any,
    ) -> None:  # fmt: skip
        if pdl:
            griddep_launch()
            griddep_wait()
        row = int32(cuda.blockIdx.x)
        if row < real_rows(num_rows, rows):
            thread = int32(cuda.threadIdx.x)
            within = int32(thread & (lanes - 1))
            q_by = cuda.local.array(4, np.int32)
            k_by = cuda.local.array(4, np.int32)
            by = cuda.local.array(4, np.int32)
            words = cuda.local.array(HELD_WORDS, np.int32)
            ld_global_nc_v4_if_at(1, q_by, 0, int64(q_weight + int64(within) * PACK))
            ld_global_nc_v4_if_at(1, k_by, 0, int64(k_weight + int64(within) * PACK))
            q_at = int64(q + int64(row) * int64(q_stride) + int64(within) * PACK)
            k_at = int64(k + int64(row) * int64(k_stride) + int64(within) * PACK)
            k_at = int64(k_at - int64(num_q_heads) * head_bytes)  # so that heads count on from those of q
            first = int32(thread // lanes)
            base = int32(0)
            while base < num_heads:
                for i in range(HELD):
                    head = int32(base + first + i * at_once)
                    at = int64(k_at + int64(head < num_q_heads) * (q_at - k_at) + int64(head) * head_bytes)
                    ld_global_v4_if_at(int32(head < num_heads), words, 4 * i, at)
                for i in range(HELD):
                    head = int32(base + first + i * at_once)
                    of_q = int32(head < num_q_heads)
                    for word in range(4):
                        by[word] = select_i32(of_q, q_by[word], k_by[word])
                    total = lane_sum(sum_of_squares(words, 4 * i, np.float32(0)))
                    mean = divide_f32(total, np.float32(width))
                    scale = divide_f32(np.float32(1), sqrt_f32(add_f32(mean, eps)))
                    scale_pack(words, 4 * i, scale, by, 0)
                    at = int64(k_at + int64(of_q) * (q_at - k_at) + int64(head) * head_bytes)
                    st_global_v4_if_at(int32(head < num_heads), at, words, 4 * i)
                base = int32(base + HELD * at_once)

    return qk_norm


@cache
def qk_norm_kernel(head_dim: int, dtype: str, pdl: bool) -> Kernel:
    """The kernel of one specialisation, compiled when first launched."""
    name = f"qk_norm_warp_d{head_dim}_{dtype}"
    return warp_kernel(name, make_qk_norm_kernel, (head_dim, dtype), SIGNATURE, THREADS, pdl)


def kernels() -> Iterator[Kernel]:
    """Every kernel that an engine in bfloat16 can pick, for building them ahead."""
    for pdl in (False, True):
        for head_dim in HEAD_DIMS:
            yield qk_norm_kernel(head_dim, "bfloat16", pdl)


def plan_qk_norm(
    q: View, k: View, q_weight: View, k_weight: View, num_rows: View | None, eps: float, pdl: bool = False
) -> Plan | None:
    """The launch for these operands; None for nothing to do.

    q T[rows, Hq, D], k T[rows, Hkv, D], weights T[D], T bfloat16 bits or float16, D 64, 128 or 256; rows of q
    and k may be cut from wider ones. ValueError names what is wrong.
    """
    check(OP, "q", q, HALVES, (None, None, None), rows=1)
    rows, num_q_heads, head_dim = q.shape
    check(OP, "k", k, (q.dtype,), (rows, None, head_dim), rows=1)
    check(OP, "q_weight", q_weight, (q.dtype,), (head_dim,))
    check(OP, "k_weight", k_weight, (q.dtype,), (head_dim,))
    if not eps >= 0:
        fail(OP, "eps", f"is {eps!r}", "a number of at least 0")
    if head_dim not in HEAD_DIMS:
        fail(OP, "q.shape[2]", f"is {head_dim}", f"head_dim {' or '.join(map(str, HEAD_DIMS))}")
    num_heads = num_q_heads + k.shape[1]
    if rows * num_heads == 0:
        return None
    at = [packed(OP, name, one, rows=1) for name, one in (("q", q), ("k", k))]
    at += [packed(OP, name, one) for name, one in (("q_weight", q_weight), ("k_weight", k_weight))]
    arguments = (
        *at, count_address(OP, num_rows), rows, num_q_heads, num_heads, row_bytes(q), row_bytes(k), eps,
    )  # fmt: skip
    return Plan(qk_norm_kernel(head_dim, NAMES[q.dtype], pdl), rows, arguments)


@lru_cache(maxsize=4096)
def prepared(
    q: View, k: View, q_weight: View, k_weight: View, num_rows: View | None, eps: float
) -> Launch | None:
    """plan_qk_norm's launch, ready to be repeated. ValueError on a GPU that is too old."""
    return plan_and_prepare(OP, plan_qk_norm, q, k, q_weight, k_weight, num_rows, eps)


def qk_norm_warp(
    q: Any, k: Any, q_weight: Any, k_weight: Any, *, eps: float, stream: Any = None, num_rows: Any = None
) -> None:
    """Rung "warp" of qk_norm; see make_qk_norm_kernel and plan_qk_norm. num_rows: device i32[1]."""
    launch = prepared(
        view(OP, "q", q), view(OP, "k", k), view(OP, "q_weight", q_weight), view(OP, "k_weight", k_weight),
        view_count(OP, num_rows), eps,
    )  # fmt: skip
    if launch is not None:
        launch(stream)
