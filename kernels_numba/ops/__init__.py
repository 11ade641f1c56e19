"""The ops by name, imported when first asked for, and the choice of one rung for each.

Knows: which ops exist. Refuses to know: what they compute.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType, SimpleNamespace

from kernels_numba.registry import pick

OP_NAMES = (
    "embedding", "rms_norm", "gemm", "qk_norm", "rope", "store_kv", "rope_store_kv", "prefill_attention",
    "decode_attention", "silu_mul", "gemm_silu_mul", "lm_head", "sample",
)  # fmt: skip


class _LazyOps(Mapping[str, ModuleType]):
    """op name -> its module; a module is imported by the first access."""

    def __getitem__(self, op: str) -> ModuleType:
        if op not in OP_NAMES:
            raise KeyError(op)
        return importlib.import_module(f"kernels_numba.ops.{op}")

    def __iter__(self) -> Iterator[str]:
        return iter(OP_NAMES)

    def __len__(self) -> int:
        return len(OP_NAMES)


OPS: Mapping[str, ModuleType] = _LazyOps()


def resolve(default_rung: str, forced: Mapping[str, str] | None = None) -> SimpleNamespace:
    """A namespace of one function per op: the rung named in `forced`, else `default_rung`.

    The choice is made now: a rung registered later is seen by the next resolve(). Raises ValueError for an
    unknown op or rung, with a list of what exists. Where rope or store_kv is named and rope_store_kv is not,
    the latter is made of the two; so is gemm_silu_mul of gemm and silu_mul.
    """
    forced = dict(forced or {})
    unknown = sorted(set(forced) - set(OP_NAMES))
    if unknown:
        raise ValueError(f"no op {', '.join(map(repr, unknown))}; there are {', '.join(OP_NAMES)}")
    chosen = {op: pick(op, OPS[op].rungs, forced.get(op, default_rung)) for op in OP_NAMES}
    if ("rope" in forced or "store_kv" in forced) and "rope_store_kv" not in forced:
        chosen["rope_store_kv"] = OPS["rope_store_kv"].composed(chosen["rope"], chosen["store_kv"])
    if ("gemm" in forced or "silu_mul" in forced) and "gemm_silu_mul" not in forced:
        chosen["gemm_silu_mul"] = OPS["gemm_silu_mul"].composed(chosen["gemm"], chosen["silu_mul"])
    return SimpleNamespace(**chosen)
