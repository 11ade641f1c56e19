"""8 x 8 matrices of 16-bit elements between shared memory and a warp's registers (PTX ISA, "ldmatrix",
"stmatrix").

Each matrix is 8 rows of 16 bytes at multiples of 16; lanes 8i to 8i + 7 give the shared addresses of matrix
i's rows, what other lanes give is ignored. Of each matrix lane l holds, in one 32-bit register, elements
[l / 4, 2 (l % 4)] and the next; with _trans [2 (l % 4), l / 4] and the one in the next row.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.ptx.arrays import array_instruction
from kernels_numba.ptx.asm import instruction


def _load(count: int, trans: str) -> Any:
    how = ", transposed" if trans else ""
    return array_instruction(
        f"ldmatrix_x{count}{trans.replace('.', '_')}",
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 <out>, [<address>];",
        f"out:=r{count} address:r",
        doc=f"out i32[{count}] = {count} matrices{how}: (out, address) (ldmatrix, sm_75).",
    )


def _store(count: int, trans: str) -> Any:
    values = ", ".join(f"${i + 1}" for i in range(count))
    how = ", transposed" if trans else ""
    return instruction(
        f"stmatrix_x{count}{trans.replace('.', '_')}",
        f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [$0], {{{values}}};",
        "r" * (count + 1),
        doc=f"{count} matrices{how}: (address, r0..) (stmatrix, sm_90).",
    )


ldmatrix_x1, ldmatrix_x2, ldmatrix_x4 = _load(1, ""), _load(2, ""), _load(4, "")
ldmatrix_x1_trans, ldmatrix_x2_trans, ldmatrix_x4_trans = (
    _load(1, ".trans"),
    _load(2, ".trans"),
    _load(4, ".trans"),
)
stmatrix_x1, stmatrix_x2, stmatrix_x4 = _store(1, ""), _store(2, ""), _store(4, "")
stmatrix_x1_trans, stmatrix_x2_trans, stmatrix_x4_trans = (
    _store(1, ".trans"),
    _store(2, ".trans"),
    _store(4, ".trans"),
)
