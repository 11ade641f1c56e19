"""torch's attentions as baselines, on keys and values that are taken from the pages before (which costs torch
nothing here): SDPA by cuDNN, SDPA by flash, and varlen on packed rows. The quickest that is right is a case's
baseline.

Knows: torch's functions, layouts and masks. Refuses to know: our kernels, how a baseline is timed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kernels_numba.bench.bound import Bound, Tensors
from kernels_numba.bench.cases import Params
from kernels_numba.bench.errors import disagreement
from kernels_numba.inputs import Call

Sequences = list[tuple[Any, Any, Any]]  # q[Hq, rows, D], k and v[Hkv, keys, D] of each sequence
MANY_SHAPES = 8  # cuDNN makes a plan for each shape that it meets: minutes for 64 lengths
TRIES = 3

_QUICKEST: dict[Any, str] = {}  # case -> the way that was quickest when it was first bound; "": none is right


def _sequences(t: Tensors, query_lens: Sequence[int], contexts: Sequence[int], page: int) -> Sequences:
    table, ends = t["block_table"].tolist(), np.cumsum(query_lens).tolist()
    found = []
    for seq, (end, length, context) in enumerate(zip(ends, query_lens, contexts, strict=True)):
        pages = table[seq][: -(-context // page)]
        k, v = (t[name][pages].transpose(0, 1).flatten(1, 2)[:, :context] for name in ("k_cache", "v_cache"))
        found.append((t["q"][end - length : end].transpose(0, 1), k, v))
    return found


def _sdpa(torch: Any, sequences: Sequences, scale: float, backend: Any = None) -> Bound:
    """One call for sequences of one shape, else one a sequence. torch's is_causal lets row i see the keys 0
    to i; a chunk behind a context sees more, which is a bias of its own."""
    shapes = {(q.shape[1], k.shape[1]) for q, k, _ in sequences}
    if len(shapes) == 1:
        calls = [tuple(torch.stack(part) for part in zip(*sequences, strict=True))]
    else:
        calls = [tuple(x[None].contiguous() for x in one) for one in sequences]
    from torch.nn.attention import sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    attend, ready = torch.nn.functional.scaled_dot_product_attention, []
    for q, k, v in calls:
        how: dict[str, Any] = {"scale": scale, "enable_gqa": True}
        if q.shape[2] == k.shape[2]:
            how["is_causal"] = q.shape[2] > 1
        elif q.shape[2] > 1:
            how["attn_mask"] = causal_lower_right(q.shape[2], k.shape[2])
        ready.append((q, k, v, how))

    def run() -> Any:
        return [attend(q, k, v, **how) for q, k, v, how in ready]

    def inside() -> Any:
        with sdpa_kernel(backend):
            return run()

    def outputs(results: Any) -> list[Any]:
        return [torch.cat([result.transpose(1, 2).flatten(0, 1) for result in results])]

    name = "SDPA, no pages" + ("" if len(shapes) == 1 else ", a call a sequence")
    return Bound(name, inside if backend is not None else run, outputs)


def _varlen(torch: Any, q: Any, sequences: Sequences, scale: float) -> Bound:
    """All sequences in one call. Its last rows see all keys. ImportError before torch 2.10; argument names
    changed after it."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    how: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    how |= {name: value for name, value in (("scale", scale), ("enable_gqa", True)) if name in known}
    k, v = (torch.cat([one[which].transpose(0, 1) for one in sequences]).contiguous() for which in (1, 2))
    lens = [[one[which].shape[1] for one in sequences] for which in (0, 1)]
    ends = [torch.tensor([0, *np.cumsum(x).tolist()], dtype=torch.int32, device=q.device) for x in lens]

    def run() -> Any:
        return varlen_attn(q, k, v, *ends, max(lens[0]), max(lens[1]), **how)

    return Bound("varlen, no pages", run)


def _is_right(torch: Any, out: Any, sequences: Sequences, scale: float) -> bool:
    """Whether the first and last row of the first and last sequence agree with a float32 softmax: a mask that
    is aligned otherwise is seen there."""
    ends = np.cumsum([q.shape[1] for q, _, _ in sequences]).tolist()
    for which in {0, len(sequences) - 1}:
        q, k, v = (x.float() for x in sequences[which])
        rows, keys = q.shape[1], k.shape[1]
        for row in {0, rows - 1}:
            seen = keys - rows + row + 1
            k_seen, v_seen = (x[:, :seen].repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
            weights = torch.softmax(scale * torch.einsum("hd,hnd->hn", q[:, row], k_seen), dim=-1)
            exact = torch.einsum("hn,hnd->hd", weights, v_seen)
            if not disagreement(out[ends[which] - rows + row].float(), exact) <= 1:
                return False
    return True


def _time(torch: Any, bound: Bound, sequences: Sequences, scale: float) -> float:
    """Milliseconds of TRIES calls after a first one; inf for a wrong result."""
    [out] = bound.outputs(bound.run())
    if not _is_right(torch, out, sequences, scale):
        return float("inf")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(TRIES):
        bound.run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _quickest(
    torch: Any, case: Any, ways: dict[str, Callable[[], Bound]], sequences: Sequences, scale: float
) -> Bound | None:
    """The way that was quickest on this case; one that refuses it, or is wrong, is left out. None without
    any."""
    if case not in _QUICKEST:
        times = {}
        for name, make in ways.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of backends that say why they refuse
                    times[name] = _time(torch, make(), sequences, scale)
            except Exception:  # each way has its own words for "no kernel for this"
                continue
        right = {name: time for name, time in times.items() if time < float("inf")}
        _QUICKEST[case] = min(right, key=lambda name: right[name]) if right else ""
    name = _QUICKEST[case]
    if not name:
        return None
    bound = ways[name]()
    return Bound(bound.name.replace("SDPA", name), bound.run, bound.outputs)


def attention(torch: Any, t: Tensors, call: Call, c: Params) -> Bound | None:
    """The baseline of both attentions. Of decodes of few lengths, and on a CPU, what torch picks by itself;
    None for a sequence without keys, for a chunk behind a context on a CPU, and where no way is right."""
    contexts = c["context_lens"]
    query_lens = c.get("query_lens", (1,) * len(contexts))
    pairs = set(zip(query_lens, contexts, strict=True))
    if not contexts or 0 in contexts or 0 in query_lens or c.get("window") is not None:
        return None
    scale, q = call.kwargs["softmax_scale"], t["q"]
    sequences = _sequences(t, query_lens, contexts, c["block_size"])
    decodes = call.op != "prefill_attention"
    if not q.is_cuda or (decodes and len(pairs) <= MANY_SHAPES):
        chunks = any(length not in (1, context) for length, context in pairs)
        return None if chunks else _sdpa(torch, sequences, scale)
    from torch.nn.attention import SDPBackend as kinds

    ways: dict[str, Callable[[], Bound]] = {
        "SDPA flash": lambda: _sdpa(torch, sequences, scale, kinds.FLASH_ATTENTION),
        "varlen": lambda: _varlen(torch, q, sequences, scale),
    }
    if len(pairs) <= MANY_SHAPES:
        ways["SDPA cuDNN"] = lambda: _sdpa(torch, sequences, scale, kinds.CUDNN_ATTENTION)
    return _quickest(torch, (query_lens, contexts, q.shape, t["k_cache"].shape[1]), ways, sequences, scale)
