"""The Hopper prefill kernel on numpy arrays, without a GPU: for reading, breaking and testing it.

Knows: what the launcher passes. Refuses to know: speed (a tile of 128 rows x 128 keys takes some hundredths
of a second).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba import simt, simt_warps
from kernels_numba.attention_contract import exponent_scale
from kernels_numba.ops.prefill_attention.config import (
    BLOCK_SIZE,
    BOX_COLUMNS,
    PRODUCT,
    Build,
    PrefillConfig,
    smem_plan,
)
from kernels_numba.simt_warpgroups import GroupWarp

PACKAGE = "kernels_numba.ops.prefill_attention"
PARTS = ("schedule", "rows", "producers", "kernel")
MODULES = ("kernels_numba.attention_tile", *(f"{PACKAGE}.{part}" for part in PARTS))
MAPS = 1 << 10  # stands for the address of the tensor maps


def in_numpy(
    config: PrefillConfig, out: Any, q: Any, k: Any, v: Any, cu_seqlens_q: Any, context_lens: Any,
    table: Any, *, softmax_scale: float, window: int | None = None, lse: Any = None, grid: int = 2,
    seed: int = 0, build: Build = PRODUCT, change: Callable[[str, str], str] = lambda name, text: text,
) -> Any:  # fmt: skip
    """The counters that the launch leaves; out[tokens, Hq, D] and lse[tokens, Hq] are written. bfloat16 bits
    as uint16.

    k, v, table: pages and block_table, or as config.source says rows [keys, Hkv, D] and cu_seqlens_k; grid:
    blocks; seed: of the order in which warps go on; change: see simt_warps.link. IndexError where the kernel
    leaves an array, simt_turns.Stuck where it would hang.
    """
    tokens, num_q_heads, head_dim = out.shape
    num_kv_heads = k.shape[1]
    memory = simt.Memory()
    matrices = [
        x.reshape(-1, head_dim if config.source == "pages" else num_kv_heads * head_dim) for x in (k, v)
    ]
    counters = np.zeros(2, np.int32)
    q2, out2 = (x.reshape(tokens, -1) for x in (q, out))
    lse_at = 0 if lse is None else memory.put(lse.reshape(-1))
    box = (BLOCK_SIZE, BOX_COLUMNS)
    maps = {MAPS: (matrices[0], box), MAPS + 128: (matrices[1], box)}
    arguments = (
        MAPS, memory.put(q2), memory.put(out2), lse_at, memory.put(cu_seqlens_q), memory.put(context_lens),
        memory.put(table), memory.put(counters), len(context_lens), num_kv_heads, num_q_heads // num_kv_heads,
        q2.strides[0], out2.strides[0], table.strides[0] // 4, exponent_scale(softmax_scale),
    )  # fmt: skip
    specialised = (config, "bfloat16", window, lse is not None, build)
    simt_warps.run(
        MODULES, "make_prefill_kernel", specialised, arguments, grid, config.threads, smem_plan(config).bytes,
        memory, maps, seed, change, GroupWarp,
    )  # fmt: skip
    return counters
