"""Loads and stores with a width, a cache hint or a matrix layout (PTX ISA, "ld", "st", "stmatrix")."""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

ld_global_i32 = instruction(
    "ld_global_i32", "ld.global.b32 $0, [$1];", "l", "r", doc="4 bytes at an address (ld.global)."
)
st_global_b32 = instruction(
    "st_global_b32", "st.global.b32 [$0], $1;", "lr", doc="4 bytes to an address (st.global)."
)
st_global_f32 = instruction(
    "st_global_f32", "st.global.f32 [$0], $1;", "lf", doc="A float32 to an address (st.global)."
)
st_global_b16 = instruction(
    "st_global_b16", "st.global.b16 [$0], $1;", "lh", doc="2 bytes to an address (st.global)."
)
st_shared_b32 = instruction(
    "st_shared_b32", "st.shared.b32 [$0], $1;", "rr", doc="4 bytes to a shared address (st.shared)."
)
ld_shared_b32 = instruction(
    "ld_shared_b32", "ld.shared.b32 $0, [$1];", "r", "r", doc="4 bytes at a shared address (ld.shared)."
)
prefetch_l2 = instruction(
    "prefetch_l2", "prefetch.global.L2 [$0];", "l", doc="Bring a line to the L2 cache (prefetch)."
)
stmatrix_x4 = instruction(
    "stmatrix_x4", "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};", "rrrrr",
    doc="Four 8x8 matrices of 16-bit elements from a warp to the 32 rows its lanes name (stmatrix, sm_90).",
)  # fmt: skip
stmatrix_x4_trans = instruction(
    "stmatrix_x4_trans", "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};", "rrrrr",
    doc="stmatrix_x4 with each matrix transposed (stmatrix .trans, sm_90).",
)  # fmt: skip
