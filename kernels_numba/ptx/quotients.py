"""Square roots and quick quotients of float32 (PTX ISA, "sqrt", "div").

sqrt.rn is rounded to nearest. div.full errs by up to 2 units in the last place over the whole range, in a
fifth of div.rn's instructions: for values that are rounded to 16 bits next.
"""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

sqrt_f32 = instruction(
    "sqrt_f32", "sqrt.rn.f32 $0, $1;", "f", "f", memory=False, volatile=False,
    doc="The square root, rounded to nearest (sqrt.rn).",
)  # fmt: skip
divide_full_f32 = instruction(
    "divide_full_f32", "div.full.f32 $0, $1, $2;", "ff", "f", memory=False, volatile=False,
    doc="x / y within 2 units in the last place (div.full).",
)  # fmt: skip
