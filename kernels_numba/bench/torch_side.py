"""The baseline: each op as a user of torch would write it, on our arrays. Imported when asked for.

Knows: torch functions, their streams and graphs. Refuses to know: our kernels, how times become rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba.bench.bound import Bound, Tensors
from kernels_numba.bench.cases import Params
from kernels_numba.bench.torch_attention import attention
from kernels_numba.inputs import Call
from kernels_numba.ops.silu_mul import GROUP


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
    if "residual" in t:
        residual, bias = t["residual"], t.get("bias")

        def run() -> Any:
            if bias is None:
                return torch.matmul(x, weight.t(), out=out).add_(residual)
            return torch.nn.functional.linear(x, weight, bias).add_(residual)

        return Bound("torch.matmul, add_" if bias is None else "F.linear, add_", run)
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
    """The product alone: the rows are gathered before. The logits are float32, as ours are, where torch can
    write them (torch.mm's out_dtype, on a GPU), and bfloat16, half the bytes, where it cannot."""
    rows, weight = t["hidden"].index_select(0, t["logits_rows"]), t["weight"].T
    try:
        wide = torch.mm(rows, weight, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        out = torch.empty(rows.shape[0], weight.shape[1], dtype=rows.dtype, device=rows.device)
        name = "torch.matmul, rows gathered before, bfloat16 logits"
        return Bound(name, lambda: torch.matmul(rows, weight, out=out))
    name = "torch.mm, rows gathered before, float32 logits"
    return Bound(name, lambda: torch.mm(rows, weight, out_dtype=torch.float32, out=wide))


def _sample(torch: Any, t: Tensors, call: Call, c: Params) -> Bound | None:
    if any(value > 0 for value in c["temperatures"]):
        return None  # multinomial draws other numbers: nothing to compare
    return Bound("argmax", lambda: torch.argmax(t["logits"], dim=-1))


BINDS: dict[str, Callable[[Any, Tensors, Call, Params], Bound | None]] = {
    "embedding": _embedding, "rms_norm": _rms_norm, "gemm": _gemm, "rope": _rope, "store_kv": _store_kv,
    "rope_store_kv": _rope_store_kv, "qk_norm": _qk_norm, "prefill_attention": attention,
    "decode_attention": attention, "silu_mul": _silu_mul, "gemm_silu_mul": _gemm_silu_mul,
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
