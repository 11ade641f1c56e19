"""Rung "hopper" of gemm: the kernel for few tokens or the one for many, by what a launch can hold.

Knows: that there are two kernels, and who says which is faster (gemm_few/config.py). Refuses to know: either
one's inside. Both add in one order, so no bit tells which it was: a step run eagerly and a graph of its
bucket, which is sized for more tokens and reads the real number when it runs, give the same answer.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.ops.gemm import hopper as many
from kernels_numba.ops.gemm.door import require_capability
from kernels_numba.ops.gemm_few import hopper as few
from kernels_numba.ops.gemm_few.config import use_few


def gemm_hopper(
    out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None, stream: Any = None,
    num_rows: Any = None, activation: str = "",
) -> None:  # fmt: skip
    """out[M, N] = x[M, K] @ weight[N, K]^T (+ bias[N]) on Hopper's tensor cores, accumulated in float32.

    x, weight, bias: bfloat16 (bits as uint16) or float16; out: the same, or float32. N and K are multiples
    of 8. residual T[M, N], which may be out: out = residual + the rounded product, rounded. num_rows: device
    i32[1] with the real M, at most out's rows, read when the kernel runs; rows from there on are not written.
    activation "silu": gates and ups in blocks of 8 rows of weight, out T[M, N / 2], the bits of this and then
    silu_mul's rung "warp". Which kernel runs is decided by out's rows. Weights and num_rows must not be
    written by a launch right before this one. ValueError for wrong dtypes, shapes, strides or alignment, or
    another GPU.
    """
    require_capability("hopper")
    few_enough = False
    if out.ndim == weight.ndim == 2:  # else either kernel's door says what is wrong
        few_enough = use_few(out.shape[0], weight.shape[0], weight.shape[1], many.num_sms())
    launch = few.gemm_few if few_enough else many.gemm_hopper
    more = {"residual": residual, "activation": activation}
    launch(out, x, weight, bias, **more, stream=stream, num_rows=num_rows)
