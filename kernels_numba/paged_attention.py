"""What prefill_attention and decode_attention share: the definition, the checks, the numpy form, the kernel
body.

One kernel body for both is what makes a token's attention bit-equal whether it came in a prompt or alone: the
ops differ only in how a row of q finds its sequence and its number of visible keys.

Knows: pages, one row of q at a time. Refuses to know: batches beyond that.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, check_aligned, fail
from kernels_numba.compiler import SIMULATOR, cuda, element, jit
from kernels_numba.wide import wide

THREADS = 2 if SIMULATOR else 128
TILE_KV = 4 if SIMULATOR else 128  # keys a step, aligned to key 0
QUERY_CHUNK = 128  # rows of q at once in numpy: keeps the scores in cache and skips most of the masked half
# Dimensions that BLAS sums at once into a score in numpy. It adds them one by one, and a score's error is the
# error of its weight: in pieces of 32 it errs less, for 1 to 3 % of the time where a sequence is short.
DOT_CHUNK = 32


def gather(cache: Any, pages: Any, length: int) -> Any:
    """The first `length` rows of the pages, in order: cache[num_blocks, Hkv, bs, D] -> [Hkv, length, D]."""
    _, heads, block_size, head_dim = cache.shape
    pages = pages[: -(-length // block_size)]
    if len(pages) == 1:
        return cache[pages[0], :, :length]
    return cache[pages].transpose(1, 0, 2, 3).reshape(heads, -1, head_dim)[:, :length]


def first_key(visible: int, window: int | None) -> int:
    """The first key that a row sees of `visible` ones: with a window, only the last `window` of them."""
    return 0 if window is None else max(0, visible - window)


def attention_spec(
    q: Any, k: Any, v: Any, first_position: int, softmax_scale: float, window: int | None = None
) -> Any:
    """Causal attention of one sequence: q[Tq, Hq, D], row 0 at `first_position`, and k, v[Hkv, n, D].

    out[i, h] = sum_j softmax_j(softmax_scale * q[i, h] . k[h // (Hq / Hkv), j]) v[.., j] over the keys
    p - window < j <= p with p = first_position + i (without a window 0 <= j <= p); zeros where there is none
    -> [Tq, Hq, D].
    """
    q, k, v = wide(q), wide(k), wide(v)
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[0]
    for row in range(q.shape[0]):
        visible = first_position + row + 1
        keys = slice(first_key(visible, window), visible)
        for head in range(q.shape[1] if visible > 0 else 0):
            scores = k[head // group, keys] @ q[row, head] * q.dtype.type(softmax_scale)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ v[head // group, keys]
    return out


def attention_numpy(
    out: Any, q: Any, k: Any, v: Any, first_position: int, softmax_scale: float, window: int | None = None
) -> None:
    """attention_spec in BLAS products, one per kv head and chunk of queries, written into `out`."""
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[0]
    group = num_q_heads // num_kv_heads
    for start in range(0, num_rows, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, num_rows)
        rows = stop - start
        visible = first_position + stop
        if visible <= 0:
            out[start:stop] = 0
            continue
        low = first_key(visible - rows + 1, window)  # what the chunk's first row sees
        # [rows, Hkv, group, D] -> [Hkv, group * rows, D]: the queries of a kv head become one matrix
        queries = (q[start:stop] * np.float32(softmax_scale)).reshape(rows, num_kv_heads, group, head_dim)
        queries = queries.transpose(1, 2, 0, 3).reshape(num_kv_heads, group * rows, head_dim)
        keys = k[:, low:visible].swapaxes(1, 2)
        scores = np.matmul(queries[..., :DOT_CHUNK], keys[:, :DOT_CHUNK])
        for at in range(DOT_CHUNK, head_dim, DOT_CHUNK):
            scores += np.matmul(queries[..., at : at + DOT_CHUNK], keys[:, at : at + DOT_CHUNK])
        by_row = scores.reshape(num_kv_heads, group, rows, visible - low)
        if rows > 1:
            key = np.arange(visible - rows + 1, visible)
            masked = key[None, :] > np.arange(first_position + start, visible)[:, None]
            np.copyto(by_row[..., visible - rows + 1 - low :], np.float32(-np.inf), where=masked)
        if rows > 1 and window is not None:
            masked = np.arange(low, visible) <= np.arange(visible - rows, visible)[:, None] - window
            np.copyto(by_row, np.float32(-np.inf), where=masked)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        result = np.matmul(scores, v[:, low:visible])
        result /= scores.sum(axis=-1, keepdims=True)
        out[start:stop] = (
            result.reshape(num_kv_heads, group, rows, head_dim)
            .transpose(2, 0, 1, 3)
            .reshape(out[start:stop].shape)
        )


def attention_cost(
    pairs: int, keys: int, rows: int, hq: int, hkv: int, head_dim: int, itemsize: int
) -> tuple[int, int]:
    """(bytes, flops) for `pairs` visible (query row, key) pairs over `keys` distinct keys: q read, out
    written, each visible K and V row read once; 4 D operations a pair and head for the two products, 5 for
    scale, max, subtract, exp and sum, D a row and head for the division."""
    moved = (2 * rows * hq + 2 * keys * hkv) * head_dim * itemsize
    return moved, hq * (pairs * (4 * head_dim + 5) + rows * head_dim)


def check_attention(
    kind: type[Host],
    op: str,
    out: Any,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    context_lens: Any,
    block_table: Any,
    window: int | None,
) -> None:
    """The arguments that both ops have."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        fail(op, "window", f"is {window!r}", "None or a whole number of at least 1")
    dtypes = kind.elements(op, "out", out)
    check(op, "out", out, dtypes, (None, None, None), rows=1)
    check(op, "q", q, dtypes, out.shape, rows=1)
    check(op, "k_cache", k_cache, dtypes, (None, None, None, out.shape[2]))
    check(op, "v_cache", v_cache, dtypes, k_cache.shape)
    check(op, "block_table", block_table, kind.int32, (None, None), rows=1)
    check(op, "context_lens", context_lens, kind.int32, (block_table.shape[0],))
    if k_cache.shape[1] == 0 or out.shape[1] % k_cache.shape[1]:
        fail(op, "q", f"has {out.shape[1]} heads", f"a multiple of the {k_cache.shape[1]} kv heads")
    if kind is Device:
        check_aligned(op, "k_cache", k_cache)
        check_aligned(op, "v_cache", v_cache)


def check_pages(op: str, block_table: Any, context_lens: Any, num_blocks: int, block_size: int) -> None:
    """Host only: every sequence has pages for its context, within the cache. ValueError names the first that
    lacks."""
    for seq, length in enumerate(context_lens.tolist()):
        pages = block_table[seq, : -(-length // block_size)]
        if len(pages) * block_size < length:
            needed = -(-length // block_size)
            fail(op, "block_table", f"has {len(pages)} pages for a context of {length}", f"{needed} pages")
        if len(pages) and not 0 <= pages.min() <= pages.max() < num_blocks:
            fail(op, "block_table", f"row {seq} holds a page outside the cache", f"0 to {num_blocks - 1}")


def make_attention_kernel(
    locate: Any, head_dim: int, group: int, block_size: int, dtype: str, window: int | None, threads: int,
    tile_kv: int,
) -> Any:  # fmt: skip
    """out[t, h] = sum_j softmax_j(softmax_scale q[t, h] . k[j]) v[j] over the visible keys j of row t's
    sequence; with a window, over the last `window` of them.

    Arguments: out, q T[rows, num_q_heads, D]; k_cache, v_cache T[num_blocks, num_kv_heads, block_size, D];
    cu_seqlens_q i32[num_seqs + 1] (read by `locate` alone); context_lens i32[num_seqs];
    block_table i32[num_seqs, max_blocks]; softmax_scale f32. `locate(row, cu_seqlens_q, context_lens)` gives
    (sequence, visible keys); -1 keys: not a row of any sequence, leave it alone.
    Who does what: block (t, h) makes one output vector, in tiles of tile_kv keys from key 0 upward. Thread i
    scores the keys i, i + threads, ... of a tile (one dot product each, d ascending); then each thread reads
    all scores for the maximum and owns the dimensions i, i + threads, ... of the output, keys ascending. One
    block a row and head, not one thread, so that a long context has 128 threads to share it and V is read in
    coalesced rows; and there is no split over keys, so nothing but the absolute key position sets the order.
    Online softmax per tile: m' = max(m, scores); p = exp(s - m'); l = l exp(m - m') + sum p; o likewise.
    Shared memory: s_q f32[D], s_score f32[tile_kv], s_prob f32[tile_kv], s_page i32[2, tile_kv].
    Barriers: one after the scores (and s_q), one after s_prob; a thread that runs ahead writes s_score only,
    which nobody reads after the second, and waits at the next first barrier before it touches s_prob.
    Keys past the context and before the window are never read: a recycled page may hold anything there.
    A window starts at the tile of its first key, in the middle of it where need be: tiles stay aligned to
    key 0. Without one `first_visible` is the constant 0, and nothing of the window is left in the kernel.
    """
    dims = -(-head_dim // threads)
    to_float, from_float = element(dtype).to_float, element(dtype).from_float

    def all_keys(visible: Any) -> Any:
        return 0

    def last_keys(visible: Any) -> Any:
        return max(visible - window, 0)

    def from_tile_start(first: Any, start: Any) -> Any:
        return 0

    def from_window_start(first: Any, start: Any) -> Any:
        return max(first - start, 0)

    first_visible = jit(device=True)(all_keys if window is None else last_keys)
    skipped = jit(device=True)(from_tile_start if window is None else from_window_start)

    @jit()
    def attention_kernel(
        out: Any, q: Any, k_cache: Any, v_cache: Any, cu_seqlens_q: Any, context_lens: Any, block_table: Any,
        softmax_scale: Any,
    ) -> None:  # fmt: skip
        s_q = cuda.shared.array(head_dim, np.float32)
        s_score = cuda.shared.array(tile_kv, np.float32)
        s_prob = cuda.shared.array(tile_kv, np.float32)
        s_page = cuda.shared.array((2, tile_kv), np.int32)
        acc = cuda.local.array(dims, np.float32)
        row = cuda.blockIdx.x
        head = cuda.blockIdx.y
        thread = cuda.threadIdx.x
        kv_head = head // group
        seq, visible = locate(row, cu_seqlens_q, context_lens)
        if visible >= 0:  # the same for the whole block, so the barriers below meet every thread
            for d in range(thread, head_dim, threads):
                s_q[d] = to_float(q[row, head, d])
            for i in range(dims):
                acc[i] = np.float32(0)
            running_max = np.float32(-np.inf)
            running_sum = np.float32(0)
            parity = 0  # two page lists: a thread ahead must not overwrite the one V is still read through
            cuda.syncthreads()
            first = first_visible(visible)
            for start in range(first // tile_kv * tile_kv, visible, tile_kv):
                skip = skipped(first, start)
                count = min(tile_kv, visible - start)
                for j in range(skip + thread, count, threads):
                    key = start + j
                    page = block_table[seq, key // block_size]
                    offset = key % block_size
                    s_page[parity, j] = page
                    dot = np.float32(0)
                    for d in range(head_dim):
                        dot = cuda.fma(s_q[d], to_float(k_cache[page, kv_head, offset, d]), dot)
                    s_score[j] = dot * softmax_scale
                cuda.syncthreads()
                new_max = running_max
                for j in range(skip, count):
                    if s_score[j] > new_max:
                        new_max = s_score[j]
                for j in range(skip + thread, count, threads):
                    s_prob[j] = np.float32(math.exp(s_score[j] - new_max))
                cuda.syncthreads()
                rescale = np.float32(math.exp(running_max - new_max))
                tile_sum = np.float32(0)
                for j in range(skip, count):
                    tile_sum = tile_sum + s_prob[j]
                running_sum = cuda.fma(running_sum, rescale, tile_sum)
                running_max = new_max
                for i in range(dims):
                    d = thread + i * threads
                    if d < head_dim:
                        value = acc[i] * rescale
                        for j in range(skip, count):
                            offset = (start + j) % block_size
                            v_value = to_float(v_cache[s_page[parity, j], kv_head, offset, d])
                            value = cuda.fma(s_prob[j], v_value, value)
                        acc[i] = value
                parity = 1 - parity
            for i in range(dims):
                d = thread + i * threads
                if d < head_dim:
                    value = np.float32(0)
                    if visible > 0:
                        value = acc[i] / running_sum
                    out[row, head, d] = from_float(value)

    return attention_kernel
