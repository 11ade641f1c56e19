"""Where NVIDIA's command-line tools are (ptxas, nvdisasm, cuobjdump), and a run of the assembler.

They are pip's. A system's ptxas is often older than the PTX that numba-cuda writes: it is taken only where
pip's is missing and it is new enough. Refuses to know: kernels.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path


class ToolsMissing(RuntimeError):
    """numba-cuda or one of pip's tools is not installed, or the simulator hides the compiler."""


@cache
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


def _version(*packages: str) -> str:
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _candidates() -> Iterator[tuple[Path, str]]:
    """Each ptxas there is, with its version: pip's, the path's, CUDA's usual place."""
    with contextlib.suppress(ToolsMissing):
        yield find_ptxas(), _version("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12")
    for place in dict.fromkeys([shutil.which("ptxas"), "/usr/local/cuda/bin/ptxas"]):
        if place is not None and Path(place).is_file():
            words = subprocess.run([place, "--version"], capture_output=True, text=True, check=False).stdout
            found = re.search(r"\bV(\d+\.\d+\.\d+)", words)
            yield Path(place), found.group(1) if found else ""


@cache
def assembler() -> tuple[Path | None, str]:
    """(a ptxas as new as numba-cuda's NVVM, its name and version); where there is none, (None, nvJitLink's).

    nvJitLink compiles a kernel as a part of something, not as a whole: it ignores setmaxnreg (its note C7504)
    and gives such a kernel fewer registers.
    """
    needed = _numbers(_version("nvidia-nvvm", "nvidia-cuda-nvcc-cu12"))
    for path, version in _candidates():
        if _numbers(version) >= needed:
            return path, f"ptxas {version}"
    return None, f"nvJitLink {_version('nvidia-nvjitlink', 'nvidia-nvjitlink-cu12')}".strip()


def run_ptxas(ptx: str, arch: str, ptxas: Path | None = None) -> tuple[bytes, str]:
    """(cubin, what `ptxas -v` says of it), by pip's ptxas or the one given; RuntimeError with its words when
    it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [str(ptxas or find_ptxas()), "-v", f"-arch={arch}", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        words = result.stdout + result.stderr
        if result.returncode:
            raise RuntimeError(f"ptxas refuses for {arch}: {words}")
        return cubin.read_bytes(), words
