"""The GEMM for few tokens on a GPU: numbers against float64, bits against the many-token kernel and against
the unfused composition, launches in a chain, mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu_capture import captured
from test_gemm import Gpu

from kernels_numba.ops.gemm import hopper
from kernels_numba.ops.gemm_few.config import CONFIGS, Build, FewConfig, pick_few_config

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda(gpu_where):
    return gpu_where(lambda have: have[0] == 9, "9.0")


@pytest.fixture
def few(cuda):
    from kernels_numba.ops.gemm_few.hopper import gemm_few

    return gemm_few


def blank(gpu, rows, columns, out_dtype):
    fill = np.full((rows, columns), np.nan, np.float32)
    return gpu.cuda.to_device(fill) if out_dtype == "float32" else gpu.up(fill)


def product(gpu, launch, x, weight, bias=None, out_dtype="bfloat16", columns=None, **how):
    """out on the host; every row is NaN before."""
    out = blank(gpu, x.shape[0], columns or weight.shape[0], out_dtype)
    launch(out, x, weight, bias, **how)
    gpu.cuda.synchronize()
    return gpu.down(out)


def bits(array):
    return array.view(np.uint32 if array.dtype == np.float32 else np.uint16)


SHAPES = [(1, 8, 8), (7, 264, 72), (64, 576, 1536), (65, 960, 576), (129, 3072, 576), (300, 4096, 4096)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize(("dtype", "out_dtype", "has_bias"), [
    ("bfloat16", "bfloat16", False), ("bfloat16", "bfloat16", True), ("bfloat16", "float32", True),
    ("float16", "float16", True), ("float16", "float32", False),
])  # fmt: skip
def test_few_against_float64(cuda, few, m, n, k, dtype, out_dtype, has_bias):
    rng = np.random.default_rng([m, n, k])
    gpu = Gpu(cuda, dtype)
    x, weight = gpu.up(rng.standard_normal((m, k))), gpu.up(rng.standard_normal((n, k)) / np.sqrt(k))
    bias = gpu.up(rng.standard_normal(n)) if has_bias else None
    want = gpu.down(x).astype(np.float64) @ gpu.down(weight).astype(np.float64).T
    if has_bias:
        want += gpu.down(bias).astype(np.float64)
    epsilon = {"float32": 2e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}[out_dtype]
    plain = (out_dtype, has_bias) == ("bfloat16", False)
    for config in CONFIGS if plain else [FewConfig(64, 24, 2), FewConfig(128, 64), FewConfig(128, 256)]:
        got = product(gpu, few, x, weight, bias, out_dtype, config=config).astype(np.float64)
        assert np.isfinite(got).all(), config
        # The result's last place, and sums of k terms in float32 (tensor cores cut off low bits).
        assert (np.abs(got - want) <= epsilon * np.abs(want) + 2e-5).all(), (config, np.abs(got - want).max())


@pytest.mark.parametrize(
    ("n", "k"), [(4096, 4096), (576, 1536), (3584, 18944), (4096, 14336), (264, 200), (49152, 576)]
)
def test_bits_are_the_many_token_kernels(cuda, few, rng, n, k):
    """Tokens among random neighbours at M = 1 to 8192 in the many-token kernel, alone and in any company
    here, through every tile."""
    gpu = Gpu(cuda, "bfloat16")
    weight, bias = gpu.up(rng.standard_normal((n, k))), gpu.up(rng.standard_normal(n))
    most = 8192 if n * k < 1 << 25 and n < 10_000 else 2048
    x = (rng.standard_normal((most, k)) * np.exp(rng.standard_normal((most, 1)))).astype(np.float32)
    whole = product(gpu, hopper.gemm_hopper, gpu.up(x), weight, bias, "float32")
    for m in (1, 2, 7, 8, 9, 16, 33, 64, 65, 100, 128, 129, 256, 384, 1000, most):
        rows = rng.choice(most, m, replace=False)
        mine = gpu.up(x[rows])
        assert np.array_equal(
            bits(product(gpu, hopper.gemm_hopper, mine, weight, bias, "float32")), bits(whole[rows])
        ), m
        tried = CONFIGS if m in (7, 100) else [pick_few_config(m, n, k, hopper.num_sms())]
        for config in tried:
            got = product(gpu, few, mine, weight, bias, "float32", config=config)
            differ = bits(got) != bits(whole[rows])
            assert not differ.any(), f"{config}, M {m}: {differ.sum()} of {differ.size} differ"
        rounded = product(gpu, few, mine, weight, bias)
        assert np.array_equal(rounded, whole[rows].astype(rounded.dtype)), m


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_fused_is_unfused(cuda, few, rng, config):
    """A residual added against rms_norm's addition, SiLU against silu_mul, both in their rung "warp"."""
    from kernels_numba.ops.rms_norm import rms_norm_warp
    from kernels_numba.ops.silu_mul import silu_mul_warp

    gpu = Gpu(cuda, "bfloat16")
    n, k = 1552, 776
    weight, norm = gpu.up(rng.standard_normal((n, k)) / 9), gpu.up(rng.standard_normal(n))
    for m in (1, 13, 64, 100, 150):
        x, stream = gpu.up(rng.standard_normal((m, k))), gpu.up(rng.standard_normal((m, n)))
        plain, unused = blank(gpu, m, n, "bfloat16"), blank(gpu, m, n, "bfloat16")
        few(plain, x, weight, config=config)
        fused = product(gpu, few, x, weight, residual=stream, config=config)
        in_place = cuda.to_device(stream.copy_to_host())
        few(in_place, x, weight, residual=in_place, config=config)
        rms_norm_warp(unused, plain, norm, eps=1e-5, residual=stream)
        cuda.synchronize()
        assert np.array_equal(bits(fused), stream.copy_to_host()), m
        assert np.array_equal(in_place.copy_to_host(), stream.copy_to_host()), m
        gated = blank(gpu, m, n // 2, "bfloat16")
        silu_mul_warp(gated, plain)
        fused = product(gpu, few, x, weight, columns=n // 2, activation="silu", config=config)
        assert np.array_equal(bits(fused), gated.copy_to_host()), m


def test_rows_past_the_real_count_are_left_alone(cuda, few, rng):
    gpu = Gpu(cuda, "bfloat16")
    host = rng.standard_normal((200, 256)).astype(np.float32)
    x, weight = gpu.up(host), gpu.up(rng.standard_normal((520, 256)))
    whole = product(gpu, few, x, weight)
    for real in (0, 1, 8, 63, 64, 65, 129, 199, 200, 300):
        count = cuda.to_device(np.array([real], np.int32))
        poisoned = host.copy()
        poisoned[real:] = np.nan
        real = min(real, 200)
        for config in CONFIGS:
            got = product(gpu, few, gpu.up(poisoned), weight, num_rows=count, config=config)
            assert np.array_equal(bits(got[:real]), bits(whole[:real])), (real, config)
            assert np.isnan(got[real:].astype(np.float32)).all(), (real, config)


def test_logits_are_the_many_token_kernels(cuda, few, rng):
    from functools import partial

    from kernels_numba.ops.gemm_few.head import lm_head_few
    from kernels_numba.ops.warp.lm_head import lm_head_warp

    products = [partial(lm_head_warp, product=name) for name in ("many", "few", "")]

    gpu = Gpu(cuda, "bfloat16")
    hidden, weight = gpu.up(rng.standard_normal((300, 576))), gpu.up(rng.standard_normal((49152, 576)))
    for rows in (1, 7, 64, 200, 256):
        ids = cuda.to_device(rng.choice(300, rows, replace=False).astype(np.int32))
        outs = [blank(gpu, rows, 49152, "float32") for _ in range(4)]
        for launch, out in zip((lm_head_few, *products), outs, strict=True):
            launch(out, hidden, weight, ids)
        cuda.synchronize()
        mine, *others = (out.copy_to_host() for out in outs)
        assert np.isfinite(mine).all()
        for theirs in others:
            assert np.array_equal(bits(mine), bits(theirs)), rows


@pytest.mark.parametrize("config", [FewConfig(64, 16, 2), FewConfig(64, 128), FewConfig(128, 256)], ids=str)
def test_bits_survive_random_pauses(cuda, few, config):
    """Warps that dawdle at random reach orders that never happen by themselves; waits are bounded."""
    rng = np.random.default_rng(5)
    gpu = Gpu(cuda, "bfloat16")
    x, weight = gpu.up(rng.standard_normal((170, 1032))), gpu.up(rng.standard_normal((9992, 1032)))
    want = bits(product(gpu, few, x, weight, config=config))
    for _ in range(5):
        got = product(gpu, few, x, weight, config=config, build=Build(debug=True, stress=True))
        assert np.array_equal(bits(got), want)


@pytest.mark.parametrize("pdl", [True, False])
def test_a_chain_of_dependent_launches_sees_what_came_before(cuda, few, pdl):
    """Each product reads what the launch before it wrote and overwrites what the one before that read, in
    every mix of tiles, the number of tokens written by the launch before the chain; from a captured graph,
    replayed: as by launches one at a time."""
    from kernels_numba.compiler import jit
    from kernels_numba.launch import stream_handle

    @jit()
    def write_count(count, value):
        count[0] = value

    rng = np.random.default_rng(7)
    gpu = Gpu(cuda, "bfloat16")
    m, n, real = 100, 576, 77
    weights = [gpu.up(rng.standard_normal((n, n)) / np.sqrt(n)) for _ in CONFIGS]
    start = gpu.up(rng.standard_normal((m, n)))
    buffers = [cuda.device_array((m, n), np.uint16) for _ in range(2)]
    count = cuda.to_device(np.array([0], np.int32))

    def chain(stream, wait):
        write_count[1, 1, cuda.external_stream(stream) if stream else 0](count, real)
        x = start
        for turn, (config, weight) in enumerate(zip(CONFIGS, weights, strict=True)):
            out = buffers[turn % 2]
            few(out, x, weight, stream=stream, config=config, num_rows=count, build=Build(pdl=pdl))
            if wait:
                cuda.synchronize()
            x = out
        return x

    def poison():
        for buffer in buffers:
            buffer.copy_to_device(np.full((m, n), 0x7FC0, np.uint16))
        count.copy_to_device(np.array([0], np.int32))
        cuda.synchronize()

    poison()
    last = chain(None, wait=True)
    want = last.copy_to_host()
    assert (want[real:] == 0x7FC0).all()
    assert not (want[:real] == 0x7FC0).any()
    stream = cuda.stream()
    replay = captured(stream, lambda: chain(stream_handle(stream), wait=False))
    for _ in range(20):
        poison()
        replay()
        stream.synchronize()
        assert np.array_equal(last.copy_to_host(), want)


# A child's: a failed assertion in a kernel ends its CUDA context.
MUTANT = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from kernels_numba.compiler import cuda
from kernels_numba.ops.gemm_few.config import Build, FewConfig
from kernels_numba.ops.gemm_few.hopper import gemm_few
rng = np.random.default_rng(6)
x = cuda.to_device(rng.standard_normal((60, 4096)).astype(np.float16))
weight = cuda.to_device(rng.standard_normal((20000, 4096)).astype(np.float16))
results = []
for mutant in ("", {mutant!r}):
    out = cuda.to_device(np.full((60, 20000), np.nan, np.float16))
    gemm_few(out, x, weight, config=FewConfig(128, 64), build=Build(debug=True, mutant=mutant))
    cuda.synchronize()
    results.append(out.copy_to_host().tobytes())
print("same bits" if results[0] == results[1] else "other bits")
"""


def run_mutant(mutant):
    """What a child says that compares this build with the product's, and whether it ended well."""
    code = MUTANT.format(root=str(ROOT), mutant=mutant)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    return child.stdout + child.stderr, child.returncode == 0


def test_mutants_are_caught(cuda):
    """A wrong phase, a stage never handed back, K walked downward: noticed always. (A stage handed back too
    early, or a missing barrier, is a race that a GPU may win: in numpy both are caught.)"""
    said, ended = run_mutant("")
    assert ended, said
    assert "same bits" in said
    for mutant in ("wrong_phase", "descending"):
        said, ended = run_mutant(mutant)
        assert "same bits" not in said, mutant
        assert not ended or "other bits" in said, mutant
    said, ended = run_mutant("lost_arrival")
    assert not ended
    assert "empty: mbarrier wait timed out" in said
