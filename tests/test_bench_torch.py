"""The baselines of the bench, on a CPU where torch is installed: right answers, and what they catch."""

from __future__ import annotations

import numpy as np
import pytest
from bench_fakes import Simulated

from kernels_numba.bench import contest, torch_attention
from kernels_numba.bench.bound import Bound
from kernels_numba.bench.torch_side import TorchSide
from kernels_numba.ops import OPS

torch = pytest.importorskip("torch")

HEADS = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 8, "block_size": 4}
CASES = [
    ("embedding", "toy", "F.embedding"),
    ("rms_norm", "toy", "F.rms_norm"),
    ("rms_norm", "toy_residual", "add_, F.rms_norm"),
    ("gemm", "toy_one_row", "torch.matmul"),
    ("gemm", "toy_bias", "F.linear"),
    ("gemm", "toy_residual", "F.linear, add_"),
    ("gemm", "toy_residual_many_rows", "torch.matmul, add_"),
    ("qk_norm", "toy", "F.rms_norm"),
    ("rope", "toy", "x cos + rotate_half(x) sin"),
    ("store_kv", "toy", "index_put_"),
    ("rope_store_kv", "toy", "x cos + rotate_half(x) sin, index_put_"),
    ("prefill_attention", {**HEADS, "query_lens": (5, 5), "context_lens": (5, 5)}, "SDPA, no pages"),
    (
        "prefill_attention",
        {**HEADS, "query_lens": (5, 3), "context_lens": (5, 3)},
        "SDPA, no pages, a call a sequence",
    ),
    ("prefill_attention", {**HEADS, "query_lens": (2,), "context_lens": (5,)}, contest.NO_TWIN),
    ("decode_attention", {**HEADS, "context_lens": (5, 5)}, "SDPA, no pages"),
    ("decode_attention", {**HEADS, "context_lens": (1, 9)}, "SDPA, no pages, a call a sequence"),
    ("decode_attention", {**HEADS, "context_lens": (0, 9)}, contest.NO_TWIN),
    ("silu_mul", "toy", "F.silu, mul"),
    ("gemm_silu_mul", "toy", "torch.matmul, F.silu, mul"),
    ("lm_head", "toy", "torch.matmul, rows gathered before, bfloat16 logits"),
    ("sample", {"vocab_size": 50, "temperatures": (0.0, 0.0)}, "argmax"),
    ("sample", {"vocab_size": 50, "temperatures": (0.0, 1.0)}, contest.NO_TWIN),
]


class HostSide(TorchSide):
    """torch on the memory of numba's simulator, which is the host's."""

    def __init__(self):
        self.torch = torch

    def tensors(self, call):
        tensors = {}
        for name, array in call.resolved().items():
            host = array._ary
            if host.dtype == np.uint16:
                tensors[name] = torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
            elif host.dtype != np.uint64:
                tensors[name] = torch.from_numpy(host)
        return tensors

    def capture(self, work):
        return lambda: None

    def elapsed_us(self, work):
        work()
        return 1e6

    def queue(self, work):
        return work()

    def release(self):
        pass


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def workload(op, case):
    params = OPS[op].CASES[case] if isinstance(case, str) else case
    return contest.Workload(op, params, cold=False, torch=HostSide(), lane=Simulated())


@pytest.mark.parametrize(("op", "case", "name"), CASES)
def test_each_baseline_agrees_with_the_plain_kernel(op, case, name):
    outcome = workload(op, case).compare({"plain": OPS[op].rungs["plain"]}, 5)
    assert outcome.refused == {}
    assert outcome.baseline == name
    timed = ["plain"] if name == contest.NO_TWIN else [contest.BASELINE, "plain"]
    assert list(outcome.measured) == timed


def test_what_is_wrong_outside_the_windows_is_seen_beside_the_baseline():
    """100 rows: the definition is asked about rows 0 to 7, 46 to 53 and 92 to 99."""
    params = {"num_tokens": 100, "hidden_size": 8, "vocab_size": 20}

    def wrong(stream=None, **arguments):
        OPS["embedding"].rungs["plain"](**arguments, stream=stream)
        arguments["out"]._ary[20] = arguments["out"]._ary[21] ^ 0x8000

    bench = workload("embedding", params)
    outcome = bench.compare({"wrong": wrong}, 5)
    assert "times the tolerance from F.embedding, outside the windows" in outcome.refused["wrong"]
    bench = contest.Workload("embedding", params, cold=False, lane=Simulated())
    assert bench.compare({"wrong": wrong}, 5).refused == {}  # why --against none proves less


@pytest.mark.parametrize(
    ("query_lens", "contexts"), [((33,), (170,)), ((33, 20), (170, 20)), ((9, 9), (9, 9))]
)
def test_a_chunk_sees_its_context_and_another_mask_is_noticed(query_lens, contexts):
    """torch's is_causal is aligned to the first key, and so wrong for a chunk: such a way is no baseline."""
    torch.manual_seed(0)
    q = torch.randn(sum(query_lens), 6, 64).bfloat16()
    keys = [[torch.randn(2, n, 64).bfloat16() for _ in range(2)] for n in contexts]
    parts = torch.split(q, query_lens)
    sequences = [(part.transpose(0, 1), k, v) for part, (k, v) in zip(parts, keys, strict=True)]

    def upper_left():
        def run():
            attend = torch.nn.functional.scaled_dot_product_attention
            return [attend(*x, is_causal=True, scale=0.125, enable_gqa=True) for x in sequences]

        return Bound("mine", run, lambda out: [torch.cat([x.transpose(0, 1) for x in out])])

    bound = torch_attention._sdpa(torch, sequences, 0.125)
    [out] = bound.outputs(bound.run())
    assert torch_attention._is_right(torch, out, sequences, 0.125)
    assert not torch_attention._is_right(torch, out * 1.05, sequences, 0.125)
    other = upper_left()
    [out] = other.outputs(other.run())
    assert torch_attention._is_right(torch, out, sequences, 0.125) == (query_lens == contexts)


def test_the_quickest_way_that_is_right_is_the_baseline(monkeypatch):
    times = {"slow": 3.0, "wrong": float("inf"), "quick": 2.0}

    def way(name):
        def make():
            if name not in times:
                raise NotImplementedError("no kernel for this")
            return Bound("SDPA, no pages", lambda: name)

        return make

    monkeypatch.setattr(torch_attention, "_QUICKEST", {})
    monkeypatch.setattr(torch_attention, "_time", lambda torch, bound, *_: times[bound.run()])
    ways = {name: way(name) for name in ("slow", "wrong", "none", "quick")}
    bound = torch_attention._quickest(torch, "a case", ways, [], 1.0)
    assert (bound.name, bound.run()) == ("quick, no pages", "quick")
    assert (
        torch_attention._quickest(torch, "another", {"none": ways["none"], "wrong": ways["wrong"]}, [], 1)
        is None
    )
