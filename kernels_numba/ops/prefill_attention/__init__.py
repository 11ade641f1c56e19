"""Causal attention of packed prompt rows over paged keys and values (GQA).

A whole prompt, a later chunk of one and a row behind a cached prefix are the same call: keys come from pages
only. Knows: cu_seqlens_q, context_lens, block_table. Refuses to know: which of these a sequence is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check
from kernels_numba.compiler import element_name, jit
from kernels_numba.cost import ITEMSIZE, Cost
from kernels_numba.paged_attention import (
    THREADS,
    TILE_KV,
    attention_cost,
    attention_numpy,
    attention_spec,
    check_attention,
    check_pages,
    first_key,
    gather,
    make_attention_kernel,
)
from kernels_numba.registry import Rung, make_register
from kernels_numba.wide import wide

OP = "prefill_attention"


def prefill_attention_spec(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    cu_seqlens_q: Any,
    context_lens: Any,
    block_table: Any,
    *,
    softmax_scale: float,
    window: int | None = None,
) -> Any:
    """out[t, h] = softmax(softmax_scale q k^T + causal mask) v, sequence by sequence -> float32[T, Hq, D].

    q[T, Hq, D], k_cache, v_cache[num_blocks, Hkv, block_size, D], cu_seqlens_q int32[B + 1] (absolute rows of
    q; rows outside are zero here and untouched by the rungs), context_lens int32[B] (this call's rows
    included), block_table int32[B, P], -1 padded. Row i of sequence b sits at position context_lens[b] - its
    rows + i and sees the keys 0 to there. Hq is a multiple of Hkv.
    """
    out = np.zeros_like(wide(q))
    for b, length in enumerate(np.asarray(context_lens).tolist()):
        first, last = int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1])
        if last > first and length > 0:
            k, v = gather(k_cache, block_table[b], length), gather(v_cache, block_table[b], length)
            start = length - (last - first)
            out[first:last] = attention_spec(q[first:last], k, v, start, softmax_scale, window)
    return out


def rows_attention_spec(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    context_lens: Any,
    *,
    softmax_scale: float,
    window: int | None = None,
) -> Any:
    """prefill_attention_spec without pages, for one-shot scoring: k, v[keys, Hkv, D] are packed, those of
    sequence b from row cu_seqlens_k[b] on, context_lens[b] of them -> float32[T, Hq, D]."""
    out = np.zeros_like(wide(q))
    for b, length in enumerate(np.asarray(context_lens).tolist()):
        first, last, at = int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]), int(cu_seqlens_k[b])
        if last > first and length > 0:
            keys, values = (wide(x[at : at + length]).transpose(1, 0, 2) for x in (k, v))
            start = length - (last - first)
            out[first:last] = attention_spec(q[first:last], keys, values, start, softmax_scale, window)
    return out


def prefill_attention_cost(
    query_lens: Any,
    context_lens: Any,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str = "bfloat16",
    window: int | None = None,
) -> Cost:
    """Sums over the ragged batch: a sequence with q rows and n keys has q n - q (q - 1) / 2 visible pairs and
    reads each of its n keys once; plus the int32 of cu_seqlens_q and context_lens (pages not counted).
    With a window a row has no more pairs than that, and keys before the first row's window are not read."""
    lens = list(zip(query_lens, context_lens, strict=True))
    rows = sum(q for q, _ in lens)
    keys = sum(n - first_key(n - q + 1, window) for q, n in lens if q)
    # Row i of q sees n - q + 1 + i keys, of which those before its window fall out.
    hidden = sum(sum(first_key(n - q + 1 + i, window) for i in range(q)) for q, n in lens) if window else 0
    pairs = sum(q * n - q * (q - 1) // 2 for q, n in lens) - hidden
    moved, flops = attention_cost(pairs, keys, rows, num_q_heads, num_kv_heads, head_dim, ITEMSIZE[dtype])
    return Cost(bytes=moved + 4 * (2 * len(lens) + 1), flops=flops)


def _locate(row: Any, cu_seqlens_q: Any, context_lens: Any) -> Any:
    """(sequence of the row, keys that it sees); -1 keys for a row of no sequence. Halves cu_seqlens_q."""
    num_seqs = context_lens.shape[0]
    if row < cu_seqlens_q[0] or row >= cu_seqlens_q[num_seqs]:
        return 0, -1
    low = 0
    high = num_seqs
    # cu_seqlens_q[low] <= row < cu_seqlens_q[high]; empty sequences fall out by themselves
    while high - low > 1:
        middle = (low + high) // 2
        if cu_seqlens_q[middle] <= row:
            low = middle
        else:
            high = middle
    visible = context_lens[low] - cu_seqlens_q[low + 1] + row + 1
    return low, max(visible, 0)


@cache
def make_prefill_attention_kernel(
    head_dim: int, group: int, block_size: int, dtype: str, window: int | None = None,
    threads: int = THREADS, tile_kv: int = TILE_KV,
) -> Any:  # fmt: skip
    """The kernel of paged_attention.make_attention_kernel, which documents it; a row finds its sequence by
    halving cu_seqlens_q. group: q heads per kv head."""
    locate = jit(device=True)(_locate)
    return make_attention_kernel(locate, head_dim, group, block_size, dtype, window, threads, tile_kv)


def _check(
    kind: type[Host], out: Any, q: Any, k_cache: Any, v_cache: Any, cu: Any, lens: Any, table: Any,
    window: int | None,
) -> None:  # fmt: skip
    check_attention(kind, OP, out, q, k_cache, v_cache, lens, table, window)
    check(OP, "cu_seqlens_q", cu, kind.int32, (lens.shape[0] + 1,))


def prefill_attention_reference(
    out: Any, q: Any, k_cache: Any, v_cache: Any, cu_seqlens_q: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, stream: Any = None,
) -> None:  # fmt: skip
    """Rung "reference": BLAS products per sequence, kv head and 128 queries. Writes the rows of sequences
    only."""
    _check(Host, out, q, k_cache, v_cache, cu_seqlens_q, context_lens, block_table, window)
    check_pages(OP, block_table, context_lens, k_cache.shape[0], k_cache.shape[2])
    bounds = cu_seqlens_q.tolist()
    for b, length in enumerate(context_lens.tolist()):
        first, last = bounds[b], bounds[b + 1]
        if last == first:
            continue
        if length <= 0:
            out[first:last] = 0
            continue
        k, v = gather(k_cache, block_table[b], length), gather(v_cache, block_table[b], length)
        start = length - (last - first)
        attention_numpy(out[first:last], wide(q[first:last]), wide(k), wide(v), start, softmax_scale, window)


def prefill_attention(
    out: Any, q: Any, k_cache: Any, v_cache: Any, cu_seqlens_q: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, stream: Any = None,
) -> None:  # fmt: skip
    """Rung "plain": launch the kernel on `stream`. ValueError for wrong dtypes, shapes, strides."""
    _check(Device, out, q, k_cache, v_cache, cu_seqlens_q, context_lens, block_table, window)
    if out.size == 0 or context_lens.shape[0] == 0:
        return
    tokens, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    kernel = make_prefill_attention_kernel(
        head_dim, num_q_heads // num_kv_heads, block_size, element_name(out), window
    )
    kernel[(tokens, num_q_heads), THREADS, stream or 0](
        out, q, k_cache, v_cache, cu_seqlens_q, context_lens, block_table, np.float32(softmax_scale)
    )


_SMOLLM2 = {"num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64, "block_size": 64}
_LLAMA3 = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 64}
_TOY = {"num_q_heads": 3, "num_kv_heads": 1, "head_dim": 4, "block_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "toy_packed": {**_TOY, "query_lens": (2, 0, 3), "context_lens": (2, 0, 6)},
    "toy_mha": {**_TOY, "num_q_heads": 2, "num_kv_heads": 2, "query_lens": (2,), "context_lens": (9,)},
    "toy_gqa_8": {**_TOY, "num_q_heads": 8, "head_dim": 3, "query_lens": (1,), "context_lens": (5,)},
    "toy_empty": {**_TOY, "query_lens": (), "context_lens": ()},
    "toy_window": {**_TOY, "window": 3, "query_lens": (3, 2), "context_lens": (3, 10)},
    "toy_window_1": {**_TOY, "window": 1, "query_lens": (2,), "context_lens": (6,)},
    "mistral_7b_window": {
        **_LLAMA3,
        "window": 256,
        "query_lens": (150, 1, 300),
        "context_lens": (150, 700, 411),
    },
    "smollm2_135m_packed": {**_SMOLLM2, "query_lens": (300, 1, 129, 64), "context_lens": (300, 17, 400, 64)},
    "llama3_8b_chunk": {**_LLAMA3, "query_lens": (100,), "context_lens": (333,)},
    "odd": {**_SMOLLM2, "head_dim": 80, "block_size": 48, "query_lens": (7, 5), "context_lens": (7, 201)},
}


def prefill_attention_hopper(
    out: Any, q: Any, k_cache: Any, v_cache: Any, cu_seqlens_q: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, stream: Any = None, **how: Any,
) -> None:  # fmt: skip
    """Rung "hopper" (sm_90a): wgmma, pages by TMA; see hopper.py, whose attend takes the rest."""
    from kernels_numba.ops.prefill_attention.hopper import attend

    arrays = (out, q, k_cache, v_cache, cu_seqlens_q, context_lens, block_table)
    attend(*arrays, softmax_scale=softmax_scale, window=window, stream=stream, **how)


def prefill_attention_mma_sync(
    out: Any, q: Any, k_cache: Any, v_cache: Any, cu_seqlens_q: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, stream: Any = None, **how: Any,
) -> None:  # fmt: skip
    """Rung "mma_sync" (sm_80 and newer): mma.sync, pages by cp.async; see mma_sync.py, whose attend takes the
    rest."""
    from kernels_numba.ops.prefill_attention.mma_sync import attend

    arrays = (out, q, k_cache, v_cache, cu_seqlens_q, context_lens, block_table)
    attend(*arrays, softmax_scale=softmax_scale, window=window, stream=stream, **how)


def rows_attention(
    out: Any, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, context_lens: Any, *,
    softmax_scale: float, window: int | None = None, stream: Any = None, rung: str = "hopper", **how: Any,
) -> None:  # fmt: skip
    """rows_attention_spec by the same kernel as rung "hopper" or "mma_sync", with the bits that it has over
    pages; see their attend_rows. ValueError for another rung."""
    if rung == "hopper":
        from kernels_numba.ops.prefill_attention.hopper import attend_rows
    elif rung == "mma_sync":
        from kernels_numba.ops.prefill_attention.mma_sync import attend_rows
    else:
        raise ValueError(f"{OP}: rung {rung!r} has no form for packed keys; hopper and mma_sync have one")
    arrays = (out, q, k, v, cu_seqlens_q, cu_seqlens_k, context_lens)
    attend_rows(*arrays, softmax_scale=softmax_scale, window=window, stream=stream, **how)


rungs: dict[str, Rung] = {
    "reference": prefill_attention_reference, "plain": prefill_attention,
    "mma_sync": prefill_attention_mma_sync, "hopper": prefill_attention_hopper,
}  # fmt: skip
register = make_register(OP, rungs)
