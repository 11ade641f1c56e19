"""Linear layer for few tokens on Hopper: weights as wgmma's rows, tokens as its columns.

With M from 1 to some hundred the time is that of reading the weights: 2 N K bytes at 3 TB/s. So a tile is 64
or 128 rows of weights and all tokens, 8 to 256; half or all of an SM's shared memory is stages of weights on
their way. config.py says which tile, kernel.py how, epilogue.py what is done to the product on its way out
(bias, residual, SiLU), in_numpy.py runs the kernel's text without a GPU. The order of additions is that of
the kernel for many tokens (gemm/hopper.py), so its bits are, too: K in steps of 64 upward from 0, then the
bias.

Rung "hopper" of gemm and gemm_silu_mul takes it where config.py's use_few says so (gemm/on_hopper.py), and so
does rung "warp" of lm_head. gemv.py is what is faster, or not, where one token's bits need not be those it
has in company. Knows: definitions. Refuses to know: what a token belongs to.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.cost import ITEMSIZE, Cost
from kernels_numba.ops.gemm import gemm_cost, gemm_spec
from kernels_numba.ops.silu_mul import silu_mul_cost, silu_mul_spec


def gemm_few_spec(
    x: Any, weight: Any, bias: Any = None, *, residual: Any = None, activation: str = ""
) -> Any:
    """x[T, K], weight[N, K], bias[N] or None -> float32[T, N]; with residual[T, N] the sum of residual and
    the product, rounded to residual's dtype between; with activation "silu" float32[T, N / 2], the product
    rounded to x's dtype between."""
    product = gemm_spec(x, weight, bias, residual)
    return silu_mul_spec(product.astype(x.dtype)) if activation == "silu" else product


def gemm_few_cost(
    m: int, n: int, k: int, bias: bool = False, out_dtype: str = "", epilogue: str = "",
    dtype: str = "bfloat16",
) -> Cost:  # fmt: skip
    """gemm_cost, a residual's too; of "silu" half the writing and silu_mul's operations."""
    cost = gemm_cost(m, n, k, bias, dtype, out_dtype, epilogue == "residual")
    if epilogue == "silu":
        return cost + Cost(-(m * n // 2) * ITEMSIZE[dtype], silu_mul_cost(m, n // 2, dtype).flops)
    return cost


def gemm_few(out: Any, x: Any, weight: Any, bias: Any = None, **how: Any) -> None:
    """Launch it; see hopper.py, which is imported when first used."""
    from kernels_numba.ops.gemm_few import hopper

    hopper.gemm_few(out, x, weight, bias, **how)
