"""The tensor-core decode kernel on numpy arrays, without a GPU: for reading, breaking and testing it.

Knows: what the launcher passes. Refuses to know: speed (a tile of 128 keys takes some hundredths of a
second).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba import simt, simt_warps
from kernels_numba.attention_contract import SPLIT, exponent_scale
from kernels_numba.ops.decode_attention.config import (
    BLOCK_SIZE,
    BOX_COLUMNS,
    ROWS,
    THREADS,
    Build,
    DecodeConfig,
    smem_plan,
)
from kernels_numba.ops.decode_attention.fold import UNWRITTEN

PACKAGE = "kernels_numba.ops.decode_attention"
MODULES = (
    "kernels_numba.attention_tile",
    f"{PACKAGE}.schedule",
    f"{PACKAGE}.feed",
    f"{PACKAGE}.fold",
    f"{PACKAGE}.products",
    f"{PACKAGE}.producer",
    f"{PACKAGE}.scorers",
    f"{PACKAGE}.adders",
    f"{PACKAGE}.finisher",
    f"{PACKAGE}.kernel",
)


def in_numpy(
    feed: Any, out: Any, q: Any, k_cache: Any, v_cache: Any, context_lens: Any, block_table: Any, *,
    softmax_scale: float, window: int | None = None, lse: Any = None, grid: int = 2, seed: int = 0,
    mutant: str = "", tokens: int = 1, change: Callable[[str, str], str] = lambda name, text: text,
) -> int:  # fmt: skip
    """How many words of its workspace the launch leaves other than it found them: 0 is right. out[B tokens,
    Hq, D] and lse[B tokens, Hq] are written. bfloat16 bits as uint16.

    feed: "tma" or "cp_async"; grid: blocks; seed: of the order in which warps go on;
    change: see simt_warps.link. IndexError where the kernel leaves an array, simt_warps.Stuck where it would
    hang.
    """
    num_seqs, (_, num_q_heads, head_dim) = len(context_lens), out.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    if block_size != BLOCK_SIZE:
        raise ValueError(f"decode_attention: pages have {block_size} keys; {BLOCK_SIZE} are required")
    group = num_q_heads // num_kv_heads
    capacity = num_seqs * max(1, -(-block_table.shape[1] * BLOCK_SIZE // SPLIT))
    memory = simt.Memory()
    k_rows, v_rows = k_cache.reshape(-1, head_dim), v_cache.reshape(-1, head_dim)
    k_at, v_at = memory.put(k_rows.reshape(-1)), memory.put(v_rows.reshape(-1))
    words = capacity * num_q_heads * tokens
    partial, partial_ml = (np.full(words * each, UNWRITTEN, np.int32) for each in (head_dim, 2))
    counters = np.zeros(2 + num_seqs * num_kv_heads * -(-group * tokens // ROWS), np.int32)
    q2, out2 = q.reshape(len(q), -1), out.reshape(len(out), -1)
    lse_at = 0 if lse is None else memory.put(lse.reshape(-1))
    box = (BLOCK_SIZE, BOX_COLUMNS)
    maps = {1 << 10: (k_rows, box), (1 << 10) + 128: (v_rows, box)}
    arguments = (
        1 << 10, k_at, v_at, memory.put(q2), memory.put(out2), lse_at, memory.put(context_lens),
        memory.put(block_table), memory.put(partial), memory.put(partial_ml), memory.put(counters), num_seqs,
        num_kv_heads, group, q2.strides[0], out2.strides[0], block_table.strides[0] // 4, capacity,
        exponent_scale(softmax_scale),
    )  # fmt: skip
    config = DecodeConfig(head_dim, feed)
    specialised = (config, "bfloat16", window, lse is not None, Build(mutant=mutant), tokens)
    simt_warps.run(
        MODULES, "make_decode_kernel", specialised, arguments, grid, THREADS, smem_plan(config).bytes, memory,
        maps, seed, change,
    )  # fmt: skip
    unwritten = np.concatenate([partial, partial_ml]) == UNWRITTEN
    return int(np.count_nonzero(counters) + np.count_nonzero(~unwritten))
