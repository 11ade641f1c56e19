"""Compiled kernels on disk: one file a kernel in the user's cache directory, named by all it depends on.

Knows: the cache's place, its files, and what a kernel's name must change with (source files, versions of the
tools and the driver). Refuses to know: how a kernel is compiled or launched. Imports no compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from functools import cache
from pathlib import Path

from kernels_numba.files import UNFINISHED, write_whole
from kernels_numba.tools import assembler

PACKAGE = Path(__file__).resolve().parent


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _stamps() -> list[tuple[Path, int, int]]:
    return [(path, found.st_mtime_ns, found.st_size) for path in _sources() for found in [path.stat()]]


def _hash_of_sources() -> str:
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# sha256 over every Python file of this package: any edit to a kernel or helper makes new cubins. Taken when
# this module is imported, with the rest of the package or before it.
STAMPS, SOURCES = _stamps(), _hash_of_sources()


def edited() -> bool:
    """Whether a source file has changed since this process imported the package: then nobody can say which
    version of a kernel is loaded (a notebook may have reloaded it), and the cache is left alone."""
    try:
        return _stamps() != STAMPS
    except OSError:  # a file went away between being listed and being looked at
        return True


@cache
def tool_versions() -> str:
    """Versions of what turns Python into a cubin, and of the driver that loads it (0 without one)."""
    parts = [assembler()[1]]
    for package in ("numba-cuda", "llvmlite", "nvidia-nvvm", "cuda-core"):
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{package} -")
    try:
        from cuda.bindings import driver

        error, version = driver.cuDriverGetVersion()
        parts.append(f"driver {version if not int(error) else 0}")
    except (ImportError, RuntimeError):  # no libcuda
        parts.append("driver 0")
    return ", ".join(parts)


def cache_directory() -> Path:
    """Where cubins are kept: kernels/ in the user's cache directory for sharp."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("sharp")) / "kernels"


def cubin_path(name: str, arch: str, facts: list[object], directory: Path | None = None) -> Path:
    """The file of a kernel for `arch` that depends on `facts`, the source files and the tools."""
    text = repr([name, *facts, arch, SOURCES, tool_versions()])
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return (directory or cache_directory()) / f"{name}-{arch}-{digest}.cubin"


def read_cubin(path: Path) -> tuple[str, bytes] | None:
    """(entry, cubin) of a cache file; None where there is none or its digest does not fit (then it is made
    again)."""
    try:
        head, _, code = path.read_bytes().partition(b"\n")
        facts = json.loads(head)
        if facts["sha256"] == hashlib.sha256(code).hexdigest():
            return str(facts["entry"]), code
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def write_cubin(path: Path, entry: str, code: bytes) -> None:
    """Write a cache file whole or not at all; a cache that cannot be written costs a compilation, nothing
    else."""
    head = json.dumps({"entry": entry, "sha256": hashlib.sha256(code).hexdigest()}).encode()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, head + b"\n" + code)


def writable(directory: Path) -> bool:
    """Whether cubins written there would stay: found out by writing a file."""
    probe = directory / f"probe-{os.getpid()}{UNFINISHED}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(probe, b"")
        probe.unlink()
    except OSError:
        return False
    return True


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [p for p in directory.iterdir() if p.suffix in (".cubin", UNFINISHED) and p.is_file()]


def contents(directory: Path | None = None) -> tuple[int, int]:
    """(kernels, bytes) that the cache holds, out-of-date ones too."""
    sizes = []
    for path in _files(directory or cache_directory()):
        try:
            if path.suffix == ".cubin":
                sizes.append(path.stat().st_size)
        except OSError:  # another process has just emptied the cache
            continue
    return len(sizes), sum(sizes)


def clear(directory: Path | None = None) -> tuple[int, int]:
    """Delete every kernel of the cache, and nothing else there; (kernels, bytes) that it held. OSError where
    a file may not be deleted."""
    directory = directory or cache_directory()
    held = contents(directory)
    for path in _files(directory):
        path.unlink(missing_ok=True)
    return held
