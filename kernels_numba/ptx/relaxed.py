"""Accesses of memory that other blocks read or write meanwhile: past L1, in no order with others (PTX ISA,
"ld.relaxed", "st.relaxed").

Each element is seen whole, old or new; two elements of one access may be seen apart.
"""

from __future__ import annotations

from kernels_numba.ptx.arrays import array_instruction
from kernels_numba.ptx.asm import instruction

ld_relaxed_v2 = array_instruction(
    "ld_relaxed_v2", "ld.relaxed.gpu.global.v2.b32 <out>, [<pointer>];", "out:=r2 pointer:l",
    doc="out[0..1] = 8 bytes at an address as they are now (ld.relaxed).",
)  # fmt: skip
ld_relaxed_v4 = array_instruction(
    "ld_relaxed_v4", "ld.relaxed.gpu.global.v4.b32 <out>, [<pointer>];", "out:=r4 pointer:l",
    doc="out[0..3] = 16 bytes at an address as they are now (ld.relaxed).",
)  # fmt: skip
st_relaxed_v2_f32_if = instruction(
    "st_relaxed_v2_f32_if",
    "{\n.reg .pred p;\nsetp.ne.s32 p, $0, 0;\n@p st.relaxed.gpu.global.v2.f32 [$1], {$2, $3};\n}", "rlff",
    doc="Two float32 for other blocks, unless `condition` is 0: (condition, address, first, second) "
    "(st.relaxed).",
)  # fmt: skip
