"""Logits of the rows that need them: the last product of the model, on selected rows only.

Knows: which rows of the hidden states to take. Refuses to know: sampling.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, check_aligned
from kernels_numba.compiler import element_name
from kernels_numba.cost import Cost
from kernels_numba.ops.gemm import blas_product, gemm_cost, make_gemm_kernel, pick_config
from kernels_numba.registry import Rung, make_register
from kernels_numba.wide import wide


def lm_head_spec(hidden: Any, weight: Any, logits_rows: Any) -> Any:
    """out[r] = weight @ hidden[logits_rows[r]]: hidden[T, H], weight[V, H], logits_rows int32[R] ->
    float32[R, V]."""
    rows = np.asarray(logits_rows)
    bad = rows[(rows < 0) | (rows >= len(hidden))]
    if bad.size:
        raise ValueError(f"lm_head: logits_rows holds {bad[0]}; 0 to {len(hidden) - 1} are required")
    return wide(hidden)[rows] @ wide(weight).T


def lm_head_cost(num_rows: int, vocab_size: int, hidden_size: int, dtype: str = "bfloat16") -> Cost:
    """A gemm with float32 output, plus one row number a row."""
    return gemm_cost(num_rows, vocab_size, hidden_size, dtype=dtype, out_dtype="float32") + Cost(
        4 * num_rows, 0
    )


def make_lm_head_kernel(num_rows: int, dtype: str) -> Any:
    """out[r, v] = sum_k hidden[logits_rows[r], k] weight[v, k], float32: the gemm kernel with gathered rows.

    Arguments: out f32[R, V], hidden T[num_tokens, H], weight T[V, H], weight again (no bias), logits_rows
    i32[R], whose values must be rows of hidden. Who does what: see make_gemm_kernel.
    """
    return make_gemm_kernel(pick_config(num_rows), dtype, "float32", has_bias=False, gather=True)


def _check(kind: type[Host], out: Any, hidden: Any, weight: Any, logits_rows: Any) -> None:
    dtypes = kind.elements("lm_head", "hidden", hidden)
    check("lm_head", "hidden", hidden, dtypes, (None, None), rows=1)
    check("lm_head", "weight", weight, dtypes, (None, hidden.shape[1]))
    check("lm_head", "out", out, kind.float32, (None, weight.shape[0]), rows=1)
    check("lm_head", "logits_rows", logits_rows, kind.int32, (out.shape[0],))


def lm_head_reference(out: Any, hidden: Any, weight: Any, logits_rows: Any, *, stream: Any = None) -> None:
    """Rung "reference": one BLAS product straight into `out`."""
    _check(Host, out, hidden, weight, logits_rows)
    if logits_rows.size and not 0 <= logits_rows.min() <= logits_rows.max() < len(hidden):
        lm_head_spec(hidden, weight, logits_rows)  # raises with the value
    if hidden.dtype == weight.dtype == np.float32:
        blas_product(out, hidden[logits_rows], weight)
    else:
        out[...] = lm_head_spec(hidden, weight, logits_rows)


def lm_head(out: Any, hidden: Any, weight: Any, logits_rows: Any, *, stream: Any = None) -> None:
    """Rung "plain": launch the kernel on `stream`. ValueError for wrong dtypes, shapes, strides."""
    _check(Device, out, hidden, weight, logits_rows)
    check_aligned("lm_head", "weight", weight)
    if out.size == 0:
        return
    config = pick_config(out.shape[0])
    kernel = make_lm_head_kernel(out.shape[0], element_name(hidden))
    grid = (-(-out.shape[1] // config.tile_n), -(-out.shape[0] // config.tile_m))
    kernel[grid, config.threads, stream or 0](out, hidden, weight, weight, logits_rows, hidden)


def lm_head_warp(
    out: Any, hidden: Any, weight: Any, logits_rows: Any, *, stream: Any = None, num_rows: Any = None,
    x_rows: Any = None,
) -> None:  # fmt: skip
    """Rung "warp" (sm_80 and newer): the rows are gathered into x_rows, a workspace T[at least R, H], then
    multiplied by a tensor-core GEMM; see warp/lm_head.py, which is imported when first used. num_rows: device
    i32[1], the real number of rows."""
    from kernels_numba.ops.warp.lm_head import lm_head_warp

    lm_head_warp(out, hidden, weight, logits_rows, stream=stream, num_rows=num_rows, x_rows=x_rows)


CASES: dict[str, dict[str, Any]] = {
    "toy": {"num_rows": 2, "num_tokens": 4, "vocab_size": 7, "hidden_size": 6},
    "toy_empty": {"num_rows": 0, "num_tokens": 3, "vocab_size": 7, "hidden_size": 4},
    "smollm2_135m_one": {"num_rows": 1, "num_tokens": 300, "vocab_size": 49152, "hidden_size": 576},
    "smollm2_135m_batch": {"num_rows": 20, "num_tokens": 64, "vocab_size": 49152, "hidden_size": 576},
}
rungs: dict[str, Rung] = {"reference": lm_head_reference, "plain": lm_head, "warp": lm_head_warp}
register = make_register("lm_head", rungs)
