"""A residual added to the accumulators of a product: out of shared memory, or straight out of global memory.

The sum is residual + rounded product, rounded again. Two 16-bit numbers whose sum float32 cannot hold lie so
far apart that the sum rounds to the larger one either way: so one packed addition (PTX ISA, "add" of half
precision) has the bits of an addition in float32 and a rounding. Knows the accumulators' layout
(epilogue.py). Refuses to know: tiles, barriers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from kernels_numba import compiler
from kernels_numba.ptx import asm as _asm
from kernels_numba.ptx.epilogue import (
    PACK,
    WIDEN,
    Box,
    _check,
    _load,
    _pack,
    _pointer,
    stage_boxes,
    store_pairs,
)

if _asm.USABLE:
    from llvmlite import ir

ADD = {"bfloat16": "add.rn.bf16x2 $0, $1, $2;", "float16": "add.rn.f16x2 $0, $1, $2;"}
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
BOX = 64  # columns


@dataclass(frozen=True)
class Source:
    """Where a residual's boxes of 64 rows x 64 columns, 128 bytes a row under TMA's 128-byte swizzle, lie in
    shared memory: `boxes` of them belong to a part, of which there are at most two; a part's first box is at
    one address, a multiple of 1024, the next ones `pitch` bytes apart from another."""

    boxes: int
    pitch: int


class _Sums:
    """Words of residual + rounded accumulators, 16 columns at a time, as code; made as they are asked for.

    parts: (first box, next boxes) addresses of each part; row, half: as in make_stage, because ldmatrix .x4
    (PTX ISA, "ldmatrix") deals out what stmatrix .x4 takes.
    """

    def __init__(self, builder: Any, source: Source, dtype: str, data: Any, where: tuple[Any, ...]) -> None:
        self.builder, self.source, self.dtype, self.data = builder, source, dtype, data
        self.row, self.half, *self.parts = where
        i32 = ir.IntType(32)
        four = ir.LiteralStructType([i32] * 4)
        kind = ir.FunctionType(four, [i32])
        self.load = ir.InlineAsm(kind, LDMATRIX, "=r,=r,=r,=r,r,~{memory}", side_effect=True)
        self.add = ir.InlineAsm(ir.FunctionType(i32, [i32, i32]), ADD[dtype], "=r,r,r", side_effect=False)

    def words(self, column: int) -> list[Any]:
        builder, i32 = self.builder, ir.IntType(32)
        part, box = divmod(column // BOX, self.source.boxes)
        start = self.parts[2 * part + int(box > 0)]
        start = builder.add(start, i32(max(box - 1, 0) * self.source.pitch))
        start = builder.add(start, builder.shl(self.row, i32(7)))
        unit = builder.add(self.half, i32(column % BOX // 8))
        unit = builder.xor(unit, builder.and_(self.row, i32(7)))
        loaded = builder.call(self.load, [builder.add(start, builder.shl(unit, i32(4)))])
        return [self._sum(loaded, pair, column // 2 + 2 * pair) for pair in range(4)]

    def _sum(self, loaded: Any, pair: int, at: int) -> Any:
        acc = [_load(self.builder, self.data, at + i) for i in (0, 1)]
        product = _pack(self.builder, self.dtype, *acc)
        return self.builder.call(self.add, [self.builder.extract_value(loaded, pair), product])


@cache
def make_stage_sum(n: int, rounds: tuple[tuple[Box, ...], ...], dtype: str, source: Source) -> Any:
    """f(acc, round, base, row, half, first, next, first_2, next_2): make_stage's boxes of residual + rounded
    acc; the last four: shared addresses of `source`'s parts, of this warpgroup's rows."""
    _check(n, dtype, tuple(PACK))
    if not _asm.USABLE:
        return _asm.unavailable("make_stage_sum")
    signature, types = _asm.signature, compiler.cuda.types

    @_asm.intrinsic  # type: ignore[untyped-decorator]
    def stage_sum(
        typingctx: Any, acc: Any, which: Any, base: Any, row: Any, half: Any, first: Any, next_: Any,
        first_2: Any, next_2: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _pointer(context, builder, sig.args[0], args[0])
            sums = _Sums(builder, source, dtype, data, args[3:])
            stage_boxes(builder, rounds, args[1:5], sums.words)
            return context.get_dummy_value()

        return signature(types.none, acc, *[types.int32] * 8), codegen

    return stage_sum


@cache
def make_store_sum_rows(n: int, dtype: str, source: Source) -> Any:
    """f(acc, out, row_bytes, col, num_cols, low, high, row, half, first, next, first_2, next_2):
    make_store_rows of residual + rounded acc; the last six as in make_stage_sum. n: a multiple of 16."""
    _check(n, dtype, tuple(PACK))
    if not _asm.USABLE:
        return _asm.unavailable("make_store_sum_rows")
    signature, types = _asm.signature, compiler.cuda.types

    @_asm.intrinsic  # type: ignore[untyped-decorator]
    def store_sum_rows(
        typingctx: Any, acc: Any, out: Any, row_bytes: Any, col: Any, num_cols: Any, low: Any, high: Any,
        row: Any, half: Any, first: Any, next_: Any, first_2: Any, next_2: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _pointer(context, builder, sig.args[0], args[0])
            sums = _Sums(builder, source, dtype, data, args[7:])
            held: list[Any] = []

            def pair(at: int) -> list[Any]:
                if at % 8 == 0:
                    held[:] = sums.words(2 * at)
                return [held[at % 8 // 2]]

            store_pairs(builder, n, dtype, args[1:7], pair)
            return context.get_dummy_value()

        return signature(types.none, acc, types.int64, *[types.int32] * 11), codegen

    return store_sum_rows


@cache
def make_add_rows(n: int, dtype: str) -> Any:
    """f(acc, residual, row_bytes, col, num_cols, low, high): acc = residual + rounded acc, in float32, a pair
    of neighbouring columns at a time from global memory, where make_store_rows will write it rounded.

    Arguments as make_store_rows', residual: int64 address of (this thread's upper row, col), of `dtype`,
    "bfloat16" or "float16". What is not to be written is not read.
    """
    _check(n, dtype, tuple(PACK))
    if not _asm.USABLE:
        return _asm.unavailable("make_add_rows")
    i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
    text = "{\n.reg .pred p;\nsetp.ne.b32 p, $2, 0;\nmov.b32 $0, 0;\n@p ld.global.b32 $0, [$1];\n}"
    signature, types = _asm.signature, compiler.cuda.types

    @_asm.intrinsic  # type: ignore[untyped-decorator]
    def add_rows(
        typingctx: Any, acc: Any, residual: Any, row_bytes: Any, col: Any, num_cols: Any, low: Any, high: Any
    ) -> Any:
        def widen(builder: Any, word: Any, half: int) -> Any:
            kind, out = (f32, "=f") if dtype == "float16" else (i32, "=r")
            fn = ir.InlineAsm(ir.FunctionType(kind, [i32]), WIDEN[dtype][half], f"{out},r", side_effect=False)
            value = builder.call(fn, [word])
            return builder.bitcast(value, f32) if kind is i32 else value

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _pointer(context, builder, sig.args[0], args[0])
            _, residual_, row_bytes_, col_, num_cols_, low_, high_ = args
            load = ir.InlineAsm(ir.FunctionType(i32, [i64, i32]), text, "=&r,l,r,~{memory}", side_effect=True)
            below = builder.add(residual_, builder.shl(builder.sext(row_bytes_, i64), i64(3)))
            left = builder.sub(num_cols_, col_)
            for j in range(n // 8):
                inside = builder.zext(builder.icmp_signed(">", left, i32(8 * j)), i32)
                for start, may, first in ((residual_, low_, 4 * j), (below, high_, 4 * j + 2)):
                    allowed = builder.select(builder.icmp_signed("!=", may, i32(0)), inside, i32(0))
                    word = builder.call(load, [builder.add(start, i64(16 * j)), allowed])
                    pair = [_load(builder, data, first), _load(builder, data, first + 1)]
                    product = _pack(builder, dtype, *pair)
                    for half in (0, 1):
                        summed = builder.fadd(widen(builder, word, half), widen(builder, product, half))
                        builder.store(summed, builder.gep(data, [i32(first + half)]))
            return context.get_dummy_value()

        parameters = [types.int64, types.int32, types.int32, types.int32, types.int32, types.int32]
        return signature(types.none, acc, *parameters), codegen

    return add_rows
