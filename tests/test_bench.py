"""The bench harness without a GPU: which shapes, how many buffers, whose turn, and what counts as right."""

from __future__ import annotations

import numpy as np
import pytest

from kernels_numba import bench


def test_the_grid_and_its_parts():
    assert len(bench.gemm_cases()) == 16 * 6
    assert len(bench.gemm_cases(quick=True)) == 16 * 3
    assert [case.name for case in bench.gemm_cases(text="M=1000 N=960 K=576")] == ["M=1000 N=960 K=576"]
    with pytest.raises(ValueError, match="no case contains 'M=7 '"):
        bench.gemm_cases(text="M=7 ")


def test_rotated_buffers_leave_the_cache():
    for size in (1 << 10, 5 << 20, 100 << 20, 1 << 30):
        sets = bench.buffer_sets(size)
        assert sets >= 2
        assert sets == 64 or (sets - 1) * size >= bench.COLD_BYTES
    assert bench.buffer_sets(1 << 20, cold=False) == 1


def test_contenders_take_turns():
    turns = []

    def contender(name):
        return lambda: turns.append(name) or float(len(turns))

    times = bench.interleaved({"ours": contender("ours"), "theirs": contender("theirs")}, 3)
    assert turns == ["ours", "theirs"] * 3
    assert times == {"ours": [1.0, 3.0, 5.0], "theirs": [2.0, 4.0, 6.0]}
    with pytest.raises(ValueError, match="rounds is 0"):
        bench.interleaved({}, 0)


def test_only_a_right_result_is_within_its_tolerance():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((64, 64))
    plain = exact + 1e-3 * rng.standard_normal((64, 64))
    assert bench.error_in_tolerances(exact + 1e-3 * rng.standard_normal((64, 64)), plain, exact) < 1
    assert bench.error_in_tolerances(exact * 1.01, exact, exact) > 1
    holed = exact.copy()
    holed[3, 4] = np.nan
    assert bench.error_in_tolerances(holed, plain, exact) == float("inf")


def test_figures_of_a_measurement():
    case = bench.GemmCase(1024, 1024, 1024)
    measured = bench.Measurement(10.0, 9.0, 11.0, 12.0, 0.5, "")
    figures = bench.gemm_figures(case, measured, "NVIDIA H200")
    assert figures["tflops"] == pytest.approx(2 * 1024**3 / 10e-6 / 1e12, abs=0.1)
    assert figures["gbs"] == pytest.approx(3 * 1024**2 * 2 / 10e-6 / 1e9, abs=0.1)
    assert figures["ratio"] == 1.2
    assert figures["roofline"] == pytest.approx(2 * 1024**3 / 989.4e12 / 10e-6, abs=1e-4)
    assert bench.gemm_figures(case, measured, "Some GPU")["roofline"] is None
