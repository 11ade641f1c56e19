"""The gated activation of a SwiGLU block, on interleaved gate and up columns.

Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv 2002.05202).
Knows: the interleaving in blocks of 8. Refuses to know: the products around it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, fail
from kernels_numba.compiler import SIMULATOR, cuda, element, element_name, jit
from kernels_numba.cost import ITEMSIZE, Cost
from kernels_numba.registry import Rung, make_register
from kernels_numba.wide import wide

THREADS = 2 if SIMULATOR else 128
GROUP = 8  # columns of gate, then as many of up


def silu_mul_spec(gate_up: Any) -> Any:
    """out = silu(gate) * up with silu(g) = g / (1 + exp(-g)): gate_up[T, 2I] -> float32[T, I], I a multiple
    of 8.

    Columns 16j .. 16j+7 of gate_up are the gates and 16j+8 .. 16j+15 the ups of the neurons 8j .. 8j+7.
    """
    rows, columns = gate_up.shape
    pairs = wide(gate_up).reshape(rows, columns // (2 * GROUP), 2, GROUP)
    gate, up = pairs[:, :, 0], pairs[:, :, 1]
    with np.errstate(over="ignore"):  # exp(-g) = inf for g < -88 gives the right limit, 0
        out = gate / (1 + np.exp(-gate)) * up
    return out.reshape(rows, columns // 2)


def silu_mul_cost(num_tokens: int, intermediate_size: int, dtype: str = "bfloat16") -> Cost:
    """gate and up read, out written; 5 operations an output (negate, exp, add, divide, multiply)."""
    outputs = num_tokens * intermediate_size
    return Cost(bytes=3 * outputs * ITEMSIZE[dtype], flops=5 * outputs)


@cache
def make_silu_mul_kernel(dtype: str, threads: int = THREADS) -> Any:
    """out[t, n] = g / (1 + exp(-g)) * u with g = gate_up[t, 16 (n / 8) + n % 8] and u 8 columns further.

    Arguments: out T[num_tokens, I], gate_up T[num_tokens, 2I].
    Who does what: block (t, c) makes `threads` outputs of row t, one a thread.
    """
    to_float, from_float = element(dtype).to_float, element(dtype).from_float

    @jit()
    def silu_mul_kernel(out: Any, gate_up: Any) -> None:
        token = cuda.blockIdx.x
        neuron = cuda.blockIdx.y * threads + cuda.threadIdx.x
        if neuron < out.shape[1]:
            column = neuron // GROUP * (2 * GROUP) + neuron % GROUP
            gate = to_float(gate_up[token, column])
            up = to_float(gate_up[token, column + GROUP])
            out[token, neuron] = from_float(gate / (np.float32(1) + np.float32(math.exp(-gate))) * up)

    return silu_mul_kernel


def _check(kind: type[Host], out: Any, gate_up: Any) -> None:
    dtypes = kind.elements("silu_mul", "out", out)
    check("silu_mul", "out", out, dtypes, (None, None), rows=1)
    if out.shape[1] % GROUP:
        fail("silu_mul", "out", f"has {out.shape[1]} columns", f"a multiple of {GROUP}")
    check("silu_mul", "gate_up", gate_up, dtypes, (out.shape[0], 2 * out.shape[1]), rows=1)


def silu_mul_reference(out: Any, gate_up: Any, *, stream: Any = None) -> None:
    """Rung "reference": numpy; the gates are copied together so that exp runs over contiguous memory."""
    _check(Host, out, gate_up)
    if not (
        out.dtype == gate_up.dtype == np.float32 and out.flags.c_contiguous and gate_up.flags.c_contiguous
    ):
        out[...] = silu_mul_spec(gate_up)
        return
    pairs = gate_up.reshape(out.shape[0], -1, 2, GROUP) if out.size else gate_up.reshape(0, 0, 2, GROUP)
    gate = pairs[:, :, 0].copy()
    scratch = np.negative(gate)
    with np.errstate(over="ignore"):
        np.exp(scratch, out=scratch)
    scratch += np.float32(1)
    np.divide(gate, scratch, out=scratch)
    np.multiply(scratch, pairs[:, :, 1], out=out.reshape(scratch.shape))


def silu_mul(out: Any, gate_up: Any, *, stream: Any = None) -> None:
    """Rung "plain": launch the kernel on `stream`. ValueError for wrong dtypes, shapes, strides."""
    _check(Device, out, gate_up)
    if out.size == 0:
        return
    kernel = make_silu_mul_kernel(element_name(out))
    kernel[(out.shape[0], -(-out.shape[1] // THREADS)), THREADS, stream or 0](out, gate_up)


def silu_mul_warp(out: Any, gate_up: Any, *, stream: Any = None, num_rows: Any = None) -> None:
    """Rung "warp" (sm_80 and newer): 16 bytes a lane; see warp/silu_mul.py, imported when first used.
    num_rows: device i32[1], the real number of rows; those from there on are left alone."""
    from kernels_numba.ops.warp.silu_mul import silu_mul_warp

    silu_mul_warp(out, gate_up, stream=stream, num_rows=num_rows)


CASES: dict[str, dict[str, Any]] = {
    "toy": {"num_tokens": 2, "intermediate_size": 24},
    "toy_empty": {"num_tokens": 0, "intermediate_size": 8},
    "smollm2_135m_prefill": {"num_tokens": 700, "intermediate_size": 1536},
    "llama3_8b_decode": {"num_tokens": 64, "intermediate_size": 14336},
}
rungs: dict[str, Rung] = {"reference": silu_mul_reference, "plain": silu_mul, "warp": silu_mul_warp}
register = make_register("silu_mul", rungs)
