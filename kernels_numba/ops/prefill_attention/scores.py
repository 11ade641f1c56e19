"""A debug op: the probabilities with which chosen tokens of one sequence look at each key.

Attention never stores them; this makes those that somebody wants to look at. Knows: one sequence, one head,
in numpy, host arrays. Refuses to know: batches, speed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.checks import fail
from kernels_numba.paged_attention import first_key, gather
from kernels_numba.wide import wide

OP = "attention_scores"


def attention_scores(
    q: Any, k_cache: Any, pages: Any, context_len: int, head: int, tokens: Any, *, softmax_scale: float,
    window: int | None = None,
) -> Any:  # fmt: skip
    """p[i, j] = softmax_j(softmax_scale q[tokens[i], head] k[j]): what token `tokens[i]` gives key j;
    float32[ len(tokens), context_len]. Rows sum to 1; what a token does not see has exactly 0.

    q[T, Hq, D]: a sequence's last T tokens, the last of which sits at position context_len - 1; k_cache[
    num_blocks, Hkv, block_size, D]; pages: its row of block_table, for context_len keys at least; tokens:
    rows of q. Elements: float32, or others that wide() takes. ValueError for a head, a token, or pages that
    are not there.
    """
    num_tokens, num_q_heads, _ = q.shape
    num_blocks, num_kv_heads, block_size, _ = k_cache.shape
    needed = -(-context_len // block_size)
    used = np.asarray(pages)[:needed]
    if not 0 <= head < num_q_heads:
        fail(OP, "head", f"is {head}", f"0 to {num_q_heads - 1}")
    if not num_tokens <= context_len:
        fail(OP, "context_len", f"is {context_len}", f"at least q's {num_tokens} tokens")
    if len(used) < needed or (needed and not 0 <= used.min() <= used.max() < num_blocks):
        fail(OP, "pages", f"are {used.tolist()}", f"{needed} of 0 to {num_blocks - 1}")
    rows = np.asarray(tokens, np.int64)
    outside = rows[(rows < 0) | (rows >= num_tokens)]
    if outside.size:
        fail(OP, "tokens", f"hold {int(outside[0])}", f"0 to {num_tokens - 1}")
    keys = wide(gather(k_cache, used, context_len)[head // (num_q_heads // num_kv_heads)])
    scores = wide(q[rows, head]) @ keys.T * np.float32(softmax_scale)
    for row, visible in zip(scores, rows + (context_len - num_tokens + 1), strict=True):
        row[: first_key(int(visible), window)] = -np.inf
        row[visible:] = -np.inf
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    return scores / scores.sum(axis=1, keepdims=True)
