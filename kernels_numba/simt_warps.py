"""A block whose warps go their own ways, in numpy: runs a warp-specialised kernel's own Python text without a
GPU.

Each warp is a Python thread of its own on simt.py's instructions, and only one runs at a time; where it waits
(for an mbarrier, a named barrier), another one whose wait is over goes on, chosen at random. So a seed is an
order of events, and the same seed gives the same one. Copies land when somebody waits for them and not
before. If all wait, it says who waits for what. Blocks run one after another. Knows: the instructions of
ops/decode_attention. Refuses to know: what simt.py refuses to; memory order (each access is seen at once).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from kernels_numba.layouts import swizzled_image
from kernels_numba.simt import SMEM_START, Array, Block, Memory, lanes, to_bits
from kernels_numba.simt_turns import Barrier, Turns

WARP = 32


class Shared:
    """What the warps of a block have in common."""

    def __init__(self, warps: int, smem: int, rng: np.random.Generator) -> None:
        self.warps, self.turns = warps, Turns(warps, rng)
        self.smem = np.full(smem, 0xFF, np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.named: dict[int, list[int]] = {}
        self.clock = 0  # goes on where it is read


class Warp(Block):
    """The instructions of one warp. Numbers that differ between its lanes are arrays of 32."""

    def __init__(
        self, shared: Shared, memory: Memory, maps: Mapping[int, Any], index: int, grid: int, warp: int
    ) -> None:
        super().__init__(memory, maps, index, WARP, 0)
        self.both, self.warp, self.smem = shared, warp, shared.smem
        self.cuda.threadIdx = SimpleNamespace(x=lanes(np.arange(WARP) + WARP * warp))
        self.cuda.gridDim = SimpleNamespace(x=grid)
        self.cuda.types.uint32 = self.integer
        self.cuda.syncthreads = lambda: self.named_barrier_sync(0, WARP * shared.warps)
        self.cuda.syncwarp = lambda: None

    @staticmethod
    def one(value: Any) -> int:
        """A number that is the same in all lanes."""
        values = np.unique(np.asarray(value))
        if values.size != 1:
            raise RuntimeError(f"lanes disagree: {values}")
        return int(values[0])

    def wait_for(self, over: Callable[[], bool], what: str) -> None:
        self.both.turns.wait(self.warp, over, what)

    # arith.py, atomics.py, shuffle.py

    def f32(self, value: Any) -> Array:
        return np.asarray(value, np.float32)

    def ex2_f32(self, x: Any) -> Array:
        return self.f32(np.exp2(self.f32(x).astype(np.float64)))

    def lg2_f32(self, x: Any) -> Array:
        with np.errstate(divide="ignore"):
            return np.log2(self.f32(x).astype(np.float64)).astype(np.float32)

    def fma_f32(self, x: Any, y: Any, z: Any) -> Array:
        x, y, z = (self.f32(v).astype(np.float64) for v in (x, y, z))
        return self.f32(x * y + z)

    def mul_f32(self, x: Any, y: Any) -> Array:
        return self.f32(x) * self.f32(y)

    def add_f32(self, x: Any, y: Any) -> Array:
        return self.f32(x) + self.f32(y)

    def bits_f32(self, x: Any) -> Any:
        return lanes(self.per_thread(self.f32(x)).view(np.int32))

    def max_f32(self, x: Any, y: Any) -> Array:
        return np.fmax(self.f32(x), self.f32(y))

    def divide_f32(self, x: Any, y: Any) -> Array:
        with np.errstate(divide="ignore"):
            return self.f32(x) / self.f32(y)

    def select_f32(self, condition: Any, x: Any, y: Any) -> Array:
        return np.where(np.asarray(condition) != 0, self.f32(x), self.f32(y)).astype(np.float32)

    def select_i32(self, condition: Any, x: Any, y: Any) -> Any:
        return lanes(np.where(np.asarray(condition) != 0, x, y))

    def atom_add_i32(self, address: Any, value: int) -> int:
        word = self.memory.bytes_at(self.one(address), 4).view(np.int32)
        before = int(word[0])
        word[0] += value
        return before

    atom_add_acq_rel_i32 = atom_add_i32

    def ballot(self, condition: Any) -> int:
        return int(sum(1 << lane for lane in np.flatnonzero(self.per_thread(condition) != 0).tolist()))

    def popc(self, bits: int) -> int:
        return int(bits).bit_count()

    def shfl_xor_f32(self, x: Any, mask: int) -> Array:
        return self.f32(self.per_thread(x)[np.arange(WARP) ^ mask])

    def shfl_idx_i32(self, x: Any, source: Any) -> Any:
        return self.one(self.per_thread(x)[self.per_thread(source) & 31])

    def shfl_up_i32(self, x: Any, delta: int) -> Any:
        return lanes(self.per_thread(x)[np.maximum(np.arange(WARP) - delta, np.arange(WARP) % delta)])

    # ldst.py, vector.py, predicated.py, matrix.py, mma.py

    def load(self, address: Any, count: int) -> Array:
        rows = [self.memory.bytes_at(at, count) for at in self.per_thread(address).tolist()]
        return np.stack(rows).view(np.int32)

    def ld_global_i32(self, address: Any) -> Any:
        return lanes(self.load(address, 4)[:, 0])

    def _fill(self, out: Array, words: Array) -> None:
        for i in range(words.shape[1]):
            out[i] = words[:, i].view(out.dtype)

    def ld_global_v2(self, out: Array, address: Any) -> None:
        self._fill(out, np.ascontiguousarray(self.load(address, 8)))

    def ld_global_v4(self, out: Array, address: Any) -> None:
        self._fill(out, self.load(address, 16))

    ld_relaxed_v2, ld_relaxed_v4 = ld_global_v2, ld_global_v4

    def _store(self, condition: Any, address: Any, words: Sequence[Array]) -> None:
        address, values = self.per_thread(address), np.stack([self.per_thread(word) for word in words])
        for lane in np.flatnonzero(self.per_thread(condition) != 0):
            mine = np.ascontiguousarray(values[:, lane]).view(np.uint8)
            self.memory.bytes_at(address[lane], mine.size)[:] = mine

    def st_global_b32(self, address: Any, value: Any) -> None:
        self._store(1, address, [np.asarray(value, np.int32)])

    def st_global_b32_if(self, condition: Any, address: Any, value: Any) -> None:
        self._store(condition, address, [np.asarray(value, np.int32)])

    def st_global_f32_if(self, condition: Any, address: Any, value: Any) -> None:
        self._store(condition, address, [self.f32(value)])

    def st_global_v2_f32_if(self, condition: Any, address: Any, first: Any, second: Any) -> None:
        self._store(condition, address, [self.f32(first), self.f32(second)])

    st_relaxed_v2_f32_if = st_global_v2_f32_if

    def st_global_v4_if(self, condition: Any, address: Any, values: Array) -> None:
        self._store(condition, address, list(values[:4]))

    def words_at(self, address: int, count: int) -> Array:
        at = int(address) - SMEM_START
        if at < 0 or at + 4 * count > self.smem.size or at % (4 * count):
            raise IndexError(f"{4 * count} bytes at shared offset {at}; there are {self.smem.size}")
        return self.smem[at : at + 4 * count].view(np.int32)

    def ld_shared_b32(self, address: Any) -> int:
        return int(self.words_at(self.one(address), 1)[0])

    def st_shared_b32(self, address: Any, value: Any) -> None:
        places = set(zip(self.per_thread(address).tolist(), self.per_thread(value).tolist(), strict=True))
        if len({at for at, _ in places}) != len(places):
            raise RuntimeError("lanes store different words to one address")
        for at, word in places:
            self.words_at(at, 1)[0] = word

    def ld_shared_f32(self, address: Any) -> Array:
        words = [self.words_at(at, 1)[0] for at in self.per_thread(address).tolist()]
        return np.array(words, np.int32).view(np.float32)

    def ld_shared_v4(self, out: Array, address: Any) -> None:
        self._fill(out, np.stack([self.words_at(at, 4) for at in self.per_thread(address).tolist()]))

    def st_shared_v4(self, address: Any, values: Array) -> None:
        for lane, at in enumerate(self.per_thread(address).tolist()):
            self.words_at(at, 4)[:] = values[:4, lane].view(np.int32)

    def st_shared_f32_if(self, condition: Any, address: Any, value: Any) -> None:
        address, value = self.per_thread(address), self.per_thread(self.f32(value))
        for lane in np.flatnonzero(self.per_thread(condition) != 0):
            self.words_at(address[lane], 1).view(np.float32)[0] = value[lane]

    def st_shared_zero_16_if(self, condition: Any, address: Any) -> None:
        address = self.per_thread(address)
        for lane in np.flatnonzero(self.per_thread(condition) != 0):
            self.words_at(address[lane], 4)[:] = 0

    def ldmatrix_x4_trans(self, out: Array, address: Any) -> None:
        rows = (
            np.stack([self.shared(a, 16) for a in self.per_thread(address)]).view(np.uint16).reshape(4, 8, 8)
        )
        for i in range(4):
            out[i] = np.ascontiguousarray(rows[i].T).view(np.int32).reshape(-1)

    def pack_bf16(self, low: Any, high: Any) -> Array:
        pair = np.stack([np.broadcast_to(to_bits(x), WARP) for x in (low, high)], axis=1)
        return np.ascontiguousarray(pair).view(np.int32)[:, 0]

    # mbarrier.py, mbarrier_poll.py, debug.py, named_barrier.py, tma.py, cp_async.py, and what has no part
    # here

    def mbarrier_init(self, bar: Any, count: int) -> None:
        self.both.barriers[self.one(bar)] = Barrier(count)

    def mbarrier_arrive(self, bar: Any) -> None:
        self.both.barriers[self.one(bar)].arrive()

    def mbarrier_expect_tx(self, bar: Any, size: int) -> None:
        barrier = self.both.barriers[self.one(bar)]
        barrier.bytes += size
        barrier.arrive()

    def mbarrier_poll(self, bar: Any, parity: Any) -> None:
        at, parity = self.one(bar), self.one(parity)
        self.wait_for(lambda: self.both.barriers[at].ended(parity), f"the barrier at {at - SMEM_START}")

    def make_mbarrier_wait(self, name: str, debug: bool = False) -> Callable[..., None]:
        def wait(bar: Any, parity: Any) -> None:
            at, phase = self.one(bar), self.one(parity)
            self.wait_for(lambda: self.both.barriers[at].ended(phase), name)

        return wait

    def named_barrier_sync(self, name: int, threads: int) -> None:
        arrived = self.both.named.setdefault(name, [0, 0])
        arrived[0] += WARP
        mine = arrived[1]
        if arrived[0] == threads:
            arrived[:] = [0, mine + 1]
        self.wait_for(lambda: arrived[1] != mine, f"named barrier {name}")

    def policy_evict_first(self) -> int:
        return 0

    def tma_load_2d_hint(self, dst: Any, tensor_map: int, bar: Any, x: Any, y: Any, policy: Any) -> None:
        matrix, (rows, cols) = self.maps[self.one(tensor_map)]
        at, y, x = self.one(dst), self.one(y), self.one(x)

        def land() -> int:
            image = swizzled_image(matrix[y : y + rows, x : x + cols])
            self.shared(at, image.size)[:] = image
            return int(image.size)

        self.both.barriers[self.one(bar)].flying.append(land)

    def cp_async_mbarrier_arrive(self, bar: Any) -> None:
        copies, self.open = self.open, []

        def land() -> int:
            self.groups.append(copies)
            self.cp_async_wait(0)
            return 0

        barrier = self.both.barriers[self.one(bar)]
        barrier.flying.append(land)
        barrier.arrive(WARP)

    def now_ns(self) -> int:
        self.both.clock += 1
        return self.both.clock

    def sm_id(self) -> int:
        return int(self.cuda.blockIdx.x)

    def make_stress(self, enabled: bool) -> Callable[[int], None]:
        return lambda place: None

    def griddep_wait(self) -> None:
        pass

    griddep_launch = fence_acq_rel_gpu = fence_proxy_async = griddep_wait

    def tma_prefetch_map(self, tensor_map: int) -> None:
        pass

    prefetch_l2 = nanosleep = tma_prefetch_map

    def trap(self) -> None:
        raise RuntimeError("trap")


def link(block: Any, names: Sequence[str], change: Callable[[str, str], str]) -> dict[str, Any]:
    """The last of some modules, all executed anew on a warp's instructions, each using those before it.

    change(name, text): the text to execute instead of a module's own."""
    known: dict[str, Any] = {}
    module: dict[str, Any] = {}
    for name in names:
        module = {"__name__": name}
        exec(compile(change(name, inspect.getsource(importlib.import_module(name))), name, "exec"), module)
        for word in list(module):
            if word[0] != "_" and hasattr(block, word):
                module[word] = getattr(block, word)
            elif word in known:
                module[word] = known[word]
        module["jit"] = lambda **_: lambda function: function
        known.update((word, value) for word, value in module.items() if word.startswith("make_"))
    return module


def run(
    names: Sequence[str], factory: str, specialised: Sequence[Any], arguments: Sequence[Any], grid: int,
    threads: int, smem: int, memory: Memory, maps: Mapping[int, Any], seed: int = 0,
    change: Callable[[str, str], str] = lambda name, text: text, kind: type[Warp] = Warp,
) -> None:  # fmt: skip
    """Run all blocks of a kernel, one after another, each warp in a thread.

    names: modules, the kernel's own last; kind: the warps' instructions; the rest as in simt.run. Raises
    IndexError for an access outside an array, Stuck where all warps wait."""
    rng = np.random.default_rng(seed)
    for index in range(grid):
        shared = Shared(threads // WARP, smem, rng)
        bodies = []
        for warp in range(shared.warps):
            one = kind(shared, memory, maps, index, grid, warp)
            kernel = link(one, names, change)[factory](*specialised)
            bodies.append(lambda kernel=kernel: kernel(*arguments))
        shared.turns.run(bodies)
