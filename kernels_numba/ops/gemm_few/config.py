"""Tiles of the GEMM for few tokens: what one is made of, what fits into a block, and which suits a shape.

Knows: sizes, counts and what was measured. Refuses to know: the kernel. No choice made here shows in a bit
of a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

from kernels_numba.smem import SmemPlan

TILE_K = 64
ITEM = 2  # bytes of an element of x and weight
ROW = TILE_K * ITEM  # bytes of a tile's row: one line of the 128-byte swizzle
GROUP_N = 64  # rows of weights that one warpgroup multiplies: wgmma's M
WARP, WARPGROUP = 32, 128
SMEM_OF_SM, SMEM_OF_BLOCK, SMEM_OF_SYSTEM = 233_472, 232_448, 1_024  # the last: what a block costs besides
REGISTERS_OF_QUARTER = 16_384  # of an SM; every fourth warp of a block is there
LONG_K = 4096  # beyond it, 97 to 128 tokens are many
STORE_TOKENS = 16  # that a warpgroup stores at once, 8 threads a token
MUTANTS = ("", "wrong_phase", "lost_arrival", "early_arrival", "descending", "no_barrier")


@dataclass(frozen=True)
class Build:
    """How a kernel is built beside its numbers. debug: every wait for a barrier is bounded and fails with the
    barrier's name; stress: warps pause at random; pdl: the launch may begin while the one before it ends;
    mutant: one known mistake, which the tests must catch: consumers that wait for the wrong phase, never hand
    a stage back, or hand it back while it is read; K walked downward; staged results stored before they are
    all there."""

    debug: bool = False
    stress: bool = False
    pdl: bool = True
    mutant: str = ""

    def __post_init__(self) -> None:
        if self.mutant not in MUTANTS:
            raise ValueError(f"mutant is {self.mutant!r}; there are {', '.join(MUTANTS[1:])}")


PRODUCT = Build()


@dataclass(frozen=True)
class FewConfig:
    """A tile of tile_n rows of weights x tile_t tokens; `blocks` of them live on an SM at a time.

    tile_n: 64 or 128, each 64 have a consumer warpgroup; tile_t: a multiple of 8 up to 256. ValueError for
    others, and where fewer than two stages fit.
    """

    tile_n: int
    tile_t: int
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.tile_n not in (64, 128):
            raise ValueError(f"tile_n is {self.tile_n}; 64 or 128 is required")
        if self.tile_t % 8 or not 8 <= self.tile_t <= 256:
            raise ValueError(f"tile_t is {self.tile_t}; a multiple of 8 from 8 to 256 is required")
        if self.blocks < 1 or self.stages < 2:
            raise ValueError(f"{self}: {self.stages} stages fit; 2 are required")

    def __str__(self) -> str:
        return f"{self.tile_n}x{self.tile_t}" + (f"x{self.blocks}" if self.blocks > 1 else "")

    @property
    def consumers(self) -> int:
        return self.tile_n // GROUP_N

    @property
    def threads(self) -> int:
        """The consumers' warpgroups, then the producer's warp."""
        return self.consumers * WARPGROUP + WARP

    @property
    def registers(self) -> int:
        """What a thread can have if `blocks` share an SM, whichever of its quarters their first warps get."""
        warps = self.blocks * -(-self.threads // (4 * WARP))
        return min(255, REGISTERS_OF_QUARTER // (warps * WARP) // 8 * 8)

    @property
    def smem_limit(self) -> int:
        """Bytes of shared memory of one of `blocks` on an SM."""
        return min(SMEM_OF_BLOCK, SMEM_OF_SM // self.blocks - SMEM_OF_SYSTEM)

    @property
    def round_tokens(self) -> int:
        """Tokens staged at a time. The widest tile's accumulators leave no registers for four stores at
        once: 136 bytes were spilled."""
        return min(self.tile_t, 32 if self.tile_t > 192 else 64)

    @property
    def staged_bytes(self) -> int:
        """A consumer's staged results: round_tokens of its 64 columns, in whole stores."""
        tokens = self.round_tokens
        return -(-tokens // STORE_TOKENS) * STORE_TOKENS * GROUP_N * ITEM

    @property
    def stage_bytes(self) -> int:
        return (self.tile_n + self.tile_t) * ROW

    @property
    def stages(self) -> int:
        """Steps of K in flight: as many as fit beside the staged results. Each has two barriers of 8
        bytes."""
        room = self.smem_limit - self.consumers * self.staged_bytes
        return room // (self.stage_bytes + 16)


@cache
def smem_plan(config: FewConfig) -> SmemPlan:
    """Weight stages, x stages, each consumer's staged results, barriers; see SmemPlan.picture()."""
    return SmemPlan.of(
        ("weight", config.tile_n * ROW, 1024, config.stages),
        ("x", config.tile_t * ROW, 1024, config.stages),
        ("out", config.staged_bytes, 1024, config.consumers),
        ("full", 8, 8, config.stages),
        ("empty", 8, 8, config.stages),
        limit=config.smem_limit,
    )


# 64 rows, one block an SM, all its shared memory stages: where every SM has one tile at most. Two blocks, if
# half the memory holds what must be in flight and registers allow it: where tiles follow on tiles, so one
# stores while the other multiplies, and the next launch finds room to fetch its weights before this one ends.
CONFIGS = (
    *(FewConfig(64, tile_t) for tile_t in (8, 16, 32, 64, 96, 128)),
    *(FewConfig(64, tile_t, 2) for tile_t in (8, 16, 32)),
    *(FewConfig(128, tile_t) for tile_t in (64, 128, 256)),
)  # fmt: skip


@lru_cache(maxsize=4096)
def pick_few_config(m: int, n: int, k: int, num_sms: int) -> FewConfig:
    """The tile for m tokens: just wide enough, so that one block reads each weight, up to 128 tokens.

    Rows: 64 draw from more SMs at a time than 128, which read x half as often: that pays with more than 32
    tokens, if every SM has work without. Fitted to `just tune gemm_few` on an H100 (notebooks/LOG.md). Where
    every tile has an SM of its own, one block an SM is ahead of two (16.6 us against 19.6 for one token of
    6144 x 4096, 42.4 against 50.1 for 64 of 4096 x 14336): what is short is steps of K in flight. That two
    blocks which share weights take up to half longer than one that has them alone is why narrower tiles are
    not tried.
    """
    all_at_once = -(-n // 64) <= num_sms
    if all_at_once:
        return next((c for c in CONFIGS if c.tile_n == 64 and c.tile_t >= m), FewConfig(64, 128))
    if m <= 32:
        return next(c for c in CONFIGS if c.tile_n == 64 and c.blocks == 2 and c.tile_t >= m)
    if m <= 64:
        return FewConfig(128, 64)
    wider = 128 < m <= 256 and -(-n // 128) * 2 > num_sms  # one block still reads each weight
    return FewConfig(128, 256 if wider else 128)


def use_few(m: int, n: int, k: int, num_sms: int) -> bool:
    """Whether this GEMM, and not the many-token one (ops/gemm/hopper.py), should take m tokens, the most that
    a launch may find; n, k: of the weights. No bit of a result depends on it.

    Measured on an H100, over 16 shapes and 3 heads: up to 32 tokens few takes from 0.4 to 1.02 of the other's
    time. Beyond, where weights fill the SMs more than once, the other's tiles have narrower pieces of them,
    and so more SMs read. Where they do not, long pipelines pay: up to 96 tokens few takes 0.84 to 1.0 of the
    other's time, up to 128 as long as a third of the SMs has a tile and K is short (0.94 at 4096 x 4096, 1.21
    at 2048 x 8192).
    """
    tiles = -(-n // 64)
    if tiles > num_sms:
        return m <= 32
    return m <= 96 or (m <= 128 and 3 * tiles >= num_sms and k <= LONG_K)
