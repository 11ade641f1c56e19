"""Which kernels the ops between the products take: the warp rungs, where they can run the model.

Knows: a model's sizes and what the engine's configuration forces. Refuses to know: kernels, and the rungs of
the products and of attention (model.py asks their own doors).
"""

from __future__ import annotations

from collections.abc import Mapping

from kernels_numba.ops.sample.warp import refusal as sample_refusal
from kernels_numba.ops.warp.door import OPS, RUNG, Sizes, refusal, warp_rungs
from sharp.model_config import ModelConfig


def small_op_rungs(
    default: str, capability: tuple[int, int] | None, dtype: str, model: ModelConfig, block_size: int,
    forced: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """{op: "warp"} of the ops that take it by themselves: compute capability 8.0 or newer, bfloat16, nothing
    forced. (Who forces a rung of rope or store_kv gets the two of them, not both in one.)

    Raises ValueError, with the reason, if "warp" is forced for an op that cannot have it here.
    """
    sizes = Sizes(model.hidden_size, model.intermediate_size, model.head_dim, block_size)
    for op, rung in forced.items():
        why_not = refusal(op, capability, dtype, sizes) if rung == RUNG else ""
        if why_not:
            raise ValueError(f"rung {rung!r} of {op} does not run this model: {why_not}")
    held = set(forced)
    if held & {"rope", "store_kv"}:
        held.add("rope_store_kv")
    return warp_rungs(default, capability, dtype, sizes, [op for op in OPS if op not in held])


def sample_rungs(
    default: str, capability: tuple[int, int] | None, forced: Mapping[str, str]
) -> dict[str, str]:
    """{"sample": "warp"} where it runs and nothing else is forced; logits are float32 in every engine.

    Raises ValueError, with the reason, if it is forced and cannot run.
    """
    why_not = sample_refusal(capability)
    if forced.get("sample") == RUNG and why_not:
        raise ValueError(f"rung {RUNG!r} of sample does not run here: {why_not}")
    return {} if why_not or default != "plain" or "sample" in forced else {"sample": RUNG}


def describe_rungs(rungs: Mapping[str, str], default: str) -> str:
    """What differs from the default, like ", gemm hopper, embedding + rms_norm warp"; "" if nothing does."""
    by_rung: dict[str, list[str]] = {}
    for op, rung in rungs.items():
        if rung != default:
            by_rung.setdefault(rung, []).append(op)
    return "".join(f", {' + '.join(ops)} {rung}" for rung, ops in by_rung.items())
