"""A residual added by a product: every rung of gemm, in numpy and the simulator, what the kernels become, and
bits on a GPU. The unfused form is a gemm, then the addition that rms_norm makes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import ml_dtypes
import no_simulator
import numpy as np
import pytest
from engine_checks import TINY, decode, load
from few_products import make_product, rounded, same_bits, to_float
from gpu_capture import captured
from many_products import many_in_numpy
from test_gemm import Gpu, blank
from test_gemm_many import product_of

from kernels_numba import simt, simt_rows
from kernels_numba.compiler import SIMULATOR, cuda
from kernels_numba.inputs import make_call
from kernels_numba.launch import stream_handle
from kernels_numba.ops import OPS
from kernels_numba.ops.gemm import hopper
from kernels_numba.ops.gemm.door import operands
from kernels_numba.ops.gemm.hopper_config import CONFIGS, TABLE_ONLY, HopperConfig
from kernels_numba.ops.gemm.ladder.in_numpy import in_numpy
from kernels_numba.ops.gemm_few import gemv
from kernels_numba.ops.gemm_few.in_numpy import Placed

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
    "config", [HopperConfig(64, 48), HopperConfig(128, 112), HopperConfig(128, 256), *TABLE_ONLY], ids=str
)
def test_the_residual_may_be_the_result(config):
    """In place: real rows become the sum, rows from the real number on stay what they were."""
    n = 1024 if config.cluster > 1 else 264  # a whole number of clusters
    product = make_product(np.random.default_rng(1), 140, n, 136, epilogue="residual")
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


# Every other rung, without a GPU.


def uploaded(call, dtype):
    return {n: cuda.to_device(a.view(np.uint16) if dtype == "bfloat16" else a) for n, a in call.args.items()}


@pytest.mark.skipif(not SIMULATOR, reason="in numba's simulator")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rung", ["naive", "plain"])
def test_plain_rungs_have_the_bits_of_gemm_then_rms_norms_addition(rung, dtype):
    call = make_call("gemm", "toy_residual", np.random.default_rng(4)).to_dtype(dtype)
    args = uploaded(call, dtype)
    gemm, rms_norm = OPS["gemm"].rungs[rung], OPS["rms_norm"].rungs["plain"]
    product, normed = (cuda.device_array_like(args["out"]) for _ in range(2))
    stream = cuda.to_device(args["residual"].copy_to_host())
    gemm(product, args["x"], args["weight"], args["bias"])
    rms_norm(normed, product, cuda.to_device(np.zeros(9, stream.dtype)), eps=1e-5, residual=stream)
    want = stream.copy_to_host()
    gemm(**args)
    assert same_bits(args["out"].copy_to_host(), want)
    gemm(args["residual"], args["x"], args["weight"], args["bias"], residual=args["residual"])
    assert same_bits(args["residual"].copy_to_host(), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_adds_in_place_what_rms_norm_would(dtype):
    call = make_call("gemm", "smollm2_135m_down_residual", np.random.default_rng(5)).to_dtype(dtype)
    args = call.args
    gemm, rms_norm = OPS["gemm"].rungs["reference"], OPS["rms_norm"].rungs["reference"]
    product, stream = np.empty_like(args["out"]), args["residual"].copy()
    gemm(product, args["x"], args["weight"])
    rms_norm(np.empty_like(product), product, np.ones(576, product.dtype), eps=1e-5, residual=stream)
    gemm(args["residual"], args["x"], args["weight"], residual=args["residual"])
    np.testing.assert_array_equal(args["residual"], stream)


@pytest.mark.parametrize("step", ["mma_step", "wgmma"])
@pytest.mark.parametrize("in_place", [False, True])
def test_steps_of_the_ladder_add_it(step, in_place):
    """Partial tiles of rows and columns; the sums of K are numpy's here, so they are asked for in float32."""
    product = make_product(np.random.default_rng(6), 141, 200, 72, bias=True, epilogue="residual")
    m, n = product.residual.shape
    sums, wider = np.zeros((m, n), np.float32), rounded(np.full((m, n + 8), np.nan, np.float32), "bfloat16")
    before = wider.copy()
    in_numpy(step, sums, product.x, product.weight, product.bias)
    want = rounded(to_float(product.residual) + to_float(rounded(sums, "bfloat16")), "bfloat16")
    out = wider[:, :n]
    if in_place:
        out[...] = product.residual
    residual = out if in_place else product.residual
    in_numpy(step, out, product.x, product.weight, product.bias, residual=residual)
    assert same_bits(out.copy(), want)
    assert same_bits(wider[:, n:].copy(), before[:, n:].copy())


def test_one_token_on_cuda_cores_adds_it():
    product = make_product(np.random.default_rng(7), 1, 24, 1032, bias=True, epilogue="residual")
    memory = simt.Memory()

    def run(out, residual):
        places = [Placed(a, memory.put(a)) for a in (out, product.x, product.weight, product.bias)]
        other = None if residual is None else Placed(residual, memory.put(residual))
        o = operands(*places, gemv.INPUTS, other)
        blocks, arguments = gemv.blocks_and_arguments(o)
        names = ("kernels_numba.ops.warp.elements", "kernels_numba.ops.gemm_few.gemv")
        key = gemv.gemv_kernel(o.dtype, o.out_dtype, True, residual is not None).key
        simt_rows.run(names, "make_gemv_kernel", key, arguments, blocks, gemv.WARPS * 32, memory)
        return out

    alone = run(rounded(np.zeros((1, 24), np.float32), "bfloat16"), None)
    residual = np.ascontiguousarray(product.residual)
    got = run(rounded(np.zeros((1, 24), np.float32), "bfloat16"), residual)
    assert same_bits(got, rounded(to_float(residual) + to_float(alone), "bfloat16"))


@pytest.mark.parametrize(("residual", "out", "message"), [
    (Placed(np.zeros((4, 24), np.uint16), 256), None, r"residual has shape \(4, 24\); \(4, 16\) is required"),
    (Placed(np.zeros((4, 16), np.float32), 256), None, "residual has dtype float32; uint16 is required"),
    (Placed(np.zeros((4, 16), np.uint16), 264), None, "residual starts at address 0x108; a multiple of 16"),
    (Placed(np.zeros((4, 20), np.uint16)[:, :16], 256), None, r"residual.strides\[0\] is 40 bytes"),
    (Placed(np.zeros((4, 16), np.uint16), 256), Placed(np.zeros((4, 16), np.float32), 512),
     "out has dtype float32; uint16 is required"),
])  # fmt: skip
def test_wrong_residuals_are_named_by_the_door_of_the_tensor_cores(residual, out, message):
    out = out or Placed(np.zeros((4, 16), np.uint16), 512)
    x, weight = (Placed(np.zeros(shape, np.uint16), 1024) for shape in ((4, 8), (16, 8)))
    with pytest.raises(ValueError, match=message):
        operands(out, x, weight, residual=residual)


@pytest.mark.parametrize(("shape", "dtype", "message"), [
    ((4, 15), np.float32, r"residual has shape \(4, 15\); \(4, 16\) is required"),
    ((4, 16), ml_dtypes.bfloat16, "residual has dtype bfloat16; float32 is required"),
])  # fmt: skip
def test_wrong_residuals_are_named_on_the_host(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        OPS["gemm"].rungs["reference"](
            *(np.zeros(s, np.float32) for s in ((4, 16), (4, 8), (16, 8))), residual=np.zeros(shape, dtype)
        )


# In the forward.


def test_every_built_in_rung_knows_it():
    for name, rung in OPS["gemm"].rungs.items():
        assert "residual" in inspect.signature(rung).parameters, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rung_that_knows_no_residual_gives_the_same_logits(dtype):
    """The product adds, or rms_norm does after it: the same bits."""
    calls = []

    def mine(out, x, weight, bias=None, *, stream=None):
        calls.append(out.shape)
        OPS["gemm"].rungs["reference"](out, x, weight, bias, stream=stream)

    OPS["gemm"].register("knows_no_residual", mine)
    try:
        answers = []
        for rungs in ({}, {"gemm": "knows_no_residual"}):
            model, config = load(TINY, "cpu", dtype, rungs=rungs)
            answers.append(decode(model, config, [[5, 9, 200, 17, 3], [7] * 70], 3)[1])
    finally:
        OPS["gemm"].rungs.pop("knows_no_residual")
    assert calls
    for ours, theirs in zip(*answers, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# On a GPU.


@pytest.fixture
def gpu(gpu_where):
    return Gpu(gpu_where(lambda have: have[0] == 9, "9.0"), "bfloat16")


def apart(gpu, x, weight, residual, bias=None):
    """Bits of residual after gemm, then rms_norm's rung "warp"."""
    m, n = residual.shape
    product, stream = blank(gpu, m, n), gpu.cuda.to_device(residual.copy_to_host())
    OPS["gemm"].rungs["hopper"](product, x, weight, bias)
    norm = gpu.up(np.ones(n, np.float32))
    OPS["rms_norm"].rungs["warp"](blank(gpu, m, n), product, norm, eps=1e-5, residual=stream)
    gpu.cuda.synchronize()
    return stream.copy_to_host()


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_tile_has_the_bits_of_the_two_ops(gpu, rng, config):
    """Beside the residual and over it; whole and partial tiles; rows past the real number stay."""
    n, k = 584, 776
    weight, bias = gpu.up(rng.standard_normal((n, k)) / np.sqrt(k)), gpu.up(rng.standard_normal(n))
    for m in (1, 64, 128, *rng.integers(2, 700, 2).tolist()):
        x, residual = gpu.up(rng.standard_normal((m, k))), gpu.up(rng.standard_normal((m, n)))
        added = bias if m % 2 else None
        want, out, before = apart(gpu, x, weight, residual, added), blank(gpu, m, n), residual.copy_to_host()
        hopper.gemm_hopper(out, x, weight, added, residual=residual, config=config)
        assert np.array_equal(out.copy_to_host(), want), m
        assert np.array_equal(residual.copy_to_host(), before), m
        real = int(rng.integers(1, m + 1))
        count = gpu.cuda.to_device(np.array([real], np.int32))
        hopper.gemm_hopper(residual, x, weight, added, residual=residual, config=config, num_rows=count)
        after = residual.copy_to_host()
        assert np.array_equal(after[:real], want[:real]), (m, real)
        assert np.array_equal(after[real:], before[real:]), (m, real)


@pytest.mark.gpu
@pytest.mark.parametrize("rung", ["hopper", "mma_sync", "mma_step", "wgmma"])
def test_the_rungs_have_the_bits_of_the_two_ops(gpu, rng, rung):
    """Few tokens and many, in place, at sizes of models."""
    for n, k in ((2048, 2048), (3584, 3584), (576, 1536)):
        weight = gpu.up(rng.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k)))
        for m in (1, 7, 33, 64, 100, 257, 1000):
            x = gpu.up(rng.standard_normal((m, k), dtype=np.float32))
            residual = gpu.up(rng.standard_normal((m, n), dtype=np.float32))
            want = apart(gpu, x, weight, residual)
            OPS["gemm"].rungs[rung](residual, x, weight, residual=residual)
            assert np.array_equal(residual.copy_to_host(), want), (m, n)


@pytest.mark.gpu
def test_pauses_and_a_captured_chain_change_no_bit(gpu, rng):
    """Warps that dawdle; and sums into one stream by dependent launches of a graph, through every tile."""
    n, m = 576, 700
    x, weight = gpu.up(rng.standard_normal((m, n))), gpu.up(rng.standard_normal((n, n)) / 24)
    start = gpu.up(rng.standard_normal((m, n)))
    want = apart(gpu, x, weight, start)
    for config in (HopperConfig(64, 64), HopperConfig(128, 112), HopperConfig(128, 256)):
        out, build = blank(gpu, m, n), hopper.Build(debug=True, stress=True)
        hopper.gemm_hopper(out, x, weight, residual=start, config=config, build=build, group=3)
        assert np.array_equal(out.copy_to_host(), want), config
    residual, act = gpu.up(np.zeros((m, n))), blank(gpu, m, n)

    def chain(stream, wait=False):
        for config in CONFIGS:
            hopper.gemm_hopper(act, residual, weight, config=config, stream=stream)
            hopper.gemm_hopper(residual, act, weight, residual=residual, config=config, stream=stream)
            if wait:
                gpu.cuda.synchronize()

    residual.copy_to_device(start.copy_to_host())
    chain(None, wait=True)
    want = residual.copy_to_host()
    stream = gpu.cuda.stream()
    replay = captured(stream, lambda: chain(stream_handle(stream)))
    for _ in range(20):
        residual.copy_to_device(start.copy_to_host())
        gpu.cuda.synchronize()
        replay()
        stream.synchronize()
        assert np.array_equal(residual.copy_to_host(), want)


@pytest.mark.gpu
def test_a_model_has_the_same_bits_when_the_norm_adds(gpu, rng):
    """Steps of few tokens and of many: graphs whose products add, and launches whose norms do."""
    from test_graphs_gpu import check_fused_steps

    def part(ops):
        product = ops.gemm
        ops.gemm = lambda out, x, weight, bias=None, *, stream=None: product(
            out, x, weight, bias, stream=stream
        )

    check_fused_steps(rng, part)
