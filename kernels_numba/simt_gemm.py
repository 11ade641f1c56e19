"""A warp-specialised product of two tiles in shared memory on simt_warpgroups.py, without a GPU.

A wgmma of two shared operands is made when its group is waited for, from what shared memory holds then: so a
stage handed back too early shows. Until no group is pending its accumulators are NaN. Its rounding is
attention_contract.steps': 16 of K exactly, then one rounding. Knows: the instructions of ops/gemm_few.
Refuses to know: what simt_warps.py refuses to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba.attention_contract import steps
from kernels_numba.layouts import swizzled_image
from kernels_numba.simt import Array, to_float
from kernels_numba.simt_rows import RowWarp
from kernels_numba.simt_warpgroups import GroupWarp
from kernels_numba.simt_warps import WARP

ROWS = 16  # of a warpgroup's 64, in one warp


class GemmWarp(GroupWarp, RowWarp):
    """One warp of a block whose warpgroups multiply."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sums: Array | None = None  # of the accumulators that are in flight, [16, n]

    # wgmma.py

    def operand(self, address: int, lines: int, dtype: str, k: int) -> Array:
        """float32[lines, k] of swizzled 128-byte lines."""
        words = swizzled_image(self.shared(address, lines * 128)).view(np.uint16)
        values = to_float(words) if dtype == "bfloat16" else words.view(np.float16).astype(np.float32)
        return np.asarray(values).reshape(lines, 64)[:, :k]

    def make_wgmma(  # type: ignore[override]
        self, n: int, k_steps: int = 4, dtype: str = "bfloat16", wait: int | None = None
    ) -> Callable[..., None]:
        k, mine = 16 * k_steps, ROWS * 128 * (self.warp % 4)

        def wgmma(acc: Array, a: int, b: int, scale_d: Any) -> None:
            if self.sums is None:
                self.sums = acc.reshape(n // 8, 2, 2, 8, 4).transpose(1, 3, 0, 4, 2).reshape(ROWS, n).copy()
            fresh = not self.one(scale_d)

            def finish() -> None:
                before = np.zeros((ROWS, n), np.float32) if fresh else self.sums
                left = self.operand(a + mine, ROWS, dtype, k)
                self.sums = steps(before, left, self.operand(b, n, dtype, k).T)

            acc[...] = np.nan
            self.products.append(finish)
            if wait is not None:
                self.make_wgmma_wait(n, wait)(acc)

        return wgmma

    def make_wgmma_wait(self, n: int, pending: int = 0) -> Callable[[Array], None]:
        def wait(acc: Array) -> None:
            while len(self.products) > pending:
                self.products.pop(0)()
            if not self.products and self.sums is not None:
                sums, self.sums = self.sums, None
                acc[...] = sums.reshape(2, 8, n // 8, 4, 2).transpose(2, 0, 4, 1, 3).reshape(n // 2, WARP)

        return wait

    # control.py, policy.py, tma.py, matrix.py

    def elect_one(self) -> int:
        return 1

    def policy_evict_last(self) -> int:
        return 0

    policy_evict_normal = policy_evict_last

    def tma_load_2d_hint(self, dst: Any, tensor_map: int, bar: Any, x: Any, y: Any, policy: Any) -> None:
        self.tma_load_2d(dst, tensor_map, bar, x, y)

    def _stmatrix_trans(self, address: Any, *registers: Any) -> None:
        """Register i of lane l: elements [2 (l % 4), l / 4] and the one below of the matrix whose row r is
        stored at the address of lane 8 i + r (PTX ISA, "stmatrix", .trans)."""
        at = self.per_thread(address)
        for number, values in enumerate(registers):
            words = np.ascontiguousarray(self.per_thread(values)).astype(np.int32)
            halves = words.view(np.uint16).reshape(8, 4, 2)  # column, row pair, which of the two
            for row in range(8):
                line = np.ascontiguousarray(halves[:, row // 2, row % 2])
                self.shared(at[8 * number + row], 16)[:] = line.view(np.uint8)

    stmatrix_x2_trans = stmatrix_x4_trans = _stmatrix_trans
