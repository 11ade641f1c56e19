"""The gate and up product with its activation: the many-token kernel's text in numpy, what it becomes, which
rung a model takes, and bits on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import no_simulator
import numpy as np
import pytest
from few_products import make_product, same_bits
from test_gemm import Gpu, blank
from test_gemm_many import product_of

from kernels_numba.compiler import SIMULATOR, cuda
from kernels_numba.inputs import make_call
from kernels_numba.ops import OPS, resolve
from kernels_numba.ops.gemm.gate import make_gate
from kernels_numba.ops.gemm.hopper_config import (
    CONFIGS,
    GATED_CONFIGS,
    HopperConfig,
    pick_hopper_config,
)
from kernels_numba.ops.gemm_silu_mul import FUSED, composed
from sharp.rungs import fused_rungs

ROOT = Path(__file__).resolve().parent.parent

# The kernel's text in numpy.


@pytest.mark.parametrize("config", GATED_CONFIGS, ids=str)
def test_bits_are_those_of_gemm_then_silu_mul(config):
    """Whole and partial rows, columns and steps of K, with and without a bias."""
    for m, n, k in ((1, 16, 8), (77, 336, 200), (192, 272, 72)):
        product = make_product(np.random.default_rng([m, n, k]), m, n, k, bias=m == 77, epilogue="silu")
        assert same_bits(product_of(product, config, grid=3, group=2), product.unfused("bfloat16")), m


@pytest.mark.parametrize(
    "config", [HopperConfig(64, 32), HopperConfig(128, 192), HopperConfig(128, 256)], ids=str
)
def test_the_real_number_of_rows_is_read_by_the_kernel(config):
    product = make_product(np.random.default_rng(1), 140, 208, 136, epilogue="silu")
    want = product.unfused("bfloat16")
    for real in (0, 1, 63, 64, 65, 128, 129, 140):
        assert same_bits(product_of(product, config, real=real), want[:real]), real


def test_large_gates_have_the_limits_of_silu():
    """exp(-g) overflows for a gate far below 0: the product is then 0, and never NaN."""
    product = make_product(np.random.default_rng(2), 64, 64, 64, epilogue="silu")
    x = product.x.copy()
    x[:, :] = np.where(np.arange(64)[:, None] % 2, 0x4480, 0xC480)  # 1024 and -1024
    product = product.__class__(product.dtype, x, product.weight, activation="silu")
    got = product_of(product, HopperConfig(64, 64))
    assert same_bits(got, product.unfused("bfloat16"))
    assert not (got & 0x7FFF > 0x7F80).any()


MISTAKES = {
    "gates without their rounding": ("gate", "low(gates)", "acc[at]"),
    "ups and gates exchanged": ("gate", "low(gates), low(ups)", "low(ups), low(gates)"),
    "the up of another neuron": ("gate", "acc[at + 4], acc[at + 5]", "acc[at + 5], acc[at + 4]"),
    "a result over a gate that is still to be read": ("gate", "to = 4 * pair + 2 * row", "to = 8 * pair + 8"),
    "columns are not halved": ("hopper", "col = int32(col >> halved)", "col = int32(col)"),
    "columns past the last are written": ("hopper", "n = int32(n >> halved)", "n = int32(n)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed_in_numpy(mistake):
    product = make_product(np.random.default_rng(3), 140, 208, 136, epilogue="silu")
    want = product.unfused("bfloat16")
    part, old, new = MISTAKES[mistake]

    def right(**how):
        try:
            return same_bits(product_of(product, HopperConfig(128, 96), real=99, **how), want[:99])
        except (AssertionError, IndexError, RuntimeError):
            return False

    def change(name, text):
        if not name.endswith(f".gemm.{part}"):
            return text
        assert text.count(old) == 1
        return text.replace(old, new)

    assert right()
    assert not right(change=change)


def test_gates_and_ups_come_in_pairs_of_eight():
    with pytest.raises(ValueError, match="columns is 24; a multiple of 16"):
        make_gate(24, "bfloat16")


# What it becomes.

# All that an engine can pick is assembled by test_assemble.py.
COMPILE = """
import json, sys
sys.path.insert(0, {root!r})
from dataclasses import asdict
from kernels_numba.assemble import assemble_kernel
from kernels_numba.ops.gemm import hopper
reports = []
for name, dtype, has_bias in {some!r}:
    config = next(config for config in hopper.GATED_CONFIGS if str(config) == name)
    kernel = hopper.hopper_kernel(config, dtype, dtype, has_bias, epilogue="silu")
    report = assemble_kernel(kernel, "sm_90a")
    bounds = [config.registers, config.tile_n, config.sends_rows]
    reports.append([asdict(report), report.problems, *bounds])
print(json.dumps(reports))
"""
# float16 and a bias in one, which no model has, cost the widest tile 120 bytes of spills.
SOME = [(name, "bfloat16", False) for name in ("64x96", "128x192", "128x256")]
SOME += [("128x256", "bfloat16", True), ("128x256", "float16", False)]


def test_gates_and_ups_stay_in_registers():
    reports = json.loads(no_simulator.last_line(COMPILE.format(root=str(ROOT), some=SOME)))
    assert len(reports) == len(SOME)
    for report, problems, registers, columns, sent in reports:
        assert problems == [], report
        assert report["registers"] <= registers, report
        counts = report["instructions"]
        assert report["main_loop"]["HGMMA"] >= 4, report
        # Half as much is stored: matrices of 8 x 16, then 16 bytes or two neighbours of a partial tile.
        assert counts["STSM"] == columns // 32, report
        assert counts["STG"] == columns // (32 if sent else 8), report
        # A power of two and a quotient for each result; few more, for the walk over tiles.
        assert columns // 2 <= counts["MUFU"] <= columns // 2 + 16, report


# Which rung is taken.


def test_tiles_with_an_activation_store_whole_boxes():
    assert {config.tile_m for config in GATED_CONFIGS} == {64, 128}
    for config in GATED_CONFIGS:
        columns = [
            box.first + i for boxes in config.rounds_of(True) for box in boxes for i in range(box.columns)
        ]
        assert columns == list(range(config.tile_n // 2))
        staged = max(sum(128 * box.columns for box in boxes) for boxes in config.rounds_of(True))
        assert staged <= config.staged_bytes
    for m, n, k in ((64, 3072, 576), (512, 37888, 3584), (1000, 28672, 4096), (4096, 16384, 2048)):
        plain, gated = pick_hopper_config(m, n, k, 132), pick_hopper_config(m, n, k, 132, "silu")
        assert gated[0] in GATED_CONFIGS
        if plain[0] in GATED_CONFIGS:
            assert gated == plain
    assert set(GATED_CONFIGS) < set(CONFIGS)


def test_a_model_fuses_where_the_bits_are_those_of_its_two_ops():
    for rung in FUSED:
        assert fused_rungs({"gemm": rung, "silu_mul": "warp"}) == {"gemm_silu_mul": rung}
        assert fused_rungs({"gemm": rung, "silu_mul": "plain"}) == {}
        assert fused_rungs({"gemm": rung}) == {}
        assert {"gemm": rung, "gemm_silu_mul": rung}.items() <= {
            op: rung for op in OPS if rung in OPS[op].rungs
        }.items()
    assert fused_rungs({"gemm": "plain", "silu_mul": "warp"}) == {}


def test_who_names_a_part_gets_the_composition():
    """A rung of gemm or silu_mul that was asked for is run, with the number of rows where both take it."""
    seen = []

    def product(out, x, weight, *, stream=None):
        seen.append("product")

    def counting(out, gate_up, *, stream=None, num_rows=None):
        seen.append(num_rows)

    OPS["gemm"].register("mine", product)
    OPS["silu_mul"].register("mine", counting)
    OPS["gemm"].register(
        "counting", lambda out, x, weight, *, stream=None, num_rows=None: seen.append(num_rows)
    )
    try:
        resolve("plain", {"gemm": "mine", "silu_mul": "mine"}).gemm_silu_mul(1, 2, 3, 4)
        ops = resolve("plain", {"gemm": "counting", "silu_mul": "mine"})
        ops.gemm_silu_mul(1, 2, 3, 4, num_rows=5)
    finally:
        for op, name in (("gemm", "mine"), ("silu_mul", "mine"), ("gemm", "counting")):
            OPS[op].rungs.pop(name)
    assert seen == ["product", None, 5, 5]
    assert resolve("plain").gemm_silu_mul is OPS["gemm_silu_mul"].rungs["plain"]


@pytest.mark.skipif(not SIMULATOR, reason="the rung plain in numba's simulator")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_has_the_bits_of_its_two_parts(dtype):
    call = make_call("gemm_silu_mul", "toy", np.random.default_rng(4)).to_dtype(dtype)
    args = {n: cuda.to_device(a if dtype == "float32" else a.view(np.uint16)) for n, a in call.args.items()}
    OPS["gemm_silu_mul"].rungs["plain"](**args)
    gate_up, out = (cuda.device_array_like(args[name]) for name in ("gate_up", "out"))
    OPS["gemm"].rungs["plain"](gate_up, args["x"], args["weight"])
    OPS["silu_mul"].rungs["plain"](out, gate_up)
    assert same_bits(args["out"].copy_to_host(), out.copy_to_host())


# On a GPU.


@pytest.fixture
def gpu(gpu_where):
    return Gpu(gpu_where(lambda have: have[0] == 9, "9.0"), "bfloat16")


def both_ways(gpu, x, weight, rung, real=None, **how):
    """Bits of (the fused op, gemm then silu_mul's rung "warp") of the same rows."""
    from kernels_numba.ops.gemm import hopper

    m, n = x.shape[0], weight.shape[0]
    fused, apart, gate_up = blank(gpu, m, n // 2), blank(gpu, m, n // 2), blank(gpu, m, n)
    if how:
        hopper.gemm_hopper(fused, x, weight, activation="silu", num_rows=real, **how)
    else:
        OPS["gemm_silu_mul"].rungs[rung](fused, x, weight, num_rows=real)
    OPS["gemm"].rungs[rung if not how else "hopper"](gate_up, x, weight, num_rows=real)
    OPS["silu_mul"].rungs["warp"](apart, gate_up, num_rows=real)
    gpu.cuda.synchronize()
    return fused.copy_to_host(), apart.copy_to_host()


@pytest.mark.gpu
@pytest.mark.parametrize("config", GATED_CONFIGS, ids=str)
def test_every_tile_has_the_bits_of_the_two_ops(gpu, rng, config):
    """Random M, whole and partial tiles of rows and columns; rows past the real number stay as they are."""
    for n, k in ((1552, 776), (3072, 576)):
        weight = gpu.up(rng.standard_normal((n, k)) * 3 / np.sqrt(k))
        for m in (1, 64, 128, *rng.integers(2, 700, 3).tolist()):
            x = gpu.up(rng.standard_normal((m, k)))
            fused, apart = both_ways(gpu, x, weight, "hopper", config=config)
            assert not (fused & 0x7FFF > 0x7F80).any(), (m, n)
            assert np.array_equal(fused, apart), (m, n)
        real = int(rng.integers(1, m + 1))
        count = gpu.cuda.to_device(np.array([real], np.int32))
        fused, _ = both_ways(gpu, x, weight, "hopper", count, config=config)
        assert np.array_equal(fused[:real], apart[:real])
        assert (fused[real:] == blank(gpu, 1, 1).copy_to_host()[0, 0]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rung", FUSED)
def test_the_rungs_have_the_bits_of_their_two_ops(gpu, rng, rung):
    """What a model takes, few tokens and many, at real sizes."""
    for n, k in ((16384, 2048), (37888, 3584)):
        weight = gpu.up(rng.standard_normal((n, k), dtype=np.float32) * (3 / np.sqrt(k)))
        for m in (1, 7, 32, 48, 49, 100, 257, 1000):
            x = gpu.up(rng.standard_normal((m, k), dtype=np.float32))
            fused, apart = both_ways(gpu, x, weight, rung)
            assert np.array_equal(fused, apart), (m, n)


@pytest.mark.gpu
def test_pauses_and_a_captured_chain_change_no_bit(gpu, rng):
    """Warps that dawdle; and gated products before and after others, in dependent launches of a graph."""
    from gpu_capture import captured

    from kernels_numba.launch import stream_handle
    from kernels_numba.ops.gemm import hopper

    h, i, m = 576, 1536, 700
    gate_up, down = gpu.up(rng.standard_normal((2 * i, h)) / 12), gpu.up(rng.standard_normal((h, i)) / 20)
    x = gpu.up(rng.standard_normal((m, h)))
    act, room, out = blank(gpu, m, i), blank(gpu, m, 2 * i), blank(gpu, m, h)
    hopper.gemm_hopper(room, x, gate_up)
    OPS["silu_mul"].rungs["warp"](act, room)
    hopper.gemm_hopper(out, act, down)
    want = [array.copy_to_host() for array in (act, out)]
    for config in (HopperConfig(64, 64), HopperConfig(128, 192), HopperConfig(128, 256)):
        paused = blank(gpu, m, i)
        build = hopper.Build(debug=True, stress=True)
        hopper.gemm_hopper(paused, x, gate_up, activation="silu", config=config, build=build, group=3)
        assert np.array_equal(paused.copy_to_host(), want[0]), config

    def chain(stream):
        for config in GATED_CONFIGS:
            hopper.gemm_hopper(act, x, gate_up, activation="silu", config=config, stream=stream)
            hopper.gemm_hopper(out, act, down, stream=stream)

    chain(None)  # kernels are loaded and maps made before the capture
    stream = gpu.cuda.stream()
    replay = captured(stream, lambda: chain(stream_handle(stream)))
    for _ in range(20):
        for array in (act, out):
            array.copy_to_device(np.full(array.shape, 0x7FC0, np.uint16))
        gpu.cuda.synchronize()
        replay()
        stream.synchronize()
        assert np.array_equal(act.copy_to_host(), want[0])
        assert np.array_equal(out.copy_to_host(), want[1])


@pytest.mark.gpu
def test_a_model_has_the_same_bits_fused_and_apart(gpu, rng):
    """Steps of few tokens and of many, from graphs with the fused op and by launches of the two ops."""
    from test_graphs_gpu import check_fused_steps

    def part(ops):
        ops.gemm_silu_mul = composed(ops.gemm, ops.silu_mul)

    check_fused_steps(rng, part, gemm_silu_mul="hopper")


@pytest.mark.gpu
def test_wrong_arguments_are_named(gpu):
    def zeros(*shape):
        return gpu.up(np.zeros(shape, np.float32))

    rung = OPS["gemm_silu_mul"].rungs["hopper"]
    for m in (4, 200):  # few tokens, and many
        with pytest.raises(ValueError, match=r"weight has shape \(40, 64\); \(32, any\) is required"):
            rung(zeros(m, 16), zeros(m, 64), zeros(40, 64))
        with pytest.raises(ValueError, match=r"multiple of 8"):
            rung(zeros(m, 12), zeros(m, 64), zeros(24, 64))
        with pytest.raises(ValueError, match=r"out has dtype float32; uint16 is required"):
            rung(gpu.cuda.to_device(np.zeros((m, 16), np.float32)), zeros(m, 64), zeros(32, 64))
    from kernels_numba.ops.gemm import hopper

    given = (zeros(4, 16), zeros(4, 64), zeros(32, 64))
    words = r"config is 128x112; with an activation tile_n must be a multiple of 32"
    with pytest.raises(ValueError, match=words):
        hopper.gemm_hopper(*given, activation="silu", config=HopperConfig(128, 112))
    with pytest.raises(ValueError, match=r"activation is 'gelu'; \"\" or \"silu\" is required"):
        hopper.gemm_hopper(*given, activation="gelu")
