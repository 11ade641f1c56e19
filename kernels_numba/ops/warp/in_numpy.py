"""The warp kernels on numpy arrays, without a GPU: for reading, breaking and testing them.

A launch is planned by the launchers' own plan_* over addresses of simt.Memory, so host arithmetic is tested
with it. Knows: how arrays become views. Refuses to know: speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba import simt, simt_rows
from kernels_numba.ops.warp.door import Plan, View

PACKAGE = "kernels_numba.ops.warp"


class Arrays:
    """Numpy arrays by address: whatever lies outside of them does not exist, and any access to it fails."""

    def __init__(self) -> None:
        self.memory = simt.Memory()

    def view(self, array: Any, rows: int | None = None) -> View:
        """The View of an array whose rows (first axis) may be cut from wider ones; later axes are contiguous.
        bfloat16 becomes bits. rows: how many the view speaks of, as of a bucket that is not full."""
        bits = array.view(np.uint16) if array.dtype.kind == "V" else array
        start, strides = 16, bits.strides
        if not bits.size:  # numpy gives empty arrays no strides
            strides = np.empty((1, *bits.shape[1:]), bits.dtype).strides
        else:
            flat = bits.reshape(bits.shape[0], -1) if bits.ndim > 1 else bits
            if not np.shares_memory(flat, array):
                raise ValueError("only whole rows may be apart")
            start = self.memory.put(flat)
        shape = bits.shape if rows is None else (rows, *bits.shape[1:])
        return View(start, shape, strides, bits.dtype)

    def run(
        self, module: str, factory: str, plan: Plan | None, *, seed: int = 0,
        change: Callable[[str, str], str] = lambda name, text: text,
    ) -> None:  # fmt: skip
        """Run a planned launch of module's kernel; nothing for None. change: see simt_warps.link."""
        if plan is None:
            return
        names = (f"{PACKAGE}.elements", f"{PACKAGE}.{module}")
        simt_rows.run(
            names, factory, plan.kernel.key, plan.arguments, plan.grid, plan.kernel.threads, self.memory,
            seed, change,
        )  # fmt: skip
