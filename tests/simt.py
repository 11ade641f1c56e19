"""A block of threads in numpy, in lockstep: runs a tensor-core kernel's Python function without a GPU.

A value that differs between threads is an array of one number a thread; shared memory is bytes, device arrays
are views into one address space in which any access outside an array fails. Warp and warpgroup instructions
act on all warps of the block at once, by the layouts of the PTX ISA as ptx/mma.py, matrix.py and epilogue.py
give them. Copies in flight land when they are waited for and not before, so a missing wait shows. Refuses to
know: races between threads (lockstep has none), time, and whether ptxas likes any of it.

"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

POISON = 0xFF  # bytes of unwritten shared memory: NaN in bfloat16 and float32 alike
SMEM_START = 4096  # not 0, so that an offset cannot pass for an address


class Lanes(np.ndarray):
    """One number a thread. As a condition: true if it is for any thread (`if thread == 0:` runs once)."""

    def __bool__(self):
        return bool(np.asarray(self).any())


def lanes(values):
    return np.asarray(values, np.int64).view(Lanes)


def to_float(bits):
    return (np.asarray(bits, np.uint32) << 16).astype(np.uint32).view(np.float32)


def to_bits(values):
    import ml_dtypes

    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


class Memory:
    """Device arrays by address. Reads and writes take addresses a thread, inside the array or not at all."""

    def __init__(self):
        self.arrays = []
        self.next = 1 << 20

    def put(self, array):
        """The address of an array (a multiple of 1024, far from all others)."""
        start = self.next
        self.next += (array.nbytes + (1 << 20)) & -1024
        self.arrays.append((start, array.reshape(-1).view(np.uint8)))
        return start

    def bytes_at(self, address, count):
        for start, array in self.arrays:
            if start <= address and address + count <= start + array.size:
                return array[address - start : address - start + count]
        raise IndexError(f"{count} bytes at {address:#x} lie outside every array")


class Block:
    """The instructions that kernels import, bound to one block's shared memory."""

    def __init__(self, memory, maps, index, threads, smem):
        self.memory, self.maps, self.threads = memory, maps, threads
        self.smem = np.full(smem, POISON, np.uint8)
        self.groups, self.open = [], []
        self.barriers, self.expected, self.waits = {}, {}, {}
        types = SimpleNamespace(int32=self.integer, int64=self.integer, uint32=self.integer)
        self.cuda = SimpleNamespace(
            threadIdx=SimpleNamespace(x=lanes(np.arange(threads))), blockIdx=SimpleNamespace(x=index),
            types=types, syncthreads=lambda: None,
            local=SimpleNamespace(array=lambda n, dtype: np.full((n, threads), 77, dtype)),
        )  # fmt: skip

    @staticmethod
    def integer(value):
        return lanes(value) if isinstance(value, np.ndarray) else int(value)

    def per_thread(self, value):
        return np.broadcast_to(np.asarray(value), self.threads)

    def shared(self, address, count):
        at = int(address) - SMEM_START
        assert at >= 0, f"shared address {address} below the block's"
        assert at + count <= self.smem.size, f"shared address {address} + {count} past the block's"
        assert at % 16 == 0, f"shared address {address} is not aligned"
        return self.smem[at : at + count]

    # control, cp_async
    def dynamic_shared(self):
        return SMEM_START

    def warp_uniform(self, value):
        return lanes(np.repeat(self.per_thread(value)[::32], 32))

    def cp_async_16_zfill(self, dst, src, valid):
        triples = zip(*(self.per_thread(v) for v in (dst, src, valid)), strict=True)
        self.open += [(int(d), int(s), int(v)) for d, s, v in triples]

    def cp_async_commit(self):
        self.groups.append(self.open)
        self.open = []

    def cp_async_wait(self, pending):
        while len(self.groups) > pending:
            for dst, src, valid in self.groups.pop(0):
                assert src % 16 == 0, "a source of cp.async that is not aligned"
                unit = self.shared(dst, 16)
                unit[:] = 0
                if valid:
                    unit[:valid] = self.memory.bytes_at(src, valid)

    # matrix, mma
    def ldmatrix_x4(self, out, address):
        rows = np.stack([self.shared(a, 16) for a in self.per_thread(address)])
        pairs = rows.view(np.uint32).reshape(-1, 4, 8, 4)  # warp, matrix, row, pair of elements
        for i in range(4):
            out[i] = pairs[:, i].reshape(-1).view(np.int32)

    def mma_m16n8k16_at(self, acc, acc_at, a, a_at, b, b_at):
        def pairs(registers):  # i32[threads] -> float32[warp, r, 4 pairs, 2]
            bits = np.ascontiguousarray(registers).view(np.uint16).reshape(-1, 8, 4, 2)
            return to_float(bits).reshape(-1, 8, 8)

        a_ = [pairs(a[a_at + i]) for i in range(4)]
        left = np.concatenate([np.concatenate(a_[0::2], 2), np.concatenate(a_[1::2], 2)], 1)
        right = np.concatenate([pairs(b[b_at + i]) for i in range(2)], 2)
        product = np.einsum("wmk,wnk->wmn", left, right)  # [warp, 16, 8]
        held = product.reshape(-1, 2, 8, 4, 2)  # half of 16 rows, r, pair, which
        for half in range(2):
            for which in range(2):
                acc[acc_at + 2 * half + which] += held[:, half, :, :, which].reshape(-1)

    # mbarrier, tma, wgmma
    def mbarrier_init(self, bar, count):
        assert count == 1, "one thread asks for a tile"
        self.barriers[int(bar)] = []  # copies in flight: (where to, bytes)
        self.expected[int(bar)] = self.waits[int(bar)] = 0

    def fence_mbarrier_init(self):
        pass

    def mbarrier_expect_tx(self, bar, size):
        assert not self.barriers[int(bar)], "a phase begins before the one before was waited for"
        self.expected[int(bar)] += size

    def tma_load_2d(self, dst, tensor_map, bar, x, y):
        matrix, (rows, cols) = self.maps[int(tensor_map)]
        box = np.zeros((rows, cols), np.uint16)
        part = matrix[int(y) : int(y) + rows, int(x) : int(x) + cols]
        box[: part.shape[0], : part.shape[1]] = part
        self.barriers[int(bar)].append((int(dst), swizzle(box.view(np.uint8))))

    def mbarrier_wait(self, bar, phase):
        bar = int(bar)
        assert self.waits[bar] % 2 == phase, "waits for the wrong phase"
        self.waits[bar] += 1
        landed = 0
        for dst, image in self.barriers[bar]:
            self.shared(dst, image.size)[:] = image
            landed += image.size
        assert landed == self.expected[bar] > 0, f"{landed} bytes arrive, {self.expected[bar]} are expected"
        self.barriers[bar], self.expected[bar] = [], 0

    def descriptor_k_major(self, address):
        return address

    def make_wgmma(self, n, k_steps, dtype, wait):
        assert (dtype, wait) == ("bfloat16", 0)

        def wgmma(acc, a, b, scale_d):
            for group in range(self.threads // 128):
                mine = slice(128 * group, 128 * group + 128)
                first = 128 * group
                sides = [
                    to_float(swizzle(self.shared(self.per_thread(at)[first], lines * 128)).view(np.uint16))
                    for at, lines in ((a, 64), (b, n))
                ]
                left, right = (side.reshape(-1, 64)[:, : 16 * k_steps] for side in sides)
                product = (left @ right.T).reshape(4, 2, 8, n // 8, 4, 2)  # warp, half, r, j, pair, which
                for j in range(n // 8):
                    for half in range(2):
                        for which in range(2):
                            value = product[:, half, :, j, :, which].reshape(-1)
                            at = 4 * j + 2 * half + which
                            acc[at, mine] = value + (acc[at, mine] if scale_d else 0)

        return wgmma

    # epilogue
    def make_add_bias(self, n, dtype):
        def add_bias(acc, bias, col, num_cols):
            bias, col = self.per_thread(bias), self.per_thread(col)
            for j in range(n // 8):
                for t in np.flatnonzero(col + 8 * j < num_cols):
                    pair = to_float(self.memory.bytes_at(bias[t] + 16 * j, 4).view(np.uint16))
                    acc[4 * j : 4 * j + 4, t] += [*pair, *pair]

        return add_bias

    def make_store_rows(self, n, dtype):
        item = 2 if dtype == "bfloat16" else 4

        def store_rows(acc, out, row_bytes, col, num_cols, low, high):
            out, col = self.per_thread(out), self.per_thread(col)
            values = to_bits(acc) if item == 2 else acc
            for j in range(n // 8):
                for below, may in ((0, low), (1, high)):
                    for t in np.flatnonzero((col + 8 * j < num_cols) & (self.per_thread(may) != 0)):
                        pair = values[4 * j + 2 * below : 4 * j + 2 * below + 2, t]
                        at = out[t] + 8 * below * row_bytes + 8 * j * item
                        self.memory.bytes_at(at, 2 * item)[:] = np.ascontiguousarray(pair).view(np.uint8)

        return store_rows


def swizzle(image):
    """Bytes with the 16-byte units of each 128-byte row r exchanged: u -> u ^ (r % 8); its own inverse."""
    flat = np.ascontiguousarray(image).reshape(-1, 16)
    at = np.arange(len(flat))
    return flat[at ^ ((at >> 3) & 7)].reshape(-1)


def run(source, factory, factory_arguments, arguments, grid, threads, smem, memory, maps=None):
    """Run every block of a kernel. source: the text of its module, in which the factory's imports are
    replaced; arguments: the kernel's own, addresses of `memory` or keys of `maps` (matrix, box)."""
    for index in range(grid):
        block = Block(memory, maps or {}, index, threads, smem)
        names = {name: getattr(block, name) for name in dir(block) if not name.startswith("_")}
        module = {"__name__": "kernel_in_numpy"}
        exec(compile(source, "kernel_in_numpy", "exec"), module)
        module.update({name: value for name, value in names.items() if name in module})
        module["jit"] = lambda **_: lambda function: function
        module[factory](*factory_arguments)(*arguments)
