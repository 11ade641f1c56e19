"""RMSNorm of every head of queries and keys, in place, before they are rotated.

Source: Qwen3 (transformers, modeling_qwen3.py): one weight for all heads of q, one for all heads of k; the
norm is that of rms_norm.py, of width head_dim. Knows: heads of packed tokens. Refuses to know: positions,
layers.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, check_aligned, fail
from kernels_numba.compiler import SIMULATOR, cuda, element, element_name, jit
from kernels_numba.cost import ITEMSIZE, Cost
from kernels_numba.ops.rms_norm import rms_norm_spec
from kernels_numba.registry import Rung, make_register

OP = "qk_norm"
THREADS = 2 if SIMULATOR else 64  # a power of two: the reduction halves it


def qk_norm_spec(q: Any, k: Any, q_weight: Any, k_weight: Any, *, eps: float) -> tuple[Any, Any]:
    """x / sqrt(mean(x**2) + eps) * weight along head_dim: q[T, Hq, D], k[T, Hkv, D], weights[D] -> (q', k')
    float32."""
    return rms_norm_spec(q, q_weight, eps=eps), rms_norm_spec(k, k_weight, eps=eps)


def qk_norm_cost(
    num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: str = "bfloat16"
) -> Cost:
    """q and k read and written, both weights read once; 4 operations an element (square and add, scale,
    weight) and 4 a head (mean, eps, root, reciprocal)."""
    heads = num_tokens * (num_q_heads + num_kv_heads)
    moved = 2 * heads * head_dim + (2 * head_dim if num_tokens else 0)
    return Cost(bytes=moved * ITEMSIZE[dtype], flops=4 * heads * head_dim + 4 * heads)


@cache
def make_qk_norm_kernel(head_dim: int, dtype: str, threads: int = THREADS) -> Any:
    """x / sqrt(mean(x**2) + eps) * weight for one head of one token a block, in place.

    Arguments: q T[num_tokens, num_q_heads, D], k T[num_tokens, num_kv_heads, D], q_weight, k_weight T[D],
    eps f32.
    Who does what: block (t, h) takes head h of token t; heads number over those of q, then those of k. Thread
    i owns the columns i, i + threads, ...: it squares and sums them in that order, then a tree halves
    `threads` partial sums. So the order depends on head_dim alone.
    Shared memory: f32[threads] partial sums. Barriers: one hands the partials to each level of the tree.
    """
    to_float, from_float = element(dtype).to_float, element(dtype).from_float

    @jit(device=True)
    def norm(x: Any, weight: Any, eps: Any, token: Any, head: Any, s_partial: Any) -> None:
        thread = cuda.threadIdx.x
        total = np.float32(0)
        for column in range(thread, head_dim, threads):
            value = to_float(x[token, head, column])
            total = cuda.fma(value, value, total)
        s_partial[thread] = total
        cuda.syncthreads()
        half = threads // 2
        while half > 0:
            if thread < half:
                s_partial[thread] = s_partial[thread] + s_partial[thread + half]
            cuda.syncthreads()
            half = half // 2
        mean = s_partial[0] / np.float32(head_dim)
        scale = np.float32(1) / np.float32(math.sqrt(mean + eps))
        for column in range(thread, head_dim, threads):
            value = to_float(x[token, head, column])
            x[token, head, column] = from_float(value * scale * to_float(weight[column]))

    @jit()
    def qk_norm_kernel(q: Any, k: Any, q_weight: Any, k_weight: Any, eps: Any) -> None:
        s_partial = cuda.shared.array(threads, np.float32)
        token = cuda.blockIdx.x
        head = cuda.blockIdx.y
        if head < q.shape[1]:  # the same for the whole block, so the barriers meet every thread
            norm(q, q_weight, eps, token, head, s_partial)
        else:
            norm(k, k_weight, eps, token, head - q.shape[1], s_partial)

    return qk_norm_kernel


def _check(kind: type[Host], q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float) -> None:
    dtypes = kind.elements(OP, "q", q)
    check(OP, "q", q, dtypes, (None, None, None), rows=1)
    tokens, _, head_dim = q.shape
    check(OP, "k", k, dtypes, (tokens, None, head_dim), rows=1)
    check(OP, "q_weight", q_weight, dtypes, (head_dim,))
    check(OP, "k_weight", k_weight, dtypes, (head_dim,))
    if not eps >= 0:
        fail(OP, "eps", f"is {eps!r}", "a number of at least 0")


def qk_norm_reference(
    q: Any, k: Any, q_weight: Any, k_weight: Any, *, eps: float, stream: Any = None
) -> None:
    """Rung "reference": numpy; norms q and k in place (rounded to their dtype)."""
    _check(Host, q, k, q_weight, k_weight, eps)
    for x, weight in ((q, q_weight), (k, k_weight)):
        x[...] = rms_norm_spec(x, weight, eps=eps)


def qk_norm(q: Any, k: Any, q_weight: Any, k_weight: Any, *, eps: float, stream: Any = None) -> None:
    """Rung "plain": launch the kernel on `stream`. ValueError for wrong dtypes, shapes, strides, eps."""
    _check(Device, q, k, q_weight, k_weight, eps)
    check_aligned(OP, "q_weight", q_weight)
    check_aligned(OP, "k_weight", k_weight)
    tokens, num_q_heads, head_dim = q.shape
    heads = num_q_heads + k.shape[1]
    if tokens * heads * head_dim == 0:
        return
    kernel = make_qk_norm_kernel(head_dim, element_name(q))
    kernel[(tokens, heads), THREADS, stream or 0](q, k, q_weight, k_weight, np.float32(eps))


def qk_norm_warp(
    q: Any, k: Any, q_weight: Any, k_weight: Any, *, eps: float, stream: Any = None, num_rows: Any = None
) -> None:
    """Rung "warp" (sm_80 and newer): 16 bytes a lane; see warp/qk_norm.py, which is imported
    when first used. num_rows: device i32[1], the real number of rows; those from there on are left alone."""
    from kernels_numba.ops.warp.qk_norm import qk_norm_warp

    qk_norm_warp(q, k, q_weight, k_weight, eps=eps, stream=stream, num_rows=num_rows)


CASES: dict[str, dict[str, Any]] = {
    "toy": {"num_tokens": 3, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 5},
    "toy_wide": {"num_tokens": 1, "num_q_heads": 1, "num_kv_heads": 2, "head_dim": 8},
    "toy_empty": {"num_tokens": 0, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 4},
    "qwen3_0_6b_prefill": {"num_tokens": 300, "num_q_heads": 16, "num_kv_heads": 8, "head_dim": 128},
    "qwen3_8b_decode": {"num_tokens": 64, "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    "odd_head_dim": {"num_tokens": 7, "num_q_heads": 3, "num_kv_heads": 1, "head_dim": 77},
}
rungs: dict[str, Rung] = {"reference": qk_norm_reference, "plain": qk_norm, "warp": qk_norm_warp}
register = make_register(OP, rungs)
