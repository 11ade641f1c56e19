"""Kernels that are compiled once, kept on disk as cubins, and launched through the driver with prepared
arguments.

Knows: compilation for a target, shared-memory limits, clusters, programmatic dependent launch; cubins.py
keeps what is compiled, prebuild.py compiles many at once. Refuses to know: what a kernel computes. numba's
own dispatcher costs 25 to 75 us a launch and never raises the dynamic shared-memory limit; this path exists
for both reasons.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kernels_numba import compiler
from kernels_numba.cubins import cubin_path, edited, read_cubin, write_cubin
from kernels_numba.tools import assembler, run_ptxas

STATIC_SMEM = 48 << 10  # what a block may have without asking
C_TYPES: dict[str, Any] = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}
LIMITS = {"int32": (-(1 << 31), (1 << 31) - 1), "int64": (-(1 << 63), (1 << 63) - 1)}
compiles = 0  # kernels that this process had to compile: tests and `sharp info` read it


def linker_version() -> str:
    """What assembles these kernels, with its version: `sharp bench` records it."""
    return assembler()[1]


def arch_of(capability: tuple[int, int]) -> str:
    """(9, 0) -> "sm_90a": from Hopper on, the target with the instructions of that chip alone."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def compile_ptx(function: Any, types: Sequence[str], threads: int, arch: str, blocks: int = 1) -> str:
    """PTX of a kernel function of scalars for `arch`, for blocks of `threads`, of which registers leave room
    for `blocks` on an SM; needs no GPU."""
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
            function, arguments, cc=target, device=False, abi="numba", launch_bounds=(threads, blocks)
        )
    finally:
        dispatcher.get_current_device = asked
    return str(ptx)


def to_cubin(ptx: str, arch: str) -> bytes:
    """PTX assembled by tools.assembler(); RuntimeWarning where nvJitLink must stand in and a kernel loses by
    it. Raises what the assembler raises."""
    ptxas, name = assembler()
    if ptxas is not None:
        return run_ptxas(ptx, arch, ptxas)[0]
    from cuda.core import Linker, LinkerOptions, ObjectCode

    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=LinkerOptions(arch=arch))
    cubin = bytes(linker.link("cubin").code)
    if "C7504" in linker.get_info_log() + linker.get_error_log():
        loss = f"{name} ignores setmaxnreg, which makes kernels slower"
        warnings.warn(f"{loss}: install nvidia-cuda-nvcc for its ptxas", RuntimeWarning, stacklevel=2)
    return cubin


def compile_cubin(
    function: Any, types: Sequence[str], threads: int, arch: str, blocks: int = 1
) -> tuple[str, bytes]:
    """(entry name, cubin) of a kernel function; needs no GPU. Raises what compiler and assembler raise."""
    global compiles
    ptx = compile_ptx(function, types, threads, arch, blocks)
    entry = re.search(r"\.entry\s+([\w$]+)", ptx)
    if entry is None:
        raise RuntimeError(f"the compiler made no kernel of {function.__name__}")
    cubin = to_cubin(ptx, arch)
    compiles += 1
    return entry.group(1), cubin


def address(array: Any) -> int:
    """The device address of an array's first element."""
    return int(array.__cuda_array_interface__["data"][0])


def filled(shape: tuple[int, ...], dtype: Any, byte: int) -> Any:
    """A new device array, every byte of it `byte`."""
    from cuda.bindings import driver

    array = compiler.cuda.device_array(shape, dtype)
    _check(driver.cuMemsetD8(address(array), byte, array.nbytes), f"filling {array.nbytes:,} bytes")
    return array


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
    start while the kernel before is ending (griddepcontrol); archs: the only targets that have its
    instructions, like ("sm_90a",), or () for any; blocks: that an SM must have registers for.
    ValueError for a signature of other types.
    """

    name: str
    make: Callable[[], Any]
    key: tuple[Any, ...]
    signature: str
    threads: int
    smem: int = 0
    cluster: int = 1
    pdl: bool = False
    archs: tuple[str, ...] = ()
    blocks: int = 1
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

    def fits(self, arch: str) -> bool:
        """Whether a target has its instructions: sm_120a has all that sm_120 has."""
        return not self.archs or any(arch in (own, f"{own}a") for own in self.archs)

    def check_arch(self, arch: str) -> None:
        """ValueError for a target without its instructions."""
        if not self.fits(arch):
            raise ValueError(f"{self.name} is for {', '.join(self.archs)}; this is {arch}")

    def path(self, arch: str, directory: Path | None = None) -> Path:
        """Its file in the cache, whether or not there is one."""
        return cubin_path(self.name, arch, [self.key, self.signature, self.threads, self.blocks], directory)

    def cubin(self, arch: str, directory: Path | None = None) -> tuple[str, bytes]:
        """(entry, cubin), from the cache or compiled now. ValueError for a target without its
        instructions."""
        self.check_arch(arch)
        path = self.path(arch, directory)
        found = None if edited() else read_cubin(path)
        if found is None:
            found = compile_cubin(self.make(), self.types, self.threads, arch, self.blocks)
            if not edited():
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
        number, or a value that its type does not hold."""
        if len(arguments) != len(self.types):
            raise ValueError(f"{self.name}: {len(arguments)} arguments; {len(self.types)} are required")
        if grid < 1 or grid % self.cluster:
            raise ValueError(
                f"{self.name}: grid is {grid}; a multiple of the cluster's {self.cluster} is required"
            )
        return Launch(self, grid, arguments)


def _holds(kernel: Kernel, index: int, value: int | float) -> int | float:
    """The value if its argument's type holds it; ctypes would cut an integer and say nothing."""
    kind, what = kernel.types[index], f"{kernel.name}: argument {index} is {value}"
    if kind == "float32":
        value = float(value)
        if math.isfinite(value) and math.isinf(ctypes.c_float(value).value):
            raise ValueError(f"{what}; float32 holds up to 3.4028235e38")
        return value
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{what}; {kind} holds integers") from None
    low, high = LIMITS[kind]
    if not low <= number <= high:
        raise ValueError(f"{what}; {kind} holds {low} to {high}")
    return number


def _packed(kernel: Kernel, arguments: Sequence[int | float]) -> list[Any]:
    """The arguments as ctypes values. ValueError for one that its type does not hold."""
    try:
        values = [C_TYPES[name](value) for name, value in zip(kernel.types, arguments, strict=True)]
        if [value.value for value in values] == list(arguments):
            return values
    except TypeError:  # no number, or no integer: named below
        pass
    # Something was cut or rounded; one by one costs twice as much as all of a launch's preparation.
    checked = [_holds(kernel, i, value) for i, value in enumerate(arguments)]
    return [C_TYPES[name](value) for name, value in zip(kernel.types, checked, strict=True)]


class Launch:
    """A kernel with its grid and packed arguments; calling it queues one launch on a stream."""

    def __init__(self, kernel: Kernel, grid: int, arguments: Sequence[int | float]) -> None:
        self.values = _packed(kernel, arguments)
        self._pointers = (ctypes.c_void_p * len(self.values))(
            *[ctypes.addressof(value) for value in self.values]
        )
        self._at = ctypes.addressof(self._pointers)
        self._kernel, self._grid = kernel, grid
        self._call: Callable[[int], Any] | None = None

    def set(self, index: int, value: int | float) -> None:
        """Replace one argument; launches already queued keep theirs. ValueError for no such argument, or a
        value that its type does not hold."""
        if not 0 <= index < len(self.values):
            raise ValueError(f"{self._kernel.name}: argument {index}; there are 0 to {len(self.values) - 1}")
        self.values[index].value = _holds(self._kernel, index, value)

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
