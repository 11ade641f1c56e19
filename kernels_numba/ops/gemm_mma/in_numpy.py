"""The mma.sync GEMM on numpy arrays, without a GPU: its text, a warp a thread, and the order that it keeps.

A tensor core here adds the 16 products of a step and the accumulator exactly and rounds once to float32; a
GPU cuts low bits off before it adds, so numbers agree to the last places only. What is compared bit by bit is
the order: which products, in steps of 16 of K, in one chain from 0, then the bias. Knows: what the launcher
passes.
Refuses to know: speed, memory order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba import simt_warps
from kernels_numba.layouts import mma_layout
from kernels_numba.ops.gemm_mma.config import MmaConfig
from kernels_numba.ops.warp.door import Plan
from kernels_numba.ops.warp.in_numpy import Arrays
from kernels_numba.simt import POISON, SMEM_START, Array, to_bits, to_float
from kernels_numba.simt_rows import RowWarp
from kernels_numba.simt_warps import WARP

MODULES = (
    "kernels_numba.ops.warp.elements",
    "kernels_numba.ops.gemm_few.epilogue",
    "kernels_numba.ops.gemm_mma.kernel",
)
STEP = 16
A_LANE, A_REGISTER, A_HALF = mma_layout("a")
B_LANE, B_REGISTER, B_HALF = mma_layout("b")
C_LANE, C_REGISTER, _ = mma_layout("c")
ELEMENTS: dict[str, Callable[[Any], Any]] = {  # of bits, or of the type itself, to float32
    "bfloat16": to_float,
    "float16": lambda values: values.view(np.float16).astype(np.float32),
}


def add_step(acc: Any, a: Any, b: Any) -> Any:
    """float32[M, N] + a[M, 16] b[N, 16]^T, exact products and sums in float64 in one order, rounded once."""
    total = acc.astype(np.float64)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    for i in range(a.shape[1]):
        total += wide_a[:, i, None] * wide_b[None, :, i]
    return total.astype(np.float32)


def in_order(x: Any, weight: Any, bias: Any = None) -> Any:
    """The contract's product of float32 arrays: x[M, K] weight[N, K]^T in steps of 16 of K, ascending from 0,
    then + bias[N], all float32[M, N]."""
    acc = np.zeros((len(x), len(weight)), np.float32)
    for k in range(0, x.shape[1], STEP):
        acc = add_step(acc, x[:, k : k + STEP], weight[:, k : k + STEP])
    return acc if bias is None else (acc + bias).astype(np.float32)


class TileWarp(RowWarp):
    """One warp of a block: mma_tile.py's instructions, and a copy whose destination is poison from the moment
    it is asked for. conflicts: what of ldmatrix, copies and staged stores met in a bank."""

    conflicts: list[tuple[str, list[int]]]

    def _phases(self, what: str, addresses: Any, lanes: int, width: int) -> None:
        """Note where lanes that shared memory serves together need a bank twice."""
        for phase in np.asarray(addresses).reshape(-1, lanes):
            banks = (phase[:, None] // 4 + np.arange(width // 4)) % 32
            if np.unique(banks).size != banks.size:
                self.conflicts.append((what, phase.tolist()))

    def cp_async_16_zfill(self, dst: Any, src: Any, valid: Any) -> None:
        super().cp_async_16_zfill(dst, src, valid)
        to = self.per_thread(dst)
        self._phases("copy", to, 8, 16)
        for at in to.tolist():
            self.shared(at, 16)[:] = POISON

    def make_load_fragments(self, blocks: int, row_bytes: int) -> Callable[..., None]:
        def load_fragments(out: Array, address: Any) -> None:
            at = self.per_thread(address)
            for block in range(blocks):
                lines = at + 16 * row_bytes * block
                self._phases("ldmatrix", lines, 8, 16)
                offset = lines - SMEM_START
                if (offset < 0).any() or (offset % 16).any() or offset.max() + 16 > self.smem.size:
                    raise IndexError(f"ldmatrix outside the block's {self.smem.size} bytes")
                rows = self.smem[offset[:, None] + np.arange(16)]
                out[4 * block : 4 * block + 4] = rows.view(np.int32).reshape(4, WARP)

        return load_fragments

    def make_mma_tile(self, row_blocks: int, column_pairs: int, dtype: str) -> Callable[..., None]:
        element, columns = ELEMENTS[dtype], 2 * column_pairs

        def mma_tile(acc: Array, a: Array, b: Array) -> None:
            left = np.ascontiguousarray(a).view(np.uint16).reshape(row_blocks, 4, WARP, 2)
            right = np.ascontiguousarray(b).view(np.uint16).reshape(columns, 2, WARP, 2)
            left = element(left[:, A_REGISTER, A_LANE, A_HALF]).reshape(16 * row_blocks, STEP)
            right = element(right[:, B_REGISTER, B_LANE, B_HALF]).reshape(8 * columns, STEP)
            held = acc.reshape(row_blocks, columns, 4, WARP)
            tile = held[:, :, C_REGISTER, C_LANE].transpose(0, 2, 1, 3).reshape(len(left), len(right))
            with np.errstate(invalid="ignore", over="ignore"):
                tile = add_step(tile, left, right)
            held[:, :, C_REGISTER, C_LANE] = tile.reshape(row_blocks, 16, columns, 8).transpose(0, 2, 1, 3)

        return mma_tile

    def make_add_bias_tile(self, row_blocks: int, column_blocks: int, dtype: str) -> Callable[..., None]:
        def add_bias_tile(acc: Array, bias: Any, left: Any) -> None:
            held = acc.reshape(row_blocks, column_blocks, 2, 2, WARP)
            for j in range(column_blocks):
                if self.one(left) > 8 * j:
                    pair = np.ascontiguousarray(self.load(self.per_thread(bias) + 16 * j, 4)).view(np.uint16)
                    held[:, j] += ELEMENTS[dtype](pair).T  # [half, lane]

        return add_bias_tile

    def make_stage_tile(
        self, row_blocks: int, column_blocks: int, dtype: str, pitch: int
    ) -> Callable[..., None]:
        pack = self.pack_bf16 if dtype == "bfloat16" else self.pack_f16

        def stage_tile(acc: Array, address: Any) -> None:
            held = acc.reshape(row_blocks, column_blocks, 2, 2, WARP)
            for i, half, j in np.ndindex(row_blocks, 2, column_blocks):
                at = self.per_thread(address) + (16 * i + 8 * half) * pitch + 16 * j
                self._phases("stage", at, 32, 4)
                for lane, word in enumerate(pack(held[i, j, half, 0], held[i, j, half, 1])):
                    self.words_at(at[lane], 1)[0] = word

        return stage_tile

    def make_store_tile(self, row_blocks: int, column_blocks: int) -> Callable[..., None]:
        def store_tile(acc: Array, out: Any, row_bytes: Any, rows: Any, left: Any) -> None:
            held = acc.reshape(row_blocks, column_blocks, 2, 2, WARP)
            for i, half, j in np.ndindex(row_blocks, 2, column_blocks):
                below = 16 * i + 8 * half
                may = (self.per_thread(rows) > below) & (self.per_thread(left) > 8 * j)
                at = self.per_thread(out) + below * row_bytes + 32 * j
                self._store(may, at, [held[i, j, half, 0], held[i, j, half, 1]])

        return store_tile


def run_plan(
    arrays: Arrays, plan: Plan, *, seed: int = 0,
    change: Callable[[str, str], str] = lambda name, text: text,
) -> list[tuple[str, list[int]]]:  # fmt: skip
    """Run a planned launch, block after block, its warps in the order that the seed says; what met in a bank.

    change: see simt_warps.link. IndexError where the kernel leaves an array, Stuck where it would hang.
    """
    config: MmaConfig = plan.kernel.key[0]
    met: list[tuple[str, list[int]]] = []
    kind = type("NotedWarp", (TileWarp,), {"conflicts": met})
    simt_warps.run(
        MODULES, "make_gemm_mma_kernel", plan.kernel.key, plan.arguments, plan.grid, config.threads,
        plan.kernel.smem, arrays.memory, {}, seed, change, kind,
    )  # fmt: skip
    return met


def rounded(values: Any, dtype: str) -> Any:
    """float32 -> the nearest element of a type, as bits (bfloat16) or float16; float32 as it is."""
    if dtype == "bfloat16":
        return to_bits(values)
    return np.asarray(values, np.float32).astype({"float16": np.float16, "float32": np.float32}[dtype])
