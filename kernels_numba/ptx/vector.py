"""Loads and stores of 8 and 16 bytes a thread, to and from local arrays, with cache hints (PTX ISA, "ld",
"ld.global.nc", "st", "Cache Operators", "Cache Eviction Priority Hints").

Addresses are multiples of the width; the arrays hold any 32-bit type. _hint: with an L2 policy of policy.py.
"""

from __future__ import annotations

from kernels_numba.ptx.arrays import array_instruction
from kernels_numba.ptx.asm import instruction

ld_global_v4 = array_instruction(
    "ld_global_v4", "ld.global.v4.b32 <out>, [<pointer>];", "out:=r4 pointer:l",
    doc="out[0..3] = 16 bytes at an address; keeps its place among barriers and stores (ld.global).",
)  # fmt: skip
# Not volatile, and no memory clobber: what never changes may be read early, and once.
ld_global_nc_v4 = array_instruction(
    "ld_global_nc_v4", "ld.global.nc.L1::no_allocate.v4.b32 <out>, [<pointer>];", "out:=r4 pointer:l",
    memory=False, volatile=False,
    doc="out[0..3] = 16 bytes that nobody writes while the kernel runs, past L1; may move (ld.global.nc).",
)  # fmt: skip
ld_global_v4_hint = array_instruction(
    "ld_global_v4_hint", "ld.global.L2::cache_hint.v4.b32 <out>, [<pointer>], <policy>;",
    "out:=r4 pointer:l policy:l",
    doc="ld_global_v4 with an L2 policy: (out, pointer, policy) (ld.global.L2::cache_hint).",
)  # fmt: skip
ld_global_nc_v4_hint = array_instruction(
    "ld_global_nc_v4_hint",
    "ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 <out>, [<pointer>], <policy>;",
    "out:=r4 pointer:l policy:l", memory=False, volatile=False,
    doc="ld_global_nc_v4 with an L2 policy: (out, pointer, policy) (ld.global.nc.L2::cache_hint).",
)  # fmt: skip
ld_global_v2 = array_instruction(
    "ld_global_v2", "ld.global.v2.b32 <out>, [<pointer>];", "out:=r2 pointer:l",
    doc="out[0..1] = 8 bytes at an address (ld.global).",
)  # fmt: skip
st_global_v4 = array_instruction(
    "st_global_v4", "st.global.v4.b32 [<pointer>], <values>;", "pointer:l values:r4",
    doc="16 bytes, values[0..3], to an address (st.global).",
)  # fmt: skip
st_global_cs_v4 = array_instruction(
    "st_global_cs_v4", "st.global.cs.v4.b32 [<pointer>], <values>;", "pointer:l values:r4",
    doc="st_global_v4 of what will not be read again soon (st.global.cs).",
)  # fmt: skip
st_global_v4_hint = array_instruction(
    "st_global_v4_hint", "st.global.L2::cache_hint.v4.b32 [<pointer>], <values>, <policy>;",
    "pointer:l values:r4 policy:l",
    doc="st_global_v4 with an L2 policy: (pointer, values, policy) (st.global.L2::cache_hint).",
)  # fmt: skip
st_global_v2_f32 = instruction(
    "st_global_v2_f32", "st.global.v2.f32 [$0], {$1, $2};", "lff",
    doc="Two float32 to an address: (pointer, first, second) (st.global).",
)  # fmt: skip
ld_shared_v4 = array_instruction(
    "ld_shared_v4", "ld.shared.v4.b32 <out>, [<address>];", "out:=r4 address:r",
    doc="out[0..3] = 16 bytes at a shared address (ld.shared).",
)  # fmt: skip
st_shared_v4 = array_instruction(
    "st_shared_v4", "st.shared.v4.b32 [<address>], <values>;", "address:r values:r4",
    doc="16 bytes, values[0..3], to a shared address (st.shared).",
)  # fmt: skip
