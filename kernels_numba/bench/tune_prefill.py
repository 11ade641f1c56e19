"""`just tune prefill`: what turns, overlap and the contract's folds are worth to prefill attention on this
GPU.

Measures the hopper rung as it is beside builds without one of these; each is checked first, the bits of a
build without folds are others. Changes no file; prints a line a case for notebooks/LOG.md. Knows: what to
vary. Refuses to know: how a kernel is timed (contest.py).
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from kernels_numba.bench.cases import Params, bench_cases
from kernels_numba.bench.contest import Workload
from kernels_numba.bench.ops import BENCH_OPS
from kernels_numba.ops.prefill_attention import OP, prefill_attention_hopper
from kernels_numba.ops.prefill_attention.config import WHOLE, Build, PrefillConfig

AS_IT_IS = "as it is"


def builds(head_dim: int) -> dict[str, Any]:
    """The rung under names that say what is left out."""
    ways: dict[str, dict[str, Any]] = {
        AS_IT_IS: {},
        "no turns": {"config": PrefillConfig(head_dim, turns=False)},
        "no overlap": {"config": PrefillConfig(head_dim, overlap=False)},
        "neither": {"config": PrefillConfig(head_dim, turns=False, overlap=False)},
        "no folds": {"build": Build(split=WHOLE)},
    }
    return {name: partial(prefill_attention_hopper, **how) for name, how in ways.items()}


def measure(params: Params, rounds: int) -> dict[str, float]:
    """Microseconds by build. ArithmeticError where one is wrong."""
    with Workload(OP, params) as workload:
        outcome = workload.compare(builds(params["head_dim"]), rounds)
    if outcome.refused:
        raise ArithmeticError("; ".join(f"{name}: {why}" for name, why in outcome.refused.items()))
    return {name: outcome.measured[name].us for name in builds(params["head_dim"])}


def describe(case: str, params: Params, times: dict[str, float]) -> str:
    """The printed line: each build's TFLOP/s, and what the folds cost."""
    flops = BENCH_OPS[OP].cost(params).flops
    each = ", ".join(f"{name} {flops / us / 1e6:.1f}" for name, us in times.items())
    return f"{case}: TFLOP/s {each}; folds cost {times[AS_IT_IS] / times['no folds'] - 1:+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tune prefill", description="what parts of the kernel are worth")
    parser.add_argument("--case", nargs="*", default=[""], help="only cases whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cases = {name: params for text in arguments.case for name, params in bench_cases(OP, text=text).items()}
    if not cases:
        parser.error(f"no case contains one of {arguments.case}")
    for case, params in cases.items():
        print(describe(case, params, measure(params, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
