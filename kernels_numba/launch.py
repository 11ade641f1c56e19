"""Kernels that are compiled once, kept on disk as cubins, and launched through the driver with prepared
arguments.

Knows: compilation for a target, the cache in the user's cache directory, shared-memory limits, clusters,
programmatic dependent launch. Refuses to know: what a kernel computes. numba's own dispatcher costs 25 to 75
us a launch and never raises the dynamic shared-memory limit; this path exists for both reasons.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kernels_numba import compiler

PACKAGE = Path(__file__).resolve().parent
STATIC_SMEM = 48 << 10  # what a block may have without asking
C_TYPES: dict[str, Any] = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}
compiles = 0  # kernels that this process had to compile: tests and `sharp info` read it


@cache
def sources_hash() -> str:
    """sha256 over every Python file of this package: any edit to a kernel or helper makes new cubins."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def tool_versions() -> str:
    """Versions of what turns Python into a cubin, and of the driver that loads it (0 without one)."""
    parts = []
    for package in ("numba-cuda", "llvmlite", "cuda-core", "nvidia-nvjitlink", "nvidia-cuda-nvcc"):
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


def linker_version() -> str:
    """What assembles the kernels of this module: nvJitLink and its version."""
    try:
        return f"nvJitLink {importlib.metadata.version('nvidia-nvjitlink')}"
    except importlib.metadata.PackageNotFoundError:
        return "nvJitLink"


def cache_directory() -> Path:
    """Where cubins are kept: kernels/ in the user's cache directory for sharp."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("sharp")) / "kernels"


def arch_of(capability: tuple[int, int]) -> str:
    """(9, 0) -> "sm_90a": from Hopper on, the target with the instructions of that chip alone."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def compile_ptx(function: Any, types: Sequence[str], threads: int, arch: str) -> str:
    """PTX of a kernel function of scalars for `arch`, for blocks of `threads`; needs no GPU."""
    digits = arch.removeprefix("sm_").rstrip("a")
    capability: tuple[Any, ...] = (int(digits[:-1]), int(digits[-1]))
    arguments = tuple(getattr(compiler.cuda.types, name) for name in types)
    dispatcher: Any = importlib.import_module("numba.cuda.dispatcher")
    asked = dispatcher.get_current_device
    # Device functions ask the current device for its capability; the target's is meant, and there may be no
    # device.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        target = (*capability, "a") if arch.endswith("a") else capability
        ptx, _ = compiler.cuda.compile_ptx(
            function, arguments, cc=target, device=False, abi="numba", launch_bounds=(threads, 1)
        )
    finally:
        dispatcher.get_current_device = asked
    return str(ptx)


def compile_cubin(function: Any, types: Sequence[str], threads: int, arch: str) -> tuple[str, bytes]:
    """(entry name, cubin) of a kernel function; needs no GPU. Raises what compiler and linker raise."""
    global compiles
    from cuda.core import Linker, LinkerOptions, ObjectCode

    ptx = compile_ptx(function, types, threads, arch)
    entry = re.search(r"\.entry\s+([\w$]+)", ptx)
    if entry is None:
        raise RuntimeError(f"the compiler made no kernel of {function.__name__}")
    linked = Linker(ObjectCode.from_ptx(ptx.encode()), options=LinkerOptions(arch=arch)).link("cubin")
    compiles += 1
    return entry.group(1), bytes(linked.code)


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(head + b"\n" + code)
        os.replace(name, path)
    except OSError:
        pass


def address(array: Any) -> int:
    """The device address of an array's first element."""
    return int(array.__cuda_array_interface__["data"][0])


def stream_handle(stream: Any) -> int:
    """The CUstream of a numba stream, an integer handle, or None (the default stream)."""
    if stream is None:
        return 0
    if isinstance(stream, int):
        return stream
    handle = stream.handle
    return int(getattr(handle, "value", handle) or 0)


def _check(result: Any, what: str) -> Any:
    error, *rest = result
    if int(error):
        raise RuntimeError(f"{what}: the driver says {error.name}")
    return rest[0] if rest else None


@dataclass(eq=False)
class Kernel:
    """A kernel function of scalar arguments, for blocks of a fixed size.

    make: returns the Python function (called only when it must be compiled); key: all that it depends on
    beside the source files; signature: like "void(int64, int32)", of int32, int64 (addresses too) and
    float32; threads: a block's; smem: bytes of dynamic shared memory; cluster: blocks of a cluster; pdl:
    start while the kernel before is ending (griddepcontrol). ValueError for a signature of other types.
    """

    name: str
    make: Callable[[], Any]
    key: tuple[Any, ...]
    signature: str
    threads: int
    smem: int = 0
    cluster: int = 1
    pdl: bool = False
    _function: Any = field(default=None, init=False, repr=False)
    _module: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        inside = self.signature.removeprefix("void(").removesuffix(")")
        self.types = [part.strip() for part in inside.split(",") if part.strip()]
        unknown = sorted(set(self.types) - set(C_TYPES))
        if unknown:
            raise ValueError(
                f"{self.name}: argument types {', '.join(unknown)}; known are {', '.join(C_TYPES)}"
            )

    def cubin(self, arch: str, directory: Path | None = None) -> tuple[str, bytes]:
        """(entry, cubin), from the cache or compiled now."""
        facts = [self.name, self.key, self.signature, self.threads, arch, sources_hash(), tool_versions()]
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        path = (directory or cache_directory()) / f"{self.name}-{arch}-{digest}.cubin"
        found = read_cubin(path)
        if found is None:
            found = compile_cubin(self.make(), self.types, self.threads, arch)
            write_cubin(path, *found)
        return found

    def load(self) -> Any:
        """The CUfunction in the current context, loaded once. RuntimeError if the driver refuses."""
        if self._function is None:
            from cuda.bindings import driver

            device = compiler.cuda.current_context().device
            entry, code = self.cubin(arch_of(tuple(device.compute_capability)))
            self._module = _check(driver.cuModuleLoadData(code), f"loading {self.name}")
            function = _check(
                driver.cuModuleGetFunction(self._module, entry.encode()), f"loading {self.name}"
            )
            if self.smem > STATIC_SMEM:
                limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _check(
                    driver.cuFuncSetAttribute(function, limit, self.smem),
                    f"{self.name}: {self.smem:,} bytes of shared memory",
                )
            self._function = function
        return self._function

    def prepare(self, grid: int, arguments: Sequence[int | float]) -> Launch:
        """A launch of `grid` blocks with these arguments, ready to be repeated. ValueError for a wrong
        number."""
        if len(arguments) != len(self.types):
            raise ValueError(f"{self.name}: {len(arguments)} arguments; {len(self.types)} are required")
        if grid < 1 or grid % self.cluster:
            raise ValueError(
                f"{self.name}: grid is {grid}; a multiple of the cluster's {self.cluster} is required"
            )
        return Launch(self, grid, arguments)


class Launch:
    """A kernel with its grid and packed arguments; calling it queues one launch on a stream."""

    def __init__(self, kernel: Kernel, grid: int, arguments: Sequence[int | float]) -> None:
        self.values = [C_TYPES[name](value) for name, value in zip(kernel.types, arguments, strict=True)]
        self._pointers = (ctypes.c_void_p * len(self.values))(
            *[ctypes.addressof(value) for value in self.values]
        )
        self._at = ctypes.addressof(self._pointers)
        self._kernel, self._grid = kernel, grid
        self._call: Callable[[int], Any] | None = None

    def set(self, index: int, value: int | float) -> None:
        """Replace one argument; launches already queued keep theirs."""
        self.values[index].value = value

    def _bind(self) -> Callable[[int], Any]:
        from cuda.bindings import driver

        kernel, function = self._kernel, self._kernel.load()
        grid, threads, smem, at = self._grid, kernel.threads, kernel.smem, self._at
        if kernel.cluster == 1 and not kernel.pdl:
            launch = driver.cuLaunchKernel
            return lambda stream: launch(function, grid, 1, 1, threads, 1, 1, smem, stream, at, 0)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = smem
        attributes = []
        if kernel.cluster > 1:
            one = driver.CUlaunchAttribute()
            one.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            one.value.clusterDim.x, one.value.clusterDim.y, one.value.clusterDim.z = kernel.cluster, 1, 1
            attributes.append(one)
        if kernel.pdl:
            one = driver.CUlaunchAttribute()
            one.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            one.value.programmaticStreamSerializationAllowed = 1
            attributes.append(one)
        config.attrs, config.numAttrs = attributes, len(attributes)

        def call(stream: int) -> Any:
            config.hStream = stream
            return driver.cuLaunchKernelEx(config, function, at, 0)

        return call

    def __call__(self, stream: Any = None) -> None:
        """Queue the launch. RuntimeError if the driver refuses it."""
        if self._call is None:
            self._call = self._bind()
        error = self._call(stream_handle(stream))[0]
        if int(error):
            raise RuntimeError(
                f"launching {self._kernel.name} with {self._grid} blocks: the driver says {error.name}"
            )
