"""SiLU and multiply between the accumulators of gates and ups, where both are a thread's own.

Rows of weights are gates and ups in turn, 8 of each, and in wgmma's accumulators (ptx/epilogue.py) a thread
holds the same two columns of every group of 8: so a gate and its up are four accumulators apart, and nothing
is exchanged. Knows: one thread's registers. Refuses to know: tiles, where results go.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.compiler import jit
from kernels_numba.ops.gemm_few.epilogue import make_silu_mul_one
from kernels_numba.ops.warp.elements import make_elements

PAIR = 16  # columns: 8 gates, 8 ups


def make_gate(columns: int, dtype: str) -> Any:
    """f(acc): the accumulators f32[columns / 2] of gates and ups become, in acc[: columns / 4], those of
    silu(gate) up, laid out like those of a tile of half the columns; what follows them is spent.

    columns: a multiple of 16. Gates and ups are rounded to dtype first and the result is not, as between a
    gemm, silu_mul's rung "warp" and its rounding. Results go where accumulators have been read.
    """
    if columns % PAIR:
        raise ValueError(f"columns is {columns}; a multiple of {PAIR} is required")
    low, high, pack = make_elements(dtype)
    silu_mul_one = make_silu_mul_one()
    pairs = columns // PAIR

    @jit(device=True, forceinline=True)
    def gate_pairs(acc: Any) -> None:
        for pair in range(pairs):
            for row in range(2):
                at = 8 * pair + 2 * row
                gates = pack(acc[at], acc[at + 1])
                ups = pack(acc[at + 4], acc[at + 5])
                to = 4 * pair + 2 * row
                acc[to] = silu_mul_one(low(gates), low(ups))
                acc[to + 1] = silu_mul_one(high(gates), high(ups))

    return gate_pairs
