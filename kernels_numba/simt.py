"""A block of threads in numpy, in lockstep: runs a tensor-core kernel's own Python text without a GPU.

A value that differs between threads is an array of one number a thread; shared memory is bytes; device memory
is arrays, outside of whose rows any access fails. Warp and warpgroup instructions act on all warps of the
block at once, by the layouts that ptx/mma.py, ptx/matrix.py and ptx/epilogue.py state (PTX ISA). Copies land
when they are waited for and not before, so a missing wait shows. Knows: the instructions that the kernels in
ops/gemm/ladder use. Refuses to know: races between threads (lockstep has none), rounding inside a tensor core
(numpy's float32 products differ in the last bits), time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from kernels_numba.layouts import mma_layout, swizzled_image

POISON = 0xFF  # bytes of unwritten shared memory: NaN in bfloat16 and float32 alike
SMEM_START = 4096  # not 0, so that an offset cannot pass for an address
Array = np.ndarray[Any, Any]


class Lanes(np.ndarray[Any, Any]):
    """One number a thread. As a condition: true if it is for any thread (`if thread == 0:` runs once)."""

    def __bool__(self) -> bool:
        return bool(np.asarray(self).any())


def lanes(values: Any) -> Any:
    """Lanes of integers."""
    return np.asarray(values, np.int64).view(Lanes)


def to_float(bits: Any) -> Any:
    """bfloat16 bit patterns (uint16) -> float32."""
    return (np.asarray(bits, np.uint32) << 16).astype(np.uint32).view(np.float32)


def to_bits(values: Any) -> Any:
    """float32 -> bit patterns (uint16) of the nearest bfloat16."""
    import ml_dtypes

    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


class Memory:
    """Device arrays by address."""

    def __init__(self) -> None:
        self.arrays: list[tuple[int, int, Array]] = []
        self.next = 1 << 20

    def put(self, array: Array) -> int:
        """The address of a 1-D or 2-D array, which may be a view into a wider one: only its own elements
        exist."""
        start, pitch = self.next, array.strides[0] if array.ndim == 2 else array.nbytes
        rows = array if array.ndim == 2 else array.reshape(1, -1)
        self.arrays.append((start, pitch, rows.view(np.uint8)))
        self.next += (len(rows) * pitch + (1 << 20)) & -1024
        return start

    def bytes_at(self, address: int, count: int) -> Array:
        """`count` bytes, to read or to write. IndexError if they are not all of one row of an array."""
        for start, pitch, rows in self.arrays:
            row, col = divmod(int(address) - start, pitch) if pitch else (-1, 0)
            if 0 <= row < len(rows) and col + count <= rows.shape[1]:
                return rows[row, col : col + count]
        raise IndexError(f"{count} bytes at {address:#x} lie outside every array")


class Block:
    """The instructions that kernels import, bound to one block's shared memory."""

    def __init__(self, memory: Memory, maps: Mapping[int, Any], index: int, threads: int, smem: int) -> None:
        self.memory, self.maps, self.threads = memory, maps, threads
        self.smem = np.full(smem, POISON, np.uint8)
        self.groups: list[list[tuple[int, int, int]]] = []
        self.open: list[tuple[int, int, int]] = []
        self.in_flight: dict[int, list[tuple[int, Array]]] = {}
        self.expected: dict[int, int] = {}
        self.waits: dict[int, int] = {}
        self.cuda = SimpleNamespace(
            threadIdx=SimpleNamespace(x=lanes(np.arange(threads))), blockIdx=SimpleNamespace(x=index),
            types=SimpleNamespace(int32=self.integer, int64=self.integer), syncthreads=lambda: None,
            local=SimpleNamespace(array=lambda n, dtype: np.full((n, threads), 77, dtype)),
        )  # fmt: skip

    @staticmethod
    def integer(value: Any) -> Any:
        return lanes(value) if isinstance(value, np.ndarray) else int(value)

    def per_thread(self, value: Any) -> Array:
        return np.broadcast_to(np.asarray(value), self.threads)

    def shared(self, address: Any, count: int) -> Array:
        """Bytes of shared memory. IndexError outside the block's, or not at a multiple of 16."""
        at = int(address) - SMEM_START
        if at < 0 or at + count > self.smem.size or at % 16:
            raise IndexError(f"{count} bytes at shared offset {at}; there are {self.smem.size}, in 16s")
        return self.smem[at : at + count]

    # control.py, cp_async.py

    def dynamic_shared(self) -> int:
        return SMEM_START

    def warp_uniform(self, value: Any) -> Any:
        return lanes(np.repeat(self.per_thread(value)[::32], 32))

    def cp_async_16_zfill(self, dst: Any, src: Any, valid: Any) -> None:
        threads = zip(*(self.per_thread(v).tolist() for v in (dst, src, valid)), strict=True)
        self.open += threads

    def cp_async_commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def cp_async_wait(self, pending: int) -> None:
        while len(self.groups) > pending:
            for dst, src, valid in self.groups.pop(0):
                unit = self.shared(dst, 16)
                unit[:] = 0
                if valid:
                    unit[:valid] = self.memory.bytes_at(src, valid)

    # matrix.py, mma.py

    def ldmatrix_x4(self, out: Array, address: Any) -> None:
        rows = np.stack([self.shared(a, 16) for a in self.per_thread(address)])
        pairs = rows.view(np.int32).reshape(-1, 4, 32)  # warp, matrix, lane: 8 rows of 4 pairs
        for i in range(4):
            out[i] = pairs[:, i].reshape(-1)

    def mma_m16n8k16_at(self, acc: Array, acc_at: int, a: Array, a_at: int, b: Array, b_at: int) -> None:
        def gather(registers: Array, operand: str) -> Any:
            lane, register, half = mma_layout(operand)
            bits = np.ascontiguousarray(registers).view(np.uint16).reshape(len(registers), -1, 32, 2)
            return to_float(bits[register, :, lane, half])  # [rows, columns, warp]

        left, right = gather(a[a_at : a_at + 4], "a"), gather(b[b_at : b_at + 2], "b")
        lane, register, _ = mma_layout("c")
        held = acc[acc_at : acc_at + 4].reshape(4, -1, 32)
        held[register, :, lane] += np.einsum("mkw,nkw->mnw", left, right)

    # mbarrier.py, tma.py, wgmma.py

    def mbarrier_init(self, bar: int, count: int) -> None:
        if count != 1:
            raise ValueError(f"a barrier of {count} arrivals; here one thread asks for all copies")
        self.in_flight[bar], self.expected[bar], self.waits[bar] = [], 0, 0

    def fence_mbarrier_init(self) -> None:
        pass

    def mbarrier_expect_tx(self, bar: int, size: int) -> None:
        if self.in_flight[bar]:
            raise RuntimeError("a stage is asked for again before anybody waited for it")
        self.expected[bar] += size

    def tma_load_2d(self, dst: int, tensor_map: int, bar: int, x: int, y: int) -> None:
        matrix, (rows, cols) = self.maps[tensor_map]
        box = np.zeros((rows, cols), np.uint16)
        part = matrix[y : y + rows, x : x + cols]
        box[: part.shape[0], : part.shape[1]] = part
        self.in_flight[bar].append((dst, swizzled_image(box)))

    def mbarrier_wait(self, bar: int, phase: int) -> None:
        if self.waits[bar] % 2 != phase:
            raise RuntimeError(f"waits for phase {phase} of a barrier in phase {self.waits[bar] % 2}")
        landed = sum(image.size for _, image in self.in_flight[bar])
        if not landed == self.expected[bar] > 0:
            raise RuntimeError(f"hangs: {landed} bytes arrive, {self.expected[bar]} are expected")
        for dst, image in self.in_flight[bar]:
            self.shared(dst, image.size)[:] = image
        self.waits[bar] += 1
        self.in_flight[bar], self.expected[bar] = [], 0

    def descriptor_k_major(self, address: Any) -> Any:
        return address

    def wgmma_operand(self, address: Any, lines: int) -> Any:
        image = swizzled_image(self.shared(address, lines * 128))
        return to_float(image.view(np.uint16)).reshape(lines, 64)

    def make_wgmma(self, n: int, k_steps: int, dtype: str, wait: int) -> Callable[..., None]:
        def wgmma(acc: Array, a: Any, b: Any, scale_d: int) -> None:
            for first in range(0, self.threads, 128):
                left, right = (
                    self.wgmma_operand(self.per_thread(at)[first], lines)[:, : 16 * k_steps]
                    for at, lines in ((a, 64), (b, n))
                )
                product = (left @ right.T).reshape(4, 2, 8, n // 8, 4, 2)  # warp, half, r, j, p, which
                values = product.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, 128)
                mine = acc[:, first : first + 128]
                mine[...] = values + (mine if scale_d else 0)

        return wgmma

    # epilogue.py

    def make_add_bias(self, n: int, dtype: str) -> Callable[..., None]:
        def add_bias(acc: Array, bias: Any, col: Any, num_cols: int) -> None:
            bias, col = self.per_thread(bias), self.per_thread(col)
            for j in range(n // 8):
                for t in np.flatnonzero(col + 8 * j < num_cols):
                    pair = to_float(self.memory.bytes_at(bias[t] + 16 * j, 4).view(np.uint16))
                    acc[4 * j : 4 * j + 4, t] += [*pair, *pair]

        return add_bias

    def make_store_rows(self, n: int, dtype: str) -> Callable[..., None]:
        def store_rows(
            acc: Array, out: Any, row_bytes: int, col: Any, num_cols: int, low: Any, high: Any
        ) -> None:
            out, col = self.per_thread(out), self.per_thread(col)
            values = to_bits(acc) if dtype == "bfloat16" else acc
            item = values.itemsize
            for j in range(n // 8):
                for half, may in ((0, low), (1, high)):
                    for t in np.flatnonzero((col + 8 * j < num_cols) & (self.per_thread(may) != 0)):
                        pair = np.ascontiguousarray(values[4 * j + 2 * half : 4 * j + 2 * half + 2, t])
                        at = out[t] + 8 * half * row_bytes + 8 * j * item
                        self.memory.bytes_at(at, 2 * item)[:] = pair.view(np.uint8)

        return store_rows

    def make_add_rows(self, n: int, dtype: str) -> Callable[..., None]:
        def add_rows(
            acc: Array, residual: Any, row_bytes: int, col: Any, num_cols: int, low: Any, high: Any
        ) -> None:
            residual, col = self.per_thread(residual), self.per_thread(col)
            for j in range(n // 8):
                for half, may in ((0, low), (1, high)):
                    mine = slice(4 * j + 2 * half, 4 * j + 2 * half + 2)
                    for t in np.flatnonzero((col + 8 * j < num_cols) & (self.per_thread(may) != 0)):
                        at = residual[t] + 8 * half * row_bytes + 16 * j
                        more = to_float(self.memory.bytes_at(at, 4).view(np.uint16))
                        acc[mine, t] = more + to_float(to_bits(acc[mine, t]))

        return add_rows


def run(
    source: str, factory: str, specialised: Sequence[Any], arguments: Sequence[Any], grid: int, threads: int,
    smem: int, memory: Memory, maps: Mapping[int, Any] | None = None,
) -> None:  # fmt: skip
    """Run all blocks of a kernel, one after another.

    source: its module's text, in which what the kernel imports is replaced by this file's; factory,
    specialised: the function there that makes the kernel, and its arguments; arguments: the kernel's own,
    addresses in `memory` or keys of `maps`: {key: (uint16 matrix, box)}. Raises IndexError for an access
    outside an array, RuntimeError where a GPU would hang.
    """
    for index in range(grid):
        block = Block(memory, maps or {}, index, threads, smem)
        module: dict[str, Any] = {"__name__": "kernel_in_numpy"}
        exec(compile(source, "kernel_in_numpy", "exec"), module)
        module.update(
            {name: getattr(block, name) for name in dir(block) if name in module and name[0] != "_"}
        )
        module["jit"] = lambda **_: lambda function: function
        module[factory](*specialised)(*arguments)
