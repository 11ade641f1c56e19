"""`just tune gemm`: every promising tile of the Hopper GEMM against the one that its cost model picks.

Rewrites ops/gemm/hopper_table.py, and nothing else, with the shapes where another tile won twice by more than
MARGIN: once among all, once against the model's pick alone. Prints a line a shape, the winners last, as
notebooks/LOG.md wants them. Knows: how to search. Refuses to know: how a kernel is timed (contest.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from kernels_numba.bench.cases import bench_cases
from kernels_numba.bench.contest import BASELINE, Workload, torch_side
from kernels_numba.ops.gemm import hopper, hopper_table
from kernels_numba.ops.gemm.hopper_config import (
    CONFIGS,
    HopperConfig,
    cheapest_config,
    model_cycles,
    pick_hopper_config,
)

MARGIN = 1.01
WITHIN = 1.35  # of the model's cheapest cost: what it calls dearer than this is not tried
Key = tuple[int, int, int]


def promising(m: int, n: int, k: int, num_sms: int) -> list[HopperConfig]:
    """The tiles whose modelled cost is within WITHIN of the cheapest, cheapest first."""
    costs = {config: model_cycles(config, m, n, k, num_sms) for config in CONFIGS}
    limit = WITHIN * min(costs.values())
    return sorted((config for config in CONFIGS if costs[config] <= limit), key=lambda c: costs[c])


def faster(times: Mapping[str, float], picked: str) -> str | None:
    """The fastest name if it beats the picked one by more than MARGIN."""
    best = min(times, key=lambda name: times[name])
    return best if times[picked] > MARGIN * times[best] else None


def table_text(table: Mapping[Key, str]) -> str:
    """hopper_table.py with this table; its docstring stays."""
    lines = [f'    {key}: "{name}",' for key, name in sorted(table.items())]
    docstring = f'"""{hopper_table.__doc__}"""'
    return "\n".join([docstring, "", "TUNED = {", *lines, "}", ""])


def tune(cases: Iterable[tuple[int, int, int]], rounds: int) -> dict[Key, str]:
    """Measure (m, n, k) shapes on the current device; the table's entries for them. Prints as it goes."""
    torch, table = torch_side("torch"), {}
    for m, n, k in cases:
        num_sms = hopper.num_sms()
        picked, group = cheapest_config(m, n, k, num_sms), pick_hopper_config(m, n, k, num_sms)[1]
        rungs = {
            str(config): partial(hopper.gemm_hopper, config=config, group=group)
            for config in promising(m, n, k, num_sms)
        }
        with Workload("gemm", {"m": m, "n": n, "k": k, "bias": False}, torch=torch) as workload:
            measured = workload.compare(rungs, rounds).measured
            times = {name: one.us for name, one in measured.items() if name != BASELINE}
            winner = faster(times, str(picked))
            if winner is not None:
                pair = {name: rungs[name] for name in (str(picked), winner)}
                again = {name: one.us for name, one in workload.compare(pair, 2 * rounds).measured.items()}
                again.pop(BASELINE)
                winner = faster(again, str(picked))
        if winner is not None:
            table[-(-m // 128), n, k] = winner
        order = sorted(times, key=lambda name: times[name])[:4]
        ours = ", ".join(f"{name} {measured[BASELINE].us / times[name]:.3f}x" for name in order)
        print(f"M={m} N={n} K={k}: model {picked}, table {winner or '-'}; {ours}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="tune gemm", description="sweep the tiles of the Hopper GEMM")
    parser.add_argument("--case", default="", help="only shapes whose name contains this text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(hopper_table.__file__), help="where the table goes")
    arguments = parser.parse_args()
    cases = bench_cases("gemm", text=arguments.case)
    if not cases:
        parser.error(f"no shape contains {arguments.case!r}")
    shapes = [(params["m"], params["n"], params["k"]) for params in cases.values()]
    found = tune(shapes, arguments.rounds)
    measured = {(-(-m // 128), n, k) for m, n, k in shapes}
    kept = {key: name for key, name in hopper_table.TUNED.items() if key not in measured}
    arguments.out.write_text(table_text({**kept, **found}), encoding="utf-8")
    print(f"{len(shapes)} shapes, {len(found)} where a tile beats the model's pick: {arguments.out}")


if __name__ == "__main__":
    main()
