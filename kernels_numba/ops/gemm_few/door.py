"""What the GEMM for few tokens takes beyond a GEMM's operands: a residual, or an activation.

Knows: dtypes, shapes, strides, alignment, by gemm.door. Refuses to know: any kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kernels_numba.checks import check, fail
from kernels_numba.launch import address
from kernels_numba.ops.gemm.door import BFLOAT16, FLOAT16, Operands, operands

OP = "gemm_few"
INPUTS = (BFLOAT16, FLOAT16)
ACTIVATIONS = ("", "silu")


@dataclass(frozen=True)
class FewOperands:
    """What gemm.door found, where n counts rows of weights; epilogue: of epilogue.EPILOGUES; the residual's
    address and bytes from row to row, 0 without one."""

    given: Operands
    epilogue: str = ""
    residual: int = 0
    residual_stride: int = 0


def _gated(out: Any, x: Any, weight: Any, bias: Any) -> FewOperands:
    """Operands of a product whose gates and ups, 8 rows of weights each in turn, become one column."""
    check(OP, "out", out, (x.dtype,), (None, None), rows=1)
    columns = 2 * out.shape[1]
    check(OP, "weight", weight, (x.dtype,), (columns, None), rows=1)
    given = operands(out, x, weight[: out.shape[1]], None, INPUTS)
    bias_at = 0
    if bias is not None:
        check(OP, "bias", bias, (x.dtype,), (columns,))
        bias_at = address(bias)
        if bias_at % 4:
            fail(OP, "bias", f"starts at address {bias_at:#x}", "a multiple of 4 bytes")
    return FewOperands(replace(given, n=columns, bias=bias_at), "silu")


def few_operands(
    out: Any, x: Any, weight: Any, bias: Any = None, residual: Any = None, activation: str = ""
) -> FewOperands:
    """Check out O[M, N], x T[M, K], weight T[N, K], bias T[N] or None, residual T[M, N] or None; T bfloat16
    bits or float16; O the same, or float32 without residual and activation. activation "silu": out is
    T[M, N / 2], N / 2 a multiple of 8.

    N and K are positive multiples of 8, M is 0 or more. ValueError names what is wrong and what is required.
    """
    if activation not in ACTIVATIONS:
        fail(OP, "activation", f"is {activation!r}", '"" or "silu"')
    if activation and residual is not None:
        fail(OP, "residual", f"is given beside activation {activation!r}", "one of the two")
    if activation:
        return _gated(out, x, weight, bias)
    given = operands(out, x, weight, bias, INPUTS)
    if residual is None:
        return FewOperands(given)
    check(OP, "out", out, (x.dtype,), (None, None), rows=1)
    check(OP, "residual", residual, (x.dtype,), out.shape, rows=1)
    other = operands(residual, x, weight, None, INPUTS)
    return FewOperands(given, "residual", other.out, other.out_stride)


def arguments_of(o: FewOperands, maps: int, num_rows: int) -> tuple[int, ...]:
    """The kernel's arguments; maps, num_rows: addresses, of the tensor maps and of the real M (or 0)."""
    g = o.given
    return maps, g.out, g.bias, o.residual, num_rows, g.m, g.n, g.k, g.out_stride, o.residual_stride
