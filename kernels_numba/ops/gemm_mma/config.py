"""Tiles of the mma.sync GEMM: what one is made of, what fits into a block, and which suits a shape.

Knows: sizes and counts. Refuses to know: the kernel. No choice made here shows in a bit of a result: whatever
the tile, an output is one chain of m16n8k16 products over K, ascending from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from kernels_numba.smem import SmemPlan

ITEM = 2  # bytes of an element of x and weight
WARP = 32
SMEM_LIMIT = (
    101_376  # of a block on sm_86, 89 and 120 (CUDA C++ Programming Guide, "Technical Specifications")
)
SM_SMEM = 102_400  # of an SM there, of which the system takes SYSTEM_SMEM a block
SYSTEM_SMEM = 1024
SM_REGISTERS = 65_536
PAD = 16  # bytes between staged rows: 8 rows of 16 bytes then lie in different banks


@dataclass(frozen=True)
class MmaConfig:
    """A block's tile of tile_m x tile_n outputs, in steps of tile_k (32 or 64) with `stages` of them in
    shared memory, shared out over warps_m x warps_n warps. ValueError for what cannot be."""

    tile_m: int
    tile_n: int
    tile_k: int
    stages: int
    warps_m: int
    warps_n: int

    def __post_init__(self) -> None:
        wrong = ""
        if self.tile_k not in (32, 64):
            wrong = "steps of 32 or 64 along K are known"
        elif self.tile_m % (16 * self.warps_m) or self.tile_n % (16 * self.warps_n):
            wrong = "each warp needs multiples of 16 rows and columns"
        elif self.warp_m * self.warp_n > 64 * 64:
            wrong = "a thread holds at most 128 accumulators, a warp 64 x 64"
        elif not 3 <= self.stages <= 8:
            wrong = "3 to 8 stages: one is read, one at least is on its way, one is about to be"
        elif self.lines % 8 or self.tile_m % self.lines or self.tile_n % self.lines:
            wrong = f"a pass of all threads copies {self.lines} rows, which must be 8s and divide both tiles"
        elif self.threads % (self.tile_n // 8):
            wrong = f"{self.threads} threads cannot share rows of {self.tile_n // 8} units of results evenly"
        elif self.smem_bytes > SMEM_LIMIT:
            wrong = f"{self.smem_bytes:,} bytes of shared memory, the limit is {SMEM_LIMIT:,}"
        if wrong:
            raise ValueError(f"gemm_mma: tile {self}: {wrong}")

    def __str__(self) -> str:
        size = f"{self.tile_m}x{self.tile_n}x{self.tile_k}"
        return f"{size}s{self.stages}w{self.warps_m}x{self.warps_n}"

    @property
    def threads(self) -> int:
        return WARP * self.warps_m * self.warps_n

    @property
    def warp_m(self) -> int:
        """Rows of one warp's tile."""
        return self.tile_m // self.warps_m

    @property
    def warp_n(self) -> int:
        """Columns of one warp's tile."""
        return self.tile_n // self.warps_n

    @property
    def row_bytes(self) -> int:
        """Bytes of a tile's row in shared memory: 4 or 8 units of 16."""
        return self.tile_k * ITEM

    @property
    def lines(self) -> int:
        """Rows that all threads copy at once, 16 bytes each thread."""
        return self.threads * 16 // self.row_bytes

    @property
    def stage_bytes(self) -> int:
        """x rows, then weight rows, of one step."""
        return (self.tile_m + self.tile_n) * self.row_bytes

    @property
    def pitch(self) -> int:
        """Bytes from row to row of the staged output, which takes the stages' place."""
        return self.tile_n * ITEM + PAD

    @property
    def smem_bytes(self) -> int:
        return max(self.stages * self.stage_bytes, self.tile_m * self.pitch)

    def blocks(self, sm_smem: int = SM_SMEM) -> int:
        """Blocks that an SM with so much shared memory holds at once: by that, and at 256 registers a
        thread."""
        by_registers = SM_REGISTERS // (256 * self.threads)
        return max(1, min(by_registers, sm_smem // (self.smem_bytes + SYSTEM_SMEM)))


@cache
def smem_plan(config: MmaConfig) -> SmemPlan:
    """The stages: in each the rows of x, then those of weight."""
    return SmemPlan.of(("tiles", config.smem_bytes, 1024, 1), limit=SMEM_LIMIT)


# Many tokens: 64 x 64 a warp, because then 8 ldmatrix feed 32 mma; two blocks an SM hide each other's first
# loads and last stores, one of 128 x 256 reads a third less through L2. 192 x 128, for where those leave the
# last wave nearly empty: 2,048 tokens of 4608 x 3584 are exactly 3 waves of 132 SMs. Few tokens: tiles of 16
# to 64 rows, so narrow that N = 4096 still makes 128 blocks, and as many stages as two blocks an SM leave
# room for, because the bytes on their way are all that counts there.
CONFIGS = (
    MmaConfig(128, 256, 32, 4, 2, 4),
    MmaConfig(192, 128, 32, 4, 4, 2),
    MmaConfig(128, 128, 32, 3, 2, 2),
    MmaConfig(64, 128, 32, 4, 2, 2),
    MmaConfig(64, 64, 64, 3, 2, 2),
    MmaConfig(64, 32, 64, 4, 2, 2),
    MmaConfig(32, 64, 64, 4, 1, 4),
    MmaConfig(32, 32, 64, 6, 1, 2),
    MmaConfig(16, 64, 64, 4, 1, 4),
    MmaConfig(16, 32, 64, 8, 1, 2),
)

# A card in cycles of an SM, from datasheets (an A100's; only proportions matter): products, bytes of shared
# memory, bytes from L2, and what a block costs before and after its steps. Not fitted to any measurement.
PRODUCTS, SMEM_BYTES, L2_BYTES, BLOCK_CYCLES = 1024, 128, 32, 1500
NARROW = 1024  # columns up to which a row of tiles is so short that x should be read once


def step_cycles(config: MmaConfig, m: int) -> float:
    """A block's 16 of K: the slowest of tensor cores, shared memory and L2.

    Shared memory is written once and read by every warp; rows past m are neither read from L2 nor do they
    cost less elsewhere.
    """
    tile_m, tile_n = config.tile_m, config.tile_n
    warps = config.warps_m * config.warps_n
    moved = tile_m + tile_n + warps * (config.warp_m + config.warp_n)
    fetched = min(m, tile_m) + tile_n
    step = 16 * ITEM
    return max(tile_m * tile_n * 16 / PRODUCTS, moved * step / SMEM_BYTES, fetched * step / L2_BYTES)


def model_cycles(config: MmaConfig, m: int, n: int, k: int, num_sms: int, sm_smem: int = SM_SMEM) -> float:
    """Time of the whole product: blocks of the busiest SM x what one costs; its ends overlap with those of
    blocks beside it."""
    blocks = -(-(-(-m // config.tile_m) * -(-n // config.tile_n)) // num_sms)
    ends = -(-blocks // config.blocks(sm_smem)) * BLOCK_CYCLES
    return blocks * -(-k // 16) * step_cycles(config, m) + ends


@cache
def pick_config(m: int, n: int, k: int, num_sms: int, sm_smem: int = SM_SMEM) -> tuple[MmaConfig, int]:
    """(tile, row tiles walked together) that the model finds cheapest; ties go to the larger tile.

    sm_smem: bytes of shared memory of an SM. A tile that the rows of x would fill to less than half is left
    out: the model sees no harm in it, because weights bind there, but it multiplies zeros. Blocks that run at
    one time share operands through L2: 8 row tiles share their columns' weights, unless there are so few
    columns that sharing x is worth more.
    """
    filled = [config for config in CONFIGS if config.tile_m < max(2 * m, 32)]
    best = min(filled, key=lambda config: model_cycles(config, m, n, k, num_sms, sm_smem))
    return best, 1 if n <= NARROW else 8
