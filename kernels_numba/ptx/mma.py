"""The matrix instruction of one warp, sm_80 and later (PTX ISA, "mma", "Matrix Fragments for mma.m16n8k16
with floating point type").

Who holds what, with r = lane / 4 and p = 2 (lane % 4); a pair's second half is in the upper bits:
a[0] = A[r, p:p+2]; a[1] = A[r+8, p:p+2]; a[2] = A[r, p+8:p+10]; a[3] = A[r+8, p+8:p+10]     (A: 16 x K 16)
b[0] = B[r, p:p+2]; b[1] = B[r, p+8:p+10]                                      (B: N 8 x K 16, as weights lie)
acc[0], acc[1] = C[r, p:p+2]; acc[2], acc[3] = C[r+8, p:p+2]                                 (C: 16 x N 8)
A of wgmma from registers (wgmma.py) and its accumulators are laid out alike, 16 rows a warp.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.ptx.arrays import array_instruction
from kernels_numba.ptx.asm import instruction


def _mma(name: str, kind: str, offsets: bool) -> Any:
    where = "; after each array the index of its first element" if offsets else ""
    return array_instruction(
        name, f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 <acc>, <a>, <b>, <acc>;",
        "acc:+f4 a:r4 b:r2", offsets=offsets, memory=False, volatile=False,
        doc=f"acc f32[4] += A (i32[4] of {kind} pairs) B (i32[2]), m16n8k16{where} (mma.sync).",
    )  # fmt: skip


mma_m16n8k16 = _mma("mma_m16n8k16", "bf16", offsets=False)
mma_m16n8k16_f16 = _mma("mma_m16n8k16_f16", "f16", offsets=False)
mma_m16n8k16_at = _mma("mma_m16n8k16_at", "bf16", offsets=True)
mma_m16n8k16_f16_at = _mma("mma_m16n8k16_f16_at", "f16", offsets=True)
pack_bf16 = instruction(
    "pack_bf16", "cvt.rn.bf16x2.f32 $0, $2, $1;", "ff", "r", memory=False, volatile=False,
    doc="Two float32 as bfloat16, nearest even, the first in the lower half (cvt.rn.bf16x2.f32, sm_80).",
)  # fmt: skip
pack_f16 = instruction(
    "pack_f16", "cvt.rn.f16x2.f32 $0, $2, $1;", "ff", "r", memory=False, volatile=False,
    doc="Two float32 as float16, nearest even, the first in the lower half (cvt.rn.f16x2.f32, sm_80).",
)  # fmt: skip
