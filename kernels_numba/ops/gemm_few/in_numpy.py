"""The GEMM for few tokens on numpy arrays, without a GPU: for reading, breaking and testing it.

Knows: what the launcher passes. Refuses to know: speed (a step of a tile takes about a millisecond).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba import simt, simt_warps
from kernels_numba.ops.gemm.boxes import MAP_BYTES, heights
from kernels_numba.ops.gemm_few.config import PRODUCT, TILE_K, Build, FewConfig, smem_plan
from kernels_numba.ops.gemm_few.door import arguments_of, few_operands
from kernels_numba.simt_gemm import GemmWarp

ELEMENTS = "kernels_numba.ops.warp.elements"
PACKAGE = "kernels_numba.ops.gemm_few"
MODULES = (
    ELEMENTS,
    "kernels_numba.ops.gemm.boxes",
    *(f"{PACKAGE}.{part}" for part in ("epilogue", "store", "kernel")),
)
MAPS = 1 << 10  # stands for the address of the tensor maps


class Placed:
    """A numpy array at an address of simt.Memory, with what a door reads of a device array."""

    def __init__(self, array: Any, start: int) -> None:
        self.array, self.start = array, start
        self.shape, self.ndim, self.dtype, self.strides = array.shape, array.ndim, array.dtype, array.strides

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"data": (self.start, False)}

    def __getitem__(self, rows: slice) -> Placed:
        return Placed(self.array[rows], self.start + (rows.start or 0) * self.strides[0])


def in_numpy(
    config: FewConfig, out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None,
    activation: str = "", num_rows: Any = None, grid: int = 2, seed: int = 0, build: Build = PRODUCT,
    change: Callable[[str, str], str] = lambda name, text: text,
) -> None:  # fmt: skip
    """out as gemm_few() would leave it, by the kernel's text on `grid` blocks.

    Arrays as gemm_few() takes them, but numpy's; rows may be cut from wider ones. seed: of the order in which
    warps go on; change: see simt_warps.link. ValueError for what the door refuses, IndexError where the
    kernel leaves an array, simt_turns.Stuck where it would hang.
    """
    memory = simt.Memory()

    def placed(array: Any) -> Any:
        return None if array is None else Placed(array, memory.put(array))

    o = few_operands(placed(out), placed(x), placed(weight), placed(bias), placed(residual), activation)
    bits = [array.view(np.uint16) for array in (weight, x)]
    boxes = [
        (matrix, (height, TILE_K))
        for matrix, tile in zip(bits, (config.tile_n, config.tile_t), strict=True)
        for height in heights(len(matrix), tile)
    ]
    maps = {MAPS + MAP_BYTES * i: box for i, box in enumerate(boxes)}
    specialised = (config, o.given.dtype, o.given.out_dtype, o.epilogue, bias is not None, build)
    simt_warps.run(
        MODULES, "make_gemm_few_kernel", specialised,
        arguments_of(o, MAPS, 0 if num_rows is None else memory.put(num_rows)), grid, config.threads,
        smem_plan(config).bytes, memory, maps, seed, change, GemmWarp,
    )  # fmt: skip
