"""Every instruction of kernels_numba/ptx: the PTX it becomes, and that the assembler takes it. No GPU
needed."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import no_simulator
import pytest

from kernels_numba.compiler import KernelsUnavailable
from kernels_numba.ptx import asm, debug, mbarrier, tma, wgmma, wgmma_panels

ROOT = Path(__file__).resolve().parent.parent

# name -> (module, arguments, text that must stand in the PTX); s: shared address, g: global address, i:
# int32, f: float32.
CALLS = {
    "setmaxnreg_inc": ("control", "232", "setmaxnreg.inc.sync.aligned.u32 232"),
    "setmaxnreg_dec": ("control", "40", "setmaxnreg.dec.sync.aligned.u32 40"),
    "elect_one": ("control", "", "elect.sync"),
    "warp_uniform": ("shuffle", "i", "shfl.sync.idx.b32"),
    "shfl_xor_f32": ("shuffle", "f, 1", "shfl.sync.bfly.b32"),
    "shfl_down_f32": ("shuffle", "f, 4", "shfl.sync.down.b32"),
    "shfl_idx_i32": ("shuffle", "i, 3", "shfl.sync.idx.b32"),
    "shfl_up_f32": ("shuffle", "f, 4", "shfl.sync.up.b32"),
    "shfl_idx_f32": ("shuffle", "f, 4", "shfl.sync.idx.b32"),
    "shfl_xor_i32": ("shuffle", "i, 4", "shfl.sync.bfly.b32"),
    "lane_id": ("control", "", "%laneid"),
    "now_ns": ("clock", "", "%globaltimer_lo"),
    "sm_id": ("clock", "", "%smid"),
    "named_barrier_sync": ("named_barrier", "1, 128", "bar.sync"),
    "named_barrier_arrive": ("named_barrier", "1, 128", "bar.arrive"),
    "nanosleep": ("control", "i", "nanosleep.u32"),
    "trap": ("control", "", "trap;"),
    "griddep_wait": ("griddep", "", "griddepcontrol.wait"),
    "griddep_launch": ("griddep", "", "griddepcontrol.launch_dependents"),
    "cluster_rank": ("cluster", "", "%cluster_ctarank"),
    "cluster_sync": ("cluster", "", "barrier.cluster.wait.acquire"),
    "mbarrier_init": ("mbarrier", "s, 1", "mbarrier.init.shared::cta.b64"),
    "fence_mbarrier_init": ("mbarrier", "", "fence.mbarrier_init.release.cluster"),
    "mbarrier_arrive": ("mbarrier", "s", "mbarrier.arrive.shared::cta.b64"),
    "mbarrier_expect_tx": ("mbarrier", "s, 64", "mbarrier.arrive.expect_tx.shared::cta.b64"),
    "mbarrier_arrive_remote": ("mbarrier", "s, 1", "mapa.shared::cluster.u32"),
    "mbarrier_wait": ("mbarrier", "s, i", "mbarrier.try_wait.parity.shared::cta.b64"),
    "fence_proxy_async": ("fences", "", "fence.proxy.async.shared::cta"),
    "fence_proxy_async_global": ("fences", "", "fence.proxy.async.global"),
    "fence_acq_rel_cta": ("fences", "", "fence.acq_rel.cta"),
    "fence_acq_rel_cluster": ("fences", "", "fence.acq_rel.cluster"),
    "fence_acq_rel_gpu": ("fences", "", "fence.acq_rel.gpu"),
    "tma_load_2d": ("tma", "s, g, s, i, i", "cp.async.bulk.tensor.2d.shared::cluster.global"),
    "tma_load_2d_hint": ("tma", "s, g, s, i, i, g", "complete_tx::bytes.L2::cache_hint"),
    "tma_load_2d_multicast": ("tma", "s, g, s, i, i, 3", "complete_tx::bytes.multicast::cluster ["),
    "tma_load_2d_multicast_hint": ("tma", "s, g, s, i, i, 3, g", "multicast::cluster.L2::cache_hint"),
    "tma_store_2d": ("tma", "g, s, i, i", "cp.async.bulk.tensor.2d.global.shared::cta"),
    "tma_store_2d_hint": ("tma", "g, s, i, i, g", "tile.bulk_group.L2::cache_hint"),
    "tma_prefetch_2d": ("tma", "g, i, i", "cp.async.bulk.prefetch.tensor.2d"),
    "tma_load_3d": ("tma", "s, g, s, i, i, i", "cp.async.bulk.tensor.3d.shared::cluster.global"),
    "tma_load_3d_hint": ("tma", "s, g, s, i, i, i, g", "complete_tx::bytes.L2::cache_hint"),
    "tma_load_3d_multicast": ("tma", "s, g, s, i, i, i, 3", "complete_tx::bytes.multicast::cluster ["),
    "tma_load_3d_multicast_hint": ("tma", "s, g, s, i, i, i, 3, g", "multicast::cluster.L2::cache_hint"),
    "tma_store_3d": ("tma", "g, s, i, i, i", "cp.async.bulk.tensor.3d.global.shared::cta"),
    "tma_store_3d_hint": ("tma", "g, s, i, i, i, g", "tile.bulk_group.L2::cache_hint"),
    "tma_prefetch_3d": ("tma", "g, i, i, i", "cp.async.bulk.prefetch.tensor.3d"),
    "tma_load_4d": ("tma", "s, g, s, i, i, i, i", "cp.async.bulk.tensor.4d.shared::cluster.global"),
    "tma_load_4d_hint": ("tma", "s, g, s, i, i, i, i, g", "complete_tx::bytes.L2::cache_hint"),
    "tma_load_4d_multicast": ("tma", "s, g, s, i, i, i, i, 3", "complete_tx::bytes.multicast::cluster ["),
    "tma_load_4d_multicast_hint": ("tma", "s, g, s, i, i, i, i, 3, g", "multicast::cluster.L2::cache_hint"),
    "tma_store_4d": ("tma", "g, s, i, i, i, i", "cp.async.bulk.tensor.4d.global.shared::cta"),
    "tma_store_4d_hint": ("tma", "g, s, i, i, i, i, g", "tile.bulk_group.L2::cache_hint"),
    "tma_prefetch_4d": ("tma", "g, i, i, i, i", "cp.async.bulk.prefetch.tensor.4d"),
    "tma_prefetch_map": ("tma", "g", "prefetch.tensormap"),
    "bulk_load": ("tma", "s, g, 64, s", "cp.async.bulk.shared::cluster.global"),
    "bulk_load_hint": ("tma", "s, g, 64, s, g", "complete_tx::bytes.L2::cache_hint"),
    "bulk_load_multicast": ("tma", "s, g, 64, s, 3", "complete_tx::bytes.multicast::cluster"),
    "bulk_store": ("tma", "g, s, 64", "cp.async.bulk.global.shared::cta"),
    "bulk_store_hint": ("tma", "g, s, 64, g", "bulk_group.L2::cache_hint"),
    "bulk_prefetch": ("tma", "g, 64", "cp.async.bulk.prefetch.L2.global"),
    "policy_evict_first": ("policy", "", "createpolicy.fractional.L2::evict_first.b64"),
    "policy_evict_last": ("policy", "", "createpolicy.fractional.L2::evict_last.b64"),
    "policy_evict_normal": ("policy", "", "createpolicy.fractional.L2::evict_normal.b64"),
    "bulk_commit": ("tma", "", "cp.async.bulk.commit_group"),
    "bulk_wait_read": ("tma", "0", "cp.async.bulk.wait_group.read 0"),
    "bulk_wait": ("tma", "1", "cp.async.bulk.wait_group 1"),
    "ld_global_i32": ("ldst", "g", "ld.global.b32"),
    "st_global_b32": ("ldst", "g, i", "st.global.b32"),
    "st_global_f32": ("ldst", "g, f", "st.global.f32"),
    "st_global_b16": ("ldst", "g, i", "st.global.b16"),
    "st_shared_b32": ("ldst", "s, i", "st.shared.b32"),
    "ld_shared_b32": ("ldst", "s", "ld.shared.b32"),
    "ld_shared_f32": ("ldst", "s", "ld.shared.f32"),
    "prefetch_l2": ("ldst", "g", "prefetch.global.L2"),
    "stmatrix_x4": ("matrix", "s, i, i, i, i", "stmatrix.sync.aligned.m8n8.x4.shared.b16"),
    "stmatrix_x4_trans": ("matrix", "s, i, i, i, i", "m8n8.x4.trans.shared.b16"),
    "stmatrix_x1": ("matrix", "s, i", "stmatrix.sync.aligned.m8n8.x1.shared.b16"),
    "stmatrix_x2": ("matrix", "s, i, i", "stmatrix.sync.aligned.m8n8.x2.shared.b16"),
    "stmatrix_x1_trans": ("matrix", "s, i", "m8n8.x1.trans.shared.b16"),
    "stmatrix_x2_trans": ("matrix", "s, i, i", "m8n8.x2.trans.shared.b16"),
    "ldmatrix_x1": ("matrix", "w, s", "ldmatrix.sync.aligned.m8n8.x1.shared.b16"),
    "ldmatrix_x2": ("matrix", "w, s", "ldmatrix.sync.aligned.m8n8.x2.shared.b16"),
    "ldmatrix_x4": ("matrix", "w, s", "ldmatrix.sync.aligned.m8n8.x4.shared.b16"),
    "ldmatrix_x1_trans": ("matrix", "w, s", "m8n8.x1.trans.shared.b16"),
    "ldmatrix_x2_trans": ("matrix", "w, s", "m8n8.x2.trans.shared.b16"),
    "ldmatrix_x4_trans": ("matrix", "w, s", "m8n8.x4.trans.shared.b16"),
    "mma_m16n8k16": ("mma", "x, w, w", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
    "mma_m16n8k16_f16": ("mma", "x, w, w", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
    "mma_m16n8k16_at": ("mma", "x, 4, w, 4, w, 2", "mma.sync.aligned.m16n8k16.row.col.f32.bf16"),
    "mma_m16n8k16_f16_at": ("mma", "x, 4, w, 4, w, 2", "mma.sync.aligned.m16n8k16.row.col.f32.f16"),
    "pack_bf16": ("mma", "f, f", "cvt.rn.bf16x2.f32"),
    "pack_f16": ("mma", "f, f", "cvt.rn.f16x2.f32"),
    "ld_global_v4": ("vector", "w, g", "ld.global.v4.b32"),
    "ld_global_nc_v4": ("vector", "x, g", "ld.global.nc.L1::no_allocate.v4.b32"),
    "ld_global_v4_hint": ("vector", "w, g, g", "ld.global.L2::cache_hint.v4.b32"),
    "ld_global_nc_v4_hint": ("vector", "x, g, g", "ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32"),
    "st_global_v4_hint": ("vector", "g, w, g", "st.global.L2::cache_hint.v4.b32"),
    "ld_global_v2": ("vector", "w, g", "ld.global.v2.b32"),
    "st_global_v4": ("vector", "g, w", "st.global.v4.b32"),
    "st_global_cs_v4": ("vector", "g, x", "st.global.cs.v4.b32"),
    "st_global_v2_f32": ("vector", "g, f, f", "st.global.v2.f32"),
    "ld_shared_v4": ("vector", "x, s", "ld.shared.v4.b32"),
    "st_shared_v4": ("vector", "s, w", "st.shared.v4.b32"),
    "st_global_v4_if": ("predicated_vector", "i, g, w", "st.global.v4.b32"),
    "ld_global_v4_if_at": ("packs", "i, w, 4, g", "@p ld.global.v4.b32"),
    "ld_global_nc_v4_if_at": ("packs", "i, x, 0, g", "@p ld.global.nc.L1::no_allocate.v4.b32"),
    "st_global_v4_if_at": ("packs", "i, g, w, 4", "@p st.global.v4.b32"),
    "bf16_low": ("halves", "i", "shl.b32"),
    "bf16_high": ("halves", "i", "and.b32"),
    "f16_low": ("halves", "i", "cvt.f32.f16"),
    "f16_high": ("halves", "i", "cvt.f32.f16"),
    "sqrt_f32": ("quotients", "f", "sqrt.rn.f32"),
    "divide_full_f32": ("quotients", "f, f", "div.full.f32"),
    "cp_async_16": ("cp_async", "s, g", "cp.async.cg.shared.global"),
    "cp_async_16_zfill": ("cp_async", "s, g, i", "cp.async.cg.shared.global"),
    "cp_async_commit": ("cp_async", "", "cp.async.commit_group"),
    "cp_async_wait": ("cp_async", "2", "cp.async.wait_group 2"),
    "cp_async_mbarrier_arrive": ("cp_async", "s", "cp.async.mbarrier.arrive.noinc.shared::cta.b64"),
    "cluster_arrive_relaxed": ("cluster", "", "barrier.cluster.arrive.relaxed"),
    "cluster_wait": ("cluster", "", "barrier.cluster.wait.acquire"),
    "cluster_address": ("cluster", "s, 1", "mapa.shared::cluster.u32"),
    "st_async_f32": ("distributed", "s, f, s", "complete_tx::bytes.f32"),
    "st_async_v2_f32": ("distributed", "s, f, f, s", "complete_tx::bytes.v2.f32"),
    "st_async_v4": ("distributed", "s, w, s", "complete_tx::bytes.v4.b32"),
    "ex2_f32": ("arith", "f", "ex2.approx.ftz.f32"),
    "lg2_f32": ("arith", "f", "lg2.approx.ftz.f32"),
    "fma_f32": ("arith", "f, f, f", "fma.rn.f32"),
    "mul_f32": ("arith", "f, f", "mul.rn.f32"),
    "add_f32": ("arith", "f, f", "add.rn.f32"),
    "max_f32": ("arith", "f, f", "max.f32"),
    "divide_f32": ("arith", "f, f", "div.rn.f32"),
    "select_f32": ("arith", "i, f, f", "selp.f32"),
    "select_i32": ("arith", "i, i, 3", "selp.b32"),
    "atom_add_i32": ("atomics", "g, i", "atom.add.relaxed.gpu.global.s32"),
    "ld_relaxed_v2": ("relaxed", "w, g", "ld.relaxed.gpu.global.v2.b32"),
    "ld_relaxed_v4": ("relaxed", "w, g", "ld.relaxed.gpu.global.v4.b32"),
    "st_relaxed_v2_f32_if": ("relaxed", "i, g, f, f", "@p st.relaxed.gpu.global.v2.f32"),
    "bits_f32": ("arith", "f", "mov.b32"),
    "atom_add_acq_rel_i32": ("atomics", "g, i", "atom.add.acq_rel.gpu.global.s32"),
    "red_add_i32": ("reduce", "g, i", "red.relaxed.gpu.global.add.s32"),
    "red_add_i64": ("reduce", "g, g", "red.relaxed.gpu.global.add.u64"),
    "ballot": ("atomics", "i", "vote.sync.ballot.b32"),
    "popc": ("atomics", "i", "popc.b32"),
    "shfl_up_i32": ("atomics", "i, 1", "shfl.sync.up.b32"),
    "mbarrier_poll": ("mbarrier_poll", "s, i", "mbarrier.test_wait.parity.shared::cta.b64"),
    "st_global_b32_if": ("predicated", "i, g, i", "@p st.global.b32"),
    "st_global_f32_if": ("predicated", "i, g, f", "@p st.global.f32"),
    "st_global_v2_f32_if": ("predicated", "i, g, f, f", "@p st.global.v2.f32"),
    "st_shared_f32_if": ("predicated", "i, s, f", "@p st.shared.f32"),
    "st_shared_zero_16_if": ("predicated", "i, s", "@p st.shared.v4.b32"),
}
# The folder's page is among the sources of recorded GEMM rows: these files go onto it when those are measured
# anew.
NOT_ON_THE_PAGE = {
    "arith", "atomics", "distributed", "halves", "mbarrier_poll", "mma_tile", "packs", "predicated",
    "predicated_vector", "quotients", "reduce", "wgmma_panels",
}  # fmt: skip
FLOATS = ("arith", "halves", "quotients")  # whose results are float32
# In every kernel of test_gemm.py or ptx_kernels.py.
ELSEWHERE = {"dynamic_shared", "shared_address", "descriptor_k_major"}
# What older GPUs have too is assembled for sm_80 beside sm_90a.
OLDER = [
    name
    for name, (module, _, _) in CALLS.items()
    if module in ("mma", "vector", "cp_async", "policy", "atomics", "predicated", "packs", "reduce", *FLOATS)
    or name.startswith("ldmatrix")
    if name != "cp_async_mbarrier_arrive"  # .shared::cta came later
]
WRONG = {
    "setmaxnreg_inc": ("control", "25", "a multiple of 8 from 24 to 256 is required"),
    "setmaxnreg_dec": ("control", "264", "argument 0 is 264"),
    "bulk_wait": ("tma", "i", "argument 0 must be a constant"),
    "mbarrier_arrive": ("mbarrier", "f", "argument 0 has type float32; int32 is required"),
    "tma_store_2d": ("tma", "g, s, i", "missing a required argument|arguments"),
    "cp_async_wait": ("cp_async", "16", "argument 0 is 16; 0 to 15 groups"),
    "mma_m16n8k16": ("mma", "w, w, w", "a local array of float32 is required"),
    "ldmatrix_x4": ("matrix", "s, w", "out is int32; a local array of int32"),
    "st_global_v4": ("vector", "f, w", "pointer has type float32; int64 is required"),
    "st_global_v2_f32": ("vector", "g, i, f", "argument 1 has type int32; float32 is required"),
}
# Kernels live in a file, because the compiler reads their source. w, x: arrays; what they then hold is used,
# because what only reads registers is dropped where nobody uses it.
PLAIN = """
def kernel_{name}(s, g, i, f):
    {module}.{name}({arguments})
"""
USED = """
def kernel_{name}(s, g, i, f):
    ldst.st_global_b32(g, {module}.{name}({arguments}))
"""
ARRAYS = """
def kernel_{name}(s, g, i, f):
    w = cuda.local.array(8, np.int32)
    x = cuda.local.array(8, np.float32)
    for k in range(8):
        w[k] = i + k
        x[k] = f + np.float32(k)
    {module}.{name}({arguments})
    for k in range(8):
        ldst.st_global_b32(g + 4 * k, w[k])
        ldst.st_global_f32(g + 4 * k, x[k])
"""
USED_FLOATS = """
def kernel_{name}(s, g, i, f):
    ldst.st_global_f32(g, {module}.{name}({arguments}))
"""
USED_NAMES = (
    "policy_evict_first", "policy_evict_last", "policy_evict_normal", "lane_id", "cluster_rank",
    "cluster_address", "pack_bf16", "pack_f16", "select_i32", "ballot", "popc", "shfl_up_i32",
    "atom_add_i32", "atom_add_acq_rel_i32", "bits_f32",
)  # fmt: skip
CHILD = """
import json, subprocess, sys, tempfile
from pathlib import Path
sys.path[:0] = [{root!r}, {folder!r}]
import calls
from kernels_numba import assemble, launch
ptxas = assemble.find_ptxas()
out = {{}}
for name, arch in [(name, "sm_90a") for name in {names!r}] + [(name, "sm_80") for name in {older!r}]:
    try:
        kernel = getattr(calls, "kernel_" + name)
        ptx = launch.compile_ptx(kernel, ["int32", "int64", "int32", "float32"], 128, arch)
        path = Path({folder!r}) / "k.ptx"
        path.write_text(ptx)
        run = subprocess.run([str(ptxas), "-arch=" + arch, str(path), "-o", str(path) + ".cubin"],
                             capture_output=True, text=True)
        words = run.stdout + run.stderr
        if out.get(name, ["", 0, ""])[1] == 0:
            out[name] = [ptx, run.returncode, words]
    except Exception as error:
        out[name] = ["", -1, f"{{type(error).__name__}}: {{error}}"]
print(json.dumps(out))
"""


def template(name, arguments):
    if {"w", "x"} & set(arguments.split(", ")):
        return ARRAYS
    if CALLS.get(name, ("",))[0] in FLOATS and name not in USED_NAMES:
        return USED_FLOATS
    return USED if name in USED_NAMES else PLAIN


def compiled(calls, folder, older=()):
    """{name: [PTX, exit status of ptxas or -1 if the compiler refuses, words]} for sm_90a; for sm_80 of
    `older`."""
    modules = sorted({"ldst", *(m for m, _, _ in calls.values())})
    imports = [f"from kernels_numba.ptx import {m}" for m in modules]
    imports = ["import numpy as np", "from kernels_numba.compiler import cuda", *imports]
    kernels = [
        template(name, a).format(name=name, module=m, arguments=a) for name, (m, a, _) in calls.items()
    ]
    (folder / "calls.py").write_text("\n".join(imports) + "".join(kernels), encoding="utf-8")
    code = CHILD.format(root=str(ROOT), folder=str(folder), names=list(calls), older=list(older))
    return json.loads(no_simulator.last_line(code, timeout=240))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    pytest.importorskip("numba")
    return compiled(CALLS, tmp_path_factory.mktemp("ptx"), OLDER)


def test_every_instruction_is_emitted_and_assembled(texts):
    for name, (_, _, wanted) in CALLS.items():
        ptx, code, words = texts[name]
        assert code == 0, (name, words)
        assert wanted in ptx, name


@pytest.mark.skipif("asm.USABLE", reason="needs the stand-ins of a process without a compiler")
def test_every_instruction_is_in_the_table():
    """No module of the folder offers a function that no call above emits: those made by factories aside."""
    folder, seen = ROOT / "kernels_numba" / "ptx", set()
    for path in sorted(folder.glob("*.py")):
        module = importlib.import_module(f"kernels_numba.ptx.{path.stem}")
        for name, value in vars(module).items():
            # Without a compiler each instruction is a stand-in, made by asm.unavailable.
            if "unavailable" in getattr(value, "__qualname__", "") and value is not asm.unavailable:
                assert name in CALLS or name in ELSEWHERE, f"{path.stem}.{name}"
                seen.add(name)
    assert seen >= set(CALLS)


@pytest.mark.skipif("asm.USABLE", reason="needs the stand-ins of a process without a compiler")
def test_every_instruction_says_in_one_line_what_it_is(texts):
    """In parentheses at the end: the section of the PTX ISA, an instruction that it does emit."""
    for name, (module, _, _) in CALLS.items():
        doc = getattr(importlib.import_module(f"kernels_numba.ptx.{module}"), name).__doc__
        assert doc, name
        assert "\n" not in doc, name
        section = re.search(r"\(([%a-z][\w.:]*)[^()]*\)\.?$", doc)
        assert section, (name, doc)
        family = section.group(1).split(".")[0]
        assert family in texts[name][0], (name, doc)


def test_every_module_names_its_sections():
    """Each file that offers instructions names the manual's sections; the folder's page names each file."""
    import kernels_numba.ptx as page

    made = {"wgmma", "wgmma_panels", "epilogue", "residual", "mma_tile"}
    for module in sorted({module for module, _, _ in CALLS.values()} | made):
        doc = importlib.import_module(f"kernels_numba.ptx.{module}").__doc__
        assert re.search(r'PTX\s+ISA,\s+"', doc), module
        on_page = re.search(rf"^{module}\.py ", page.__doc__, re.MULTILINE)
        assert bool(on_page) != (module in NOT_ON_THE_PAGE), module
    files = {path.name for path in (ROOT / "kernels_numba" / "ptx").glob("[a-z]*.py")}
    files -= {f"{module}.py" for module in NOT_ON_THE_PAGE}
    assert set(re.findall(r"^(\w+\.py) ", page.__doc__, re.MULTILINE)) == files


def test_every_instruction_runs_in_a_numeric_test():
    """test_ptx_gpu.py and test_launch_gpu.py run what these files hold; a name built from parts counts by
    its parts."""
    text = "".join((ROOT / "tests" / f"{name}.py").read_text() for name in ("ptx_kernels", "toy_kernels"))
    built = re.compile(
        r"tma_(load|store|prefetch)_[234]d(_multicast)?(_hint)?|(ld|st)matrix_x[124](_trans)?|bulk_load_multicast"
    )
    absent = [name for name in CALLS if not re.search(rf"\b{name}\b", text) and not built.fullmatch(name)]
    # trap ends a context: it is what a bounded wait without a report emits (make_stuck).
    assert absent == ["trap"]


def test_wrong_arguments_fail_when_the_kernel_is_compiled(tmp_path):
    pytest.importorskip("numba")
    found = compiled(WRONG, tmp_path)
    for name, (_, _, wanted) in WRONG.items():
        assert found[name][1] == -1, name
        assert any(part in found[name][2] for part in wanted.split("|")), (name, found[name][2])


@pytest.mark.skipif("asm.USABLE", reason="there is a compiler under --device=cuda")
def test_without_a_compiler_an_instruction_says_so():
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


def test_wgmma_over_panels():
    """A head of 128 is two panels: steps go on behind the first, for each operand by its own distance."""
    text = wgmma_panels.panels_text(128, 128, "bfloat16", "shared", 16384, 8192)
    for operand, panel in (("da", 16384), ("db", 8192)):
        offsets = [(step // 4 * panel + step % 4 * 32) // 16 for step in range(8)]
        assert [int(x) for x in re.findall(rf"add.s64 {operand}, \$\d+, (\d+);", text)] == offsets
    assert text.count("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16") == 8
    assert "wait" not in text
    text = wgmma_panels.panels_text(64, 64, "float16", "registers", 16384, 8192)
    assert "}, da, db" not in text
    assert "{$76,$77,$78,$79}, db, p, 1, 1, 0;" in text


@pytest.mark.parametrize(("arguments", "message"), [
    ((12, 64, "bfloat16", "shared", 16384, 16384), "n is 12"),
    ((64, 64, "float32", "shared", 16384, 16384), "dtype 'float32'"),
    ((64, 64, "bfloat16", "global", 16384, 16384), "a 'global'"),
    ((64, 72, "bfloat16", "shared", 16384, 16384), "k is 72"),
    ((64, 64, "bfloat16", "shared", 16384, 8), "16384 and 8 bytes apart"),
])  # fmt: skip
def test_wgmma_over_wrong_panels(arguments, message):
    with pytest.raises(ValueError, match=message):
        wgmma_panels.make_wgmma_panels(*arguments)
    with pytest.raises(ValueError, match="n is 12"):
        wgmma_panels.make_hold(12)


def test_a_debug_wait_has_an_identifier():
    assert debug.make_mbarrier_wait("full") is mbarrier.mbarrier_wait
    with pytest.raises(ValueError, match="name is 'not full'; an identifier is required"):
        debug.make_mbarrier_wait("not full", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12,), "n is 12"),
        ((264,), "n is 264"),
        ((64, 4, "float32"), "dtype is 'float32'"),
        ((64, 0), "k_steps 0"),
        ((64, 4, "bfloat16", "shared", "k", "k", 9), "wait is 9"),
        ((64, 4, "bfloat16", "registers", "mn"), "a_major is 'mn'; A from registers has no major"),
        ((64, 4, "bfloat16", "elsewhere"), "a 'elsewhere'"),
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
