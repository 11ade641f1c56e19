"""What a kernel becomes, without a GPU: its PTX, its machine code (SASS), registers, spills.

Knows: pip's ptxas and nvdisasm (tools.py). Refuses to know: what the instructions mean.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from kernels_numba import compiler
from kernels_numba.launch import Kernel, compile_ptx
from kernels_numba.tools import ToolsMissing, find_tool, run_ptxas


@dataclass(frozen=True)
class Code:
    """One kernel on one architecture; sass: nvdisasm's text; words: the assembler's."""

    arch: str
    ptx: str = field(repr=False)
    sass: str = field(repr=False)
    registers: int
    spill_bytes: int
    stack_bytes: int
    words: str = field(default="", repr=False)

    def count(self, op: str) -> int:
        """How many instructions begin with `op`, e.g. "HGMMA" or "LDSM"."""
        return sum(line.startswith(op) for line in _instructions(self.sass.splitlines()))

    def loop(self, op: str) -> list[str]:
        """The instructions of the shortest loop that holds an `op`; empty if none does."""
        lines = self.sass.splitlines()
        labels = {
            line.strip()[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line.strip())
        }
        loops = []
        for at, line in enumerate(lines):
            target = re.search(r"\bBRA\S* .*`\((\.L\w+)\)", line)
            if target and labels.get(target.group(1), at) < at:
                body = _instructions(lines[labels[target.group(1)] : at + 1])
                if any(instruction.startswith(op) for instruction in body):
                    loops.append(body)
        return min(loops, key=len, default=[])


def _instructions(lines: list[str]) -> list[str]:
    """What nvdisasm -c shows after an address, without the predicate."""
    found = (re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?(.*?)\s*;", line) for line in lines)
    return [match.group(1) for match in found if match]


def read_resources(words: str) -> tuple[int, int, int, int]:
    """Registers a thread, bytes spilled, of stack and of static shared memory, as `ptxas -v` says."""

    def number(pattern: str) -> int:
        return sum(int(match) for match in re.findall(pattern, words))

    return (
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill (?:stores|loads)"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes smem"),
    )


def disassemble(kernel: Kernel, arch: str) -> Code:
    """Compile and assemble for `arch` ("sm_80", "sm_90a", ...), past the cache. ValueError for a target that
    the kernel is not for, ToolsMissing without ptxas or nvdisasm, RuntimeError with the assembler's words
    when it refuses."""
    kernel.check_arch(arch)
    if compiler.SIMULATOR:
        raise ToolsMissing("the simulator is on (NUMBA_ENABLE_CUDASIM): it has no compiler")
    nvdisasm = find_tool("nvdisasm")
    ptx = compile_ptx(kernel.make(), kernel.types, kernel.threads, arch, kernel.blocks)
    cubin, words = run_ptxas(ptx, arch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(nvdisasm), "-c", str(path)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spill_bytes, stack_bytes, _ = read_resources(words)
    return Code(arch, ptx, sass, registers, spill_bytes, stack_bytes, words)
