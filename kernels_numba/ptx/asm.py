"""One PTX instruction, or one short sequence, as a function that kernels call: the builder behind this
folder.

Knows: how operands and results are typed, converted and bound in LLVM inline assembly. Refuses to know: any
instruction. Without a compiler (the simulator, no numba.cuda) each name still exists; calling it raises
KernelsUnavailable.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from kernels_numba import compiler
from kernels_numba.compiler import KernelsUnavailable, intrinsic, signature

USABLE = compiler.AVAILABLE and not compiler.SIMULATOR
if USABLE:
    from llvmlite import ir

KINDS = {"r": "int32", "l": "int64", "f": "float32", "h": "uint16"}

__all__ = ["KINDS", "USABLE", "instruction", "intrinsic", "signature", "unavailable"]


def unavailable(name: str, doc: str = "") -> Callable[..., Any]:
    """A stand-in for an intrinsic where there is no compiler: it can be read about, but calling it raises
    KernelsUnavailable."""

    def stub(*_: Any) -> Any:
        raise KernelsUnavailable(
            f"{name} is a PTX instruction: it needs numba.cuda's compiler, not its simulator"
        )

    stub.__name__, stub.__doc__ = name, doc
    return stub


def llvm_type(kind: str) -> Any:
    """The LLVM type of an operand kind."""
    return {"r": ir.IntType(32), "l": ir.IntType(64), "f": ir.FloatType(), "h": ir.IntType(16)}[kind]


def convert(builder: Any, value: Any, numba_type: Any, kind: str) -> Any:
    """An integer truncated or extended (by its own sign) to the operand's width; a float32 as it is."""
    if kind == "f":
        return value
    wanted, width = llvm_type(kind), value.type.width
    if width == wanted.width:
        return value
    if width > wanted.width:
        return builder.trunc(value, wanted)
    signed = getattr(numba_type, "signed", True)
    return builder.sext(value, wanted) if signed else builder.zext(value, wanted)


def _literal(name: str, position: int, argument: Any, valid: Callable[[int], bool] | None, rule: str) -> int:
    value = getattr(argument, "literal_value", None)
    if value is None:
        raise compiler.RequireLiteralValue(f"{name}: argument {position} must be a constant")
    if valid is not None and not valid(int(value)):
        raise compiler.TypingError(f"{name}: argument {position} is {value}; {rule}")
    return int(value)


def _check_kind(name: str, position: int, argument: Any, kind: str) -> None:
    types = compiler.cuda.types
    right = argument == types.float32 if kind == "f" else isinstance(argument, (types.Integer, types.Boolean))
    if not right:
        raise compiler.TypingError(
            f"{name}: argument {position} has type {argument}; {KINDS[kind]} is required"
        )


def instruction(
    name: str, text: str, operands: str = "", result: str = "", *, doc: str = "", memory: bool = True,
    volatile: bool = True, valid: Callable[[int], bool] | None = None, rule: str = "",
) -> Any:  # fmt: skip
    """An intrinsic `name` that emits `text`.

    operands: one letter an argument: r int32, l int64, f float32, h uint16 (integers of other widths are
    converted), n a constant baked into the text where @0, @1, ... (numbered by argument) stands. result: ""
    or one of r, l, f, h. In the text $0 is the result, if any, then the operands but the constants. memory:
    the instruction reads or writes memory, so the compiler moves no access across it; volatile: it must not
    be dropped or merged. valid, rule: which constants are allowed, and the words of the error. A wrong type
    or constant fails when the kernel is compiled.
    """
    if not USABLE:
        return unavailable(name, doc)
    bound = [kind for kind in operands if kind != "n"]
    constraints = ",".join(([f"={result}"] if result else []) + bound + (["~{memory}"] if memory else []))
    types = compiler.cuda.types

    def typed(typingctx: Any, *arguments: Any) -> Any:
        if len(arguments) != len(operands):
            raise compiler.TypingError(f"{name}: {len(arguments)} arguments; {len(operands)} are required")
        body = text
        for position, (kind, argument) in enumerate(zip(operands, arguments, strict=True)):
            if kind == "n":
                body = body.replace(f"@{position}", str(_literal(name, position, argument, valid, rule)))
            else:
                _check_kind(name, position, argument, kind)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            values = [
                convert(builder, value, numba_type, kind)
                for kind, value, numba_type in zip(operands, args, sig.args, strict=True)
                if kind != "n"
            ]
            returned = llvm_type(result) if result else ir.VoidType()
            function = ir.FunctionType(returned, [value.type for value in values])
            out = builder.call(ir.InlineAsm(function, body, constraints, side_effect=volatile), values)
            return out if result else context.get_dummy_value()

        return signature(getattr(types, KINDS[result]) if result else types.none, *arguments), codegen

    # The compiler folds arguments by this signature, and knows no *arguments.
    names = ["typingctx", *(f"{KINDS.get(kind, 'constant')}_{i}" for i, kind in enumerate(operands))]
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function: Any = typed
    function.__signature__ = inspect.Signature([inspect.Parameter(n, positional) for n in names])
    typed.__name__ = typed.__qualname__ = name
    typed.__doc__ = doc
    return intrinsic(typed)
