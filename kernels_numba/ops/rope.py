"""Rotary position embedding of queries and keys, in place.

Source: Su et al. 2021, "RoFormer" (arXiv 2104.09864), in the rotate-half (NeoX) form that Hugging Face's
Llama uses. Knows: positions and a table of cosines and sines. Refuses to know: how the table's angles were
made.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, check_aligned, fail
from kernels_numba.compiler import SIMULATOR, cuda, element, element_name, jit
from kernels_numba.cost import ITEMSIZE, Cost
from kernels_numba.registry import Rung, make_register
from kernels_numba.wide import wide

THREADS = 2 if SIMULATOR else 128


def rope_spec(q: Any, k: Any, positions: Any, cos_sin: Any) -> tuple[Any, Any]:
    """Rotate the pairs (i, i + D/2) of each head by the token's angles.

    q[T, Hq, D], k[T, Hkv, D] with D even, positions int32[T] in [0, max_pos), cos_sin float32[max_pos, D]
    whose rows hold D/2 cosines, then D/2 sines -> (q', k') float32, where x'[i] = x[i] cos[i] - x[i + D/2]
    sin[i] and x'[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]. A position outside the table raises ValueError.
    """
    positions = np.asarray(positions)
    bad = positions[(positions < 0) | (positions >= len(cos_sin))]
    if bad.size:
        raise ValueError(f"rope: positions holds {bad[0]}; 0 to {len(cos_sin) - 1} are required")
    half = cos_sin.shape[1] // 2
    rows = np.asarray(cos_sin)[positions][:, None, :]
    cos, sin = rows[..., :half], rows[..., half:]

    def rotate(x: Any) -> Any:
        low, high = wide(x)[..., :half], wide(x)[..., half:]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    return rotate(q), rotate(k)


def rope_cost(
    num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: str = "bfloat16"
) -> Cost:
    """q and k read and written, a table row and a position read per token; 6 operations a pair."""
    elements = num_tokens * (num_q_heads + num_kv_heads) * head_dim
    return Cost(bytes=2 * elements * ITEMSIZE[dtype] + num_tokens * (4 * head_dim + 4), flops=3 * elements)


@cache
def make_rope_kernel(head_dim: int, dtype: str, threads: int = THREADS) -> Any:
    """x'[i] = x[i] cos[i] - x[i + D/2] sin[i]; x'[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i].

    Arguments: q T[num_tokens, num_q_heads, D], k T[num_tokens, num_kv_heads, D], positions i32[num_tokens],
    cos_sin f32[max_pos, D].
    Who does what: block (t, c) turns `threads` pairs of token t, one a thread; pair numbers run over the
    heads of q, then those of k. Products and sums are written as mul and fma, so no compiler can fuse them in
    another way.
    """
    to_float, from_float = element(dtype).to_float, element(dtype).from_float
    half = head_dim // 2

    @jit(device=True)
    def rotate(x: Any, token: Any, head: Any, i: Any, cos: Any, sin: Any) -> None:
        low = to_float(x[token, head, i])
        high = to_float(x[token, head, i + half])
        x[token, head, i] = from_float(cuda.fma(low, cos, -(high * sin)))
        x[token, head, i + half] = from_float(cuda.fma(high, cos, low * sin))

    @jit()
    def rope_kernel(q: Any, k: Any, positions: Any, cos_sin: Any) -> None:
        token = cuda.blockIdx.x
        pair = cuda.blockIdx.y * threads + cuda.threadIdx.x
        head = pair // half
        i = pair % half
        position = positions[token]
        cos = np.float32(np.nan)
        sin = np.float32(np.nan)
        if (
            position >= 0 and position < cos_sin.shape[0]
        ):  # outside the table the answer is NaN, not a stray read
            cos = cos_sin[position, i]
            sin = cos_sin[position, i + half]
        if head < q.shape[1]:
            rotate(q, token, head, i, cos, sin)
        elif head < q.shape[1] + k.shape[1]:
            rotate(k, token, head - q.shape[1], i, cos, sin)

    return rope_kernel


def _check(kind: type[Host], q: Any, k: Any, positions: Any, cos_sin: Any) -> None:
    dtypes = kind.elements("rope", "q", q)
    check("rope", "q", q, dtypes, (None, None, None), rows=1)
    tokens, _, head_dim = q.shape
    if head_dim % 2:
        fail("rope", "q", f"has head_dim {head_dim}", "an even head_dim")
    check("rope", "k", k, dtypes, (tokens, None, head_dim), rows=1)
    check("rope", "positions", positions, kind.int32, (tokens,))
    check("rope", "cos_sin", cos_sin, kind.float32, (None, head_dim))


def rope_reference(q: Any, k: Any, positions: Any, cos_sin: Any, *, stream: Any = None) -> None:
    """Rung "reference": numpy; turns q and k in place (rounded to their dtype)."""
    _check(Host, q, k, positions, cos_sin)
    turn_rows(q, k, positions, cos_sin)


def turn_rows(q: Any, k: Any, positions: Any, cos_sin: Any, *, stream: Any = None) -> None:
    """rope_reference for arrays that have been checked: only the positions' range is."""
    if positions.size and not 0 <= positions.min() <= positions.max() < len(cos_sin):
        rope_spec(q, k, positions, cos_sin)  # raises with the value
    half = q.shape[2] // 2
    rows = cos_sin[positions][:, None, :]
    cos, sin = rows[..., :half], rows[..., half:]
    for x in (q, k):
        low, high = x[..., :half], x[..., half:]
        turned = low * cos
        turned -= high * sin
        crossed = low * sin
        crossed += high * cos
        low[...] = turned
        high[...] = crossed


def rope(q: Any, k: Any, positions: Any, cos_sin: Any, *, stream: Any = None) -> None:
    """Rung "plain": launch the kernel on `stream`. ValueError for wrong dtypes, shapes, strides."""
    _check(Device, q, k, positions, cos_sin)
    check_aligned("rope", "cos_sin", cos_sin)
    tokens, num_q_heads, head_dim = q.shape
    pairs = (num_q_heads + k.shape[1]) * (head_dim // 2)
    if tokens * pairs == 0:
        return
    kernel = make_rope_kernel(head_dim, element_name(q))
    kernel[(tokens, -(-pairs // THREADS)), THREADS, stream or 0](q, k, positions, cos_sin)


CASES: dict[str, dict[str, Any]] = {
    "toy": {"num_tokens": 3, "num_q_heads": 3, "num_kv_heads": 1, "head_dim": 4, "max_pos": 11},
    "toy_empty": {"num_tokens": 0, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 4, "max_pos": 11},
    "smollm2_135m_prefill": {
        "num_tokens": 700,
        "num_q_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "max_pos": 2048,
    },
    "llama3_8b_decode": {
        "num_tokens": 64,
        "num_q_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "max_pos": 8192,
    },
}
rungs: dict[str, Rung] = {"reference": rope_reference, "plain": rope}
register = make_register("rope", rungs)
