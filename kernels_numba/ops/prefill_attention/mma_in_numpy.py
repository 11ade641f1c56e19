"""The mma.sync prefill kernel on numpy arrays, without a GPU: for reading, breaking and testing it.

Knows: what the launcher passes. Refuses to know: speed (a tile of 128 rows x 128 keys takes some tenths of a
second).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba import simt, simt_warps
from kernels_numba.attention_contract import exponent_scale, steps
from kernels_numba.layouts import mma_layout
from kernels_numba.ops.prefill_attention.config import PRODUCT, Build
from kernels_numba.ops.prefill_attention.mma_config import THREADS, MmaConfig, smem_plan
from kernels_numba.simt import POISON, Array, to_float
from kernels_numba.simt_warpgroups import GroupWarp
from kernels_numba.simt_warps import WARP

PACKAGE = "kernels_numba.ops.prefill_attention"
PARTS = ("schedule", "rows", "mma_loads", "mma_kernel")
MODULES = ("kernels_numba.attention_tile", *(f"{PACKAGE}.{part}" for part in PARTS))


class MmaWarp(GroupWarp):
    """A warp whose products round once a step, and where a copy's destination is poison from the moment that
    it is asked for, so that a stage filled too early shows."""

    def mma_m16n8k16_at(self, acc: Array, acc_at: int, a: Array, a_at: int, b: Array, b_at: int) -> None:
        def matrix(registers: Array, operand: str) -> Any:
            lane, register, half = mma_layout(operand)
            bits = np.ascontiguousarray(registers).view(np.uint16).reshape(len(registers), WARP, 2)
            return to_float(bits[register, lane, half])

        lane, register, _ = mma_layout("c")
        held = acc[acc_at : acc_at + 4]
        right = matrix(b[b_at : b_at + 2], "b").T
        held[register, lane] = steps(held[register, lane], matrix(a[a_at : a_at + 4], "a"), right)

    def cp_async_16_zfill(self, dst: Any, src: Any, valid: Any) -> None:
        super().cp_async_16_zfill(dst, src, valid)
        for at in self.per_thread(dst).tolist():
            self.shared(at, 16)[:] = POISON

    def make_stress(self, enabled: bool) -> Callable[[int], None]:
        """Where a GPU's warps are made to pause, another one may go on."""
        return lambda place: self.wait_for(lambda: True, "a pause")

    def st_global_v4(self, pointer: Any, values: Array) -> None:
        self.st_global_v4_if(1, pointer, values)


def in_numpy(
    config: MmaConfig, out: Any, q: Any, k: Any, v: Any, cu_seqlens_q: Any, context_lens: Any, table: Any, *,
    softmax_scale: float, window: int | None = None, lse: Any = None, grid: int = 2, seed: int = 0,
    build: Build = PRODUCT, change: Callable[[str, str], str] = lambda name, text: text,
) -> Any:  # fmt: skip
    """The counters that the launch leaves; out[tokens, Hq, D] and lse[tokens, Hq] are written. bfloat16 bits
    as uint16.

    k, v, table: pages and block_table, or as config.source says rows [keys, Hkv, D] and cu_seqlens_k; the
    rest as in in_numpy.py. IndexError where the kernel leaves an array, simt_turns.Stuck where it would hang.
    """
    tokens, num_q_heads, _ = out.shape
    num_kv_heads = k.shape[1]
    memory = simt.Memory()
    counters, state = np.zeros(2, np.int32), np.full(grid * config.state_words, np.nan, np.float32)
    q2, out2 = (x.reshape(tokens, -1) for x in (q, out))
    keys = [memory.put(x.reshape(-1)) for x in (k, v)]
    arguments = (
        *keys, memory.put(q2), memory.put(out2), 0 if lse is None else memory.put(lse.reshape(-1)),
        memory.put(cu_seqlens_q), memory.put(context_lens), memory.put(table), memory.put(counters),
        memory.put(state), len(context_lens), num_kv_heads, num_q_heads // num_kv_heads, q2.strides[0],
        out2.strides[0], table.strides[0] // 4, exponent_scale(softmax_scale),
    )  # fmt: skip
    specialised = (config, "bfloat16", window, lse is not None, build)
    simt_warps.run(
        MODULES, "make_prefill_mma_kernel", specialised, arguments, grid, THREADS, smem_plan(config).bytes,
        memory, {}, seed, change, MmaWarp,
    )  # fmt: skip
    return counters
