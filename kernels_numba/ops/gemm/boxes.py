"""Boxes of the copy engine that end where a matrix ends: one tensor map for whole tiles, one for the last.

A row of a box that lies past a matrix's end is filled with zeros, which takes the copy engine 1.7 ns, and 64
of them longer than a step of K of a whole tile (measured on an H100, notebooks/LOG.md). So the last tile has
a map of its own, whose boxes are as high as what is left of the matrix. What they do not fill in shared
memory is left over from other tiles, or from other kernels: rows of results that nobody stores come of it.
Knows: rows and tiles. Refuses to know: columns, which are steps of K.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.gemm.hopper_config import TILE_K
from kernels_numba.ptx.tma import encode_tensor_map

MAP_BYTES = 128
MAPS = 2  # of a matrix: of whole tiles, then of the last one


def heights(rows: int, tile: int) -> tuple[int, int]:
    """Rows of a box of a whole tile, and of the last tile's; the same where the tiles fill the matrix."""
    whole = min(rows, tile)
    return whole, rows % tile or whole


def encode_boxes(
    pointer: int, dtype: str, shape: tuple[int, int], stride: int, tile: int, parts: int = 1
) -> npt.NDArray[np.uint64]:
    """Tensor maps u64[MAPS, 16] of a matrix of `shape`, `stride` bytes from row to row, read in tiles of
    `tile` rows and TILE_K columns, each in `parts` boxes. ValueError, RuntimeError as encode_tensor_map."""
    return np.stack([
        encode_tensor_map(pointer, dtype, shape, (stride,), (-(-height // parts), TILE_K))
        for height in heights(shape[0], tile)
    ])  # fmt: skip


def make_box_at(tile: int) -> Any:
    """f(at, rows) -> (rows of the box, bytes from the first map to its own) of the tile that begins at row
    `at` of a matrix of `rows`; at < rows."""
    int32 = cuda.types.int32

    @jit(device=True)
    def box_at(at: Any, rows: Any) -> Any:
        whole = int32(min(int32(rows), int32(tile)))
        height = int32(min(int32(rows - at), whole))
        return height, int32(int32(height < whole) * MAP_BYTES)

    return box_at
