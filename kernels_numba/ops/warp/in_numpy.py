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
    """Numpy arrays by address. real_rows: put only that many rows of what has rows, so that any access to
    the others fails, while the views speak of all."""

    def __init__(self) -> None:
        self.memory = simt.Memory()

    def view(self, array: Any, real_rows: int | None = None) -> View:
        """The View of an array whose rows (first axis) may be cut from wider ones; later axes are contiguous.
        bfloat16 becomes bits."""
        bits = array.view(np.uint16) if array.dtype.itemsize == 2 and array.dtype.kind == "V" else array
        kept = bits if real_rows is None else bits[:real_rows]
        flat = kept.reshape(kept.shape[0], -1) if kept.ndim > 1 else kept
        if kept.size and not np.shares_memory(flat, array):
            raise ValueError("only whole rows may be apart")
        start = self.memory.put(flat) if kept.size else 16
        return View(start, bits.shape, bits.strides, bits.dtype)

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
