"""The GEMM for few tokens: its text in numpy, bit by bit against the order of K; the code it becomes; and,
on a GPU, its numbers and its bits against the many-token kernel's."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path

import no_simulator
import numpy as np
import pytest
from few_products import make_product, rounded, same_bits, to_float
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from kernels_numba.compiler import SIMULATOR, KernelsUnavailable, cuda
from kernels_numba.inputs import BFLOAT16
from kernels_numba.layouts import banks_of, unit_offset
from kernels_numba.ops.gemm_few import gemm_few, gemm_few_cost, gemm_few_spec
from kernels_numba.ops.gemm_few.config import (
    CONFIGS,
    MUTANTS,
    SMEM_OF_BLOCK,
    SMEM_OF_SM,
    SMEM_OF_SYSTEM,
    Build,
    FewConfig,
    pick_few_config,
    smem_plan,
    use_few,
)
from kernels_numba.ops.gemm_few.door import few_operands
from kernels_numba.ops.gemm_few.in_numpy import Placed, in_numpy
from kernels_numba.simt_turns import Stuck

ROOT = Path(__file__).resolve().parent.parent
EPILOGUES = ("", "residual", "silu")

# The kernel's text in numpy.

SHAPES = [(1, 16, 8), (13, 208, 200), (64, 64, 1024), (131, 272, 136)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("config", [*CONFIGS, FewConfig(64, 24, 2), FewConfig(128, 48)], ids=str)
def test_bits_are_those_of_the_order_along_k(config, m, n, k):
    """Addresses, fragments, swizzle, edges, barriers; and what is not to be written. In every epilogue."""
    rng = np.random.default_rng([m, n, k])
    for epilogue in EPILOGUES:
        product = make_product(rng, m, n, k, bias=k % 16 == 8, epilogue=epilogue)
        assert same_bits(product.fused(config), product.unfused("bfloat16")), epilogue
    product = make_product(rng, m, n, k, bias=True)
    assert same_bits(product.fused(config, "float32"), product.sums())


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_float16_has_bits_of_its_own(epilogue):
    product = make_product(np.random.default_rng(3), 21, 144, 200, "float16", True, epilogue)
    config = FewConfig(128, 24)
    assert same_bits(product.fused(config), product.unfused("float16"))
    if not epilogue:
        assert same_bits(product.fused(config, "float32"), product.sums())


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_numbers_against_float64(out_dtype):
    product = make_product(np.random.default_rng(4), 40, 136, 1000, bias=True)
    got = to_float(product.fused(FewConfig(64, 32, 2), out_dtype))
    plain = to_float(product.x) @ to_float(product.weight).T + to_float(product.bias)
    plain = to_float(rounded(plain, out_dtype))
    assert_close(got, plain, product.exact(), out_dtype, 1000, "gemm_few")


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_definition_is_what_the_kernel_makes(epilogue):
    """The spec, whose order of additions is BLAS': within two roundings of bfloat16."""
    product = make_product(np.random.default_rng(5), 9, 96, 328, bias=True, epilogue=epilogue)
    x, weight, bias = (a.view(BFLOAT16) for a in (product.x, product.weight, product.bias))
    residual = None if product.residual is None else product.residual.view(BFLOAT16)
    want = gemm_few_spec(x, weight, bias, residual=residual, activation=product.activation)
    got = to_float(product.fused(FewConfig(64, 16, 2)))
    assert np.allclose(got, want, rtol=2**-6, atol=2**-6)


def test_a_token_has_the_same_bits_in_any_company():
    rng = np.random.default_rng(6)
    product = make_product(rng, 150, 136, 520)
    whole = product.fused(FewConfig(128, 256), "float32", grid=1)
    for config, rows in ((FewConfig(64, 8, 2), [17]), (FewConfig(64, 64, 2), [3, 149, 64, 65, 0]),
                         (FewConfig(128, 32, 2), list(range(90, 150)))):  # fmt: skip
        assert same_bits(product.only(rows).fused(config, "float32"), whole[rows])


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("m", "config"), [(70, FewConfig(64, 128)), (70, FewConfig(128, 32, 2))], ids=str)
def test_the_real_number_of_tokens_is_read_by_the_kernel(m, config, epilogue):
    """Rows past it, as NaN, decide nothing, and nothing is written there; a number past the array is cut."""
    for real in (0, 9, m - 1, m + 5, -200):
        product = make_product(np.random.default_rng(7), m, 144, 136, epilogue=epilogue)
        product.x[max(real, 0) :] = 0x7FC0
        got = product.fused(config, real=real, grid=3)
        assert len(got) == max(min(real, m), 0)
        if real > 0:
            assert same_bits(got, product.only(slice(0, real)).unfused("bfloat16")), real


def test_a_residual_may_be_the_output():
    rng = np.random.default_rng(8)
    product = make_product(rng, 20, 136, 200, epilogue="residual")
    stream = np.ascontiguousarray(product.residual)
    in_numpy(FewConfig(128, 24), stream, product.x, product.weight, residual=stream)
    assert same_bits(stream, product.unfused("bfloat16"))


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 80), n=st.integers(1, 24), k=st.integers(1, 60), tile_n=st.sampled_from([64, 128]),
    tile_t=st.integers(1, 10), out_dtype=st.sampled_from(["bfloat16", "float32"]),
    epilogue=st.sampled_from(EPILOGUES), bias=st.booleans(), grid=st.integers(1, 4),
    real=st.one_of(st.none(), st.integers(0, 80)), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_bits_of_random_products(m, n, k, tile_n, tile_t, out_dtype, epilogue, bias, grid, real, seed):
    epilogue = epilogue if out_dtype == "bfloat16" else ""
    n, k = (16 if epilogue == "silu" else 8) * n, 8 * k
    product = make_product(np.random.default_rng(seed), m, n, k, bias=bias, epilogue=epilogue)
    rows = m if real is None else min(real, m)
    got = product.fused(FewConfig(tile_n, 8 * tile_t), out_dtype, real, grid=grid, seed=seed)
    assert same_bits(got, product.unfused(out_dtype)[:rows])


# Mistakes.


def is_right(product, config, want, **how):
    """Whether the bits are right; False for an access outside of an array, or a hang."""
    try:
        return same_bits(product.fused(config, **how), want)
    except (AssertionError, IndexError, Stuck, RuntimeError):
        return False


@pytest.fixture(scope="module")
def steady():
    """A product with more steps of K than stages, several tiles a block, tails everywhere."""
    product = make_product(np.random.default_rng(9), 37, 328, 712, bias=True)
    config, want = FewConfig(128, 64), product.unfused("bfloat16")
    assert all(same_bits(product.fused(config, seed=seed), want) for seed in range(4))
    return product, config, want


@pytest.mark.parametrize("mutant", MUTANTS[1:])
def test_mutants_are_noticed_in_numpy(steady, mutant):
    product, config, want = steady
    # What is a race is lost in some order of events.
    found = [is_right(product, config, want, build=Build(mutant=mutant), seed=seed) for seed in range(4)]
    assert not all(found)


def test_debug_and_stress_change_no_bit(steady):
    product, config, want = steady
    assert is_right(product, config, want, build=Build(debug=True, stress=True), seed=3)


MISTAKES = {
    "x before it is there": (
        "kernel", "wait_full(int32(full + 8 * stage), int32(phase ^ wrong_phase))", "pass",
    ),
    "a product read early": ("kernel", "                finish(acc)\n", ""),
    "a stage refilled early": (
        "kernel", "wait_empty(int32(smem + empty_at + 8 * stage), int32(phase ^ 1))", "pass",
    ),
    "the last step of K dropped": ("kernel", "k_tiles = int32((k + 63) >> 6)", "k_tiles = int32(k >> 6)"),
    "both warpgroups on the same rows": ("kernel", " + consumer * consumer_weight)", ")"),
    "the bias of the row below": ("kernel", "int32(my_row + 8), n))", "my_row, n))"),
    "early weights of another tile": ("kernel", "int32(tile * tile_n), once)", "int32(0), once)"),
    "no swizzle where results are staged": ("store", " ^ (lane & 7))", ")"),
    "no swizzle where they are sent": ("store", "((mine ^ (line & 7)) * UNIT)", "mine * UNIT"),
    "the lower rows are the upper ones": (
        "store", "pack(acc[at + 8 * pair + 2], acc[at + 8 * pair + 3])",
        "pack(acc[at + 8 * pair], acc[at + 8 * pair + 1])",
    ),
    "tokens past the last are written": ("store", "int32(token < limit)", "int32(1)"),
    "columns past the last are written": ("store", "int32(mine * columns_a_thread < columns)", "int32(1)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed_in_numpy(steady, mistake):
    product, config, want = steady
    part, old, new = MISTAKES[mistake]

    def change(name, text):
        if not name.endswith(f"gemm_few.{part}"):
            return text
        assert old in text
        return text.replace(old, new)

    assert not all(is_right(product, config, want, change=change, seed=seed) for seed in range(4))


def test_a_residual_rounded_once_is_noticed():
    """What a careless fusion would do: the product is rounded before it is added."""
    product = make_product(np.random.default_rng(10), 16, 128, 256, epilogue="residual")
    once = rounded(product.sums() + to_float(product.residual), "bfloat16")
    assert not same_bits(once, product.unfused("bfloat16"))


# Tiles.


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_shared_memory_and_registers_of_a_tile(config):
    plan = smem_plan(config)
    assert plan.bytes <= config.smem_limit <= SMEM_OF_BLOCK
    assert config.blocks * (plan.bytes + SMEM_OF_SYSTEM) <= SMEM_OF_SM
    assert all(plan.offset(name) % 1024 == 0 for name in ("weight", "x", "out"))
    assert plan.bytes + config.stage_bytes > config.smem_limit - 2048  # no stage more would fit
    # What an SM must have asked for to draw its part of 3.3 TB/s over a microsecond, if all 132 draw.
    assert config.blocks * config.stages * config.tile_n * 128 > 3.3e12 * 1e-6 / 132


def test_tiles_that_cannot_be_are_named():
    for sizes, message in (
        ((96, 8), "tile_n is 96; 64 or 128"), ((64, 12), "tile_t is 12; a multiple of 8"),
        ((64, 264), "tile_t is 264"), ((128, 256, 3), "1 stages fit; 2 are required"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            FewConfig(*sizes)
    with pytest.raises(ValueError, match="mutant is 'typo'; there are wrong_phase"):
        Build(mutant="typo")


# us, of `just tune gemm_few` on an H100 of 132 SMs: where tiles differ most, and where the pick loses most.
MEASURED = {
    (1, 2048, 2048): {"64x8x2": 4.72, "64x8": 4.67},
    (1, 3072, 2048): {"64x8x2": 5.66, "64x8": 5.68},
    (1, 6144, 4096): {"64x8x2": 19.59, "64x8": 16.64, "128x8x2": 18.89},
    (1, 3584, 3584): {"64x8x2": 10.04, "64x8": 9.65},
    (1, 4608, 3584): {"64x8x2": 12.42, "64x8": 12.03},
    (8, 37888, 3584): {"64x8x2": 91.41, "64x16x2": 91.53, "128x8x2": 93.82, "128x16x2": 93.28},
    (32, 576, 1536): {"64x32x2": 3.81, "64x32": 3.45},
    (32, 2048, 8192): {"64x32x2": 16.39, "64x32": 14.06},
    (32, 3584, 3584): {"64x32x2": 10.89, "64x32": 9.96},
    (64, 4096, 14336): {"64x64": 42.41, "64x64x2": 47.79, "128x64": 62.91},
    (64, 28672, 4096): {"64x64x2": 83.16, "128x64": 81.46, "128x128": 91.86},
    (128, 4096, 4096): {"64x128": 14.16, "128x64": 16.81, "128x128": 20.72},
    (128, 3072, 2048): {"64x128": 7.75, "64x64x2": 12.57, "128x64": 11.39},
    (256, 3072, 576): {"64x128": 4.72, "128x64": 5.55, "128x128": 6.11},
    (384, 28672, 4096): {"128x128": 157.79, "128x256": 242.47},
    (8, 128256, 2048): {"64x8x2": 175.60, "64x16x2": 175.50, "128x8x2": 179.01},
}
LOSES = {(32, 4608, 3584): {"64x32x2": 12.78, "64x32": 13.32}}


def test_the_pick_is_the_tile_that_was_measured_fastest():
    for most, table in ((1.025, MEASURED), (1.05, LOSES)):
        for shape, times in table.items():
            picked = str(pick_few_config(*shape, 132))
            assert times[picked] <= most * min(times.values()), shape
    assert all(
        str(pick_few_config(*shape, 132)) != min(times, key=times.get) for shape, times in LOSES.items()
    )


def test_a_pick_is_just_wide_enough():
    for m in (1, 8, 9, 64, 65, 100, 128, 129, 256, 384, 5000):
        for n, k in ((4096, 4096), (28672, 4096), (3584, 18944), (576, 1536), (49152, 576)):
            picked = pick_few_config(m, n, k, 132)
            assert picked in CONFIGS
            assert picked.tile_t >= min(m, 128)
            assert picked.tile_t < 2 * max(m, 8) or m == 65
    # A GPU with fewer SMs has enough to do with larger tiles.
    assert [str(pick_few_config(100, 4096, 4096, sms)) for sms in (64, 63)] == ["64x128", "128x128"]
    assert str(pick_few_config(200, 28672, 4096, 132)) == "128x256"


def test_few_tokens_are_few():
    for m, small, large in ((1, True, True), (32, True, True), (48, True, False), (96, True, False)):
        assert all(use_few(m, n, k, 132) is small for n, k in ((4096, 4096), (6144, 4096), (576, 576)))
        assert all(use_few(m, n, k, 132) is large for n, k in ((128256, 2048), (16384, 2048)))
    for m, n, k, few in (
        (128, 4096, 4096, True), (129, 4096, 4096, False), (128, 3072, 2048, True), (97, 2048, 8192, False),
        (97, 3584, 18944, False), (384, 4096, 4096, False),
    ):  # fmt: skip
        assert use_few(m, n, k, 132) is few, (m, n, k)


def test_staged_results_meet_no_bank_conflict():
    """Eight lanes at a time: stmatrix writes eight tokens of one unit; stores read a token's eight units, or
    the gates, then the ups, of two tokens."""
    every = set(range(0, 32, 4))
    for first in range(0, 64, 8):
        for unit in range(8):
            assert set(banks_of(unit_offset(np.arange(first, first + 8), unit))) == every
    for member in range(0, 128, 8):
        lanes = np.arange(member, member + 8)
        assert set(banks_of(unit_offset(lanes >> 3, lanes & 7))) == every
        for up in (0, 1):
            assert set(banks_of(unit_offset(lanes >> 2, 2 * (lanes & 3) + up))) == every


def test_cost():
    plain = gemm_few_cost(4, 32, 16)
    assert (plain.bytes, plain.flops) == (2 * (4 * 16 + 32 * 16 + 4 * 32), 2 * 4 * 32 * 16)
    assert gemm_few_cost(4, 32, 16, epilogue="residual").bytes == plain.bytes + 2 * 4 * 32
    silu = gemm_few_cost(4, 32, 16, epilogue="silu")
    assert (silu.bytes, silu.flops) == (plain.bytes - 4 * 32, plain.flops + 5 * 4 * 16)


# The door.


def placed(*shape, dtype=np.uint16):
    return Placed(np.zeros(shape, dtype), 1 << 20)


FLOAT_OUT = placed(4, 16, dtype=np.float32)
BOTH = (placed(4, 16), placed(4, 8))  # out, x
SILU = {"activation": "silu"}


@pytest.mark.parametrize(("arguments", "how", "message"), [
    ((*BOTH, placed(16, 8)), {"activation": "relu"}, "activation is 'relu'; \"\" or"),
    ((*BOTH, placed(32, 8)), {**SILU, "residual": placed(4, 16)}, "residual is given beside activation"),
    ((*BOTH, placed(16, 8)), SILU, r"weight has shape \(16, 8\); \(32"),
    ((FLOAT_OUT, placed(4, 8), placed(32, 8)), SILU, "out has dtype float32; uint16"),
    ((FLOAT_OUT, placed(4, 8), placed(16, 8)), {"residual": FLOAT_OUT}, "out has dtype float32; uint16"),
    ((*BOTH, placed(16, 8)), {"residual": placed(5, 16)}, r"residual has shape \(5, 16\)"),
    ((*BOTH, placed(32, 8), placed(16)), SILU, r"bias has shape \(16,\)"),
    ((placed(4, 12), placed(4, 8), placed(12, 8)), {}, "multiple of 8"),
])  # fmt: skip
def test_wrong_arguments_are_named(arguments, how, message):
    with pytest.raises(ValueError, match=message):
        few_operands(*arguments, **how)


@pytest.mark.skipif(not SIMULATOR, reason="not in the simulator")
def test_the_simulator_is_told_apart():
    out, x, weight = (cuda.to_device(np.zeros(shape, np.uint16)) for shape in ((4, 16), (4, 8), (16, 8)))
    with pytest.raises(KernelsUnavailable, match="made of PTX"):
        gemm_few(out, x, weight)


# What it becomes, in a child, because this process runs numba's simulator: all that an engine could pick
# (with a bias the widest alone: it takes two registers), and some of what is built when it is first used.

COMPILE = """
import json, sys
sys.path.insert(0, {root!r})
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from kernels_numba.assemble import assemble_kernel
from kernels_numba.disassemble import disassemble
from kernels_numba.ops.gemm_few import hopper
from kernels_numba.ops.gemm_few.config import Build, FewConfig, CONFIGS, PRODUCT
kernels = [k for k in hopper.kernels() if not k.key[4] or k.key[0].tile_t > 64]
for epilogue in ("residual", "silu"):
    kernels.append(hopper.few_kernel(FewConfig(64, 24, 2), "float16", "float16", epilogue, True, PRODUCT))
kernels.append(hopper.few_kernel(FewConfig(128, 256), "float16", "float32", "", True, PRODUCT))
stress = Build(stress=True)
kernels.append(hopper.few_kernel(FewConfig(128, 48), "bfloat16", "bfloat16", "residual", True, stress))
def assembled(index):
    kernel = kernels[index]
    report = assemble_kernel(kernel, "sm_90a")
    return [asdict(report), report.problems, kernel.key[0].registers, kernel.key[2]]
with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
    reports = list(pool.map(assembled, range(len(kernels))))
sass = disassemble(hopper.few_kernel(CONFIGS[1], "bfloat16", "bfloat16", "", False), "sm_90a").sass
print(json.dumps([reports, sass]))
"""


@pytest.fixture(scope="module")
def assembled():
    return json.loads(no_simulator.last_line(COMPILE.format(root=str(ROOT)), timeout=500))


def test_accumulators_stay_in_registers_and_blocks_fit(assembled):
    reports, _ = assembled
    assert len(reports) == 4 * len(CONFIGS) + sum(config.tile_t > 64 for config in CONFIGS) + 4
    for report, problems, registers, out_dtype in reports:
        assert problems == [], report["name"]
        assert report["registers"] <= registers, report["name"]
        counts = report["instructions"]
        assert report["main_loop"]["HGMMA"] >= 4, report["name"]
        assert counts["UTMALDG"] >= 3, report["name"]  # early weights, weights, tokens
        assert ("STSM" in counts) == (out_dtype != "float32"), report["name"]
        assert counts["PREEXIT"] == 1, report["name"]  # lets the next launch start
        assert counts["ACQBULK"] == 2, report["name"]  # producer and consumers wait for the ones before


def test_weights_are_asked_for_before_the_launch_waits(assembled):
    """In machine code, consumers first: wait, number of tokens; producer: early weights, wait, number of
    tokens, the rest."""
    opcodes = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9]*)", assembled[1])
    order = [name for name, _ in groupby(o for o in opcodes if o in ("ACQBULK", "LDG", "UTMALDG"))]
    assert order == ["ACQBULK", "LDG", "UTMALDG", "ACQBULK", "LDG", "UTMALDG"]
