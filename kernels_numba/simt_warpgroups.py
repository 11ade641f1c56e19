"""Hopper's warpgroups on simt_warps.py: wgmma that is not done until it is waited for, barriers that warps
arrive at and go on, boxes that reach over an edge.

A product is made when its group is waited for: from what shared memory and the registers of A hold then, so
that a stage handed back, or P overwritten, too early shows; until then its accumulators are NaN. Knows: the
instructions of ops/prefill_attention, 16 rows of a warpgroup's 64 a warp. Refuses to know: what simt_warps.py
refuses to; float16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba.attention_contract import steps
from kernels_numba.layouts import swizzled_image
from kernels_numba.simt import Array, lanes, to_float
from kernels_numba.simt_warps import WARP, Warp

Panels = tuple[int, int]  # shared address, bytes from one panel of 64 elements to the next


class GroupWarp(Warp):
    """One warp of a block with warpgroups."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.products: list[Callable[[], None]] = []

    # wgmma.py, wgmma_panels.py

    def descriptor_k_major(self, address: Any) -> int:
        return self.one(address)

    def make_descriptor_mn_major(self, panel_bytes: int) -> Callable[[Any], Panels]:
        return lambda address: (self.one(address), panel_bytes)

    def lines(self, address: int, count: int) -> Array:
        """float32[count, 64] of swizzled 128-byte lines of bfloat16."""
        return np.asarray(
            to_float(swizzled_image(self.shared(address, count * 128)).view(np.uint16))
        ).reshape(count, 64)

    @staticmethod
    def fragments(words: Array) -> Array:
        """A of a warp, float32[16, 16 steps], from i32[4 steps][32 lanes] of packed pairs."""
        pairs = (
            np.ascontiguousarray(words).view(np.uint16).reshape(-1, 2, 2, 8, 4, 2)
        )  # step, k, row, r, i, which
        return np.asarray(to_float(pairs.transpose(2, 3, 0, 1, 4, 5))).reshape(16, -1)

    def queue(self, acc: Array, left: Callable[[], Array], right: Callable[[], Array], scale_d: int) -> None:
        """acc[n / 2][32] += left[16, k] right[k, n], when it is waited for."""
        before = acc.copy() if scale_d else np.zeros_like(acc)
        acc[...] = np.nan

        def finish() -> None:
            pairs = len(before) // 4
            c = before.reshape(pairs, 2, 2, 8, 4).transpose(1, 3, 0, 4, 2).reshape(16, 8 * pairs)
            c = steps(c, left(), right())
            acc[...] = c.reshape(2, 8, pairs, 4, 2).transpose(2, 0, 4, 1, 3).reshape(4 * pairs, WARP)

        self.products.append(finish)

    def make_wgmma_panels(
        self, n: int, k: int, dtype: str, a: str, a_panel_bytes: int, b_panel_bytes: int
    ) -> Callable[..., None]:
        mine = 16 * 128 * (self.warp % 4)

        def side(address: int, panel_bytes: int, count: int) -> Array:
            panels = [self.lines(address + panel * panel_bytes, count) for panel in range(k // 64)]
            return np.concatenate(panels, axis=1)

        def wgmma(acc: Array, a_operand: Any, desc_b: int, scale_d: int) -> None:
            def left() -> Array:
                return (
                    side(a_operand + mine, a_panel_bytes, 16) if a == "shared" else self.fragments(a_operand)
                )

            self.queue(acc, left, lambda: side(desc_b, b_panel_bytes, n).T, scale_d)

        return wgmma

    def make_wgmma(  # type: ignore[override]
        self, n: int, k_steps: int = 4, dtype: str = "bfloat16", a: str = "shared", a_major: str = "k",
        b_major: str = "k", wait: int | None = None,
    ) -> Callable[..., None]:  # fmt: skip
        if (a, b_major, wait) != ("registers", "mn", None):
            raise NotImplementedError("A from registers, B with N innermost, nothing waited for")

        def right(panels: Panels) -> Array:
            address, panel_bytes = panels
            parts = [self.lines(address + panel * panel_bytes, 16 * k_steps) for panel in range(n // 64)]
            return np.concatenate(parts, axis=1)

        def wgmma(acc: Array, p: Array, desc_b: Panels, scale_d: int) -> None:
            self.queue(acc, lambda: self.fragments(p[: 4 * k_steps]), lambda: right(desc_b), scale_d)

        return wgmma

    def make_wgmma_wait(self, n: int, pending: int = 0) -> Callable[[Array], None]:
        def wait(acc: Array) -> None:
            while len(self.products) > pending:
                self.products.pop(0)()

        return wait

    def make_hold(self, n: int) -> Callable[[Array], None]:
        return lambda values: None

    # named_barrier.py, control.py, ldst.py, tma.py, shuffle.py, matrix.py, predicated_vector.py

    def _arrive(self, name: int, threads: int) -> tuple[list[int], int]:
        arrived = self.both.named.setdefault(name, [0, 0])
        arrived[0] += WARP
        mine = arrived[1]
        if arrived[0] > threads:
            raise RuntimeError(f"named barrier {name}: more arrivals than {threads}")
        if arrived[0] == threads:
            arrived[:] = [0, mine + 1]
        return arrived, mine

    def named_barrier_sync(self, name: Any, threads: int) -> None:
        arrived, mine = self._arrive(self.one(name), threads)
        self.wait_for(lambda: arrived[1] != mine, f"named barrier {self.one(name)}")

    def named_barrier_arrive(self, name: Any, threads: int) -> None:
        self._arrive(self.one(name), threads)

    def prefetch_l2(self, address: Any) -> None:
        for at in self.per_thread(address).tolist():
            self.memory.bytes_at(at, 1)

    def setmaxnreg_dec(self, count: int) -> None:
        pass

    setmaxnreg_inc = setmaxnreg_dec

    def tma_load_2d(self, dst: Any, tensor_map: int, bar: Any, x: Any, y: Any) -> None:
        matrix, (rows, cols) = self.maps[self.one(tensor_map)]
        at, y, x = self.one(dst), self.one(y), self.one(x)
        if y < 0 or x < 0:
            raise IndexError(f"a box at row {y}, column {x}")

        def land() -> int:
            box = np.zeros((rows, cols), matrix.dtype)
            part = matrix[y : y + rows, x : x + cols]
            box[: part.shape[0], : part.shape[1]] = part
            image = swizzled_image(box)
            self.shared(at, image.size)[:] = image
            return int(image.size)

        # At once, or when somebody waits for it: both may happen.
        landed = land() if self.both.turns.rng.random() < 0.5 else None
        self.both.barriers[self.one(bar)].flying.append(land if landed is None else lambda: landed)

    def shfl_xor_i32(self, x: Any, mask: int) -> Any:
        return lanes(np.asarray(self.per_thread(x))[np.arange(WARP) ^ mask])

    def stmatrix_x4(self, address: Any, *registers: Any) -> None:
        address = self.per_thread(address)
        for number, values in enumerate(registers):
            rows = (
                np.ascontiguousarray(self.per_thread(values)).astype(np.int32).view(np.uint8).reshape(8, 16)
            )
            for row in range(8):
                self.shared(address[8 * number + row], 16)[:] = rows[row]

    def st_global_v4_if(self, condition: Any, pointer: Any, values: Array) -> None:
        self._store(condition, pointer, [values[i] for i in range(4)])
