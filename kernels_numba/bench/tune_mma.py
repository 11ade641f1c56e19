"""`just tune mma`: the tiles of the mma.sync GEMM beside cuBLAS, the ladder's step and the hopper rung.

Each tile is checked before it is timed; a line a shape says what the model picks, what is fastest, and what
the pick loses, the last lines what all of it comes to: that is what ops/gemm_mma/config.py's constants are to
be fitted by. Changes no file. Knows: what to vary. Refuses to know: how a kernel is timed (contest.py).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from kernels_numba.bench.contest import BASELINE, Workload, torch_side
from kernels_numba.compiler import cuda
from kernels_numba.cost import Cost
from kernels_numba.ops import gemm
from kernels_numba.ops.gemm_mma import Card, card, gemm_mma
from kernels_numba.ops.gemm_mma.config import CONFIGS, MmaConfig, model_cycles, pick_config

NK = ((4096, 4096), (28672, 4096), (4096, 14336), (3584, 18944), (576, 1536))
M = (1, 8, 16, 32, 64, 128, 256, 512, 2048, 4096, 8192)
MANY = 2048  # tokens from which on the goal is a share of the tensor cores
# Tiles that no pick takes yet: longer steps in one block an SM, eight warps of 32 x 64 instead of four of
# 64 x 64, wide ones for few tokens, and shorter stages where a step's latencies may bind.
OTHERS = (
    MmaConfig(128, 128, 64, 3, 2, 2),
    MmaConfig(128, 128, 32, 3, 4, 2),
    MmaConfig(64, 256, 32, 4, 1, 4),
    MmaConfig(16, 128, 64, 4, 1, 4),
    MmaConfig(16, 32, 32, 8, 1, 2),
)
WITHIN = 1.5  # of the model's cheapest: what it calls dearer than this is not tried
LADDER, HOPPER = "ladder", "hopper"
Shape = tuple[int, int, int]


def promising(m: int, n: int, k: int, on: Card) -> list[MmaConfig]:
    """The tiles, also OTHERS, whose modelled cost is within WITHIN of the cheapest, and the pick."""
    costs = {config: model_cycles(config, m, n, k, *on) for config in (*CONFIGS, *OTHERS)}
    limit, picked = WITHIN * min(costs.values()), pick_config(m, n, k, *on)[0]
    return [config for config, cost in costs.items() if cost <= limit or config == picked]


def contenders(shape: Shape, on: Card, hopper: bool) -> dict[str, Any]:
    """What is timed on a shape, by name."""
    others = {LADDER: gemm.gemm_mma_step, **({HOPPER: gemm.gemm_hopper} if hopper else {})}
    return {str(config): partial(gemm_mma, config=config) for config in promising(*shape, on)} | others


def describe(shape: Shape, times: Mapping[str, float], picked: str, cost: Cost) -> str:
    """The line of a shape; times: microseconds by name, torch's under BASELINE."""
    tiles = {name: us for name, us in times.items() if name not in (BASELINE, LADDER, HOPPER)}
    best, mine = min(tiles, key=lambda name: tiles[name]), tiles[picked]
    m, n, k = shape
    line = f"M={m} N={n} K={k}: pick {picked} {mine:.1f} us"
    line += f", {cost.flops / mine / 1e6:.0f} TFLOP/s, {cost.bytes / mine / 1e3:.0f} GB/s"
    line += f"; best {best}, the pick loses {mine / tiles[best] - 1:.1%}; of the pick's time:"
    return line + "".join(f" {name} {us / mine:.2f}" for name, us in times.items() if name not in tiles)


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def tune(shapes: Iterable[Shape], rounds: int) -> tuple[list[float], list[float]]:
    """Measure shapes on the current device: (how far each pick is behind the best tile, cuBLAS's time over
    the pick's where M >= MANY). Prints as it goes. ArithmeticError where a tile is wrong."""
    torch, on = torch_side("torch"), card()
    hopper = cuda.get_current_device().compute_capability[0] == 9
    losses, ratios = [], []
    for shape in shapes:
        m, n, k = shape
        with Workload("gemm", {"m": m, "n": n, "k": k, "bias": False}, torch=torch) as workload:
            outcome, cost = workload.compare(contenders(shape, on, hopper), rounds), workload.cost
        if outcome.refused:
            raise ArithmeticError("; ".join(f"{name}: {why}" for name, why in outcome.refused.items()))
        times = {name: one.us for name, one in outcome.measured.items()}
        picked = str(pick_config(*shape, *on)[0])
        tiles = [us for name, us in times.items() if name not in (BASELINE, LADDER, HOPPER)]
        losses.append(times[picked] / min(tiles))
        if m >= MANY:
            ratios.append(times[BASELINE] / times[picked])
        print(describe(shape, times, picked, cost), flush=True)
    return losses, ratios


def main() -> None:
    parser = argparse.ArgumentParser(prog="tune mma", description="sweep the tiles of the mma.sync GEMM")
    parser.add_argument("--m", type=int, nargs="*", default=M, help="tokens")
    parser.add_argument("--case", default="", help='only shapes whose name ("N=4096 K=4096") contains this')
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    shapes = [(m, n, k) for n, k in NK if arguments.case in f"N={n} K={k}" for m in arguments.m]
    if not shapes:
        parser.error(f"no shape contains {arguments.case!r}")
    losses, ratios = tune(shapes, arguments.rounds)
    behind = geometric_mean(losses) - 1
    print(f"{len(shapes)} shapes: the pick is {behind:.1%} behind the best tile in the mean")
    if ratios:
        print(f"M >= {MANY}: {geometric_mean(ratios):.3f} of cuBLAS in the mean, {min(ratios):.3f} at worst")


if __name__ == "__main__":
    main()
