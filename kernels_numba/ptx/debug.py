"""Waits that end, and warps that dawdle: what finds a wrong phase, a lost arrival or a missing fence.

make_mbarrier_wait(name, debug=True) gives up after LIMIT_NS: the driver prints the assertion `NAME: mbarrier
wait timed out` with block and thread, and the launch fails (CUDA_ERROR_ASSERT). make_stress(True) gives warps
random pauses, so that orders which never happen by themselves do happen. With False, both cost nothing.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from kernels_numba import compiler
from kernels_numba.ptx.asm import USABLE, convert, instruction, intrinsic, signature, unavailable
from kernels_numba.ptx.mbarrier import mbarrier_wait

if USABLE:
    from llvmlite import ir

LIMIT_NS = 2_000_000_000
LONGEST_PAUSE_NS = 2_047

# try_wait suspends the thread for a while by itself, so the clock is read seldom.
_BOUNDED = f"""{{
.reg .pred done, late;
.reg .b64 start, now;
mov.u64 start, %globaltimer;
mov.b32 $0, 0;
AGAIN:
mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2;
@done bra READY;
mov.u64 now, %globaltimer;
sub.s64 now, now, start;
setp.lt.s64 late, now, {LIMIT_NS};
@late bra AGAIN;
mov.b32 $0, 1;
READY:
}}"""


def _text(builder: Any, text: str) -> Any:
    """A generic pointer to a zero-ended string in the module's constants."""
    data = bytearray(text.encode() + b"\0")
    kind = ir.ArrayType(ir.IntType(8), len(data))
    module = builder.module
    constant = ir.GlobalVariable(module, kind, module.get_unique_name("sharp_text"), addrspace=4)
    constant.global_constant = True
    constant.linkage = "internal"
    constant.initializer = ir.Constant(kind, data)
    return builder.addrspacecast(constant, ir.IntType(8).as_pointer())


def _assert_fail(builder: Any, message: str, where: str) -> None:
    """What a failing assert() of CUDA C++ calls: (message, file, line, function, bytes of a character)."""
    i32, i64, pointer = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
    function_type = ir.FunctionType(ir.VoidType(), [pointer, pointer, i32, pointer, i64])
    function = builder.module.globals.get("__assertfail")
    if function is None:
        function = ir.Function(builder.module, function_type, "__assertfail")
    texts = [_text(builder, text) for text in (message, "kernels_numba/ptx/debug.py", where)]
    builder.call(function, [texts[0], texts[1], i32(0), texts[2], i64(1)])


@cache
def make_mbarrier_wait(name: str, debug: bool = False, report: bool = True) -> Any:
    """f(bar, parity): mbarrier_wait, or with debug one that fails after LIMIT_NS and says `name`.

    name: an identifier, that of the barrier (ValueError otherwise). The report is a call, and in a kernel
    with a call ptxas lets no two wgmma overlap (its note C7510). report=False only traps, which leaves the
    overlap as it was; then the name stands in a comment of the PTX alone.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError(f"mbarrier wait: name is {name!r}; an identifier is required")
    if not debug:
        return mbarrier_wait
    if not USABLE:
        return unavailable(f"mbarrier_wait_{name}")

    def typed(typingctx: Any, bar: Any, parity: Any) -> Any:
        types = compiler.cuda.types
        for label, argument in (("bar", bar), ("parity", parity)):
            if not isinstance(argument, (types.Integer, types.Boolean)):
                raise compiler.TypingError(f"mbarrier_wait_{name}: {label} is {argument}; int32 is required")

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            i32 = ir.IntType(32)
            values = [convert(builder, v, kind, "r") for v, kind in zip(args, sig.args, strict=True)]
            bounded = ir.FunctionType(i32, [i32, i32])
            asm = ir.InlineAsm(
                bounded, f"// wait for {name}\n{_BOUNDED}", "=&r,r,r,~{memory}", side_effect=True
            )
            late = builder.call(asm, values)
            with builder.if_then(builder.icmp_signed("!=", late, i32(0)), likely=False):
                if report:
                    _assert_fail(builder, f"{name}: mbarrier wait timed out", f"mbarrier_wait_{name}")
                trap = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "trap;", "", side_effect=True)
                builder.call(trap, [])
            return context.get_dummy_value()

        return signature(types.none, bar, parity), codegen

    typed.__name__ = typed.__qualname__ = f"mbarrier_wait_{name}"
    typed.__doc__ = f"Wait for {name}'s phase of this parity, at most {LIMIT_NS} ns."
    return intrinsic(typed)


# A 32-bit mix of clock, SM, warp and the caller's number, the same in a converged warp (constants of
# murmur3's finaliser); half of the calls do not pause.
_PAUSE = f"""{{
.reg .b32 x, y;
.reg .pred go;
mov.u32 x, %clock;
mov.u32 y, %warpid;
mad.lo.u32 x, y, 0x9E3779B1, x;
mov.u32 y, %smid;
mad.lo.u32 x, y, 0x85EBCA77, x;
add.u32 x, x, $0;
shr.u32 y, x, 16;
xor.b32 x, x, y;
mul.lo.u32 x, x, 0x85EBCA6B;
shr.u32 y, x, 13;
xor.b32 x, x, y;
mul.lo.u32 x, x, 0xC2B2AE35;
shr.u32 y, x, 16;
xor.b32 x, x, y;
setp.lt.s32 go, x, 0;
and.b32 x, x, {LONGEST_PAUSE_NS};
@go nanosleep.u32 x;
}}"""


@cache
def make_stress(enabled: bool) -> Any:
    """f(place): with enabled, pause this warp for 0 to LONGEST_PAUSE_NS, chosen anew at each call; else
    nothing. place: any integer, different where calls should not pause alike."""
    text = _PAUSE if enabled else "// no stress"
    return instruction(
        "stress", text, "r", doc="A random pause (nanosleep).", memory=enabled, volatile=enabled
    )
