"""Clusters on simt_warps.py: the warps of all blocks of a cluster take turns with one another, and write to
each other's shared memory.

Asynchronous stores land at once or when somebody waits for them, the earliest and the latest that there is,
by chance. Knows: the instructions of ops/decode_attention/cluster.py. Refuses to know: what simt_warps.py
refuses to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kernels_numba.layouts import swizzled_image
from kernels_numba.simt import SMEM_START, Array, Memory, lanes
from kernels_numba.simt_turns import Turns
from kernels_numba.simt_warps import WARP, Shared, Warp, link

STEP = 1 << 24  # from a shared address to the same one of the cluster's next block; block 0's is at STEP


class Peer(Shared):
    """A block of a cluster: its rank, all blocks, and (arrivals, phase) of the cluster's barrier."""

    rank: int
    peers: list[Peer]
    together: list[int]


def make_peers(blocks: int, warps: int, smem: int, rng: np.random.Generator) -> list[Peer]:
    """The blocks of one cluster."""
    peers = [Peer(warps, smem, rng) for _ in range(blocks)]
    turns, together = Turns(warps * blocks, rng), [0, 0]
    for rank, one in enumerate(peers):
        one.turns, one.rank, one.peers, one.together = turns, rank, peers, together
    return peers


class ClusterWarp(Warp):
    """The instructions of one warp of a cluster."""

    both: Peer

    def wait_for(self, over: Callable[[], bool], what: str) -> None:
        name = f"{what} of block {self.both.rank}"
        self.both.turns.wait(self.both.rank * self.both.warps + self.warp, over, name)

    # cluster.py, distributed.py

    def cluster_rank(self) -> int:
        return self.both.rank

    def cluster_address(self, address: Any, rank: Any) -> Any:
        return address + lanes((self.per_thread(rank) + 1) * STEP)

    def cluster_arrive_relaxed(self) -> None:
        arrived = self.both.together
        self.phase = arrived[1]
        arrived[0] += 1
        if arrived[0] == self.both.warps * len(self.both.peers):
            arrived[:] = [0, arrived[1] + 1]

    def cluster_wait(self) -> None:
        self.wait_for(lambda: self.both.together[1] != self.phase, "the cluster's barrier")

    def cluster_sync(self) -> None:
        self.cluster_arrive_relaxed()
        self.cluster_wait()

    def _store_async(self, address: Any, words: Sequence[Array], bar: Any) -> None:
        values = np.ascontiguousarray(np.stack([self.per_thread(word) for word in words], axis=1))
        size, at_once = 4 * values.shape[1], bool(self.both.turns.rng.integers(2))
        places = zip(self.per_thread(address).tolist(), self.per_thread(bar).tolist(), strict=True)
        for lane, (at, on) in enumerate(places):
            (rank, offset), (other, bar_at) = divmod(int(at), STEP), divmod(int(on), STEP)
            first, peer = offset - SMEM_START, self.both.peers[rank - 1]
            if rank != other or first < 0 or first + size > peer.smem.size or first % size:
                raise IndexError(
                    f"{size} bytes at shared offset {first} of block {rank - 1}, for {other - 1}"
                )
            to, mine = peer.smem[first : first + size], values[lane].view(np.uint8)
            if at_once:
                to[:] = mine

            def land(to: Array = to, mine: Array = mine, done: bool = at_once) -> int:
                if not done:
                    to[:] = mine
                return int(mine.size)

            peer.barriers[bar_at].flying.append(land)

    def st_async_f32(self, address: Any, value: Any, bar: Any) -> None:
        self._store_async(address, [self.f32(value)], bar)

    def st_async_v2_f32(self, address: Any, first: Any, second: Any, bar: Any) -> None:
        self._store_async(address, [self.f32(first), self.f32(second)], bar)

    def st_async_v4(self, address: Any, values: Array, bar: Any) -> None:
        self._store_async(address, list(values[:4]), bar)

    def ld_shared_f32(self, address: Any) -> Array:
        words = [self.words_at(at, 1)[0] for at in self.per_thread(address).tolist()]
        return np.array(words, np.int32).view(np.float32)

    # mbarrier.py, tma.py

    def mbarrier_arrive_remote(self, bar: Any, rank: Any) -> None:
        """Lanes whose rank no block has are those that the branch around it masks off."""
        for number in np.unique(self.per_thread(rank)).tolist():
            if number < len(self.both.peers):
                self.both.peers[number].barriers[self.one(bar)].arrive()

    def tma_load_2d_multicast(self, dst: Any, tensor_map: int, bar: Any, x: Any, y: Any, mask: Any) -> None:
        """A box within its tensor, in swizzled lines; it lands in each block when that one waits for it."""
        matrix, (rows, cols) = self.maps[self.one(tensor_map)]
        y, x = self.one(y), self.one(x)
        if y < 0 or y + rows > len(matrix):
            raise IndexError(f"a box of rows {y} to {y + rows}, of {len(matrix)}")
        first = self.one(dst) - SMEM_START
        before = first // 128 % 8  # lines: the swizzle goes by the address
        box = np.zeros((before + rows, cols), matrix.dtype)
        part = matrix[y : y + rows, x : x + cols]
        box[before:, : part.shape[1]] = part
        image = swizzled_image(box)[128 * before :]
        for number, peer in enumerate(self.both.peers):
            if self.one(mask) >> number & 1:

                def land(smem: Array = peer.smem) -> int:
                    smem[first : first + image.size] = image
                    return int(image.size)

                peer.barriers[self.one(bar)].flying.append(land)

    def tma_load_2d(self, dst: Any, tensor_map: int, bar: Any, x: Any, y: Any) -> None:
        """Boxes with rows of 128 bytes are swizzled, narrower ones are not."""
        matrix, (rows, cols) = self.maps[self.one(tensor_map)]
        at, y, x = self.one(dst), self.one(y), self.one(x)

        def land() -> int:
            box = np.ascontiguousarray(matrix[y : y + rows, x : x + cols])
            image = swizzled_image(box) if box[0].nbytes == 128 else box.view(np.uint8).reshape(-1)
            self.shared(at, image.size)[:] = image
            return int(image.size)

        self.both.barriers[self.one(bar)].flying.append(land)


def run(
    names: Sequence[str], factory: str, specialised: Sequence[Any], arguments: Sequence[Any], grid: int,
    threads: int, smem: int, memory: Memory, maps: Mapping[int, Any], cluster: int, seed: int = 0,
    change: Callable[[str, str], str] = lambda name, text: text, kind: type[ClusterWarp] = ClusterWarp,
) -> None:  # fmt: skip
    """Run all blocks of a kernel, one cluster of `cluster` blocks after another; the rest as in
    simt_warps.run."""
    rng = np.random.default_rng(seed)
    for first in range(0, grid, cluster):
        peers, bodies = make_peers(cluster, threads // WARP, smem, rng), []
        for one in peers:
            for number in range(one.warps):
                warp = kind(one, memory, maps, first + one.rank, grid, number)
                kernel = link(warp, names, change)[factory](*specialised)
                bodies.append(lambda kernel=kernel: kernel(*arguments))
        peers[0].turns.run(bodies)
