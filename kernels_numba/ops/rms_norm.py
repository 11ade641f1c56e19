"""RMSNorm, with the residual addition that comes before it in a transformer layer.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv 1910.07467), with eps inside
the root. Knows: rows of activations. Refuses to know: which layer they belong to.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, check_aligned, fail
from kernels_numba.compiler import SIMULATOR, cuda, element, element_name, jit
from kernels_numba.cost import ITEMSIZE, Cost
from kernels_numba.registry import Rung, make_register
from kernels_numba.wide import wide

THREADS = 4 if SIMULATOR else 128  # a power of two: the reduction halves it


def rms_norm_spec(x: Any, weight: Any, *, eps: float, residual: Any = None) -> Any:
    """out = x / sqrt(mean(x**2) + eps) * weight along the last axis: x[T, H], weight[H] -> float32[T, H].

    With residual[T, H]: returns (out, residual + x), where the sum is rounded to residual's dtype once and
    the norm reads the rounded value. All sums in float32.
    """
    x = np.asarray(x)
    summed = None
    if residual is not None:
        residual = np.asarray(residual)
        summed = (wide(residual) + wide(x)).astype(residual.dtype)
        x = summed
    x = wide(x)
    out = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * wide(weight)
    return out if summed is None else (out, summed)


def rms_norm_cost(num_tokens: int, hidden_size: int, residual: bool = False, dtype: str = "bfloat16") -> Cost:
    """x read, out written (with residual: also read and written), weight read once; 4 operations an element
    (square and add, scale, weight; with residual 1 more) and 4 a row (mean, eps, root, reciprocal)."""
    elements = num_tokens * hidden_size
    moved = (4 if residual else 2) * elements + (hidden_size if num_tokens else 0)
    return Cost(bytes=moved * ITEMSIZE[dtype], flops=(5 if residual else 4) * elements + 4 * num_tokens)


@cache
def make_rms_norm_kernel(dtype: str, has_residual: bool, threads: int = THREADS) -> Any:
    """out = x / sqrt(mean(x**2) + eps) * weight, one block a row.

    Arguments: out, x T[num_tokens, hidden], weight T[hidden], residual T[num_tokens, hidden] (x again if
    unused), eps f32.
    Who does what: thread i owns the columns i, i + threads, ...; it adds the residual, squares and sums them
    in that order; then a tree halves `threads` partial sums. So the order depends on the hidden size alone.
    Shared memory: f32[threads] partial sums. Barriers: one hands the partials to each level of the tree.
    `out` may be `x`: a thread reads only columns that it alone writes.
    """
    to_float, from_float = element(dtype).to_float, element(dtype).from_float

    def plain_value(x: Any, residual: Any, row: Any, column: Any) -> Any:
        return to_float(x[row, column])

    def residual_value(x: Any, residual: Any, row: Any, column: Any) -> Any:
        rounded = from_float(to_float(residual[row, column]) + to_float(x[row, column]))
        residual[row, column] = rounded
        return to_float(rounded)

    def plain_again(x: Any, residual: Any, row: Any, column: Any) -> Any:
        return to_float(x[row, column])

    def residual_again(x: Any, residual: Any, row: Any, column: Any) -> Any:
        return to_float(residual[row, column])

    first_read = jit(device=True)(residual_value if has_residual else plain_value)
    second_read = jit(device=True)(residual_again if has_residual else plain_again)

    @jit()
    def rms_norm_kernel(out: Any, x: Any, weight: Any, residual: Any, eps: Any) -> None:
        s_partial = cuda.shared.array(threads, np.float32)
        row = cuda.blockIdx.x
        thread = cuda.threadIdx.x
        hidden = x.shape[1]
        total = np.float32(0)
        for column in range(thread, hidden, threads):
            value = first_read(x, residual, row, column)
            total = cuda.fma(value, value, total)
        s_partial[thread] = total
        cuda.syncthreads()
        half = threads // 2
        while half > 0:
            if thread < half:
                s_partial[thread] = s_partial[thread] + s_partial[thread + half]
            cuda.syncthreads()
            half = half // 2
        mean = s_partial[0] / np.float32(hidden)
        scale = np.float32(1) / np.float32(math.sqrt(mean + eps))
        for column in range(thread, hidden, threads):
            value = second_read(x, residual, row, column)
            out[row, column] = from_float(value * scale * to_float(weight[column]))

    return rms_norm_kernel


def _check(kind: type[Host], out: Any, x: Any, weight: Any, eps: float, residual: Any) -> None:
    dtypes = kind.elements("rms_norm", "out", out)
    check("rms_norm", "out", out, dtypes, (None, None), rows=1)
    check("rms_norm", "x", x, dtypes, out.shape, rows=1)
    check("rms_norm", "weight", weight, dtypes, (out.shape[1],))
    if residual is not None:
        check("rms_norm", "residual", residual, dtypes, out.shape, rows=1)
    if not eps >= 0:
        fail("rms_norm", "eps", f"is {eps!r}", "a number of at least 0")


def rms_norm_reference(
    out: Any, x: Any, weight: Any, *, eps: float, residual: Any = None, stream: Any = None
) -> None:
    """Rung "reference": numpy in few calls; adds into `residual` and writes `out`, both caller-owned."""
    _check(Host, out, x, weight, eps, residual)
    if not (out.dtype == x.dtype == weight.dtype == np.float32):  # rounded element types take the long way
        result = rms_norm_spec(x, weight, eps=eps, residual=residual)
        if residual is not None:
            result, residual[...] = result
        out[...] = result
        return
    if residual is not None:
        np.add(residual, x, out=residual)
        x = residual
    scale = np.einsum("th,th->t", x, x)
    scale /= np.float32(max(x.shape[1], 1))
    scale += np.float32(eps)
    np.sqrt(scale, out=scale)
    np.divide(np.float32(1), scale, out=scale)
    np.multiply(x, scale[:, None], out=out)
    np.multiply(out, weight, out=out)


def rms_norm(out: Any, x: Any, weight: Any, *, eps: float, residual: Any = None, stream: Any = None) -> None:
    """Rung "plain": launch the kernel on `stream`. ValueError for wrong dtypes, shapes, strides, eps."""
    _check(Device, out, x, weight, eps, residual)
    check_aligned("rms_norm", "weight", weight)
    if out.size == 0:
        return
    kernel = make_rms_norm_kernel(element_name(out), residual is not None)
    unused = x if residual is None else residual
    kernel[out.shape[0], THREADS, stream or 0](out, x, weight, unused, np.float32(eps))


def rms_norm_warp(
    out: Any, x: Any, weight: Any, *, eps: float, residual: Any = None, stream: Any = None,
    num_rows: Any = None,
) -> None:  # fmt: skip
    """Rung "warp" (sm_80 and newer): 16 bytes a lane, a block a row; see warp/rms_norm.py, which is imported
    when first used. num_rows: device i32[1], the real number of rows; those from there on are left alone."""
    from kernels_numba.ops.warp.rms_norm import rms_norm_warp

    rms_norm_warp(out, x, weight, eps=eps, residual=residual, stream=stream, num_rows=num_rows)


CASES: dict[str, dict[str, Any]] = {
    "toy": {"num_tokens": 3, "hidden_size": 13, "residual": False},
    "toy_residual": {"num_tokens": 2, "hidden_size": 8, "residual": True},
    "toy_one_column": {"num_tokens": 2, "hidden_size": 1, "residual": False},
    "toy_empty": {"num_tokens": 0, "hidden_size": 8, "residual": True},
    "smollm2_135m_prefill": {"num_tokens": 1000, "hidden_size": 576, "residual": True},
    "llama3_8b_decode": {"num_tokens": 64, "hidden_size": 4096, "residual": True},
    "odd_hidden": {"num_tokens": 5, "hidden_size": 1027, "residual": False},
}
rungs: dict[str, Rung] = {"reference": rms_norm_reference, "plain": rms_norm, "warp": rms_norm_warp}
register = make_register("rms_norm", rungs)
