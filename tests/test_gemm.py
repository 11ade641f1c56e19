"""The tensor-core GEMM: the code it becomes (no GPU needed), and its numbers and bits on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import no_simulator
import numpy as np
import pytest
from gpu_capture import captured

from kernels_numba.bench.tune_gemm_few import MANY_MORE
from kernels_numba.ops.gemm import hopper
from kernels_numba.ops.gemm.door import best_rung, refusal
from kernels_numba.ops.gemm.hopper_config import (
    CONFIGS,
    SMEM_LIMIT,
    TABLE_ONLY,
    HopperConfig,
    cheapest_config,
    pick_hopper_config,
    smem_plan,
)
from kernels_numba.ops.gemm.hopper_table import TUNED
from kernels_numba.ptx.epilogue import boxes_of

ROOT = Path(__file__).resolve().parent.parent

# In a child, because this process runs numba's simulator. What an engine can pick is assembled whole by
# test_assemble.py; here every epilogue, with one tile of each number of consumers and of boxes.
COMPILE = """
import json, sys
sys.path.insert(0, {root!r})
from dataclasses import asdict
from kernels_numba.assemble import assemble_kernel
from kernels_numba.ops.gemm import hopper
reports = []
for config in hopper.CONFIGS:
    for dtype in ("bfloat16", "float16"):
        for out_dtype in (dtype, "float32"):
            for has_bias in (False, True):
                if str(config) in {some!r}:
                    kernel = hopper.hopper_kernel(config, dtype, out_dtype, has_bias)
                    report = assemble_kernel(kernel, "sm_90a")
                    bounds = [config.registers, config.tile_n, config.sends_rows and out_dtype != "float32"]
                    reports.append([asdict(report), report.problems, out_dtype, *bounds])
print(json.dumps(reports))
"""
SOME = ("64x48", "128x144", "128x256")


@pytest.fixture(scope="module")
def assembled():
    return json.loads(no_simulator.last_line(COMPILE.format(root=str(ROOT), some=SOME)))


def test_every_epilogue_keeps_its_accumulators_in_registers(assembled):
    assert len(assembled) == 8 * len(SOME)
    for report, problems, out_dtype, registers, columns, sent in assembled:
        assert problems == [], report
        assert report["registers"] <= registers, report
        counts = report["instructions"]
        assert report["main_loop"]["HGMMA"] >= 4, report
        assert counts["UTMALDG"] >= 2, report
        assert ("UTMASTG" in counts) == (out_dtype != "float32"), report
        # Rows of a partial tile: 16 bytes at once out of shared memory, or two neighbours out of registers.
        assert counts["STG"] == columns // (16 if sent else 4), report
        assert counts["PREEXIT"] == 1, report  # lets the next launch start
        assert counts["ACQBULK"] >= 1, report  # waits for the one before


# A TMA store must not overtake the stores to shared memory that it sends: each needs a fence before it.
FENCES = """
import sys
sys.path.insert(0, {root!r})
from kernels_numba import launch
from kernels_numba.ops.gemm import hopper
from kernels_numba.ops.gemm.hopper_config import HopperConfig
build = hopper.Build(mutant={mutant!r})
kernel = hopper.hopper_kernel(HopperConfig(128, 96), "bfloat16", "bfloat16", False, build)
ptx = launch.compile_ptx(kernel.make(), kernel.types, kernel.threads, "sm_90a")
bare = staged = sent = 0
for line in ptx.splitlines():
    if "stmatrix" in line:
        bare, staged = 1, staged + 1
    elif "fence.proxy.async" in line:
        bare = 0
    elif ".global.shared::cta" in line:
        sent += 1
        assert not bare, "a TMA store follows stmatrix without a fence"
assert staged and sent, (staged, sent)
print("fenced")
"""


def test_staged_output_is_fenced_before_it_is_sent():
    assert no_simulator.last_line(FENCES.format(root=str(ROOT), mutant="")) == "fenced"
    with pytest.raises(AssertionError, match="without a fence"):
        no_simulator.last_line(FENCES.format(root=str(ROOT), mutant="no_fence"))


def test_the_heuristic_prefers_full_waves():
    def tile(m, n, k):
        return str(pick_hopper_config(m, n, k, 132)[0])

    assert tile(8192, 8192, 4096) == "128x256"
    assert tile(512, 3584, 3584) == "128x112"  # 128 tiles: one wave
    assert tile(8192, 576, 1536) == "128x144"
    assert tile(512, 576, 576) in ("64x48", "64x64")
    assert tile(1, 4096, 4096).startswith("64x")
    for m in (1, 512, 1000, 4096):
        config, group = pick_hopper_config(m, 4096, 4096, 132)
        assert config in CONFIGS
        assert group >= 1


def test_clusters_share_out_every_tile():
    for (row_tiles, n, k), name in TUNED.items():
        config = pick_hopper_config(128 * row_tiles, n, k, 132)[0]
        assert str(config) == name
        assert -(-n // config.tile_n) % config.cluster == 0
        assert -(-n // config.tile_n) * -(-128 * row_tiles // config.tile_m) <= 112 or config.cluster == 1


def test_the_table_names_tiles_that_exist_and_beats_the_model():
    names = {str(config) for config in (*CONFIGS, *TABLE_ONLY)}
    assert set(TUNED.values()) <= names
    for (row_tiles, n, k), name in TUNED.items():
        m = 128 * row_tiles
        assert str(pick_hopper_config(m, n, k, 132)[0]) == name
        assert str(pick_hopper_config(m - 127, n, k, 132)[0]) == name
        assert str(pick_hopper_config(m - 128, n, k, 132)[0]) == TUNED.get(
            (row_tiles - 1, n, k), str(cheapest_config(m - 128, n, k, 132))
        )


@pytest.mark.parametrize("config", [*CONFIGS, *MANY_MORE], ids=str)
def test_shared_memory_holds_what_the_kernel_stages(config):
    plan = smem_plan(config)
    assert plan.bytes <= SMEM_LIMIT
    assert config.stages >= 4
    assert all(plan.offset(name) % 1024 == 0 for name in ("x", "weight", "out"))
    assert "x" in plan.picture()
    columns = [box.first + i for boxes in config.rounds for box in boxes for i in range(box.columns)]
    assert columns == list(range(config.tile_n))
    for boxes in config.rounds:
        ends = [box.offset + 128 * box.columns for box in boxes]
        assert [box.offset for box in boxes] == [0, *ends[:-1]]
        assert ends[-1] <= config.staged_bytes


def test_deep_tiles_have_more_bytes_on_their_way():
    deeper = [config for config in MANY_MORE if config.deep]
    assert [(str(c), c.stages) for c in deeper] == [("64x32deep", 16), ("64x64deep", 13)]
    for deep in deeper:
        shallow = HopperConfig(deep.tile_m, deep.tile_n)
        assert shallow.stages == 8
        assert smem_plan(shallow).bytes < smem_plan(deep).bytes


def test_boxes_are_as_wide_as_they_can_be():
    assert [box.columns for box in boxes_of(144, 1 << 20)[0]] == [64, 64, 16]
    assert [[box.columns for box in boxes] for boxes in boxes_of(112, 8192)] == [[64], [32, 16]]
    with pytest.raises(ValueError, match="72 columns in rounds of 8192"):
        boxes_of(72, 8192)
    with pytest.raises(ValueError, match="64 columns in rounds of 4096"):
        boxes_of(64, 4096)


@pytest.mark.parametrize(
    ("rung", "capability", "dtype", "sizes", "why"),
    [
        ("hopper", (9, 0), "bfloat16", (576, 960), ""),
        ("hopper", (9, 0), "float16", (576, 960), ""),
        ("hopper", (9, 0), "float32", (576,), "it takes bfloat16 or float16, not float32"),
        ("hopper", (9, 0), "bfloat16", (576, 36), "multiples of 8, not 36"),
        ("hopper", (8, 9), "bfloat16", (576,), "capability 9.0, here is compute capability 8.9"),
        ("hopper", (12, 0), "bfloat16", (576,), "capability 9.0, here is compute capability 12.0"),
        ("hopper", None, "bfloat16", (576,), "here is no GPU"),
        ("mma_sync", (12, 0), "bfloat16", (576,), ""),
        ("mma_sync", (7, 5), "bfloat16", (576,), "8.0 or newer, here is compute capability 7.5"),
        ("plain", None, "float32", (7,), ""),
        ("somebodys_own", (7, 5), "float32", (7,), ""),
    ],
)
def test_rungs_that_cannot_run_say_why(rung, capability, dtype, sizes, why):
    said = refusal(rung, capability, dtype, sizes)
    assert said == "" if not why else why in said


def test_the_fastest_rung_is_taken_where_it_runs():
    assert best_rung("plain", (9, 0), "bfloat16", (576, 960)) == "hopper"
    assert best_rung("plain", (9, 0), "float32", (576, 960)) == "plain"
    assert best_rung("plain", (8, 6), "bfloat16", (576, 960)) == "mma_sync"
    assert best_rung("plain", (12, 0), "float16", (576, 960)) == "mma_sync"
    assert best_rung("plain", (12, 0), "bfloat16", (576, 36)) == "plain"
    assert best_rung("plain", (7, 5), "bfloat16", (576, 960)) == "plain"
    assert best_rung("reference", None, "bfloat16", (576, 960)) == "reference"


def test_unknown_mutants_are_named():
    with pytest.raises(ValueError, match="mutant is 'typo'; there are wrong_phase"):
        hopper.Build(mutant="typo")


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


def blank(gpu, *shape):
    """NaN on the device, in the product's type."""
    return gpu.up(np.full(shape, np.nan, np.float32))


@pytest.fixture
def cuda(gpu_where):
    return gpu_where(lambda have: have[0] == 9, "9.0")


def product(gpu, x, weight, bias, out_dtype, rows, config=None, num_rows=None, **how):
    """(rows of out as float64 incl. those past num_rows, which hold the fill) of a poisoned output."""
    storage = np.float32 if out_dtype == "float32" else (np.uint16 if gpu.dtype == "bfloat16" else np.float16)
    fill = np.full((rows, weight.shape[0]), np.nan, np.float32)
    out = gpu.cuda.to_device(fill) if out_dtype == "float32" else gpu.up(fill)
    assert out.dtype == storage
    hopper.gemm_hopper(out, x, weight, bias, config=config, num_rows=num_rows, **how)
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
    plain = (out_dtype, has_bias) == ("bfloat16", False)
    for config in CONFIGS if plain else [c for c in CONFIGS if str(c) in SOME]:
        got = product(gpu, x, weight, bias, out_dtype, m, config).astype(np.float64)
        assert np.isfinite(got).all(), config
        # The result's last place, and sums of k terms in float32 (tensor cores cut off low bits).
        assert (np.abs(got - want) <= epsilon * np.abs(want) + 2e-5).all(), (config, np.abs(got - want).max())


@pytest.mark.gpu
@pytest.mark.parametrize("config", TABLE_ONLY, ids=str)
def test_tiles_of_the_table_have_the_same_bits(cuda, config):
    """Parts of x fetched for the cluster's other blocks, under random pauses too; a count read late."""
    rng, gpu = np.random.default_rng(8), Gpu(cuda, "bfloat16")
    x, weight = rng.standard_normal((400, 1096)), gpu.up(rng.standard_normal((1280, 1096)))
    whole = product(gpu, gpu.up(x), weight, None, "float32", 400, HopperConfig(128, 128))
    for m in (1, 63, 64, 65, 129, 200, 256, 400):
        for build in (hopper.PRODUCT, hopper.Build(debug=True, stress=True)):
            got = product(gpu, gpu.up(x[:m]), weight, None, "float32", m, config, build=build)
            assert np.array_equal(got.view(np.uint32), whole[:m].view(np.uint32)), (m, build)
    for real in (0, 1, 65, 399):
        count = cuda.to_device(np.array([real], np.int32))
        got = product(gpu, gpu.up(x), weight, None, "float32", 400, config, count)
        assert np.array_equal(got[:real].view(np.uint32), whole[:real].view(np.uint32)), real
        assert np.isnan(got[real:]).all()


@pytest.mark.gpu
def test_rows_past_the_real_count_are_left_alone(cuda):
    rng = np.random.default_rng(3)
    gpu = Gpu(cuda, "bfloat16")
    x, weight = gpu.up(rng.standard_normal((300, 256))), gpu.up(rng.standard_normal((520, 256)))
    whole = product(gpu, x, weight, None, "bfloat16", 300)
    for real in (0, 1, 64, 65, 127, 128, 129, 200, 299, 300):
        count = cuda.to_device(np.array([real], np.int32))
        for config in CONFIGS:
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
    for config in CONFIGS:
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
@pytest.mark.parametrize(
    "config", [HopperConfig(64, 96), HopperConfig(128, 80), HopperConfig(128, 256)], ids=str
)
def test_bits_survive_random_pauses(cuda, config):
    """Warps that dawdle at random reach orders that never happen by themselves; waits are bounded."""
    rng = np.random.default_rng(5)
    gpu = Gpu(cuda, "bfloat16")
    x, weight = gpu.up(rng.standard_normal((777, 1032))), gpu.up(rng.standard_normal((1544, 1032)))
    want = product(gpu, x, weight, None, "bfloat16", 777, config).view(np.uint16)
    for _ in range(5):
        build = hopper.Build(debug=True, stress=True)
        got = product(gpu, x, weight, None, "bfloat16", 777, config, build=build, group=3).view(np.uint16)
        assert np.array_equal(got, want)


# A child's: a failed assertion in a kernel ends its CUDA context.
MUTANT = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from kernels_numba.compiler import cuda
from kernels_numba.ops.gemm import hopper
from kernels_numba.ops.gemm.hopper_config import HopperConfig
rng = np.random.default_rng(6)
x, weight = (cuda.to_device(rng.standard_normal((512, 4096)).astype(np.float16)) for _ in range(2))
results = []
for mutant in ("", {mutant!r}):
    out = cuda.to_device(np.full((512, 512), np.nan, np.float32))
    build = hopper.Build(debug=True, mutant=mutant)
    hopper.gemm_hopper(out, x, weight, config=HopperConfig(128, 128), build=build)
    cuda.synchronize()
    results.append(out.copy_to_host().tobytes())
print("same bits" if results[0] == results[1] else "other bits")
"""


def run_mutant(mutant):
    """What a child says that compares this build with the product's, and whether it ended well."""
    code = MUTANT.format(root=str(ROOT), mutant=mutant)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    return child.stdout + child.stderr, child.returncode == 0


@pytest.mark.gpu
def test_mutants_are_caught(cuda):
    """A consumer that waits for the wrong phase reads stages before they are there, or waits for ever; one
    that keeps a stage ends the wait for it with the barrier's name."""
    said, ended = run_mutant("")
    assert ended, said
    assert "same bits" in said
    said, ended = run_mutant("wrong_phase")
    assert "same bits" not in said
    assert not ended or "other bits" in said  # a fault, a wait that timed out, or wrong numbers
    said, ended = run_mutant("lost_arrival")
    assert not ended
    assert "empty: mbarrier wait timed out" in said


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [True, False])
def test_a_chain_of_dependent_launches_sees_what_came_before(cuda, pdl):
    """Each product reads what the launch before it wrote and overwrites what the one before that read, in
    every mix of tiles, from a captured graph, replayed: as by launches one at a time."""
    from kernels_numba.launch import stream_handle

    rng = np.random.default_rng(7)
    gpu = Gpu(cuda, "bfloat16")
    m, n = 700, 576
    weights = [gpu.up(rng.standard_normal((n, n)) / np.sqrt(n)) for _ in CONFIGS]
    start = gpu.up(rng.standard_normal((m, n)))
    buffers = [cuda.device_array((m, n), np.uint16) for _ in range(2)]

    def chain(stream, wait):
        x = start
        for turn, (config, weight) in enumerate(zip(CONFIGS, weights, strict=True)):
            out = buffers[turn % 2]
            hopper.gemm_hopper(out, x, weight, stream=stream, config=config, build=hopper.Build(pdl=pdl))
            if wait:
                cuda.synchronize()
            x = out
        return x

    last = chain(None, wait=True)
    want = last.copy_to_host()
    stream = cuda.stream()
    replay = captured(stream, lambda: chain(stream_handle(stream), wait=False))
    for _ in range(20):
        for buffer in buffers:
            buffer.copy_to_device(np.full((m, n), 0x7FC0, np.uint16))
        cuda.synchronize()
        replay()
        stream.synchronize()
        assert np.array_equal(last.copy_to_host(), want)


@pytest.mark.gpu
def test_wrong_arguments_are_named(cuda):
    gpu = Gpu(cuda, "bfloat16")

    def zeros(*shape):
        return gpu.up(np.zeros(shape, np.float32))

    with pytest.raises(ValueError, match=r"multiple of 8"):
        hopper.gemm_hopper(zeros(4, 12), zeros(4, 64), zeros(12, 64))
    with pytest.raises(ValueError, match=r"weight has shape \(16, 72\); \(16, 64\) is required"):
        hopper.gemm_hopper(zeros(4, 16), zeros(4, 64), zeros(16, 72))
    with pytest.raises(ValueError, match=r"x has dtype float32; uint16 or float16 is required"):
        hopper.gemm_hopper(zeros(4, 16), cuda.to_device(np.zeros((4, 64), np.float32)), zeros(16, 64))
    hopper.gemm_hopper(zeros(0, 16), zeros(0, 64), zeros(16, 64))
