"""Where a tile's elements are: which lane holds them for mma.sync, which banks hold them in shared memory.

Knows: the tables of PTX ISA "Matrix Fragments for mma.m16n8k16 with floating point type" and the 128-byte
swizzle of TMA and wgmma, as arrays that can be drawn, indexed with, and tested. Refuses to know: any kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BANK_BYTES, BANKS = 4, 32  # shared memory answers one 4-byte word a bank at a time
UNIT = 16  # bytes that move together: 8 elements, 4 banks
SHAPES = {"a": (16, 16), "b": (8, 16), "c": (16, 8)}


def mma_layout(operand: str) -> tuple[Any, Any, Any]:
    """(lane, register, half), each an integer array of the operand's shape: who holds each element.

    operand: "a" [M 16, K 16], "b" [N 8, K 16], "c" [M 16, N 8] of mma.m16n8k16; half: which 16 bits of the
    register (0 for c, whose elements are float32). ValueError for another operand.
    """
    if operand not in SHAPES:
        raise ValueError(f"operand is {operand!r}; mma has {', '.join(SHAPES)}")
    rows, cols = SHAPES[operand]
    row, col = np.mgrid[:rows, :cols]
    lane = (row % 8) * 4 + (col % 8) // 2
    if operand == "c":
        return lane, 2 * (row // 8) + col % 2, np.zeros_like(row)
    register = row // 8 + 2 * (col // 8) if operand == "a" else col // 8
    return lane, register, col % 2


def unit_offset(row: Any, unit: Any, swizzle: bool = True) -> Any:
    """Byte offset of 16-byte unit `unit` (0 to 7) of row `row` in a tile of 128-byte rows; integers or
    arrays."""
    return row * 128 + (unit ^ (row % 8) if swizzle else unit) * UNIT


def banks_of(offset: Any) -> Any:
    """The first of the 4 banks that hold the 16 bytes at an offset: 0, 4, ... 28."""
    return offset // BANK_BYTES % BANKS


def swizzled_image(tile: Any) -> Any:
    """uint8[bytes] of a tile of 128-byte rows with its 16-byte units exchanged by the swizzle; its own
    inverse."""
    units = np.ascontiguousarray(tile).view(np.uint8).reshape(-1, 8, UNIT)
    row, unit = np.mgrid[: len(units), :8]
    image = np.empty_like(units)
    image.reshape(-1, UNIT)[unit_offset(row, unit) // UNIT] = units
    return image.reshape(-1)
