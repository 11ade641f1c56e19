"""The steps between the plain GEMM and the fastest: naive in numba's simulator, the two tensor-core steps in
numpy (kernels_numba/simt.py), what they become (assembled without a GPU), their numbers and bits on a GPU.

Their module texts are mutated in a dozen ways, each of which has to be noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import no_simulator
import numpy as np
import pytest
from tolerance import assert_close, error_ratio

from kernels_numba import simt
from kernels_numba.assemble import ToolsMissing
from kernels_numba.compiler import SIMULATOR, KernelsUnavailable, cuda
from kernels_numba.disassemble import Code, disassemble
from kernels_numba.inputs import BFLOAT16, make_call
from kernels_numba.layouts import SHAPES as FRAGMENTS
from kernels_numba.layouts import banks_of, mma_layout, swizzled_image, unit_offset
from kernels_numba.ops import OPS
from kernels_numba.ops.gemm import door
from kernels_numba.ops.gemm.ladder import mma_step, naive, wgmma
from kernels_numba.ops.gemm.ladder.in_numpy import STEPS, in_numpy, source_of

ROOT = Path(__file__).resolve().parent.parent


def test_the_ladder_is_reachable_by_name():
    names = list(OPS["gemm"].rungs)
    assert names[:8] == ["reference", "naive", "plain", "mma_step", "wgmma", "mma_sync", "hopper", "gemv"]


# Naive, in the simulator.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["toy_one_row", "toy_bias", "toy_many_rows", "toy_empty"])
def test_naive_matches_spec_and_plain_bits(on_gpu, case, dtype):
    call = make_call("gemm", case, np.random.default_rng([len(case), len(dtype)])).to_dtype(dtype)
    args = [value.view(np.uint16) if dtype == "bfloat16" else value for value in call.resolved().values()]
    results = []
    for rung in ("naive", "plain"):
        out, *inputs = map(cuda.to_device, args)
        OPS["gemm"].rungs[rung](out, *inputs)
        results.append(out.copy_to_host())
    actual = results[0].view(BFLOAT16) if dtype == "bfloat16" else results[0]
    plain = np.asarray(call.spec()["out"]).astype(actual.dtype)
    assert_close(actual, plain, call.to_float64().spec()["out"], dtype, call.terms, "naive")
    np.testing.assert_array_equal(results[0].view(np.uint8), results[1].view(np.uint8))


def test_naive_names_what_it_cannot_take():
    out, x, weight = (cuda.to_device(np.zeros(shape, np.float32)) for shape in ((2, 3), (2, 4), (3, 5)))
    with pytest.raises(ValueError, match=r"gemm: weight has shape \(3, 5\); \(3, 4\) is required"):
        naive.gemm_naive(out, x, weight)
    with pytest.raises(ValueError, match=r"gemm: out is a ndarray; a numba device array"):
        naive.gemm_naive(np.zeros((2, 3)), x, weight)


# The tensor-core steps, a block at a time in numpy.


def check_in_numpy(step, m, n, k, out_dtype, has_bias, source=""):
    """(out, float32 plain result, float64 truth) of a step; all arrays but the bias are cut from wider ones,
    of which nothing else is read (IndexError) or changed."""
    rng = np.random.default_rng([m, n, k])
    x, weight, bias = (simt.to_bits(rng.standard_normal(shape)) for shape in ((m, k + 8), (n, k + 16), (n,)))
    x, weight = x[:, :k], weight[:, :k]
    buffer = np.full((m + 2, n + 8), np.nan, np.float32)
    buffer = buffer if out_dtype == "float32" else simt.to_bits(buffer)
    poison = buffer.copy()
    in_numpy(step, buffer[1 : m + 1, :n], x, weight, bias if has_bias else None, source=source)
    got = buffer[1 : m + 1, :n].copy()
    buffer[1 : m + 1, :n] = poison[1 : m + 1, :n]
    np.testing.assert_array_equal(buffer.view(np.uint8), poison.view(np.uint8), "wrote outside [M, N]")
    wide_x, wide_weight = simt.to_float(x), simt.to_float(weight)
    added = simt.to_float(bias) if has_bias else np.zeros(n, np.float32)
    plain, truth = wide_x @ wide_weight.T + added, wide_x.astype(np.float64) @ wide_weight.T + added
    if out_dtype == "bfloat16":
        got, plain = simt.to_float(got), simt.to_float(simt.to_bits(plain))
    return got, plain, truth


SHAPES = [(1, 8, 8), (63, 136, 72), (64, 128, 64), (65, 264, 200), (129, 8, 456), (200, 120, 128)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize(("out_dtype", "has_bias"), [("bfloat16", False), ("float32", True)])
@pytest.mark.parametrize("step", list(STEPS))
def test_index_arithmetic(step, m, n, k, out_dtype, has_bias):
    """Addresses, fragments, swizzle, edges and what is waited for, by the kernel's own text."""
    got, plain, truth = check_in_numpy(step, m, n, k, out_dtype, has_bias)
    assert_close(got, plain, truth, out_dtype, k, step)


DROPPED = {  # the last 16 of every 64 of K
    "mma_step": ("range(TILE_K // 16)", "range(TILE_K // 16 - 1)"),
    "wgmma": ("make_wgmma(TILE_N, TILE_K // 16,", "make_wgmma(TILE_N, TILE_K // 16 - 1,"),
}
MUTANTS = {
    **{f"{step}: a step of K is dropped": (step, *texts) for step, texts in DROPPED.items()},
    "the last tile of K is dropped": ("mma_step", "while k_at < k:", "while k_at < k - TILE_K:"),
    "a tile is used before it arrives": ("mma_step", "cp_async_wait(1)", "cp_async_wait(2)"),
    "no swizzle where x is read": ("mma_step", "(2 * step + x_half) ^ swizzle", "2 * step + x_half"),
    "the stage never changes": ("mma_step", "stage = int32(stage ^ 1)", "stage = int32(stage)"),
    "rows past M are read": ("mma_step", "int32(row < rows)", "1"),
    "K past its end is read": ("mma_step", "int32(k_mine < k)", "1"),
    "lower half rows past M are written": ("mma_step", "int32(row + 8 < m)", "int32(row < m)"),
    "two column groups exchanged": ("mma_step", "b, 2)", "b, 0)"),
    "wgmma: the last tile of K is dropped": ("wgmma", "while k_at < k:", "while k_at < k - TILE_K:"),
    "the phase never changes": ("wgmma", "int32(phase ^ 1)", "int32(phase)"),
    "a stage is not refilled": ("wgmma", "and k_refill < k", "and k_refill < k - TILE_K"),
    "both warpgroups on the same rows": ("wgmma", "+ group_row * ROW", ""),
    "wgmma: rows past M are written": ("wgmma", "int32(row + 8 < m)", "int32(row < m)"),
    "fewer bytes expected": ("wgmma", "2 * tile_bytes)", "tile_bytes)"),
}


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_mutant_is_noticed(name):
    step, old, new = MUTANTS[name]
    source = source_of(step)
    assert old in source
    try:
        got, plain, truth = check_in_numpy(step, 65, 136, 328, "float32", True, source.replace(old, new))
    except (IndexError, RuntimeError):  # left an array, or would hang
        return
    assert error_ratio(got, plain, truth, "float32", 328) > 2


def test_in_numpy_names_what_it_cannot_take():
    x, weight = np.zeros((4, 12), np.uint16), np.zeros((8, 12), np.uint16)
    with pytest.raises(ValueError, match="gemm: k is 12; a positive multiple of 8"):
        in_numpy("wgmma", np.zeros((4, 8), np.uint16), x, weight)
    with pytest.raises(ValueError, match="step is 'hopper'; there are mma_step, wgmma"):
        in_numpy("hopper", np.zeros((4, 8), np.uint16), x, weight)


# Layouts.


@pytest.mark.parametrize("operand", ["a", "b", "c"])
def test_every_element_has_one_holder(operand):
    lane, register, half = mma_layout(operand)
    assert lane.shape == FRAGMENTS[operand]
    places = set(zip(lane.flat, register.flat, half.flat, strict=True))
    assert len(places) == lane.size
    assert set(lane.flat) == set(range(32))
    with pytest.raises(ValueError, match="operand is 'd'; mma has a, b, c"):
        mma_layout("d")


def test_layouts_are_those_of_the_docstring():
    """ptx/mma.py's table, whose kernels ran on a GPU: a[1] = A[r + 8, p:p+2] and so on, for lane 13."""
    r, p = 13 // 4, 2 * (13 % 4)
    held = {operand: np.stack(mma_layout(operand), -1).tolist() for operand in FRAGMENTS}
    for register, (row, col) in enumerate([(r, p), (r + 8, p), (r, p + 8), (r + 8, p + 8)]):
        assert [held["a"][row][col + half] for half in (0, 1)] == [[13, register, 0], [13, register, 1]]
    for register, col in enumerate([p, p + 8]):
        assert [held["b"][r][col + half] for half in (0, 1)] == [[13, register, 0], [13, register, 1]]
    for register, (row, col) in enumerate([(r, p), (r, p + 1), (r + 8, p), (r + 8, p + 1)]):
        assert held["c"][row][col] == [13, register, 0]


def test_the_swizzle_spreads_a_column_over_all_banks():
    row, unit = np.mgrid[:8, :8]
    for at in range(8):
        assert set(banks_of(unit_offset(row[:, at], unit[:, at]))) == set(range(0, 32, 4))
        assert set(banks_of(unit_offset(row[:, at], unit[:, at], swizzle=False))) == {4 * at}
    tile = np.random.default_rng(0).integers(0, 1 << 16, (24, 64)).astype(np.uint16)
    image = swizzled_image(tile)
    assert not np.array_equal(image, tile.view(np.uint8).reshape(-1))
    np.testing.assert_array_equal(swizzled_image(image), tile.view(np.uint8).reshape(-1))


# The door, with stand-ins for device arrays.


def standing(*shape, dtype=np.uint16, at=1 << 20, pitch=None):
    """What the door reads of a device array: bfloat16 bits [shape], rows `pitch` elements apart."""
    array = np.zeros((*shape[:-1], pitch or shape[-1]), dtype)[..., : shape[-1]]
    return SimpleNamespace(
        shape=array.shape, ndim=array.ndim, dtype=array.dtype, strides=array.strides,
        __cuda_array_interface__={"data": (at, False)},
    )  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), [
    ((standing(4, 16), np.zeros((4, 8), np.uint16), standing(16, 8)), "x is a ndarray; a device array"),
    ((standing(4, 12), standing(4, 8), standing(12, 8)), r"out.shape\[1\] is 12; a positive multiple of 8"),
    ((standing(4, 16), standing(4, 20), standing(16, 20)), r"x.shape\[1\] is 20; a positive multiple of 8"),
    ((standing(4, 16), standing(4, 8), standing(16, 16)), r"weight has shape \(16, 16\); \(16, 8\) is"),
    ((standing(4, 16), standing(5, 8), standing(16, 8)), r"out has shape \(4, 16\); \(5, any\) is"),
    ((standing(4, 16), standing(4, 8, dtype=np.float32), standing(16, 8)), "x has dtype float32; uint16 is"),
    ((standing(4, 16), standing(4, 8, pitch=12), standing(16, 8)), r"x.strides\[0\] is 24 bytes; a multiple"),
    ((standing(4, 16), standing(4, 8), standing(16, 8, at=8)), "weight starts at address 0x8; a multiple of"),
    ((standing(4, 16), standing(4, 8), standing(16, 8), standing(8)), r"bias has shape \(8,\); \(16\) is"),
    ((standing(4, 16), standing(4, 8), standing(16, 8), standing(16, at=2)), "bias starts at address 0x2"),
])  # fmt: skip
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        door.operands(*arguments)


def test_right_arguments_become_addresses():
    given = door.operands(standing(1, 16, dtype=np.float32), standing(1, 8), standing(16, 8, pitch=24, at=64))
    assert (given.m, given.n, given.k, given.out_dtype, given.bias) == (1, 16, 8, "float32", 0)
    assert (given.weight, given.weight_stride, given.out_stride) == (64, 48, 64)


@pytest.mark.parametrize(("rung", "have", "message"), [
    ("mma_step", (7, 5), r"rung mma_step was called on compute capability 7.5; 8.0 or newer is required"),
    ("wgmma", (8, 9), r"rung wgmma was called on compute capability 8.9; 9.0 \(instructions of sm_90a\) is"),
    ("wgmma", (12, 0), r"compute capability 12.0; 9.0 "),
    ("mma_step", (12, 0), None),
    ("wgmma", (9, 0), None),
])  # fmt: skip
def test_a_card_that_is_too_old_is_named(monkeypatch, rung, have, message):
    device = SimpleNamespace(compute_capability=have)
    fake = SimpleNamespace(SIMULATOR=False, cuda=SimpleNamespace(get_current_device=lambda: device))
    monkeypatch.setattr(door, "compiler", fake)
    if message is None:
        door.require_capability(rung)
    else:
        with pytest.raises(ValueError, match=message):
            door.require_capability(rung)


@pytest.mark.skipif(not SIMULATOR, reason="not in the simulator")
def test_the_simulator_is_told_apart():
    out, x, weight = (cuda.to_device(np.zeros(shape, np.uint16)) for shape in ((4, 16), (4, 8), (16, 8)))
    for rung in STEPS:
        with pytest.raises(KernelsUnavailable, match=f"rung {rung} is made of PTX"):
            OPS["gemm"].rungs[rung](out, x, weight)


# What they become, without a GPU; in a child, because this process runs numba's simulator.

COMPILE = """
import json, sys
sys.path.insert(0, {root!r})
from kernels_numba import assemble
from kernels_numba.disassemble import disassemble
from kernels_numba.ops.gemm.ladder.in_numpy import STEPS
ops = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "LDL", "STL")
reports = []
try:
    for step, out_dtype, has_bias, archs in {builds!r}:
        kernel = getattr(STEPS[step], step + "_kernel")(out_dtype, has_bias)
        for arch in archs:
            code = disassemble(kernel, arch)
            loop = code.loop("HMMA" if step == "mma_step" else "HGMMA")
            reports.append(dict(
                step=step, arch=arch, threads=kernel.threads, smem=kernel.smem, registers=code.registers,
                spilled=code.spill_bytes + code.stack_bytes, count={{op: code.count(op) for op in ops}},
                loop={{op: sum(line.startswith(op) for line in loop) for op in ops}},
            ))
except assemble.ToolsMissing as error:
    print(error, file=sys.stderr)
    sys.exit(3)
print(json.dumps(reports))
"""
BUILDS = [
    ("mma_step", "bfloat16", False, ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"]),
    ("mma_step", "float32", True, ["sm_80", "sm_90a"]),
    ("wgmma", "bfloat16", False, ["sm_90a"]),
    ("wgmma", "float32", True, ["sm_90a"]),
]


@pytest.fixture(scope="module")
def assembled(request):
    pytest.importorskip("numba")
    code = COMPILE.format(root=str(ROOT), builds=BUILDS)
    child = no_simulator.run(code, timeout=180)
    if child.returncode == 3 and not request.config.getoption("--strict-tools"):
        pytest.skip(child.stderr.strip())
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_what_they_become(assembled):
    """Nothing in local memory; 16 HMMA and 6 ldmatrix for 16 of K, or one HGMMA; loads of their kind."""
    assert len(assembled) == sum(len(build[3]) for build in BUILDS)
    for report in assembled:
        count, loop = report["count"], report["loop"]
        assert report["spilled"] == count["LDL"] == count["STL"] == 0, report
        blocks = 2 if report["step"] == "wgmma" else 1
        assert report["registers"] * report["threads"] * blocks <= 65_536, report
        if report["step"] == "mma_step":
            assert report["smem"] <= 101_376, report
            steps = loop["HMMA"] // 16  # for sm_120 the assembler keeps the loop over the 4 steps
            assert steps in (1, 4), report
            assert (loop["HMMA"], loop["LDSM"], count["HGMMA"]) == (16 * steps, 6 * steps, 0), report
            assert count["HMMA"] == loop["HMMA"], report
            assert count["LDGSTS"] == 16, report
        else:
            assert 2 * (report["smem"] + 1024) <= 233_472, report  # of an SM; 1,024 are the system's
            assert (count["HMMA"], count["HGMMA"], loop["HGMMA"]) == (0, 4, 4), report
            assert loop["UTMALDG"] == 2, report


def test_loops_are_found_in_machine_code():
    sass = """
.L_x_0:
        /*0010*/                   LDSM.16.M88.4 R4, [R16] ;
.L_x_1:
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R52, R112.reuse, R108, R52 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   BRA `(.L_x_2) ;
        /*0050*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   HMMA.16816.F32 R52, R112, R108, R52 ;
"""
    code = Code("sm_80", "", sass, 8, 0, 0)
    assert (code.count("HMMA"), code.count("BRA")) == (2, 3)
    assert [line.split()[0] for line in code.loop("HMMA")] == ["HMMA.16816.F32.BF16", "BRA"]
    assert len(code.loop("LDSM")) == 5
    assert code.loop("HGMMA") == []
    if SIMULATOR:
        with pytest.raises(ToolsMissing, match="the simulator is on"):
            disassemble(mma_step.mma_step_kernel("bfloat16", False), "sm_80")


@pytest.mark.parametrize("module", [mma_step, wgmma])
def test_docstrings_give_the_offsets_of_the_plan(module):
    text = getattr(module, f"make_{module.__name__.rpartition('.')[2]}_kernel").__doc__
    for region in module.PLAN.regions:
        for piece in {0, region.count - 1} if module is mma_step else {0}:
            assert re.search(rf"\b{module.PLAN.offset(region.name, piece):,}\b", text), (region, piece)


# On a GPU.


@pytest.fixture
def gpu(on_gpu):
    if not on_gpu:
        pytest.skip("runs under --device=cuda only")
    return tuple(cuda.get_current_device().compute_capability)


def needs(gpu, rung):
    if gpu[0] < {"naive": 0, "plain": 0, "mma_step": 8}.get(rung, 9):
        pytest.skip(f"rung {rung} does not run on compute capability {gpu}")
    if rung in ("wgmma", "hopper") and gpu[0] != 9:
        pytest.skip(f"rung {rung} does not run on compute capability {gpu}")


def product(rung, x, weight, bias=None, out_dtype="bfloat16"):
    """x @ weight^T (+ bias) by a rung or a function, float32; out is a view in a poisoned, wider buffer of
    which nothing else may change."""
    m, n = len(x), len(weight)
    host = np.full((m + 1, n + 8), np.nan, np.float32)
    host = host if out_dtype == "float32" else simt.to_bits(host)
    buffer = cuda.to_device(host)
    out = buffer[:m, :n] if m else cuda.to_device(host[:0, :n].copy())
    function = OPS["gemm"].rungs[rung] if isinstance(rung, str) else rung
    function(out, *map(cuda.to_device, (x, weight)), None if bias is None else cuda.to_device(bias))
    cuda.synchronize()
    after = buffer.copy_to_host()
    got = after[:m, :n].copy()
    after[:m, :n] = host[:m, :n]
    np.testing.assert_array_equal(after.view(np.uint8), host.view(np.uint8), "wrote outside [M, N]")
    return got if out_dtype == "float32" else simt.to_float(got)


def normal(rng, *shape, scale=1.0):
    return simt.to_bits(rng.standard_normal(shape) * scale)


def check_product(got, x, weight, bias, out_dtype):
    want = simt.to_float(x).astype(np.float64) @ simt.to_float(weight).astype(np.float64).T
    want += 0 if bias is None else simt.to_float(bias)
    assert np.isfinite(got).all()
    # The result's last place, and sums of K terms in float32: tensor cores cut off low bits, up to a last
    # place of a sum of some 4 at each of K / 16 steps; of ten million sums of 4,104 terms one was 3e-5 off.
    epsilon = 2e-5 if out_dtype == "float32" else 2.0**-8
    cut = max(2e-5, x.shape[1] / 16 * 2.0**-22)
    assert (np.abs(got - want) <= epsilon * np.abs(want) + cut).all(), np.abs(got - want).max()


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(8, 8), (136, 72), (264, 200), (576, 1536), (1000, 64)])
@pytest.mark.parametrize("m", [0, 1, 63, 64, 65, 129, 1000])
@pytest.mark.parametrize("rung", ["naive", "mma_step", "wgmma"])
def test_numbers_against_float64(gpu, rng, rung, m, n, k):
    needs(gpu, rung)
    x, weight, bias = normal(rng, m, k), normal(rng, n, k, scale=k**-0.5), normal(rng, n)
    kinds = [("bfloat16", None), ("bfloat16", bias)]
    kinds += [] if rung == "naive" else [("float32", None), ("float32", bias)]
    for out_dtype, added in kinds:
        check_product(product(rung, x, weight, added, out_dtype), x, weight, added, out_dtype)


@pytest.mark.gpu
def test_numbers_of_a_large_product(gpu, rng):
    """Many more blocks than fit the GPU at once, so that stages and blocks are used again."""
    x, weight = normal(rng, 2500, 4104), normal(rng, 4000, 4104, scale=4104**-0.5)
    for rung in ("mma_step", "wgmma"):
        needs(gpu, rung)
        check_product(product(rung, x, weight, None, "float32"), x, weight, None, "float32")


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (576, 1536), (3584, 18944), (264, 200)])
def test_a_row_has_the_same_bits_in_every_step(gpu, rng, n, k):
    """mma.sync, wgmma and the fastest: rows alone, and among random neighbours at a random M."""
    needs(gpu, "hopper")
    weight, bias = normal(rng, n, k), normal(rng, n)
    rows = simt.to_bits(rng.standard_normal((5, k)) * np.exp(rng.standard_normal((5, 1))))
    alone = [product("hopper", row[None], weight, bias, "float32")[0] for row in rows]
    for rung in ("mma_step", "wgmma", "hopper"):
        m = int(rng.integers(5, 700))
        x = normal(rng, m, k, scale=100)
        places = rng.choice(m, 5, replace=False)
        x[places] = rows
        got = product(rung, x, weight, bias, "float32")[places]
        differ = got.view(np.uint32) != np.stack(alone).view(np.uint32)
        assert not differ.any(), f"{rung}, M {m}: {differ.sum()} of {differ.size} differ"
        rounded = product(rung, x, weight, bias)[places]
        np.testing.assert_array_equal(rounded, simt.to_float(simt.to_bits(got)))


@pytest.mark.gpu
@pytest.mark.parametrize("step", list(STEPS))
def test_a_dropped_step_of_k_is_noticed_on_the_gpu(gpu, rng, step):
    needs(gpu, step)
    # Unlike some of MUTANTS this one keeps every copy waited for: none lands in the next block's memory.
    mutant = mutated(step, *DROPPED[step])
    x, weight = normal(rng, 65, 200), normal(rng, 136, 200, scale=200**-0.5)
    check_product(product(step, x, weight), x, weight, None, "bfloat16")
    with pytest.raises(AssertionError):
        check_product(product(mutant, x, weight), x, weight, None, "bfloat16")


def mutated(step, old, new):
    """The launcher of a step whose kernel's text was changed; the cubin gets a name of its own."""
    source = source_of(step)
    assert old in source
    source = source.replace(old, new)
    tag = hashlib.sha256(source.encode()).hexdigest()[:12]
    source = source.replace(f'f"gemm_{step}_', f'f"gemm_{step}_mutant_{tag}_')
    assert tag in source
    module = {"__name__": "mutant"}
    exec(compile(source, "mutant", "exec"), module)
    return module[f"gemm_{step}"]
