"""Rows of a table by their numbers: the embedding, and the rows of the hidden states whose logits are wanted.

Knows: bytes, so it serves every element type. Refuses to know: what a row is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np

from kernels_numba.checks import check
from kernels_numba.compiler import cuda
from kernels_numba.launch import Kernel, Launch
from kernels_numba.ops.warp.door import (
    LIMIT,
    NAMES,
    Plan,
    View,
    count_address,
    indices,
    packed,
    plan_and_prepare,
    row_bytes,
    view,
    view_count,
    warp_kernel,
)
from kernels_numba.ops.warp.elements import NAN, PACK, make_real_rows
from kernels_numba.ptx.arith import select_i32
from kernels_numba.ptx.griddep import griddep_launch
from kernels_numba.ptx.ldst import ld_global_i32
from kernels_numba.ptx.packs import ld_global_v4_if_at, st_global_v4_if_at

SIGNATURE = "void(int64, int64, int64, int64, int32, int32, int32, int32, int32, int32)"  # as in the kernel
THREADS = 128
PACKS = 2  # of 16 bytes, in flight in each thread
HELD_WORDS = 4 * PACKS
BLOCK_PACKS = THREADS * PACKS  # 4 KiB: a row of 2,048 elements of 16 bits, or several of fewer


def make_gather_kernel(pdl: bool = False) -> Any:
    """out[r] = table[ids[r]], rows of `packs` x 16 bytes; words of `nan` where ids[r] is no row of the table.

    Arguments: out, ids, table: addresses of T[rows, H], i32[rows], T[count, H]; num_rows: address of i32[1],
    the real number of rows, or 0; rows; count; packs; out_stride, table_stride: bytes from row to row; nan: a
    word.
    Who does what: the packs of all rows are counted on from row to row, and block b copies those from 256 b
    on: thread i the packs i and i + 128 of them, both loads before the first store. So short rows leave no
    thread idle. Rows at and past the real number are neither read nor written.
    Registers: 32 at most. No shared memory.
    Dependent launches (pdl): the next launch may begin at once. This one begins when all before it have
    ended: a chain of dependent launches begins here, and what its kernels read early is there.
    """
    int32, int64, uint32 = cuda.types.int32, cuda.types.int64, cuda.types.uint32
    real_rows = make_real_rows()

    def gather(
        out: Any, ids: Any, table: Any, num_rows: Any, rows: Any, count: Any, packs: Any,
        out_stride: Any, table_stride: Any, nan: Any,
    ) -> None:  # fmt: skip
        if pdl:
            griddep_launch()
        real = int32(real_rows(num_rows, rows))
        first = uint32(uint32(cuda.blockIdx.x) * uint32(BLOCK_PACKS))
        if int32(first // uint32(packs)) < real:
            words = cuda.local.array(HELD_WORDS, np.int32)
            known = cuda.local.array(PACKS, np.int32)
            mine = cuda.local.array(PACKS, np.int32)
            write = cuda.local.array(PACKS, np.int64)
            for i in range(PACKS):
                item = uint32(first + uint32(cuda.threadIdx.x) + uint32(i * THREADS))
                row = int32(item // uint32(packs))
                at = int64(int32(item) - row * packs) * PACK
                mine[i] = int32(row < real)
                source = int32(
                    ld_global_i32(ids + int64(row * mine[i]) * 4)
                )  # row 0, which is real, for none
                known[i] = int32(int32(source >= 0) & int32(source < count))
                read = int64(table + int64(source) * int64(table_stride) + at)
                ld_global_v4_if_at(int32(mine[i] & known[i]), words, 4 * i, read)
                write[i] = int64(out + int64(row) * int64(out_stride) + at)
            for i in range(PACKS):
                for word in range(4):
                    words[4 * i + word] = select_i32(known[i], words[4 * i + word], nan)
                st_global_v4_if_at(mine[i], write[i], words, 4 * i)

    return gather


@cache
def gather_kernel(pdl: bool) -> Kernel:
    """The kernel, compiled when first launched."""
    return warp_kernel("gather_warp", make_gather_kernel, (), SIGNATURE, THREADS, pdl, waits=False)


def kernels() -> Iterator[Kernel]:
    """For building it ahead."""
    yield from (gather_kernel(pdl) for pdl in (False, True))


def plan_gather(
    op: str,
    out: View,
    ids: View,
    table: View,
    num_rows: View | None,
    names: tuple[str, str, str],
    pdl: bool = False,
) -> Plan | None:
    """The launch of out[r] = table[ids[r]]; None for nothing to do. names: of out, ids and table.

    out, table: T[rows, H] and T[count, H], T float32, float16 or bfloat16 bits, H T a multiple of 16 bytes,
    rows of out may be cut from wider ones; ids i32[rows]. ValueError names what is wrong.
    """
    out_name, ids_name, table_name = names
    check(op, out_name, out, tuple(NAMES), (None, None), rows=1)
    rows, hidden = out.shape
    check(op, table_name, table, (out.dtype,), (None, hidden), rows=1)
    ids_at = indices(op, ids_name, ids, rows)
    if out.size == 0:
        return None
    row = hidden * out.dtype.itemsize
    if row % PACK:
        raise ValueError(f"{op}: {out_name} has rows of {row} bytes; a multiple of {PACK} is required")
    out_at, table_at = packed(op, out_name, out, rows=1), packed(op, table_name, table, rows=1)
    packs = row // PACK
    if rows * packs >= LIMIT:
        raise ValueError(f"{op}: {rows:,} rows of {row} bytes; fewer than {LIMIT // packs:,} are required")
    arguments = (
        out_at, ids_at, table_at, count_address(op, num_rows), rows, table.shape[0], packs,
        row_bytes(out), row_bytes(table), NAN[NAMES[out.dtype]],
    )  # fmt: skip
    return Plan(gather_kernel(pdl), -(-rows * packs // BLOCK_PACKS), arguments)


@lru_cache(maxsize=4096)
def prepared(
    op: str, out: View, ids: View, table: View, num_rows: View | None, names: tuple[str, str, str]
) -> Launch | None:
    """plan_gather's launch, ready to be repeated. ValueError on a GPU that is too old."""
    return plan_and_prepare(op, plan_gather, op, out, ids, table, num_rows, names)


EMBEDDING = ("out", "token_ids", "weight")


def embedding_warp(
    out: Any, token_ids: Any, weight: Any, *, stream: Any = None, num_rows: Any = None
) -> None:
    """Rung "warp": out[t] = weight[token_ids[t]], NaN for an id outside the table; see make_gather_kernel."""
    op = "embedding"
    launch = prepared(
        op, view(op, "out", out), view(op, "token_ids", token_ids), view(op, "weight", weight),
        view_count(op, num_rows), EMBEDDING,
    )  # fmt: skip
    if launch is not None:
        launch(stream)
