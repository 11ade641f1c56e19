"""Loads and stores of 16 bytes that some lanes leave out, to and from a place within a local array (PTX ISA,
"ld", "ld.global.nc", "st", "Predicated Execution").

A row that is no multiple of a block's width ends in lanes with nothing to do: they hold zeros, and write
nothing. Addresses are multiples of 16; the arrays hold any 32-bit type.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.ptx.arrays import array_instruction


def _load(name: str, text: str, doc: str, moves: bool) -> Any:
    zeros = "".join(f"mov.b32 ${i}, 0;\n" for i in range(4))
    body = f"{{\n.reg .pred p;\nsetp.ne.s32 p, <condition>, 0;\n{zeros}@p {text} <out>, [<pointer>];\n}}"
    return array_instruction(
        name, body, "condition:r out:=r4 pointer:l", offsets=True, memory=not moves, volatile=not moves,
        doc=f"out[at .. at + 3] = {doc}, or zeros where `condition` is 0: (condition, out, at, pointer) "
        f"({text.split('.v4')[0].split('.L1')[0]}).",
    )  # fmt: skip


ld_global_v4_if_at = _load("ld_global_v4_if_at", "ld.global.v4.b32", "16 bytes at an address", moves=False)
ld_global_nc_v4_if_at = _load(
    "ld_global_nc_v4_if_at", "ld.global.nc.L1::no_allocate.v4.b32",
    "16 bytes that nobody writes while the kernel runs, past L1", moves=True,
)  # fmt: skip
st_global_v4_if_at = array_instruction(
    "st_global_v4_if_at",
    "{\n.reg .pred p;\nsetp.ne.s32 p, <condition>, 0;\n@p st.global.v4.b32 [<pointer>], <values>;\n}",
    "condition:r pointer:l values:r4", offsets=True,
    doc="16 bytes, values[at .. at + 3], to an address, unless `condition` is 0: "
    "(condition, pointer, values, at) (st.global).",
)  # fmt: skip
