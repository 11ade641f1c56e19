"""SwiGLU's activation on interleaved gate and up columns, 16 bytes a lane.

Knows: one kernel and its launch. Refuses to know: the products around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np

from kernels_numba.checks import check, fail
from kernels_numba.compiler import cuda, jit
from kernels_numba.launch import Kernel, Launch
from kernels_numba.ops.warp.door import (
    HALVES,
    NAMES,
    Plan,
    View,
    count_address,
    packed,
    plan_and_prepare,
    row_bytes,
    view,
    view_count,
    warp_kernel,
)
from kernels_numba.ops.warp.elements import ELEMENTS, PACK, make_elements, make_real_rows
from kernels_numba.ptx.arith import add_f32, ex2_f32, mul_f32
from kernels_numba.ptx.griddep import griddep_launch, griddep_wait
from kernels_numba.ptx.packs import ld_global_v4_if_at, st_global_v4_if_at
from kernels_numba.ptx.quotients import divide_full_f32

OP = "silu_mul"
SIGNATURE = "void(int64, int64, int64, int32, int32, int32, int32, int32)"
THREADS = 128
GROUPS = 2  # of 8 neurons, in flight in each thread: 64 bytes
HELD_WORDS = 4 * GROUPS
BLOCK_GROUPS = THREADS * GROUPS
LOG2_E = 1.4426950408889634


def make_silu_mul_kernel(dtype: str, pdl: bool = False) -> Any:
    """out[t, n] = g / (1 + 2^(-g log2 e)) * u with g = gate_up[t, 16 (n / 8) + n % 8], u 8 columns further.

    Arguments: out, gate_up: addresses of T[rows, I], T[rows, 2 I]; num_rows: address of i32[1], the real
    number of rows, or 0; rows; groups: I / 8; segments: blocks a row; out_stride, gate_up_stride: bytes from
    row to row.
    Who does what: block t * segments + s makes 2,048 outputs of row t: thread i the groups i and i + 128 of 8
    neurons, whose gates and ups are 32 neighbouring bytes: two loads a group, the second of which finds its
    line in L1. All loads come before the first store. Rows at and past the real number are neither read nor
    written.
    Rounding: float32 throughout (2^x within 2 units in the last place, the quotient too), once to T.
    Dependent launches (pdl): the next launch may begin at once, and this one waits for those before it before
    it reads or writes anything; so it may be anywhere in a chain of them.
    Registers: 48 at most. No shared memory.
    """
    int32, int64, uint32 = cuda.types.int32, cuda.types.int64, cuda.types.uint32
    low, high, pack = make_elements(dtype)
    real_rows = make_real_rows()

    @jit(device=True)
    def silu_mul_one(gate: Any, up: Any) -> Any:
        power = ex2_f32(mul_f32(gate, np.float32(-LOG2_E)))
        return mul_f32(divide_full_f32(gate, add_f32(np.float32(1), power)), up)

    def silu_mul(
        out: Any, gate_up: Any, num_rows: Any, rows: Any, groups: Any, segments: Any, out_stride: Any,
        gate_up_stride: Any,
    ) -> None:  # fmt: skip
        if pdl:
            griddep_launch()
            griddep_wait()
        block = uint32(cuda.blockIdx.x)
        row = int32(block // uint32(segments))
        if row < real_rows(num_rows, rows):
            first = int32((int32(block) - row * segments) * BLOCK_GROUPS + int32(cuda.threadIdx.x))
            gates = cuda.local.array(HELD_WORDS, np.int32)
            ups = cuda.local.array(HELD_WORDS, np.int32)
            read = int64(gate_up + int64(row) * int64(gate_up_stride) + int64(first) * (2 * PACK))
            write = int64(out + int64(row) * int64(out_stride) + int64(first) * PACK)
            for i in range(GROUPS):
                mine = int32(first + i * THREADS < groups)
                ld_global_v4_if_at(mine, gates, 4 * i, int64(read + i * THREADS * 2 * PACK))
                ld_global_v4_if_at(mine, ups, 4 * i, int64(read + i * THREADS * 2 * PACK + PACK))
            for i in range(GROUPS):
                for word in range(4):
                    gate = gates[4 * i + word]
                    up = ups[4 * i + word]
                    first_out = silu_mul_one(low(gate), low(up))
                    second_out = silu_mul_one(high(gate), high(up))
                    gates[4 * i + word] = pack(first_out, second_out)
                mine = int32(first + i * THREADS < groups)
                st_global_v4_if_at(mine, int64(write + i * THREADS * PACK), gates, 4 * i)

    return silu_mul


@cache
def silu_mul_kernel(dtype: str, pdl: bool) -> Kernel:
    """The kernel of an element type, compiled when first launched."""
    return warp_kernel(f"silu_mul_warp_{dtype}", make_silu_mul_kernel, (dtype,), SIGNATURE, THREADS, pdl)


def kernels() -> Iterator[Kernel]:
    """What an engine in bfloat16 can pick, for building it ahead."""
    yield from (silu_mul_kernel("bfloat16", pdl) for pdl in (False, True))


def plan_silu_mul(out: View, gate_up: View, num_rows: View | None, pdl: bool = False) -> Plan | None:
    """The launch for these operands; None for nothing to do.

    out T[rows, I], gate_up T[rows, 2 I], T bfloat16 bits or float16, I a multiple of 8; rows may be cut from
    wider ones. ValueError names what is wrong.
    """
    check(OP, "out", out, HALVES, (None, None), rows=1)
    rows, columns = out.shape
    if columns % ELEMENTS:
        fail(OP, "out", f"has {columns} columns", f"a multiple of {ELEMENTS}")
    check(OP, "gate_up", gate_up, (out.dtype,), (rows, 2 * columns), rows=1)
    if out.size == 0:
        return None
    at = [packed(OP, name, one, rows=1) for name, one in (("out", out), ("gate_up", gate_up))]
    groups = columns // ELEMENTS
    segments = -(-groups // BLOCK_GROUPS)
    arguments = (
        *at, count_address(OP, num_rows), rows, groups, segments, row_bytes(out), row_bytes(gate_up),
    )  # fmt: skip
    return Plan(silu_mul_kernel(NAMES[out.dtype], pdl), rows * segments, arguments)


@lru_cache(maxsize=4096)
def prepared(out: View, gate_up: View, num_rows: View | None) -> Launch | None:
    """plan_silu_mul's launch, ready to be repeated. ValueError on a GPU that is too old."""
    return plan_and_prepare(OP, plan_silu_mul, out, gate_up, num_rows)


def silu_mul_warp(out: Any, gate_up: Any, *, stream: Any = None, num_rows: Any = None) -> None:
    """Rung "warp" of silu_mul; see make_silu_mul_kernel and plan_silu_mul. num_rows: device i32[1]."""
    launch = prepared(view(OP, "out", out), view(OP, "gate_up", gate_up), view_count(OP, num_rows))
    if launch is not None:
        launch(stream)
