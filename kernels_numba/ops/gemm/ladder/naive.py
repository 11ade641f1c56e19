"""GEMM, step 1: one thread, one output, straight from global memory.

Knows: the formula. Refuses to know: that its neighbours read the same numbers; every operand crosses from
memory (or the caches, if they are kind) once for each output it is part of.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.checks import Device, check_aligned
from kernels_numba.compiler import cuda, element, element_name, jit
from kernels_numba.ops.gemm import check_operands

THREADS_N, THREADS_M = 32, 8  # a block's outputs: 8 rows of 32 columns


@cache
def make_naive_kernel(dtype: str, has_bias: bool, has_residual: bool = False) -> Any:
    """out[m, n] = sum over k ascending of x[m, k] weight[n, k], one fma a step from 0 (+ bias[n]), rounded
    once; with has_residual, residual[m, n] + that, rounded.

    Arguments: out T[M, N], x T[M, K], weight T[N, K], bias T[N] (weight again if unused), residual T[M, N],
    which may be out (x again if unused).
    Who does what: the thread at (n, m) of the whole grid makes out[m, n]; threads past the edge make nothing.
    The 32 threads of a warp share m: they read one x value together and 32 weights that lie K apart, so each
    load of a warp touches 32 lines of memory for 2 bytes of each. No shared memory, no barrier.
    """
    to_float, from_float = element(dtype).to_float, element(dtype).from_float

    @jit()
    def naive_kernel(out: Any, x: Any, weight: Any, bias: Any, residual: Any) -> None:
        n, m = cuda.grid(2)
        if m < out.shape[0] and n < out.shape[1]:
            acc = np.float32(0)
            for k in range(x.shape[1]):
                acc = cuda.fma(to_float(x[m, k]), to_float(weight[n, k]), acc)
            if has_bias:
                acc += to_float(bias[n])
            if has_residual:
                acc = to_float(residual[m, n]) + to_float(from_float(acc))
            out[m, n] = from_float(acc)

    return naive_kernel


def gemm_naive(
    out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None, stream: Any = None
) -> None:
    """Rung "naive": out T[M, N] = x T[M, K] @ weight T[N, K]^T (+ bias T[N]), float32 or bfloat16 bits as
    uint16; with residual T[M, N], which may be out, residual + that.

    The same bits as rung "plain". ValueError for wrong dtypes, shapes, strides or alignment.
    """
    check_operands(Device, out, x, weight, bias, residual)
    check_aligned("gemm", "weight", weight)
    if out.size == 0:
        return
    kernel = make_naive_kernel(element_name(out), bias is not None, residual is not None)
    grid = (-(-out.shape[1] // THREADS_N), -(-out.shape[0] // THREADS_M))
    unused = weight if bias is None else bias, x if residual is None else residual
    kernel[grid, (THREADS_N, THREADS_M), stream or 0](out, x, weight, *unused)
