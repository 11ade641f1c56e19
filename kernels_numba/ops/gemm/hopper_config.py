"""Tiles of the Hopper GEMM: what one is made of, what fits into a block, and which suits a shape.

Knows: sizes, counts and the table of measured exceptions. Refuses to know: the kernel. No choice made here
shows in a bit of a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from kernels_numba.ops.gemm.hopper_table import TUNED
from kernels_numba.ptx.epilogue import BOX_COLUMNS, Box, boxes_of
from kernels_numba.smem import SmemPlan

TILE_K = 64
ITEM = 2  # bytes of an element of x and weight
WARP, WARPGROUP = 32, 128
SMEM_LIMIT = 232_448  # of a block
REGISTERS_OF_QUARTER = 16_384  # of an SM; every fourth warp of a block is there
MAX_STAGES, DEEP_STAGES = 8, 16
BARRIER_BYTES = 16 * MAX_STAGES  # up to so many stages; deeper ones need twice that


@dataclass(frozen=True)
class HopperConfig:
    """A tile of tile_m (64 or 128) x tile_n outputs; each 64 of its rows have a consumer warpgroup.

    deep: narrow tiles have up to 16 stages instead of 8: more bytes on their way, but no room on the SM for a
    block of the next launch. cluster: so many blocks, whose tiles are neighbours along n, fetch a part of
    their x each, for all of them; it must divide the number of tiles along n.
    """

    tile_m: int
    tile_n: int
    deep: bool = False
    cluster: int = 1

    def __str__(self) -> str:
        shared = f"c{self.cluster}" if self.cluster > 1 else ""
        return f"{self.tile_m}x{self.tile_n}" + "deep" * self.deep + shared

    @property
    def consumers(self) -> int:
        return self.tile_m // 64

    @property
    def threads(self) -> int:
        """The consumers' warpgroups, then the producer's warp."""
        return self.consumers * WARPGROUP + WARP

    @property
    def registers(self) -> int:
        """What a thread can have. One warp of producers instead of a warpgroup leaves enough for the widest
        tile, so that no registers have to change hands (setmaxnreg)."""
        warps = -(-self.threads // (4 * WARP))
        return min(255, REGISTERS_OF_QUARTER // (warps * WARP) // 8 * 8)

    @property
    def barrier_bytes(self) -> int:
        return BARRIER_BYTES * (2 if self.deep else 1)

    @property
    def sends_rows(self) -> bool:
        """Whether rows below M of a partial tile leave through shared memory. The widest tiles' accumulators
        leave no registers for that: 568 bytes were spilled."""
        return self.consumers == 1 or self.tile_n <= 192

    @property
    def residual_boxes(self) -> tuple[int, int, int]:
        """(boxes of 64 columns of a residual, steps in which they come, boxes of a step): in a step, one lies
        where x would and the others where weights would. No tile needs more than two steps."""
        boxes = -(-self.tile_n // TILE_K)
        steps = -(-boxes // (1 + self.tile_n // self.tile_m))
        return boxes, steps, -(-boxes // steps)

    def out_columns(self, gated: bool = False) -> int:
        """Columns of out in a tile: of gates and ups half."""
        return self.tile_n // 2 if gated else self.tile_n

    @property
    def stages(self) -> int:
        """Tiles of K in flight: what fits beside the barriers and one staged box a consumer.

        Stages before staging: at 512 x 3584 x 18944 a seventh stage took 4 % off, a second round of staging
        cost nothing that could be seen.
        """
        room = SMEM_LIMIT - self.barrier_bytes - self.consumers * 64 * ITEM * min(BOX_COLUMNS[0], self.tile_n)
        most = DEEP_STAGES if self.deep else MAX_STAGES
        return min(most, room // ((self.tile_m + self.tile_n) * TILE_K * ITEM))

    @property
    def rounds(self) -> tuple[tuple[Box, ...], ...]:
        """The boxes in which a consumer's 64 rows leave, in as few rounds of staging as the stages leave room
        for."""
        spare = SMEM_LIMIT - self.barrier_bytes - self.stages * (self.tile_m + self.tile_n) * TILE_K * ITEM
        return boxes_of(self.tile_n, spare // self.consumers // 1024 * 1024)

    def rounds_of(self, gated: bool = False) -> tuple[tuple[Box, ...], ...]:
        """rounds, or the same of out_columns(gated) in no more room."""
        return boxes_of(self.tile_n // 2, self.staged_bytes) if gated else self.rounds

    @property
    def staged_bytes(self) -> int:
        """What a consumer stages in its largest round, to a multiple of 1024."""
        most = max(sum(64 * ITEM * box.columns for box in boxes) for boxes in self.rounds)
        return -(-most // 1024) * 1024


@cache
def smem_plan(config: HopperConfig) -> SmemPlan:
    """x stages, weight stages, each consumer's staged output, barriers; see SmemPlan.picture()."""
    return SmemPlan.of(
        ("x", config.tile_m * TILE_K * ITEM, 1024, config.stages),
        ("weight", config.tile_n * TILE_K * ITEM, 1024, config.stages),
        ("out", config.staged_bytes, 1024, config.consumers),
        ("full", 8, 8, config.stages),
        ("empty", 8, 8, config.stages),
        limit=SMEM_LIMIT,
    )


WIDTHS = {
    64: (32, 48, 64, 96, 128, 192, 256),
    128: (64, 80, 96, 112, 128, 144, 160, 192, 224, 256),
}
CONFIGS = tuple(HopperConfig(tile_m, tile_n) for tile_m, widths in WIDTHS.items() for tile_n in widths)
# What only the table names. Deep: where few tiles are in flight and K is long. Clusters: of 132 SMs some have
# no room beside others for a fourth block, so 128 blocks take two turns; 112 blocks gain by them.
TABLE_ONLY = (HopperConfig(64, 64, deep=True), HopperConfig(128, 64, cluster=4))
GATED_CONFIGS = tuple(config for config in CONFIGS if config.tile_n % 32 == 0)  # half is stored, in 16s

# Cycles, fitted to a sweep of the grid of kernels_numba/bench.py on an H100: the mean loss against the best
# tile is 0.6 %, and where it was over 1 % the table says better.
SMEM_BYTES_A_CYCLE, TILE_CYCLES, ONE_CONSUMER = 128, 275, 1.33
NARROW = 1024  # columns up to which a row of tiles is so short that x should be read once


def tile_cycles(config: HopperConfig, k: int) -> float:
    """Time of one tile: what moves through shared memory, which binds before the tensor cores do.

    In a step of K the copy engine writes x and weights once, and each consumer reads its rows of x and all
    the weights. One consumer alone does not keep the tensor cores busy.
    """
    written = config.tile_m + config.tile_n
    read = config.consumers * (64 + config.tile_n)
    step = (written + read) * TILE_K * ITEM / SMEM_BYTES_A_CYCLE
    return -(-k // TILE_K) * step * (ONE_CONSUMER if config.consumers == 1 else 1) + TILE_CYCLES


def model_cycles(config: HopperConfig, m: int, n: int, k: int, num_sms: int) -> float:
    """Time of the whole product: waves of tiles over the SMs x the cycles of one."""
    tiles = -(-m // config.tile_m) * -(-n // config.tile_n)
    return -(-tiles // num_sms) * tile_cycles(config, k)


def cheapest_config(
    m: int, n: int, k: int, num_sms: int, configs: tuple[HopperConfig, ...] = CONFIGS
) -> HopperConfig:
    """The tile that the cost model finds fastest; ties go to the larger tile."""
    return min(reversed(configs), key=lambda config: model_cycles(config, m, n, k, num_sms))


def pick_hopper_config(
    m: int, n: int, k: int, num_sms: int, activation: str = ""
) -> tuple[HopperConfig, int]:
    """(tile, row tiles walked together): the table's where it has this shape, else the cheapest.

    The table speaks for every m of the same number of 128-row tiles, and for an activation too where the
    tile can have one. Blocks that run at one time share operands through L2: 16 row tiles share their
    columns' weights, unless there are so few columns that sharing x is worth more.
    """
    configs, more = (GATED_CONFIGS, ()) if activation else (CONFIGS, TABLE_ONLY)
    name = TUNED.get((-(-m // 128), n, k))
    named = next((c for c in (*configs, *more) if str(c) == name), None)
    config = named or cheapest_config(m, n, k, num_sms, configs)
    return config, 1 if n <= NARROW else 16
