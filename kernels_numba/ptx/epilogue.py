"""Accumulators of a wgmma out of registers: to shared memory for a TMA store, or straight to global memory.

Knows the accumulator layout of wgmma m64nNk16 (PTX ISA, "Register fragments and shared memory matrix
layouts" of wgmma): in a warpgroup, warp w and lane l hold, for each group j of 8 columns, acc[4j..4j+3] =
rows (16w + l/4) and 8 below it, columns 8j + 2(l % 4) and the next: (row, c), (row, c+1), (row+8, c),
(row+8, c+1). Every function here is unrolled while the code is generated, because an accumulator indexed by
a variable would leave the registers. Refuses to know: tiles, barriers, what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from kernels_numba import compiler
from kernels_numba.ptx import asm as _asm

if _asm.USABLE:
    from llvmlite import ir

PACK = {
    "bfloat16": "cvt.rn.bf16x2.f32 $0, $2, $1;",
    "float16": "cvt.rn.f16x2.f32 $0, $2, $1;",
}
WIDEN = {  # one half of a packed pair to float32
    "bfloat16": ("shl.b32 $0, $1, 16;", "and.b32 $0, $1, 0xffff0000;"),
    "float16": (
        "{\n.reg .b16 lo, hi;\nmov.b32 {lo, hi}, $1;\ncvt.f32.f16 $0, lo;\n}",
        "{\n.reg .b16 lo, hi;\nmov.b32 {lo, hi}, $1;\ncvt.f32.f16 $0, hi;\n}",
    ),
}


def _pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _load(builder: Any, pointer: Any, index: int) -> Any:
    return builder.load(builder.gep(pointer, [ir.IntType(32)(index)]))


def _pack(builder: Any, dtype: str, low: Any, high: Any) -> Any:
    i32, f32 = ir.IntType(32), ir.FloatType()
    fn = ir.InlineAsm(ir.FunctionType(i32, [f32, f32]), PACK[dtype], "=r,f,f", side_effect=False)
    return builder.call(fn, [low, high])


def _check(n: int, dtype: str, known: tuple[str, ...]) -> None:
    if n % 8 or not 8 <= n <= 256:
        raise ValueError(f"n is {n}; accumulators have a multiple of 8 columns from 8 to 256")
    if dtype not in known:
        raise ValueError(f"dtype is {dtype!r}; known here: {', '.join(known)}")


BOX_COLUMNS = (64, 32, 16)  # of a TMA store: rows of 128, 64 or 32 bytes, swizzled over as many
_XOR = {64: (0, 7), 32: (1, 3), 16: (2, 1)}  # which bits of a row's number move its 16-byte units


@dataclass(frozen=True)
class Box:
    """64 rows x `columns` (64, 32 or 16) outputs from column `first` of a tile, staged at byte `offset`."""

    first: int
    columns: int
    offset: int


def boxes_of(n: int, limit: int) -> tuple[tuple[Box, ...], ...]:
    """n columns (a multiple of 16) cut into the widest boxes, in rounds that stage at most `limit` bytes.

    Wide boxes first, because a row of one is a write of as many bytes. ValueError if a box has no room.
    """
    if n % 16 or n < 16 or limit < 64 * 2 * min(n, BOX_COLUMNS[0]):
        raise ValueError(f"{n} columns in rounds of {limit} bytes: a multiple of 16 and 128 bytes a column")
    rounds: list[list[Box]] = [[]]
    first = offset = 0
    while first < n:
        columns = next(c for c in BOX_COLUMNS if c <= n - first)
        if offset + 128 * columns > limit:
            rounds.append([])
            offset = 0
        rounds[-1].append(Box(first, columns, offset))
        first, offset = first + columns, offset + 128 * columns
    return tuple(map(tuple, rounds))


def stage_boxes(
    builder: Any,
    rounds: tuple[tuple[Box, ...], ...],
    args: tuple[Any, ...],
    words: Callable[[int], list[Any]],
) -> None:
    """The code of make_stage. args: round, base, row, half; words(c): the four words of the 16 columns from c
    on that stmatrix .x4 takes."""
    i32 = ir.IntType(32)
    which, base, row, half = args
    text = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};"
    store_type = ir.FunctionType(ir.VoidType(), [i32] * 5)
    store = ir.InlineAsm(store_type, text, "r,r,r,r,r,~{memory}", side_effect=True)
    for number, boxes in enumerate(rounds):
        with builder.if_then(builder.icmp_signed("==", which, i32(number))):
            for box in boxes:
                shift, mask = _XOR[box.columns]
                moved = builder.and_(builder.lshr(row, i32(shift)), i32(mask))
                start = builder.add(base, builder.mul(row, i32(2 * box.columns)))
                start = builder.add(start, i32(box.offset))
                for j in range(0, box.columns // 8, 2):
                    unit = builder.xor(builder.add(half, i32(j)), moved)
                    at = builder.add(start, builder.shl(unit, i32(4)))
                    builder.call(store, [at, *words(box.first + 8 * j)])


@cache
def make_stage(n: int, rounds: tuple[tuple[Box, ...], ...], dtype: str) -> Any:
    """f(acc, round, base, row, half): the round's boxes of this warpgroup's 64 rows to shared memory.

    acc: local f32[n / 2]; base: shared address, a multiple of 1024; row: the row of 64 this lane addresses,
    16 x (warp of the warpgroup) + lane % 16; half: lane / 16, the left or right 8 columns of 16.
    stmatrix .x4 (PTX ISA, "stmatrix") stores 16 rows x 16 columns, each row's 16-byte units swizzled as the
    box's tensor map says.
    """
    _check(n, dtype, tuple(PACK))
    if not _asm.USABLE:
        return _asm.unavailable("make_stage")
    signature, types = _asm.signature, compiler.cuda.types

    @_asm.intrinsic  # type: ignore[untyped-decorator]
    def stage(typingctx: Any, acc: Any, which: Any, base: Any, row: Any, half: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _pointer(context, builder, sig.args[0], args[0])

            def words(column: int) -> list[Any]:
                loaded = [_load(builder, data, column // 2 + i) for i in range(8)]
                return [_pack(builder, dtype, *loaded[i : i + 2]) for i in range(0, 8, 2)]

            stage_boxes(builder, rounds, args[1:], words)
            return context.get_dummy_value()

        return signature(types.none, acc, *[types.int32] * 4), codegen

    return stage


@cache
def make_store_boxes(rounds: tuple[tuple[Box, ...], ...]) -> Any:
    """f(maps, round, base, row, col, num_cols): one thread sends the round's boxes to global memory by TMA.

    maps: int64 address of tensor maps of the output, one for each width in BOX_COLUMNS; base: where
    make_stage put the boxes; row, col: the output's row and column of the tile's first box; boxes from
    column num_cols on are left out. The stores join the thread's bulk group (PTX ISA,
    "cp.async.bulk.tensor").
    """
    if not _asm.USABLE:
        return _asm.unavailable("make_store_boxes")
    i32, i64 = ir.IntType(32), ir.IntType(64)
    text = (
        "{\n.reg .pred p;\nsetp.lt.s32 p, $2, $4;\n"
        "@p cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [$0, {$2, $3}], [$1];\n}"
    )
    store_type = ir.FunctionType(ir.VoidType(), [i64, i32, i32, i32, i32])
    signature, types = _asm.signature, compiler.cuda.types

    @_asm.intrinsic  # type: ignore[untyped-decorator]
    def store_boxes(
        typingctx: Any, maps: Any, which: Any, base: Any, row: Any, col: Any, num_cols: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            maps_, which_, base_, row_, col_, num_cols_ = args
            store = ir.InlineAsm(store_type, text, "l,r,r,r,r,~{memory}", side_effect=True)
            for number, boxes in enumerate(rounds):
                with builder.if_then(builder.icmp_signed("==", which_, i32(number))):
                    for box in boxes:
                        tensor_map = builder.add(maps_, i64(128 * BOX_COLUMNS.index(box.columns)))
                        source = builder.add(base_, i32(box.offset))
                        column = builder.add(col_, i32(box.first))
                        builder.call(store, [tensor_map, source, column, row_, num_cols_])
            return context.get_dummy_value()

        return signature(types.none, types.int64, *[types.int32] * 5), codegen

    return store_boxes


@cache
def make_send_rows(rounds: tuple[tuple[Box, ...], ...]) -> Any:
    """f(round, base, member, out, row_bytes, rows, columns): the round's boxes, as make_stage left them, to
    global memory, 16 bytes a thread, where a TMA store would write rows that it must not.

    base: where make_stage put the boxes, complete for all 128 threads; member: thread of the warpgroup; out:
    int64 address of the tile's first row and column; row_bytes: int32 bytes from one row to the next; rows,
    columns: int32, how many of the 64 rows and of the tile's columns (a multiple of 8) may be written.
    Neighbouring threads write a box's row side by side.
    """
    if not _asm.USABLE:
        return _asm.unavailable("make_send_rows")
    i32, i64 = ir.IntType(32), ir.IntType(64)
    # Addresses are made here, and their constants are the text's: else the compiler makes them all at once,
    # and the widest tile has no registers for them.
    text = (
        "{{\n.reg .pred p;\n.reg .b32 row, w<4>;\n.reg .b64 to;\nadd.s32 row, $2, {first};\n"
        "setp.lt.s32 p, row, $4;\nsetp.gt.and.s32 p, $5, {column}, p;\nmad.wide.s32 to, row, $3, $0;\n"
        "@p ld.shared.v4.b32 {{w0, w1, w2, w3}}, [$1+{source}];\n"
        "@p st.global.v4.b32 [to+{to}], {{w0, w1, w2, w3}};\n}}"
    )
    move_type = ir.FunctionType(ir.VoidType(), [i64, i32, i32, i32, i32, i32])
    signature, types = _asm.signature, compiler.cuda.types

    @_asm.intrinsic  # type: ignore[untyped-decorator]
    def send_rows(
        typingctx: Any, which: Any, base: Any, member: Any, out: Any, row_bytes: Any, rows: Any, columns: Any
    ) -> Any:
        def send_box(builder: Any, box: Box, args: Any) -> None:
            _, base_, member_, out_, row_bytes_, rows_, columns_ = args
            units = box.columns // 8  # of 16 bytes, in a row
            at_once = 128 // units  # rows: whole repeats of the swizzle
            shift, mask = _XOR[box.columns]
            row = builder.lshr(member_, i32(units.bit_length() - 1))
            unit = builder.and_(member_, i32(units - 1))
            moved = builder.xor(unit, builder.and_(builder.lshr(row, i32(shift)), i32(mask)))
            source = builder.add(base_, builder.mul(row, i32(2 * box.columns)))
            source = builder.add(source, builder.shl(moved, i32(4)))
            to = builder.add(out_, builder.zext(builder.shl(unit, i32(4)), i64))
            left = builder.sub(columns_, builder.shl(unit, i32(3)))
            for first in range(0, 64, at_once):
                here = text.format(
                    first=first, column=box.first, to=2 * box.first,
                    source=box.offset + 2 * box.columns * first,
                )  # fmt: skip
                move = ir.InlineAsm(move_type, here, "l,r,r,r,r,r,~{memory}", side_effect=True)
                builder.call(move, [to, source, row, row_bytes_, rows_, left])

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            for number, boxes in enumerate(rounds):
                with builder.if_then(builder.icmp_signed("==", args[0], i32(number))):
                    for box in boxes:
                        send_box(builder, box, args)
            return context.get_dummy_value()

        word = types.int32
        return signature(types.none, word, word, word, types.int64, word, word, word), codegen

    return send_rows


def store_pairs(
    builder: Any, n: int, dtype: str, args: tuple[Any, ...], pair: Callable[[int], list[Any]]
) -> None:
    """The code of make_store_rows. args: its own behind acc; pair(i): what is stored of acc[i] and the next,
    two float32 or one word."""
    out, row_bytes, col, num_cols, low, high = args
    i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
    wide = dtype == "float32"
    item = 4 if wide else 2
    operands = [f32, f32] if wide else [i32]
    values = "{$2, $3}" if wide else "$2"
    text = (
        "{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\n@p st.global."
        + ("v2.f32" if wide else "b32")
        + f" [$0], {values};\n}}"
    )
    constraints = "l,r," + ("f,f" if wide else "r") + ",~{memory}"
    store_type = ir.FunctionType(ir.VoidType(), [i64, i32, *operands])
    store = ir.InlineAsm(store_type, text, constraints, side_effect=True)
    below = builder.add(out, builder.shl(builder.sext(row_bytes, i64), i64(3)))
    left = builder.sub(num_cols, col)  # compared with constants: nothing to keep in a register
    for j in range(n // 8):
        inside = builder.zext(builder.icmp_signed(">", left, i32(8 * j)), i32)
        for start, may, first in ((out, low, 4 * j), (below, high, 4 * j + 2)):
            values_ = pair(first)
            allowed = builder.select(builder.icmp_signed("!=", may, i32(0)), inside, i32(0))
            builder.call(store, [builder.add(start, i64(8 * j * item)), allowed, *values_])


@cache
def make_store_rows(n: int, dtype: str) -> Any:
    """f(acc, out, row_bytes, col, num_cols, low, high): acc to global memory, two neighbouring columns a
    store.

    acc: local f32[n / 2]; out: int64 address of (this thread's upper row, col); row_bytes: int32 bytes from
    one row to the next; col: this thread's first column; num_cols: columns from num_cols on are not written
    (a multiple of 8, so that a group of 8 is written whole or not at all); low, high: int32, nonzero where
    the upper row and the one 8 below it may be written. dtype: "float32" (8-byte stores), "bfloat16" or
    "float16" (4-byte).
    """
    _check(n, dtype, ("float32", *PACK))
    if not _asm.USABLE:
        return _asm.unavailable("make_store_rows")
    signature, types = _asm.signature, compiler.cuda.types

    @_asm.intrinsic  # type: ignore[untyped-decorator]
    def store_rows(
        typingctx: Any, acc: Any, out: Any, row_bytes: Any, col: Any, num_cols: Any, low: Any, high: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _pointer(context, builder, sig.args[0], args[0])

            def pair(first: int) -> list[Any]:
                both = [_load(builder, data, first), _load(builder, data, first + 1)]
                return both if dtype == "float32" else [_pack(builder, dtype, *both)]

            store_pairs(builder, n, dtype, args[1:], pair)
            return context.get_dummy_value()

        parameters = [types.int64, types.int32, types.int32, types.int32, types.int32, types.int32]
        return signature(types.none, acc, *parameters), codegen

    return store_rows


@cache
def make_add_bias(n: int, dtype: str) -> Any:
    """f(acc, bias, col, num_cols): acc[.., c] += bias[c] in float32, for columns below num_cols.

    acc: local f32[n / 2]; bias: int64 address of bias[col], `dtype` "bfloat16" or "float16", 4-byte aligned;
    col: this thread's first column (even); num_cols: a multiple of 8.
    """
    _check(n, dtype, tuple(PACK))
    if not _asm.USABLE:
        return _asm.unavailable("make_add_bias")
    i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
    text = "{\n.reg .pred p;\nsetp.ne.b32 p, $2, 0;\nmov.b32 $0, 0;\n@p ld.global.nc.b32 $0, [$1];\n}"
    signature, types = _asm.signature, compiler.cuda.types

    @_asm.intrinsic  # type: ignore[untyped-decorator]
    def add_bias(typingctx: Any, acc: Any, bias: Any, col: Any, num_cols: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _pointer(context, builder, sig.args[0], args[0])
            _, bias_, col_, num_cols_ = args
            load = ir.InlineAsm(ir.FunctionType(i32, [i64, i32]), text, "=&r,l,r", side_effect=True)
            out = "=f" if dtype == "float16" else "=r"
            widened = f32 if dtype == "float16" else i32
            left = builder.sub(num_cols_, col_)
            for j in range(n // 8):
                inside = builder.zext(builder.icmp_signed(">", left, i32(8 * j)), i32)
                pair = builder.call(load, [builder.add(bias_, i64(16 * j)), inside])
                for half in (0, 1):
                    fn = ir.InlineAsm(
                        ir.FunctionType(widened, [i32]), WIDEN[dtype][half], f"{out},r", side_effect=False
                    )
                    value = builder.call(fn, [pair])
                    if widened is i32:
                        value = builder.bitcast(value, f32)
                    for index in (4 * j + half, 4 * j + 2 + half):
                        sum_ = builder.fadd(_load(builder, data, index), value)
                        builder.store(sum_, builder.gep(data, [i32(index)]))
            return context.get_dummy_value()

        return signature(types.none, acc, types.int64, types.int32, types.int32), codegen

    return add_bias
