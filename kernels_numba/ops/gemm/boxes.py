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
from kernels_numba.ops.gemm.hopper_config import ITEM, TILE_K
from kernels_numba.ptx.cluster import cluster_rank
from kernels_numba.ptx.tma import encode_tensor_map

MAP_BYTES = 128
MAPS = 2  # of a matrix: of whole tiles, then of the last one


def heights(rows: int, tile: int, parts: int = 1) -> tuple[int, int]:
    """Rows of the boxes of a whole tile, and of the last one's: a tile comes in `parts` boxes of one height,
    which may overlap."""
    whole = min(rows, tile)
    return -(-whole // parts), -(-(rows % tile or whole) // parts)


def encode_boxes(
    pointer: int, dtype: str, shape: tuple[int, int], stride: int, tile: int, parts: int = 1
) -> npt.NDArray[np.uint64]:
    """Tensor maps u64[MAPS, 16] of a matrix of `shape`, `stride` bytes from row to row, read in tiles of
    `tile` rows and TILE_K columns, each in `parts` boxes. ValueError, RuntimeError as encode_tensor_map."""
    return np.stack([
        encode_tensor_map(pointer, dtype, shape, (stride,), (height, TILE_K))
        for height in heights(shape[0], tile, parts)
    ])  # fmt: skip


def make_boxes_of_tile(tile_x: int, tile_weight: int, x_maps: int, weight_maps: int, cluster: int = 1) -> Any:
    """f(maps, row, rows, col, n) -> (map of x, map of weights, first, bytes) of the tile at row, col.

    maps: address of all maps; x_maps, weight_maps: which are the first of the two matrices; rows, n: the
    matrices' rows, above row and col. A cluster's blocks fetch a part of x each: first is where in the tile
    this block's begins. bytes: of all boxes that reach a stage of this block.
    """
    int32, int64 = cuda.types.int32, cuda.types.int64
    row_bytes, alone = TILE_K * ITEM, cluster == 1

    @jit(device=True)
    def box_at(at: Any, rows: Any, tile: Any) -> Any:
        """Rows of the tile, and bytes from the whole tiles' map to its own."""
        whole = int32(min(int32(rows), int32(tile)))
        height = int32(min(int32(rows - at), whole))
        return height, int32(int32(height < whole) * MAP_BYTES)

    @jit(device=True)
    def boxes_of_tile(maps: Any, row: Any, rows: Any, col: Any, n: Any) -> Any:
        height, more = box_at(row, rows, tile_x)
        weight_height, weight_more = box_at(col, n, tile_weight)
        x_map = int64(maps + int32(MAP_BYTES * x_maps + more))
        weight_map = int64(maps + int32(MAP_BYTES * weight_maps + weight_more))
        if alone:
            return x_map, weight_map, int32(0), int32((height + weight_height) * row_bytes)
        part = int32((height + (cluster - 1)) // cluster)
        first = int32(min(int32(int32(cluster_rank()) * part), int32(height - part)))
        return x_map, weight_map, first, int32((cluster * part + weight_height) * row_bytes)

    return boxes_of_tile
