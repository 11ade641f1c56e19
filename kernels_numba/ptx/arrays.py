"""Instructions whose operands are several registers: in kernels these are `cuda.local.array`s.

Knows: how elements of a local array become operands of one inline assembly and how its results get back.
As long as every index is a constant, if only after unrolling, the compiler keeps such an array in registers.
Refuses to know: any instruction.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from kernels_numba import compiler
from kernels_numba.ptx.asm import KINDS, USABLE, convert, intrinsic, llvm_type, signature, unavailable

if USABLE:
    from llvmlite import ir

_OPERAND = re.compile(r"(?:(\w+):(?:(=|\+)?([rf])(\d+)|([rlf])))")


def _check(name: str, label: str, argument: Any, kind: str, array: bool) -> None:
    types = compiler.cuda.types
    if array:
        element = getattr(argument, "dtype", None)
        known = (types.float32,) if kind == "f" else (types.int32, types.uint32, types.float32)
        if not isinstance(argument, types.Array) or argument.ndim != 1 or element not in known:
            wanted = "float32" if kind == "f" else "int32, uint32 or float32"
            raise compiler.TypingError(
                f"{name}: {label} is {argument}; a local array of {wanted} is required"
            )
    elif kind == "f":
        if argument != types.float32:
            raise compiler.TypingError(f"{name}: {label} has type {argument}; float32 is required")
    elif not isinstance(argument, (types.Integer, types.Boolean)):
        raise compiler.TypingError(f"{name}: {label} has type {argument}; {KINDS[kind]} is required")


def array_instruction(
    name: str, text: str, operands: str, *, doc: str, offsets: bool = False, memory: bool = True,
    volatile: bool = True,
) -> Any:  # fmt: skip
    """An intrinsic `name` that emits `text`, in which <label> stands for an operand.

    operands: words "label:kind", in the order of the arguments: r int32, l int64, f float32 scalars (integers
    of other widths are converted); r4, f4 the first four elements of an array, read; =r4 written; +f4 read
    and written. An "r" array may hold any 32-bit type, an "f" array float32 only; its length is not checked.
    offsets: each array is followed by one more argument, the index of its first element. memory: the
    instruction touches memory, so no access moves across it; volatile: it must not be dropped or merged. A
    wrong type fails when the kernel is compiled.
    """
    if not USABLE:
        return unavailable(name, doc)
    parsed = [
        (label, mode or "", kind or scalar, int(count or 0))
        for label, mode, kind, count, scalar in (_OPERAND.fullmatch(w).groups() for w in operands.split())  # type: ignore[union-attr]
    ]
    # In LLVM's numbering results come first, then what is read; a tied operand names its result's number.
    results = [(label, kind, i) for label, mode, kind, count in parsed if mode for i in range(count)]
    number = {(label, i): at for at, (label, _, i) in enumerate(results)}
    constraints = [f"={kind}" for _, kind, _ in results]
    at = len(results)
    for label, mode, kind, count in parsed:
        if mode == "=":
            continue
        for i in range(count or 1):
            constraints.append(str(number[label, i]) if mode else kind)
            number.setdefault((label, i), at)
            at += 1
    body = text
    for label, _, _, count in parsed:
        registers = ", ".join(f"${number[label, i]}" for i in range(count or 1))
        body = body.replace(f"<{label}>", f"{{{registers}}}" if count else registers)
    listed = ",".join([*constraints, *(["~{memory}"] if memory else [])])
    i32 = ir.IntType(32)

    names = []
    for label, _, _, count in parsed:
        names += [label, f"{label}_at"] if count and offsets else [label]

    def typed(typingctx: Any, *arguments: Any) -> Any:
        if len(arguments) != len(names):
            raise compiler.TypingError(f"{name}: {len(arguments)} arguments; {len(names)} are required")
        by_name = dict(zip(names, arguments, strict=True))
        for label, _, kind, count in parsed:
            _check(name, label, by_name[label], kind, bool(count))
            if count and offsets:
                _check(name, f"{label}_at", by_name[f"{label}_at"], "r", False)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kinds, values = dict(zip(names, sig.args, strict=True)), dict(zip(names, args, strict=True))

            def pointer(label: str, kind: str, i: int) -> Any:
                data = context.make_array(kinds[label])(context, builder, values[label]).data
                index = i32(i)
                if offsets:
                    first = convert(builder, values[f"{label}_at"], kinds[f"{label}_at"], "r")
                    index = builder.add(first, index)
                return builder.bitcast(builder.gep(data, [index]), llvm_type(kind).as_pointer())

            read = []
            for label, mode, kind, count in parsed:
                if mode == "=":
                    continue
                if count:
                    read += [builder.load(pointer(label, kind, i)) for i in range(count)]
                else:
                    read.append(convert(builder, values[label], kinds[label], kind))
            kept = [llvm_type(kind) for _, kind, _ in results]
            several = len(kept) > 1
            returned = ir.LiteralStructType(kept) if several else (kept[0] if kept else ir.VoidType())
            function = ir.FunctionType(returned, [value.type for value in read])
            out = builder.call(ir.InlineAsm(function, body, listed, side_effect=volatile), read)
            for at, (label, kind, i) in enumerate(results):
                value = builder.extract_value(out, at) if several else out
                builder.store(value, pointer(label, kind, i))
            return context.get_dummy_value()

        return signature(compiler.cuda.types.none, *arguments), codegen

    # The compiler folds arguments by this signature, and knows no *arguments.
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function: Any = typed
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(label, positional) for label in ("typingctx", *names)]
    )
    typed.__name__ = typed.__qualname__ = name
    typed.__doc__ = doc
    return intrinsic(typed)
