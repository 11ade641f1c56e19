"""Adding to numbers in global memory without reading them back (PTX ISA, "red")."""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

red_add_i32 = instruction(
    "red_add_i32", "red.relaxed.gpu.global.add.s32 [$0], $1;", "lr",
    doc="Adds to 4 bytes at an address: (address, value); orders no other access (red).",
)  # fmt: skip
red_add_i64 = instruction(
    "red_add_i64", "red.relaxed.gpu.global.add.u64 [$0], $1;", "ll",
    doc="Adds to 8 bytes at an address: (address, value); orders no other access (red).",
)  # fmt: skip
