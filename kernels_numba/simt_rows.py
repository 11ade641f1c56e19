"""CUDA-core kernels of launch.py on simt_warps.py: packs of 16 bytes that some lanes leave out, halves of
words, static shared memory.

The text is linked once and then run for block after block. Knows: the instructions of ops/warp. Refuses to
know: what simt_warps.py refuses to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from kernels_numba.simt import Array, Memory, to_float
from kernels_numba.simt_turns import Turns
from kernels_numba.simt_warps import WARP, Shared, Warp, link


class RowWarp(Warp):
    """One warp of a block of CUDA-core code."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.cuda.shared = SimpleNamespace(array=self.shared_array)

    # numba's own

    def shared_array(self, length: int, dtype: Any) -> Array:
        """The block's one array: each kernel here has one. NaN until it is written."""
        both: Any = self.both
        if not hasattr(both, "static"):
            both.static = np.full(length, np.nan, dtype)
        held: Array = both.static
        if len(held) != length:
            raise RuntimeError(f"a second shared array, of {length}; there is one of {len(held)}")
        return held

    # packs.py

    def ld_global_v4_if_at(self, condition: Any, out: Array, at: int, pointer: Any) -> None:
        pointers = self.per_thread(pointer)
        words = np.zeros((WARP, 4), np.int32)
        for lane in np.flatnonzero(self.per_thread(condition) != 0):
            if pointers[lane] % 16:
                raise IndexError(f"16 bytes at {pointers[lane]:#x}: no multiple of 16")
            words[lane] = self.memory.bytes_at(pointers[lane], 16).view(np.int32)
        self._fill(out[at : at + 4], words)

    ld_global_nc_v4_if_at = ld_global_v4_if_at

    def st_global_v4_if_at(self, condition: Any, pointer: Any, values: Array, at: int) -> None:
        pointers = self.per_thread(pointer)
        if any(pointers[lane] % 16 for lane in np.flatnonzero(self.per_thread(condition) != 0)):
            raise IndexError("16 bytes to an address that is no multiple of 16")
        self._store(condition, pointer, [values[at + word] for word in range(4)])

    # halves.py, mma.py

    @staticmethod
    def _word(word: Any) -> Array:
        return np.asarray(word).astype(np.int64).astype(np.uint32)

    def bf16_low(self, word: Any) -> Array:
        return self.f32(to_float(self._word(word) & 0xFFFF))

    def bf16_high(self, word: Any) -> Array:
        return self.f32(to_float(self._word(word) >> 16))

    def f16_low(self, word: Any) -> Array:
        return self.f32((self._word(word) & 0xFFFF).astype(np.uint16).view(np.float16))

    def f16_high(self, word: Any) -> Array:
        return self.f32((self._word(word) >> 16).astype(np.uint16).view(np.float16))

    def pack_f16(self, low: Any, high: Any) -> Array:
        with np.errstate(over="ignore"):
            pair = [np.broadcast_to(self.f32(x).astype(np.float16), WARP) for x in (low, high)]
        return np.ascontiguousarray(np.stack(pair, axis=1)).view(np.int32)[:, 0]

    # quotients.py

    def sqrt_f32(self, x: Any) -> Array:
        return np.sqrt(self.f32(x))

    def divide_full_f32(self, x: Any, y: Any) -> Array:
        with np.errstate(invalid="ignore"):
            return self.divide_f32(x, y)

    def mul_f32(self, x: Any, y: Any) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            return super().mul_f32(x, y)

    def ex2_f32(self, x: Any) -> Array:
        with np.errstate(over="ignore", under="ignore"):
            return super().ex2_f32(x)


def run(
    names: Sequence[str], factory: str, specialised: Sequence[Any], arguments: Sequence[Any], grid: int,
    threads: int, memory: Memory, seed: int = 0, change: Callable[[str, str], str] = lambda name, text: text,
) -> None:  # fmt: skip
    """Run all blocks of a kernel, one after another; arguments as in simt_warps.run. IndexError for an access
    outside an array, Stuck where all warps wait."""
    rng = np.random.default_rng(seed)
    shared = Shared(threads // WARP, 0, rng)
    warps = [RowWarp(shared, memory, {}, 0, grid, warp) for warp in range(shared.warps)]
    kernels = [link(warp, names, change)[factory](*specialised) for warp in warps]
    for index in range(grid):
        shared.turns, shared.named = Turns(shared.warps, rng), {}
        vars(shared).pop("static", None)
        for warp in warps:
            warp.cuda.blockIdx = SimpleNamespace(x=index)
        shared.turns.run([lambda kernel=kernel: kernel(*arguments) for kernel in kernels])  # type: ignore[misc]
