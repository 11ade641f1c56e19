"""The mma.sync GEMM on a GPU: every tile's numbers against float64, its bits against the hopper rung, fused
forms against the ops they stand for, counts on the device."""

from __future__ import annotations

import hashlib
import inspect

import numpy as np
import pytest
from gpu_capture import captured
from test_ladder import check_product, normal

from kernels_numba import simt
from kernels_numba.compiler import cuda
from kernels_numba.launch import Kernel, address
from kernels_numba.ops import OPS
from kernels_numba.ops.gemm_mma import gemm_mma, kernel
from kernels_numba.ops.gemm_mma.config import CONFIGS, smem_plan

pytestmark = pytest.mark.gpu
BF16_NAN = 0x7FC0


@pytest.fixture
def capability(on_gpu):
    if not on_gpu:
        pytest.skip("runs under --device=cuda only")
    have = tuple(cuda.get_current_device().compute_capability)
    if have < (8, 0):
        pytest.skip(f"mma.sync of bfloat16 does not run on compute capability {have}")
    return have


def up(array):
    return None if array is None else cuda.to_device(array)


def run(x, weight, bias=None, *, columns=None, out_dtype=np.uint16, into=None, **how):
    """out of a product into a view of a poisoned, wider buffer, of which nothing else may change; numpy
    arrays."""
    m, n = len(x), columns or len(weight)
    host = np.full((m + 1, n + 8), BF16_NAN if out_dtype == np.uint16 else np.nan, out_dtype)
    if into is not None:
        host[:m, :n] = into
    buffer = cuda.to_device(host)
    out = buffer[:m, :n]
    if into is not None:
        how["residual"] = out
    gemm_mma(out, up(x), up(weight), up(bias), **how)
    cuda.synchronize()
    after = buffer.copy_to_host()
    got = after[:m, :n].copy()
    after[:m, :n] = host[:m, :n]
    np.testing.assert_array_equal(after.view(np.uint8), host.view(np.uint8), "wrote outside [M, N]")
    return got


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(8, 8), (136, 72), (264, 200), (576, 1536), (1000, 64)])
def test_numbers_against_float64(capability, rng, config, n, k):
    for m in (1, 17, 64, 129, 700):
        x, weight, bias = normal(rng, m, k), normal(rng, n, k, scale=k**-0.5), normal(rng, n)
        check_product(simt.to_float(run(x, weight, config=config)), x, weight, None, "bfloat16")
        got = run(x, weight, bias, config=config, out_dtype=np.float32)
        check_product(got, x, weight, bias, "float32")


def test_float16(capability, rng):
    x, weight = (rng.standard_normal((rows, 456)).astype(np.float16) for rows in (130, 264))
    want = x.astype(np.float64) @ weight.astype(np.float64).T
    for config in (CONFIGS[0], CONFIGS[-1]):
        got = run(x, weight, config=config, out_dtype=np.float16).astype(np.float64)
        assert (np.abs(got - want) <= 2.0**-11 * np.abs(want) + 1e-4).all(), config


def test_a_large_product_uses_blocks_and_stages_again(capability, rng):
    x, weight, bias = normal(rng, 2500, 4104), normal(rng, 4000, 4104, scale=4104**-0.5), normal(rng, 4000)
    first = None
    for config in CONFIGS:
        got = run(x, weight, bias, config=config, out_dtype=np.float32)
        if first is None:
            first = got
            check_product(got, x, weight, bias, "float32")
        differ = int((got.view(np.uint32) != first.view(np.uint32)).sum())
        assert differ == 0, f"{config}: {differ} of {got.size} differ from {CONFIGS[0]}'s"


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (576, 1536), (3584, 18944), (264, 200)])
def test_a_row_has_the_bits_of_the_hopper_rung(capability, rng, n, k):
    """And of itself alone: every tile, rows among random neighbours at a random M, wide-range data."""
    weight, bias = normal(rng, n, k), normal(rng, n)
    rows = simt.to_bits(rng.standard_normal((5, k)) * np.exp(rng.standard_normal((5, 1))))
    want = np.concatenate([run(row[None], weight, bias, out_dtype=np.float32) for row in rows])
    if capability[0] == 9:
        out = cuda.device_array((5, n), np.float32)
        OPS["gemm"].rungs["hopper"](out, up(rows), up(weight), up(bias))
        np.testing.assert_array_equal(out.copy_to_host().view(np.uint32), want.view(np.uint32))
    for config in CONFIGS:
        m = int(rng.integers(5, 700))
        x = normal(rng, m, k, scale=100)
        places = rng.choice(m, 5, replace=False)
        x[places] = rows
        got = run(x, weight, bias, config=config, out_dtype=np.float32)[places]
        differ = int((got.view(np.uint32) != want.view(np.uint32)).sum())
        assert differ == 0, f"{config}, M {m}: {differ} of {got.size} differ"
        rounded = run(x, weight, bias, config=config)[places]
        np.testing.assert_array_equal(rounded, simt.to_bits(got))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rows_past_the_count_are_neither_read_nor_written(capability, rng, config):
    """One launch for every count: NaN beyond it in x and the residual, out as it was."""
    m, n, k = 200, 144, 136
    x, weight, residual = normal(rng, m, k), normal(rng, n, k, scale=k**-0.5), normal(rng, m, n)
    whole = run(x, weight, into=residual)
    count = cuda.to_device(np.zeros(1, np.int32))
    for real in (0, 1, 63, 64, 65, 199, 200, 1000):
        count.copy_to_device(np.array([real], np.int32))
        poisoned, stream = x.copy(), residual.copy()
        poisoned[real:], stream[real:] = BF16_NAN, BF16_NAN
        got = run(poisoned, weight, into=stream, num_rows=count, config=config)
        np.testing.assert_array_equal(got[:real], whole[:real])
        assert (got[real:] == BF16_NAN).all()


@pytest.mark.parametrize("m", [1, 33, 300])
@pytest.mark.parametrize("has_bias", [False, True])
def test_fused_forms_have_the_bits_of_the_unfused(capability, rng, m, has_bias):
    """gemm, then rung "warp" of rms_norm or silu_mul, on a model's shapes."""
    n, k = 1152, 576
    x, weight = normal(rng, m, k), normal(rng, n, k, scale=3 * k**-0.5)
    bias, residual = normal(rng, n) if has_bias else None, normal(rng, m, n, scale=3)
    for config in CONFIGS if has_bias else CONFIGS[::4]:
        product = up(run(x, weight, bias, config=config))
        halved = cuda.device_array((m, n // 2), np.uint16)
        OPS["silu_mul"].rungs["warp"](halved, product)
        fused = run(x, weight, bias, columns=n // 2, activation="silu", config=config)
        np.testing.assert_array_equal(fused, halved.copy_to_host(), f"silu, {config}")
        stream, out = up(residual), cuda.device_array((m, n), np.uint16)
        ones = up(simt.to_bits(np.ones(n)))
        OPS["rms_norm"].rungs["warp"](out, product, ones, residual=stream, eps=1e-5)
        fused = run(x, weight, bias, into=residual, config=config)
        np.testing.assert_array_equal(fused, stream.copy_to_host(), f"residual, {config}")


def test_a_graph_reads_its_count_when_it_is_replayed(capability, rng):
    m, n, k = 128, 264, 200
    x, weight = normal(rng, m, k), normal(rng, n, k, scale=k**-0.5)
    want = run(x, weight)
    out, count = up(np.full((m, n), BF16_NAN, np.uint16)), up(np.array([m], np.int32))
    held = up(x), up(weight)
    gemm_mma(out, *held, num_rows=count)  # compiled and loaded before the capture
    cuda.synchronize()
    stream = cuda.stream()
    replay = captured(stream, lambda: gemm_mma(out, *held, num_rows=count, stream=stream))
    for real in (3, 128, 70):
        out.copy_to_device(np.full((m, n), BF16_NAN, np.uint16))
        count.copy_to_device(np.array([real], np.int32))
        cuda.synchronize()
        replay()
        stream.synchronize()
        got = out.copy_to_host()
        np.testing.assert_array_equal(got[:real], want[:real])
        assert (got[real:] == BF16_NAN).all()


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=str)
def test_a_dropped_step_of_k_is_noticed(capability, rng, config):
    """A mistake that leaves every copy waited for, so that it harms nothing but its own numbers."""
    source = inspect.getsource(kernel)
    old, new = "a_unit, b_unit, last_step)", "a_unit, b_unit, 0)"
    assert old in source
    source = source.replace(old, new)
    module = {"__name__": "mutant"}
    exec(compile(source, "mutant", "exec"), module)
    key = (config, "bfloat16", "float32", False, "")
    tag = hashlib.sha256(source.encode()).hexdigest()[:12]
    mutant = Kernel(
        f"gemm_mma_mutant_{tag}_{config}", lambda: module["make_gemm_mma_kernel"](*key), key,
        kernel.SIGNATURE, config.threads, smem_plan(config).bytes,
    )  # fmt: skip
    m, n, k = 130, 264, 200
    x, weight = normal(rng, m, k), normal(rng, n, k, scale=k**-0.5)
    out, there = cuda.device_array((m, n), np.float32), (up(x), up(weight))
    arguments = (address(out), *map(address, there), 0, 0, 0, m, n, k, 4 * n, 2 * k, 2 * k, 0, 8)
    grid = -(-m // config.tile_m) * -(-n // config.tile_n)
    for one, right in ((kernel.mma_kernel(*key), True), (mutant, False)):
        one.prepare(grid, arguments)(None)
        cuda.synchronize()
        if right:
            check_product(out.copy_to_host(), x, weight, None, "float32")
        else:
            with pytest.raises(AssertionError):
                check_product(out.copy_to_host(), x, weight, None, "float32")
