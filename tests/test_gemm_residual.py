"""A residual added by a product: every rung of gemm, in numpy and the simulator, what the kernels become, and
bits on a GPU. The unfused form is a gemm, then the addition that rms_norm makes."""

from __future__ import annotations

import json
from pathlib import Path

import no_simulator
import numpy as np
import pytest
from few_products import make_product, rounded, same_bits, to_float
from many_products import many_in_numpy
from test_gemm_many import product_of

from kernels_numba.ops.gemm.hopper_config import CONFIGS, HopperConfig

ROOT = Path(__file__).resolve().parent.parent

# One packed addition for an addition in float32 and a rounding.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_twice_is_rounding_once(dtype):
    """float32's sum of two 16-bit numbers, rounded, is the one nearest to the exact sum, ties to even: so a
    packed addition has its bits. Random pairs, and the edges of both kinds of numbers."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 1 << 16, (2, 400_000)).astype(np.uint16)
    near = rng.integers(0, 12 << 7, len(a)) - (6 << 7)  # of exponents so close that there are ties
    close = np.clip(a.astype(np.int64) + near, 0, 0xFFFF).astype(np.uint16)
    edges = np.array([0, 1, 0x7F, 0x80, 0x3FF, 0x400, 0x3F80, 0x3F81, 0x3FFF, 0x7BFF, 0x7F7F], np.uint16)
    edges = np.concatenate([edges, edges | 0x8000])
    pairs = [(a, b), (a, close), (np.repeat(edges, len(edges)), np.tile(edges, len(edges)))]
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    if dtype == "float16":
        a, b = a.view(np.float16), b.view(np.float16)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        a, b = to_float(a).astype(np.float64), to_float(b).astype(np.float64)
    largest = 65504 if dtype == "float16" else float(to_float(np.uint16(0x7F7F)))
    inside = np.isfinite(a) & np.isfinite(b) & (np.abs(a) + np.abs(b) < largest)
    a, b = a[inside], b[inside]
    got = rounded(a.astype(np.float32) + b.astype(np.float32), dtype)
    exact, words = a + b, got.view(np.uint16)
    error = np.abs(to_float(got) - exact)
    for step in (-1, 1):
        other = np.where(words & 0x7FFF, words + np.uint16(step & 0xFFFF), words | 1)  # next to 0: 1 or -1
        other_error = np.abs(to_float(other.astype(np.uint16).view(got.dtype)) - exact)
        assert (error <= other_error).all()
        tied = error == other_error
        assert tied.sum() > 100
        assert not (words[tied] & 1).any()


# The many-token kernel's text in numpy.


@pytest.mark.parametrize("config", [*CONFIGS, HopperConfig(64, 32, deep=True)], ids=str)
def test_bits_are_those_of_gemm_then_an_addition(config):
    """Whole and partial rows, columns and steps of K, with and without a bias. Boxes that reach over the
    tile's or the matrix's last column add nothing there."""
    for m, n, k in ((1, 8, 8), (77, 328, 200), (192, 264, 72)):
        rng = np.random.default_rng([m, n, k])
        product = make_product(rng, m, n, k, bias=m == 77, epilogue="residual")
        assert same_bits(product_of(product, config, grid=3, group=2), product.unfused("bfloat16")), m


@pytest.mark.parametrize(
    "config", [HopperConfig(64, 48), HopperConfig(128, 112), HopperConfig(128, 256)], ids=str
)
def test_the_residual_may_be_the_result(config):
    """In place: real rows become the sum, rows from the real number on stay what they were."""
    product = make_product(np.random.default_rng(1), 140, 264, 136, epilogue="residual")
    want = product.unfused("bfloat16")
    for real in (0, 1, 63, 64, 65, 128, 129, 140):
        stream = product.residual.copy()
        many_in_numpy(config, stream, product.x, product.weight, num_rows=real, residual=stream, seed=real)
        assert same_bits(stream[:real], want[:real]), real
        assert same_bits(stream[real:], product.residual[real:]), real


MISTAKES = {
    "the product is not waited for by its residual": ("mbarrier_expect_tx(ready, int32(count * x_bytes))",
                                                      "mbarrier_expect_tx(ready, 0)"),
    "a tile's first columns for all": ("int32(col + (first + box) * 64)", "col"),
    "the other consumer's rows": ("int32(smem + consumer * consumer_x)", "smem"),
    "steps that are not counted": ("for _ in range(residual_steps):", "for _ in range(0):"),
    "a step that is not handed back": ("turn == second_read", "turn == -2"),
    "partial rows without it": (f"if added:\n{20 * ' '}store_sum", f"if False:\n{20 * ' '}store_sum"),
    "whole rows without it": (f"if added:\n{20 * ' '}stage_sum", f"if False:\n{20 * ' '}stage_sum"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed_in_numpy(mistake):
    product = make_product(np.random.default_rng(3), 268, 520, 136, epilogue="residual")
    want = product.unfused("bfloat16")
    old, new = MISTAKES[mistake]

    def right(**how):
        try:
            return same_bits(product_of(product, HopperConfig(128, 256), real=199, **how), want[:199])
        except (AssertionError, IndexError, RuntimeError):
            return False

    def change(name, text):
        if not name.endswith(".gemm.hopper"):
            return text
        assert text.count(old) == 1
        return text.replace(old, new)

    assert right()
    assert not right(change=change)


# What it becomes.

COMPILE = """
import json, sys
sys.path.insert(0, {root!r})
from dataclasses import asdict
from kernels_numba.assemble import assemble_kernel
from kernels_numba.ops.gemm import hopper
reports = []
for name, dtype in {some!r}:
    config = next(config for config in hopper.CONFIGS if str(config) == name)
    kernel = hopper.hopper_kernel(config, dtype, dtype, False, epilogue="residual")
    report = assemble_kernel(kernel, "sm_90a")
    bounds = [config.registers, config.tile_n, config.sends_rows]
    reports.append([asdict(report), report.problems, *bounds])
print(json.dumps(reports))
"""
SOME = [("64x48", "bfloat16"), ("128x144", "float16"), ("128x256", "bfloat16")]


def test_sums_stay_in_registers():
    reports = json.loads(no_simulator.last_line(COMPILE.format(root=str(ROOT), some=SOME)))
    assert len(reports) == len(SOME)
    for report, problems, registers, columns, sent in reports:
        assert problems == [], report
        assert report["registers"] <= registers, report
        counts = report["instructions"]
        assert report["main_loop"]["HGMMA"] >= 4, report
        # Once for staged rows, and where partial ones go straight from registers once more.
        times = 1 if sent else 2
        assert counts["LDSM"] == times * columns // 16, report
        assert counts["HADD2"] == times * columns // 4, report
        assert counts["STSM"] == columns // 16, report


def test_two_steps_hold_any_residual():
    for config in CONFIGS:
        boxes, steps, of_step = config.residual_boxes
        assert 64 * (boxes - 1) < config.tile_n <= 64 * boxes
        assert steps in (1, 2)
        assert steps <= config.stages
        assert (steps - 1) * of_step < boxes <= steps * of_step
        assert (of_step - 1) * config.tile_m <= config.tile_n  # boxes where weights would lie
