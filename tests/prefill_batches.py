"""Batches for prefill attention: pages in random order, or packed rows; everything that must not be read
poisoned."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from decode_batches import BAD_PAGE, ELEMENTS, PAGE, Heads, bits

from kernels_numba.attention_contract import attention, first_visible

ROWS = 32  # of a sequence together in float64


def attend_rows(q: Any, k: Any, v: Any, scale: float, seen: Any) -> tuple[Any, Any]:
    """(out[rows, heads, D], log-sum-exp[rows, heads]) in float64 of q[rows, heads, D] over the keys that
    seen[rows, n] names of k, v[n, D]; zeros and -inf where there is none."""
    rows, heads, dim = q.shape
    scores = (q.astype(np.float64).reshape(-1, dim) @ k.T).reshape(rows, heads, -1)
    scores *= scale
    np.copyto(scores, -np.inf, where=~seen[:, None])
    some = seen.any(axis=1)[:, None]
    top = np.where(some, scores.max(axis=2, initial=-np.inf), 0)
    scores -= top[..., None]
    weights = np.exp(scores, out=scores)
    total = np.where(some, weights.sum(axis=2), 1)
    out = (weights.reshape(rows * heads, -1) @ v).reshape(q.shape) / total[..., None]
    return out, np.where(some, top + np.log(total), -np.inf)


@dataclass
class Batch(Heads):
    """q[T, Hq, D] (cut from a wider buffer), caches[num_blocks, Hkv, 64, D] in the element type, NaN where
    nobody may look; cu_seqlens_q, context_lens, block_table with BAD_PAGE there; window. Rows of q outside of
    sequences are NaN."""

    q: Any
    k_cache: Any
    v_cache: Any
    cu_seqlens_q: Any
    context_lens: Any
    block_table: Any
    window: int | None

    @property
    def query_lens(self) -> Any:
        return np.diff(self.cu_seqlens_q)

    def keys_values(self, seq: int, head: int) -> tuple[Any, Any]:
        """k, v[n, D] in the element type of all keys of a sequence, NaN those before its first row's
        window."""
        length = max(0, int(self.context_lens[seq]))
        least = first_visible(length - int(self.query_lens[seq]) + 1, self.window)
        k, v = (np.full((length, self.q.shape[2]), np.nan, self.q.dtype) for _ in range(2))
        for number in range(least // PAGE, -(-length // PAGE)) if self.query_lens[seq] else ():
            rows = slice(number * PAGE, min((number + 1) * PAGE, length))
            page = self.block_table[seq, number]
            for to, cache in ((k, self.k_cache), (v, self.v_cache)):
                to[rows] = cache[page, head, : rows.stop - rows.start]
        return k, v

    def by_row(self) -> Any:
        """(row of q, sequence, kv head, first key seen, keys seen) of every row of every sequence and kv
        head."""
        for seq in range(len(self.context_lens)):
            first, last = int(self.cu_seqlens_q[seq]), int(self.cu_seqlens_q[seq + 1])
            for row in range(first, last):
                length = max(0, int(self.context_lens[seq]) - (last - 1 - row))
                for head in range(self.k_cache.shape[1]):
                    yield row, seq, head, first_visible(length, self.window), length

    def truth(self) -> tuple[Any, Any]:
        """(out[T, Hq, D], log-sum-exp[T, Hq]) in float64; NaN outside of sequences."""
        out, lse = np.full(self.q.shape, np.nan), np.full(self.q.shape[:2], np.nan)
        for seq, head in product(range(len(self.context_lens)), range(self.k_cache.shape[1])):
            k, v = (x.astype(np.float64) for x in self.keys_values(seq, head))
            mine = slice(head * self.group, (head + 1) * self.group)
            first, last = int(self.cu_seqlens_q[seq]), int(self.cu_seqlens_q[seq + 1])
            for start in range(first, last, ROWS):
                rows = np.arange(start, min(start + ROWS, last))
                ends = np.maximum(0, int(self.context_lens[seq]) - (last - 1 - rows))
                starts = np.array([first_visible(int(end), self.window) for end in ends])
                cut = slice(starts[0], ends[-1])  # both ascend
                keys = np.arange(cut.start, cut.stop)
                seen = (starts[:, None] <= keys) & (keys < ends[:, None])
                out[rows, mine], lse[rows, mine] = attend_rows(
                    self.q[rows, mine], k[cut], v[cut], self.scale, seen
                )
        return out, lse

    def by_contract(self) -> tuple[Any, Any]:
        """(out, log-sum-exp) float32 in the order of attention_contract.py, row by row; NaN outside."""
        out, lse = np.full(self.q.shape, np.nan, np.float32), np.full(self.q.shape[:2], np.nan, np.float32)
        held: dict[tuple[int, int], Any] = {}

        def rounded(x: Any) -> Any:
            return np.asarray(x, np.float32).astype(self.q.dtype).astype(np.float32)

        for row, seq, head, _, length in self.by_row():
            if (seq, head) not in held:
                held[seq, head] = [x.astype(np.float32) for x in self.keys_values(seq, head)]
            mine = slice(head * self.group, (head + 1) * self.group)
            k, v = (x[:length] for x in held[seq, head])
            q = self.q[row, mine].astype(np.float32)
            out[row, mine], lse[row, mine] = attention(q, k, v, self.scale, rounded, self.window)
        return out, lse

    def only(self, seq: int, chunks: tuple[int, ...] = ()) -> list[Batch]:
        """One sequence alone over the same pages, in chunks of so many tokens (and the rest)."""
        first, last = int(self.cu_seqlens_q[seq]), int(self.cu_seqlens_q[seq + 1])
        cuts = [first, *(first + np.cumsum(chunks, dtype=int)).tolist(), last]
        return [
            Batch(
                self.q[begin:end].copy(), self.k_cache, self.v_cache, np.array([0, end - begin], np.int32),
                np.array([int(self.context_lens[seq]) - (last - end)], np.int32),
                self.block_table[seq : seq + 1].copy(), self.window,
            )
            for begin, end in pairwise(cuts)
        ]  # fmt: skip

    def rows_of_keys(self) -> tuple[Any, Any, Any]:
        """(k, v [keys, Hkv, D], cu_seqlens_k): the same keys as packed rows, a NaN row between sequences."""
        parts, starts = [], []
        gap = np.full((1, *self.k_cache.shape[1::2]), np.nan, self.q.dtype)
        at = 0
        for seq in range(len(self.context_lens)):
            heads = [self.keys_values(seq, head) for head in range(self.k_cache.shape[1])]
            k, v = (np.stack([pair[which] for pair in heads], axis=1) for which in range(2))
            starts.append(at)
            parts.append((np.concatenate([k, gap]), np.concatenate([v, gap])))
            at += len(k) + 1
        k, v = (np.concatenate([part[which] for part in parts]) for which in range(2))
        return k, v, np.array([*starts, at], np.int32)


def make_batch(
    rng: np.random.Generator, query_lens: Any, context_lens: Any, num_kv_heads: int, group: int,
    head_dim: int, *, dtype: str = "bfloat16", window: int | None = None, spread: float = 1.0,
    margin: int = 0,
) -> Batch:  # fmt: skip
    """Random numbers; spread: of the queries, so that some keys outweigh the others; margin: rows of q before
    the first sequence and after the last that belong to none."""
    element = ELEMENTS[dtype]
    lens, queries = np.asarray(context_lens, np.int32), np.asarray(query_lens, np.int32)
    counts = [-(-max(0, int(n)) // PAGE) for n in lens]
    total = sum(counts) + 3
    order = rng.permutation(total).astype(np.int32)
    shape = (total, num_kv_heads, PAGE, head_dim)
    k_cache, v_cache = np.full(shape, np.nan, element), np.full(shape, np.nan, element)
    table = np.full((len(lens), max([1, *counts]) + 2), BAD_PAGE, np.int32)
    used = 0
    for seq, count in enumerate(counts):
        least = first_visible(max(0, int(lens[seq]) - int(queries[seq]) + 1), window)
        for number in range(least // PAGE, count) if queries[seq] else ():
            table[seq, number] = order[used + number]
            begin, end = max(0, least - number * PAGE), min(PAGE, int(lens[seq]) - number * PAGE)
            for cache in (k_cache, v_cache):
                rows = cache[order[used + number], :, begin:end]
                rows[...] = rng.standard_normal(rows.shape, np.float32).astype(element)
        used += count
    tokens, heads = int(queries.sum()) + 2 * margin, num_kv_heads * group
    buffer = (rng.standard_normal((tokens, heads + 2 * num_kv_heads, head_dim)) * spread).astype(element)
    buffer[:, heads:] = np.nan
    buffer[:margin] = np.nan
    buffer[tokens - margin :] = np.nan
    cu = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32) + np.int32(margin)
    return Batch(buffer[:, :heads], k_cache, v_cache, cu, lens, table, window)


__all__ = ["BAD_PAGE", "ELEMENTS", "Batch", "bits", "make_batch"]
