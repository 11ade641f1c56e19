"""Every instruction of kernels_numba/ptx: the PTX it becomes, and that the assembler takes it. No GPU
needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_numba.compiler import KernelsUnavailable
from kernels_numba.ptx import asm, tma, wgmma

ROOT = Path(__file__).resolve().parent.parent

# name -> (module, arguments, text that must stand in the PTX); s: shared address, g: global address, i:
# int32, f: float32.
CALLS = {
    "setmaxnreg_inc": ("control", "232", "setmaxnreg.inc.sync.aligned.u32 232"),
    "setmaxnreg_dec": ("control", "40", "setmaxnreg.dec.sync.aligned.u32 40"),
    "elect_one": ("control", "", "elect.sync"),
    "warp_uniform": ("control", "i", "shfl.sync.idx.b32"),
    "shfl_xor_f32": ("control", "f, 1", "shfl.sync.bfly.b32"),
    "shfl_down_f32": ("control", "f, 4", "shfl.sync.down.b32"),
    "shfl_idx_i32": ("control", "i, 3", "shfl.sync.idx.b32"),
    "lane_id": ("control", "", "%laneid"),
    "named_barrier_sync": ("control", "1, 128", "bar.sync"),
    "named_barrier_arrive": ("control", "1, 128", "bar.arrive"),
    "nanosleep": ("control", "i", "nanosleep.u32"),
    "trap": ("control", "", "trap;"),
    "griddep_wait": ("control", "", "griddepcontrol.wait"),
    "griddep_launch": ("control", "", "griddepcontrol.launch_dependents"),
    "cluster_rank": ("control", "", "%cluster_ctarank"),
    "cluster_sync": ("control", "", "barrier.cluster.wait.acquire"),
    "mbarrier_init": ("mbarrier", "s, 1", "mbarrier.init.shared::cta.b64"),
    "fence_mbarrier_init": ("mbarrier", "", "fence.mbarrier_init.release.cluster"),
    "mbarrier_arrive": ("mbarrier", "s", "mbarrier.arrive.shared::cta.b64"),
    "mbarrier_expect_tx": ("mbarrier", "s, 64", "mbarrier.arrive.expect_tx.shared::cta.b64"),
    "mbarrier_arrive_remote": ("mbarrier", "s, 1", "mapa.shared::cluster.u32"),
    "mbarrier_wait": ("mbarrier", "s, i", "mbarrier.try_wait.parity.shared::cta.b64"),
    "fence_proxy_async": ("fences", "", "fence.proxy.async.shared::cta"),
    "fence_proxy_async_global": ("fences", "", "fence.proxy.async.global"),
    "fence_acq_rel_cta": ("fences", "", "fence.acq_rel.cta"),
    "fence_acq_rel_gpu": ("fences", "", "fence.acq_rel.gpu"),
    "tma_load_2d": ("tma", "s, g, s, i, i", "cp.async.bulk.tensor.2d.shared::cluster.global"),
    "tma_load_3d": ("tma", "s, g, s, i, i, i", "cp.async.bulk.tensor.3d.shared::cluster.global"),
    "tma_load_4d": ("tma", "s, g, s, i, i, i, i", "cp.async.bulk.tensor.4d.shared::cluster.global"),
    "tma_load_2d_multicast": ("tma", "s, g, s, i, i, 3", "multicast::cluster"),
    "tma_store_2d": ("tma", "g, s, i, i", "cp.async.bulk.tensor.2d.global.shared::cta"),
    "tma_store_3d": ("tma", "g, s, i, i, i", "cp.async.bulk.tensor.3d.global.shared::cta"),
    "tma_store_4d": ("tma", "g, s, i, i, i, i", "cp.async.bulk.tensor.4d.global.shared::cta"),
    "tma_prefetch_2d": ("tma", "g, i, i", "cp.async.bulk.prefetch.tensor.2d"),
    "tma_prefetch_map": ("tma", "g", "prefetch.tensormap"),
    "bulk_load": ("tma", "s, g, 64, s", "cp.async.bulk.shared::cluster.global"),
    "bulk_store": ("tma", "g, s, 64", "cp.async.bulk.global.shared::cta"),
    "bulk_commit": ("tma", "", "cp.async.bulk.commit_group"),
    "bulk_wait_read": ("tma", "0", "cp.async.bulk.wait_group.read 0"),
    "bulk_wait": ("tma", "1", "cp.async.bulk.wait_group 1"),
    "ld_global_i32": ("ldst", "g", "ld.global.b32"),
    "st_global_b32": ("ldst", "g, i", "st.global.b32"),
    "st_global_f32": ("ldst", "g, f", "st.global.f32"),
    "st_global_b16": ("ldst", "g, i", "st.global.b16"),
    "st_shared_b32": ("ldst", "s, i", "st.shared.b32"),
    "ld_shared_b32": ("ldst", "s", "ld.shared.b32"),
    "prefetch_l2": ("ldst", "g", "prefetch.global.L2"),
    "stmatrix_x4": ("ldst", "s, i, i, i, i", "stmatrix.sync.aligned.m8n8.x4.shared.b16"),
    "stmatrix_x4_trans": ("ldst", "s, i, i, i, i", "m8n8.x4.trans.shared.b16"),
}
WRONG = {
    "setmaxnreg_inc": ("control", "25", "a multiple of 8 from 24 to 256 is required"),
    "setmaxnreg_dec": ("control", "264", "argument 0 is 264"),
    "bulk_wait": ("tma", "i", "argument 0 must be a constant"),
    "mbarrier_arrive": ("mbarrier", "f", "argument 0 has type float32; int32 is required"),
    "tma_store_2d": ("tma", "g, s, i", "missing a required argument|arguments"),
}
# Kernels live in a file, because the compiler reads their source.
KERNEL = """
def kernel_{name}(s, g, i, f):
    {module}.{name}({arguments})
"""
# What only reads a register is dropped where nobody uses it.
PURE = """
def kernel_{name}(s, g, i, f):
    ldst.st_global_b32(g, {module}.{name}({arguments}))
"""
CHILD = """
import json, subprocess, sys, tempfile
from pathlib import Path
sys.path[:0] = [{root!r}, {folder!r}]
import calls
from kernels_numba import assemble, launch
ptxas = assemble.find_ptxas()
out = {{}}
for name in {names!r}:
    try:
        kernel = getattr(calls, "kernel_" + name)
        ptx = launch.compile_ptx(kernel, ["int32", "int64", "int32", "float32"], 128, "sm_90a")
        path = Path({folder!r}) / "k.ptx"
        path.write_text(ptx)
        run = subprocess.run([str(ptxas), "-arch=sm_90a", str(path), "-o", str(path) + ".cubin"],
                             capture_output=True, text=True)
        out[name] = [ptx, run.returncode, run.stdout + run.stderr]
    except Exception as error:
        out[name] = ["", -1, f"{{type(error).__name__}}: {{error}}"]
print(json.dumps(out))
"""


def compiled(calls, folder):
    imports = "\n".join(
        f"from kernels_numba.ptx import {m}" for m in sorted({"ldst", *(m for m, _, _ in calls.values())})
    )
    kernels = [
        (PURE if name in ("lane_id", "cluster_rank") else KERNEL).format(name=name, module=m, arguments=a)
        for name, (m, a, _) in calls.items()
    ]
    (folder / "calls.py").write_text(imports + "".join(kernels), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(root=str(ROOT), folder=str(folder), names=list(calls))],
        capture_output=True, text=True, env=environment, timeout=240,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    pytest.importorskip("numba")
    return compiled(CALLS, tmp_path_factory.mktemp("ptx"))


def test_every_instruction_is_emitted_and_assembled(texts):
    for name, (_, _, wanted) in CALLS.items():
        ptx, code, words = texts[name]
        assert code == 0, (name, words)
        assert wanted in ptx, name


def test_every_instruction_is_in_the_table():
    for module in ("control", "mbarrier", "fences", "tma", "ldst"):
        source = (ROOT / "kernels_numba" / "ptx" / f"{module}.py").read_text(encoding="utf-8")
        lines = [
            line for line in source.splitlines() if " = instruction(" in line and not line.startswith(" ")
        ]
        for line in lines:
            assert line.split(" = ")[0] in CALLS, line


def test_wrong_arguments_fail_when_the_kernel_is_compiled(tmp_path):
    pytest.importorskip("numba")
    found = compiled(WRONG, tmp_path)
    for name, (_, _, wanted) in WRONG.items():
        assert found[name][1] == -1, name
        assert any(part in found[name][2] for part in wanted.split("|")), (name, found[name][2])


def test_without_a_compiler_an_instruction_says_so():
    assert not asm.USABLE
    with pytest.raises(KernelsUnavailable, match="tma_load_2d is a PTX instruction"):
        tma.tma_load_2d(0, 0, 0, 0, 0)


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_wgmma_of_every_width(n):
    text = wgmma.wgmma_text(n, 4, "bfloat16", "shared", "k", "k", 1)
    assert text.count(f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16") == 4
    assert f"${n // 2 - 1}}}" in text
    assert (
        text.index("wgmma.fence") < text.index("wgmma.mma_async") < text.index("commit") < text.index("wait")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12,), "n is 12"),
        ((264,), "n is 264"),
        ((64, 4, "float32"), "dtype is 'float32'"),
        ((64, 0), "k_steps 0"),
        ((64, 4, "bfloat16", "shared", "k", "k", 9), "wait is 9"),
    ],
)
def test_wgmma_of_wrong_shapes(arguments, message):
    with pytest.raises(ValueError, match=message):
        wgmma.make_wgmma(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pointer": 8}, "address 0x8 is not a multiple of 16"),
        ({"dtype": "int7"}, "dtype is 'int7'"),
        ({"shape": (4,)}, "1 extents, 1 strides, 2 box sides"),
        ({"shape": (0, 64)}, "extent 0"),
        ({"strides": (120,)}, "stride 120 bytes"),
        ({"box": (300, 64)}, "box side 300"),
        ({"box": (64, 72)}, "rows have 144 bytes"),
        ({"swizzle": 100}, "swizzle is 100 bytes"),
    ],
)
def test_a_tensor_map_that_hardware_refuses(changes, message):
    right = {
        "pointer": 256,
        "dtype": "bfloat16",
        "shape": (8, 64),
        "strides": (128,),
        "box": (8, 64),
        "swizzle": 128,
    }
    tma.check_tensor_map(**right)
    with pytest.raises(ValueError, match=message):
        tma.check_tensor_map(**{**right, **changes})
