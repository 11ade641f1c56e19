"""One entry an op: how its arguments are made, what a call costs, and which part of a result is recomputed.

Knows: arguments and definitions. Refuses to know: rungs, times, torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba.bench.cases import Params
from kernels_numba.bench.data import Maker, read, read_pages
from kernels_numba.bench.entry import BenchOp, windows
from kernels_numba.bench.errors import BF16_ROUNDING, FLOAT32_ROUNDING
from kernels_numba.cost import Cost
from kernels_numba.inputs import Call, Cut
from kernels_numba.ops import (
    decode_attention,
    embedding,
    gemm,
    gemm_silu_mul,
    lm_head,
    prefill_attention,
    qk_norm,
    rms_norm,
    rope,
    rope_store_kv,
    sample,
    silu_mul,
    store_kv,
)
from kernels_numba.ops.sample.nucleus import kept_spec

WINDOW_COLUMNS = 1024
TOKEN_BY_TOKEN = 256  # up to here slots are scattered, as of decoding sequences; beyond they come in pages
NEAR_TIE = 1e-4  # scores of sampling: float32 rounding and its logarithms; closer ones are equally right


def _columns(array: Any, length: int) -> Any:
    return np.concatenate([array[:, part] for part in windows(length, WINDOW_COLUMNS)], axis=1)


def _rows(call: Call, name: str, length: int) -> Any:
    return np.concatenate([read(call, name, part) for part in windows(length, WINDOW_COLUMNS)])


def _embedding(m: Maker, c: Params) -> Call:
    weight = m.shared("weight", lambda: m.normal(c["vocab_size"], c["hidden_size"]))
    ids = m.upload(m.rng.integers(0, c["vocab_size"], c["num_tokens"]))
    out = m.blank(c["num_tokens"], c["hidden_size"])
    return Call("embedding", {"out": out, "token_ids": ids, "weight": weight}, ("out",))


def _embedding_excerpt(call: Call, c: Params, rows: slice) -> Call:
    ids = read(call, "token_ids", rows)
    weight = read_pages(call, "weight", ids)
    return Call("embedding", {"token_ids": np.arange(len(ids)), "weight": weight}, ("out",))


def _rms_norm(m: Maker, c: Params) -> Call:
    shape = (c["num_tokens"], c["hidden_size"])
    args = {"out": m.blank(*shape), "x": m.normal(*shape, scale=3), "weight": m.normal(shape[1])}
    if c["residual"]:
        args["residual"] = m.normal(*shape)
    outputs = ("out", "residual") if c["residual"] else ("out",)
    return Call("rms_norm", args, outputs, {"eps": 1e-5})


def _rms_norm_excerpt(call: Call, c: Params, rows: slice) -> Call:
    args = {name: read(call, name, rows) for name in call.args if name in ("x", "residual")}
    return Call("rms_norm", {**args, "weight": read(call, "weight")}, call.outputs, call.kwargs)


def _gemm(m: Maker, c: Params) -> Call:
    rows, n, k = c["m"], c["n"], c["k"]
    args = {"out": m.blank(rows, n), "x": m.normal(rows, k), "weight": m.normal(n, k, scale=k**-0.5)}
    if c["bias"]:
        args["bias"] = m.normal(n)
    if c.get("residual"):
        args["residual"] = m.normal(rows, n)
    return Call("gemm", args, ("out",))


def _gemm_excerpt(call: Call, c: Params, rows: slice) -> Call:
    args = {"x": read(call, "x", rows), "weight": _rows(call, "weight", c["n"])}
    if c["bias"]:
        args["bias"] = _rows(call, "bias", c["n"])
    if c.get("residual"):
        args["residual"] = _columns(read(call, "residual", rows), c["n"])
    return Call("gemm", args, ("out",))


def _qk_norm(m: Maker, c: Params) -> Call:
    hq, hkv, dim = c["num_q_heads"], c["num_kv_heads"], c["head_dim"]
    args = {"q": Cut("qkv", 0, hq), "k": Cut("qkv", hq, hq + hkv)}
    args |= {name: m.normal(dim) for name in ("q_weight", "k_weight")}
    buffers = {"qkv": m.normal(c["num_tokens"], hq + 2 * hkv, dim, scale=3)}
    return Call("qk_norm", args, ("q", "k"), {"eps": 1e-6}, buffers)


def _qk_norm_excerpt(call: Call, c: Params, rows: slice) -> Call:
    args = {name: read(call, name, rows) for name in ("q", "k")}
    args |= {name: read(call, name) for name in ("q_weight", "k_weight")}
    return Call("qk_norm", args, call.outputs, call.kwargs)


def _rope(m: Maker, c: Params) -> Call:
    hq, hkv, dim = c["num_q_heads"], c["num_kv_heads"], c["head_dim"]

    def table() -> Any:
        angles = np.arange(c["max_pos"])[:, None] * 10000.0 ** (-2 / dim * np.arange(dim // 2))
        return m.upload(np.concatenate([np.cos(angles), np.sin(angles)], axis=1), np.float32)

    positions = m.upload(m.rng.integers(0, c["max_pos"], c["num_tokens"]))
    args = {"q": Cut("qkv", 0, hq), "k": Cut("qkv", hq, hq + hkv), "positions": positions,
            "cos_sin": m.shared("cos_sin", table)}  # fmt: skip
    buffers = {"qkv": m.normal(c["num_tokens"], hq + 2 * hkv, dim)}
    return Call("rope", args, ("q", "k"), buffers=buffers)


def _rope_excerpt(call: Call, c: Params, rows: slice) -> Call:
    args = {name: read(call, name, rows) for name in ("q", "k", "positions")}
    return Call("rope", {**args, "cos_sin": read(call, "cos_sin")}, call.outputs)


def _store_kv(m: Maker, c: Params) -> Call:
    """The sets write to slots of their own choice in shared caches."""
    tokens, heads, dim = c["num_tokens"], c["num_kv_heads"], c["head_dim"]
    blocks, size = c["num_blocks"], c["block_size"]
    if tokens <= TOKEN_BY_TOKEN:
        slots = m.rng.choice(blocks * size, tokens, replace=False)
    else:
        pages = m.rng.permutation(blocks)[: -(-tokens // size)]
        slots = (pages[:, None] * size + np.arange(size)).ravel()[:tokens]
    args = {
        name: m.shared(name, lambda: m.normal(blocks, heads, size, dim)) for name in ("k_cache", "v_cache")
    }
    args |= {"k": Cut("qkv", 1, 1 + heads), "v": Cut("qkv", 1 + heads, 1 + 2 * heads),
             "slot_mapping": m.upload(slots)}  # fmt: skip
    return Call(
        "store_kv", args, ("k_cache", "v_cache"), buffers={"qkv": m.normal(tokens, 1 + 2 * heads, dim)}
    )


def _whole(call: Call, c: Params, rows: slice) -> Call:
    return Call(call.op, {name: read(call, name) for name in call.args}, call.outputs)


def _rope_store_kv(m: Maker, c: Params) -> Call:
    turned, stored = _rope(m, c), _store_kv(m, c)
    k_at = c["num_q_heads"] + c["num_kv_heads"]
    args = {"q": turned.args["q"], "k": turned.args["k"], "v": Cut("qkv", k_at, k_at + c["num_kv_heads"])}
    args |= {name: turned.args[name] for name in ("positions", "cos_sin")}
    args |= {name: stored.args[name] for name in ("k_cache", "v_cache", "slot_mapping")}
    return Call("rope_store_kv", args, ("q", "k", "k_cache", "v_cache"), buffers=turned.buffers)


def _attention(m: Maker, op: str, c: Params, query_lens: Any) -> Call:
    hq, hkv, dim, size = c["num_q_heads"], c["num_kv_heads"], c["head_dim"], c["block_size"]
    lens = np.asarray(c["context_lens"], np.int32)
    counts = -(-lens // size)
    total = int(counts.sum()) + 1
    table = np.full((len(lens), int(max([1, *counts]))), -1, np.int32)
    table[np.arange(table.shape[1]) < counts[:, None]] = m.rng.permutation(total)[: total - 1]
    rows = int(sum(query_lens))
    args = {"out": m.blank(rows, hq, dim), "q": Cut("qkv", 0, hq)}
    args |= {name: m.normal(total, hkv, size, dim) for name in ("k_cache", "v_cache")}
    if op == "prefill_attention":
        args["cu_seqlens_q"] = m.upload(np.concatenate([[0], np.cumsum(query_lens)]))
    args |= {"context_lens": m.upload(lens), "block_table": m.upload(table)}
    buffers = {"qkv": m.normal(rows, hq + 2 * hkv, dim)}
    return Call(op, args, ("out",), {"softmax_scale": dim**-0.5}, buffers)


def _attention_excerpt(call: Call, c: Params, rows: slice) -> Call:
    """Rows of a sequence are a chunk of their own, whose context ends with them: the same mathematics."""
    query_lens = c.get("query_lens", (1,) * len(c["context_lens"]))
    ends = np.cumsum(query_lens)
    lens, picked, tables = [], [], []
    caches: dict[str, list[Any]] = {"k_cache": [], "v_cache": []}
    used = 0
    for seq, (end, length) in enumerate(zip(ends.tolist(), query_lens, strict=True)):
        first, last = max(rows.start, end - length), min(rows.stop, end)
        if first < last:
            context = c["context_lens"][seq] - (end - last)
            pages = read(call, "block_table", slice(seq, seq + 1))[0, : -(-context // c["block_size"])]
            for name, held in caches.items():
                held.append(read_pages(call, name, pages))
            tables.append(np.arange(used, used + len(pages)))
            used += len(pages)
            lens.append(context)
            picked.append(last - first)
    table = np.full((len(tables), max(len(pages) for pages in tables)), -1)
    for row, pages in zip(table, tables, strict=True):
        row[: len(pages)] = pages
    args = {"q": read(call, "q", rows), **{name: np.concatenate(held) for name, held in caches.items()},
            "cu_seqlens_q": np.concatenate([[0], np.cumsum(picked)]), "context_lens": np.array(lens),
            "block_table": table}  # fmt: skip
    return Call("prefill_attention", args, ("out",), call.kwargs)


def _prefill_cost(c: Params) -> Cost:
    """The op's, but the two products alone are its work, 4 D a head and pair that the mask lets through: what
    the figures of FlashAttention and of torch count."""
    sizes = c["num_q_heads"], c["num_kv_heads"], c["head_dim"]
    moved = prefill_attention.prefill_attention_cost(c["query_lens"], c["context_lens"], *sizes).bytes
    lens = zip(c["query_lens"], c["context_lens"], strict=True)
    pairs = sum(q * n - q * (q - 1) // 2 for q, n in lens)
    return Cost(moved, 4 * c["head_dim"] * c["num_q_heads"] * pairs)


def _silu_mul(m: Maker, c: Params) -> Call:
    tokens, size = c["num_tokens"], c["intermediate_size"]
    args = {"out": m.blank(tokens, size), "gate_up": m.normal(tokens, 2 * size, scale=4)}
    return Call("silu_mul", args, ("out",))


def _gemm_silu_mul(m: Maker, c: Params) -> Call:
    rows, n, k = c["m"], c["n"], c["k"]
    args = {
        "out": m.blank(rows, n // 2), "x": m.normal(rows, k), "weight": m.normal(n, k, scale=2 * k**-0.5),
        "gate_up": m.blank(rows, n),
    }  # fmt: skip
    return Call("gemm_silu_mul", args, ("out",))


def _gemm_silu_mul_excerpt(call: Call, c: Params, rows: slice) -> Call:
    args = {"x": read(call, "x", rows), "weight": _rows(call, "weight", c["n"])}
    return Call("gemm_silu_mul", args, ("out",))


def _gemm_silu_mul_result(call: Call, c: Params, rows: slice) -> list[Any]:
    """Of each window of gates and ups (multiples of 16: models' sizes are) the columns that they make."""
    out = read(call, "out", rows)
    parts = windows(c["n"], WINDOW_COLUMNS)
    return [np.concatenate([out[:, part.start // 2 : part.stop // 2] for part in parts], axis=1)]


def _lm_head(m: Maker, c: Params) -> Call:
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    rows = np.sort(m.rng.permutation(c["num_tokens"])[: c["num_rows"]])
    args = {
        "out": m.blank(c["num_rows"], vocab, dtype="float32"), "hidden": m.normal(c["num_tokens"], hidden),
        "weight": m.normal(vocab, hidden, scale=hidden**-0.5), "logits_rows": m.upload(rows),
    }  # fmt: skip
    return Call("lm_head", args, ("out",))


def _lm_head_excerpt(call: Call, c: Params, rows: slice) -> Call:
    args = {"hidden": read(call, "hidden"), "weight": _rows(call, "weight", c["vocab_size"]),
            "logits_rows": read(call, "logits_rows", rows)}  # fmt: skip
    return Call("lm_head", args, ("out",))


def _sample(m: Maker, c: Params) -> Call:
    rows = len(c["temperatures"])
    args = {
        "out": m.blank(rows, dtype="int32"),
        "logits": m.normal(rows, c["vocab_size"], scale=4, dtype="float32"),
        "temperatures": m.upload(c["temperatures"], np.float32),
        "seeds": m.upload(m.rng.integers(0, 2**64, rows, dtype=np.uint64), np.uint64),
        "output_indices": m.upload(m.rng.integers(0, 2**31 - 1, rows)),
        "top_ks": m.upload(c.get("top_ks", (0,) * rows)),
        "top_ps": m.upload(c.get("top_ps", (1.0,) * rows), np.float32),
    }
    return Call("sample", args, ("out",))


def _sample_judge(call: Call, results: list[Any], rounding: float) -> float:
    """How far the chosen ids' scores lie under the best, in NEAR_TIEs; inf for an id outside the row."""
    worst = 0.0
    logits = call.args["logits"].astype(np.float64)
    for row, token in enumerate(results[0].tolist()):
        if not 0 <= token < logits.shape[1]:
            return float("inf")
        scores, temperature = logits[row], float(call.args["temperatures"][row])
        if temperature > 0:
            key = (int(call.args["seeds"][row]), int(call.args["output_indices"][row]))
            scores = scores / temperature + sample.gumbel_spec(*key, np.arange(logits.shape[1]))
            top_k, top_p = int(call.args["top_ks"][row]), call.args["top_ps"][row]
            kept = kept_spec(call.args["logits"][row], temperature, top_k, top_p)
            scores[np.setdiff1d(np.arange(len(scores)), kept)] = -np.inf
        worst = max(worst, float(scores.max() - scores[token]) / NEAR_TIE)
    return worst


def _tokens(c: Params) -> int:
    return int(c["num_tokens"])


def _by_rows(op: str, *names: str) -> Callable[[Call, Params, slice], Call]:
    """An excerpt of ops whose inputs all go row by row."""
    return lambda call, c, rows: Call(op, {name: read(call, name, rows) for name in names}, ("out",))


BENCH_OPS: dict[str, BenchOp] = {
    "embedding": BenchOp(
        _embedding, lambda c: embedding.embedding_cost(c["num_tokens"], c["hidden_size"]), _tokens,
        _embedding_excerpt,
    ),
    "rms_norm": BenchOp(
        _rms_norm, lambda c: rms_norm.rms_norm_cost(c["num_tokens"], c["hidden_size"], c["residual"]),
        _tokens, _rms_norm_excerpt,
    ),
    "gemm": BenchOp(
        _gemm,
        lambda c: gemm.gemm_cost(c["m"], c["n"], c["k"], c["bias"], residual=c.get("residual", False)),
        lambda c: int(c["m"]),
        _gemm_excerpt, lambda call, c, rows: [_columns(read(call, "out", rows), c["n"])], unit="TFLOP/s",
    ),
    "qk_norm": BenchOp(
        _qk_norm,
        lambda c: qk_norm.qk_norm_cost(c["num_tokens"], c["num_q_heads"], c["num_kv_heads"], c["head_dim"]),
        _tokens, _qk_norm_excerpt, blank=(),
    ),
    "rope": BenchOp(
        _rope,
        lambda c: rope.rope_cost(c["num_tokens"], c["num_q_heads"], c["num_kv_heads"], c["head_dim"]),
        _tokens, _rope_excerpt, blank=(),
    ),
    "store_kv": BenchOp(
        _store_kv, lambda c: store_kv.store_kv_cost(c["num_tokens"], c["num_kv_heads"], c["head_dim"]),
        lambda c: 1,  # one window: the caches are read whole
        _whole, lambda call, c, rows: [read(call, name) for name in call.outputs], blank=(),
    ),
    "rope_store_kv": BenchOp(
        _rope_store_kv,
        lambda c: rope_store_kv.rope_store_kv_cost(
            c["num_tokens"], c["num_q_heads"], c["num_kv_heads"], c["head_dim"]
        ),
        lambda c: 1, _whole, lambda call, c, rows: [read(call, name) for name in call.outputs], blank=(),
        rounding=4 * BF16_ROUNDING,  # the definition rounds keys, too: beside a tie it may be a unit apart
    ),
    "prefill_attention": BenchOp(
        lambda m, c: _attention(m, "prefill_attention", c, c["query_lens"]),
        _prefill_cost,
        lambda c: int(sum(c["query_lens"])), _attention_excerpt, unit="TFLOP/s",
    ),
    "decode_attention": BenchOp(
        lambda m, c: _attention(m, "decode_attention", c, (1,) * len(c["context_lens"])),
        lambda c: decode_attention.decode_attention_cost(
            c["context_lens"], c["num_q_heads"], c["num_kv_heads"], c["head_dim"]
        ),
        lambda c: len(c["context_lens"]), _attention_excerpt,
    ),
    "silu_mul": BenchOp(
        _silu_mul, lambda c: silu_mul.silu_mul_cost(c["num_tokens"], c["intermediate_size"]), _tokens,
        _by_rows("silu_mul", "gate_up"),
    ),
    "gemm_silu_mul": BenchOp(
        _gemm_silu_mul, lambda c: gemm_silu_mul.gemm_silu_mul_cost(c["m"], c["n"], c["k"]),
        lambda c: int(c["m"]), _gemm_silu_mul_excerpt, _gemm_silu_mul_result, unit="TFLOP/s",
        rounding=3 * BF16_ROUNDING,  # gates and ups are rounded, too
    ),
    "lm_head": BenchOp(
        _lm_head, lambda c: lm_head.lm_head_cost(c["num_rows"], c["vocab_size"], c["hidden_size"]),
        lambda c: int(c["num_rows"]), _lm_head_excerpt,
        lambda call, c, rows: [_columns(read(call, "out", rows), c["vocab_size"])], rounding=FLOAT32_ROUNDING,
    ),
    "sample": BenchOp(
        _sample,
        lambda c: sample.sample_cost(
            len(c["temperatures"]), c["vocab_size"], sum(t > 0 for t in c["temperatures"])
        ),
        lambda c: len(c["temperatures"]),
        _by_rows("sample", "logits", "temperatures", "seeds", "output_indices", "top_ks", "top_ps"),
        judge=_sample_judge,
        dtype="float32",
    ),
}  # fmt: skip
