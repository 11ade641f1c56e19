"""What the tensor-core rungs take: checked once, as addresses, sizes and strides; and which rung runs where.

Knows: dtypes, shapes, strides, alignment, compute capability. Refuses to know: any kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kernels_numba import compiler
from kernels_numba.checks import ALIGNMENT, check, fail
from kernels_numba.launch import address

BFLOAT16, FLOAT16, FLOAT32 = np.dtype(np.uint16), np.dtype(np.float16), np.dtype(np.float32)  # bf16 as bits
NAMES: dict[Any, str] = {BFLOAT16: "bfloat16", FLOAT16: "float16", FLOAT32: "float32"}


@dataclass(frozen=True)
class Operands:
    """Device addresses (bias and residual 0 if there is none), sizes, bytes from one row to the next, types
    of x (and of weight, bias and residual) and of out."""

    out: int
    x: int
    weight: int
    bias: int
    m: int
    n: int
    k: int
    out_stride: int
    x_stride: int
    weight_stride: int
    dtype: str
    out_dtype: str
    residual: int = 0
    residual_stride: int = 0


def _matrix(name: str, array: Any, dtypes: Any, shape: tuple[int | None, int | None]) -> tuple[int, int]:
    """(address, bytes from row to row). Rows are moved 16 bytes at a time, so they start on multiples of
    16."""
    if not hasattr(array, "__cuda_array_interface__"):
        fail("gemm", name, f"is a {type(array).__name__}", "a device array (cuda.to_device)")
    check("gemm", name, array, dtypes, shape, rows=1)
    rows, cols = array.shape
    if cols == 0 or cols % 8:
        fail(
            "gemm", f"{name}.shape[1]", f"is {cols}", "a positive multiple of 8 (16 bytes are moved at once)"
        )
    item = array.dtype.itemsize
    stride = int(array.strides[0]) if rows > 1 else cols * item
    if stride % ALIGNMENT or stride >= 1 << 31:
        fail("gemm", f"{name}.strides[0]", f"is {stride} bytes", f"a multiple of {ALIGNMENT} below 2**31")
    start = address(array) if rows else 0
    if start % ALIGNMENT:
        fail("gemm", name, f"starts at address {start:#x}", f"a multiple of {ALIGNMENT} bytes")
    return start, stride


def operands(
    out: Any, x: Any, weight: Any, bias: Any = None, inputs: tuple[Any, ...] = (BFLOAT16,),
    residual: Any = None,
) -> Operands:  # fmt: skip
    """Check out O[M, N], x T[M, K], weight T[N, K], bias T[N] or None, residual T[M, N] or None, which may be
    out; T one of `inputs`, O the same or, without a residual, float32.

    N and K are positive multiples of 8, M is 0 or more. ValueError names what is wrong and what is required.
    """
    x_at, x_stride = _matrix("x", x, inputs, (None, None))
    dtypes = (x.dtype,)
    results = (x.dtype, FLOAT32) if residual is None else (x.dtype,)  # a residual stream has x's type
    out_at, out_stride = _matrix("out", out, results, (x.shape[0], None))
    m, n = out.shape
    weight_at, weight_stride = _matrix("weight", weight, dtypes, (n, x.shape[1]))
    bias_at = 0
    if bias is not None:
        check("gemm", "bias", bias, dtypes, (n,))
        bias_at = address(bias)
        if bias_at % 4:
            fail("gemm", "bias", f"starts at address {bias_at:#x}", "a multiple of 4 bytes")
    residual_at = residual_stride = 0
    if residual is not None:
        residual_at, residual_stride = _matrix("residual", residual, dtypes, (m, n))
    return Operands(
        out_at, x_at, weight_at, bias_at, int(m), int(n), int(x.shape[1]),
        out_stride, x_stride, weight_stride, NAMES[x.dtype], NAMES[out.dtype], residual_at, residual_stride,
    )  # fmt: skip


ACTIVATIONS = ("", "silu")


def gated_operands(
    out: Any, x: Any, weight: Any, bias: Any = None, inputs: tuple[Any, ...] = (BFLOAT16,)
) -> Operands:
    """Check operands whose gates and ups, 8 rows of weight[N, K] each in turn, become one column: out is of
    x's type, T[M, N / 2], N / 2 a multiple of 8. n is that of weight. ValueError as operands."""
    check("gemm", "out", out, (x.dtype,), (None, None), rows=1)
    columns = 2 * out.shape[1]
    check("gemm", "weight", weight, (x.dtype,), (columns, None), rows=1)
    given = operands(out, x, weight[: out.shape[1]], None, inputs)
    bias_at = 0
    if bias is not None:
        check("gemm", "bias", bias, (x.dtype,), (columns,))
        bias_at = address(bias)
        if bias_at % 4:
            fail("gemm", "bias", f"starts at address {bias_at:#x}", "a multiple of 4 bytes")
    return replace(given, n=columns, bias=bias_at)


NEEDS = {  # compute capability, whether only of that major, types of x
    "mma_step": ((8, 0), False, ("bfloat16",)),
    "mma_sync": ((8, 0), False, ("bfloat16", "float16")),
    "wgmma": ((9, 0), True, ("bfloat16",)),
    "hopper": ((9, 0), True, ("bfloat16", "float16")),
    "gemv": ((9, 0), True, ("bfloat16", "float16")),
}

BEST = ("hopper", "mma_sync")  # what an engine takes by itself, the fastest first


def _runs_on(rung: str, capability: tuple[int, int]) -> bool:
    lowest, only_major, _ = NEEDS[rung]
    return capability >= lowest and (not only_major or capability[0] == lowest[0])


def refusal(rung: str, capability: tuple[int, int] | None, dtype: str, sizes: Iterable[int]) -> str:
    """Why a rung cannot run products of these N and K in `dtype`, or "" if it can.

    capability: the GPU's, None for the host and numba's simulator. Rungs without needs of their own pass.
    """
    if rung not in NEEDS:
        return ""
    (major, minor), only_major, dtypes = NEEDS[rung]
    if capability is None or not _runs_on(rung, capability):
        have = "no GPU" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
        return (
            f"it needs compute capability {major}.{minor}{'' if only_major else ' or newer'}, here is {have}"
        )
    if dtype not in dtypes:
        return f"it takes {' or '.join(dtypes)}, not {dtype}"
    odd = next((size for size in sizes if size % 8), None)
    return "" if odd is None else f"it takes sizes that are multiples of 8, not {odd}"


def best_rung(default: str, capability: tuple[int, int] | None, dtype: str, sizes: Iterable[int]) -> str:
    """The fastest rung that can run these products: hopper, mma_sync, or else the default."""
    sizes = tuple(sizes)
    fits = (rung for rung in BEST if not refusal(rung, capability, dtype, sizes))
    return next(fits, default)


def require_capability(rung: str) -> None:
    """ValueError unless the current GPU has the compute capability that the rung needs; KernelsUnavailable in
    numba's simulator."""
    if compiler.SIMULATOR:
        raise compiler.KernelsUnavailable(
            f"rung {rung} is made of PTX instructions: it needs numba.cuda's compiler, not its simulator"
        )
    have = tuple(compiler.cuda.get_current_device().compute_capability)
    if not _runs_on(rung, have):
        (major, minor), only_major, _ = NEEDS[rung]
        more = f" (instructions of sm_{major}{minor}a)" if only_major else " or newer"
        called = f"was called on compute capability {have[0]}.{have[1]}"
        fail("gemm", f"rung {rung}", called, f"{major}.{minor}{more}")
