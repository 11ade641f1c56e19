"""A block whose threads go their own ways, one at a time, in Python: runs the text of a CUDA-core kernel with
branches, shared arrays, atomics and shuffles, without a GPU.

Each CUDA thread is a Python thread on simt.py's device memory; where it waits (a barrier of the block, an
exchange in its warp), another one whose wait is over goes on, chosen at random. So a seed is an order of
events: what depends on the order of threads or of atomics shows under another seed. Threads that meet at
different barriers, or lanes at different exchanges, are an error. Blocks run one after another, in an order
that the seed chooses too. Knows: the instructions of ops/sample. Refuses to know: memory order (each access
is seen at once), integer overflow of the compiler's types beyond numpy's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from kernels_numba.simt import Array, Memory
from kernels_numba.simt_turns import Turns
from kernels_numba.simt_warps import link

WARP = 32


class Meeting:
    """Where `count` threads wait for one another and see what each brought."""

    def __init__(self, count: int) -> None:
        self.count, self.arrived, self.met = count, 0, 0
        self.what = ""
        self.brought: list[Any] = [None] * count
        self.seen: list[Any] = [None] * count


class ThreadBlock:
    """The instructions of the thread whose turn it is."""

    def __init__(self, memory: Memory, threads: int, grid: int, rng: np.random.Generator) -> None:
        self.memory, self.threads, self.rng = memory, threads, rng
        self.cuda = SimpleNamespace(
            threadIdx=SimpleNamespace(x=0), blockIdx=SimpleNamespace(x=0), gridDim=SimpleNamespace(x=grid),
            shared=SimpleNamespace(array=self.shared_array), local=SimpleNamespace(array=self.local_array),
            atomic=SimpleNamespace(add=self.atomic_add), syncthreads=self.syncthreads,
        )  # fmt: skip
        self.begin(0)

    def begin(self, block: int) -> None:
        """A fresh block: shared memory holds what nobody would expect."""
        self.turns = Turns(self.threads, self.rng)
        self.barrier = Meeting(self.threads)
        self.warps = [Meeting(WARP) for _ in range(self.threads // WARP)]
        self.arrays: list[Array] = []
        self.taken = [0] * self.threads
        self.cuda.blockIdx.x = block

    def body(self, kernel: Callable[..., None], arguments: Sequence[Any], thread: int) -> Callable[[], None]:
        def run() -> None:
            self.cuda.threadIdx.x = thread
            kernel(*arguments)

        return run

    def meet(self, meeting: Meeting, place: int, value: Any, what: str) -> list[Any]:
        """What all brought, once all are there."""
        thread, mine = self.cuda.threadIdx.x, meeting.met
        if meeting.arrived and meeting.what != what:
            raise RuntimeError(f"thread {thread} is at {what}, others are at {meeting.what}")
        meeting.what, meeting.brought[place] = what, value
        meeting.arrived += 1
        if meeting.arrived == meeting.count:
            meeting.seen, meeting.brought = meeting.brought, [None] * meeting.count
            meeting.arrived, meeting.met = 0, mine + 1
        self.turns.wait(thread, lambda: meeting.met != mine, what)
        self.cuda.threadIdx.x = thread
        return meeting.seen

    def exchange(self, value: Any, what: str) -> list[Any]:
        thread = self.cuda.threadIdx.x
        return self.meet(self.warps[thread // WARP], thread % WARP, value, what)

    # numba's own

    def syncthreads(self) -> None:
        self.meet(self.barrier, self.cuda.threadIdx.x, None, "syncthreads")

    def shared_array(self, length: int, dtype: Any) -> Array:
        """The block's next array: all threads name theirs in the same order."""
        thread = self.cuda.threadIdx.x
        number, self.taken[thread] = self.taken[thread], self.taken[thread] + 1
        if number == len(self.arrays):
            noise = self.rng.integers(0, 256, length * np.dtype(dtype).itemsize, dtype=np.uint8)
            self.arrays.append(noise.view(dtype))
        array: Array = self.arrays[number]
        if (len(array), array.dtype) != (length, np.dtype(dtype)):
            raise RuntimeError(f"shared array {number} is {dtype}[{length}] here, {array.dtype} elsewhere")
        return array

    @staticmethod
    def local_array(length: int, dtype: Any) -> Array:
        held: Array = np.full(length, 77, dtype)
        return held

    @staticmethod
    def atomic_add(array: Array, index: Any, value: Any) -> Any:
        if not 0 <= index < len(array):
            raise IndexError(f"atomic add at {index} of {len(array)}")
        before = array[index]
        with np.errstate(over="raise"):
            array[index] = before + array.dtype.type(value)
        return before

    # ldst.py, vector.py

    def at(self, address: Any, count: int) -> Array:
        if int(address) % count:
            raise IndexError(f"{count} bytes at {int(address):#x}: no multiple of {count}")
        return self.memory.bytes_at(address, count)

    def ld_global_i32(self, address: Any) -> Any:
        return self.at(address, 4).view(np.int32)[0]

    def ld_global_nc_v4(self, out: Array, address: Any) -> None:
        out[:4] = self.at(address, 16).view(out.dtype)

    def st_global_b32(self, address: Any, value: Any) -> None:
        self.at(address, 4).view(np.uint32)[0] = int(value) & 0xFFFFFFFF

    def st_global_f32(self, address: Any, value: Any) -> None:
        self.at(address, 4).view(np.float32)[0] = value

    # atomics.py, reduce.py, shuffle.py

    def atom_add_i32(self, address: Any, value: Any) -> Any:
        word = self.at(address, 4).view(np.int32)
        before = word[0]
        word[0] = int(before) + int(value)
        return before

    atom_add_acq_rel_i32 = red_add_i32 = atom_add_i32

    def red_add_i64(self, address: Any, value: Any) -> None:
        word = self.at(address, 8).view(np.int64)
        word[0] = int(word[0]) + int(value)

    def ballot(self, condition: Any) -> Any:
        bits = sum(1 << lane for lane, one in enumerate(self.exchange(condition, "ballot")) if one)
        return np.array(bits, np.uint32).view(np.int32)[()]

    @staticmethod
    def popc(bits: Any) -> Any:
        return np.int32((int(bits) & 0xFFFFFFFF).bit_count())

    def shfl_xor_f32(self, x: Any, mask: Any) -> Any:
        lane = self.cuda.threadIdx.x % WARP
        return self.exchange(np.float32(x), f"shfl_xor_f32 {mask}")[lane ^ int(mask)]

    def shfl_xor_i32(self, x: Any, mask: Any) -> Any:
        lane = self.cuda.threadIdx.x % WARP
        return self.exchange(np.int32(x), f"shfl_xor_i32 {mask}")[lane ^ int(mask)]


def run(
    names: Sequence[str], factory: str, specialised: Sequence[Any], arguments: Sequence[Any], grid: int,
    threads: int, memory: Memory, seed: int = 0, change: Callable[[str, str], str] = lambda name, text: text,
) -> None:  # fmt: skip
    """Run all blocks of a kernel; arguments as in simt_warps.run. IndexError for an access outside an array,
    Stuck where all threads wait, RuntimeError where they wait for different things."""
    rng = np.random.default_rng(seed)
    block = ThreadBlock(memory, threads, grid, rng)
    kernel = link(block, names, change)[factory](*specialised)
    for index in rng.permutation(grid).tolist():
        block.begin(index)
        block.turns.run([block.body(kernel, arguments, thread) for thread in range(threads)])
        if block.barrier.arrived or any(warp.arrived for warp in block.warps):
            raise RuntimeError("threads ended while others waited")
