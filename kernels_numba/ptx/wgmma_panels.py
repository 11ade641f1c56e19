"""wgmma over rows longer than one swizzled line, K in panels of 64 elements, and what keeps work between a
product and its wait (PTX ISA, "wgmma").

wgmma.py's forms step within one panel; a head of 128 has two. Knows: descriptor offsets. Refuses to know:
what the panels hold.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from kernels_numba import compiler
from kernels_numba.ptx.asm import USABLE, convert, intrinsic, signature, unavailable
from kernels_numba.ptx.wgmma import DTYPES, _accumulators, _check_n, _emit

PANEL = 64  # elements of K in a line of 128 bytes


def panels_text(n: int, k: int, dtype: str, a: str, a_panel_bytes: int, b_panel_bytes: int) -> str:
    """The asm of make_wgmma_panels: fence, k / 16 products, commit."""
    r, steps = n // 2, k // 16
    desc_b = 2 * r + (4 * steps if a == "registers" else 1)
    kind = DTYPES[dtype]
    accumulators = "{" + ",".join(f"${i}" for i in range(r)) + "}"
    lines = [
        "{",
        ".reg .pred p;",
        ".reg .b64 da, db;",
        f"setp.ne.b32 p, ${desc_b + 1}, 0;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(steps):
        panel, inside = divmod(step * 16, PANEL)
        operand, majors = "{" + ",".join(f"${2 * r + 4 * step + i}" for i in range(4)) + "}", "0"
        if a == "shared":
            lines.append(f"add.s64 da, ${2 * r}, {(panel * a_panel_bytes + inside * 2) >> 4};")
            operand, majors = "da", "0, 0"
        lines.append(f"add.s64 db, ${desc_b}, {(panel * b_panel_bytes + inside * 2) >> 4};")
        if step == 1:
            lines.append("setp.eq.b32 p, 0, 0;")
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} "
            f"{accumulators}, {operand}, db, p, 1, 1, {majors};"
        )
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "}"])


@cache
def make_wgmma_panels(
    n: int, k: int, dtype: str, a: Literal["shared", "registers"], a_panel_bytes: int, b_panel_bytes: int
) -> Any:
    """f(acc, a, desc_b, scale_d): acc += A[64, k] B[n, k]^T in float32, K-major, as one commit group, not
    waited for.

    acc: local f32[n / 2]; a: int64 descriptor of the first panel, or with "registers" a local i32[k / 4] of
    packed pairs in mma's layout for A; desc_b: int64 descriptor of B's first panel; *_panel_bytes: from one
    panel of 64 elements to the next; scale_d: 0 drops what acc holds. ValueError for shapes that do not
    exist.
    """
    _check_n(n)
    if dtype not in DTYPES or a not in ("shared", "registers"):
        raise ValueError(f"dtype {dtype!r}, a {a!r}; {', '.join(DTYPES)} and shared, registers are known")
    if k < 16 or k % 16 or a_panel_bytes % 16 or b_panel_bytes % 16:
        raise ValueError(
            f"k is {k}, panels are {a_panel_bytes} and {b_panel_bytes} bytes apart; "
            "multiples of 16 are required"
        )
    if not USABLE:
        return unavailable("wgmma_panels")
    r, text = n // 2, panels_text(n, k, dtype, a, a_panel_bytes, b_panel_bytes)
    words = k // 4

    @intrinsic  # type: ignore[untyped-decorator]
    def wgmma_panels(typingctx: Any, acc: Any, a_operand: Any, desc_b: Any, scale_d: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data, values = _accumulators(context, builder, sig.args[0], args[0], r)
            if a == "shared":
                operands = [convert(builder, args[1], sig.args[1], "l")]
            else:
                operands = _accumulators(context, builder, sig.args[1], args[1], words)[1]
            rest = [convert(builder, args[2], sig.args[2], "l"), convert(builder, args[3], sig.args[3], "r")]
            kinds = "l" if a == "shared" else "r" * words
            _emit(builder, text, data, r, values + operands + rest, kinds + "lr")
            return context.get_dummy_value()

        return signature(compiler.cuda.types.none, acc, a_operand, desc_b, scale_d), codegen

    return wgmma_panels


@cache
def make_hold(n: int) -> Any:
    """f(values): values, a local f32[n / 2], are made before here: what follows does not move above.

    An empty asm that passes them through. It holds the compiler; ptxas moves a wait for products to the
    beginning of its block all the same, so that a branch must follow as well (kernel.py of
    prefill_attention).
    """
    _check_n(n)
    if not USABLE:
        return unavailable("hold")
    r = n // 2

    @intrinsic  # type: ignore[untyped-decorator]
    def hold(typingctx: Any, values: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data, held = _accumulators(context, builder, sig.args[0], args[0], r)
            _emit(builder, "// hold", data, r, held, "")
            return context.get_dummy_value()

        return signature(compiler.cuda.types.none, values), codegen

    return hold
