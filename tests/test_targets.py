"""Whether measured rows meet the targets of the GEMM and the LM head, by made-up rows."""

from __future__ import annotations

import pytest

from kernels_numba.bench import targets
from kernels_numba.bench.cases import bench_cases
from kernels_numba.bench.ops import BENCH_OPS


def row(op="gemm", case="M=512 N=4096 K=4096", rung="hopper", us=100.0, ratio=1.0, gbs=1000.0):
    return {"op": op, "case": case, "rung": rung, "us": us, "ratio": ratio, "gbs": gbs}


def test_nothing_measured_says_nothing():
    assert targets.summary([]) == []
    assert targets.summary([row(op="silu_mul", case="llama3.2-1b T=64", rung="warp")]) == []
    off_the_grid = [row(case="M=512 N=4096 K=4096 sustained"), row(case="M=8 N=4096 K=4096 warm")]
    assert targets.summary(off_the_grid, 3000.0) == []
    assert targets.summary([row(ratio=None)]) == []  # without torch


@pytest.mark.parametrize(("ratios", "said"), [
    ((1.2, 1.0), "mean 1.095 (1.03 wanted: met), least 1.000 (0.97 wanted: met) at M=1000 N=576 K=576, of 2"),
    ((1.2, 0.9), "mean 1.039 (1.03 wanted: met), least 0.900 (0.97 wanted: MISSED) at M=1000 N=576 K=576"),
    ((1.0, 1.0), "mean 1.000 (1.03 wanted: MISSED), least 1.000 (0.97 wanted: met) at M=512"),
])  # fmt: skip
def test_many_tokens(ratios, said):
    rows = [row(ratio=ratios[0]), row(case="M=1000 N=576 K=576", ratio=ratios[1])]
    (line,) = targets.summary([*rows, row(rung="plain", ratio=0.1)])
    assert line.startswith("many tokens (512 and more), times torch's speed: geometric ")
    assert said in line


def test_few_tokens_of_large_and_small_weights_and_heads():
    late, early = 10.0, 2.0  # 576 x 576: 0.67 MB, 2.72 us
    rows = [
        row(case="M=1 N=4096 K=4096", ratio=1.2),
        row("lm_head", "llama3.2-1b R=64", "warp", us=200.0, ratio=1.1),
        row(case="M=2 N=576 K=576", us=late),
        row(case="M=4 N=576 K=576", us=early),
        row(case="M=64 N=28672 K=4096", us=90.0, ratio=1.0),
        row("lm_head", "qwen2.5-7b R=256", "warp", ratio=1.3),
        row(case="M=65 N=28672 K=4096", ratio=1.0),
    ]
    large, small, reading, between, heads = targets.summary(rows, 3000.0)
    assert large.startswith("up to 64 tokens, weights of 30 MB and more")
    assert "least 1.000 (0.97 wanted: met) at M=64 N=28672 K=4096, of 3" in large
    assert small == (
        "up to 64 tokens, smaller weights: 1 of 2 within bytes / 3.0 TB/s + 2.5 us (MISSED), the latest by "
        "7.28 us at M=2 N=576 K=576"
    )
    assert "share of the 3000 GB/s" in reading
    assert "least 0.885 (0.92 wanted: MISSED) at M=64 N=28672 K=4096, 1 of 2 reach it" in reading
    assert "65 to 384 tokens, times torch's speed: geometric mean 1.000 (1.02 wanted: MISSED)" in between
    assert heads.startswith("heads of 128 and 256 rows, times torch's speed: geometric mean 1.300, least 1.3")
    assert "was not measured" in targets.summary(rows)[2]


def test_the_mma_rung_is_held_against_its_ceiling():
    rows = [row(case="M=2048 N=576 K=576", rung="mma_sync", ratio=0.5), row(rung="mma_sync", ratio=0.1)]
    (line,) = targets.summary(rows)
    assert line.startswith(
        "rung mma_sync from 2048 tokens on, times torch's speed: geometric mean 0.500 (0.6 "
    )


@pytest.mark.parametrize(("us", "said"), [
    ((9.0, 12.0), "mean 5.6% (5% allowed: MISSED), most 11.1% at N=4096 K=4096, of 2"),
    ((9.8, 10.0), "mean 1.0% (5% allowed: met), most 2.0% at N=4096 K=4096, of 2"),
])  # fmt: skip
def test_the_price_of_one_order(us, said):
    """A kernel without the contract that is slower would not be taken: it makes no price below 0."""
    cases = ("M=1 N=4096 K=4096", "M=1 N=3072 K=2048")
    rows = [row(case=case, us=10.0) for case in cases]
    rows += [row(case=case, rung="gemv", us=one) for case, one in zip(cases, us, strict=True)]
    assert targets.summary(rows)[-1] == f"price of batch invariance at one token: {said}"


def test_lines_of_few_tokens():
    head = bench_cases("lm_head")["llama3.2-1b R=1"]
    assert targets.note("lm_head", head, 200.0, 3000.0) == ", 88% of what the card reads"
    small = bench_cases("gemm")["M=1 N=576 K=576"]
    assert targets.note("gemm", small, 2.0, None) == ", 2.72 us allowed"
    assert targets.note("gemm", bench_cases("gemm")["M=512 N=576 K=576"], 2.0, 3000.0) == ""
    assert targets.note("rope", {"num_tokens": 1}, 2.0, 3000.0) == ""


def test_the_ops_between_are_held_against_copying():
    """At 8,192 tokens, in rung warp, an op a line; nothing without a copy to compare with."""
    case = "llama3.2-1b T=8192"
    rows = [
        row("rms_norm", case, "warp", gbs=2400.0),
        row("rms_norm", "smollm2-135m T=8192", "warp", gbs=1800.0),
        row("rms_norm", "qwen2.5-7b T=64", "warp", gbs=10.0),
        row("silu_mul", case, "warp", gbs=2600.0),
        row("silu_mul", case, "plain", gbs=100.0),
        row("qk_norm", "qwen3-8b T=8192", "warp", gbs=1.0),
    ]
    assert targets.summary(rows) == []
    norm, silu = targets.summary(rows, None, 2500.0)
    assert norm == (
        "rms_norm at 8,192 tokens, share of the 2500 GB/s that the card copies: least 0.720 (0.8 wanted: "
        "MISSED) at smollm2-135m T=8192, of 2"
    )
    assert silu.endswith("least 1.040 (0.8 wanted: met) at llama3.2-1b T=8192, of 1")
    params = bench_cases("rms_norm")[case]
    assert targets.note("rms_norm", params, 9.0, None, 2500.0, 2000.0) == ", 80% of what the card copies"
    assert targets.note("rms_norm", {**params, "num_tokens": 64}, 9.0, None, 2500.0, 2000.0) == ""


def test_bytes_are_the_ops_own():
    for op in targets.RUNGS:
        assert 16 < len(targets.grid(op)) < len(bench_cases(op)) + (op != "gemm")
        for params in targets.grid(op).values():
            sizes = targets.sizes_of(op, params)
            assert targets.bytes_of(op, *sizes) == BENCH_OPS[op].cost(params).bytes
