"""Linear layer on everybody's card (sm_80, 86, 89, 120; sm_90 too): mma.sync, cp.async, many tokens and few.

    config.py     tiles, and which suits a shape       kernel.py    the kernel
    in_numpy.py   its text and its order without a GPU

It is rung "mma_sync" of gemm and gemm_silu_mul, which an engine takes on every card from 8.0 on but Hopper,
and the product of lm_head's rung "warp" there. It has run on
an H100, where its numbers, bits and fused forms are tested; on no other card yet. What it is at its simplest
is a step of the ladder (ops/gemm/ladder/mma_step.py). Knows: what the launcher checks and launches. Refuses
to know: what a row of x belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

from kernels_numba.checks import check, fail
from kernels_numba.compiler import cuda
from kernels_numba.launch import Kernel, Launch
from kernels_numba.ops.gemm.door import (
    ACTIVATIONS,
    BFLOAT16,
    FLOAT16,
    Operands,
    operands,
    require_capability,
)
from kernels_numba.ops.gemm_mma.config import CONFIGS, SM_SMEM, MmaConfig, pick_config
from kernels_numba.ops.gemm_mma.kernel import mma_kernel
from kernels_numba.ops.warp.door import Plan, View, count_address, view, view_count

OP = "gemm"
INPUTS = (BFLOAT16, FLOAT16)


class Card(NamedTuple):
    """What the choice of a tile asks of a card: its SMs, and bytes of shared memory of each."""

    num_sms: int
    sm_smem: int = SM_SMEM


SMALL_CARD = Card(128)  # for plans that meet no card


@cache
def card() -> Card:
    """The current device's."""
    device = cuda.get_current_device()
    return Card(int(device.MULTIPROCESSOR_COUNT), int(device.MAX_SHARED_MEMORY_PER_MULTIPROCESSOR))


def _operands(
    out: View, x: View, weight: View, bias: View | None, residual: View | None, activation: str
) -> Operands:
    """The door's, with N of the product: silu writes half as many columns."""
    if not activation:
        return operands(out, x, weight, bias, INPUTS, residual)
    if out.ndim != 2 or weight.ndim != 2 or weight.shape[0] != 2 * out.shape[1]:
        wanted = f"(2 x out's columns, any), out's shape is {out.shape}"
        fail(OP, "weight", f"has shape {weight.shape}", wanted)
    check(OP, "out", out, (x.dtype,), (None, None), rows=1)  # nothing is gated in float32
    n = weight.shape[0]
    if bias is not None:
        check(OP, "bias", bias, (x.dtype,), (n,))
    half = [None if one is None else one._replace(shape=(n // 2, *one.shape[1:])) for one in (weight, bias)]
    given = operands(out, x, half[0], half[1], INPUTS)
    return Operands(**{**vars(given), "n": n})


def plan_gemm_mma(
    out: View, x: View, weight: View, bias: View | None = None, residual: View | None = None,
    num_rows: View | None = None, activation: str = "", config: MmaConfig | None = None,
    on: Card = SMALL_CARD,
) -> Plan | None:  # fmt: skip
    """The launch for these operands on a card; None for nothing to do. ValueError names what is wrong."""
    if activation not in ACTIVATIONS:
        fail(OP, "activation", f"is {activation!r}", '"" or "silu"')
    if activation and residual is not None:
        fail(OP, "residual", f"is given beside activation {activation!r}", "one of the two")
    o = _operands(out, x, weight, bias, residual, activation)
    count = count_address(OP, num_rows)
    if o.m == 0:
        return None
    picked, group = pick_config(o.m, o.n, o.k, on.num_sms, on.sm_smem)
    config = config or picked
    epilogue = "residual" if residual is not None else activation
    kernel = mma_kernel(config, o.dtype, o.out_dtype, bias is not None, epilogue)
    arguments = (
        o.out, o.x, o.weight, o.bias, o.residual, count, o.m, o.n, o.k, o.out_stride, o.x_stride,
        o.weight_stride, o.residual_stride, group,
    )  # fmt: skip
    return Plan(kernel, -(-o.m // config.tile_m) * -(-o.n // config.tile_n), arguments)


@lru_cache(maxsize=4096)
def prepared(
    out: View, x: View, weight: View, bias: View | None, residual: View | None, num_rows: View | None,
    activation: str, config: MmaConfig | None,
) -> Launch | None:  # fmt: skip
    """plan_gemm_mma's launch on the current card, of 8.0 or newer, ready to be repeated."""
    plan = plan_gemm_mma(out, x, weight, bias, residual, num_rows, activation, config, card())
    return None if plan is None else plan.kernel.prepare(plan.grid, plan.arguments)


def gemm_mma(
    out: Any, x: Any, weight: Any, bias: Any = None, *, stream: Any = None, num_rows: Any = None,
    config: MmaConfig | None = None, residual: Any = None, activation: str = "",
) -> None:  # fmt: skip
    """out[M, N] = x[M, K] @ weight[N, K]^T (+ bias[N]) on tensor cores of sm_80 and newer, in float32.

    x, weight, bias: bfloat16 (bits as uint16) or float16; out: the same, or float32. N and K are multiples of
    8. num_rows: device i32[1] with the real M, read when the kernel runs: rows of x, residual and out from
    there on are neither read nor written. residual [M, N], which may be out: out = residual + product, the
    product rounded first. activation "silu": weight's rows are gates and ups in blocks of 8, out [M, N / 2] =
    silu(gate) up. Both give the bits of the ops they stand for. config forces a tile; no choice of it shows
    in a bit. ValueError for wrong dtypes, shapes, strides, alignment, or a GPU that is too old.
    """
    require_capability("mma_sync")
    given = [None if a is None else view(OP, name, a) for name, a in (("bias", bias), ("residual", residual))]
    launch = prepared(
        view(OP, "out", out), view(OP, "x", x), view(OP, "weight", weight), given[0], given[1],
        view_count(OP, num_rows), activation, config,
    )  # fmt: skip
    if launch is not None:
        launch(stream)


def kernels() -> Iterator[Kernel]:
    """Every kernel that an engine in bfloat16 can pick, for building them ahead."""
    for config in CONFIGS:
        for out_dtype, has_bias in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
            yield mma_kernel(config, "bfloat16", out_dtype, has_bias)
        for epilogue in ("residual", "silu"):
            yield mma_kernel(config, "bfloat16", "bfloat16", False, epilogue)
