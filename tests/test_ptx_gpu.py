"""The numbers of kernels_numba/ptx: small kernels (ptx_kernels.py), assembled anywhere, run on a GPU.

Matrix products are of small integers wherever they must be equal to the bit: then float32 sums are exact.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import no_simulator
import numpy as np
import ptx_kernels
import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"

# dimensions (1: plain bytes), whether with an L2 policy
MULTICASTS = [(1, False), (2, False), (3, False), (4, False), (2, True), (3, True), (4, True)]
# factory in ptx_kernels, its arguments, the kernel's (l int64, i int32), threads, lowest target
KERNELS = [
    ("make_wgmma_tile", (8,), "lill", 128, "sm_90a"),
    ("make_wgmma_tile", (40, "float16"), "lill", 128, "sm_90a"),
    ("make_wgmma_tile", (256,), "lill", 128, "sm_90a"),
    ("make_wgmma_tile", (64, "bfloat16", "registers"), "lill", 128, "sm_90a"),
    ("make_wgmma_tile", (128, "float16", "registers", "k", "mn"), "lill", 128, "sm_90a"),
    ("make_wgmma_tile", (192, "bfloat16", "shared", "mn"), "lill", 128, "sm_90a"),
    ("make_wgmma_tile", (96, "bfloat16", "shared", "mn", "mn"), "lill", 128, "sm_90a"),
    ("make_wgmma_panels_tile", (128, 128, "bfloat16", "shared"), "lill", 128, "sm_90a"),
    ("make_wgmma_panels_tile", (64, 192, "float16", "registers"), "lill", 128, "sm_90a"),
    ("make_predicated", (), "ll", 32, "sm_80"),
    ("make_packs", (), "ll", 32, "sm_80"),
    ("make_halves", (), "lll", 256, "sm_80"),
    ("make_sums", (), "ll", 96, "sm_80"),
    ("make_wgmma_gemm", (64,), "llil", 128, "sm_90a"),
    ("make_mma_gemm", ("bfloat16", False), "lliill", 32, "sm_80"),
    ("make_mma_gemm", ("float16", True), "lliill", 32, "sm_80"),
    ("make_tma_copy", (2, 4096), "lliiiiiiiil", 32, "sm_90a"),
    ("make_tma_copy", (3, 4096), "lliiiiiiiil", 32, "sm_90a"),
    ("make_tma_copy", (4, 4096), "lliiiiiiiil", 32, "sm_90a"),
    ("make_tma_copy", (2, 4096, False, True), "lliiiiiiiil", 32, "sm_90a"),
    ("make_tma_copy", (3, 4096, True, True), "lliiiiiiiil", 32, "sm_90a"),
    ("make_tma_copy", (4, 4096, True, True), "lliiiiiiiil", 32, "sm_90a"),
    *(("make_multicast", (2048, 16, *kind), "lll", 32, "sm_90a") for kind in MULTICASTS),
    ("make_ldmatrix", (4, False), "ll", 32, "sm_80"),
    ("make_ldmatrix", (2, True), "ll", 32, "sm_80"),
    ("make_ldmatrix", (1, True), "ll", 32, "sm_80"),
    ("make_stmatrix", (1, False), "ll", 32, "sm_90a"),
    ("make_stmatrix", (2, True), "ll", 32, "sm_90a"),
    ("make_stmatrix", (4, True), "ll", 32, "sm_90a"),
    ("make_cp_async", (False,), "ll", 32, "sm_80"),
    ("make_cp_async", (True,), "ll", 32, "sm_90a"),
    ("make_bulk", (False,), "lli", 32, "sm_90a"),
    ("make_bulk", (True,), "lli", 32, "sm_90a"),
    ("make_vectors", (), "ll", 32, "sm_80"),
    ("make_warps", (), "ll", 64, "sm_90a"),
    ("make_choices", (), "lll", 64, "sm_80"),
    ("make_hand_over", (5,), "l", 64, "sm_80"),
    ("make_pipeline", (20, 3, True), "l", 64, "sm_90a"),
    ("make_pipeline", (20, 3, True, 1), "l", 64, "sm_90a"),
    ("make_stuck", (True,), "", 32, "sm_90a"),
    ("make_stuck", (False,), "", 32, "sm_90a"),
    ("make_registers", (), "l", 384, "sm_90a"),
]
CHILD = """
import json, subprocess, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from kernels_numba import assemble, launch
try:
    ptxas = assemble.find_ptxas()
except assemble.ToolsMissing as error:
    print(error, file=sys.stderr)
    sys.exit(3)
import ptx_kernels
out = []
for factory, arguments, kinds, threads, lowest in {kernels!r}:
    types = [{{"l": "int64", "i": "int32"}}[kind] for kind in kinds]
    found = {{}}
    for arch in dict.fromkeys([lowest, "sm_90a"]):
        try:
            ptx = launch.compile_ptx(getattr(ptx_kernels, factory)(*arguments), types, threads, arch)
        except Exception as error:
            found[arch] = ["", -1, f"{{type(error).__name__}}: {{error}}"]
            continue
        path = Path({folder!r}) / "k.ptx"
        path.write_text(ptx)
        run = subprocess.run([str(ptxas), "-v", "-arch=" + arch, str(path), "-o", str(path) + ".cubin"],
                             capture_output=True, text=True)
        found[arch] = [ptx, run.returncode, run.stdout + run.stderr]
    out.append(found)
print(json.dumps(out))
"""


def without_simulator(code, timeout=240):
    return no_simulator.run(code, timeout=timeout, PYTHONPATH=no_simulator.WITH_TESTS)


@pytest.fixture(scope="module")
def assembled(tmp_path_factory, request):
    pytest.importorskip("numba")
    folder = str(tmp_path_factory.mktemp("ptx"))
    child = without_simulator(CHILD.format(root=str(ROOT), tests=str(TESTS), folder=folder, kernels=KERNELS))
    if child.returncode == 3 and not request.config.getoption("--strict-tools"):
        pytest.skip(child.stderr.strip())
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(len(KERNELS)), ids=[f"{k[0]}{k[1]}" for k in KERNELS])
def test_a_kernel_keeps_its_arrays_in_registers(index, assembled):
    """Assembled for the oldest target that has the instruction and for Hopper: nothing in local memory."""
    assert len(assembled[index]) == len({KERNELS[index][4], "sm_90a"})
    for arch, (ptx, code, words) in assembled[index].items():
        assert code == 0, (arch, words)
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in words, (arch, words)
        assert ".local" not in ptx, arch
        assert "C7510" not in words, (arch, words)


# Everything below runs on a GPU.


@pytest.fixture
def gpu(on_gpu):
    if not on_gpu:
        pytest.skip("runs under --device=cuda only")


@cache
def jitted(factory, *arguments):
    from kernels_numba.compiler import jit

    return jit()(getattr(ptx_kernels, factory)(*arguments))


def run(kernel, arguments, grid=1, threads=32, smem=0):
    """Launch and wait; arrays are passed by address, integers as int32."""
    from kernels_numba.compiler import cuda
    from kernels_numba.launch import address

    values = [np.int32(a) if isinstance(a, int) else np.int64(address(a)) for a in arguments]
    kernel[grid, threads, 0, smem](*values)
    cuda.synchronize()


def run_with_smem(factory, choices, arguments, threads, smem):
    """run() for over 48 KiB of shared memory, which a kernel has to ask for: numba's launcher never does,
    the product's does."""
    from kernels_numba.compiler import cuda
    from kernels_numba.launch import Kernel, address

    types = ["int32" if isinstance(a, int) else "int64" for a in arguments]
    values = [a if isinstance(a, int) else address(a) for a in arguments]
    source = hashlib.sha256((TESTS / "ptx_kernels.py").read_bytes()).hexdigest()  # the cache cannot know it
    kernel = Kernel(
        factory.removeprefix("make_"), lambda: getattr(ptx_kernels, factory)(*choices), (*choices, source),
        f"void({', '.join(types)})", threads, smem, archs=("sm_90a",),
    )  # fmt: skip
    kernel.prepare(1, values)()
    cuda.synchronize()


def device(array):
    from kernels_numba.compiler import cuda

    return cuda.to_device(np.ascontiguousarray(array))


def empty(shape, dtype, fill=0xEE):
    """Device array of poison."""
    host = np.zeros(shape, dtype)
    host.view(np.uint8)[...] = fill
    return device(host)


def bits(values, dtype):
    """float32 values as uint16 bit patterns of bfloat16 or float16 (exact here)."""
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def integers(rng, *shape):
    return rng.integers(-8, 9, shape).astype(np.float32)


def swizzle(rows, bytes_):
    """Byte image of lines (uint8[lines, width], width at most 128) with 16-byte chunks exchanged as by TMA's
    swizzle of `bytes_`: address bits 4-6 ^= bits 7-9, as many of them as the swizzle has chunks."""
    flat = np.ascontiguousarray(rows).reshape(-1, 16)
    at = np.arange(len(flat))
    return flat[at ^ ((at >> 3) & (max(bytes_, 16) // 16 - 1))].reshape(-1)


def tile_image(tile, major):
    """u16[lines of M or N, 64 of K] -> the bytes wgmma wants: 128-byte swizzle, K or the lines innermost."""
    if major == "k":
        return swizzle(tile.view(np.uint8), 128)
    panels = -(-len(tile) // 64)
    padded = np.zeros((panels * 64, 64), np.uint16)
    padded[: len(tile)] = tile
    image = padded.reshape(panels, 64, 64).transpose(0, 2, 1)
    return swizzle(np.ascontiguousarray(image).view(np.uint8), 128)


ALL_N = [(n, "bfloat16", "shared", "k", "k") for n in range(8, 257, 8)]
OTHERS = [
    (n, dtype, a, a_major, b_major)
    for n in (8, 72, 256)
    for dtype, a, a_major, b_major in (
        ("float16", "shared", "k", "k"),
        ("bfloat16", "shared", "mn", "k"),
        ("bfloat16", "shared", "k", "mn"),
        ("float16", "shared", "mn", "mn"),
        ("bfloat16", "registers", "k", "k"),
        ("float16", "registers", "k", "mn"),
    )
]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("n", "dtype", "a", "a_major", "b_major"), ALL_N + OTHERS)
def test_wgmma(n, dtype, a, a_major, b_major, rng):
    x, y = integers(rng, 64, 64), integers(rng, n, 64)
    x_bits, y_bits = bits(x, dtype), bits(y, dtype)
    image = np.concatenate([tile_image(x_bits, a_major), tile_image(y_bits, b_major)])
    out = empty((64, n), np.float32)
    kernel = jitted("make_wgmma_tile", n, dtype, a, a_major, b_major)
    arguments = (device(image), len(image) // 4, device(x_bits), out)
    run(kernel, arguments, threads=128, smem=len(image))
    np.testing.assert_array_equal(out.copy_to_host(), 2 * (x @ y.T))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("k", [64, 128, 192])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("a", ["shared", "registers"])
def test_wgmma_over_panels(n, k, dtype, a, rng):
    x, y = integers(rng, 64, k), integers(rng, n, k)
    x_bits, y_bits = bits(x, dtype), bits(y, dtype)
    panels = [
        tile_image(np.ascontiguousarray(side[:, at : at + 64]), "k")
        for side in (x_bits, y_bits)
        for at in range(0, k, 64)
    ]
    image, out = np.concatenate(panels), empty((64, n), np.float32)
    arguments = (device(image), len(image) // 4, device(x_bits), out)
    run_with_smem("make_wgmma_panels_tile", (n, k, dtype, a), arguments, threads=128, smem=len(image))
    np.testing.assert_array_equal(out.copy_to_host(), 2 * (x @ y.T))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_stores_that_lanes_leave_out(rng):
    source = rng.integers(0, 1 << 31, (32, 4)).astype(np.uint32)
    out = device(np.full((32, 4), 5, np.uint32))
    run(jitted("make_predicated"), (device(source), out))
    wanted = np.where((np.arange(32) % 3 == 0)[:, None], source, 5)
    np.testing.assert_array_equal(out.copy_to_host(), wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_packs_leave_lanes_out(rng):
    source, out = rng.integers(1, 1 << 30, (32, 8)).astype(np.int32), device(np.full((32, 12), 5, np.int32))
    run(jitted("make_packs"), (device(source), out))
    odd, few = (np.arange(32) % 2 == 1)[:, None], (np.arange(32) < 5)[:, None]
    low, high = source[:, :4], source[:, 4:]
    wanted = [np.where(odd, low, 0), np.where(odd, high, 5), np.where(few, low, 5)]
    np.testing.assert_array_equal(out.copy_to_host(), np.concatenate(wanted, axis=1))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_sums_of_two_widths(rng):
    numbers, out = rng.integers(-(1 << 62), 1 << 62, 96), device(np.zeros(2, np.int64))
    run(jitted("make_sums"), (device(numbers), out), threads=96)
    first, second = out.copy_to_host()
    assert first == np.sum(numbers)  # both wrap
    assert second & 0xFFFFFFFF == int(np.sum(numbers & 0xFFFFFFFF)) & 0xFFFFFFFF


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_halves_and_quotients(rng):
    words = rng.integers(0, 1 << 32, 256, dtype=np.uint64).astype(np.uint32)
    y = np.exp2(rng.uniform(-60, 60, (256, 2))).astype(np.float32)
    y[0] = 3, np.inf
    out = empty((256, 6), np.float32)
    run(jitted("make_halves"), (device(words), device(y), out), threads=256)
    got = out.copy_to_host()
    for part, half in enumerate(((words << 16), (words & 0xFFFF0000))):
        np.testing.assert_array_equal(got[:, part], half.view(np.float32))
        f16 = (half >> 16).astype(np.uint16).view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(got[:, 2 + part], f16)
    np.testing.assert_array_equal(got[:, 4], np.sqrt(y[:, 0]))
    np.testing.assert_allclose(got[:, 5], y[:, 0] / y[:, 1], rtol=2.0**-22)
    assert got[0, 5] == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("offsets", [False, True])
def test_mma_sync(dtype, offsets, rng):
    x, y, c = integers(rng, 32, 48), integers(rng, 24, 48), integers(rng, 32, 24)
    out = empty((32, 24), np.float32)
    arguments = (device(bits(x, dtype)), device(bits(y, dtype)), 48, 24, device(c), out)
    run(jitted("make_mma_gemm", dtype, offsets), arguments, grid=(2, 3))
    np.testing.assert_array_equal(out.copy_to_host(), c + x @ y.T)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("k", [64, 4096])
@pytest.mark.parametrize("spread", [0, 8], ids=["normal", "wide range"])
def test_mma_sync_and_wgmma_give_the_same_bits(k, spread, rng):
    """So 16-row tiles may take mma.sync without a row's result knowing of it."""
    x, y = (
        (rng.standard_normal((64, k)) * 2.0 ** rng.integers(-spread, spread + 1, (64, k))).astype(np.float32)
        for _ in range(2)
    )
    x_bits, y_bits = bits(x, "bfloat16"), bits(y, "bfloat16")
    a, b, zero = device(x_bits), device(y_bits), device(np.zeros((64, 64), np.float32))
    by_warp, by_group = empty((64, 64), np.float32), empty((64, 64), np.float32)
    run(jitted("make_mma_gemm"), (a, b, k, 64, zero, by_warp), grid=(4, 8))
    run(jitted("make_wgmma_gemm", 64), (a, b, k, by_group), threads=128, smem=16384)
    warp, group = by_warp.copy_to_host(), by_group.copy_to_host()
    exact_x, exact_y = (
        (v.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for v in (x_bits, y_bits)
    )
    scale = np.abs(exact_x) @ np.abs(exact_y).T
    assert np.abs(warp - exact_x @ exact_y.T).max() < 1e-4 * scale.max()
    differ = warp.view(np.uint32) != group.view(np.uint32)
    assert not differ.any(), f"{differ.sum()} of {differ.size} differ"


ITEMS = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32, "uint8": np.uint8}
# dtype, shape, box, swizzle, where the box is read and written (all outermost first); outside are
# zeros, and nothing is written
BOXES = {
    "2d swizzle 128": ("bfloat16", (40, 128), (16, 64), 128, (8, 64), (0, 0)),
    "2d swizzle 64": ("float16", (40, 64), (32, 32), 64, (0, 32), (8, 0)),
    "2d swizzle 32": ("bfloat16", (40, 64), (8, 16), 32, (3, 16), (8, 48)),
    "2d no swizzle": ("float32", (40, 64), (8, 64), 0, (3, 0), (32, 0)),
    "2d bytes": ("uint8", (40, 128), (16, 128), 128, (24, 0), (1, 0)),
    "2d over the edge": ("bfloat16", (40, 128), (16, 64), 128, (32, 96), (30, 80)),
    # Before the edge: below, in children of their own.
    "3d": ("bfloat16", (3, 20, 64), (2, 8, 64), 128, (1, 7, 0), (0, 12, 0)),
    "3d over the edge": ("float32", (3, 20, 32), (2, 8, 32), 128, (2, 15, 0), (2, 16, 0)),
    "4d": ("bfloat16", (3, 4, 20, 64), (1, 2, 8, 64), 128, (1, 2, 7, 0), (2, 0, 3, 0)),
    "4d over the edge": ("float16", (3, 4, 20, 32), (2, 2, 4, 32), 64, (2, 3, 18, 0), (2, 3, 19, 16)),
}


def overlap(start, sides, shape):
    """(slices of the tensor, slices of the box) where a box at start meets a tensor."""
    inside = [(max(s, 0), min(s + side, size)) for s, side, size in zip(start, sides, shape, strict=True)]
    return (
        tuple(slice(lo, hi) for lo, hi in inside),
        tuple(slice(lo - s, hi - s) for (lo, hi), s in zip(inside, start, strict=True)),
    )


def copy_a_box(dtype, shape, box, swizzled, source, target, rng, prefetch=True, hint=False):
    """Load a box at `source`, look at its bytes, store it at `target`, look at the tensor."""
    from kernels_numba.launch import address
    from kernels_numba.ptx.tma import encode_tensor_map

    values = rng.integers(0, 200, shape).astype(ITEMS[dtype])
    have, out = device(values), empty(shape, ITEMS[dtype])
    strides = values.strides[:-1]
    maps = [
        device(encode_tensor_map(address(array), dtype, shape, strides, box, swizzled))
        for array in (have, out)
    ]
    size = int(np.prod(box)) * values.itemsize
    seen = empty(size, np.uint8)
    coordinates = [[*reversed(place), 0, 0][:4] for place in (source, target)]
    arguments = (*maps, *coordinates[0], *coordinates[1], seen)
    run(jitted("make_tma_copy", len(shape), size, prefetch, hint), arguments, smem=size + 16)

    wanted = np.zeros(box, values.dtype)
    in_tensor, in_box = overlap(source, box, shape)
    wanted[in_box] = values[in_tensor]
    image = swizzle(wanted.reshape(-1, box[-1]).view(np.uint8), swizzled)
    np.testing.assert_array_equal(seen.copy_to_host(), image)
    after = empty(shape, ITEMS[dtype]).copy_to_host()
    in_tensor, in_box = overlap(target, box, shape)
    after[in_tensor] = wanted[in_box]
    np.testing.assert_array_equal(out.copy_to_host().view(np.uint8), after.view(np.uint8))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("name", BOXES)
def test_tma_loads_and_stores_a_box(name, hint, rng):
    copy_a_box(*BOXES[name], rng, hint=hint)


BEFORE_THE_EDGE = """
import numpy as np
from test_ptx_gpu import copy_a_box
try:
    copy_a_box("bfloat16", (40, 128), (16, 64), 128, {source}, {target}, np.random.default_rng(5), {prefetch})
except Exception as error:
    print("ended", type(error).__name__, error, flush=True)
    import os
    os._exit(7)  # the context is lost: nothing can be cleaned up
"""


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("source", "target", "prefetch", "ending"),
    [
        ((-5, -8), (8, 64), False, 0),
        ((-5, -8), (8, 64), True, 0),
        ((8, 64), (-3, -16), False, 7),
    ],
    ids=["load", "load after a prefetch", "store"],
)
def test_tma_before_the_edge(source, target, prefetch, ending):
    """A box may begin before the tensor when it is read (zeros there), never when it is written: CUDA C++
    Programming Guide, "Tensor Memory Access", negative indices and out of bounds. Each in a process of its
    own, because the refusal, an illegal instruction, ends the context."""
    child = without_simulator(BEFORE_THE_EDGE.format(source=source, target=target, prefetch=prefetch), 60)
    assert child.returncode == ending, child.stdout + child.stderr
    if ending:
        assert "ILLEGAL_INSTRUCTION" in child.stdout.upper(), child.stdout


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("rank", "hint"), MULTICASTS)
def test_multicast_in_a_cluster(rank, hint, rng):
    from kernels_numba.compiler import cuda
    from kernels_numba.launch import Kernel, address
    from kernels_numba.ptx.tma import encode_tensor_map

    values = rng.integers(0, 1 << 16, (32, 64)).astype(np.uint16)
    source, out, ranks = device(values), empty((4, 32, 64), np.uint16), empty(4, np.int32)
    if rank > 1:
        ones = (1,) * (rank - 2)
        strides = (4096,) * (rank - 2) + (128,)
        shape, box = (*ones, 32, 64), (*ones, 16, 64)
        source_map = device(encode_tensor_map(address(source), "bfloat16", shape, strides, box, 128))
    # The file's bytes are part of the key: a kept cubin must not outlive an edit of the kernel.
    key = (rank, hint, Path(ptx_kernels.__file__).read_bytes())
    kernel = Kernel(
        "ptx_multicast", lambda: ptx_kernels.make_multicast(2048, 16, rank, hint), key,
        "void(int64, int64, int64)", 32, smem=4096 + 16, cluster=2,
    )  # fmt: skip
    kernel.prepare(4, (address(source_map if rank > 1 else source), address(out), address(ranks)))()
    cuda.synchronize()
    halves = [swizzle(half.view(np.uint8), 128 if rank > 1 else 0) for half in (values[:16], values[16:])]
    for block in out.copy_to_host():
        np.testing.assert_array_equal(block.view(np.uint8).reshape(-1), np.concatenate(halves))
    np.testing.assert_array_equal(ranks.copy_to_host(), [0, 1, 0, 1])


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_asynchronous_stores_to_the_other_block(rng):
    from kernels_numba.compiler import cuda
    from kernels_numba.launch import Kernel, address

    words = rng.standard_normal((4, 32, 8)).astype(np.float32)
    source, out = device(words), empty((4, 32, 8), np.float32)
    key = (Path(ptx_kernels.__file__).read_bytes(),)
    kernel = Kernel(
        "ptx_st_async", ptx_kernels.make_st_async, key, "void(int64, int64)", 32, smem=1040, cluster=2
    )
    kernel.prepare(4, (address(source), address(out)))()
    cuda.synchronize()
    wanted = words[[1, 0, 3, 2]]
    wanted[..., 7] = 0
    np.testing.assert_array_equal(out.copy_to_host(), wanted)


def fragments(matrices, trans):
    """u16[count, 8, 8] -> i32[32, count]: what each lane holds of each matrix."""
    held = matrices.transpose(0, 2, 1) if trans else matrices
    pairs = np.ascontiguousarray(held).reshape(len(held), 32, 2).view(np.int32)[:, :, 0]
    return pairs.T


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, trans, rng):
    matrices = rng.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    held = empty((32, count), np.int32)
    run(jitted("make_ldmatrix", count, trans), (device(matrices), held), smem=512)
    np.testing.assert_array_equal(held.copy_to_host(), fragments(matrices[:count], trans))
    back = empty((4, 8, 8), np.uint16)
    run(jitted("make_stmatrix", count, trans), (held, back), smem=512)
    wanted = matrices.copy()
    wanted[count:] = 0
    np.testing.assert_array_equal(back.copy_to_host(), wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("by_barrier", [False, True])
def test_cp_async(by_barrier, rng):
    source = rng.integers(0, 256, (32, 16)).astype(np.uint8)
    out = empty((2, 32, 16), np.uint8)
    run(jitted("make_cp_async", by_barrier), (device(source), out), smem=1024 + 16)
    kept = np.arange(16) < (np.arange(32) % 17)[:, None]
    np.testing.assert_array_equal(out.copy_to_host(), [source, source * kept])


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("size", [16, 48, 4096])
def test_bulk_copies(size, hint, rng):
    source = rng.integers(0, 256, 4096).astype(np.uint8)
    out = empty(4096, np.uint8)
    run(jitted("make_bulk", hint), (device(source), out, size), smem=4096 + 16)
    wanted = np.full(4096, 0xEE, np.uint8)
    wanted[:size] = source[:size]
    np.testing.assert_array_equal(out.copy_to_host(), wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_vector_loads_and_stores(rng):
    source = rng.integers(0, 1 << 31, (32, 4)).astype(np.uint32)
    out = empty(3136, np.uint8)
    run(jitted("make_vectors"), (device(source), out), smem=512)
    words = out.copy_to_host()
    neighbour = source[np.arange(32) ^ 1]
    pieces = [source, source, neighbour, source.reshape(-1)[:64], neighbour[:, [0, 3]]]
    wanted = b"".join(np.ascontiguousarray(piece).tobytes() for piece in pieces)
    np.testing.assert_array_equal(words[:2048], np.frombuffer(wanted, np.uint8))
    np.testing.assert_array_equal(words[2048:2112].view(np.uint16), (source.reshape(-1)[:64:2] & 0xFFFF))
    for start in (2112, 2624):
        np.testing.assert_array_equal(words[start : start + 512].view(np.uint32), source.reshape(-1))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_shuffles_lanes_and_packing(rng):
    import ml_dtypes

    from kernels_numba.compiler import cuda

    x = rng.standard_normal((64, 2)).astype(np.float32)
    x[:4, 0] = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF], np.uint32).view(
        np.float32
    )  # ties, over
    out = empty((64, 14), np.int32)
    run(jitted("make_warps"), (device(x), out), threads=64)
    got = out.copy_to_host()
    thread = np.arange(64)
    lane, first = thread % 32, thread - thread % 32
    as_bits = x[:, 0].view(np.int32)
    np.testing.assert_array_equal(got[:, 0], as_bits[thread ^ 5])
    np.testing.assert_array_equal(got[:, 1], as_bits[np.where(lane + 3 < 32, thread + 3, thread)])
    np.testing.assert_array_equal(got[:, 2], first + (lane + 1) % 32)
    np.testing.assert_array_equal(got[:, 3], first)
    assert [sorted(got[part, 4]) for part in (slice(0, 32), slice(32, 64))] == [[0] * 31 + [1]] * 2
    np.testing.assert_array_equal(got[:, 5], lane)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got[:, 6], x.astype(ml_dtypes.bfloat16).view(np.int32)[:, 0])
        np.testing.assert_array_equal(got[:, 7], x.astype(np.float16).view(np.int32)[:, 0])
    np.testing.assert_array_equal(got[:, 8], 3 * (63 - thread))
    np.testing.assert_array_equal(got[:, 9], as_bits[np.where(lane >= 3, thread - 3, thread)])
    np.testing.assert_array_equal(got[:, 10], as_bits[thread ^ 9])
    np.testing.assert_array_equal(got[:, 11], thread ^ 6)
    assert 0 <= got[:, 12].min() <= got[:, 12].max() < 10_000_000  # ns, of a pause of up to 40,000
    assert got[:, 12].max() > 0
    assert len(set(got[:, 13].tolist())) == 1
    assert 0 <= got[0, 13] < cuda.get_current_device().MULTIPROCESSOR_COUNT


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_arithmetic_and_choices(rng):
    x = rng.standard_normal((64, 2)).astype(np.float32)
    x[0, 0], x[1, 0] = 0, -np.inf
    a, b, wide = x[:, 0], x[:, 1], x.astype(np.float64)
    out, counters = device(np.full((64, 24), -9, np.int32)), device(np.zeros(2, np.int32))
    run(jitted("make_choices"), (device(x), counters, out), threads=64, smem=2048)
    got = out.copy_to_host()
    numbers = got.view(np.float32)
    thread = np.arange(64)
    lane = thread % 32
    assert (numbers[0, 0], numbers[1, 0]) == (1, 0)  # exactly
    np.testing.assert_allclose(numbers[:, 0], np.exp2(wide[:, 0]), rtol=2.0**-22)
    np.testing.assert_allclose(
        numbers[:, 1], np.log2(np.maximum(wide[:, 1], 0.5)), rtol=2.0**-20, atol=2.0**-21
    )
    with np.errstate(invalid="ignore"):
        fused = (wide[:, 0] * wide[:, 1] + wide[:, 0]).astype(np.float32)
        apart = a * b + a
        np.testing.assert_array_equal(numbers[:, 4], a / b)
    np.testing.assert_array_equal(numbers[:, 2], fused)
    np.testing.assert_array_equal(numbers[:, 3], apart)
    assert (fused[2:] != apart[2:]).any()
    np.testing.assert_array_equal(numbers[:, 5], np.minimum(a, b))
    np.testing.assert_array_equal(got[:, 6], np.where(lane & 2, thread, -7))
    for first in (0, 32):
        part = slice(first, first + 32)
        mask = sum(1 << int(i) for i in np.flatnonzero((a < b)[part]))
        np.testing.assert_array_equal(got[part, 7].view(np.uint32), mask)
    np.testing.assert_array_equal(got[:, 8], [int(n * 1021).bit_count() for n in thread])
    np.testing.assert_array_equal(got[:, 9], np.where(lane >= 4, thread - 4, thread))
    np.testing.assert_array_equal(got[:, 10], np.where(lane & 1, thread, -9))
    np.testing.assert_array_equal(got[:, 11], np.where(lane & 2, x.view(np.int32)[:, 1], -9))
    np.testing.assert_array_equal(got[:, 12:14], np.where(lane[:, None] & 4, x.view(np.int32), -9))
    np.testing.assert_array_equal(np.sort(got[:, 14]), 3 * thread)
    assert counters.copy_to_host().tolist() == [192, int(thread.sum())]
    np.testing.assert_array_equal(got[:, 16], np.where(lane & 1, 0, thread))
    zeroed = np.where(lane & 1, 0, thread)
    np.testing.assert_array_equal(got[:, 17], np.where(lane & 2, x.view(np.int32)[:, 0], zeroed))
    np.testing.assert_array_equal(got[:, 18], 1)
    np.testing.assert_array_equal(got[:, 19], x.view(np.int32)[:, 0])
    np.testing.assert_array_equal(got[:, 20:], x.view(np.int32)[:, [1, 0, 0, 1]])


def turns(rounds):
    return np.arange(rounds)[:, None] * 100 + np.arange(31, -1, -1)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_named_barriers_hand_over():
    out = empty((50, 32), np.int32)
    run(jitted("make_hand_over", 50), (out,), threads=64, smem=128)
    np.testing.assert_array_equal(out.copy_to_host(), turns(50))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("stress", [False, True])
def test_mbarrier_phases_hand_over(stress):
    out = empty((200, 32), np.int32)
    run(jitted("make_pipeline", 200, 3, stress), (out,), threads=64, smem=512)
    np.testing.assert_array_equal(out.copy_to_host(), turns(200))


WRONG_PHASE = """
import numpy as np
from test_ptx_gpu import empty, jitted, run, turns
out = empty((200, 32), np.int32)
try:
    run(jitted("make_pipeline", 200, 3, True, 1), (out,), threads=64, smem=512)
except Exception as error:
    print("ended", error, flush=True)
    import os
    os._exit(7)
print("same" if np.array_equal(out.copy_to_host(), turns(200)) else "different")
"""


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_consumer_that_waits_for_the_wrong_phase_is_caught():
    """The mutant of the test above: wrong numbers, or a bounded wait that ends the kernel."""
    child = without_simulator(WRONG_PHASE, timeout=60)
    assert child.returncode == 7 or child.stdout.strip() == "different", child.stdout + child.stderr


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_registers_move_between_warpgroups():
    """Through the launcher, whose assembler keeps setmaxnreg (test_assemble.py sees that it does)."""
    from kernels_numba.compiler import cuda
    from kernels_numba.launch import Kernel, address

    out = empty(384, np.int32)
    key = (Path(ptx_kernels.__file__).read_bytes(),)
    kernel = Kernel("ptx_registers", ptx_kernels.make_registers, key, "void(int64)", 384)
    kernel.prepare(1, (address(out),))()
    cuda.synchronize()
    np.testing.assert_array_equal(out.copy_to_host(), np.arange(384))


STUCK = """
import time
from kernels_numba.compiler import cuda, jit
import ptx_kernels
kernel = jit()(ptx_kernels.make_stuck({report}))
start = time.monotonic()
kernel[1, 32, 0, 16]()
try:
    cuda.synchronize()
except Exception as error:
    print("ended", type(error).__name__, error, round(time.monotonic() - start, 1), flush=True)
    import os
    os._exit(7)  # the context is lost: nothing can be cleaned up
"""


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("report", [True, False])
def test_a_wait_that_never_ends_fails_and_says_its_name(report):
    child = without_simulator(STUCK.format(report=report), timeout=40)
    assert child.returncode == 7, child.stdout + child.stderr
    assert ("never: mbarrier wait timed out" in child.stdout + child.stderr) == report
