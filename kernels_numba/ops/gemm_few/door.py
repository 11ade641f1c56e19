"""What the GEMM for few tokens takes beyond a GEMM's operands: a residual, or an activation.

Knows: dtypes, shapes, strides, alignment, by gemm.door. Refuses to know: any kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernels_numba.checks import fail
from kernels_numba.ops.gemm.door import ACTIVATIONS, BFLOAT16, FLOAT16, Operands, gated_operands, operands

OP = "gemm_few"
INPUTS = (BFLOAT16, FLOAT16)


@dataclass(frozen=True)
class FewOperands:
    """What gemm.door found, where n counts rows of weights; epilogue: of epilogue.EPILOGUES."""

    given: Operands
    epilogue: str = ""


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
        return FewOperands(gated_operands(out, x, weight, bias, INPUTS), "silu")
    given = operands(out, x, weight, bias, INPUTS, residual)
    return FewOperands(given, "residual" if residual is not None else "")


def arguments_of(o: FewOperands, maps: int, num_rows: int) -> tuple[int, ...]:
    """The kernel's arguments; maps, num_rows: addresses, of the tensor maps and of the real M (or 0)."""
    g = o.given
    return maps, g.out, g.bias, g.residual, num_rows, g.m, g.n, g.k, g.out_stride, g.residual_stride
