"""Random arguments for a named case of an op: shared by tests, tuning and bench.

Knows: how each op's arguments hang together, and where traps belong (outputs, padding, unused pages and page
tails hold NaN). Refuses to know: rungs, devices, tolerances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from kernels_numba.ops import OPS

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HOST_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}
LARGEST_SCORE = 4.0  # of some ten thousand standard normal ones
FIXED = frozenset({"cos_sin", "logits", "temperatures", "top_ps"})  # float32 whatever the element type


@dataclass(frozen=True)
class Cut:
    """Heads [start, stop) of a packed buffer[T, heads, D]: a view whose rows are wider than they look."""

    buffer: str
    start: int
    stop: int


@dataclass
class Call:
    """One call of an op. args: launcher arguments in order, arrays or Cuts of `buffers`; outputs: names
    written."""

    op: str
    args: dict[str, Any]
    outputs: tuple[str, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, Any] = field(default_factory=dict)
    fixed: frozenset[str] = FIXED
    terms: int = 1  # length of the longest sum behind one output element

    def cast(self, convert: Callable[[str, Any], Any]) -> Call:
        """A copy whose float arrays of the element type went through convert(name, array); others are
        copied."""

        def one(name: str, value: Any) -> Any:
            if not isinstance(value, np.ndarray):
                return value
            floating = value.dtype.kind == "f" or value.dtype == BFLOAT16
            return convert(name, value) if floating and name not in self.fixed else value.copy()

        return Call(
            self.op,
            {name: one(name, value) for name, value in self.args.items()},
            self.outputs,
            dict(self.kwargs),
            {name: one(name, value) for name, value in self.buffers.items()},
            self.fixed,
            self.terms,
        )

    def to_dtype(self, dtype: str) -> Call:
        """Elements rounded to "float32" or "bfloat16" (ml_dtypes)."""
        return self.cast(lambda _, array: array.astype(HOST_DTYPES[dtype]))

    def to_float64(self) -> Call:
        """Every float array, the fixed ones too, as float64: the definition then computes the truth."""
        call = self.cast(lambda _, array: array.astype(np.float64))
        for name in call.fixed & set(call.args):
            if call.args[name].dtype.kind == "f":
                call.args[name] = call.args[name].astype(np.float64)
        return call

    def resolved(self, buffers: dict[str, Any] | None = None) -> dict[str, Any]:
        """args with every Cut replaced by its view."""
        held = self.buffers if buffers is None else buffers
        return {
            name: held[value.buffer][:, value.start : value.stop] if isinstance(value, Cut) else value
            for name, value in self.args.items()
        }

    def spec(self) -> dict[str, Any]:
        """What the op's definition says the outputs become."""
        function = getattr(OPS[self.op], f"{self.op}_spec")
        args = self.resolved()
        in_place = self.op in {"rope", "qk_norm", "store_kv", "rope_store_kv"}
        inputs = [value for name, value in args.items() if in_place or name not in self.outputs]
        kwargs = dict(self.kwargs)
        if self.op == "gemm":
            inputs = [args[name] for name in ("x", "weight", "bias") if name in args]
            kwargs["residual"] = args.get("residual")
        if self.op == "rms_norm":
            inputs = [args["x"], args["weight"]]
            kwargs["residual"] = args.get("residual")
        result = function(*inputs, **kwargs)
        return dict(zip(self.outputs, result if isinstance(result, tuple) else (result,), strict=True))


def _normal(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape, dtype=np.float32)


def _blank(*shape: int) -> Any:
    return np.full(shape, np.nan, np.float32)


def _pages(rng: np.random.Generator, lens: Any, query_lens: Any, case: Any) -> tuple[Any, Any, Any]:
    """Caches with NaN wherever no context reaches and before the first row's window, and a block table in
    random page order, -1 padded."""
    block_size, heads, dim = case["block_size"], case["num_kv_heads"], case["head_dim"]
    counts = [-(-int(n) // block_size) for n in lens]
    total = sum(counts) + 2
    order = rng.permutation(total).astype(np.int32)
    table = np.full((len(counts), max([1, *counts]) + 1), -1, np.int32)
    k_cache, v_cache = _blank(total, heads, block_size, dim), _blank(total, heads, block_size, dim)
    used = 0
    for b, count in enumerate(counts):
        table[b, :count] = order[used : used + count]
        for i, page in enumerate(order[used : used + count]):
            rows = min(block_size, int(lens[b]) - i * block_size)
            k_cache[page, :, :rows] = _normal(rng, heads, rows, dim)
            v_cache[page, :, :rows] = _normal(rng, heads, rows, dim)
            if case.get("window"):
                first = int(lens[b]) - query_lens[b] + 1 - case["window"] - i * block_size
                k_cache[page, :, : max(first, 0)] = v_cache[page, :, : max(first, 0)] = np.nan
        used += count
    return k_cache, v_cache, table


def _embedding(rng: np.random.Generator, c: Any) -> Call:
    weight = _normal(rng, c["vocab_size"], c["hidden_size"])
    ids = rng.integers(0, c["vocab_size"], c["num_tokens"]).astype(np.int32)
    out = _blank(c["num_tokens"], c["hidden_size"])
    return Call("embedding", {"out": out, "token_ids": ids, "weight": weight}, ("out",))


def _rms_norm(rng: np.random.Generator, c: Any) -> Call:
    shape = (c["num_tokens"], c["hidden_size"])
    args = {"out": _blank(*shape), "x": _normal(rng, *shape) * 3, "weight": _normal(rng, shape[1])}
    outputs: tuple[str, ...] = ("out",)
    if c["residual"]:
        args["residual"] = _normal(rng, *shape)
        outputs = ("out", "residual")
    return Call("rms_norm", args, outputs, {"eps": 1e-5}, terms=shape[1])


def _gemm(rng: np.random.Generator, c: Any) -> Call:
    args = {
        "out": _blank(c["m"], c["n"]),
        "x": _normal(rng, c["m"], c["k"]),
        "weight": _normal(rng, c["n"], c["k"]),
    }
    if c["bias"]:
        args["bias"] = _normal(rng, c["n"])
    if c.get("residual"):
        args["residual"] = _normal(rng, c["m"], c["n"])
    return Call("gemm", args, ("out",), terms=c["k"])


def _packed(rng: np.random.Generator, rows: int, c: Any) -> tuple[Any, int, int]:
    """A qkv buffer with one NaN head of padding at its end, and where k and v begin."""
    hq, hkv = c["num_q_heads"], c["num_kv_heads"]
    buffer = _normal(rng, rows, hq + 2 * hkv + 1, c["head_dim"])
    buffer[:, -1] = np.nan
    return buffer, hq, hq + hkv


def _rope(rng: np.random.Generator, c: Any) -> Call:
    qkv, k_at, v_at = _packed(rng, c["num_tokens"], c)
    angles = rng.uniform(0, 100, (c["max_pos"], c["head_dim"] // 2))
    cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    positions = rng.integers(0, c["max_pos"], c["num_tokens"]).astype(np.int32)
    args = {"q": Cut("qkv", 0, k_at), "k": Cut("qkv", k_at, v_at), "positions": positions, "cos_sin": cos_sin}
    return Call("rope", args, ("q", "k"), buffers={"qkv": qkv})


def _qk_norm(rng: np.random.Generator, c: Any) -> Call:
    qkv, k_at, v_at = _packed(rng, c["num_tokens"], c)
    weights = {name: _normal(rng, c["head_dim"]) for name in ("q_weight", "k_weight")}
    args = {"q": Cut("qkv", 0, k_at), "k": Cut("qkv", k_at, v_at), **weights}
    return Call("qk_norm", args, ("q", "k"), {"eps": 1e-6}, buffers={"qkv": qkv}, terms=c["head_dim"])


def _store_kv(rng: np.random.Generator, c: Any) -> Call:
    qkv, k_at, v_at = _packed(rng, c["num_tokens"], {**c, "num_q_heads": 1})
    shape = (c["num_blocks"], c["num_kv_heads"], c["block_size"], c["head_dim"])
    slots = rng.permutation(shape[0] * shape[2])[: c["num_tokens"]].astype(np.int32)
    slots[1::4] = -1
    args = {
        "k_cache": _normal(rng, *shape),
        "v_cache": _normal(rng, *shape),
        "k": Cut("qkv", k_at, v_at),
        "v": Cut("qkv", v_at, v_at + c["num_kv_heads"]),
        "slot_mapping": slots,
    }
    return Call("store_kv", args, ("k_cache", "v_cache"), buffers={"qkv": qkv})


def _rope_store_kv(rng: np.random.Generator, c: Any) -> Call:
    turned = _rope(rng, c)
    stored = _store_kv(rng, c)
    k_at = c["num_q_heads"] + c["num_kv_heads"]
    args = {"q": turned.args["q"], "k": turned.args["k"], "v": Cut("qkv", k_at, k_at + c["num_kv_heads"])}
    args |= {name: turned.args[name] for name in ("positions", "cos_sin")}
    args |= {name: stored.args[name] for name in ("k_cache", "v_cache", "slot_mapping")}
    return Call("rope_store_kv", args, ("q", "k", "k_cache", "v_cache"), buffers=turned.buffers)


def _attention(
    rng: np.random.Generator, c: Any, query_lens: Any
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    lens = np.asarray(c["context_lens"], np.int32)
    qkv, k_at, _ = _packed(rng, int(sum(query_lens)), c)
    k_cache, v_cache, table = _pages(rng, lens, query_lens, c)
    out = _blank(qkv.shape[0], k_at, c["head_dim"])
    args = {"out": out, "q": Cut("qkv", 0, k_at), "k_cache": k_cache, "v_cache": v_cache}
    return args, {"qkv": qkv}, (lens, table)


def _attention_terms(c: Any) -> int:
    """The sum that errs as attention does. Its own is over the keys; but a weight errs by its score's error,
    and a score is a sum over head_dim, of up to about LARGEST_SCORE here: (sqrt(keys) + 4 sqrt(D))^2."""
    keys = max([1, *c["context_lens"]])
    return int((math.sqrt(keys) + LARGEST_SCORE * math.sqrt(c["head_dim"])) ** 2)


def _prefill_attention(rng: np.random.Generator, c: Any) -> Call:
    args, buffers, (lens, table) = _attention(rng, c, c["query_lens"])
    cu = np.concatenate([[0], np.cumsum(c["query_lens"])]).astype(np.int32)
    args |= {"cu_seqlens_q": cu, "context_lens": lens, "block_table": table}
    kwargs = {"softmax_scale": c["head_dim"] ** -0.5, "window": c.get("window")}
    return Call("prefill_attention", args, ("out",), kwargs, buffers, terms=_attention_terms(c))


def _decode_attention(rng: np.random.Generator, c: Any) -> Call:
    args, buffers, (lens, table) = _attention(rng, c, [1] * len(c["context_lens"]))
    args |= {"context_lens": lens, "block_table": table}
    kwargs = {"softmax_scale": c["head_dim"] ** -0.5, "window": c.get("window")}
    return Call("decode_attention", args, ("out",), kwargs, buffers, terms=_attention_terms(c))


def _silu_mul(rng: np.random.Generator, c: Any) -> Call:
    shape = (c["num_tokens"], c["intermediate_size"])
    args = {"out": _blank(*shape), "gate_up": _normal(rng, shape[0], 2 * shape[1]) * 4}
    return Call("silu_mul", args, ("out",))


def _gemm_silu_mul(rng: np.random.Generator, c: Any) -> Call:
    m, n, k = c["m"], c["n"], c["k"]
    args = {
        "out": _blank(m, n // 2), "x": _normal(rng, m, k), "weight": _normal(rng, n, k) * (2 * k**-0.5),
        "gate_up": _blank(m, n),
    }  # fmt: skip
    return Call("gemm_silu_mul", args, ("out",), terms=k)


def _lm_head(rng: np.random.Generator, c: Any) -> Call:
    hidden = _normal(rng, c["num_tokens"], c["hidden_size"])
    rows = np.sort(rng.permutation(c["num_tokens"])[: c["num_rows"]]).astype(np.int32)
    hidden[np.setdiff1d(np.arange(c["num_tokens"]), rows)] = np.nan  # rows that nobody asked for
    weight = _normal(rng, c["vocab_size"], c["hidden_size"])
    out = _blank(c["num_rows"], c["vocab_size"])
    args = {"out": out, "hidden": hidden, "weight": weight, "logits_rows": rows}
    return Call("lm_head", args, ("out",), fixed=FIXED | {"out"}, terms=c["hidden_size"])


def _sample(rng: np.random.Generator, c: Any) -> Call:
    rows = len(c["temperatures"])
    args = {
        "out": np.full(rows, -7, np.int32),
        "logits": _normal(rng, rows, c["vocab_size"]) * 4,
        "temperatures": np.asarray(c["temperatures"], np.float32),
        "seeds": rng.integers(0, 2**64, rows, dtype=np.uint64),
        "output_indices": rng.integers(0, 2**31 - 1, rows).astype(np.int32),
        "top_ks": np.asarray(c.get("top_ks", (0,) * rows), np.int32),
        "top_ps": np.asarray(c.get("top_ps", (1.0,) * rows), np.float32),
    }
    return Call("sample", args, ("out",))


_BUILDERS: dict[str, Callable[[np.random.Generator, Any], Call]] = {
    "embedding": _embedding, "rms_norm": _rms_norm, "gemm": _gemm, "qk_norm": _qk_norm, "rope": _rope,
    "store_kv": _store_kv, "rope_store_kv": _rope_store_kv, "prefill_attention": _prefill_attention,
    "decode_attention": _decode_attention, "silu_mul": _silu_mul, "gemm_silu_mul": _gemm_silu_mul,
    "lm_head": _lm_head, "sample": _sample,
}  # fmt: skip


def make_call(op: str, case: str | dict[str, Any], rng: np.random.Generator) -> Call:
    """Arguments for a case of OPS[op].CASES by name, or for case parameters; float32 on the host."""
    return _BUILDERS[op](rng, OPS[op].CASES[case] if isinstance(case, str) else case)
