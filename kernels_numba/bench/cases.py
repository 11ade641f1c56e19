"""What each op is measured on: shapes of real models, a few token counts, named as the rows are.

Knows: sizes. Refuses to know: arrays, times. Parameters have the keys of the ops' own CASES,
which fit here, too. Source of the sizes: the models' config.json on Hugging Face.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kernels_numba.bench.timing import COLD_BYTES

Params = dict[str, Any]

GEMM_NK = (
    (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (4608, 3584), (3584, 3584), (37888, 3584),
    (3584, 18944), (3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (960, 576), (576, 576),
    (3072, 576), (576, 1536),
)  # fmt: skip
RESIDUAL_NK = ((2048, 2048), (2048, 8192), (3584, 3584), (3584, 18944))  # o and down
RESIDUAL_M = (32, 4096)
GEMM_FEW_M = (1, 2, 4, 8, 16, 32, 64, 65, 100, 128, 200, 256, 384)
GEMM_MANY_M = (512, 1000, 2048, 4096, 8192, 16384)
QUICK_M = (8, 512, 4096)
MMA_M = (1, 16, 64, 256, *GEMM_MANY_M[2:])  # on which rung mma_sync is measured beside hopper
HEAD_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GATED_M, QUICK_GATED_M = (1, 32, 64, 256, 1000, 4096, 8192), 4096

MODELS: dict[str, Params] = {
    "llama3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256, "num_q_heads": 32,
                    "num_kv_heads": 8, "head_dim": 64},
    "qwen2.5-7b": {"hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064, "num_q_heads": 28,
                   "num_kv_heads": 4, "head_dim": 128},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "num_q_heads": 9,
                     "num_kv_heads": 3, "head_dim": 64},
}  # fmt: skip
QUICK_MODELS = ("llama3.2-1b",)
TOKENS = (64, 1024, 8192)
QUICK_TOKENS = (64, 8192)
BLOCK_SIZE = 64
MAX_POS = 8192


def _mixed(low: int, high: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """`count` lengths from low to high, the same ones always."""
    return tuple(np.random.default_rng(seed).integers(low, high + 1, count).tolist())


_MIX = {f"64mix16-2048{f' seed {n}' if n else ''}": (_mixed(16, 2048, 64, n),) * 2 for n in range(3)}
_CHUNKS = {f"2048on{n}": ((2048,), (n + 2048,)) for n in (8192, 32768)}  # behind that much context
# Heads q/kv/head_dim -> what the sequences are called -> (query_lens, context_lens).
PREFILLS: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "32/8/128": {"8x2048": ((2048,) * 8,) * 2, "1x16384": ((16384,),) * 2, **_MIX, **_CHUNKS},
    "28/4/128": {"8x2048": ((2048,) * 8,) * 2, "1x16384": ((16384,),) * 2, **_MIX},
    "9/3/64": {"8x2048": ((2048,) * 8,) * 2, "1x16384": ((16384,),) * 2, **_MIX},
    "32/8/64": {"4x512": ((512,) * 4,) * 2, "8x2048": ((2048,) * 8,) * 2},
}
QUICK_HEADS, QUICK_PREFILLS = "32/8/64", ("4x512", "8x2048")
# Heads q/kv/head_dim -> (what the sequences are called, context_lens) of each case.
DECODES: dict[str, dict[str, tuple[int, ...]]] = {
    "28/4/128": {
        "B=1 kv=4096": (4096,), "B=1 kv=8000": (8000,),
        "B=8 kv=1024": (1024,) * 8, "B=8 kv=4096": (4096,) * 8,
        "B=64 kv=1024": (1024,) * 64, "B=64 kv=4096": (4096,) * 64,
        "B=64 kv=mix100-8000": _mixed(100, 8000, 64),
        "B=256 kv=mix100-8000": _mixed(100, 8000, 256), "B=256 kv=100k+255x500": (100_000, *((500,) * 255)),
    },
    "32/8/128": {
        "B=1 kv=8000": (8000,), "B=8 kv=4096": (4096,) * 8, "B=64 kv=4096": (4096,) * 64,
        "B=256 kv=mix100-8000": _mixed(100, 8000, 256),
    },
    "9/3/64": {"B=8 kv=4096": (4096,) * 8, "B=64 kv=mix100-8000": _mixed(100, 8000, 64)},
    "32/8/64": {"B=64 kv=1024": (1024,) * 64},
}  # fmt: skip
QUICK_DECODES = ("B=8 kv=1024", "B=64 kv=1024")


def _pick(source: Params, *names: str) -> Params:
    return {name: source[name] for name in names}


def _by_tokens(quick: bool, *sizes: str, **more: Any) -> dict[str, Params]:
    return {
        f"{model} T={tokens}": {"num_tokens": tokens, **_pick(MODELS[model], *sizes), **more}
        for model in (QUICK_MODELS if quick else MODELS)
        for tokens in (QUICK_TOKENS if quick else TOKENS)
    }


def _gemm(quick: bool) -> dict[str, Params]:
    plain = {
        f"M={m} N={n} K={k}": {"m": m, "n": n, "k": k, "bias": False, "residual": False}
        for n, k in GEMM_NK
        for m in (QUICK_M if quick else GEMM_FEW_M + GEMM_MANY_M)
    }
    added = {
        f"M={m} N={n} K={k} residual": {"m": m, "n": n, "k": k, "bias": False, "residual": True}
        for n, k in RESIDUAL_NK
        for m in RESIDUAL_M
    }
    return plain if quick else plain | added


def _gemm_silu_mul(quick: bool) -> dict[str, Params]:
    sizes = {model: (2 * c["intermediate_size"], c["hidden_size"]) for model, c in MODELS.items()}
    return {
        f"{model} M={m} N={n} K={k}": {"m": m, "n": n, "k": k}
        for model, (n, k) in sizes.items()
        for m in GATED_M
        if not quick or (model in QUICK_MODELS and m == QUICK_GATED_M)
    }


def _store_kv(quick: bool) -> dict[str, Params]:
    """The cache is wider than L2, so that rows are new to it."""
    cases = _by_tokens(quick, "num_kv_heads", "head_dim", block_size=BLOCK_SIZE)
    for params in cases.values():
        page_bytes = 2 * 2 * params["num_kv_heads"] * params["head_dim"] * BLOCK_SIZE
        params["num_blocks"] = max(2 * params["num_tokens"] // BLOCK_SIZE, COLD_BYTES // page_bytes)
    return cases


def _rope_store_kv(quick: bool) -> dict[str, Params]:
    cases = _by_tokens(quick, "num_q_heads", "num_kv_heads", "head_dim", max_pos=MAX_POS)
    return {name: {**params, **_store_kv(quick)[name]} for name, params in cases.items()}


def _prefill(quick: bool) -> dict[str, Params]:
    cases = {}
    for heads, batches in PREFILLS.items():
        num_q_heads, num_kv_heads, head_dim = map(int, heads.split("/"))
        for name, (query_lens, context_lens) in batches.items():
            if not quick or (heads == QUICK_HEADS and name in QUICK_PREFILLS):
                cases[f"{heads} {name}"] = {
                    "num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
                    "block_size": BLOCK_SIZE, "query_lens": query_lens, "context_lens": context_lens,
                }  # fmt: skip
    return cases


def _decode(quick: bool) -> dict[str, Params]:
    cases = {}
    for heads, batches in DECODES.items():
        num_q_heads, num_kv_heads, head_dim = map(int, heads.split("/"))
        for name, context_lens in batches.items():
            if not quick or name in QUICK_DECODES:
                cases[f"{heads} {name}"] = {
                    "num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
                    "block_size": BLOCK_SIZE, "context_lens": context_lens,
                }  # fmt: skip
    return cases


def _lm_head(quick: bool) -> dict[str, Params]:
    return {
        f"{model} R={rows}": {
            "num_rows": rows, "num_tokens": 4 * rows, **_pick(MODELS[model], "vocab_size", "hidden_size"),
        }
        for model in (QUICK_MODELS if quick else MODELS)
        for rows in ((64,) if quick else HEAD_ROWS)
    }  # fmt: skip


# Temperature, top-k, top-p. The logits are normal, of standard deviation 4: at T=2 a
# nucleus of 0.95 holds a large part of the vocabulary, as no trained model's does.
SAMPLES: dict[str, tuple[float, int, float]] = {
    "greedy": (0.0, 0, 1.0), "T=0.7": (0.7, 0, 1.0), "T=0.7 k=20 p=0.8": (0.7, 20, 0.8),
    "T=1 p=0.95": (1.0, 0, 0.95), "T=2 p=0.95": (2.0, 0, 0.95),
}  # fmt: skip


def _sample(quick: bool) -> dict[str, Params]:
    return {
        f"{model} R={rows} {kind}": {
            "vocab_size": MODELS[model]["vocab_size"], "temperatures": (temperature,) * rows,
            "top_ks": (top_k,) * rows, "top_ps": (top_p,) * rows,
        }
        for model in (QUICK_MODELS if quick else MODELS)
        for rows in ((64,) if quick else (1, 64, 256))
        for kind, (temperature, top_k, top_p) in SAMPLES.items()
    }  # fmt: skip


_CASES = {
    "embedding": lambda quick: _by_tokens(quick, "hidden_size", "vocab_size"),
    "rms_norm": lambda quick: _by_tokens(quick, "hidden_size", residual=True),
    "gemm": _gemm,
    "qk_norm": lambda quick: {
        f"qwen3-8b T={tokens}": {"num_tokens": tokens, "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
        for tokens in (QUICK_TOKENS if quick else TOKENS)
    },
    "rope": lambda quick: _by_tokens(quick, "num_q_heads", "num_kv_heads", "head_dim", max_pos=MAX_POS),
    "store_kv": _store_kv,
    "rope_store_kv": _rope_store_kv,
    "prefill_attention": _prefill,
    "decode_attention": _decode,
    "silu_mul": lambda quick: _by_tokens(quick, "intermediate_size"),
    "gemm_silu_mul": _gemm_silu_mul,
    "lm_head": _lm_head,
    "sample": _sample,
}


def bench_cases(op: str, quick: bool = False, text: str = "") -> dict[str, Params]:
    """Parameters by name: the op's grid, its quick part, or what of them contains `text` or, of a text like
    "M=1 |M=2 ", one of its parts (maybe nothing)."""
    parts = text.split("|")
    return {name: params for name, params in _CASES[op](quick).items() if any(part in name for part in parts)}


def rungs_worth(op: str, params: Params, rungs: Sequence[str], named: Sequence[str] = ()) -> list[str]:
    """Of the rungs of a gemm case, those whose time it is worth; of other ops all. named: asked for.

    gemv has one token only. Up to 384 tokens plain tells nothing that a larger case does not; beside hopper,
    mma_sync is measured on the M of MMA_M. unconstrained decode attention has batches of one length alone: on
    mixed lengths it read an illegal address on an H100, which is not explained (notebooks/LOG.md).
    """
    if op == "decode_attention" and len(set(params["context_lens"])) > 1:
        return [rung for rung in rungs if rung != "unconstrained"]
    if op != "gemm":
        return list(rungs)
    m = params["m"]
    skipped = {
        "gemv": m != 1,
        "plain": m <= GEMM_FEW_M[-1] and "plain" not in named,
        "mma_sync": m not in MMA_M and "hopper" in rungs,
    }
    return [rung for rung in rungs if not skipped.get(rung)]
