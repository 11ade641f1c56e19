"""The first half of a SwiGLU block: the product with gate and up weights, then the gated activation of it.

Rungs reference and plain are gemm, then silu_mul; the tensor-core rungs do both in one pass and never store
the product, with the bits of the same rung of gemm and rung "warp" of silu_mul. Knows: that order. Refuses to
know: how either is done.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from kernels_numba.checks import Device, Host, check, fail
from kernels_numba.cost import ITEMSIZE, Cost
from kernels_numba.ops.gemm import gemm, gemm_cost, gemm_reference, gemm_spec
from kernels_numba.ops.silu_mul import GROUP, silu_mul, silu_mul_cost, silu_mul_reference, silu_mul_spec
from kernels_numba.registry import Rung, make_register

OP = "gemm_silu_mul"


def gemm_silu_mul_spec(x: Any, weight: Any, gate_up: Any = None) -> Any:
    """silu_mul_spec of gemm_spec(x, weight), rounded to x's dtype between: x[T, K], weight[2I, K] ->
    float32[T, I], I a multiple of 8.

    Rows 16j .. 16j+7 of weight make the gates and 16j+8 .. 16j+15 the ups of the neurons 8j .. 8j+7. gate_up:
    the rungs' room for the product, not looked at.
    """
    return silu_mul_spec(gemm_spec(x, weight).astype(x.dtype))


def gemm_silu_mul_cost(m: int, n: int, k: int, dtype: str = "bfloat16") -> Cost:
    """gemm_cost, but of its n columns half are written, and silu_mul's operations."""
    product, gated = gemm_cost(m, n, k, dtype=dtype), silu_mul_cost(m, n // 2, dtype)
    return Cost(product.bytes - m * (n - n // 2) * ITEMSIZE[dtype], product.flops + gated.flops)


def _check(kind: type[Host], out: Any, x: Any, weight: Any, gate_up: Any) -> None:
    dtypes = kind.elements(OP, "out", out)
    check(OP, "out", out, dtypes, (None, None), rows=1)
    rows, columns = out.shape
    if columns % GROUP:
        fail(OP, "out", f"has {columns} columns", f"a multiple of {GROUP}")
    check(OP, "x", x, dtypes, (rows, None), rows=1)
    check(OP, "weight", weight, dtypes, (2 * columns, x.shape[1]))
    check(OP, "gate_up", gate_up, dtypes, (rows, 2 * columns), rows=1)


def composed(product: Callable[..., None], gate: Callable[..., None], kind: type[Host] | None = None) -> Rung:
    """The rung that is a rung of gemm, then one of silu_mul; it takes num_rows where both do. kind: of
    arrays, all checked before the first is written; None leaves it to the two."""

    def gemm_then_silu_mul(out: Any, x: Any, weight: Any, gate_up: Any, *, stream: Any = None) -> None:
        """gate_up = x @ weight.T, then out of it. ValueError for wrong dtypes, shapes, strides."""
        if kind is not None:
            _check(kind, out, x, weight, gate_up)
        product(gate_up, x, weight, stream=stream)
        gate(out, gate_up, stream=stream)

    def counted(
        out: Any, x: Any, weight: Any, gate_up: Any, *, stream: Any = None, num_rows: Any = None
    ) -> None:
        """The same; num_rows: device i32[1], the real number of rows."""
        product(gate_up, x, weight, stream=stream, num_rows=num_rows)
        gate(out, gate_up, stream=stream, num_rows=num_rows)

    takes_count = all("num_rows" in inspect.signature(rung).parameters for rung in (product, gate))
    return counted if takes_count and kind is None else gemm_then_silu_mul


gemm_silu_mul_reference = composed(gemm_reference, silu_mul_reference, Host)
gemm_silu_mul = composed(gemm, silu_mul, Device)


def gemm_silu_mul_hopper(
    out: Any, x: Any, weight: Any, gate_up: Any = None, *, stream: Any = None, num_rows: Any = None
) -> None:
    """Rung "hopper" (sm_90a): gated between the accumulators of gemm's kernel for few tokens or that for
    many, by what out can hold. gate_up is not used. num_rows: device i32[1], the real number of rows."""
    from kernels_numba.ops.gemm import on_hopper

    on_hopper.gemm_hopper(out, x, weight, activation="silu", stream=stream, num_rows=num_rows)


def gemm_silu_mul_mma_sync(
    out: Any, x: Any, weight: Any, gate_up: Any = None, *, stream: Any = None, num_rows: Any = None
) -> None:
    """Rung "mma_sync" (sm_80 and newer): gated between the accumulators of ops/gemm_mma. gate_up is not used.
    num_rows: device i32[1], the real number of rows."""
    from kernels_numba.ops.gemm_mma import gemm_mma

    gemm_mma(out, x, weight, activation="silu", stream=stream, num_rows=num_rows)


CASES: dict[str, dict[str, Any]] = {
    "toy": {"m": 2, "n": 48, "k": 5},
    "toy_empty": {"m": 0, "n": 16, "k": 8},
    "smollm2_135m_prefill": {"m": 700, "n": 3072, "k": 576},
    "llama32_1b_decode": {"m": 64, "n": 16384, "k": 2048},
}
rungs: dict[str, Rung] = {
    "reference": gemm_silu_mul_reference, "plain": gemm_silu_mul, "mma_sync": gemm_silu_mul_mma_sync,
    "hopper": gemm_silu_mul_hopper,
}  # fmt: skip
FUSED = ("hopper", "mma_sync")  # have the bits of gemm's rung of that name and silu_mul's rung "warp"
register = make_register(OP, rungs)
