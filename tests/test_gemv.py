"""The one-token product on CUDA cores: its text in numpy, what it becomes (assembled without a GPU), its
doors, and its numbers on a GPU. Its bits are its own, so they are held against nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import no_simulator
import numpy as np
import pytest
from test_ladder import check_product, normal
from tolerance import assert_close

from kernels_numba import simt, simt_rows
from kernels_numba.compiler import SIMULATOR, KernelsUnavailable, cuda
from kernels_numba.ops import OPS, gemm
from kernels_numba.ops.gemm.door import operands
from kernels_numba.ops.gemm_few import gemv
from kernels_numba.ops.gemm_few.in_numpy import Placed
from sharp.rungs import refuse_rungs

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(8, 8), (16, 72), (24, 1032), (40, 2056)]  # K of a pack, of 9, of one turn and a pack, of two


def in_numpy(n, k, dtype, out_dtype, has_bias, change=lambda name, text: text):
    """(out, x, weight, bias) of the kernel's text on random arrays, whose rows are cut from wider ones."""
    rng = np.random.default_rng([n, k])

    def numbers(*shape):
        values = rng.standard_normal(shape)
        return values.astype(np.float16) if dtype == "float16" else simt.to_bits(values)

    x, weight, bias = numbers(1, k), numbers(n, k + 8)[:, :k], numbers(n) if has_bias else None
    out = np.full((1, n), np.nan, np.float32)
    if out_dtype == "float32":
        pass
    elif dtype == "float16":
        out = out.astype(np.float16)
    else:
        out = simt.to_bits(out)
    memory = simt.Memory()
    places = [None if a is None else Placed(a, memory.put(a)) for a in (out, x, weight, bias)]
    o = operands(*places, gemv.INPUTS)
    blocks, arguments = gemv.blocks_and_arguments(o)
    names = ("kernels_numba.ops.warp.elements", "kernels_numba.ops.gemm_few.gemv")
    key = gemv.gemv_kernel(dtype, out_dtype, has_bias).key
    simt_rows.run(names, "make_gemv_kernel", key, arguments, blocks, gemv.WARPS * 32, memory, change=change)
    return out, x, weight, bias


def wide(array):
    if array is None:
        return None
    return simt.to_float(array) if array.dtype == np.uint16 else array.astype(np.float32)


def check(n, k, dtype="bfloat16", out_dtype="bfloat16", has_bias=False, **how):
    out, x, weight, bias = in_numpy(n, k, dtype, out_dtype, has_bias, **how)
    plain = gemm.gemm_spec(wide(x), wide(weight), wide(bias))
    truth = wide(x).astype(np.float64) @ wide(weight).astype(np.float64).T
    truth += 0 if bias is None else wide(bias)
    if out_dtype == "bfloat16":
        plain = simt.to_float(simt.to_bits(plain))
    elif out_dtype == "float16":
        plain = plain.astype(np.float16).astype(np.float32)
    assert_close(wide(out), plain, truth, out_dtype, k, "gemv")


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")]
)
def test_the_kernels_text_is_the_definition(n, k, dtype, out_dtype, has_bias):
    check(n, k, dtype, out_dtype, has_bias)


@pytest.mark.parametrize(("old", "new"), [
    ("high(x_words[word]), high(words[word])", "high(x_words[word]), low(words[word])"),
    ("int32(done + WARP * AT_ONCE)", "int32(done + 2 * WARP * AT_ONCE)"),
    ("second_sum = lane_sum(second_sum)", "pass"),
    ("int64(at + weight_stride), lane, packs", "at, lane, packs"),
])  # fmt: skip
def test_mistakes_are_noticed(old, new):
    def change(name, text):
        assert old in text or not name.endswith("gemv")
        return text.replace(old, new)

    with pytest.raises((AssertionError, IndexError)):
        check(40, 2056, change=change)


def test_more_than_one_token_is_refused():
    arrays = [np.zeros(shape, np.uint16) for shape in ((2, 16), (2, 8), (16, 8))]
    with pytest.raises(ValueError, match="gemm: x has 2 rows; 1: rung gemv multiplies one token is required"):
        gemv.blocks_and_arguments(operands(*(Placed(a, 256) for a in arrays)))


def test_no_engine_takes_it():
    config, device = SimpleNamespace(rungs={"gemm": "gemv"}), SimpleNamespace(kind="cuda")
    with pytest.raises(ValueError, match="rung 'gemv' of gemm does not run a model: its bits are not those"):
        refuse_rungs({"gemm": "gemv"}, None, config, device)


@pytest.mark.skipif(not SIMULATOR, reason="not in the simulator")
def test_the_simulator_is_told_apart():
    arrays = [cuda.to_device(np.zeros(shape, np.uint16)) for shape in ((1, 16), (1, 8), (16, 8))]
    with pytest.raises(KernelsUnavailable, match="rung gemv is made of PTX"):
        OPS["gemm"].rungs["gemv"](*arrays)


COMPILE = """
import json, sys
from kernels_numba import assemble
from kernels_numba.disassemble import disassemble
from kernels_numba.ops.gemm_few.gemv import gemv_kernel
KEYS = (("bfloat16", "bfloat16", 0), ("bfloat16", "float32", 1), ("float16", "float16", 0))
try:
    reports = []
    for dtype, out_dtype, bias in KEYS:
        code = disassemble(gemv_kernel(dtype, out_dtype, bool(bias)), "sm_90a")
        reports.append([code.registers, code.spill_bytes + code.stack_bytes, code.count("LDG")])
except assemble.ToolsMissing as error:
    print(error, file=sys.stderr)
    sys.exit(3)
print(json.dumps(reports))
"""


def test_what_it_becomes(request):
    """Nothing in local memory, and registers for three blocks an SM."""
    pytest.importorskip("numba")
    child = no_simulator.run(COMPILE, timeout=180)
    if child.returncode == 3 and not request.config.getoption("--strict-tools"):
        pytest.skip(child.stderr.strip())
    assert child.returncode == 0, child.stderr[-3000:]
    for registers, spilled, loads in json.loads(child.stdout.splitlines()[-1]):
        assert registers <= 168
        assert spilled == 0
        assert loads >= 2 * gemv.ROWS * gemv.AT_ONCE


@pytest.fixture
def hopper_gpu(on_gpu):
    if not on_gpu or tuple(cuda.get_current_device().compute_capability) != (9, 0):
        pytest.skip("needs compute capability 9.0, under --device=cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (4096, 4096), (576, 1536), (3584, 18944)])
def test_numbers_against_float64(hopper_gpu, n, k):
    rng = np.random.default_rng([n, k])
    x, weight, bias = normal(rng, 1, k), normal(rng, n, k, scale=k**-0.5), normal(rng, n)
    for out_dtype, added in (("bfloat16", None), ("bfloat16", bias), ("float32", None), ("float32", bias)):
        host = np.full((1, n), np.nan, np.float32)
        out = cuda.to_device(host if out_dtype == "float32" else simt.to_bits(host))
        given = [None if array is None else cuda.to_device(array) for array in (x, weight, added)]
        OPS["gemm"].rungs["gemv"](out, *given)
        cuda.synchronize()
        got = out.copy_to_host()
        check_product(wide(got), x, weight, added, out_dtype)
