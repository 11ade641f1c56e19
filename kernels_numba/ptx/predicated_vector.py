"""Stores of 16 bytes that some of a warp's lanes leave out, without a branch (PTX ISA, "st", "Predicated
Execution")."""

from __future__ import annotations

from kernels_numba.ptx.arrays import array_instruction

st_global_v4_if = array_instruction(
    "st_global_v4_if",
    "{\n.reg .pred p;\nsetp.ne.s32 p, <condition>, 0;\n@p st.global.v4.b32 [<pointer>], <values>;\n}",
    "condition:r pointer:l values:r4",
    doc="16 bytes, values[0..3], to an address, unless `condition` is 0: (condition, pointer, values) "
    "(st.global).",
)
