"""`just tune prefill`: what consumers, turns, early weights and the contract's folds are worth to prefill
attention on this GPU.

Measures the hopper rung as it is beside builds that differ in one or two of these; each is checked first, the
bits of a build without folds are others, those of all others the same. Changes no file; prints a line a case
for notebooks/LOG.md. Knows: what to vary. Refuses to know: how a kernel is timed (contest.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from kernels_numba.bench.cases import Params, bench_cases
from kernels_numba.bench.contest import Workload
from kernels_numba.bench.ops import BENCH_OPS
from kernels_numba.launch import Kernel
from kernels_numba.ops.prefill_attention import OP, prefill_attention_hopper
from kernels_numba.ops.prefill_attention.config import CONSUMERS, HEAD_DIMS, WHOLE, Build, PrefillConfig
from kernels_numba.ops.prefill_attention.hopper import prefill_kernel
from kernels_numba.prebuild import prebuild

MODULE = "kernels_numba.bench.tune_prefill"  # __name__ is another when it is run
AS_IT_IS, NO_FOLDS = "as it is", "no folds"
# A mixed step of an engine: decodes, which have no rows here, prompts, and the rest of a bucket.
STEP = "32/8/64 step of 21x190"
DECODES, PROMPTS, PROMPT, SEQS = 64, 21, 190, 256


def step_params() -> Params:
    lens = (0,) * DECODES + (PROMPT,) * PROMPTS + (0,) * (SEQS - DECODES - PROMPTS)
    heads = bench_cases(OP, text="32/8/64 8x2048")["32/8/64 8x2048"]
    return {**heads, "query_lens": lens, "context_lens": lens}


def configs(head_dim: int) -> dict[str, PrefillConfig]:
    """What is tried beside the rung as it is, by name."""
    usual = CONSUMERS[head_dim]
    ways: dict[str, dict[str, Any]] = {
        "no turns": {"turns": False},
        "short turns": {"short_turns": True},
        "early 4": {"early": 4},
        "early 2": {"early": 2},
        "early 0": {"early": 0},
    }
    if head_dim == 64:
        other = 5 - usual
        ways |= {
            f"{other} consumers": {"consumers": other},
            f"{other} consumers, no turns": {"consumers": other, "turns": False},
            f"{other} consumers, short turns": {"consumers": other, "short_turns": True},
        }
    return {name: PrefillConfig(head_dim, **way) for name, way in ways.items()}


def builds(head_dim: int) -> dict[str, Any]:
    """The rung under names that say what differs."""
    ways: dict[str, Any] = {AS_IT_IS: prefill_attention_hopper}
    ways |= {
        name: partial(prefill_attention_hopper, config=config) for name, config in configs(head_dim).items()
    }
    return {**ways, NO_FOLDS: partial(prefill_attention_hopper, build=Build(split=WHOLE))}


def kernels() -> Iterator[Kernel]:
    """All that are measured, for compiling them on all cores first."""
    for head_dim in HEAD_DIMS:
        for config in (PrefillConfig(head_dim), *configs(head_dim).values()):
            yield prefill_kernel(config, "bfloat16")
        yield prefill_kernel(PrefillConfig(head_dim), "bfloat16", build=Build(split=WHOLE))


def measure(params: Params, rounds: int) -> dict[str, float]:
    """Microseconds by build. ArithmeticError where one is wrong."""
    with Workload(OP, params) as workload:
        outcome = workload.compare(builds(params["head_dim"]), rounds)
    if outcome.refused:
        raise ArithmeticError("; ".join(f"{name}: {why}" for name, why in outcome.refused.items()))
    return {name: outcome.measured[name].us for name in builds(params["head_dim"])}


def describe(case: str, params: Params, times: dict[str, float]) -> str:
    """The printed line: the rung's time, each build's TFLOP/s, and what the folds cost."""
    flops = BENCH_OPS[OP].cost(params).flops
    each = ", ".join(f"{name} {flops / us / 1e6:.1f}" for name, us in times.items())
    folds = f"folds cost {times[AS_IT_IS] / times[NO_FOLDS] - 1:+.1%}"
    return f"{case}: {times[AS_IT_IS]:.2f} us; TFLOP/s {each}; {folds}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tune prefill", description="what parts of the kernel are worth")
    parser.add_argument("--case", nargs="*", default=[""], help="only cases whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    known = {STEP: step_params(), **bench_cases(OP)}
    cases = {name: known[name] for text in arguments.case for name in known if text in name}
    if not cases:
        parser.error(f"no case contains one of {arguments.case}")
    print(prebuild([MODULE], progress=False), file=sys.stderr, flush=True)
    for case, params in cases.items():
        print(describe(case, params, measure(params, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
