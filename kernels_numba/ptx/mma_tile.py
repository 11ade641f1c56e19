"""A warp's tile of many mma.sync blocks: fragments in, products, results out, unrolled while the code is
generated (PTX ISA, "ldmatrix", "mma", "cvt", "st", "ld.global.nc").

Knows the layouts of mma.py, and how a tile is made of them: block i of 16 rows, block j of 8 columns and lane
l hold acc[4 (i J + j) .. + 3] = (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1) with r = 16 i + l / 4, c = 8 j
+ 2 (l % 4), where J is the number of column blocks. An accumulator or a fragment indexed by a variable would
leave the registers, and constant loops over fat bodies stay loops, so nothing here is a loop when it runs.
Refuses to know: stages, barriers, what the numbers mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from kernels_numba import compiler
from kernels_numba.ptx import asm as _asm

if _asm.USABLE:
    from llvmlite import ir

KINDS = {"bfloat16": "bf16", "float16": "f16"}
WIDEN = {  # both halves of a packed pair to float32
    "bfloat16": "shl.b32 $0, $2, 16;\nand.b32 $1, $2, 0xffff0000;",
    "float16": "{\n.reg .b16 lo, hi;\nmov.b32 {lo, hi}, $2;\ncvt.f32.f16 $0, lo;\ncvt.f32.f16 $1, hi;\n}",
}
MAX_BLOCKS = 64  # of 16 x 8 outputs: 256 accumulators are more than a thread has registers


def _check(dtype: str, rows: int, columns: int) -> None:
    if dtype not in KINDS:
        raise ValueError(f"dtype is {dtype!r}; known here: {', '.join(KINDS)}")
    if rows < 1 or columns < 1 or rows * columns > MAX_BLOCKS:
        raise ValueError(f"{rows} x {columns} blocks; 1 to {MAX_BLOCKS} of them are a warp's tile")


def _data(context: Any, builder: Any, array_type: Any, array: Any, kind: Any) -> Any:
    """The first element of a local array, as a pointer to `kind`."""
    return builder.bitcast(context.make_array(array_type)(context, builder, array).data, kind.as_pointer())


def _get(builder: Any, data: Any, first: int, count: int) -> list[Any]:
    return [builder.load(builder.gep(data, [ir.IntType(32)(first + i)])) for i in range(count)]


def _put(builder: Any, data: Any, first: int, values: list[Any]) -> None:
    for i, value in enumerate(values):
        builder.store(value, builder.gep(data, [ir.IntType(32)(first + i)]))


def _call(
    builder: Any, text: str, constraints: str, results: list[Any], read: list[Any], effect: bool
) -> Any:
    """The values that an inline assembly returns."""
    returned = ir.LiteralStructType(results) if len(results) > 1 else (results or [ir.VoidType()])[0]
    function = ir.FunctionType(returned, [value.type for value in read])
    out = builder.call(ir.InlineAsm(function, text, constraints, side_effect=effect), read)
    return [builder.extract_value(out, i) for i in range(len(results))] if len(results) > 1 else [out]


def _intrinsic(name: str, doc: str, parameters: str, emit: Callable[..., None]) -> Any:
    """An intrinsic of local arrays ("a"), int32 ("r") and int64 ("l"): emit(context, builder, types,
    values)."""
    if not _asm.USABLE:
        return _asm.unavailable(name, doc)
    types = compiler.cuda.types
    scalar = {"r": types.int32, "l": types.int64}

    def typed(typingctx: Any, *arguments: Any) -> Any:
        if len(arguments) != len(parameters):
            raise compiler.TypingError(f"{name}: {len(arguments)} arguments; {len(parameters)} are required")
        for position, (kind, argument) in enumerate(zip(parameters, arguments, strict=True)):
            if isinstance(argument, types.Array) != (kind == "a"):
                wanted = "a local array" if kind == "a" else f"{scalar[kind]}"
                raise compiler.TypingError(f"{name}: argument {position} is {argument}; {wanted} is required")

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            emit(context, builder, sig.args, args)
            return context.get_dummy_value()

        given = [a if kind == "a" else scalar[kind] for kind, a in zip(parameters, arguments, strict=True)]
        return _asm.signature(types.none, *given), codegen

    # The compiler folds arguments by this signature, and knows no *arguments.
    names = ["typingctx", *(f"argument_{i}" for i in range(len(parameters)))]
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function: Any = typed
    function.__signature__ = inspect.Signature([inspect.Parameter(n, positional) for n in names])
    typed.__name__ = typed.__qualname__ = name
    typed.__doc__ = doc
    return _asm.intrinsic(typed)


@cache
def make_load_fragments(blocks: int, row_bytes: int) -> Any:
    """f(fragments, address): fragments i32[4 blocks] = `blocks` times ldmatrix .x4, each 16 rows below the
    one before.

    address: the shared address of the row that this lane names in the first. Of A, x4 are a 16 x 16 block; of
    B two neighbouring 8 x 16 blocks: which it is, the lanes' addresses say.
    """
    _check("bfloat16", blocks, 1)

    def emit(context: Any, builder: Any, types: Any, values: Any) -> None:
        i32 = ir.IntType(32)
        data = _data(context, builder, types[0], values[0], i32)
        text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
        for block in range(blocks):
            at = builder.add(values[1], i32(16 * row_bytes * block))
            loaded = _call(builder, text, "=r,=r,=r,=r,r,~{memory}", [i32] * 4, [at], True)
            _put(builder, data, 4 * block, loaded)

    return _intrinsic("load_fragments", "See make_load_fragments.", "ar", emit)


@cache
def make_mma_tile(row_blocks: int, column_pairs: int, dtype: str) -> Any:
    """f(acc, a, b): acc += A B^T over 16 of K, each accumulator by one mma.sync m16n8k16.

    acc: f32[8 row_blocks column_pairs]; a: i32[4 row_blocks], b: i32[4 column_pairs] from load_fragments.
    Rows go up and down in turns, so that each instruction has an operand in common with the one before.
    """
    _check(dtype, row_blocks, 2 * column_pairs)
    kind = KINDS.get(dtype, "")
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$0, $1, $2, $3};"
    )

    def emit(context: Any, builder: Any, types: Any, values: Any) -> None:
        i32, f32 = ir.IntType(32), ir.FloatType()
        acc, a, b = (
            _data(context, builder, types[i], values[i], kind) for i, kind in enumerate((f32, i32, i32))
        )
        for j in range(2 * column_pairs):
            right = _get(builder, b, 2 * j, 2)
            for i in range(row_blocks) if j % 2 == 0 else reversed(range(row_blocks)):
                at = 4 * (i * 2 * column_pairs + j)
                read = [*_get(builder, a, 4 * i, 4), *right, *_get(builder, acc, at, 4)]
                constraints = "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3"
                _put(builder, acc, at, _call(builder, text, constraints, [f32] * 4, read, False))

    return _intrinsic("mma_tile", "See make_mma_tile.", "aaa", emit)


@cache
def make_add_bias_tile(row_blocks: int, column_blocks: int, dtype: str) -> Any:
    """f(acc, bias, left): acc[.., c] += bias[c] in float32 (add.rn) for the columns that exist.

    bias: int64 address of this lane's first column, `dtype`, 4-byte aligned; left: int32, how many columns
    there are from the tile's first one (a multiple of 8).
    """
    _check(dtype, row_blocks, column_blocks)

    def emit(context: Any, builder: Any, types: Any, values: Any) -> None:
        i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
        acc = _data(context, builder, types[0], values[0], f32)
        load = "{\n.reg .pred p;\nsetp.ne.b32 p, $2, 0;\nmov.b32 $0, 0;\n@p ld.global.nc.b32 $0, [$1];\n}"
        for j in range(column_blocks):
            inside = builder.zext(builder.icmp_signed(">", values[2], i32(8 * j)), i32)
            read = [builder.add(values[1], i64(16 * j)), inside]
            pair = _call(builder, load, "=&r,l,r", [i32], read, False)
            kinds = "=&f,=f,r"
            both = _call(builder, WIDEN[dtype], kinds, [f32, f32], pair, False)
            for i in range(row_blocks):
                at = 4 * (i * column_blocks + j)
                held = _get(builder, acc, at, 4)
                sums = [
                    _call(builder, "add.rn.f32 $0, $1, $2;", "=f,f,f", [f32], [x, both[n % 2]], False)[0]
                    for n, x in enumerate(held)
                ]
                _put(builder, acc, at, sums)

    return _intrinsic("add_bias_tile", "See make_add_bias_tile.", "alr", emit)


@cache
def make_stage_tile(row_blocks: int, column_blocks: int, dtype: str, pitch: int) -> Any:
    """f(acc, address): the tile to shared memory, rounded to `dtype` (nearest even), 4 bytes a store.

    address: shared address of (this lane's first row, its first column); pitch: bytes from row to row. A
    pitch of 16 modulo 128 bytes spreads a warp's 8 rows of 16 bytes over all banks.
    """
    _check(dtype, row_blocks, column_blocks)
    pack = f"cvt.rn.{KINDS.get(dtype, '')}x2.f32 $0, $2, $1;"

    def emit(context: Any, builder: Any, types: Any, values: Any) -> None:
        i32, f32 = ir.IntType(32), ir.FloatType()
        acc = _data(context, builder, types[0], values[0], f32)
        for i in range(row_blocks):
            for half in range(2):
                for j in range(column_blocks):
                    pair = _get(builder, acc, 4 * (i * column_blocks + j) + 2 * half, 2)
                    word = _call(builder, pack, "=r,f,f", [i32], pair, False)[0]
                    at = builder.add(values[1], i32((16 * i + 8 * half) * pitch + 16 * j))
                    _call(builder, "st.shared.b32 [$0], $1;", "r,r,~{memory}", [], [at, word], True)

    return _intrinsic("stage_tile", "See make_stage_tile.", "ar", emit)


@cache
def make_store_tile(row_blocks: int, column_blocks: int) -> Any:
    """f(acc, out, row_bytes, rows, left): the tile to global memory as float32, 8 bytes a store.

    out: int64 address of (this lane's first row, its first column); row_bytes: int32 from row to row; rows:
    int32, how many rows may be written from this lane's first on; left: int32, how many columns from the
    tile's first on (a multiple of 8). Four lanes write 32 neighbouring bytes, a whole sector.
    """
    _check("bfloat16", row_blocks, column_blocks)

    def emit(context: Any, builder: Any, types: Any, values: Any) -> None:
        i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
        acc = _data(context, builder, types[0], values[0], f32)
        _, out, row_bytes, rows, left = values
        step = builder.shl(builder.sext(row_bytes, i64), i64(3))
        text = "{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\n@p st.global.v2.f32 [$0], {$2, $3};\n}"
        for i in range(row_blocks):
            for half in range(2):
                below = builder.icmp_signed(">", rows, i32(16 * i + 8 * half))
                for j in range(column_blocks):
                    may = builder.and_(below, builder.icmp_signed(">", left, i32(8 * j)))
                    pair = _get(builder, acc, 4 * (i * column_blocks + j) + 2 * half, 2)
                    read = [builder.add(out, i64(32 * j)), builder.zext(may, i32), *pair]
                    _call(builder, text, "l,r,f,f,~{memory}", [], read, True)
                out = builder.add(out, step)

    return _intrinsic("store_tile", "See make_store_tile.", "alrrr", emit)
