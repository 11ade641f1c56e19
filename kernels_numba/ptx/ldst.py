"""Loads and stores of one value a thread, and a prefetch (PTX ISA, "ld", "st", "prefetch, prefetchu").

Wider ones: vector.py; matrices of a warp: matrix.py.
"""

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
ld_shared_f32 = instruction(
    "ld_shared_f32", "ld.shared.f32 $0, [$1];", "r", "f", doc="A float32 at a shared address (ld.shared)."
)
prefetch_l2 = instruction(
    "prefetch_l2", "prefetch.global.L2 [$0];", "l", doc="Bring a line to the L2 cache (prefetch)."
)
