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
WARP, SCORERS, ADDERS, FINISHERS = 32, 4, 4, 3
THREADS = (SCORERS + ADDERS + 1 + FINISHERS) * WARP
BOX_COLUMNS = 64  # 128 bytes, the swizzle's width
BOX_BYTES = BLOCK_SIZE * BOX_COLUMNS * ITEM
TILE_CHUNKS = 2 * TILE // BLOCK_SIZE  # two pages of K, two of V
MAX_STAGES = 24
Feed = Literal["tma", "cp_async"]
RECORDS, RECORD_BYTES = 2, 32
TURNS = 2  # tiles of which weights are made while older ones are added up
# A block has an SM to itself: on Hopper 232,448 bytes of its shared memory; on sm_86, 89 and 120 a block gets
# 101,376 at most. Two blocks an SM, each with half the stages, were slower on an H100 from 1,024 keys on.
SMEM_LIMITS: dict[Feed, int] = {"tma": 232_448, "cp_async": 101_376}
SPLITS = (256, 512, 1024, 2048)  # a warp holds the pages of one
MUTANTS = ("", "scale", "mask", "page", "stale_tail", "wrong_phase", "lost_arrival")


@dataclass(frozen=True)
class DecodeConfig:
    """head_dim 64 or 128; feed: how pages come to shared memory. ValueError for others."""

    head_dim: int
    feed: Feed

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS or self.feed not in SMEM_LIMITS:
            raise ValueError(
                f"decode_attention: head_dim is {self.head_dim}, feed {self.feed!r}; head_dim "
                f"{' or '.join(map(str, HEAD_DIMS))}, and feed {' or '.join(SMEM_LIMITS)} are required"
            )

    @property
    def chunk_bytes(self) -> int:
        """A page of one head of K or V: what a stage holds."""
        return BLOCK_SIZE * self.head_dim * ITEM

    @property
    def stages(self) -> int:
        """Chunks in flight: what fits, at least a tile's."""
        fixed = sum(size * count for _, size, _, count in _fixed(self.head_dim, MAX_STAGES))
        return min(MAX_STAGES, (SMEM_LIMITS[self.feed] - fixed) // self.chunk_bytes)


def _fixed(head_dim: int, stages: int) -> tuple[tuple[str, int, int, int], ...]:
    """What a block holds beside its stages: (name, bytes of a piece, alignment, pieces)."""
    return (
        ("query", ROWS * head_dim * ITEM, 1024, 1),
        ("weights", TILE // 16 * WARP * 16, 1024, TURNS),
        ("factor", ROWS * 4, 64, TURNS),
        ("max", ROWS * SCORERS * 4, 128, TURNS),
        ("sum", ROWS * SCORERS * 4, 128, RECORDS),
        ("top", ROWS * 4, 64, RECORDS),
        ("record", RECORD_BYTES, 32, RECORDS),
        ("last", 16, 16, RECORDS),
        ("full", 8, 8, stages),
        ("empty", 8, 8, stages),
        ("weighed", 8, 8, TURNS),
        ("added", 8, 8, TURNS),
        ("posted", 8, 8, RECORDS),
        ("taken", 8, 8, RECORDS),
        ("summed", 8, 8, RECORDS),
        ("stored", 8, 8, RECORDS),
    )


@cache
def smem_plan(config: DecodeConfig) -> SmemPlan:
    """Stages, then: the query's 16 rows as the 128-byte swizzle lays them; twice, in turn by tiles: weights P
    as A fragments [8 steps][32 lanes] x 16 bytes, factors of o and the warps' maxima f32[16 rows][4 warps];
    twice, in turn by items: the warps' sums of weights, the rows' maxima, the item itself, the word that says
    who folds; barriers."""
    return SmemPlan.of(
        ("chunk", config.chunk_bytes, 1024, config.stages),
        *_fixed(config.head_dim, config.stages),
        limit=SMEM_LIMITS[config.feed],
    )


@dataclass(frozen=True)
class Build:
    """How a kernel is built beside its numbers. debug: every wait for a barrier is bounded and fails with the
    barrier's name; stress: warps pause at random; pdl: the launch may begin while the one before it ends (fed
    by TMA only). mutant: one known mistake, which the tests must catch: a wrong scale, a mask that lets one
    key too many in, a page too far, V's stale tail left in place, a wrong phase, a stage never handed back.
    split: keys of a split, 256 to 2,048; any but SPLIT leaves the contract, to see what the contract
    costs. every_lane: all lanes of a warp arrive at barriers, where one speaks for its warp otherwise, behind
    a barrier of the warp: what racecheck follows."""

    debug: bool = False
    stress: bool = False
    pdl: bool = True
    mutant: str = ""
    split: int = SPLIT
    every_lane: bool = False

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split}; {', '.join(map(str, SPLITS))} are possible")
        if self.mutant not in MUTANTS:
            raise ValueError(f"mutant is {self.mutant!r}; there are {', '.join(MUTANTS[1:])}")


PRODUCT = Build()


CONFIGS = tuple(DecodeConfig(head_dim, feed) for feed in SMEM_LIMITS for head_dim in HEAD_DIMS)
