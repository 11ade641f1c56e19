"""Compile every plain kernel to PTX and assemble it, without a GPU: registers, spills, shared memory,
float64.

`python -m kernels_numba.assemble` prints one line a kernel (`--json` one object a line). The assembler is the
one of pip's nvidia-cuda-nvcc; a system's ptxas is often older than the PTX that numba-cuda writes and is
never used. Knows: how each op's kernel is specialised for an engine. Refuses to know: whether its numbers are
right.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kernels_numba import compiler, paged_attention
from kernels_numba.ops import (
    decode_attention,
    embedding,
    gemm,
    lm_head,
    prefill_attention,
    qk_norm,
    rms_norm,
    rope,
    sample,
    silu_mul,
    store_kv,
)

ARCHS = ("sm_75", "sm_80", "sm_90a", "sm_120")
STRIDED_ARCHS = ("sm_75", "sm_90a")  # strides change index arithmetic only: oldest and newest kind will do
REGISTERS_PER_SM = 65_536


class ToolsMissing(RuntimeError):
    """numba-cuda or pip's ptxas is not installed, or the simulator hides the compiler."""


@dataclass(frozen=True)
class Variant:
    """One specialisation: a kernel, its argument types, its block's threads."""

    name: str
    kernel: Any
    signature: tuple[Any, ...]
    threads: int


@dataclass(frozen=True)
class Report:
    """What the assembler says of one variant on one architecture; float64 counts PTX instructions of that
    type."""

    name: str
    arch: str
    threads: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    float64: int

    @property
    def problems(self) -> list[str]:
        """Why this variant must not ship: spills, float64, or too many registers for one block."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.float64:
            found.append(f"{self.float64} float64 instructions")
        if self.registers * self.threads > REGISTERS_PER_SM:
            found.append(f"{self.registers} registers x {self.threads} threads do not fit an SM")
        return found

    def __str__(self) -> str:
        verdict = "; ".join(self.problems) or "ok"
        return (
            f"{self.name:38} {self.arch:7} {self.threads:4} threads {self.registers:4} registers "
            f"{self.spill_bytes:3} B spilled {self.stack_bytes:4} B stack {self.shared_bytes:6} B shared  "
            f"{verdict}"
        )


def find_tool(name: str) -> Path:
    """ptxas, nvdisasm or cuobjdump inside site-packages/nvidia; ToolsMissing if there is none."""
    for folder in dict.fromkeys([*site.getsitepackages(), site.getusersitepackages(), *sys.path]):
        for path in sorted(Path(folder).glob(f"nvidia/*/bin/{name}")):
            return path
    package = {"ptxas": "nvcc"}.get(name, name)
    raise ToolsMissing(f"no {name} in site-packages: install nvidia-cuda-{package}")


def find_ptxas() -> Path:
    """The assembler of the package nvidia-cuda-nvcc; ToolsMissing if there is none."""
    return find_tool("ptxas")


def variants() -> Iterator[Variant]:
    """Every plain kernel at the shapes of a small and a large model, both dtypes, dense and strided views."""
    if not compiler.AVAILABLE:
        raise ToolsMissing(f"numba.cuda cannot be imported: {compiler.REASON}")
    if compiler.SIMULATOR:
        raise ToolsMissing("the simulator is on (NUMBA_ENABLE_CUDASIM): it has no compiler")
    types = compiler.cuda.types
    i32, f32, u64 = types.int32, types.float32, types.uint64

    def array(dtype: Any, ndim: int, layout: str = "C") -> Any:
        return types.Array(dtype, ndim, layout)

    ids = array(i32, 1)
    for dtype in compiler.STORAGE:
        t = f32 if dtype == "float32" else types.uint16
        for layout, kind in (("C", "dense"), ("A", "strided")):

            def name(op: str, dtype: str = dtype, kind: str = kind) -> str:
                return f"{op}/{dtype}/{kind}"

            rows2, rows3, cache = array(t, 2, layout), array(t, 3, layout), array(t, 4)
            dense2, dense1 = array(t, 2), array(t, 1)
            threads = embedding.THREADS
            kernel = embedding.make_embedding_kernel(dtype)
            yield Variant(name("embedding"), kernel, (rows2, ids, dense2), threads)
            for residual in (False, True):
                kernel = rms_norm.make_rms_norm_kernel(dtype, residual)
                label = name("rms_norm_residual" if residual else "rms_norm")
                yield Variant(label, kernel, (rows2, rows2, dense1, rows2, f32), rms_norm.THREADS)
            kernel = qk_norm.make_qk_norm_kernel(128, dtype)
            yield Variant(name("qk_norm"), kernel, (rows3, rows3, dense1, dense1, f32), qk_norm.THREADS)
            kernel = rope.make_rope_kernel(64, dtype)
            yield Variant(name("rope"), kernel, (rows3, rows3, ids, array(f32, 2)), rope.THREADS)
            kernel = store_kv.make_store_kv_kernel(64, 64)
            yield Variant(name("store_kv"), kernel, (cache, cache, rows3, rows3, ids), store_kv.THREADS)
            kernel = silu_mul.make_silu_mul_kernel(dtype)
            yield Variant(name("silu_mul"), kernel, (rows2, rows2), silu_mul.THREADS)
            for label, config in (("few", gemm.FEW), ("many", gemm.MANY)):
                if layout == "C":
                    kernel = gemm.make_gemm_kernel(config, dtype, dtype, has_bias=True)
                    arguments = (rows2, rows2, dense2, dense1, rows2)
                    yield Variant(name(f"gemm_bias_{label}"), kernel, arguments, config.threads)
                kernel = gemm.make_gemm_kernel(config, dtype, dtype, has_bias=False)
                arguments = (rows2, rows2, dense2, dense2, rows2)
                yield Variant(name(f"gemm_{label}"), kernel, arguments, config.threads)
                kernel = lm_head.make_lm_head_kernel(1 if label == "few" else gemm.FEW_ROWS + 1, dtype)
                arguments = (array(f32, 2, layout), rows2, dense2, dense2, ids)
                yield Variant(name(f"lm_head_{label}"), kernel, arguments, config.threads)
            table = array(i32, 2, layout)
            paged = (rows3, rows3, cache, cache, ids, ids, table, f32)
            for head_dim in (64, 128) if layout == "C" else (64,):
                threads = paged_attention.THREADS
                kernel = prefill_attention.make_prefill_attention_kernel(head_dim, 3, 64, dtype)
                yield Variant(name(f"prefill_attention_d{head_dim}"), kernel, paged, threads)
                kernel = decode_attention.make_decode_attention_kernel(head_dim, 3, 64, dtype)
                yield Variant(name(f"decode_attention_d{head_dim}"), kernel, paged, threads)
            if layout == "C":
                kernel = prefill_attention.make_prefill_attention_kernel(128, 4, 64, dtype, window=4096)
                yield Variant(name("prefill_attention_window"), kernel, paged, paged_attention.THREADS)
    sample_arguments = (ids, array(f32, 2), array(f32, 1), array(u64, 1), ids)
    yield Variant("sample", sample.make_sample_kernel(), sample_arguments, sample.THREADS)


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


def assemble(variant: Variant, arch: str, ptxas: Path) -> Report:
    """Compile and assemble one variant; RuntimeError with ptxas's words when it refuses."""
    ptx = compile_ptx(variant, arch)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"-arch={arch}", str(source), "-o", str(source.with_suffix(".cubin"))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    text = result.stdout + result.stderr
    if result.returncode:
        raise RuntimeError(f"ptxas refuses {variant.name} for {arch}: {text}")

    def number(pattern: str) -> int:
        return sum(int(match) for match in re.findall(pattern, text))

    return Report(
        name=variant.name,
        arch=arch,
        threads=variant.threads,
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill (?:stores|loads)"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        shared_bytes=number(r"(\d+) bytes smem"),
        float64=len(re.findall(r"^\s*(?:@\S+\s+)?[a-z][\w.]*\.f64\b", ptx, flags=re.MULTILINE)),
    )


def _work(part: int, parts: int, archs: tuple[str, ...]) -> list[Report]:
    ptxas = find_ptxas()
    mine = list(variants())[part::parts]
    return [
        assemble(variant, arch, ptxas)
        for variant in mine
        for arch in archs
        if arch in STRIDED_ARCHS or not variant.name.endswith("strided")
    ]


def assemble_all(archs: tuple[str, ...] = ARCHS, processes: int = 2) -> list[Report]:
    """Every variant on every architecture, over fresh processes. Raises ToolsMissing or ptxas's refusal."""
    find_ptxas()
    next(iter(variants()))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        parts = [pool.submit(_work, part, processes, archs) for part in range(processes)]
        return sorted((report for part in parts for report in part.result()), key=lambda r: (r.name, r.arch))


def main() -> int:
    """Print the reports; exit 1 if any has a problem, 3 if tools are missing."""
    parser = argparse.ArgumentParser(description="compile and assemble the plain kernels, without a GPU")
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
