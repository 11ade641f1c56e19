"""The mma.sync GEMM: its text in numpy bit for bit against the order it promises, mistakes noticed, the code
it becomes, what its launcher refuses, which tile it takes."""

from __future__ import annotations

import json
from pathlib import Path

import no_simulator
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from kernels_numba.bench.tune_mma import OTHERS
from kernels_numba.ops.gemm_mma import Card, in_numpy, kernels, plan_gemm_mma
from kernels_numba.ops.gemm_mma.config import (
    CONFIGS,
    SM_SMEM,
    SMEM_LIMIT,
    SYSTEM_SMEM,
    MmaConfig,
    model_cycles,
    pick_config,
    smem_plan,
)
from kernels_numba.ops.gemm_mma.kernel import make_gemm_mma_kernel
from kernels_numba.ops.warp import rms_norm, silu_mul
from kernels_numba.ops.warp.door import View
from kernels_numba.ops.warp.in_numpy import Arrays
from kernels_numba.ptx import mma_tile
from kernels_numba.simt_turns import Stuck

ROOT = Path(__file__).resolve().parent.parent
SMALL = MmaConfig(64, 64, 32, 3, 2, 2)  # four warps and short stages: for mistakes, not for speed
WIDE = in_numpy.ELEMENTS | {"float32": lambda values: values}


# Its text in numpy.


class Product:
    """One product's arrays, each cut from a wider one. Rows of x, residual and out from `real` on do not
    exist in the memory that the kernel sees: reading or writing them is an IndexError."""

    def __init__(self, m, n, k, *, dtype="bfloat16", out_dtype="", bias=False, form="", real=None, seed=0):
        rng = np.random.default_rng([m, n, k, seed])
        self.dtype, self.out_dtype, self.form = dtype, out_dtype or dtype, form
        self.real = m if real is None else real

        def cut(rows, columns, scale=1.0):
            values = rng.standard_normal((rows, columns + 8)) * np.exp(rng.standard_normal((rows, 1))) * scale
            return in_numpy.rounded(values, dtype)[:, :columns]

        self.x, self.weight = cut(m, k), cut(n, k, k**-0.5)
        self.bias = in_numpy.rounded(rng.standard_normal(n), dtype) if bias else None
        self.residual = cut(m, n) if form == "residual" else None
        columns = n // 2 if form == "silu" else n
        self.buffer = in_numpy.rounded(np.full((m + 1, columns + 8), np.nan), self.out_dtype)
        self.out = self.buffer[:m, :columns]

    def run(self, config=None, *, seed=0, change=lambda name, text: text, told=None):
        """The conflicts of a run. told: what num_rows says, if not the real rows."""
        arrays = Arrays()
        count = self.real if told is None else told
        num_rows = None
        if count != len(self.out):
            num_rows = arrays.view(np.array([count], np.int32))

        def rows(array):
            if self.real:
                return arrays.view(array, self.real)
            return View(1 << 10, array.shape, array.strides, array.dtype)  # nothing lies there

        plan = plan_gemm_mma(
            rows(self.out), rows(self.x), arrays.view(self.weight),
            None if self.bias is None else arrays.view(self.bias),
            None if self.residual is None else rows(self.residual),
            num_rows, "silu" if self.form == "silu" else "", config,
        )  # fmt: skip
        return in_numpy.run_plan(arrays, plan, seed=seed, change=change)

    def wide(self, name, dtype=""):
        value = getattr(self, name)
        return None if value is None else WIDE[dtype or self.dtype](value)

    def product(self):
        """The product of the real rows in the contract's order, rounded as gemm rounds it."""
        sums = in_numpy.in_order(self.wide("x")[: self.real], self.wide("weight"), self.wide("bias"))
        return in_numpy.rounded(sums, self.out_dtype)

    def unfused(self):
        """What gemm and the op behind it leave: the warp rungs' own text, run in numpy on the product."""
        product = self.product()
        if self.real == 0:
            return self.out[:0]
        arrays = Arrays()
        if self.form == "silu":
            out = np.empty((self.real, product.shape[1] // 2), product.dtype)
            plan = silu_mul.plan_silu_mul(arrays.view(out), arrays.view(product), None)
            arrays.run("silu_mul", "make_silu_mul_kernel", plan)
            return out
        if self.form == "residual":
            out, residual = np.empty_like(product), self.residual[: self.real].copy()
            weight = arrays.view(in_numpy.rounded(np.ones(product.shape[1]), self.dtype))
            views = [arrays.view(array) for array in (out, product)]
            plan = rms_norm.plan_rms_norm(*views, weight, arrays.view(residual), None, 1e-5)
            arrays.run("rms_norm", "make_rms_norm_kernel", plan)
            return residual
        return product

    def right(self):
        """Whether out has the unfused composition's bits in the real rows, and nothing else has changed."""
        got, want = self.out[: self.real], self.unfused()
        after = self.buffer.copy()
        after[: self.real, : self.out.shape[1]] = in_numpy.rounded(np.nan, self.out_dtype)
        untouched = np.isnan(WIDE[self.out_dtype](after)).all()
        return bool(untouched) and np.array_equal(got.view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("config", [*CONFIGS, *OTHERS], ids=str)
def test_every_tile_keeps_the_order(config):
    """Odd M, tails of N and K, one tile more than a tile each way: the same bits as one chain of steps of
    16."""
    product = Product(config.tile_m + 3, config.tile_n + 24, 200, bias=True)
    assert product.run(config) == []  # no two lanes met in a bank
    assert product.right()
    x, weight = (product.wide(name).astype(np.float64) for name in ("x", "weight"))
    truth = x @ weight.T + product.wide("bias")
    got, plain = (WIDE["bfloat16"](value) for value in (product.out, product.product()))
    assert_close(got, plain, truth, "bfloat16", 200, str(config))


@pytest.mark.parametrize("form", ["", "residual", "silu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_forms_have_the_bits_of_the_unfused(form, dtype, bias):
    product = Product(37, 144, 88, dtype=dtype, bias=bias, form=form, real=35)
    assert product.run() == []
    assert product.right()


@pytest.mark.parametrize("config", [None, MmaConfig(48, 64, 64, 3, 1, 2)], ids=str)
def test_a_residual_may_be_its_own_result(config):
    """Also where passes over a tile's results reach beyond its 48 rows, into those of the next block."""
    product = Product(100, 48, 40, form="residual")
    want = product.unfused()
    product.out[:] = product.residual
    product.residual = product.out
    product.run(config)
    assert np.array_equal(product.out, want)


def test_float32_results_are_not_rounded():
    product = Product(70, 72, 136, dtype="float16", out_dtype="float32", bias=True, real=66)
    assert product.run() == []
    assert product.right()


@pytest.mark.parametrize("told", [0, -300, 1000])
def test_a_count_that_is_no_number_of_rows(told):
    """Of no rows nothing is touched; a count beyond the array's rows stands for all of them."""
    product = Product(20, 40, 24, real=0 if told < 1 else 20)
    product.run(told=told)
    assert product.right()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape(data):
    config = data.draw(st.sampled_from([*CONFIGS[2:], SMALL]))
    m = data.draw(st.integers(1, 2 * config.tile_m))
    n, k = (8 * data.draw(st.integers(1, most // 8)) for most in (2 * config.tile_n, 5 * config.tile_k))
    form = data.draw(st.sampled_from(["", "residual", "silu"] if n % 16 == 0 else ["", "residual"]))
    out_dtype = data.draw(st.sampled_from(["bfloat16", "float32"] if form == "" else ["bfloat16"]))
    product = Product(
        m, n, k, out_dtype=out_dtype, bias=data.draw(st.booleans()), form=form,
        real=data.draw(st.integers(0, m)),
    )  # fmt: skip
    assert product.run(config, seed=data.draw(st.integers(0, 3))) == []
    assert product.right()


def test_a_row_alone_has_the_bits_it_has_among_others():
    """Whatever tile either takes."""
    whole = Product(150, 72, 264, out_dtype="float32")
    whole.run(CONFIGS[1])
    for m, config in ((1, CONFIGS[8]), (16, CONFIGS[7]), (40, CONFIGS[4]), (150, CONFIGS[6])):
        some = Product(m, 72, 264, out_dtype="float32")
        some.x, some.weight = whole.x[:m], whole.weight
        some.run(config)
        assert np.array_equal(some.out.view(np.uint32), whole.out[:m].view(np.uint32))


DESCENDING = (
    ("int64(x_stride) + int64(unit) * 16", "int64(x_stride) + int64(unit) * 16 + (k - tile_k) * ITEM"),
    (
        "int64(weight_stride) + int64(unit) * 16",
        "int64(weight_stride) + int64(unit) * 16 + (k - tile_k) * ITEM",
    ),
    ("x_from + tile_k * ITEM", "x_from - tile_k * ITEM"),
    ("weight_from + tile_k * ITEM", "weight_from - tile_k * ITEM"),
)
NO_WAIT = ("cp_async_wait(pending)", "cp_async_wait(pending + 1)")
MUTANTS = {
    "a stage is used before it arrives": [NO_WAIT],
    "the stage that is read never changes": [("stage = int32(stage + stage_bytes)", "stage = int32(stage)")],
    "the stage that is filled is one too far": [("fetch = int32(0)  #", "fetch = int32(stage_bytes)  #")],
    "the last step of K is dropped": [("while k_at < k:", "while k_at < k - tile_k:")],
    "nobody waits for the others": [("cuda.syncthreads()\n                stage", "stage")],
    "results are read before all are staged": [("cuda.syncthreads()\n                first", "first")],
    "no swizzle where x is read": [("(a_half ^ swizzle) << 4", "a_half << 4")],
    "fragments one step late": [("a_unit, b_unit, last_step)", "a_unit, b_unit, 0)")],
    "rows past the real ones are read": [("int32(int32(lines * i) < left)", "1")],
    "K past its end is read": [("16 * int32(k_mine < k_left)", "16")],
    "rows past the real ones are written": [("inside * int32(row < rows)", "inside")],
    "columns past N are written": [("int32(unit * 8 < cols)", "1")],
    "row tiles and columns exchanged": [("int32(first + rest % height)", "int32(first + rest // height)")],
    "gates and ups exchanged": [("int32(at + 16)", "at")],
}


def for_mutants(k=192):
    """Two by two tiles of SMALL, more stages than it has; no mutant fails only by leaving an array."""
    return Product(70, 80, k, form="silu", real=66, bias=True)


def test_what_mutants_are_held_against_is_right():
    for k in (192, 200):
        intact = for_mutants(k)
        assert intact.run(SMALL) == []
        assert intact.right()


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_mutant_is_noticed(name):
    def change(module, text):
        if module.endswith("gemm_mma.kernel"):
            for old, new in MUTANTS[name]:
                assert old in text, old
                text = text.replace(old, new)
        return text

    def wrong(seed):
        product = for_mutants(200 if name == "K past its end is read" else 192)
        try:
            product.run(SMALL, seed=seed, change=change)
        except (IndexError, Stuck, RuntimeError):  # left an array, or would hang
            return True
        return not product.right()

    assert any(wrong(seed) for seed in range(3))


def test_descending_k_differs_in_bits_alone():
    """Every product is in it once: float64 cannot tell the two apart, so the order needs a test of its
    own."""
    product = Product(40, 64, 320, out_dtype="float32")

    def change(module, text):
        for old, new in DESCENDING if module.endswith("gemm_mma.kernel") else ():
            text = text.replace(old, new)
        return text

    product.run(SMALL, change=change)
    assert not product.right()
    truth = product.wide("x").astype(np.float64) @ product.wide("weight").astype(np.float64).T
    assert_close(product.out, product.product(), truth, "float32", 320)


def test_without_the_swizzle_banks_are_met_twice():
    """What the swizzle is for: right numbers without it, and 8 rows of one unit in the same banks."""

    def change(module, text):
        if module.endswith("gemm_mma.kernel"):
            text = text.replace("(unit ^ ((line >> swizzle_shift) & (units - 1)))", "unit")
            text = text.replace("int32(((lane & 7) >> swizzle_shift) & (units - 1))", "int32(lane & 0)")
        return text

    for config in (CONFIGS[3], SMALL):
        product = Product(10, 40, 72)
        conflicts = product.run(config, change=change)
        assert product.right()
        assert {what for what, _ in conflicts} == {"ldmatrix"}


def test_the_order_of_the_oracle_is_ascending_and_in_sixteens():
    """A sum that shows it: 2^24, then 16 ones one step later; ones added first would have stayed."""
    x, weight = np.ones((1, 32), np.float32), np.zeros((1, 32), np.float32)
    weight[0, 0], weight[0, 16] = 2.0**24, 1.0
    assert in_numpy.in_order(x, weight)[0, 0] == 2.0**24
    weight[0, 17] = 1.0  # two ones in one step survive the rounding
    assert in_numpy.in_order(x, weight)[0, 0] == 2.0**24 + 2
    weight[0, 17], weight[0, 1] = 0.0, 1.0  # one a step: both are lost
    assert in_numpy.in_order(x, weight)[0, 0] == 2.0**24


# Tiles.


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_tile_fits_the_smallest_block(config):
    assert smem_plan(config).bytes == config.smem_bytes <= SMEM_LIMIT == 101_376
    assert config.blocks() * (config.smem_bytes + SYSTEM_SMEM) <= SM_SMEM
    assert config.tile_m * config.pitch <= config.smem_bytes
    assert config.blocks() >= (1 if config.threads == 256 else 2)


@pytest.mark.parametrize(("numbers", "message"), [
    ((128, 128, 48, 3, 2, 2), "steps of 32 or 64"),
    ((128, 72, 32, 3, 2, 2), "multiples of 16 rows and columns"),
    ((128, 256, 32, 4, 2, 2), "at most 128 accumulators"),
    ((128, 128, 32, 2, 2, 2), "3 to 8 stages"),
    ((16, 64, 64, 4, 1, 2), "copies 8 rows|shared memory|"),
    ((128, 256, 64, 3, 2, 4), "147,456 bytes of shared memory, the limit is 101,376"),
    ((16, 32, 32, 4, 1, 2), "copies 16 rows|"),
    ((48, 48, 32, 4, 1, 1), "32 threads cannot share rows of 6 units"),
    ((16, 256, 32, 4, 1, 8), "copies 64 rows, which must be 8s and divide both tiles"),
])  # fmt: skip
def test_a_tile_that_cannot_be_is_named(numbers, message):
    if message.endswith("|"):
        MmaConfig(*numbers)  # these can
    else:
        with pytest.raises(ValueError, match=message):
            MmaConfig(*numbers)


SHAPES = [(4096, 4096), (28672, 4096), (4096, 14336), (152064, 3584), (49152, 576), (576, 1536), (2048, 8192)]
CARDS = {"RTX 4090": Card(128), "RTX 5090": Card(170), "A100": Card(108, 167_936), "H100": Card(132, 233_472)}


def test_every_tile_is_somebodys_choice():
    ms = (1, 2, 8, 16, 17, 32, 33, 64, 65, 100, 128, 200, 256, 384, 512, 1000, 2048, 8192)
    picked = {pick_config(m, n, k, *one)[0] for m in ms for n, k in SHAPES for one in CARDS.values()}
    assert picked == set(CONFIGS)


@pytest.mark.parametrize("card", list(CARDS))
def test_few_tokens_fill_the_card_and_many_the_tiles(card):
    for m, n, k in ((1, 4096, 4096), (16, 4096, 14336), (64, 4096, 4096)):
        config, _ = pick_config(m, n, k, *CARDS[card])
        assert config.tile_m <= max(16, m)
        assert -(-m // config.tile_m) * -(-n // config.tile_n) >= 0.5 * CARDS[card].num_sms
    config, group = pick_config(4096, 4096, 4096, *CARDS[card])
    assert (config.warp_m, config.warp_n, group) == (64, 64, 8)
    assert pick_config(4096, 576, 576, *CARDS[card])[1] == 1
    cheapest = model_cycles(config, 4096, 4096, 4096, *CARDS[card])
    assert all(cheapest <= model_cycles(other, 4096, 4096, 4096, *CARDS[card]) for other in CONFIGS)


# The door.


def standing(*shape, dtype=np.uint16, at=1 << 20, pitch=None):
    array = np.zeros((*shape[:-1], pitch or shape[-1]), dtype)[..., : shape[-1]]
    return View(at, array.shape, array.strides, array.dtype)


def test_the_launch_for_good_arguments():
    out, x, weight = standing(40, 64), standing(40, 128, pitch=136), standing(64, 128)
    count = standing(1, dtype=np.int32, at=64)
    plan = plan_gemm_mma(out, x, weight, num_rows=count, config=SMALL)
    assert plan.grid == 1
    assert plan.arguments == (1 << 20, 1 << 20, 1 << 20, 0, 0, 64, 40, 64, 128, 128, 272, 256, 0, 1)
    assert plan_gemm_mma(standing(0, 64), standing(0, 128), weight) is None
    gated = plan_gemm_mma(standing(40, 32), x, weight, standing(64), activation="silu")
    assert (gated.arguments[7], gated.kernel.key[3:]) == (64, (True, "silu"))
    assert plan_gemm_mma(out, x, weight, residual=standing(40, 64, at=32)).arguments[4] == 32


@pytest.mark.parametrize(("more", "message"), [
    ({"x": standing(40, 124)}, r"x.shape\[1\] is 124; a positive multiple of 8"),
    ({"weight": standing(72, 128)}, r"weight has shape \(72, 128\); \(64, 128\)"),
    ({"residual": standing(40, 72)}, r"residual has shape \(40, 72\); \(40, 64\)"),
    ({"residual": standing(40, 64, at=8)}, "residual starts at address 0x8; a multiple of 16"),
    ({"residual": standing(40, 64, pitch=68)}, r"residual.strides\[0\] is 136 bytes; a multiple of 16"),
    ({"residual": standing(40, 64), "activation": "silu"}, "is given beside activation 'silu'; one of the"),
    ({"residual": standing(40, 64), "out": standing(40, 64, dtype=np.float32)}, "out has dtype f"),
    ({"activation": "silu"}, r"weight has shape \(64, 128\); \(2 x out's columns, any\), out's shape"),
    ({"activation": "gelu"}, "activation is 'gelu'"),
    ({"activation": "silu", "out": standing(40, 32, dtype=np.float32)}, "out has dtype float32; uint16"),
    ({"activation": "silu", "out": standing(40, 32), "bias": standing(32)}, r"bias has shape \(32,\)"),
    ({"num_rows": standing(2, dtype=np.int32)}, r"num_rows has shape \(2,\)"),
])  # fmt: skip
def test_wrong_arguments_are_named(more, message):
    arguments = {"out": standing(40, 64), "x": standing(40, 128), "weight": standing(64, 128), **more}
    with pytest.raises(ValueError, match=message):
        plan_gemm_mma(**arguments)


def test_forms_and_tiles_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="epilogue is 'gelu'; there are '', 'residual', 'silu'"):
        make_gemm_mma_kernel(SMALL, "bfloat16", "bfloat16", False, "gelu")
    with pytest.raises(ValueError, match="epilogue 'silu' from bfloat16 to float32: bfloat16 is required"):
        make_gemm_mma_kernel(SMALL, "bfloat16", "float32", False, "silu")
    with pytest.raises(ValueError, match="dtype is 'float32'; known here: bfloat16, float16"):
        mma_tile.make_mma_tile(1, 1, "float32")
    with pytest.raises(ValueError, match="8 x 10 blocks; 1 to 64"):
        mma_tile.make_store_tile(8, 10)


# What it becomes. In a child, because this process runs numba's simulator.

COMPILE = """
import json, sys
sys.path.insert(0, {root!r})
from dataclasses import asdict
from kernels_numba.assemble import assemble_kernel
from kernels_numba.ops.gemm_mma.config import CONFIGS
from kernels_numba.ops.gemm_mma.kernel import mma_kernel
plain = ("bfloat16", "bfloat16", False, "")
wanted = [(config, plain, arch) for arch in ("sm_80", "sm_120") for config in CONFIGS]
wanted += [(config, plain, arch) for arch in ("sm_86", "sm_89", "sm_90a") for config in CONFIGS[:1]]
wanted += [
    (config, form, arch)
    for form, arch in (
        (("bfloat16", "float32", True, ""), "sm_89"),
        (("bfloat16", "bfloat16", True, "residual"), "sm_80"),
        (("float16", "float16", False, "silu"), "sm_120"),
    )
    for config in (CONFIGS[0], CONFIGS[-1])
]
reports = []
for config, form, arch in wanted:
    report = assemble_kernel(mma_kernel(config, *form), arch)
    reports.append([CONFIGS.index(config), asdict(report), report.problems])
print(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def assembled():
    return json.loads(no_simulator.last_line(COMPILE.format(root=str(ROOT))))


def test_the_code_it_becomes(assembled):
    """No spill, no local memory; in the loop every mma of a stage, an ldmatrix a fragment, one barrier; and
    registers for as many blocks an SM as were counted on."""
    assert len(assembled) == 2 * len(CONFIGS) + 3 + 6
    for index, report, problems in assembled:
        config, loop = CONFIGS[index], report["main_loop"]
        assert problems == [], report
        assert report["registers"] * report["threads"] * config.blocks() <= 65_536, report
        assert report["dynamic_bytes"] == config.smem_bytes, report
        steps = config.tile_k // 16
        assert loop["HMMA"] == steps * config.warp_m * config.warp_n // 128, report
        assert loop["LDSM"] == steps * (config.warp_m + config.warp_n) // 16, report
        assert loop["LDGSTS"] == (config.tile_m + config.tile_n) // config.lines, report
        assert loop["BAR"] == 1, report
        # Each warp scheduler issues one instruction a cycle, and an mma keeps its tensor core for more than
        # two.
        assert sum(loop.values()) <= 2.3 * loop["HMMA"] or config.warp_m * config.warp_n < 64 * 64, report


WRONG = """
import sys
import numpy as np
sys.path.insert(0, {root!r})
from kernels_numba.compiler import cuda
from kernels_numba.launch import compile_ptx
from kernels_numba.ptx.mma_tile import make_load_fragments, make_mma_tile
load, multiply = make_load_fragments(1, 128), make_mma_tile(1, 1, "bfloat16")
def no_array(address):
    load(address, address)
def too_few(address):
    words = cuda.local.array(4, np.int32)
    multiply(words, words)
for kernel in (no_array, too_few):
    try:
        compile_ptx(kernel, ("int32",), 32, "sm_80")
    except Exception as error:
        print([line.strip() for line in str(error).splitlines() if "required" in line][-1], end="; ")
print()
"""


def test_wrong_arguments_fail_when_the_kernel_is_compiled(tmp_path):
    path = tmp_path / "wrong.py"  # the compiler reads a kernel's source
    path.write_text(WRONG.format(root=str(ROOT)), encoding="utf-8")
    said = no_simulator.last_line(f"import runpy; runpy.run_path({str(path)!r})")
    assert "load_fragments: argument 0 is int32; a local array is required" in said
    assert "mma_tile: 2 arguments; 3 are required" in said


def test_kernels_have_names_of_their_own_and_know_their_targets():
    names = [kernel.name for kernel in kernels()]
    for kernel in kernels():
        fitting = {
            arch for arch in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_120") if kernel.fits(arch)
        }
        assert fitting == {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"}
    assert len(set(names)) == len(names) == 5 * len(CONFIGS)
