"""Sizes of the tensor-core decode kernel: chunks, stages, shared memory, kinds of builds.

Knows: bytes and counts. Refuses to know: the kernel. No choice made here shows in a bit of a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from kernels_numba.attention_contract import SPLIT, TILE
from kernels_numba.smem import SmemPlan

HEAD_DIMS = (64, 128)
BLOCK_SIZE = 64  # keys of a page: two are a tile
ROWS = 16  # of one tensor-core tile
MAX_GROUP = ROWS  # query heads of a kv head
MAX_TOKENS = 8  # query tokens of a sequence
ITEM = 2
WARP, CONSUMERS, FINISHERS = 32, 4, 3
THREADS = (CONSUMERS + 1 + FINISHERS) * WARP
BOX_COLUMNS = 64  # 128 bytes, the swizzle's width
BOX_BYTES = BLOCK_SIZE * BOX_COLUMNS * ITEM
TILE_CHUNKS = 2 * TILE // BLOCK_SIZE  # two pages of K, two of V
MAX_STAGES = 24
Feed = Literal["tma", "cp_async"]
RECORDS, RECORD_BYTES = 2, 32
# Of a block, by how many share an SM: on Hopper its 233,472 bytes, 1,024 of which go to the system for each;
# on sm_86, 89 and 120 a block gets 101,376 at most.
SMEM_LIMITS: dict[tuple[Feed, int], int] = {
    ("tma", 2): 115_712,
    ("tma", 1): 232_448,
    ("cp_async", 1): 101_376,
}
SPLITS = (256, 512, 1024, 2048)  # a warp holds the pages of one
SPLIT_TILES = SPLIT // TILE
CLUSTER_COLUMNS = 16  # of V, that a block of a cluster takes
CLUSTER_THREADS = 4 * WARP
CLUSTER_SMEM = 115_712  # two blocks an SM, as above
MUTANTS = ("", "scale", "mask", "page", "stale_tail", "wrong_phase", "lost_arrival")


@dataclass(frozen=True)
class DecodeConfig:
    """head_dim 64 or 128; feed: how pages come to shared memory; blocks: that share an SM, 1 or, fed by TMA,
    2. ValueError for others."""

    head_dim: int
    feed: Feed
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS or (self.feed, self.blocks) not in SMEM_LIMITS:
            raise ValueError(
                f"decode_attention: head_dim is {self.head_dim}, feed {self.feed!r} with "
                f"{self.blocks} blocks an SM; head_dim {' or '.join(map(str, HEAD_DIMS))}, "
                f"and (feed, blocks) {', '.join(map(str, SMEM_LIMITS))} are required"
            )

    @property
    def chunk_bytes(self) -> int:
        """A page of one head of K or V: what a stage holds."""
        return BLOCK_SIZE * self.head_dim * ITEM

    @property
    def stages(self) -> int:
        """Chunks in flight: what fits, at least a tile's."""
        fixed = sum(size for _, size, _, count in _fixed(MAX_STAGES) for _ in range(count))
        return min(MAX_STAGES, (SMEM_LIMITS[self.feed, self.blocks] - fixed) // self.chunk_bytes)


def _fixed(stages: int) -> tuple[tuple[str, int, int, int], ...]:
    """What a block holds beside its stages: (name, bytes of a piece, alignment, pieces)."""
    return (
        ("weights", TILE // 16 * WARP * 16, 1024, 1),
        ("max", 16 * CONSUMERS * 4, 128, 1),
        ("sum", 16 * CONSUMERS * 4, 128, RECORDS),
        ("record", RECORD_BYTES, 32, RECORDS),
        ("last", 16, 16, RECORDS),
        ("full", 8, 8, stages),
        ("empty", 8, 8, stages),
        ("posted", 8, 8, RECORDS),
        ("taken", 8, 8, RECORDS),
        ("stored", 8, 8, RECORDS),
    )


@cache
def smem_plan(config: DecodeConfig) -> SmemPlan:
    """Stages, then: weights P as A fragments [8 steps][32 lanes] x 16 bytes, the warps' maxima and sums
    f32[16 rows][4 warps], items for the consumers, the word that says who folds, barriers."""
    return SmemPlan.of(
        ("chunk", config.chunk_bytes, 1024, config.stages),
        *_fixed(config.stages),
        limit=SMEM_LIMITS[config.feed, config.blocks],
    )


@dataclass(frozen=True)
class ClusterConfig:
    """The kernel of cluster.py, for head_dim 64 or 128 (ValueError for others): head_dim / 16 blocks, each
    with own_tiles of a split's 8 tiles of K and 16 columns of V, 64 KB together."""

    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            wanted = " or ".join(map(str, HEAD_DIMS))
            raise ValueError(f"decode_attention: head_dim is {self.head_dim}; {wanted} is required")

    @property
    def blocks(self) -> int:
        """Of a cluster."""
        return self.head_dim // CLUSTER_COLUMNS

    @property
    def own_tiles(self) -> int:
        """Tiles of K of a block."""
        return SPLIT_TILES // self.blocks

    @property
    def chunk_bytes(self) -> int:
        """A page of one head of K."""
        return BLOCK_SIZE * self.head_dim * ITEM


@cache
def cluster_plan(config: ClusterConfig) -> SmemPlan:
    """Keys of the own tiles, values of all, then: weights P of all tiles as A fragments; parts of sums of
    weights f32[8 tiles][128 threads][2]; the tiles' largest scaled scores f32[16 rows][8 tiles], twice;
    factors of o f32[4 warps][8 tiles][16 rows]; the warps' maxima of each own tile and sums f32[16 rows][4
    warps]; the word that says who folds; barriers."""
    return SmemPlan.of(
        ("keys", TILE * config.head_dim * ITEM, 1024, config.own_tiles),
        ("values", TILE * CLUSTER_COLUMNS * ITEM, 1024, SPLIT_TILES),
        ("weights", TILE // 16 * WARP * 16, 1024, SPLIT_TILES),
        ("parts", CLUSTER_THREADS * 8, 128, SPLIT_TILES),
        ("top", ROWS * SPLIT_TILES * 4, 128, 2),
        ("factor", SPLIT_TILES * ROWS * 4, 128, 4),
        ("warp_top", ROWS * 16, 128, config.own_tiles),
        ("sum", ROWS * 16, 128, 1),
        ("last", 16, 16, 1),
        ("keys_full", 8, 8, config.own_tiles),
        ("values_full", 8, 8, SPLIT_TILES),
        ("weights_full", 8, 8, SPLIT_TILES),
        ("top_full", 8, 8, 2),
        limit=CLUSTER_SMEM,
    )


@dataclass(frozen=True)
class Build:
    """How a kernel is built beside its numbers. debug: every wait for a barrier is bounded and fails with the
    barrier's name; stress: warps pause at random; pdl: the launch may begin while the one before it ends (fed
    by TMA only). mutant: one known mistake, which the tests must catch: a wrong scale, a mask that lets one
    key too many in, a page too far, V's stale tail left in place, a wrong phase, a stage never handed back.
    split: keys of a split, 256 to 2,048; any but SPLIT leaves the contract, to see what the contract
    costs."""

    debug: bool = False
    stress: bool = False
    pdl: bool = True
    mutant: str = ""
    split: int = SPLIT

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split}; {', '.join(map(str, SPLITS))} are possible")
        if self.mutant not in MUTANTS:
            raise ValueError(f"mutant is {self.mutant!r}; there are {', '.join(MUTANTS[1:])}")


PRODUCT = Build()


def pick_config(head_dim: int, feed: Feed, items: int, num_sms: int) -> DecodeConfig:
    """Two blocks an SM, so that one loads while the other starts or ends an item; where each item has an SM
    to itself, one with twice the stages. Measured on an H100, 128 items of 1,024 keys: 5 % faster."""
    return DecodeConfig(head_dim, feed, 1 if feed == "cp_async" or items <= num_sms else 2)


def fits_cluster(window: int | None, tokens: int, build: Build) -> bool:
    """Whether cluster.py can do it."""
    return window is None and tokens == 1 and build.split == SPLIT and not build.mutant


def resident_clusters(config: ClusterConfig, num_sms: int) -> int:
    """Clusters that run at once: two blocks an SM, as many whole clusters as SMs allow. (Which SMs may share
    a cluster is the card's: 132 of them hold 32 clusters of 8 twice over, not 33.)"""
    return num_sms // config.blocks * 2


def pick_cluster(head_dim: int, heads: int, max_splits: int, num_sms: int) -> ClusterConfig | None:
    """The cluster's kernel where every block has an SM to itself, and None where not; heads: of all
    sequences. The longest possible context is taken for 8 splits at most: longer ones are seldom met, and
    take long in either kernel. Measured on an H100 at head_dim 128: 16 items take 11.7 us instead of 12.9, 32
    of them 21.7 instead of 13.7."""
    config = ClusterConfig(head_dim)
    items = heads * min(max_splits, SPLIT_TILES)
    return config if items <= num_sms // config.blocks else None


CONFIGS = tuple(
    DecodeConfig(head_dim, feed, blocks) for feed, blocks in SMEM_LIMITS for head_dim in HEAD_DIMS
)
