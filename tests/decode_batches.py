"""Batches for decode attention: pages in random order, everything that must not be read poisoned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from kernels_numba.attention_contract import first_visible

PAGE = 64
BF16 = np.dtype(ml_dtypes.bfloat16)
ELEMENTS = {"bfloat16": BF16, "float16": np.dtype(np.float16)}
BAD_PAGE = -(1 << 20)  # an entry of the table that nobody may follow


def bits(array: Any) -> Any:
    """bfloat16 as uint16, the form in which it is kept; others as they are."""
    return array.view(np.uint16) if array.dtype == BF16 else array


def attend(q: Any, k: Any, v: Any, scale: float) -> tuple[Any, Any]:
    """(out[Hq, D], log-sum-exp[Hq]) in float64 of q[Hq, D] over k, v[n, D], one key at least."""
    scores = q.astype(np.float64) @ k.T * scale
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    return weights / total @ v, (top + np.log(total))[:, 0]


def largest_difference(lse: Any, want: Any) -> float:
    """Of finite numbers; inf where one is finite and the other is not."""
    seen = np.isfinite(want)
    if not np.array_equal(np.isfinite(lse), seen):
        return float("inf")
    return float(np.abs(np.where(seen, lse, 0) - np.where(seen, want, 0)).max())


class Heads:
    """What follows from q[.., Hq, D] and k_cache[.., Hkv, ..]."""

    q: Any
    k_cache: Any

    @property
    def group(self) -> int:
        return int(self.q.shape[1] // self.k_cache.shape[1])

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)


@dataclass
class Batch(Heads):
    """q[B, Hq, D] (cut from a wider buffer), caches[num_blocks, Hkv, 64, D] in the element type, NaN where
    nobody may look; context_lens, block_table with BAD_PAGE there; window."""

    q: Any
    k_cache: Any
    v_cache: Any
    context_lens: Any
    block_table: Any
    window: int | None

    def keys_values(self, seq: int, head: int) -> tuple[Any, Any]:
        """What row `seq` of a kv head sees: k, v[n, D] in the element type."""
        length = max(0, int(self.context_lens[seq]))
        first = first_visible(length, self.window)
        pages = self.block_table[seq, first // PAGE : -(-length // PAGE)]
        cut = slice(first % PAGE, first % PAGE + length - first)
        rows = [cache[pages, head].reshape(-1, cache.shape[3])[cut] for cache in (self.k_cache, self.v_cache)]
        return rows[0], rows[1]

    def truth(self) -> tuple[Any, Any]:
        """(out[B, Hq, D], log-sum-exp[B, Hq]) in float64."""
        out, lse = np.zeros(self.q.shape), np.full(self.q.shape[:2], -np.inf)
        for seq in range(self.q.shape[0]):
            for head in range(self.k_cache.shape[1]):
                k, v = (x.astype(np.float64) for x in self.keys_values(seq, head))
                if len(k):
                    mine = slice(head * self.group, (head + 1) * self.group)
                    out[seq, mine], lse[seq, mine] = attend(self.q[seq, mine], k, v, self.scale)
        return out, lse

    def by_tokens(self, rng: np.random.Generator, tokens: int) -> Batch:
        """A batch of one row for each of a sequence's last `tokens` tokens: row b tokens + i sees all but the
        tokens - 1 - i newest keys of sequence b. Made with a window of tokens - 1 keys more than rows get."""
        lens = np.repeat(self.context_lens, tokens) - np.tile(np.arange(tokens)[::-1], len(self.q))
        q = np.repeat(self.q, tokens, axis=0)
        q = rng.permuted(q.astype(np.float32), axis=2).astype(q.dtype)
        window = None if self.window is None else self.window - tokens + 1
        table = np.repeat(self.block_table, tokens, axis=0)
        return Batch(q, self.k_cache, self.v_cache, lens.astype(np.int32), table, window)

    def only(self, seq: int) -> Batch:
        """One sequence alone, over the same pages."""
        rows = slice(seq, seq + 1)
        return Batch(
            self.q[rows].copy(), self.k_cache, self.v_cache, self.context_lens[rows].copy(),
            self.block_table[rows].copy(), self.window,
        )  # fmt: skip


def make_batch(
    rng: np.random.Generator, context_lens: Any, num_kv_heads: int, group: int, head_dim: int, *,
    dtype: str = "bfloat16", window: int | None = None, spread: float = 1.0, shared: int = 0,
) -> Batch:  # fmt: skip
    """Random numbers; spread: of the queries, so that some keys outweigh the others; shared: pages that all
    sequences begin with (their contexts are at least as long)."""
    element = ELEMENTS[dtype]
    lens = np.asarray(context_lens, np.int32)
    counts = [-(-max(0, int(n)) // PAGE) for n in lens]
    own = [max(0, count - shared) for count in counts]
    total = sum(own) + shared + 3
    order = rng.permutation(total).astype(np.int32)
    shape = (total, num_kv_heads, PAGE, head_dim)
    k_cache, v_cache = np.full(shape, np.nan, element), np.full(shape, np.nan, element)
    table = np.full((len(lens), max([1, *counts]) + 2), BAD_PAGE, np.int32)
    used = shared
    for seq, count in enumerate(counts):
        first = first_visible(max(0, int(lens[seq])), window)
        for number in range(first // PAGE, count):
            page = order[number] if number < shared else order[used + number - shared]
            table[seq, number] = page
            begin, end = max(0, first - number * PAGE), min(PAGE, int(lens[seq]) - number * PAGE)
            for cache in (k_cache, v_cache):
                rows = cache[page, :, begin:end]
                if number >= shared or np.isnan(rows.astype(np.float32)).any():
                    rows[...] = rng.standard_normal(rows.shape, np.float32).astype(element)
        used += own[seq]
    buffer = (rng.standard_normal((len(lens), num_kv_heads * (group + 2), head_dim)) * spread).astype(element)
    buffer[:, num_kv_heads * group :] = np.nan
    return Batch(buffer[:, : num_kv_heads * group], k_cache, v_cache, lens, table, window)
