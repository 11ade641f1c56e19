"""`just tune gemm_few`: tiles of the GEMM for few tokens beside one another, torch and the many-token GEMM.

For each shape the model's pick and its rivals are checked and timed in turns; the line says how far the pick
is from the best tile, from torch, from the time that the bytes take, and from the many-token GEMM. At the
end: means against the targets, which of the two GEMMs use_few() should have taken, and all rows as JSON.
Changes no file: the rules in ops/gemm_few/config.py are edited by hand.
Knows: what to vary. Refuses to know: how a kernel is timed (contest.py).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from kernels_numba.bench.cases import GEMM_NK, MODELS, Params
from kernels_numba.bench.contest import BASELINE, Contender, Workload, torch_side
from kernels_numba.bench.targets import LARGE, floor_us, sizes_of
from kernels_numba.bench.tune_decode import read_gbs
from kernels_numba.launch import Kernel
from kernels_numba.ops.gemm import hopper as many
from kernels_numba.ops.gemm.hopper_config import TABLE_ONLY, HopperConfig
from kernels_numba.ops.gemm_few.config import CONFIGS, FewConfig, pick_few_config, use_few
from kernels_numba.ops.gemm_few.head import lm_head_few
from kernels_numba.ops.gemm_few.hopper import few_kernel, gemm_few
from kernels_numba.ops.warp.lm_head import lm_head_warp
from kernels_numba.prebuild import prebuild

FEW_M = (1, 2, 4, 8, 16, 32, 48, 64, 65, 100, 128, 200, 256, 384)
HEAD_M = (1, 8, 64, 256)
# Not picked, but tried where they could win. One block an SM, so all its shared memory is stages: for what
# has fewer tiles than there are SMs.
UNPICKED = (FewConfig(64, 64, 2), *(FewConfig(128, tile_t, 2) for tile_t in (8, 16, 32)))
MANY_MORE = (HopperConfig(64, 32, deep=True), *TABLE_ONLY)
MORE_M = (64, 128, 200, 256)  # tokens for which the last are tried
MANY = "many"  # begins the names of the many-token GEMM's contenders
Row = dict[str, Any]


def kernels() -> Iterator[Kernel]:
    """The tiles that are measured, for compiling them all at once (prebuild.py)."""
    for out_dtype in ("bfloat16", "float32"):
        for config in (*CONFIGS, *UNPICKED):
            yield few_kernel(config, "bfloat16", out_dtype, "", False)
    for more in MANY_MORE:
        yield many.hopper_kernel(more, "bfloat16", "bfloat16", False)


def few_cases(text: str = "") -> dict[str, tuple[str, Params]]:
    """name -> (op, its parameters): products and heads whose name contains `text`."""
    cases: dict[str, tuple[str, Params]] = {
        f"M={m} N={n} K={k}": ("gemm", {"m": m, "n": n, "k": k, "bias": False})
        for n, k in GEMM_NK
        for m in FEW_M
    }
    for name, model in MODELS.items():
        sizes = {key: model[key] for key in ("vocab_size", "hidden_size")}
        for m in HEAD_M:
            cases[f"head {name} M={m}"] = ("lm_head", {"num_rows": m, "num_tokens": 4 * m, **sizes})
    return {name: case for name, case in cases.items() if text in name}


def rivals(m: int, n: int, k: int, num_sms: int) -> list[FewConfig]:
    """The pick, then what is as wide, or the next width up to 64 tokens, or the one before beyond."""
    picked = pick_few_config(m, n, k, num_sms)
    widths = sorted({c.tile_t for c in CONFIGS})
    just = next((i for i, width in enumerate(widths) if width >= m), len(widths) - 1)
    near = (widths[just], widths[just + 1] if m <= 64 else widths[just - 1])
    return [picked, *(c for c in (*CONFIGS, *UNPICKED) if c.tile_t in near and c != picked)]


def many_tiles(op: str, m: int) -> dict[str, Contender]:
    """The many-token GEMM with its own pick, and with deep pipelines where they could help."""
    if op != "gemm":
        return {MANY: partial(lm_head_warp, product="many")}
    more = {f"{MANY} {c}": partial(many.gemm_hopper, config=c) for c in MANY_MORE if m in MORE_M}
    return {MANY: many.gemm_hopper, **more}


def row_of(op: str, params: Params, moved: int, times: Mapping[str, float], picked: str) -> Row:
    """One case's figures: us of every contender; floor_us, that of its bytes; ratio: torch's time over the
    pick's; loss: the pick's over the best tile's."""
    m, n, k = sizes_of(op, params)
    tiles = {name: us for name, us in times.items() if name != BASELINE and not name.startswith(MANY)}
    return {
        "op": op, "m": m, "n": n, "k": k, "picked": picked, "us": dict(times), "bytes": moved,
        "best": min(tiles, key=lambda name: tiles[name]),
        "floor_us": round(floor_us(moved), 2),
        "gbs": round(moved / times[picked] / 1e3, 1),
        "ratio": round(times[BASELINE] / times[picked], 4) if BASELINE in times else None,
        "loss": round(times[picked] / min(tiles.values()), 4),
    }  # fmt: skip


def describe(name: str, row: Row) -> str:
    """The printed line of a case."""
    best = "" if row["best"] == row["picked"] else f", best {row['best']} {row['us'][row['best']]:.2f} us"
    torch = f", {row['ratio']:.3f}x torch" if row["ratio"] else ""
    took, many_us = row["us"][row["picked"]], row["us"].get(MANY, math.nan)
    return (
        f"{name}: {row['picked']} {took:.2f} us, {row['gbs']:.0f} GB/s{torch}, target of its bytes "
        f"{row['floor_us']:.2f} us, many-token {many_us:.2f} us{best}"
    )


def _mean(ratios: list[float]) -> str:
    if not ratios:
        return "none"
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"geometric mean {mean:.3f}, least {min(ratios):.3f}, of {len(ratios)}"


def _taken(row: Row) -> float:
    """The better of the two GEMMs' time over the time of the one that is taken."""
    few, other = row["us"][row["picked"]], row["us"][MANY]
    taken = few if use_few(row["m"], row["n"], row["k"], many.num_sms()) else other
    return float(min(few, other) / taken)


def summary(rows: Iterable[Row]) -> list[str]:
    """Against torch: up to 64 tokens with large weights, and beyond; small weights over their target; what
    the choices of a tile and of a GEMM lose."""
    rows = list(rows)
    timed = [row for row in rows if row["ratio"]]
    large = [r["ratio"] for r in timed if r["m"] <= 64 and 2 * r["n"] * r["k"] >= LARGE]
    beyond = [r["ratio"] for r in timed if r["m"] > 64 and r["op"] == "gemm"]
    late = [r for r in rows if r["m"] <= 64 and 2 * r["n"] * r["k"] < LARGE
            and r["us"][r["picked"]] > r["floor_us"]]  # fmt: skip
    taken = [_taken(row) for row in rows if MANY in row["us"]]
    small = sum(r["m"] <= 64 and 2 * r["n"] * r["k"] < LARGE for r in rows)
    return [
        f"M <= 64, weights of 30 MB and more, against torch: {_mean(large)}",
        f"M > 64, against torch: {_mean(beyond)}",
        f"M <= 64, smaller weights: {len(late)} of {small} over bytes / 3.0 TB/s + 2.5 us",
        f"the pick against the best tile: {_mean([1 / r['loss'] for r in rows])}",
        f"use_few()'s GEMM against the better of the two: {_mean(taken)}",
    ]


def measure(op: str, params: Params, rounds: int, torch: Any) -> Row:
    """One case on the current device. ArithmeticError where the pick is wrong."""
    m, n, k = sizes_of(op, params)
    picked, *others = rivals(m, n, k, many.num_sms())
    launch: Contender = gemm_few if op == "gemm" else lm_head_few
    contenders: dict[str, Contender] = {str(c): partial(launch, config=c) for c in (picked, *others)}
    contenders |= many_tiles(op, m)
    with Workload(op, params, torch=torch) as workload:
        outcome = workload.compare(contenders, rounds)
        moved = workload.cost.bytes
    if str(picked) in outcome.refused:
        raise ArithmeticError(outcome.refused[str(picked)])
    for name, why in outcome.refused.items():
        print(f"  {name} refused: {why}", flush=True)
    times = {name: round(one.us, 3) for name, one in outcome.measured.items()}
    return row_of(op, params, moved, times, str(picked))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tune gemm_few", description="sweep the GEMM for few tokens")
    parser.add_argument("--case", default="", help="only cases whose name contains this text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", default="torch", choices=("torch", "none"))
    arguments = parser.parse_args()
    cases = few_cases(arguments.case)
    if not cases:
        parser.error(f"no case contains {arguments.case!r}")
    torch, rows = torch_side(arguments.against), []
    print(prebuild(["kernels_numba.bench.tune_gemm_few"]), flush=True)
    print(f"reading alone: {read_gbs(arguments.rounds):.0f} GB/s", flush=True)
    for name, (op, params) in cases.items():
        try:
            rows.append(measure(op, params, arguments.rounds, torch))
        except ArithmeticError as error:
            print(f"{name}: {error}", flush=True)
        else:
            print(describe(name, rows[-1]), flush=True)
    print("\n".join(summary(rows)))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
