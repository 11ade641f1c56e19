"""Rows of a tile to shared memory in boxes of powers of two, so that none are fetched that do not exist.

A box that reaches over a tensor's last row is dear: where M ended inside a tile, GEMMs on an H100 took 1 to 3
ns longer for each row of 128 bytes that the copy engine had to fill, in each step of K (notebooks/LOG.md). In
rows that no box brings, a stage keeps what lay there before. Knows: the 128-byte swizzle, whose pattern
repeats every 8 rows, so that boxes of multiples of 8 rows make the picture that one box would. Refuses to
know: what the rows are.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.compiler import cuda, jit
from kernels_numba.ptx.tma import tma_load_2d, tma_load_2d_hint

LEAST = 8  # rows: one repeat of the swizzle
ROW_BYTES = 128


def row_boxes(tile: int) -> tuple[int, ...]:
    """Heights of boxes for tiles of `tile` rows: powers of two from the largest that fits down to 8.

    ValueError unless tile is a multiple of 8 from 8 to 256, what a box can have.
    """
    if tile % LEAST or not LEAST <= tile <= 256:
        raise ValueError(f"tile is {tile} rows; a multiple of 8 from 8 to 256 is required")
    return tuple(1 << power for power in range(tile.bit_length() - 1, 2, -1))


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
    bar: the mbarrier that counts the 128 rows bytes; policy: for L2, used if `hint`. As many boxes as
    rows / 8 has ones, where tile is a power of two.
    """
    largest = row_boxes(tile)[0]
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True)
    def load_rows(to: Any, maps: Any, bar: Any, x: Any, row: Any, rows: Any, policy: Any) -> None:
        box = int32(largest)
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
                box = int32(box >> 1)
                which = int64(which + 128)

    return load_rows
