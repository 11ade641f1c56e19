"""Embedding lookup: one row of a table per token.

Knows: token ids and the table. Refuses to know: where ids come from.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, check_aligned
from kernels_numba.compiler import SIMULATOR, cuda, element, element_name, jit
from kernels_numba.cost import ITEMSIZE, Cost
from kernels_numba.registry import Rung, make_register
from kernels_numba.wide import wide

THREADS = 2 if SIMULATOR else 128


def embedding_spec(token_ids: Any, weight: Any) -> Any:
    """out[t] = weight[token_ids[t]]: token_ids int32[T] in [0, V), weight[V, H] -> float32[T, H].

    A token id outside the table raises ValueError (the kernel, which cannot raise, writes NaN).
    """
    ids = np.asarray(token_ids)
    bad = ids[(ids < 0) | (ids >= len(weight))]
    if bad.size:
        raise ValueError(f"embedding: token_ids holds {bad[0]}; ids from 0 to {len(weight) - 1} are required")
    return wide(np.asarray(weight)[ids])


def embedding_cost(num_tokens: int, hidden_size: int, dtype: str = "bfloat16") -> Cost:
    """Each row read once and written once, each id read once; no arithmetic. (Repeated ids count again.)"""
    return Cost(bytes=num_tokens * (2 * hidden_size * ITEMSIZE[dtype] + 4), flops=0)


@cache
def make_embedding_kernel(dtype: str, threads: int = THREADS) -> Any:
    """out[t, h] = weight[token_ids[t], h].

    Arguments: out T[num_tokens, hidden], token_ids i32[num_tokens], weight T[vocab, hidden].
    Who does what: block (t, c) copies `threads` elements of row t from column c * threads on, one a thread.
    """
    from_float = element(dtype).from_float

    @jit()
    def embedding_kernel(out: Any, token_ids: Any, weight: Any) -> None:
        token = cuda.blockIdx.x
        column = cuda.blockIdx.y * threads + cuda.threadIdx.x
        if column < out.shape[1]:
            token_id = token_ids[token]
            if token_id < 0 or token_id >= weight.shape[0]:
                out[token, column] = from_float(np.float32(np.nan))  # never read outside the table
            else:
                out[token, column] = weight[token_id, column]

    return embedding_kernel


def _check(kind: type[Host], out: Any, token_ids: Any, weight: Any) -> None:
    dtypes = kind.elements("embedding", "out", out)
    check("embedding", "out", out, dtypes, (None, None), rows=1)
    check("embedding", "token_ids", token_ids, kind.int32, (out.shape[0],))
    check("embedding", "weight", weight, dtypes, (None, out.shape[1]))


def embedding_reference(out: Any, token_ids: Any, weight: Any, *, stream: Any = None) -> None:
    """Rung "reference": numpy; writes the rows into `out` (rounded to its dtype)."""
    _check(Host, out, token_ids, weight)
    if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < len(weight):
        embedding_spec(token_ids, weight)  # raises with the value
    out[...] = weight[token_ids]


def embedding(out: Any, token_ids: Any, weight: Any, *, stream: Any = None) -> None:
    """Rung "plain": launch the kernel on `stream`. ValueError for wrong dtypes, shapes, strides."""
    _check(Device, out, token_ids, weight)
    check_aligned("embedding", "weight", weight)
    if out.size == 0:
        return
    kernel = make_embedding_kernel(element_name(out))
    grid = (out.shape[0], -(-out.shape[1] // THREADS))
    kernel[grid, THREADS, stream or 0](out, token_ids, weight)


def embedding_warp(
    out: Any, token_ids: Any, weight: Any, *, stream: Any = None, num_rows: Any = None
) -> None:
    """Rung "warp" (sm_80 and newer): 16 bytes a lane; see warp/gather.py, which is imported
    when first used. num_rows: device i32[1], the real number of rows; those from there on are left alone."""
    from kernels_numba.ops.warp.gather import embedding_warp

    embedding_warp(out, token_ids, weight, stream=stream, num_rows=num_rows)


CASES: dict[str, dict[str, Any]] = {
    "toy": {"num_tokens": 3, "hidden_size": 5, "vocab_size": 7},
    "toy_empty": {"num_tokens": 0, "hidden_size": 4, "vocab_size": 7},
    "smollm2_135m_prefill": {"num_tokens": 1000, "hidden_size": 576, "vocab_size": 49152},
    "llama3_8b_decode": {"num_tokens": 64, "hidden_size": 4096, "vocab_size": 8192},
}
rungs: dict[str, Rung] = {"reference": embedding_reference, "plain": embedding, "warp": embedding_warp}
register = make_register("embedding", rungs)
