"""Decode attention hands a stage back only after all loads of it have ended: read off the machine code.

An arrival at an mbarrier does not wait for ldmatrix under way, and the copy engine overwrites what was
handed back: a race that neither the PTX nor a sanitizer shows. Each SASS instruction carries which of six
scoreboards it waits for and which one its result raises, 21 bits from bit 105 on (Jia et al., Dissecting the
NVIDIA Volta GPU Architecture via Microbenchmarking, 2018, section 2.1); loads of a warp end in order.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import no_simulator
import pytest

PART = r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);?\s+/\* 0x[0-9a-f]{16} \*/"
CHILD = """
import importlib.util, sys
from pathlib import Path
from kernels_numba.launch import compile_cubin
from kernels_numba.ops.decode_attention.config import DecodeConfig

head_dim, guarded = int(sys.argv[1]), sys.argv[2] == "guarded"
to = Path(sys.argv[3])
name = "kernels_numba.ops.decode_attention.products"
text = Path(importlib.util.find_spec(name).origin).read_text()
guard = "return int32(bar + int32(loaded & nothing))"
assert text.count(guard) == 1
copy = to / "copied.py"  # numba reads a function's source from its file
copy.write_text(text if guarded else text.replace(guard, "return int32(bar)"))
spec = importlib.util.spec_from_file_location(name, copy)
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
from kernels_numba.ops.decode_attention.tensor_core import decode_kernel

made = decode_kernel(DecodeConfig(head_dim, "tma"), "bfloat16")
cubin = compile_cubin(made.make(), made.types, made.threads, "sm_90a")[1]
(to / "kernel.cubin").write_bytes(cubin)
"""


def arrivals_with_loads_under_way(sass: str) -> list[str]:
    """Addresses of arrivals (of one lane, as consumers' are) before which a ldmatrix has not been waited
    for."""
    found, pending = list[str](), list[int]()
    for line, below in itertools.pairwise(sass.splitlines()):
        first, second = re.match(PART, line), re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", below)
        if not first or not second:
            continue
        control = int(second.group(1), 16) >> 41
        raises, waits, text = (control >> 5) & 7, (control >> 11) & 63, first.group(2)
        over = [i for i, board in enumerate(pending) if board < 6 and waits >> board & 1]
        pending = pending[over[-1] + 1 :] if over else pending
        if text.startswith("LDSM"):
            pending.append(raises)
        elif "SYNCS.ARRIVE.TRANS64.A1T0" in text and pending:
            found.append(first.group(1))
    return found


def find(head_dim: int, guarded: bool, folder: Path) -> list[str]:
    from kernels_numba.disassemble import ToolsMissing, find_tool

    try:
        nvdisasm = find_tool("nvdisasm")
    except ToolsMissing as missing:
        pytest.skip(str(missing))
    words = [str(head_dim), "guarded" if guarded else "bare", str(folder)]
    child = no_simulator.run(CHILD, *words, PYTHONPATH=no_simulator.WITH_TESTS)
    assert child.returncode == 0, child.stderr[-2000:]
    shown = subprocess.run(
        [nvdisasm, "-c", "-hex", str(folder / "kernel.cubin")], capture_output=True, text=True, check=True
    )
    return arrivals_with_loads_under_way(shown.stdout)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_stage_is_handed_back_after_its_loads(head_dim, tmp_path):
    assert find(head_dim, True, tmp_path) == []


def test_without_the_guard_it_is_not(tmp_path):
    """What this test is for: the kernel as it was when it raced."""
    assert find(128, False, tmp_path)
