"""The tensor-core GEMM: the code it becomes (no GPU needed), and its numbers and bits on a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kernels_numba.ops.gemm import hopper

ROOT = Path(__file__).resolve().parent.parent

# In a child, because this process runs numba's simulator: every specialisation that the heuristic can pick.
COMPILE = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from kernels_numba import assemble, launch
from kernels_numba.ops.gemm import hopper
ptxas = assemble.find_ptxas()
import subprocess, tempfile
reports = []
for dtype, out_dtype, bias in (("bfloat16", "bfloat16", False), ("bfloat16", "bfloat16", True),
                               ("bfloat16", "float32", False), ("float16", "float16", True)):
    for config in hopper.CONFIGS.values():
        if (bias or dtype == "float16" or out_dtype == "float32") and config.tile_n not in (32, 144, 256):
            continue
        kernel = hopper.hopper_kernel(config, dtype, out_dtype, bias)
        ptx = launch.compile_ptx(kernel.make(), kernel.types, kernel.threads, "sm_90a")
        with tempfile.TemporaryDirectory() as folder:
            source, cubin = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
            source.write_text(ptx)
            out = subprocess.run([str(ptxas), "-v", "-arch=sm_90a", str(source), "-o", str(cubin)],
                                 capture_output=True, text=True, check=True)
            sass = subprocess.run([str(assemble.find_tool("nvdisasm")), "-c", str(cubin)],
                                  capture_output=True, text=True, check=True).stdout
        reports.append([kernel.name, kernel.smem, out.stdout + out.stderr, sass])
print(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def assembled():
    pytest.importorskip("numba")
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    child = subprocess.run(
        [sys.executable, "-c", COMPILE.format(root=str(ROOT))],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_every_specialisation_keeps_its_accumulators_in_registers(assembled):
    assert len(assembled) == len(hopper.CONFIGS) + 3 * 3
    for name, smem, report, sass in assembled:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, (name, report)
        assert re.search(r"Used 168 registers", report), (
            name,
            report,
        )  # 384 threads x 168: all that an SM has
        assert smem <= hopper.SMEM_LIMIT
        assert not re.search(r"\b(LDL|STL)\b", sass), name
        assert len(re.findall(r"\bHGMMA", sass)) >= 4, name
        assert re.search(r"\bUTMALDG", sass), name
        assert bool(re.search(r"\bUTMASTG", sass)) == ("float32" not in name), name


def test_the_heuristic_prefers_full_waves():
    assert hopper.pick_hopper_config(8192, 8192, 132).tile_n == 256
    assert hopper.pick_hopper_config(512, 3584, 132).tile_n == 112  # 128 tiles: one wave
    assert hopper.pick_hopper_config(8192, 576, 132).tile_n == 144
    for m in (1, 512, 1000, 4096):
        assert hopper.pick_hopper_config(m, 4096, 132) in hopper.CONFIGS.values()


@pytest.mark.parametrize("tile_n", list(hopper.CONFIGS))
def test_shared_memory_holds_what_the_kernel_stages(tile_n):
    config = hopper.CONFIGS[tile_n]
    plan = hopper.smem_plan(config)
    assert plan.bytes <= hopper.SMEM_LIMIT
    assert tile_n % (config.chunk * config.chunks) == 0
    assert all(plan.offset(name) % 1024 == 0 for name in ("x", "weight", "out"))
    assert "x" in plan.picture()


# On a GPU.


class Gpu:
    """Arrays of one dtype on the device, and the product through the hopper rung."""

    def __init__(self, cuda, dtype):
        self.cuda, self.dtype = cuda, dtype

    def up(self, array):
        import ml_dtypes

        if self.dtype == "bfloat16":
            return self.cuda.to_device(array.astype(ml_dtypes.bfloat16).view(np.uint16))
        return self.cuda.to_device(array.astype(np.float16))

    def down(self, array):
        import ml_dtypes

        host = array.copy_to_host()
        return host.view(ml_dtypes.bfloat16) if host.dtype == np.uint16 else host


@pytest.fixture
def cuda(on_gpu):
    if not on_gpu:
        pytest.skip("runs under --device=cuda only")
    from kernels_numba.compiler import cuda

    if cuda.get_current_device().compute_capability[0] != 9:
        pytest.skip("needs compute capability 9.0")
    return cuda


def product(gpu, x, weight, bias, out_dtype, rows, config=None, num_rows=None):
    """(rows of out as float64 incl. those past num_rows, which hold the fill) of a poisoned output."""
    storage = np.float32 if out_dtype == "float32" else (np.uint16 if gpu.dtype == "bfloat16" else np.float16)
    fill = np.full((rows, weight.shape[0]), np.nan, np.float32)
    out = gpu.cuda.to_device(fill) if out_dtype == "float32" else gpu.up(fill)
    assert out.dtype == storage
    hopper.gemm_hopper(out, x, weight, bias, config=config, num_rows=num_rows)
    gpu.cuda.synchronize()
    return gpu.down(out)


SHAPES = [
    (1, 8, 8),
    (63, 264, 72),
    (64, 576, 1536),
    (129, 960, 576),
    (700, 3072, 576),
    (128, 256, 64),
    (1000, 4096, 4096),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize(("dtype", "out_dtype", "has_bias"), [
    ("bfloat16", "bfloat16", False), ("bfloat16", "bfloat16", True), ("bfloat16", "float32", True),
    ("float16", "float16", False), ("float16", "float32", True),
])  # fmt: skip
def test_hopper_against_float64(cuda, m, n, k, dtype, out_dtype, has_bias):
    rng = np.random.default_rng([m, n, k])
    gpu = Gpu(cuda, dtype)
    x, weight = gpu.up(rng.standard_normal((m, k))), gpu.up(rng.standard_normal((n, k)) / np.sqrt(k))
    bias = gpu.up(rng.standard_normal(n)) if has_bias else None
    want = gpu.down(x).astype(np.float64) @ gpu.down(weight).astype(np.float64).T
    if has_bias:
        want += gpu.down(bias).astype(np.float64)
    epsilon = {"float32": 2e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}[out_dtype]
    # Every tile in the plain case; elsewhere the epilogues differ, and one tile of each kind of store box
    # has them all.
    widths = hopper.WIDTHS if (out_dtype, has_bias) == ("bfloat16", False) else (32, 144, 256)
    for config in map(hopper.CONFIGS.get, widths):
        got = product(gpu, x, weight, bias, out_dtype, m, config).astype(np.float64)
        assert np.isfinite(got).all(), config
        # The result's last place, and sums of k terms in float32 (tensor cores cut off low bits).
        assert (np.abs(got - want) <= epsilon * np.abs(want) + 2e-5).all(), (config, np.abs(got - want).max())


@pytest.mark.gpu
def test_rows_past_the_real_count_are_left_alone(cuda):
    rng = np.random.default_rng(3)
    gpu = Gpu(cuda, "bfloat16")
    x, weight = gpu.up(rng.standard_normal((300, 256))), gpu.up(rng.standard_normal((520, 256)))
    whole = product(gpu, x, weight, None, "bfloat16", 300)
    for real in (0, 1, 64, 65, 127, 128, 129, 200, 299, 300):
        count = cuda.to_device(np.array([real], np.int32))
        for config in hopper.CONFIGS.values():
            got = product(gpu, x, weight, None, "bfloat16", 300, config, count)
            assert np.array_equal(got[:real].view(np.uint16), whole[:real].view(np.uint16)), (real, config)
            assert np.isnan(got[real:].astype(np.float32)).all(), (real, config)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (576, 1536), (3584, 18944)])
def test_a_row_has_the_same_bits_in_any_company(cuda, n, k):
    """Random M and neighbours, new ones each run, through every tile."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    gpu = Gpu(cuda, "bfloat16")
    weight = gpu.up(rng.standard_normal((n, k)).astype(np.float32))
    rows = rng.standard_normal((5, k)).astype(np.float32) * np.exp(rng.standard_normal((5, 1)))
    alone = [product(gpu, gpu.up(row[None]), weight, None, "float32", 1) for row in rows]
    for config in hopper.CONFIGS.values():
        m = int(rng.integers(5, 700))
        x = rng.standard_normal((m, k)).astype(np.float32) * 100
        places = rng.choice(m, 5, replace=False)
        x[places] = rows
        got = product(gpu, gpu.up(x), weight, None, "float32", m, config)
        for place, want in zip(places, alone, strict=True):
            assert np.array_equal(got[place].view(np.uint32), want[0].view(np.uint32)), (
                seed,
                config,
                m,
                place,
            )


@pytest.mark.gpu
def test_wrong_arguments_are_named(cuda):
    gpu = Gpu(cuda, "bfloat16")

    def zeros(*shape):
        return gpu.up(np.zeros(shape, np.float32))

    with pytest.raises(ValueError, match=r"multiple of 8"):
        hopper.gemm_hopper(zeros(4, 12), zeros(4, 64), zeros(12, 64))
    with pytest.raises(ValueError, match=r"x.shape\[1\] is 64; 72 is required"):
        hopper.gemm_hopper(zeros(4, 16), zeros(4, 64), zeros(16, 72))
    with pytest.raises(ValueError, match=r"x.dtype is float32"):
        hopper.gemm_hopper(zeros(4, 16), cuda.to_device(np.zeros((4, 64), np.float32)), zeros(16, 64))
    hopper.gemm_hopper(zeros(0, 16), zeros(0, 64), zeros(16, 64))
