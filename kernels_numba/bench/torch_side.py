"""The baseline: each op as a user of torch would write it, on our arrays. Imported when asked for.

Knows: torch functions, their streams and graphs. Refuses to know: our kernels, how times become rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels_numba.bench.cases import Params
from kernels_numba.inputs import Call
from kernels_numba.ops.silu_mul import GROUP

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Bound:
    """A baseline tied to its tensors. run(): one call, queued on torch's current stream; outputs(result):
    what it returned, as tensors shaped like the op's outputs."""

    name: str
    run: Callable[[], Any]
    outputs: Callable[[Any], list[Any]] = lambda result: [result]


def _embedding(torch: Any, t: Tensors, call: Call, c: Params) -> Bound:
    ids, weight = t["token_ids"], t["weight"]
    return Bound("F.embedding", lambda: torch.nn.functional.embedding(ids, weight))


def _rms_norm(torch: Any, t: Tensors, call: Call, c: Params) -> Bound:
    norm, x, weight, eps = torch.nn.functional.rms_norm, t["x"], t["weight"], call.kwargs["eps"]
    if "residual" not in t:
        return Bound("F.rms_norm", lambda: norm(x, weight.shape, weight, eps))
    residual = t["residual"]
    return Bound(
        "add_, F.rms_norm",
        lambda: norm(residual.add_(x), weight.shape, weight, eps),
        lambda out: [out, residual],
    )


def _gemm(torch: Any, t: Tensors, call: Call, c: Params) -> Bound:
    x, weight, out = t["x"], t["weight"], t["out"]
    if "bias" in t:
        return Bound("F.linear", lambda: torch.nn.functional.linear(x, weight, t["bias"]))
    return Bound("torch.matmul", lambda: torch.matmul(x, weight.t(), out=out))


def _rope(torch: Any, t: Tensors, call: Call, c: Params) -> Bound:
    """In place, with cosines and sines of the positions gathered and doubled before, as models do once a
    step."""
    q, k, half = t["q"], t["k"], c["head_dim"] // 2
    rows = t["cos_sin"][t["positions"]][:, None, :]
    cos = torch.cat([rows[..., :half]] * 2, dim=-1).to(q.dtype)
    sin = torch.cat([rows[..., half:]] * 2, dim=-1).to(q.dtype)

    def run() -> Any:
        for x in (q, k):
            x.copy_(x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin)
        return q, k

    return Bound("x cos + rotate_half(x) sin", run, list)


def _qk_norm(torch: Any, t: Tensors, call: Call, c: Params) -> Bound:
    q, k, eps, norm = t["q"], t["k"], call.kwargs["eps"], torch.nn.functional.rms_norm

    def run() -> Any:
        for x, weight in ((q, t["q_weight"]), (k, t["k_weight"])):
            x.copy_(norm(x, (c["head_dim"],), weight, eps))
        return q, k

    return Bound("F.rms_norm", run, list)


def _store_kv(torch: Any, t: Tensors, call: Call, c: Params) -> Bound:
    slots, size = t["slot_mapping"].long(), c["block_size"]
    block, offset = slots // size, slots % size

    def run() -> Any:
        t["k_cache"][block, :, offset] = t["k"]
        t["v_cache"][block, :, offset] = t["v"]

    return Bound("index_put_", run, lambda _: [t["k_cache"], t["v_cache"]])


def _rope_store_kv(torch: Any, t: Tensors, call: Call, c: Params) -> Bound:
    turn, store = _rope(torch, t, call, c), _store_kv(torch, t, call, c)

    def run() -> Any:
        turn.run()
        store.run()

    names = ("q", "k", "k_cache", "v_cache")
    return Bound(f"{turn.name}, {store.name}", run, lambda _: [t[name] for name in names])


def _silu_mul(torch: Any, t: Tensors, call: Call, c: Params) -> Bound:
    tokens, out = c["num_tokens"], t["out"]
    pairs = t["gate_up"].view(tokens, -1, 2, GROUP)
    gate, up, target = pairs[:, :, 0], pairs[:, :, 1], out.view(tokens, -1, GROUP)
    silu = torch.nn.functional.silu
    return Bound("F.silu, mul", lambda: torch.mul(silu(gate), up, out=target), lambda _: [out])


def _gemm_silu_mul(torch: Any, t: Tensors, call: Call, c: Params) -> Bound:
    """On weights that lie as torch likes them: all gates, then all ups (rearranged before)."""
    x, gate_up, out, silu = t["x"], t["gate_up"], t["out"], torch.nn.functional.silu
    rows = t["weight"].view(-1, 2, GROUP, c["k"])
    weight = torch.cat([rows[:, 0].reshape(-1, c["k"]), rows[:, 1].reshape(-1, c["k"])]).t()
    gate, up = gate_up.chunk(2, dim=1)

    def run() -> Any:
        torch.matmul(x, weight, out=gate_up)
        return torch.mul(silu(gate), up, out=out)

    return Bound("torch.matmul, F.silu, mul", run, lambda _: [out])


def _lm_head(torch: Any, t: Tensors, call: Call, c: Params) -> Bound:
    """The product alone: the rows are gathered before, and the logits stay bfloat16."""
    rows, weight = t["hidden"].index_select(0, t["logits_rows"]), t["weight"].T
    out = torch.empty(rows.shape[0], weight.shape[1], dtype=rows.dtype, device=rows.device)
    name = "torch.matmul, rows gathered before, bfloat16 logits"
    return Bound(name, lambda: torch.matmul(rows, weight, out=out))


def _sample(torch: Any, t: Tensors, call: Call, c: Params) -> Bound | None:
    if any(value > 0 for value in c["temperatures"]):
        return None  # multinomial draws other numbers: nothing to compare
    return Bound("argmax", lambda: torch.argmax(t["logits"], dim=-1))


_QUICKEST: dict[Any, str] = {}  # case -> the backend that was quickest when it was first bound


def _quickest(
    torch: Any, case: Any, run: Callable[[], Any], among: tuple[str, ...] = ("cuDNN", "flash")
) -> tuple[str, Callable[[], Any]]:
    """(its name, run with it) of SDPA's backends, each tried four times and timed without its first. A
    backend that refuses the case is left out; if all do, torch picks."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def with_backend(kind: Any) -> Callable[[], Any]:
        def inside() -> Any:
            with sdpa_kernel(kind):
                return run()

        return inside

    kinds = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    ways = {name: with_backend(kinds[name]) for name in among}
    if case not in _QUICKEST:
        times = {}
        for name, way in ways.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            try:
                way()
                start.record()
                for _ in range(3):
                    way()
                end.record()
                end.synchronize()
                times[name] = start.elapsed_time(end)
            except RuntimeError:  # torch's word for "no kernel for this"
                continue
        _QUICKEST[case] = min(times, key=lambda name: times[name]) if times else ""
    chosen = _QUICKEST[case]
    return chosen, ways.get(chosen, run)


def _attention(torch: Any, t: Tensors, call: Call, c: Params) -> Bound | None:
    """scaled_dot_product_attention on contiguous keys and values, taken from the pages before (which costs
    torch nothing here); one call for sequences of one shape, else one a sequence. None for a chunk behind a
    context: with grouped heads, torch has no fast kernel for that mask. The quickest backend; of decodes of
    many lengths flash, because cuDNN would make a plan for each length."""
    contexts = c["context_lens"]
    query_lens = c.get("query_lens", (1,) * len(contexts))
    pairs = set(zip(query_lens, contexts, strict=True))
    if not contexts or any(length != 1 and length != context for length, context in pairs) or 0 in contexts:
        return None
    together = len(pairs) == 1
    table, ends = t["block_table"].tolist(), np.cumsum(query_lens).tolist()
    groups = []
    for seq, (end, length, context) in enumerate(zip(ends, query_lens, contexts, strict=True)):
        pages = table[seq][: -(-context // c["block_size"])]
        kv = [t[name][pages].transpose(0, 1).flatten(1, 2)[:, :context] for name in ("k_cache", "v_cache")]
        groups.append((t["q"][end - length : end].transpose(0, 1), *kv))
    stacked = [torch.stack(part) for part in zip(*groups, strict=True)] if together else []
    calls = [tuple(stacked)] if together else [tuple(x[None].contiguous() for x in group) for group in groups]
    attend, scale = torch.nn.functional.scaled_dot_product_attention, call.kwargs["softmax_scale"]

    def run() -> Any:
        return [attend(q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=True) for q, k, v in calls]

    def outputs(results: Any) -> list[Any]:
        return [torch.cat([result.transpose(1, 2).flatten(0, 1) for result in results])]

    name, chosen = "SDPA", run
    if t["q"].is_cuda:
        among = ("cuDNN", "flash") if together or call.op == "prefill_attention" else ("flash",)
        case = (call.op, query_lens, contexts, t["q"].shape, t["k_cache"].shape[1])
        word, chosen = _quickest(torch, case, run, among)
        name += f" {word}" if word else ""
    return Bound(f"{name}, no pages" + ("" if together else ", a call a sequence"), chosen, outputs)


BINDS: dict[str, Callable[[Any, Tensors, Call, Params], Bound | None]] = {
    "embedding": _embedding, "rms_norm": _rms_norm, "gemm": _gemm, "rope": _rope, "store_kv": _store_kv,
    "rope_store_kv": _rope_store_kv, "qk_norm": _qk_norm, "prefill_attention": _attention,
    "decode_attention": _attention, "silu_mul": _silu_mul, "gemm_silu_mul": _gemm_silu_mul,
    "lm_head": _lm_head, "sample": _sample,
}  # fmt: skip


class _Interface:
    """A device array as torch may take it: bfloat16 bits as int16, which every version of torch knows."""

    def __init__(self, array: Any) -> None:
        self.array = array  # keeps the memory
        given = array.__cuda_array_interface__
        kept = {name: given[name] for name in ("shape", "strides", "data")}
        typestr = "<i2" if given["typestr"] == "<u2" else given["typestr"]
        self.__cuda_array_interface__ = {**kept, "typestr": typestr, "version": 2}


class TorchSide:
    """torch on the device of ours: tensors that share memory, one stream, captured graphs (a timing.Lane)."""

    cold_bytes = 0  # it takes the sets that our lane asked for

    def __init__(self) -> None:
        """ImportError without torch; RuntimeError where torch cannot use a GPU."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own imports, which say nothing about us
            import torch

        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU, measure without a baseline")
        self.torch, self.stream = torch, torch.cuda.Stream()

    def tensors(self, call: Call) -> Tensors:
        """The arguments of a call as tensors over the same memory (seeds left out)."""
        tensors = {}
        for name, array in call.resolved().items():
            if array.dtype != np.uint64:
                tensor = self.torch.as_tensor(_Interface(array), device="cuda")
                tensors[name] = tensor.view(self.torch.bfloat16) if array.dtype == np.uint16 else tensor
        return tensors

    def bind(self, call: Call, params: Params, *, copies: bool = False) -> Bound | None:
        """The op's baseline on a call's memory, or on copies of it; None where torch has no counterpart."""
        tensors = self.tensors(call)
        if copies:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        bound = BINDS[call.op](self.torch, tensors, call, params)
        self.torch.cuda.synchronize()
        return bound

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """See timing.Lane."""
        torch = self.torch
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            work()
        return lambda: self.queue(graph.replay)

    def elapsed_us(self, work: Callable[[], Any]) -> float:
        """See timing.Lane."""
        self.torch.cuda.synchronize()
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self.stream)
        work()
        end.record(self.stream)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    def queue(self, work: Callable[[], Any]) -> Any:
        """Run `work` with our stream as torch's current one."""
        with self.torch.cuda.stream(self.stream):
            return work()

    def eager(self, work: Callable[[], Any]) -> Any:
        """queue, and wait."""
        self.torch.cuda.synchronize()
        result = self.queue(work)
        self.torch.cuda.synchronize()
        return result

    def release(self) -> None:
        """Give cached memory back: the arrays of the next case need it."""
        self.torch.cuda.empty_cache()
