"""Rotary embedding of queries and keys in place, then new keys and values to their pages.

Rungs reference and plain are rope, then store_kv; the warp rung does both in one pass, with the same bits.
Knows: that order. Refuses to know: how angles were made, whose pages they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, fail
from kernels_numba.cost import ITEMSIZE, Cost
from kernels_numba.ops.rope import rope, rope_cost, rope_spec, turn_rows
from kernels_numba.ops.store_kv import scatter_rows, store_kv, store_kv_cost, store_kv_spec
from kernels_numba.registry import Rung, make_register

OP = "rope_store_kv"


def rope_store_kv_spec(
    q: Any, k: Any, v: Any, positions: Any, cos_sin: Any, k_cache: Any, v_cache: Any, slot_mapping: Any
) -> tuple[Any, Any, Any, Any]:
    """(q', k', k_cache', v_cache'): rope_spec, k' rounded to k's dtype, then store_kv_spec of k' and v.

    q[T, Hq, D], k, v[T, Hkv, D], positions, slot_mapping int32[T], cos_sin float32[max_pos, D], caches
    [num_blocks, Hkv, block_size, D]; ValueError as they raise it.
    """
    q_turned, k_turned = rope_spec(q, k, positions, cos_sin)
    rounded = k_turned.astype(np.asarray(k).dtype)
    return q_turned, k_turned, *store_kv_spec(k_cache, v_cache, rounded, v, slot_mapping)


def rope_store_kv_cost(
    num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: str = "bfloat16"
) -> Cost:
    """rope and store_kv, but k is not read again."""
    again = num_tokens * num_kv_heads * head_dim * ITEMSIZE[dtype]
    both = rope_cost(num_tokens, num_q_heads, num_kv_heads, head_dim, dtype) + store_kv_cost(
        num_tokens, num_kv_heads, head_dim, dtype
    )
    return Cost(both.bytes - again, both.flops)


def _check(
    kind: type[Host], q: Any, k: Any, v: Any, positions: Any, cos_sin: Any, k_cache: Any, v_cache: Any,
    slot_mapping: Any,
) -> None:  # fmt: skip
    dtypes = kind.elements(OP, "q", q)
    check(OP, "q", q, dtypes, (None, None, None), rows=1)
    tokens, _, head_dim = q.shape
    if head_dim % 2:
        fail(OP, "q", f"has head_dim {head_dim}", "an even head_dim")
    check(OP, "k", k, dtypes, (tokens, None, head_dim), rows=1)
    check(OP, "v", v, dtypes, k.shape, rows=1)
    check(OP, "positions", positions, kind.int32, (tokens,))
    check(OP, "cos_sin", cos_sin, kind.float32, (None, head_dim))
    check(OP, "k_cache", k_cache, dtypes, (None, k.shape[1], None, head_dim))
    check(OP, "v_cache", v_cache, dtypes, k_cache.shape)
    check(OP, "slot_mapping", slot_mapping, kind.int32, (tokens,))


def composed(turn: Callable[..., None], store: Callable[..., None], kind: type[Host] | None = None) -> Rung:
    """The rung that is a rung of rope, then one of store_kv. kind: of arrays, all checked before the first
    is written; None leaves it to the two."""

    def rope_then_store_kv(
        q: Any, k: Any, v: Any, positions: Any, cos_sin: Any, k_cache: Any, v_cache: Any, slot_mapping: Any,
        *, stream: Any = None,
    ) -> None:  # fmt: skip
        """Turn q and k in place, then store k and v. ValueError for wrong dtypes, shapes, strides."""
        if kind is not None:
            _check(kind, q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping)
        turn(q, k, positions, cos_sin, stream=stream)
        store(k_cache, v_cache, k, v, slot_mapping, stream=stream)

    return rope_then_store_kv


rope_store_kv_reference = composed(turn_rows, scatter_rows, Host)  # a check costs as much as the work
rope_store_kv = composed(rope, store_kv, Device)


def rope_store_kv_warp(
    q: Any, k: Any, v: Any, positions: Any, cos_sin: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, *,
    stream: Any = None, num_rows: Any = None,
) -> None:  # fmt: skip
    """Rung "warp" (sm_80 and newer): one pass, 16 bytes a lane; see warp/rope_store_kv.py, which is imported
    when first used. num_rows: device i32[1], the real number of rows."""
    from kernels_numba.ops.warp.rope_store_kv import rope_store_kv_warp

    rope_store_kv_warp(
        q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, stream=stream, num_rows=num_rows
    )


CASES: dict[str, dict[str, Any]] = {
    "toy": {
        "num_tokens": 3, "num_q_heads": 3, "num_kv_heads": 1, "head_dim": 4, "max_pos": 11, "num_blocks": 2,
        "block_size": 4,
    },
    "toy_empty": {
        "num_tokens": 0, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 4, "max_pos": 11, "num_blocks": 2,
        "block_size": 4,
    },
    "smollm2_135m_prefill": {
        "num_tokens": 700, "num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64, "max_pos": 2048,
        "num_blocks": 20, "block_size": 64,
    },
    "llama3_8b_decode": {
        "num_tokens": 64, "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "max_pos": 8192,
        "num_blocks": 70, "block_size": 64,
    },
}  # fmt: skip
rungs: dict[str, Rung] = {
    "reference": rope_store_kv_reference, "plain": rope_store_kv, "warp": rope_store_kv_warp,
}  # fmt: skip
register = make_register(OP, rungs)
