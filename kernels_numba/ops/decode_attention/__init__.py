"""Attention of one new token per sequence over paged keys and values (GQA): prefill_attention with one row
each.

Knows: row b of q is sequence b. Refuses to know: anything about the rows' past but their pages.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, fail
from kernels_numba.compiler import element_name, jit
from kernels_numba.cost import Cost
from kernels_numba.ops.prefill_attention import prefill_attention_cost, prefill_attention_spec
from kernels_numba.paged_attention import (
    THREADS,
    TILE_KV,
    attention_numpy,
    check_attention,
    check_pages,
    first_key,
    gather,
    make_attention_kernel,
)
from kernels_numba.registry import Rung, make_register
from kernels_numba.wide import wide

OP = "decode_attention"


def decode_attention_spec(
    q: Any, k_cache: Any, v_cache: Any, context_lens: Any, block_table: Any, *, softmax_scale: float,
    window: int | None = None, query_tokens: int = 1,
) -> Any:  # fmt: skip
    """out[b, h] = softmax(softmax_scale q[b, h] k^T) v over the context_lens[b] keys of sequence b, with a
    window (1 or more) over the last that many of them; zeros for none.

    q[B, Hq, D], k_cache, v_cache[num_blocks, Hkv, block_size, D], context_lens int32[B] (the new token
    included), block_table int32[B, P], -1 padded -> float32[B, Hq, D]. Hq is a multiple of Hkv.
    query_tokens: T, the last ones of each sequence: q[B T, Hq, D], row b T + i sees all but the T - 1 - i
    newest keys. Rungs "hopper" and "mma_sync" take 1 to 8, the others 1.
    """
    rows = np.arange(0, len(q) + 1, query_tokens)
    return prefill_attention_spec(
        q, k_cache, v_cache, rows, context_lens, block_table, softmax_scale=softmax_scale, window=window
    )


def decode_attention_cost(
    context_lens: Any, num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: str = "bfloat16",
    window: int | None = None,
) -> Cost:  # fmt: skip
    """prefill_attention_cost with one row a sequence, without cu_seqlens_q."""
    ones = [1] * len(context_lens)
    cost = prefill_attention_cost(ones, context_lens, num_q_heads, num_kv_heads, head_dim, dtype, window)
    return Cost(bytes=cost.bytes - 4 * (len(ones) + 1), flops=cost.flops)


def _locate(row: Any, cu_seqlens_q: Any, context_lens: Any) -> Any:
    """(sequence of the row, keys that it sees): row b is sequence b."""
    return row, max(context_lens[row], 0)


@cache
def make_decode_attention_kernel(
    head_dim: int, group: int, block_size: int, dtype: str, window: int | None = None,
    threads: int = THREADS, tile_kv: int = TILE_KV,
) -> Any:  # fmt: skip
    """The kernel of paged_attention.make_attention_kernel, which documents it; row b is sequence b.
    group: q heads per kv head. Its cu_seqlens_q argument is not read: context_lens stands in."""
    locate = jit(device=True)(_locate)
    return make_attention_kernel(locate, head_dim, group, block_size, dtype, window, threads, tile_kv)


def _check(
    kind: type[Host], out: Any, q: Any, k_cache: Any, v_cache: Any, lens: Any, table: Any, window: int | None
) -> None:
    check_attention(kind, OP, out, q, k_cache, v_cache, lens, table, window)
    if lens.shape[0] != q.shape[0]:
        fail(OP, "context_lens", f"has {lens.shape[0]} entries", f"one per row of q ({q.shape[0]})")


def _attend_one(out: Any, q: Any, k_cache: Any, v_cache: Any, pages: Any, length: int) -> None:
    """One sequence: q, out[Hkv, group, D] (q scaled). Whole pages in one batch of products, the last one cut.

    Pages that follow each other in the cache are used where they lie; others are gathered by one copy.
    """
    block_size = k_cache.shape[2]
    whole = (length - 1) // block_size
    tail, last = length - whole * block_size, pages[whole]
    tail_scores = np.matmul(q, wide(k_cache[last, :, :tail]).swapaxes(1, 2))
    highest = tail_scores.max(axis=-1, keepdims=True)
    if whole == 0:
        tail_scores -= highest
        np.exp(tail_scores, out=tail_scores)
        total = tail_scores.sum(axis=-1, keepdims=True)
        result = np.matmul(tail_scores, wide(v_cache[last, :, :tail]))
    else:
        first = int(pages[0])
        in_order = np.array_equal(pages[:whole], np.arange(first, first + whole))
        index: Any = slice(first, first + whole) if in_order else pages[:whole]
        scores = np.matmul(q, wide(k_cache[index]).swapaxes(2, 3))  # [whole, Hkv, group, block_size]
        highest = np.maximum(highest, scores.max(axis=(0, 3))[..., None])
        scores -= highest
        tail_scores -= highest
        np.exp(scores, out=scores)
        np.exp(tail_scores, out=tail_scores)
        total = scores.sum(axis=(0, 3))[..., None] + tail_scores.sum(axis=-1, keepdims=True)
        result = np.matmul(scores, wide(v_cache[index])).sum(axis=0)
        result += np.matmul(tail_scores, wide(v_cache[last, :, :tail]))
    np.divide(result, total, out=result)
    out[...] = result


def _attend_window(
    out: Any, q: Any, k_cache: Any, v_cache: Any, pages: Any, length: int, softmax_scale: float, window: int
) -> None:
    """One sequence whose window leaves keys out: q, out[1, Hq, D]. Pages before the window stay out."""
    first_page = first_key(length, window) // k_cache.shape[2]
    pages, skipped = pages[first_page:], first_page * k_cache.shape[2]
    k, v = gather(k_cache, pages, length - skipped), gather(v_cache, pages, length - skipped)
    attention_numpy(out, q, wide(k), wide(v), length - 1 - skipped, softmax_scale, window)


def decode_attention_reference(
    out: Any, q: Any, k_cache: Any, v_cache: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, stream: Any = None,
) -> None:  # fmt: skip
    """Rung "reference": about ten numpy calls a sequence, all heads at once."""
    _check(Host, out, q, k_cache, v_cache, context_lens, block_table, window)
    check_pages(OP, block_table, context_lens, k_cache.shape[0], k_cache.shape[2])
    _, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    by_kv_head = (num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    scaled = wide(q) * np.float32(softmax_scale)
    for b, length in enumerate(context_lens.tolist()):
        if length <= 0:
            out[b] = 0
        elif window is not None and window < length:
            _attend_window(
                out[b : b + 1],
                wide(q[b : b + 1]),
                k_cache,
                v_cache,
                block_table[b],
                length,
                softmax_scale,
                window,
            )
        else:
            row, query = out[b].reshape(by_kv_head), scaled[b].reshape(by_kv_head)
            _attend_one(row, query, k_cache, v_cache, block_table[b], length)


def decode_attention(
    out: Any, q: Any, k_cache: Any, v_cache: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, stream: Any = None,
) -> None:  # fmt: skip
    """Rung "plain": launch the kernel on `stream`. ValueError for wrong dtypes, shapes, strides."""
    _check(Device, out, q, k_cache, v_cache, context_lens, block_table, window)
    if out.size == 0:
        return
    num_seqs, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    kernel = make_decode_attention_kernel(
        head_dim, num_q_heads // num_kv_heads, block_size, element_name(out), window
    )
    kernel[(num_seqs, num_q_heads), THREADS, stream or 0](
        out, q, k_cache, v_cache, context_lens, context_lens, block_table, np.float32(softmax_scale)
    )


_SMOLLM2 = {"num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64, "block_size": 64}
_LLAMA3 = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 64}
_TOY = {"num_q_heads": 3, "num_kv_heads": 1, "head_dim": 4, "block_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "toy": {**_TOY, "context_lens": (1, 0, 9)},
    "toy_mha": {**_TOY, "num_q_heads": 2, "num_kv_heads": 2, "context_lens": (4, 5)},
    "toy_gqa_8": {**_TOY, "num_q_heads": 8, "head_dim": 3, "context_lens": (6,)},
    "toy_empty": {**_TOY, "context_lens": ()},
    "toy_window": {**_TOY, "window": 3, "context_lens": (2, 11)},
    "mistral_7b_window": {**_LLAMA3, "window": 256, "context_lens": (1, 255, 256, 257, 700)},
    "smollm2_135m_mixed": {**_SMOLLM2, "context_lens": (1, 63, 64, 65, 128, 1000, 0, 777)},
    "llama3_8b_one": {**_LLAMA3, "context_lens": (1500,)},
    "odd": {**_SMOLLM2, "head_dim": 80, "block_size": 48, "context_lens": (47, 49, 333)},
}


def decode_attention_mma_sync(
    out: Any, q: Any, k_cache: Any, v_cache: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, stream: Any = None, **how: Any,
) -> None:  # fmt: skip
    """Rung "mma_sync" (sm_80 and newer): tensor cores, pages by cp.async; see tensor_core.py, whose attend
    takes the rest."""
    from kernels_numba.ops.decode_attention.tensor_core import attend

    arrays = (out, q, k_cache, v_cache, context_lens, block_table)
    attend("mma_sync", *arrays, softmax_scale=softmax_scale, window=window, stream=stream, **how)


def decode_attention_hopper(
    out: Any, q: Any, k_cache: Any, v_cache: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, stream: Any = None, **how: Any,
) -> None:  # fmt: skip
    """Rung "hopper" (sm_90a): tensor cores, pages by TMA; see tensor_core.py, whose attend takes the rest."""
    from kernels_numba.ops.decode_attention.tensor_core import attend

    arrays = (out, q, k_cache, v_cache, context_lens, block_table)
    attend("hopper", *arrays, softmax_scale=softmax_scale, window=window, stream=stream, **how)


def decode_attention_unconstrained(
    out: Any, q: Any, k_cache: Any, v_cache: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, split: int = 512, stream: Any = None, **how: Any,
) -> None:  # fmt: skip
    """Rung "unconstrained": hopper with splits of another length than the contract's (config.SPLITS); its
    bits are not those of a prompt chunk, so no engine takes it. It shows what the contract costs."""
    from kernels_numba.ops.decode_attention.config import Build

    arrays = (out, q, k_cache, v_cache, context_lens, block_table)
    how = {"softmax_scale": softmax_scale, "window": window, "stream": stream, **how}
    decode_attention_hopper(*arrays, build=Build(split=split), **how)


rungs: dict[str, Rung] = {
    "reference": decode_attention_reference, "plain": decode_attention, "mma_sync": decode_attention_mma_sync,
    "hopper": decode_attention_hopper, "unconstrained": decode_attention_unconstrained,
}  # fmt: skip
LADDER = NOT_INVARIANT = ("unconstrained",)  # measured when asked for by name, and used by no engine
# The bench measures each choice of such a rung, and keeps the quickest.
CHOICES: dict[str, tuple[dict[str, Any], ...]] = {
    "unconstrained": ({"split": 256}, {"split": 512}, {"split": 2048})
}
register = make_register(OP, rungs)
