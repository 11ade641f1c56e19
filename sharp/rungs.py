"""Which kernels a model's ops take: the fastest that can run it, and what the configuration forces.

Knows: a model's sizes, the device, and whose door to ask. Refuses to know: kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernels_numba.ops import decode_attention, gemm
from kernels_numba.ops.decode_attention import door as decode_door
from kernels_numba.ops.gemm import door as gemm_door
from kernels_numba.ops.gemm_silu_mul import FUSED
from kernels_numba.ops.prefill_attention import door as prefill_door
from kernels_numba.ops.sample.warp import refusal as sample_refusal
from kernels_numba.ops.warp.door import OPS, RUNG, Sizes, refusal, warp_rungs
from sharp.buckets import LAUNCH_KEYS, Decodes
from sharp.config import RungRefused
from sharp.model_config import ModelConfig

if TYPE_CHECKING:
    from sharp.config import EngineConfig
    from sharp.device import Device

ATTENTION_OPS = ("decode_attention", "prefill_attention")
ATTENTION = ("hopper", "mma_sync")  # rungs of both that keep attention_contract.py, fastest first: equal bits


def _products(model: ModelConfig) -> tuple[int, ...]:
    """N and K of the products."""
    heads = model.num_q_heads + 2 * model.num_kv_heads
    inner = model.num_q_heads * model.head_dim
    return (model.hidden_size, heads * model.head_dim, inner, model.intermediate_size)


def choose_rungs(model: ModelConfig, config: EngineConfig, device: Device) -> dict[str, str]:
    """op -> rung, of those that are not the device's default or are forced. RungRefused as small_op_rungs and
    sample_rungs."""
    default, capability = device.default_rung, device.capability
    gemm = gemm_door.best_rung(default, capability, device.dtype, _products(model))
    small = small_op_rungs(default, capability, device.dtype, model, config.block_size, config.rungs)
    attention = attention_rungs(default, capability, device.dtype, model, config.block_size, config.rungs)
    sample = sample_rungs(default, capability, config.rungs)
    rungs = {"gemm": gemm, **attention, **small, **sample, **config.rungs}
    return {**fused_rungs(rungs), **rungs}


def fused_rungs(rungs: Mapping[str, str]) -> dict[str, str]:
    """{"gemm_silu_mul": the products' rung} where that has the bits of the two ops that were chosen; else it
    is made of them (ops.resolve)."""
    both = rungs["gemm"] in FUSED and rungs.get("silu_mul") == RUNG
    return {"gemm_silu_mul": rungs["gemm"]} if both else {}


def attention_rungs(
    default: str, capability: tuple[int, int] | None, dtype: str, model: ModelConfig, block_size: int,
    forced: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """{op: rung} of the two attentions: the first of ATTENTION that runs both for this model, or {}.

    Never one alone: beside a plain one (or one that the contract does not bind) a token would round otherwise
    as a decode than as part of a chunk, and a request's bits would depend on how it was cut. So who forces
    such a one for either keeps the default of the other; who forces one of ATTENTION gets its partner.
    """
    held = {op: forced[op] for op in ATTENTION_OPS if op in forced}
    if default != "plain" or not set(held.values()) <= set(ATTENTION):
        return {}
    where = capability, dtype, model.head_dim, model.num_q_heads // model.num_kv_heads, block_size
    for rung in ATTENTION:
        if not decode_door.refusal(rung, *where) and not prefill_door.refusal(*where, rung):
            return {op: rung for op in ATTENTION_OPS if op not in held}
    return {}


def where_decodes(rungs: Mapping[str, str], default: str, max_model_len: int) -> Decodes:
    """Whether a mixed step's decodes ride in the chunks' launch of attention (Buckets): where that has the
    bits of decode attention, among ATTENTION, and where both rungs are plain, which are one kernel."""
    decode, prefill = (rungs.get(op, default) for op in ATTENTION_OPS)
    if decode == prefill == "plain":
        return "ride"
    if not {decode, prefill} <= set(ATTENTION):
        return "apart"
    return "ride" if max_model_len <= LAUNCH_KEYS else "either"


def refuse_rungs(rungs: Mapping[str, str], model: ModelConfig, config: EngineConfig, device: Device) -> None:
    """RungRefused, with the reason, for a rung of the other kind of device, or of the products or attention
    that cannot run the model."""
    elsewhere = "plain" if device.kind == "cpu" else "reference"
    for op, rung in config.rungs.items():
        if rung == elsewhere:
            raise RungRefused(f"rung {rung!r} of {op} does not run on device {device.kind!r} ({device.name})")
    for op, free in (("gemm", gemm.NOT_INVARIANT), ("decode_attention", decode_attention.NOT_INVARIANT)):
        if rungs.get(op) in free:
            why = "its bits are not those that a token has in company"
            raise RungRefused(f"rung {rungs[op]!r} of {op} does not run a model: {why}")
    decode, prefill = rungs.get("decode_attention", ""), rungs.get("prefill_attention", "")
    group = model.num_q_heads // model.num_kv_heads
    where = device.capability, device.dtype, model.head_dim, group, config.block_size
    reasons = {
        **{
            op: gemm_door.refusal(rungs[op], device.capability, device.dtype, _products(model))
            for op in ("gemm", "gemm_silu_mul")
            if op in rungs
        },
        "decode_attention": decode_door.refusal(decode, *where),
        "prefill_attention": prefill_door.refusal(*where, prefill),
    }
    for op, why_not in reasons.items():
        if why_not:
            raise RungRefused(f"rung {rungs[op]!r} of {op} does not run this model: {why_not}")


def small_op_rungs(
    default: str, capability: tuple[int, int] | None, dtype: str, model: ModelConfig, block_size: int,
    forced: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """{op: "warp"} of the ops that take it by themselves: compute capability 8.0 or newer, bfloat16, nothing
    forced. (Who forces a rung of rope or store_kv gets the two of them, not both in one.)

    Raises RungRefused, with the reason, if "warp" is forced for an op that cannot have it here.
    """
    sizes = Sizes(model.hidden_size, model.intermediate_size, model.head_dim, block_size)
    for op, rung in forced.items():
        why_not = refusal(op, capability, dtype, sizes) if rung == RUNG else ""
        if why_not:
            raise RungRefused(f"rung {rung!r} of {op} does not run this model: {why_not}")
    held = set(forced)
    if held & {"rope", "store_kv"}:
        held.add("rope_store_kv")
    return warp_rungs(default, capability, dtype, sizes, [op for op in OPS if op not in held])


def sample_rungs(
    default: str, capability: tuple[int, int] | None, forced: Mapping[str, str]
) -> dict[str, str]:
    """{"sample": "warp"} where it runs and nothing else is forced; logits are float32 in every engine.

    Raises RungRefused, with the reason, if it is forced and cannot run.
    """
    why_not = sample_refusal(capability)
    if forced.get("sample") == RUNG and why_not:
        raise RungRefused(f"rung {RUNG!r} of sample does not run here: {why_not}")
    return {} if why_not or default != "plain" or "sample" in forced else {"sample": RUNG}


def describe_rungs(rungs: Mapping[str, str], default: str) -> str:
    """What differs from the default, like ", gemm hopper, embedding + rms_norm warp"; "" if nothing does."""
    by_rung: dict[str, list[str]] = {}
    for op, rung in rungs.items():
        if rung != default:
            by_rung.setdefault(rung, []).append(op)
    return "".join(f", {' + '.join(ops)} {rung}" for rung, ops in by_rung.items())
