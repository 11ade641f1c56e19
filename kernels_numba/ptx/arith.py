"""Float32 arithmetic whose bits are fixed, base-2 exponential and logarithm, choices without a branch (PTX
ISA, "ex2", "lg2", "fma", "mul", "add", "max", "selp", "mov").

What carries bits from one kernel to another writes its roundings down: with .rn neither compiler nor
assembler contracts a product and a sum into one fma. ex2.approx has a relative error of at most 2^-22, and
gives exactly 0 for -inf and exactly 1 for 0. .ftz leaves what it leaves in every kernel: subnormal results of
ex2 become 0.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.ptx.asm import instruction


def _pure(name: str, text: str, operands: str, result: str, doc: str) -> Any:
    return instruction(name, text, operands, result, doc=doc, memory=False, volatile=False)


ex2_f32 = _pure("ex2_f32", "ex2.approx.ftz.f32 $0, $1;", "f", "f", "2^x (ex2.approx.ftz).")
lg2_f32 = _pure("lg2_f32", "lg2.approx.ftz.f32 $0, $1;", "f", "f", "log2 x (lg2.approx.ftz).")
fma_f32 = _pure("fma_f32", "fma.rn.f32 $0, $1, $2, $3;", "fff", "f", "x y + z, rounded once (fma.rn).")
mul_f32 = _pure("mul_f32", "mul.rn.f32 $0, $1, $2;", "ff", "f", "x y, never part of an fma (mul.rn).")
add_f32 = _pure("add_f32", "add.rn.f32 $0, $1, $2;", "ff", "f", "x + y, never part of an fma (add.rn).")
max_f32 = _pure("max_f32", "max.f32 $0, $1, $2;", "ff", "f", "The larger; of a NaN the other (max).")
divide_f32 = _pure("divide_f32", "div.rn.f32 $0, $1, $2;", "ff", "f", "x / y, rounded to nearest (div.rn).")
bits_f32 = _pure("bits_f32", "mov.b32 $0, $1;", "f", "r", "The bits of a float32 (mov).")
_CHOICE = "{{\n.reg .pred p;\nsetp.ne.s32 p, $1, 0;\nselp.{} $0, $2, $3, p;\n}}"
select_f32 = _pure(
    "select_f32",
    _CHOICE.format("f32"),
    "rff",
    "f",
    "x where `condition` is not 0, else y: (condition, x, y) (selp).",
)
select_i32 = _pure(
    "select_i32",
    _CHOICE.format("b32"),
    "rrr",
    "r",
    "x where `condition` is not 0, else y: (condition, x, y) (selp).",
)
