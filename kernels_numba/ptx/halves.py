"""The two elements of a 32-bit word as float32, exactly (PTX ISA, "mov", "shl", "and", "cvt").

The way back is pack_bf16 and pack_f16 of mma.py. bfloat16 is the upper half of a float32, so nothing is
converted.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.ptx.asm import instruction


def _half(name: str, text: str, doc: str) -> Any:
    return instruction(name, text, "r", "f", memory=False, volatile=False, doc=doc)


_F16 = "{{\n.reg .b16 low, high;\nmov.b32 {{low, high}}, $1;\ncvt.f32.f16 $0, {};\n}}"
bf16_low = _half(
    "bf16_low", "{\n.reg .b32 t;\nshl.b32 t, $1, 16;\nmov.b32 $0, t;\n}",
    "The bfloat16 in the lower half of a word (shl.b32).",
)  # fmt: skip
bf16_high = _half(
    "bf16_high", "{\n.reg .b32 t;\nand.b32 t, $1, 0xffff0000;\nmov.b32 $0, t;\n}",
    "The bfloat16 in the upper half of a word (and.b32).",
)  # fmt: skip
f16_low = _half("f16_low", _F16.format("low"), "The float16 in the lower half of a word (cvt.f32.f16).")
f16_high = _half("f16_high", _F16.format("high"), "The float16 in the upper half of a word (cvt.f32.f16).")
