"""Sizes of the mma.sync prefill kernel: warps, pages in flight, shared memory.

Knows: bytes and counts. Refuses to know: the kernel. No choice made here shows in a bit of a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from kernels_numba.ops.prefill_attention.config import (
    BLOCK_SIZE,
    BOX_COLUMNS,
    HEAD_DIMS,
    ITEM,
    RECORD_BYTES,
    WARP,
    Source,
)
from kernels_numba.smem import SmemPlan

WARP_ROWS, CONSUMERS = 16, 8  # rows of a tensor-core product; warps
TILE_ROWS = CONSUMERS * WARP_ROWS
THREADS = (
    CONSUMERS * WARP
)  # all of them multiply and load: a ninth warp would leave each thread 168 registers
SMEM_LIMIT = 101_376  # of a block on sm_86, 89 and 120
MAX_STAGES = 16
RECORDS, RECORD_SHIFT = 4, 2
# Most blocks of a launch: more than a GPU has SMs, each with what it has folded so far in a workspace.
MAX_BLOCKS = 192


@dataclass(frozen=True)
class MmaConfig:
    """head_dim 64 or 128; source: keys and values in pages, or as rows of packed sequences. ValueError for
    others."""

    head_dim: int
    source: Source = "pages"

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS or self.source not in ("pages", "rows"):
            raise ValueError(
                f"prefill_attention: head_dim is {self.head_dim}, source {self.source!r}; "
                f"head_dim {' or '.join(map(str, HEAD_DIMS))}, source pages or rows is required"
            )

    @property
    def chunk_bytes(self) -> int:
        """64 keys of one head of K or V: what a stage holds."""
        return BLOCK_SIZE * self.head_dim * ITEM

    @property
    def stages(self) -> int:
        """Chunks in shared memory: what fits, over a tile's four."""
        fixed = sum(size * count for _, size, _, count in _fixed(MAX_STAGES))
        return min(MAX_STAGES, (SMEM_LIMIT - fixed) // self.chunk_bytes)

    @property
    def ahead(self) -> int:
        """Chunks that are on their way or wait to be taken: two less, so that a warp which loads does not
        wait for those that still multiply with what was taken last."""
        return self.stages - 2

    @property
    def state_words(self) -> int:
        """Float32 that a block keeps of splits that have ended: of each thread's two rows m, l and o."""
        return THREADS * (self.head_dim // 2 + 4)


def _fixed(stages: int) -> tuple[tuple[str, int, int, int], ...]:
    """What a block holds beside its stages: (name, bytes of a piece, alignment, pieces)."""
    return (
        ("record", RECORD_BYTES, 32, RECORDS),
        ("search", RECORD_BYTES, 32, 1),
        ("own", 16, 16, CONSUMERS),
        ("full", 8, 8, stages),
        ("empty", 8, 8, stages),
        ("posted", 8, 8, RECORDS),
        ("taken", 8, 8, RECORDS),
    )


@cache
def smem_plan(config: MmaConfig) -> SmemPlan:
    """Chunks in panels of 64 columns, 128-byte swizzle; items; where the search for the next one
    goes on; four numbers of each warp, which has no registers left for them; barriers."""
    return SmemPlan.of(
        ("chunk", config.chunk_bytes, 1024, config.stages), *_fixed(config.stages), limit=SMEM_LIMIT
    )


__all__ = ["BOX_COLUMNS", "MAX_BLOCKS", "THREADS", "TILE_ROWS", "MmaConfig", "smem_plan"]
