"""What the tensor-core steps of the ladder take: checked once, as addresses, sizes and strides.

Knows: dtypes, shapes, strides, alignment, compute capability. Refuses to know: any kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels_numba import compiler
from kernels_numba.checks import ALIGNMENT, check, fail
from kernels_numba.launch import address

BFLOAT16 = np.dtype(np.uint16)  # bit patterns
OUTPUTS = {BFLOAT16: "bfloat16", np.dtype(np.float32): "float32"}


@dataclass(frozen=True)
class Operands:
    """Device addresses (bias 0 if there is none), sizes, bytes from one row to the next, type of out."""

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
    out_dtype: str


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


def operands(out: Any, x: Any, weight: Any, bias: Any = None) -> Operands:
    """Check out O[M, N], x bf16[M, K], weight bf16[N, K], bias bf16[N] or None; O bfloat16 or float32.

    N and K are positive multiples of 8, M is 0 or more. ValueError names what is wrong and what is required.
    """
    out_at, out_stride = _matrix("out", out, tuple(OUTPUTS), (None, None))
    m, n = out.shape
    x_at, x_stride = _matrix("x", x, (BFLOAT16,), (m, None))
    weight_at, weight_stride = _matrix("weight", weight, (BFLOAT16,), (n, x.shape[1]))
    bias_at = 0
    if bias is not None:
        check("gemm", "bias", bias, (BFLOAT16,), (n,))
        bias_at = address(bias)
        if bias_at % 4:
            fail("gemm", "bias", f"starts at address {bias_at:#x}", "a multiple of 4 bytes")
    return Operands(
        out_at, x_at, weight_at, bias_at, int(m), int(n), int(x.shape[1]),
        out_stride, x_stride, weight_stride, OUTPUTS[out.dtype],
    )  # fmt: skip


def require_capability(rung: str, lowest: tuple[int, int], only_major: bool = False) -> None:
    """ValueError unless the current GPU has at least this compute capability (only_major: of this major
    alone)."""
    if compiler.SIMULATOR:
        raise compiler.KernelsUnavailable(
            f"rung {rung} is made of PTX instructions: it needs numba.cuda's compiler, not its simulator"
        )
    have = tuple(compiler.cuda.get_current_device().compute_capability)
    if have < lowest or (only_major and have[0] != lowest[0]):
        wanted = f"{lowest[0]}.{lowest[1]}" + (
            f" (instructions of sm_{lowest[0]}{lowest[1]}a)" if only_major else " or newer"
        )
        fail("gemm", f"rung {rung}", f"was called on compute capability {have[0]}.{have[1]}", wanted)
