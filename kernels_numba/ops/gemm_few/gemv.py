"""One token times a matrix on CUDA cores: what the order of additions that all GEMMs share is held against.

A warp shares out K among its lanes and adds their sums up in the end. That is another order than tensor
cores' K in steps of 64, so a token's bits are not those it has in company: no engine may take this rung, it
is there to be measured (`just bench gemm`), so that the price of the one order is a number. Knows: one kernel
and its launch. Refuses to know: a second token.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np

from kernels_numba.checks import fail
from kernels_numba.compiler import cuda, jit
from kernels_numba.launch import Kernel, Launch
from kernels_numba.ops.gemm.door import Operands, operands, require_capability
from kernels_numba.ops.gemm_few.door import INPUTS
from kernels_numba.ops.warp.elements import ELEMENTS, PACK, WARP, make_elements, make_lane_sum
from kernels_numba.ptx.arith import add_f32, fma_f32
from kernels_numba.ptx.griddep import griddep_launch, griddep_wait
from kernels_numba.ptx.ldst import ld_global_i32
from kernels_numba.ptx.packs import ld_global_nc_v4_if_at, ld_global_v4_if_at
from kernels_numba.ptx.predicated import st_global_b32_if, st_global_v2_f32_if

SIGNATURE = "void(int64, int64, int64, int64, int32, int32, int64)"
WARPS = 4  # of a block
ROWS = 2  # of weight that a warp multiplies: their sums are one word of out
AT_ONCE = 4  # packs of each row on their way, a lane: 4 KiB a warp, 48 KiB on an SM of 12 warps
HELD = 4 * AT_ONCE  # words


def make_gemv_kernel(dtype: str, out_dtype: str, has_bias: bool) -> Any:
    """out[n] = sum over k of x[k] weight[n, k] (+ bias[n]), accumulated in float32, rounded once.

    Arguments: addresses of out O[N], x T[K], weight T[N, K], bias T[N]; n; packs: K / 8; bytes from row to
    row of weight.
    Who does what: warp w of block b makes rows 2 (4 b + w) and the next. Lane l multiplies the packs of 8
    elements l, l + 32, ..., one fma an element, ascending; then lanes' sums are added, from the widest apart
    to neighbours. Packs at K and beyond are not read and count as zeros. Shared memory: none. Registers:
    168 at most, which leaves room for three blocks an SM.
    Dependent launches: the next launch may begin at once. The first packs of weight are asked for before
    those before it have ended, x after that: so weights must not be written by a launch right before it.
    """
    low, high, pack = make_elements(dtype)
    lane_sum = make_lane_sum(WARP)
    int32, int64 = cuda.types.int32, cuda.types.int64

    @jit(device=True, forceinline=True)
    def load(words: Any, at: Any, first: Any, packs: Any) -> None:
        for i in range(AT_ONCE):
            mine = int32(first + WARP * i < packs)
            ld_global_nc_v4_if_at(mine, words, 4 * i, int64(at + (WARP * PACK) * i))

    @jit(device=True, forceinline=True)
    def add_products(total: Any, words: Any, x_words: Any) -> Any:
        for word in range(HELD):
            total = fma_f32(low(x_words[word]), low(words[word]), total)
            total = fma_f32(high(x_words[word]), high(words[word]), total)
        return total

    def gemv(out: Any, x: Any, weight: Any, bias: Any, n: Any, packs: Any, weight_stride: Any) -> None:
        griddep_launch()
        lane = int32(cuda.threadIdx.x & 31)
        row = int32((int32(cuda.blockIdx.x) * WARPS + int32(cuda.threadIdx.x >> 5)) * ROWS)
        if row < n:
            upper = cuda.local.array(HELD, np.int32)
            lower = cuda.local.array(HELD, np.int32)
            x_words = cuda.local.array(HELD, np.int32)
            at = int64(weight + int64(row) * weight_stride + int64(lane) * PACK)
            x_at = int64(x + int64(lane) * PACK)
            load(upper, at, lane, packs)
            load(lower, int64(at + weight_stride), lane, packs)
            griddep_wait()
            first_sum = np.float32(0)
            second_sum = np.float32(0)
            done = int32(0)
            while done < packs:
                first = int32(done + lane)
                for i in range(AT_ONCE):
                    mine = int32(first + WARP * i < packs)
                    ld_global_v4_if_at(mine, x_words, 4 * i, int64(x_at + (WARP * PACK) * i))
                first_sum = add_products(first_sum, upper, x_words)
                second_sum = add_products(second_sum, lower, x_words)
                done = int32(done + WARP * AT_ONCE)
                at = int64(at + WARP * AT_ONCE * PACK)
                x_at = int64(x_at + WARP * AT_ONCE * PACK)
                load(upper, at, int32(done + lane), packs)
                load(lower, int64(at + weight_stride), int32(done + lane), packs)
            first_sum = lane_sum(first_sum)
            second_sum = lane_sum(second_sum)
            if has_bias:
                added = ld_global_i32(int64(bias + int64(row) * 2))
                first_sum = add_f32(first_sum, low(added))
                second_sum = add_f32(second_sum, high(added))
            one = int32(lane == 0)
            if out_dtype == "float32":
                st_global_v2_f32_if(one, int64(out + int64(row) * 4), first_sum, second_sum)
            else:
                st_global_b32_if(one, int64(out + int64(row) * 2), pack(first_sum, second_sum))

    return gemv


@cache
def gemv_kernel(dtype: str, out_dtype: str, has_bias: bool) -> Kernel:
    """The kernel of one specialisation, compiled when first launched."""
    key = (dtype, out_dtype, has_bias)
    name = "_".join(["gemv", dtype, out_dtype, *(["bias"] if has_bias else [])])
    return Kernel(
        name, lambda: make_gemv_kernel(*key), key, SIGNATURE, WARPS * WARP, pdl=True, archs=("sm_90a",)
    )


def blocks_and_arguments(o: Operands) -> tuple[int, tuple[int, ...]]:
    """How many blocks, and the kernel's arguments. ValueError for another number of tokens than one."""
    if o.m != 1:
        fail("gemm", "x", f"has {o.m} rows", "1: rung gemv multiplies one token")
    return -(-o.n // (WARPS * ROWS)), (o.out, o.x, o.weight, o.bias, o.n, o.k // ELEMENTS, o.weight_stride)


@lru_cache(maxsize=4096)
def prepared(o: Operands) -> Launch:
    """A launch ready to be repeated. ValueError as blocks_and_arguments."""
    blocks, arguments = blocks_and_arguments(o)
    return gemv_kernel(o.dtype, o.out_dtype, o.bias != 0).prepare(blocks, arguments)


def gemv(out: Any, x: Any, weight: Any, bias: Any = None, *, stream: Any = None) -> None:
    """Rung "gemv": out[1, N] = x[1, K] @ weight[N, K]^T (+ bias[N]) in float32, compute capability 9.0.

    x, weight, bias: bfloat16 (bits as uint16) or float16; out: the same, or float32. N and K are multiples
    of 8. Not batch-invariant: see the module. ValueError for wrong dtypes, shapes, strides, alignment, more
    than one token, or another GPU.
    """
    require_capability("gemv")
    prepared(operands(out, x, weight, bias, INPUTS))(stream)
