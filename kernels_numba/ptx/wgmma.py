"""Hopper's matrix instruction: 64 x N outputs a warpgroup, operands in swizzled shared memory (PTX ISA,
"wgmma").

Accumulators are a `cuda.local.array(n // 2, float32)`, read and written inside the intrinsic: the compiler
keeps it in registers as long as every index is a constant (layout: epilogue.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from kernels_numba import compiler
from kernels_numba.ptx.asm import USABLE, convert, intrinsic, signature, unavailable

if USABLE:
    from llvmlite import ir

DTYPES = {"bfloat16": "bf16", "float16": "f16"}
SWIZZLE_128B = 1 << 62
ROWS_8 = (1024 >> 4) << 32  # 8 rows of 128 bytes from one swizzle atom to the next
Major = Literal["k", "mn"]


def _descriptor(name: str, high: int, doc: str) -> Any:
    """Shared-memory descriptor: bits 0-13 address / 16, 16-29 leading and 32-45 stride byte offset / 16,
    62-63 swizzle."""
    if not USABLE:
        return unavailable(name)

    def typed(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = convert(builder, args[0], sig.args[0], "r")
            field = builder.and_(builder.lshr(value, ir.IntType(32)(4)), ir.IntType(32)(0x3FFF))
            return builder.or_(builder.zext(field, ir.IntType(64)), ir.IntType(64)(high))

        return signature(compiler.cuda.types.int64, address), codegen

    typed.__name__ = name
    typed.__doc__ = doc
    return intrinsic(typed)


# The leading offset is not used by the swizzled K-major layout; 1 is what the manual assumes.
descriptor_k_major = _descriptor(
    "descriptor_k_major",
    SWIZZLE_128B | ROWS_8 | 1 << 16,
    "Descriptor of rows of 64 elements along K, 128-byte swizzle.",
)


@cache
def make_descriptor_mn_major(panel_bytes: int) -> Any:
    """f(address): descriptor of a tile stored with M or N innermost, in panels of 64 elements, 128-byte
    swizzle.

    panel_bytes: from one panel to the next (rows of K in a panel x 128), a multiple of 16 below 2**18.
    """
    if panel_bytes % 16 or not 0 < panel_bytes < 1 << 18:
        raise ValueError(f"panel_bytes is {panel_bytes}; a multiple of 16 below {1 << 18} is required")
    doc = f"Descriptor of an M- or N-innermost tile in panels {panel_bytes} bytes apart, 128-byte swizzle."
    return _descriptor("descriptor_mn_major", SWIZZLE_128B | ROWS_8 | (panel_bytes >> 4) << 16, doc)


def wgmma_text(
    n: int, k_steps: int, dtype: str, a: str, a_major: Major, b_major: Major, wait: int | None
) -> str:
    """The asm of make_wgmma: fence, k_steps products, commit, and the wait if asked for."""
    r = n // 2
    first_a = 2 * r
    desc_b = first_a + (4 * k_steps if a == "registers" else 1)
    scale = desc_b + 1
    kind = DTYPES[dtype]
    accumulators = "{" + ",".join(f"${i}" for i in range(r)) + "}"
    lines = [
        "{",
        ".reg .pred p;",
        ".reg .b64 da, db;",
        f"setp.ne.b32 p, ${scale}, 0;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(k_steps):
        # In units of 16 bytes: 16 elements further along a row, or 16 rows of 128 bytes down.
        if a == "shared":
            lines.append(f"add.s64 da, ${first_a}, {step * (2 if a_major == 'k' else 128)};")
            operand = "da"
        else:
            operand = "{" + ",".join(f"${first_a + 4 * step + i}" for i in range(4)) + "}"
        lines.append(f"add.s64 db, ${desc_b}, {step * (2 if b_major == 'k' else 128)};")
        if step == 1:
            lines.append("setp.eq.b32 p, 0, 0;")
        transposed = f"{int(b_major == 'mn')}"
        if a == "shared":
            transposed = f"{int(a_major == 'mn')}, {transposed}"
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} "
            f"{accumulators}, {operand}, db, p, 1, 1, {transposed};"
        )
    lines.append("wgmma.commit_group.sync.aligned;")
    if wait is not None:
        lines.append(f"wgmma.wait_group.sync.aligned {wait};")
    return "\n".join([*lines, "}"])


def _check_n(n: int) -> None:
    if n % 8 or not 8 <= n <= 256:
        raise ValueError(f"n is {n}; wgmma has the multiples of 8 from 8 to 256")


def _accumulators(
    context: Any, builder: Any, array_type: Any, array: Any, count: int
) -> tuple[Any, list[Any]]:
    data = context.make_array(array_type)(context, builder, array).data
    return data, [builder.load(builder.gep(data, [ir.IntType(32)(i)])) for i in range(count)]


def _emit(builder: Any, text: str, data: Any, r: int, values: list[Any], extra: str) -> None:
    f32 = ir.FloatType()
    constraints = ",".join(["=f"] * r + [str(i) for i in range(r)] + list(extra) + ["~{memory}"])
    function = ir.FunctionType(ir.LiteralStructType([f32] * r), [value.type for value in values])
    out = builder.call(ir.InlineAsm(function, text, constraints, side_effect=True), values)
    for i in range(r):
        builder.store(builder.extract_value(out, i), builder.gep(data, [ir.IntType(32)(i)]))


@cache
def make_wgmma(
    n: int, k_steps: int = 4, dtype: str = "bfloat16", a: Literal["shared", "registers"] = "shared",
    a_major: Major = "k", b_major: Major = "k", wait: int | None = None,
) -> Any:  # fmt: skip
    """f(acc, a, desc_b, scale_d): acc += A[64, 16 k_steps] B[n, 16 k_steps]^T in float32, as one commit
    group.

    acc: local f32[n / 2]; a: int64 descriptor, or with a="registers" a local i32[4 k_steps] of packed pairs
    in mma's layout for A; desc_b: int64 descriptor; scale_d: 0 drops what acc holds. One asm holds
    wgmma.fence, k_steps wgmma (m64n{n}k16), wgmma.commit_group and, unless wait is None, wgmma.wait_group
    `wait`. So the main loop becomes k_steps HGMMA with descriptors in uniform registers. ValueError for
    shapes that do not exist, and for a_major "mn" with A in registers, whose layout is one and fixed.
    """
    _check_n(n)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; wgmma here takes {', '.join(DTYPES)}")
    if k_steps < 1 or a not in ("shared", "registers") or not {a_major, b_major} <= {"k", "mn"}:
        raise ValueError(f"k_steps {k_steps}, a {a!r}, majors {a_major!r} and {b_major!r} do not go together")
    if a == "registers" and a_major != "k":
        raise ValueError(f"a_major is {a_major!r}; A from registers has no major, leave it at 'k'")
    if wait is not None and not 0 <= wait <= 7:
        raise ValueError(f"wait is {wait}; 0 to 7 groups may stay pending")
    if not USABLE:
        return unavailable("wgmma")
    r, text = n // 2, wgmma_text(n, k_steps, dtype, a, a_major, b_major, wait)

    @intrinsic  # type: ignore[untyped-decorator]
    def wgmma(typingctx: Any, acc: Any, a_operand: Any, desc_b: Any, scale_d: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data, values = _accumulators(context, builder, sig.args[0], args[0], r)
            if a == "shared":
                operands = [convert(builder, args[1], sig.args[1], "l")]
            else:
                operands = _accumulators(context, builder, sig.args[1], args[1], 4 * k_steps)[1]
            rest = [convert(builder, args[2], sig.args[2], "l"), convert(builder, args[3], sig.args[3], "r")]
            _emit(
                builder,
                text,
                data,
                r,
                values + operands + rest,
                ("l" if a == "shared" else "r" * 4 * k_steps) + "lr",
            )
            return context.get_dummy_value()

        return signature(compiler.cuda.types.none, acc, a_operand, desc_b, scale_d), codegen

    return wgmma


@cache
def make_wgmma_wait(n: int, pending: int = 0) -> Any:
    """f(acc): wait until at most `pending` groups are unfinished; acc passes through, so no read of it moves
    up."""
    _check_n(n)
    if not 0 <= pending <= 7:
        raise ValueError(f"pending is {pending}; 0 to 7 groups may stay pending")
    if not USABLE:
        return unavailable("wgmma_wait")
    r, text = n // 2, f"wgmma.wait_group.sync.aligned {pending};"

    @intrinsic  # type: ignore[untyped-decorator]
    def wgmma_wait(typingctx: Any, acc: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data, values = _accumulators(context, builder, sig.args[0], args[0], r)
            _emit(builder, text, data, r, values, "")
            return context.get_dummy_value()

        return signature(compiler.cuda.types.none, acc), codegen

    return wgmma_wait
