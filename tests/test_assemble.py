"""Every plain kernel compiles for real GPUs and assembles without spills or float64, on a machine that has
none.

The compiler runs in a subprocess: here, in the tests' own process, the simulator takes its place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_numba.assemble import ARCHS, STRIDED_ARCHS, Report

ROOT = Path(__file__).resolve().parent.parent
TOOLS_MISSING = 3


def without_simulator(*arguments, timeout=240):
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
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


def test_plain_kernels_assemble(request, record_property):
    result = without_simulator("-m", "kernels_numba.assemble", "--json")
    require_tools(result, request)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert rows, result.stderr
    bad = [f"{row['name']} {row['arch']}: {'; '.join(row['problems'])}" for row in rows if row["problems"]]
    assert bad == []
    assert result.returncode == 0, result.stderr
    names = {row["name"] for row in rows}
    for name in names:
        expected = STRIDED_ARCHS if name.endswith("strided") else ARCHS
        assert {row["arch"] for row in rows if row["name"] == name} == set(expected), name
    ops = (
        "embedding",
        "rms_norm",
        "gemm",
        "qk_norm",
        "rope",
        "store_kv",
        "prefill_attention",
        "decode_attention",
    )
    for op in (*ops, "silu_mul", "lm_head"):
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
from kernels_numba.assemble import ToolsMissing, Variant, assemble, find_ptxas
from kernels_numba.compiler import AVAILABLE, cuda, jit
try:
    ptxas = find_ptxas()
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
report = assemble(Variant("bad", bad, (f32[::1], f32[::1]), 128), "sm_80", ptxas)
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
