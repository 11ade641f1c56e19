"""`just tune gemm_few`: tiles of the GEMM for few tokens beside one another, torch and the many-token GEMM.

For each shape the model's pick and its rivals are checked and timed in turns; the line says how far the pick
is from the best tile, from torch, and from the time that the bytes take. At the end: means against the
targets, and all rows as JSON. Changes no file: the rates in ops/gemm_few/config.py are edited by hand.
Knows: what to vary. Refuses to know: how a kernel is timed (contest.py).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from kernels_numba.bench.cases import GEMM_FEW_M, GEMM_NK, MODELS, Params
from kernels_numba.bench.contest import BASELINE, Contender, Workload, torch_side
from kernels_numba.bench.targets import LARGE, floor_us, sizes_of
from kernels_numba.bench.tune_decode import read_gbs
from kernels_numba.launch import Kernel
from kernels_numba.ops.gemm import hopper as many
from kernels_numba.ops.gemm_few.config import CONFIGS, FewConfig, model_seconds, pick_few_config
from kernels_numba.ops.gemm_few.head import lm_head_few
from kernels_numba.ops.gemm_few.hopper import few_kernel, gemm_few
from kernels_numba.ops.warp.lm_head import lm_head_warp
from kernels_numba.prebuild import prebuild

HEAD_M = (1, 8, 64, 256)
WITHIN, MOST = 1.25, 4  # rivals: what the model finds at most this much dearer than the pick, so many of them
Row = dict[str, Any]


def kernels() -> Iterator[Kernel]:
    """The tiles that are measured, for compiling them all at once (prebuild.py)."""
    for out_dtype in ("bfloat16", "float32"):
        for config in CONFIGS:
            yield few_kernel(config, "bfloat16", out_dtype, "", False)


def few_cases(text: str = "") -> dict[str, tuple[str, Params]]:
    """name -> (op, its parameters): products and heads whose name contains `text`."""
    cases: dict[str, tuple[str, Params]] = {
        f"M={m} N={n} K={k}": ("gemm", {"m": m, "n": n, "k": k, "bias": False})
        for n, k in GEMM_NK
        for m in GEMM_FEW_M
    }
    for name, model in MODELS.items():
        sizes = {key: model[key] for key in ("vocab_size", "hidden_size")}
        for m in HEAD_M:
            cases[f"head {name} M={m}"] = ("lm_head", {"num_rows": m, "num_tokens": 4 * m, **sizes})
    return {name: case for name, case in cases.items() if text in name}


def rivals(m: int, n: int, k: int, num_sms: int) -> list[FewConfig]:
    """The pick, then the MOST cheapest others within WITHIN of it, by the model."""
    picked = pick_few_config(m, n, k, num_sms)
    seconds = {config: model_seconds(config, m, n, k, num_sms) for config in CONFIGS}
    others = sorted((c for c in CONFIGS if c != picked), key=lambda c: seconds[c])
    return [picked, *[c for c in others if seconds[c] <= WITHIN * seconds[picked]][:MOST]]


def row_of(op: str, params: Params, moved: int, times: Mapping[str, float], picked: str) -> Row:
    """One case's figures: us of every contender; floor_us, that of its bytes; ratio: torch's time over the
    pick's; loss: the pick's over the best tile's."""
    m, n, k = sizes_of(op, params)
    tiles = {name: us for name, us in times.items() if name not in (BASELINE, "many")}
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
    took, many_us = row["us"][row["picked"]], row["us"].get("many", math.nan)
    return (
        f"{name}: {row['picked']} {took:.2f} us, {row['gbs']:.0f} GB/s{torch}, target of its bytes "
        f"{row['floor_us']:.2f} us, many-token {many_us:.2f} us{best}"
    )


def _mean(ratios: list[float]) -> str:
    if not ratios:
        return "none"
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"geometric mean {mean:.3f}, least {min(ratios):.3f}, of {len(ratios)}"


def summary(rows: Iterable[Row]) -> list[str]:
    """Against torch: up to 64 tokens with large weights, and beyond; small weights over their target; the
    model's loss."""
    rows = list(rows)
    timed = [row for row in rows if row["ratio"]]
    large = [r["ratio"] for r in timed if r["m"] <= 64 and 2 * r["n"] * r["k"] >= LARGE]
    beyond = [r["ratio"] for r in timed if r["m"] > 64 and r["op"] == "gemm"]
    late = [r for r in rows if r["m"] <= 64 and 2 * r["n"] * r["k"] < LARGE
            and r["us"][r["picked"]] > r["floor_us"]]  # fmt: skip
    small = sum(r["m"] <= 64 and 2 * r["n"] * r["k"] < LARGE for r in rows)
    return [
        f"M <= 64, weights of 30 MB and more, against torch: {_mean(large)}",
        f"M > 64, against torch: {_mean(beyond)}",
        f"M <= 64, smaller weights: {len(late)} of {small} over bytes / 3.0 TB/s + 2.5 us",
        f"the pick against the best tile: {_mean([1 / r['loss'] for r in rows])}",
    ]


def measure(op: str, params: Params, rounds: int, torch: Any) -> Row:
    """One case on the current device. ArithmeticError where the pick is wrong."""
    m, n, k = sizes_of(op, params)
    picked, *others = rivals(m, n, k, many.num_sms())
    launch: Contender = gemm_few if op == "gemm" else lm_head_few
    contenders: dict[str, Contender] = {str(c): partial(launch, config=c) for c in (picked, *others)}
    contenders["many"] = many.gemm_hopper if op == "gemm" else partial(lm_head_warp, product="many")
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
