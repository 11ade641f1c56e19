"""Stores that some of a warp's lanes leave out, without a branch (PTX ISA, "st", "Predicated Execution")."""

from __future__ import annotations

from typing import Any

from kernels_numba.ptx.asm import instruction


def _store(name: str, text: str, operands: str, doc: str) -> Any:
    body = f"{{\n.reg .pred p;\nsetp.ne.s32 p, $0, 0;\n@p {text}\n}}"
    return instruction(name, body, "r" + operands, doc=f"{doc}, unless `condition` is 0 (st).")


st_global_b32_if = _store(
    "st_global_b32_if", "st.global.b32 [$1], $2;", "lr", "4 bytes to an address: (condition, address, value)"
)
st_global_f32_if = _store(
    "st_global_f32_if",
    "st.global.f32 [$1], $2;",
    "lf",
    "A float32 to an address: (condition, address, value)",
)
st_global_v2_f32_if = _store(
    "st_global_v2_f32_if", "st.global.v2.f32 [$1], {$2, $3};", "lff",
    "Two float32 to an address: (condition, address, first, second)",
)  # fmt: skip
st_shared_f32_if = _store(
    "st_shared_f32_if",
    "st.shared.f32 [$1], $2;",
    "rf",
    "A float32 to a shared address: (condition, address, value)",
)
st_shared_zero_16_if = _store(
    "st_shared_zero_16_if", "st.shared.v4.b32 [$1], {0, 0, 0, 0};", "r",
    "16 bytes of 0 to a shared address: (condition, address)",
)  # fmt: skip
