"""Rows of a tile to shared memory, in several boxes where some do not exist, so that those are not asked for.

A box that reaches over a tensor's last row is dear: where M ended inside a tile, GEMMs on an H100 took 1 to 3
ns longer for each row of 128 bytes that the copy engine had to fill, in each step of K (notebooks/LOG.md). In
rows that no box brings, a stage keeps what lay there before. Knows: the 128-byte swizzle, whose pattern
repeats every 8 rows, so that boxes of multiples of 8 rows make the picture that one box would. Refuses to
know: what the rows are.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.compiler import cuda, jit
from kernels_numba.ptx.arith import select_i32
from kernels_numba.ptx.tma import tma_load_2d, tma_load_2d_hint

LEAST = 8  # rows: one repeat of the swizzle
ROW_BYTES = 128


def row_boxes(tile: int) -> tuple[int, ...]:
    """Heights of boxes for tiles of `tile` rows: all of it, then the powers of two below that down to 8.

    ValueError unless tile is a multiple of 8 from 8 to 256, what a box can have.
    """
    if tile % LEAST or not LEAST <= tile <= 256:
        raise ValueError(f"tile is {tile} rows; a multiple of 8 from 8 to 256 is required")
    return tile, *(1 << power for power in range((tile - 1).bit_length() - 1, 2, -1))


def make_rows_there(tile: int) -> Any:
    """f(row, num_rows) -> rows that load_rows fetches of the tile whose first row is `row`: those below
    num_rows, to a multiple of 8, at most tile, at least 0."""
    int32 = cuda.types.int32

    @jit(device=True)
    def rows_there(row: Any, num_rows: Any) -> Any:
        left = int32(min(max(int32(num_rows - row), int32(0)), int32(tile)))
        return int32((left + 7) & -8)

    return rows_there


def make_load_rows(tile: int, hint: bool) -> Any:
    """f(to, maps, bar, x, row, rows, policy): `rows` rows (a multiple of 8, at most tile) from `row` on.

    to: shared address, a multiple of 1024; maps: address of tensor maps with boxes of row_boxes(tile) rows;
    bar: the mbarrier that counts the 128 rows bytes; policy: for L2, used if `hint`. A whole tile is one box.
    """
    below = row_boxes(tile)[1] if tile > LEAST else 0
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True)
    def load_rows(to: Any, maps: Any, bar: Any, x: Any, row: Any, rows: Any, policy: Any) -> None:
        box = int32(tile)
        which = int64(maps)
        at = int32(0)
        while at < rows:
            if box <= rows - at:
                here = int32(to + at * ROW_BYTES)
                if hint:
                    tma_load_2d_hint(here, which, bar, x, int32(row + at), policy)
                else:
                    tma_load_2d(here, which, bar, x, int32(row + at))
                at = int32(at + box)
            else:
                box = int32(select_i32(int32(box == tile), below, int32(box >> 1)))
                which = int64(which + 128)

    return load_rows
