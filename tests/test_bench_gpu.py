"""The bench harness on a GPU: one tiny case of each op beside torch, captured graphs, rows."""

from __future__ import annotations

import functools

import pytest

from kernels_numba.bench import contest, data, timing
from kernels_numba.ops import OPS

pytestmark = pytest.mark.gpu

HEADS = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 64, "block_size": 64}
TINY = [
    ("embedding", {"num_tokens": 70, "hidden_size": 256, "vocab_size": 1000}),
    ("rms_norm", {"num_tokens": 70, "hidden_size": 256, "residual": True}),
    ("gemm", {"m": 70, "n": 96, "k": 64, "bias": False}),
    ("qk_norm", {"num_tokens": 70, "num_q_heads": 6, "num_kv_heads": 2, "head_dim": 64}),
    ("rope", {"num_tokens": 70, "num_q_heads": 6, "num_kv_heads": 2, "head_dim": 64, "max_pos": 512}),
    ("store_kv", {"num_tokens": 70, "num_kv_heads": 2, "head_dim": 64, "num_blocks": 9, "block_size": 64}),
    ("prefill_attention", {**HEADS, "query_lens": (70, 70), "context_lens": (70, 70)}),
    ("prefill_attention", {**HEADS, "query_lens": (70, 33), "context_lens": (70, 33)}),
    ("prefill_attention", {**HEADS, "query_lens": (33,), "context_lens": (70,)}),
    ("decode_attention", {**HEADS, "context_lens": (70, 70)}),
    ("decode_attention", {**HEADS, "context_lens": (70, 133)}),
    ("silu_mul", {"num_tokens": 70, "intermediate_size": 256}),
    ("lm_head", {"num_rows": 9, "num_tokens": 70, "vocab_size": 1000, "hidden_size": 256}),
    ("sample", {"vocab_size": 1000, "temperatures": (0.0,) * 9}),
    ("sample", {"vocab_size": 1000, "temperatures": (0.7,) * 9}),
]
NO_TWIN = {"sample": (0.7,) * 9}


@pytest.fixture
def gpu(on_gpu):
    if not on_gpu:
        pytest.skip("runs under --device=cuda only")
    from sharp import bench

    return bench.gpu_here()


@pytest.fixture
def few_sets(monkeypatch):
    """Cold as far as 40 sets go: tiny cases would take thousands."""
    monkeypatch.setattr(timing, "MAX_SETS", 40)


def against():
    from sharp.bench import torch_is_here

    return "torch" if torch_is_here() else "none"


@pytest.mark.parametrize(("op", "params"), TINY)
@pytest.mark.parametrize("cold", [True, False])
def test_an_op_through_the_harness(gpu, few_sets, op, params, cold):
    from kernels_numba.bench import peers
    from kernels_numba.bench.gpu import runs_on
    from sharp import bench_ops, results

    rungs = [name for name in OPS[op].rungs if name != "reference" and runs_on(name, gpu.capability)]
    outcome = contest.measure(
        op, params, {name: OPS[op].rungs[name] for name in rungs}, against=against(), rounds=5, cold=cold,
        sustained=not cold,
    )  # fmt: skip
    assert outcome.refused == {}
    none = op in NO_TWIN and NO_TWIN[op] in params.values()
    if against() == "torch":
        assert (outcome.baseline == contest.NO_TWIN) == none
    timed = set(rungs) | ({contest.BASELINE} if against() == "torch" and not none else set())
    assert set(outcome.measured) == timed
    for name, one in outcome.measured.items():
        assert 0 < one.low <= one.us <= one.high < 1e5, name
        assert one.err <= 1
        assert one.sets == (40 if cold else 1)
    if not cold:
        assert outcome.sustained.keys() >= set(rungs)
        assert all(one.calls >= timing.SUSTAINED_CALLS for one in outcome.sustained.values())
    options = bench_ops.Options(5, cold, not cold, against(), "0123abc")
    item = bench_ops.Item(op, "tiny", params, tuple(rungs))
    from kernels_numba.bench.ops import BENCH_OPS

    cost = BENCH_OPS[op].cost(params)
    for rung in rungs:
        for row in bench_ops.make_rows(item, rung, outcome, cost, options, gpu):
            assert set(row) == set(results.FIELDS)
            assert row["us"] > 0
            assert (row["roofline"] is None) == (peers.datasheet(gpu.name) is None)
            print(results.format_row(row))


def test_a_wrong_kernel_is_refused(gpu):
    def wrong(stream=None, **arguments):
        OPS["silu_mul"].rungs["plain"](**arguments, stream=stream)
        data.poison(arguments["out"])

    params = {"num_tokens": 70, "intermediate_size": 256}
    contenders = {"wrong": wrong, "plain": OPS["silu_mul"].rungs["plain"]}
    outcome = contest.measure("silu_mul", params, contenders, against="none", rounds=5, cold=False)
    assert "inf times the tolerance" in outcome.refused["wrong"]
    assert list(outcome.measured) == ["plain"]


def test_a_sweep_over_configurations(gpu):
    """As tuning calls it: several contenders of one kind, in turns with the baseline."""
    if gpu.capability != (9, 0):
        pytest.skip("needs compute capability 9.0")
    from kernels_numba.ops.gemm import hopper

    contenders = {
        str(config): functools.partial(hopper.gemm_hopper, config=config) for config in hopper.CONFIGS[-2:]
    }
    params = {"m": 512, "n": 1024, "k": 512, "bias": False}
    outcome = contest.measure("gemm", params, contenders, against=against(), rounds=5)
    assert outcome.refused == {}
    assert set(contenders) <= set(outcome.measured)
    assert outcome.l2 == "cold L2"


def test_a_failure_while_capturing_leaves_the_stream_usable(gpu):
    from kernels_numba.bench.gpu import DriverLane

    lane = DriverLane()

    def broken():
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        lane.capture(broken)
    array = data.Maker(0, {}).normal(4096, dtype="float32")
    kernel = data.make_fill_kernel()

    def fill():
        kernel[16, 256, lane.stream](array, data.np.float32(3))

    fill()
    replay = lane.capture(fill)
    assert lane.elapsed_us(replay) > 0
    assert (array.copy_to_host() == 3).all()
    lane.release()


def test_a_copy_moves_what_memory_does(gpu):
    """Between a GPU that is ten years old and three times an H200's 4.8 TB/s."""
    from kernels_numba.bench.gpu import copy_gbs

    found = copy_gbs(rounds=3)
    print(f"{found:.0f} GB/s")
    assert 100 < found < 15_000


def test_random_numbers_on_the_device(gpu):
    array = data.Maker(3, {}).normal(1000, 1000, scale=2.0, dtype="float32").copy_to_host()
    assert abs(array.mean()) < 0.02
    assert abs(array.std() - 2) < 0.02
    assert len(data.np.unique(array)) > 500_000
