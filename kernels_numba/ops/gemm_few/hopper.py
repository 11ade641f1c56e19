"""The GEMM for few tokens, launched: which kernel it is, its tensor maps, how many blocks.

Knows: specialisations and launches. Refuses to know: the kernel's inside (kernel.py), and which of two GEMMs
is the faster one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda
from kernels_numba.launch import Kernel, Launch, address
from kernels_numba.ops.gemm.boxes import encode_boxes
from kernels_numba.ops.gemm.door import require_capability
from kernels_numba.ops.gemm.hopper import num_sms
from kernels_numba.ops.gemm_few.config import (
    CONFIGS,
    PRODUCT,
    Build,
    FewConfig,
    pick_few_config,
    smem_plan,
)
from kernels_numba.ops.gemm_few.door import OP, FewOperands, arguments_of, few_operands
from kernels_numba.ops.gemm_few.kernel import SIGNATURE, make_gemm_few_kernel
from kernels_numba.ops.warp.door import count_address, view_count

# (out_dtype, epilogue, has_bias) of an engine in bfloat16: qkv with and without bias, o and down, gate and
# up, the head.
USED = (
    ("bfloat16", "", False), ("bfloat16", "", True), ("bfloat16", "residual", False),
    ("bfloat16", "silu", False), ("float32", "", False),
)  # fmt: skip


@cache
def few_kernel(
    config: FewConfig, dtype: str, out_dtype: str, epilogue: str, has_bias: bool, build: Build = PRODUCT
) -> Kernel:
    """The kernel of one specialisation, compiled when first launched."""
    words = [str(config), dtype, out_dtype, epilogue, "bias" if has_bias else ""]
    words += [name for name in ("debug", "stress") if getattr(build, name)] + [build.mutant]
    key = (config, dtype, out_dtype, epilogue, has_bias, build)
    return Kernel(
        "_".join([OP, *filter(None, words)]), lambda: make_gemm_few_kernel(*key), key,
        SIGNATURE, config.threads, smem_plan(config).bytes, pdl=build.pdl, archs=("sm_90a",),
    )  # fmt: skip


def kernels() -> Iterator[Kernel]:
    """Every kernel that an engine in bfloat16 can pick, for building them ahead."""
    for out_dtype, epilogue, has_bias in USED:
        for config in CONFIGS:
            yield few_kernel(config, "bfloat16", out_dtype, epilogue, has_bias)


@lru_cache(maxsize=4096)
def prepared(o: FewOperands, num_rows: int, config: FewConfig, build: Build = PRODUCT) -> tuple[Launch, Any]:
    """A launch ready to be repeated, and the tensor maps it reads, u64[4, 16] on the device.

    num_rows: address of the real M, or 0. Who captures a launch into a graph keeps what this returns as long
    as the graph.
    """
    g = o.given
    words = np.concatenate([
        encode_boxes(g.weight, g.dtype, (g.n, g.k), g.weight_stride, config.tile_n),
        encode_boxes(g.x, g.dtype, (g.m, g.k), g.x_stride, config.tile_t),
    ])  # fmt: skip
    maps = cuda.to_device(words)
    kernel = few_kernel(config, g.dtype, g.out_dtype, o.epilogue, g.bias != 0, build)
    tiles = -(-g.n // config.tile_n) * -(-g.m // config.tile_t)
    arguments = arguments_of(o, address(maps), num_rows)
    return kernel.prepare(min(tiles, config.blocks * num_sms()), arguments), maps


def gemm_few(
    out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None, activation: str = "",
    stream: Any = None, num_rows: Any = None, config: FewConfig | None = None, build: Build = PRODUCT,
) -> None:  # fmt: skip
    """out[M, N] = x[M, K] @ weight[N, K]^T (+ bias[N]) on tensor cores for few tokens, accumulated in
    float32; compute capability 9.0.

    x, weight, bias, residual: bfloat16 (bits as uint16) or float16; out: the same, or float32. residual T[M,
    N], which may be out itself: out = residual + the rounded product. activation "silu": out[M, N / 2] of
    gates and ups in blocks of 8. N and K are multiples of 8; any M is right, few are fast. num_rows: device
    i32[1] with the real M, at most x's rows, read when the kernel runs; rows from there on are not written.
    Weights must not be written by a launch right before this one (see make_gemm_few_kernel). config and build
    force a tile and a kind of kernel (tuning, tests). ValueError for wrong dtypes, shapes, strides or
    alignment, or another GPU.
    """
    require_capability("hopper")
    o = few_operands(out, x, weight, bias, residual, activation)
    if o.given.m == 0:
        return
    count = count_address(OP, view_count(OP, num_rows))
    picked = config or pick_few_config(o.given.m, o.given.n, o.given.k, num_sms())
    launch, _ = prepared(o, count, picked, build)
    launch(stream)
