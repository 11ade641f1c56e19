"""Every kernel compiles for real GPUs and assembles without spills or float64, on a machine that has none.

The compiler runs in a subprocess: here, in the tests' own process, the simulator takes its place.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import no_simulator
import pytest

from kernels_numba import tools
from kernels_numba.assemble import ARCHS, SAMPLED_ARCHS, STRIDED_ARCHS, Report, count_instructions
from kernels_numba.smem import block_limit

ROOT = Path(__file__).resolve().parent.parent
TOOLS_MISSING = 3


def without_simulator(*arguments, timeout=240):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=no_simulator.environment(),
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def require_tools(result, request):
    """Skip where numba-cuda or ptxas is missing; fail instead under --strict-tools."""
    if result.returncode == TOOLS_MISSING:
        reason = result.stderr.strip().splitlines()[-1]
        if request.config.getoption("--strict-tools"):
            pytest.fail(f"--strict-tools: {reason}")
        pytest.skip(reason)


def test_all_kernels_assemble(request, record_property):
    result = without_simulator("-m", "kernels_numba.assemble", "--json", timeout=1200)
    require_tools(result, request)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert rows, result.stderr
    bad = [f"{row['name']} {row['arch']}: {'; '.join(row['problems'])}" for row in rows if row["problems"]]
    assert bad == []
    assert result.returncode == 0, result.stderr
    names = {row["name"] for row in rows}
    launched = {row["name"] for row in rows if row["instructions"]}
    for name in names - launched:
        expected = set(STRIDED_ARCHS if name.endswith("strided") else ARCHS)
        if not any(op in name for op in ("gemm", "lm_head", "attention")) or "bfloat16/dense" not in name:
            expected -= set(SAMPLED_ARCHS)
        assert {row["arch"] for row in rows if row["name"] == name} == expected, name
    ops = ("embedding", "rms_norm", "gemm", "qk_norm", "rope", "store_kv", "prefill_attention")
    for op in (*ops, "decode_attention", "silu_mul", "lm_head"):
        for dtype in ("float32", "bfloat16"):
            for kind in ("dense", "strided"):
                assert any(n.startswith(op) and n.endswith(f"/{dtype}/{kind}") for n in names), (
                    op,
                    dtype,
                    kind,
                )
    for row in rows:
        assert 0 < row["registers"] <= 255, row
        record_property(f"{row['name']} {row['arch']}", row["registers"])
        print(
            f"{row['name']:38} {row['arch']:7} {row['registers']:4} registers "
            f"{row['shared_bytes']:6} B shared"
        )


BAD_KERNEL = """
import sys
import numpy as np
from kernels_numba.assemble import ToolsMissing, Variant, assemble
from kernels_numba.tools import find_ptxas
from kernels_numba.compiler import AVAILABLE, cuda, jit
try:
    find_ptxas()
    if not AVAILABLE:
        raise ToolsMissing("no numba.cuda")
except ToolsMissing as error:
    print(error, file=sys.stderr)
    sys.exit(3)

@jit()
def bad(out, x):
    many = cuda.local.array(4000, np.float32)
    for i in range(4000):
        many[i] = x[i] * 0.1
    out[0] = many[int(x[0])]

f32 = cuda.types.float32
report = assemble(Variant("bad", bad, (f32[::1], f32[::1]), 128), "sm_80")
print(report)
assert report.float64 > 0 and report.stack_bytes >= 16000, report
"""


def test_a_float64_literal_is_found(request):
    """The check can fail: 0.1 without float32() is float64 arithmetic, and a large local array leaves
    registers."""
    result = without_simulator("-c", BAD_KERNEL)
    require_tools(result, request)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "float64 instructions" in result.stdout


def test_problems_name_what_is_wrong():
    good = Report("k", "sm_80", 256, 64, 0, 0, 0, 0)
    assert good.problems == []
    bad = Report("k", "sm_80", 512, 200, 8, 8, 0, 2)
    assert bad.problems == [
        "spills 8 bytes",
        "2 float64 instructions",
        "200 registers x 512 threads do not fit an SM",
    ]
    one_loop = {"HGMMA": 4, "BRA": 1}
    fine = Report("k", "sm_90a", 384, 168, 0, 0, 0, 0, 232_448, {"HGMMA": 4}, one_loop, (40, 232))
    assert fine.problems == []
    bad = Report(
        "k", "sm_90a", 384, 168, 0, 0, 1024, 0, 232_448, {"HGMMA": 4, "LDL": 2, "STL": 1}, {}, (56, 240),
        ("(C7510) Potential Performance Loss: wgmma",),
    )  # fmt: skip
    assert bad.problems == [
        "setmaxnreg 56 and 240 for 384 threads do not fit an SM",
        "233,472 bytes of shared memory, the limit is 232,448",
        "3 accesses to local memory",
        "wgmma outside every loop",
        "(C7510) Potential Performance Loss: wgmma",
    ]
    for arch in ("sm_86", "sm_89", "sm_120"):
        assert block_limit(arch) == 101_376
    with pytest.raises(ValueError, match="target is 'sm_20'"):
        block_limit("sm_20")


SASS = """
.text.kernel:
.L_x_3:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
.L_x_1:
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24, UP0 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R0 ;
        /*0040*/              @!P0 BRA `(.L_x_9) ;
.L_x_8:
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/               @P2 EXIT ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0080*/                   EXIT ;
.L_x_9:
        /*0090*/                   LDL R2, [R1] ;
        /*00a0*/                   BRA `(.L_x_8) ;
"""


def test_the_smallest_loop_with_products_is_found():
    """Not the loop around it, and not what a wait's slow way, behind the kernel's end, seems to close."""
    instructions, loop = count_instructions(SASS)
    assert instructions == {"HMMA": 1, "BRA": 5, "HGMMA": 1, "SYNCS": 1, "EXIT": 2, "LDL": 1}
    assert loop == {"BRA": 3, "HGMMA": 1, "SYNCS": 1}
    once = "".join(line for line in SASS.splitlines(True) if "@P1" not in line and "0070" not in line)
    assert count_instructions(once)[1] == {}


LAUNCHED = """
import json, sys, tempfile
from dataclasses import asdict
from pathlib import Path
from kernels_numba import assemble, launch, tools
import toy_prebuild, toy_sass
try:
    tools.find_ptxas(), tools.find_tool("nvdisasm")
except tools.ToolsMissing as error:
    print(error, file=sys.stderr)
    sys.exit(3)
out = {}
for kernel in [*toy_sass.kernels(), *toy_prebuild.kernels()]:
    for arch in ("sm_80", "sm_90a", "sm_120"):
        if kernel.fits(arch):
            report = assemble.assemble_kernel(kernel, arch)
            out[kernel.name + " " + arch] = asdict(report) | {"problems": report.problems}
# What a launch would load, not what the report assembled.
_, cubin = next(iter(toy_sass.kernels())).cubin("sm_90a", Path(tempfile.mkdtemp()))
path = Path(tempfile.mkdtemp()) / "k.cubin"
path.write_bytes(cubin)
import subprocess
command = [str(tools.find_tool("nvdisasm")), "-c", str(path)]
sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
out["loaded"] = assemble.count_instructions(sass)[0]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def launched(request):
    pytest.importorskip("numba")
    result = without_simulator("-c", "import sys; sys.path.insert(0, 'tests')" + LAUNCHED)
    require_tools(result, request)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_a_launchers_kernel_is_described(launched):
    row = launched["products sm_90a"]
    assert row["problems"] == []
    assert row["registers"] == 168  # all that 384 threads can have at the start, for setmaxnreg to share out
    assert (row["setmaxnreg"], row["dynamic_bytes"]) == ([40, 232], 16384)
    assert row["main_loop"]["HGMMA"] == 4
    assert row["instructions"]["HGMMA"] >= 4
    assert row["instructions"]["USETMAXREG"] == 2
    for name in ("times", "reverse"):
        for arch in ("sm_80", "sm_90a", "sm_120"):
            assert launched[f"{name} {arch}"]["problems"] == []
    assert not any(key.startswith("hopper_only") for key in launched if not key.endswith("sm_90a"))


def test_what_is_loaded_keeps_setmaxnreg(launched):
    """nvJitLink, which assembled these kernels once, drops it and says so in a note alone (C7504)."""
    assert launched["loaded"]["USETMAXREG"] == 2
    assert launched["loaded"] == launched["products sm_90a"]["instructions"]


def test_bad_kernels_are_found(launched):
    """The checks can fail: a local array with a variable index, wgmma run once, too much shared memory."""
    assert launched["local sm_90a"]["problems"][0].endswith("accesses to local memory")
    assert launched["once sm_90a"]["problems"] == ["wgmma outside every loop"]
    assert launched["large sm_90a"]["problems"] == []
    for arch, limit in (("sm_80", "166,912"), ("sm_120", "101,376")):
        wanted = f"200,000 bytes of shared memory, the limit is {limit}"
        assert launched[f"large {arch}"]["problems"] == [wanted]


def test_the_assembler_is_as_new_as_the_compiler(monkeypatch):
    """A ptxas that is older than NVVM cannot read its PTX; without another nvJitLink stands in."""
    versions = {"nvidia-nvvm": "13.4.1", "nvidia-nvjitlink": "13.4.2"}
    monkeypatch.setattr(
        tools, "_version", lambda *names: next((versions[n] for n in names if n in versions), "")
    )
    for found, wanted in (
        ([("a", "13.0.88"), ("b", "13.5.37")], (Path("b"), "ptxas 13.5.37")),
        ([("a", "13.4.0"), ("b", "13.5.37")], (Path("a"), "ptxas 13.4.0")),
        ([("a", "12.8.1"), ("b", "")], (None, "nvJitLink 13.4.2")),
    ):
        monkeypatch.setattr(tools, "_candidates", lambda found=found: [(Path(p), v) for p, v in found])
        assert tools.assembler.__wrapped__() == wanted


STAND_IN = """
import sys, warnings
from pathlib import Path
sys.path.insert(0, "tests")
from kernels_numba import launch
import toy_sass, toy_prebuild
launch.assembler = lambda: (None, "nvJitLink 1.2")
kernel = next(iter(toy_prebuild.kernels()))
with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert launch.compile_cubin(kernel.make(), kernel.types, 128, "sm_80")[1]
kernel = next(iter(toy_sass.kernels()))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    launch.compile_cubin(kernel.make(), kernel.types, kernel.threads, "sm_90a")
print([str(one.message) for one in seen if one.category is RuntimeWarning])
"""


def test_nvjitlink_stands_in_and_says_what_is_lost():
    pytest.importorskip("numba")
    result = without_simulator("-c", STAND_IN)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "nvJitLink 1.2 ignores setmaxnreg" in result.stdout
