"""RMSNorm, with or without the residual addition before it, a block a row.

Knows: one kernel and its launch. Refuses to know: which layer a row belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from kernels_numba.checks import check, fail
from kernels_numba.compiler import cuda, jit
from kernels_numba.launch import Kernel, Launch
from kernels_numba.ops.warp.door import (
    HALVES,
    MAX_HIDDEN,
    NAMES,
    Plan,
    View,
    count_address,
    multiple_of_8,
    packed,
    plan_and_prepare,
    row_bytes,
    view,
    view_count,
    warp_kernel,
)
from kernels_numba.ops.warp.elements import (
    ELEMENTS,
    PACK,
    WARP,
    make_block_sum,
    make_elements,
    make_real_rows,
    make_scale_pack,
    make_sum_of_squares,
)
from kernels_numba.ptx.arith import add_f32, divide_f32
from kernels_numba.ptx.griddep import griddep_launch, griddep_wait
from kernels_numba.ptx.packs import ld_global_nc_v4_if_at, ld_global_v4_if_at, st_global_v4_if_at
from kernels_numba.ptx.quotients import sqrt_f32

OP = "rms_norm"
SIGNATURE = "void(int64, int64, int64, int64, int64, int32, int32, int32, int32, int32, float32, float32)"


@dataclass(frozen=True)
class RmsNormConfig:
    """A block's threads, and the packs of 8 elements that each holds of its row."""

    threads: int
    packs: int

    @property
    def columns(self) -> int:
        """The longest row."""
        return self.threads * self.packs * ELEMENTS


# Two packs a thread: of x, residual and weight that is 96 bytes in flight. The longest rows hold four.
CONFIGS = (*(RmsNormConfig(threads, 2) for threads in (32, 64, 128, 256, 512)), RmsNormConfig(512, 4))


def pick_rms_norm_config(hidden_size: int) -> RmsNormConfig:
    """The first of CONFIGS that holds a row: by the hidden size alone, because it sets the order of the sum.
    ValueError for a row that none holds."""
    for config in CONFIGS:
        if hidden_size <= config.columns:
            return config
    raise ValueError(f"{OP}: hidden size is {hidden_size}; at most {MAX_HIDDEN} is required")


def make_rms_norm_kernel(config: RmsNormConfig, dtype: str, has_residual: bool, pdl: bool = False) -> Any:
    """out = x / sqrt(mean(x^2) + eps) * weight; with has_residual, x is residual + x, rounded and stored as
    the new residual first.

    Arguments: out, x, weight, residual: addresses of T[rows, H], T[rows, H], T[H], T[rows, H] (0 if unused);
    num_rows: address of i32[1], the real number of rows, or 0; rows; packs: H / 8; out_stride, x_stride,
    residual_stride: bytes from row to row; width: H; eps.
    Who does what: block r takes row r; thread i holds the packs i, i + threads, ... of it, 8 elements each,
    in registers from the first load to the last store. Lanes beyond the row hold zeros. Rows at and past the
    real number are neither read nor written. `out` may be `x`.
    The order of the sum of squares: each thread's elements ascending, one fma each; lanes 16, 8, 4, 2, 1
    apart; warps ascending. It depends on H alone.
    Dependent launches (pdl): the next launch may begin at once, and this one waits for those before it before
    it reads or writes anything; so it may be anywhere in a chain of them.
    Rounding: residual + x once; mean, sum with eps, root and reciprocal each to nearest; value x scale, then
    x weight, then once to T. Shared memory: f32[warps] partial sums, one barrier. Registers: 48 at most, 80
    with four packs.
    """
    threads, packs_held, held_words = config.threads, config.packs, 4 * config.packs
    int32, int64 = cuda.types.int32, cuda.types.int64
    low, high, pack = make_elements(dtype)
    real_rows, block_sum = make_real_rows(), make_block_sum(threads // WARP)
    sum_of_squares, scale_pack = make_sum_of_squares(dtype), make_scale_pack(dtype)

    @jit(device=True)
    def add_packs(words: Any, more: Any, at: Any) -> None:
        """words[at .. at + 3] = both, rounded."""
        for word in range(4):
            first = add_f32(low(more[at + word]), low(words[at + word]))
            second = add_f32(high(more[at + word]), high(words[at + word]))
            words[at + word] = pack(first, second)

    def rms_norm(
        out: Any, x: Any, weight: Any, residual: Any, num_rows: Any, rows: Any, packs: Any, out_stride: Any,
        x_stride: Any, residual_stride: Any, width: Any, eps: Any,
    ) -> None:  # fmt: skip
        if pdl:
            griddep_launch()
            griddep_wait()
        row = int32(cuda.blockIdx.x)
        if row < real_rows(num_rows, rows):
            thread = int32(cuda.threadIdx.x)
            words = cuda.local.array(held_words, np.int32)
            more = cuda.local.array(held_words, np.int32)
            by = cuda.local.array(held_words, np.int32)
            x_at = int64(x + int64(row) * int64(x_stride) + int64(thread) * PACK)
            out_at = int64(out + int64(row) * int64(out_stride) + int64(thread) * PACK)
            residual_at = int64(residual + int64(row) * int64(residual_stride) + int64(thread) * PACK)
            weight_at = int64(weight + int64(thread) * PACK)
            for i in range(packs_held):
                mine = int32(thread + i * threads < packs)
                ld_global_v4_if_at(mine, words, 4 * i, int64(x_at + i * threads * PACK))
            if has_residual:
                for i in range(packs_held):
                    mine = int32(thread + i * threads < packs)
                    ld_global_v4_if_at(mine, more, 4 * i, int64(residual_at + i * threads * PACK))
            for i in range(packs_held):
                mine = int32(thread + i * threads < packs)
                ld_global_nc_v4_if_at(mine, by, 4 * i, int64(weight_at + i * threads * PACK))
            total = np.float32(0)
            for i in range(packs_held):
                if has_residual:
                    add_packs(words, more, 4 * i)
                    mine = int32(thread + i * threads < packs)
                    st_global_v4_if_at(mine, int64(residual_at + i * threads * PACK), words, 4 * i)
                total = sum_of_squares(words, 4 * i, total)
            mean = divide_f32(block_sum(total), width)
            scale = divide_f32(np.float32(1), sqrt_f32(add_f32(mean, eps)))
            for i in range(packs_held):
                scale_pack(words, 4 * i, scale, by, 4 * i)
                mine = int32(thread + i * threads < packs)
                st_global_v4_if_at(mine, int64(out_at + i * threads * PACK), words, 4 * i)

    return rms_norm


@cache
def rms_norm_kernel(config: RmsNormConfig, dtype: str, has_residual: bool, pdl: bool) -> Kernel:
    """The kernel of one specialisation, compiled when first launched."""
    words = ["rms_norm_warp", f"{config.threads}x{config.packs}", dtype]
    words += ["residual"] if has_residual else []
    specialised = (config, dtype, has_residual)
    return warp_kernel("_".join(words), make_rms_norm_kernel, specialised, SIGNATURE, config.threads, pdl)


def kernels() -> Iterator[Kernel]:
    """Every kernel that an engine in bfloat16 can pick, for building them ahead: its products add
    residuals."""
    for pdl in (False, True):
        for config in CONFIGS:
            yield rms_norm_kernel(config, "bfloat16", False, pdl)


def plan_rms_norm(
    out: View,
    x: View,
    weight: View,
    residual: View | None,
    num_rows: View | None,
    eps: float,
    pdl: bool = False,
) -> Plan | None:
    """The launch for these operands; None for nothing to do.

    out, x, residual T[rows, H], weight T[H], T bfloat16 bits or float16; rows of the first three may be cut
    from wider ones; H a multiple of 8 up to 16,384. ValueError names what is wrong.
    """
    check(OP, "out", out, HALVES, (None, None), rows=1)
    rows, hidden = out.shape
    check(OP, "x", x, (out.dtype,), out.shape, rows=1)
    check(OP, "weight", weight, (out.dtype,), (hidden,))
    if residual is not None:
        check(OP, "residual", residual, (out.dtype,), out.shape, rows=1)
    if not eps >= 0:
        fail(OP, "eps", f"is {eps!r}", "a number of at least 0")
    if out.size == 0:
        return None
    multiple_of_8(OP, "out.shape[1]", hidden)
    config = pick_rms_norm_config(hidden)
    at = [packed(OP, name, one, rows=1) for name, one in (("out", out), ("x", x))]
    at += [packed(OP, "weight", weight), packed(OP, "residual", residual, rows=1) if residual else 0]
    arguments = (
        *at, count_address(OP, num_rows), rows, hidden // ELEMENTS, row_bytes(out), row_bytes(x),
        row_bytes(residual) if residual else 0, float(hidden), eps,
    )  # fmt: skip
    kernel = rms_norm_kernel(config, NAMES[out.dtype], residual is not None, pdl)
    return Plan(kernel, rows, arguments)


@lru_cache(maxsize=4096)
def prepared(
    out: View, x: View, weight: View, residual: View | None, num_rows: View | None, eps: float
) -> Launch | None:
    """plan_rms_norm's launch, ready to be repeated. ValueError on a GPU that is too old."""
    return plan_and_prepare(OP, plan_rms_norm, out, x, weight, residual, num_rows, eps)


def rms_norm_warp(
    out: Any, x: Any, weight: Any, *, eps: float, residual: Any = None, stream: Any = None,
    num_rows: Any = None,
) -> None:  # fmt: skip
    """Rung "warp" of rms_norm; see make_rms_norm_kernel and plan_rms_norm. num_rows: device i32[1]."""
    launch = prepared(
        view(OP, "out", out), view(OP, "x", x), view(OP, "weight", weight),
        None if residual is None else view(OP, "residual", residual), view_count(OP, num_rows), eps,
    )  # fmt: skip
    if launch is not None:
        launch(stream)
