"""What a lane reads from another lane of its warp; all 32 take part (PTX ISA, "shfl.sync")."""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

warp_uniform = instruction(
    "warp_uniform", "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "r", "r",
    doc="Lane 0's value: tells the assembler that it is the same in the whole warp (shfl.sync.idx).",
)  # fmt: skip
shfl_xor_f32 = instruction(
    "shfl_xor_f32", "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "fr", "f",
    doc="x of the lane whose number differs by `mask` (shfl.sync.bfly).",
)  # fmt: skip
shfl_down_f32 = instruction(
    "shfl_down_f32", "shfl.sync.down.b32 $0, $1, $2, 0x1f, 0xffffffff;", "fr", "f",
    doc="x of the lane `delta` above; its own beyond the last (shfl.sync.down).",
)  # fmt: skip
shfl_idx_i32 = instruction(
    "shfl_idx_i32", "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "rr", "r",
    doc="x of the lane `source` (shfl.sync.idx).",
)  # fmt: skip
shfl_up_f32 = instruction(
    "shfl_up_f32", "shfl.sync.up.b32 $0, $1, $2, 0, 0xffffffff;", "fr", "f",
    doc="x of the lane `delta` below; its own before the first (shfl.sync.up).",
)  # fmt: skip
shfl_idx_f32 = instruction(
    "shfl_idx_f32", "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "fr", "f",
    doc="x of the lane `source` (shfl.sync.idx).",
)  # fmt: skip
shfl_xor_i32 = instruction(
    "shfl_xor_i32", "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "rr", "r",
    doc="x of the lane whose number differs by `mask` (shfl.sync.bfly).",
)  # fmt: skip
