"""Compile every kernel and assemble it, without a GPU: registers, spills, shared memory, instructions.

`python -m kernels_numba.assemble` prints one line a kernel (`--json` one object a line): the plain ones
(variants.py) and those of launch.py, whose instructions are also counted. Knows: what a kernel may cost.
Refuses to know: whether its numbers are right.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

from kernels_numba import compiler, launch
from kernels_numba.disassemble import disassemble, read_resources
from kernels_numba.prebuild import fitting, kernel_modules
from kernels_numba.smem import block_limit
from kernels_numba.tools import ToolsMissing as ToolsMissing
from kernels_numba.tools import find_ptxas as find_ptxas
from kernels_numba.tools import find_tool as find_tool
from kernels_numba.tools import run_ptxas
from kernels_numba.variants import Variant as Variant
from kernels_numba.variants import variants

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
STRIDED_ARCHS = ("sm_75", "sm_90a")  # strides change index arithmetic only: oldest and newest kind will do
# They have sm_80's instructions and registers: what an engine runs, the products and attention, will do.
SAMPLED_ARCHS = ("sm_86", "sm_89")
SAMPLED = re.compile(r"(gemm|lm_head|prefill_attention|decode_attention)\w*/bfloat16/dense")
REGISTERS_PER_SM = 65_536
LOSS = r"\(C75\d\d\) Potential Performance Loss: [^\n]*?(?= in the function|\n|$)"
WARPGROUP = 128
# Right but slower than need be: for sm_120 the compiler keeps a tile's scores, 64 numbers a thread, in local
# memory (notebooks/LOG.md). To be mended with the kernel; anything beyond that is a problem as elsewhere.
IN_MEMORY = {(f"prefill_mma_pages_d{head_dim}_bfloat16", "sm_120"): 112 for head_dim in (64, 128)}


@dataclass(frozen=True)
class Report:
    """What compiler, assembler and disassembler say of one kernel on one architecture.

    shared_bytes: static shared memory; float64: PTX instructions of that type. Of a kernel of launch.py also:
    dynamic_bytes: the shared memory it is launched with; instructions: SASS opcode -> how many, without their
    suffixes; main_loop: the same of the smallest loop that multiplies matrices, {} if none does;
    setmaxnreg: (least, most) registers a thread that it asks for; notes: the assembler's warnings: wgmma that
    wait for one another, setmaxnreg ignored.
    """

    name: str
    arch: str
    threads: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    float64: int
    dynamic_bytes: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    main_loop: dict[str, int] = field(default_factory=dict)
    setmaxnreg: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """Why this kernel must not ship: spills, float64, local memory, too many registers or too much shared
        memory for one block, wgmma outside every loop, and what the assembler warns of."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.float64:
            found.append(f"{self.float64} float64 instructions")
        if self.registers * self.threads > REGISTERS_PER_SM:
            found.append(f"{self.registers} registers x {self.threads} threads do not fit an SM")
        if self.setmaxnreg is not None:
            # One warpgroup gives up registers, the others share what it leaves.
            least, most = self.setmaxnreg
            if least * WARPGROUP + most * (self.threads - WARPGROUP) > REGISTERS_PER_SM:
                found.append(f"setmaxnreg {least} and {most} for {self.threads} threads do not fit an SM")
        shared, limit = self.shared_bytes + self.dynamic_bytes, block_limit(self.arch)
        if shared > limit:
            found.append(f"{shared:,} bytes of shared memory, the limit is {limit:,}")
        local = sum(self.instructions.get(name, 0) for name in ("LDL", "STL"))
        if local > IN_MEMORY.get((self.name, self.arch), 0):
            found.append(f"{local} accesses to local memory")
        if "HGMMA" in self.instructions and "HGMMA" not in self.main_loop:
            found.append("wgmma outside every loop")
        return [*found, *self.notes]

    def __str__(self) -> str:
        verdict = "; ".join(self.problems) or "ok"
        return (
            f"{self.name:38} {self.arch:7} {self.threads:4} threads {self.registers:4} registers "
            f"{self.spill_bytes:3} B spilled {self.stack_bytes:4} B stack "
            f"{self.shared_bytes + self.dynamic_bytes:6} B shared  "
            f"{verdict}"
        )


def _capability(arch: str) -> tuple[Any, ...]:
    digits = arch.removeprefix("sm_").rstrip("a")
    number = (int(digits[:-1]), int(digits[-1]))
    return (*number, "a") if arch.endswith("a") else number


def compile_ptx(variant: Variant, arch: str) -> str:
    """The variant's PTX for `arch`, as the launcher would make it on such a device."""
    capability = _capability(arch)
    # Device functions ask the current device for its capability; there is none here.
    dispatcher: Any = importlib.import_module("numba.cuda.dispatcher")
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability[:2])
    function = variant.kernel.py_func
    ptx, _ = compiler.cuda.compile_ptx(function, variant.signature, cc=capability, device=False, abi="numba")
    return str(ptx)


def assemble(variant: Variant, arch: str) -> Report:
    """Compile and assemble one variant; ToolsMissing without ptxas, RuntimeError with its words when it
    refuses."""
    ptx = compile_ptx(variant, arch)
    return Report(variant.name, arch, variant.threads, *_resources(run_ptxas(ptx, arch)[1], ptx))


def _resources(words: str, ptx: str) -> tuple[int, int, int, int, int]:
    """read_resources of the assembler's words, and how many float64 instructions the PTX has."""
    float64 = re.findall(r"^\s*(?:@\S+\s+)?[a-z][\w.]*\.f64\b", ptx, flags=re.MULTILINE)
    return *read_resources(words), len(float64)


def assemble_kernel(kernel: launch.Kernel, arch: str) -> Report:
    """Compile a launcher's kernel for `arch` as a launch would, and look at its instructions.

    Takes no cubin from the cache. Raises ValueError for a target that the kernel is not for, ToolsMissing
    without ptxas or nvdisasm, and what compiler and assembler raise.
    """
    code = disassemble(kernel, arch)
    instructions, main_loop = count_instructions(code.sass)
    asked = [int(count) for count in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", code.ptx)]
    return Report(
        kernel.name, arch, kernel.threads, *_resources(code.words, code.ptx), kernel.smem, instructions,
        main_loop,
        (min(asked), max(asked)) if asked else None, tuple(sorted(set(re.findall(LOSS, code.words)))),
    )  # fmt: skip


def count_instructions(sass: str) -> tuple[dict[str, int], dict[str, int]]:
    """({opcode: count}, the same of the smallest loop with matrix products) of nvdisasm's text.

    A loop is what lies between a label and a branch back to it, if no thread leaves the kernel in between:
    slow ways round a wait are put behind the end of the kernel and branch back from there.
    """
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    back: list[tuple[int, int]] = []
    ends: list[int] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label.group(1)] = len(opcodes)
        elif found := re.match(r"\s+(?:/\*[0-9a-f]+\*/)\s+(@!?U?P\d\s+)?([A-Z][A-Z0-9]*)(.*)", line):
            predicate, opcode, operands = found.groups()
            target = re.search(r"`\((\.L_\w+)\)", operands)
            if target and target.group(1) in labels:
                back.append((labels[target.group(1)], len(opcodes)))
            if opcode == "EXIT" and predicate is None:
                ends.append(len(opcodes))
            opcodes.append(opcode)
    loops = [
        Counter(opcodes[first : last + 1])
        for first, last in sorted(back, key=lambda pair: pair[1] - pair[0])
        if not any(first <= end <= last for end in ends)
    ]
    main = next((loop for loop in loops if loop["HGMMA"] or loop["HMMA"]), Counter[str]())
    return dict(Counter(opcodes)), dict(main)


def _wanted(variant: Variant, arch: str) -> bool:
    if variant.name.endswith("strided"):
        return arch in STRIDED_ARCHS
    return arch not in SAMPLED_ARCHS or bool(SAMPLED.fullmatch(variant.name))


def _work(part: int, parts: int, archs: tuple[str, ...]) -> list[Report]:
    plain = [(variant, arch) for arch in archs for variant in variants() if _wanted(variant, arch)]
    launched = [(kernel, arch) for arch in archs for _, kernel in fitting(kernel_modules(), arch)]
    reports = [assemble(variant, arch) for variant, arch in plain[part::parts]]
    return reports + [assemble_kernel(kernel, arch) for kernel, arch in launched[part::parts]]


def assemble_all(archs: tuple[str, ...] = ARCHS, processes: int = 2) -> list[Report]:
    """Every kernel on every architecture, over fresh processes. Raises ToolsMissing or an assembler's
    refusal."""
    find_ptxas()
    if not compiler.AVAILABLE:
        raise ToolsMissing(f"numba.cuda cannot be imported: {compiler.REASON}")
    if compiler.SIMULATOR:
        raise ToolsMissing("the simulator is on (NUMBA_ENABLE_CUDASIM): it has no compiler")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        parts = [pool.submit(_work, part, processes, archs) for part in range(processes)]
        return sorted((report for part in parts for report in part.result()), key=lambda r: (r.name, r.arch))


def main() -> int:
    """Print the reports; exit 1 if any has a problem, 3 if tools are missing."""
    parser = argparse.ArgumentParser(description="compile and assemble all kernels, without a GPU")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="may repeat; all by default")
    arguments = parser.parse_args()
    try:
        reports = assemble_all(tuple(arguments.arch or ARCHS))
    except ToolsMissing as error:
        print(error, file=sys.stderr)
        return 3
    for report in reports:
        print(json.dumps({**asdict(report), "problems": report.problems}) if arguments.json else report)
    return 1 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
