"""Sizes of the Hopper prefill kernel: tiles, stages, registers, shared memory, kinds of builds.

Knows: bytes and counts. Refuses to know: the kernel. No choice made here shows in a bit of a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from kernels_numba.attention_contract import GROUP_KEYS, SPLIT, TILE
from kernels_numba.smem import SmemPlan

HEAD_DIMS = (64, 128)
BLOCK_SIZE = 64  # keys of a page: two are a tile
MAX_GROUP = 16  # query heads of a kv head; longer groups would do, and no model has them
ITEM = 2
WARP, WARPGROUP = 32, 128
ROWS = 64  # of a consumer warpgroup
BOX_COLUMNS = 64  # 128 bytes, the swizzle's width: a panel
BOX_BYTES = BLOCK_SIZE * BOX_COLUMNS * ITEM
PANEL_BYTES = TILE * BOX_COLUMNS * ITEM
RECORDS, RECORD_BYTES = 2, 32
ROW_STATE_BYTES = 256  # of a warp
MAX_STAGES = 4
SMEM_LIMIT = 232_448  # of a block
CONSUMERS = {64: 3, 128: 2}  # warpgroups by head_dim; the one behind them are the producers
EARLY = {64: 1, 128: 0}  # groups of weights made while P V runs
LOADERS = 2  # of the producers' warps, those that load queries
REGISTERS = {2: (40, 232), 3: (32, 160)}  # a thread, of producers and consumers; 168 or 128 at the start
MUTANTS = (
    "",
    "scale",
    "mask",
    "page",
    "stale_tail",
    "no_fold",
    "early_release",
    "wrong_phase",
    "lost_arrival",
)
Source = Literal["pages", "rows"]
WHOLE = 1 << 26  # keys of a split that never ends: no fold, other bits


@dataclass(frozen=True)
class PrefillConfig:
    """head_dim 64 or 128; source: keys and values in pages, or as rows of packed sequences; turns: whether
    the consumers' products take turns, short_turns: passed on behind S, before P V; early: of a tile's four
    groups of 32 keys those whose weights are made before P V of the tile before is waited for (None:
    EARLY's); consumers: warpgroups of 64 rows, at head_dim 128 no more than two, since three have 160
    registers a thread (0: CONSUMERS'). Defaults: what was fastest at 8 x 2048 on an H100. ValueError for
    others."""

    head_dim: int
    source: Source = "pages"
    turns: bool = True
    early: int | None = None
    consumers: int = 0
    short_turns: bool = False

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS or self.source not in ("pages", "rows"):
            raise ValueError(
                f"prefill_attention: head_dim is {self.head_dim}, source {self.source!r}; "
                f"head_dim {' or '.join(map(str, HEAD_DIMS))}, source pages or rows is required"
            )
        groups = TILE // GROUP_KEYS
        if self.early not in (None, *range(groups + 1)):
            raise ValueError(f"prefill_attention: early is {self.early}; 0 to {groups} or None are possible")
        most = 3 if self.head_dim == 64 else 2
        if self.consumers not in (0, *range(2, most + 1)):
            raise ValueError(
                f"prefill_attention: consumers is {self.consumers}; 0 or 2 to {most} are possible at "
                f"head_dim {self.head_dim}"
            )
        object.__setattr__(self, "early", EARLY[self.head_dim] if self.early is None else self.early)
        object.__setattr__(self, "consumers", self.consumers or CONSUMERS[self.head_dim])

    @property
    def tile_rows(self) -> int:
        """Rows of an item."""
        return self.consumers * ROWS

    @property
    def threads(self) -> int:
        """Of a block: the consumers', and the producers' warpgroup behind them."""
        return (self.consumers + 1) * WARPGROUP

    @property
    def tile_bytes(self) -> int:
        """A tile of K or V."""
        return TILE * self.head_dim * ITEM

    @property
    def stages(self) -> int:
        """Tiles of K, and as many of V, in flight: what fits beside the rest."""
        fixed = sum(size * count for _, size, _, count in _fixed(self, MAX_STAGES))
        return min(MAX_STAGES, (SMEM_LIMIT - fixed) // (2 * self.tile_bytes))


def _fixed(config: PrefillConfig, stages: int) -> tuple[tuple[str, int, int, int], ...]:
    """What a block holds beside its stages: (name, bytes of a piece, alignment, pieces)."""
    return (
        ("q", config.tile_rows * config.head_dim * ITEM, 1024, 1),
        ("state", ROWS * config.head_dim * 4, 1024, config.consumers),
        ("row_state", ROW_STATE_BYTES, 16, 4 * config.consumers),
        ("record", RECORD_BYTES, 32, RECORDS),
        *((f"{name}_{end}", 8, 8, stages) for name in "kv" for end in ("full", "empty")),
        *((f"q_{end}", 8, 8, config.consumers) for end in ("full", "empty")),
        ("posted", 8, 8, RECORDS),
        ("taken", 8, 8, RECORDS),
    )


@cache
def smem_plan(config: PrefillConfig) -> SmemPlan:
    """Stages of K and of V, then: the queries; what each consumer has folded so far, f32[4 warps][head_dim
    / 8][32 lanes][4], and of its rows (rows.py); items for everybody; barriers."""
    return SmemPlan.of(
        ("k", config.tile_bytes, 1024, config.stages),
        ("v", config.tile_bytes, 1024, config.stages),
        *_fixed(config, config.stages),
        limit=SMEM_LIMIT,
    )


@dataclass(frozen=True)
class Build:
    """How a kernel is built beside its numbers. debug: every wait for a barrier is bounded and fails with the
    barrier's name; stress: warps pause at random; pdl: the launch may begin while the one before it ends;
    split: its keys, a power of two; another than the contract's gives other bits, for measuring what it
    costs. mutant: one known mistake, which the tests must catch: a wrong scale, a mask that lets one key too
    many in, a page too far, V's stale tail left in place, splits that are not folded, V handed back before it
    is read, a wrong phase, a stage of V never handed back."""

    debug: bool = False
    stress: bool = False
    pdl: bool = True
    split: int = SPLIT
    mutant: str = ""

    def __post_init__(self) -> None:
        if self.split < TILE or self.split & (self.split - 1) or self.split > WHOLE:
            raise ValueError(f"split is {self.split}; a power of two from {TILE} to {WHOLE} is required")
        if self.mutant not in MUTANTS:
            raise ValueError(f"mutant is {self.mutant!r}; there are {', '.join(MUTANTS[1:])}")


PRODUCT = Build()
