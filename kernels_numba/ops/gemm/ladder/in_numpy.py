"""The two tensor-core steps on numpy arrays, without a GPU: for reading, breaking and testing them.

Knows: what each step's launcher passes. Refuses to know: speed (a 128 x 128 tile takes some hundredths of a
second).
"""

from __future__ import annotations

import inspect
from typing import Any

from kernels_numba import simt
from kernels_numba.checks import check, fail
from kernels_numba.ops.gemm.door import BFLOAT16, FLOAT32, NAMES
from kernels_numba.ops.gemm.ladder import mma_step, wgmma

STEPS: dict[str, Any] = {"mma_step": mma_step, "wgmma": wgmma}


def source_of(step: str) -> str:
    """The text of a step's module; ValueError for another name."""
    if step not in STEPS:
        raise ValueError(f"step is {step!r}; there are {', '.join(STEPS)}")
    return inspect.getsource(STEPS[step])


def in_numpy(
    step: str, out: Any, x: Any, weight: Any, bias: Any = None, *, residual: Any = None, source: str = ""
) -> None:
    """out[M, N] = x[M, K] @ weight[N, K]^T (+ bias[N]) by a step's kernel, block after block, in simt.py.

    numpy arrays: x, weight, bias, residual bfloat16 bits as uint16, out the same or float32; rows may be cut
    from wider ones. source: another text of the step's module, to see what a change does. ValueError for
    wrong dtypes and shapes, IndexError where the kernel leaves an array, RuntimeError where it would hang.
    """
    source = source or source_of(step)
    module = STEPS[step]
    check("gemm", "out", out, (BFLOAT16, FLOAT32), (None, None), rows=1)
    (m, n), k = out.shape, x.shape[1]
    check("gemm", "x", x, (BFLOAT16,), (m, None), rows=1)
    check("gemm", "weight", weight, (BFLOAT16,), (n, k), rows=1)
    for name, size in (("n", n), ("k", k)):
        if size == 0 or size % 8:
            fail("gemm", name, f"is {size}", "a positive multiple of 8")
    memory = simt.Memory()
    out_at, x_at, weight_at = map(memory.put, (out, x, weight))
    if bias is not None:
        check("gemm", "bias", bias, (BFLOAT16,), (n,))
    bias_at = 0 if bias is None else memory.put(bias)
    residual_at = residual_stride = 0
    if residual is not None:
        check("gemm", "residual", residual, (BFLOAT16,), (m, n), rows=1)
        residual_at = out_at if residual is out else memory.put(residual)
        residual_stride = residual.strides[0]
    maps = {1: (x, (module.TILE_M, module.TILE_K)), 2: (weight, (module.TILE_N, module.TILE_K))}
    arguments = {
        "mma_step": (
            out_at, x_at, weight_at, bias_at, residual_at, m, n, k, out.strides[0], x.strides[0],
            weight.strides[0], residual_stride,
        ),
        "wgmma": (1, 2, out_at, bias_at, residual_at, m, n, k, out.strides[0], residual_stride),
    }[step]  # fmt: skip
    specialised = (NAMES[out.dtype], bias is not None, residual is not None)
    grid = -(-m // module.TILE_M) * -(-n // module.TILE_N)
    simt.run(
        source, f"make_{step}_kernel", specialised, arguments, grid, module.THREADS, module.PLAN.bytes,
        memory, maps,
    )  # fmt: skip
