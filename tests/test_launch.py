"""Cubins on disk, argument checks, and shared-memory plans, without a GPU; a launch's cost on one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import no_simulator
import numpy as np
import pytest

from kernels_numba import cubins, launch
from kernels_numba.launch import Kernel
from kernels_numba.smem import SmemPlan

ROOT = Path(__file__).resolve().parent.parent

CACHE = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from kernels_numba import launch
from kernels_numba.ops.gemm import hopper
folder = Path({folder!r})
def build(place):
    kernel = hopper.hopper_kernel(hopper.CONFIGS[place], "bfloat16", "bfloat16", False)
    return kernel.cubin("sm_90a", folder)
first = build(0)
assert launch.compiles == 1 and len(list(folder.iterdir())) == 1
assert build(0) == first and launch.compiles == 1
build(1)
assert launch.compiles == 2 and len(list(folder.iterdir())) == 2
for path in folder.iterdir():
    path.write_bytes(path.read_bytes()[:-100])
assert build(0)[1] and launch.compiles == 3
print("cached")
"""


def test_a_cubin_is_compiled_once_and_a_damaged_one_again(tmp_path):
    code = CACHE.format(root=str(ROOT), folder=str(tmp_path))
    assert "cached" in no_simulator.outcome(code, timeout=120).stdout


def test_cache_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "k.cubin"
    cubins.write_cubin(path, "entry", b"\x7fELF\n\n1")
    assert cubins.read_cubin(path) == ("entry", b"\x7fELF\n\n1")
    for damage in (b"", b"{}", b"[]\nx", b'{"entry": 1}\nx', path.read_bytes() + b"!"):
        path.write_bytes(damage)
        assert cubins.read_cubin(path) is None
    assert cubins.read_cubin(tmp_path / "none") is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    cubins.write_cubin(blocked / "k.cubin", "entry", b"x")  # a cache that cannot be written is no error
    assert cubins.writable(tmp_path / "more")
    assert not cubins.writable(blocked)


def test_what_the_cache_holds_and_how_it_is_emptied(tmp_path):
    assert cubins.contents(tmp_path / "none") == (0, 0)
    cubins.write_cubin(tmp_path / "a-sm_90a-1.cubin", "entry", b"x" * 100)
    (tmp_path / f"abc{cubins.UNFINISHED}").write_bytes(b"left behind by a killed process")
    (tmp_path / "notes.txt").write_text("somebody's own")
    count, size = cubins.contents(tmp_path)
    assert count == 1
    assert size > 100
    assert cubins.clear(tmp_path) == (count, size)
    assert cubins.contents(tmp_path) == (0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_arguments_are_packed_and_counted():
    kernel = Kernel("toy", lambda: None, (), "void(int64, int32, float32)", 128, cluster=2)
    packed = kernel.prepare(4, (1 << 40, -5, 0.5))
    assert [value.value for value in packed.values] == [1 << 40, -5, 0.5]
    packed.set(1, 7)
    assert packed.values[1].value == 7
    with pytest.raises(ValueError, match="2 arguments; 3 are required"):
        kernel.prepare(4, (1, 2))
    with pytest.raises(ValueError, match="grid is 3; a multiple of the cluster's 2"):
        kernel.prepare(3, (1, 2, 3.0))
    with pytest.raises(ValueError, match="argument types float64"):
        Kernel("toy", lambda: None, (), "void(float64)", 128)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (1, 1 << 31, "toy: argument 1 is 2147483648; int32 holds -2147483648 to 2147483647"),
        (1, -(1 << 31) - 1, "toy: argument 1 is -2147483649; int32 holds"),
        (0, 1 << 63, "toy: argument 0 is 9223372036854775808; int64 holds"),
        (1, 0.5, "toy: argument 1 is 0.5; int32 holds integers"),
        (2, 1e39, r"toy: argument 2 is 1e\+39; float32 holds up to 3.4028235e38"),
    ],
)
def test_an_argument_is_never_cut(index, value, message):
    kernel = Kernel("toy", lambda: None, (), "void(int64, int32, float32)", 128)
    arguments = [1 << 40, -5, 0.5]
    packed = kernel.prepare(1, arguments)
    with pytest.raises(ValueError, match=message):
        packed.set(index, value)
    assert [value.value for value in packed.values] == arguments
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        kernel.prepare(1, arguments)


def test_the_widest_arguments_that_fit():
    kernel = Kernel("toy", lambda: None, (), "void(int64, int32, float32)", 128)
    given = ((1 << 63) - 1, np.int64(-(1 << 31)), float("inf"))
    assert [value.value for value in kernel.prepare(1, given).values] == list(given)
    with pytest.raises(ValueError, match="toy: argument 3; there are 0 to 2"):
        kernel.prepare(1, given).set(3, 1)


def test_a_kernel_for_other_targets_is_refused():
    kernel = Kernel("toy", lambda: None, (), "void()", 128, archs=("sm_90a", "sm_120a"))
    with pytest.raises(ValueError, match="toy is for sm_90a, sm_120a; this is sm_86"):
        kernel.cubin("sm_86")


def test_targets_and_streams():
    assert launch.arch_of((9, 0)) == "sm_90a"
    assert launch.arch_of((8, 6)) == "sm_86"
    assert launch.stream_handle(None) == 0
    assert launch.stream_handle(17) == 17


def test_a_plan_of_shared_memory():
    plan = SmemPlan.of(("a", 1000, 16, 1), ("b", 1024, 1024, 3), ("bar", 8, 8, 4), limit=5000)
    assert (plan.offset("a"), plan.offset("b"), plan.offset("b", 2), plan.offset("bar")) == (
        0,
        1024,
        3072,
        4096,
    )
    assert plan.bytes == 4128
    assert "3 x 1,024 bytes" in plan.picture()
    with pytest.raises(KeyError, match="no region 'c'"):
        plan.offset("c")
    with pytest.raises(IndexError, match="not a piece 3"):
        plan.offset("b", 3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("a", 6000, 16, 1)], "6,000 bytes are needed, the limit is 5,000"),
        ([("a", 16, 3, 1)], "aligned to 3"),
        ([("a", 24, 16, 2)], "2 pieces of 24 bytes, aligned to 16"),
        ([("a", 16, 16, 1), ("a", 16, 16, 1)], "two regions are called a"),
    ],
)
def test_a_plan_that_cannot_be(parts, message):
    with pytest.raises(ValueError, match=message):
        SmemPlan.of(*parts, limit=5000)


@pytest.mark.gpu
def test_a_second_process_loads_without_compiling_and_launches_cheaply(on_gpu):
    if not on_gpu:
        pytest.skip("runs under --device=cuda only")
    import time

    from kernels_numba.compiler import cuda
    from kernels_numba.ops.gemm import hopper
    from kernels_numba.ops.gemm.door import operands

    x = cuda.to_device(np.ones((64, 64), np.uint16))
    out = cuda.to_device(np.zeros((64, 64), np.uint16))
    hopper.gemm_hopper(out, x, x)
    config, group = hopper.pick_hopper_config(64, 64, 64, hopper.num_sms())
    before = launch.compiles
    again = dataclasses.replace(hopper.hopper_kernel(config, "bfloat16", "bfloat16", False))
    again.load()
    assert launch.compiles == before
    count = cuda.to_device(np.zeros(1, np.int32))  # no rows: the cost of a launch alone
    one, _ = hopper.prepared(operands(out, x, x), launch.address(count), config, group)
    stream = cuda.stream()
    handle = launch.stream_handle(stream)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            one(handle)
        times.append((time.perf_counter() - start) / 100 * 1e6)
        stream.synchronize()
    print(f"{sorted(times)[10]:.2f} us a launch")
    assert sorted(times)[10] < 12
