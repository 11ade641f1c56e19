"""Where arrays live: host memory (the numpy reference) or a CUDA device (the numba kernels).

Knows what is asked of a device, the host as one, and which one a name means; cuda_device.py is a GPU,
simulated_device.py numba's simulator. Refuses to know what the arrays mean: no shapes of models, no requests.

bfloat16 is stored as `ml_dtypes.bfloat16` on the host (numpy rounds on assignment) and as uint16 bit
patterns on
a CUDA device (kernels convert; numba has no shared arrays of bfloat16). Weights of a bfloat16 host model hold
rounded values in float32 arrays, because BLAS multiplies nothing narrower.
"""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sharp.model_config import DTYPE_BYTES

Array = Any  # np.ndarray on the host, memory.DeviceArray on a GPU: the ops accept either family


class Device(Protocol):
    """What staging, the forward and the memory plan ask of a device."""

    kind: Literal["cpu", "cuda"]
    name: str
    dtype: str
    default_rung: str
    capability: tuple[int, int] | None  # compute capability; None without a GPU
    stream: Any  # of the kernels
    copy_stream: Any  # runs beside it; None where copies are calls that return when they are done

    def arena(self, num_bytes: int) -> AbstractContextManager[Any]: ...

    def empty(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None, *, term: str = "other"
    ) -> Array: ...

    def upload(self, array: npt.NDArray[Any], *, term: str = "other") -> Array: ...

    def upload_float(self, array: npt.NDArray[np.float32]) -> Array: ...

    def download(self, array: Array) -> npt.NDArray[Any]: ...

    def stage(self, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Array]: ...

    def reserve_staging(self, num_bytes: int) -> None: ...

    def fill(self, array: Array, byte: int) -> None: ...

    def copy_rows(self, array: Array, pairs: npt.NDArray[np.int32]) -> None: ...

    def free_bytes(self) -> int: ...

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


class HostDevice:
    """Host memory and the `reference` rungs: numpy and its BLAS."""

    kind: Literal["cpu", "cuda"] = "cpu"
    default_rung = "reference"
    capability: tuple[int, int] | None = None
    stream: Any = None
    copy_stream: Any = None

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.name = f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
        self._element = np.dtype(np.float32) if dtype == "float32" else np.dtype(ml_dtypes.bfloat16)

    def arena(self, num_bytes: int) -> nullcontext[None]:
        """None: numpy's arrays are allocations of their own."""
        return nullcontext()

    def empty(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None, *, term: str = "other"
    ) -> Array:
        """An uninitialised array; `dtype` None means the engine's element type. term: nothing is counted."""
        return np.empty(shape, dtype or self._element)

    def upload(self, array: npt.NDArray[Any], *, term: str = "other") -> Array:
        """The array as it is (ids, tables, float32 constants): on the host nothing moves."""
        return array

    def upload_float(self, array: npt.NDArray[np.float32]) -> Array:
        """A float32 weight rounded to the engine's dtype, kept in float32 for BLAS."""
        if self.dtype == "float32":
            return array
        return array.astype(self._element).astype(np.float32)

    def download(self, array: Array) -> npt.NDArray[Any]:
        return np.asarray(array)

    def reserve_staging(self, num_bytes: int) -> None:
        """Nothing is staged on the host."""

    def stage(self, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Array]:
        """A step's small arrays; on the host they are used in place."""
        return dict(arrays)

    def fill(self, array: Array, byte: int) -> None:
        """Write `byte` into every byte of an array."""
        array.view(np.uint8)[...] = byte

    def copy_rows(self, array: Array, pairs: npt.NDArray[np.int32]) -> None:
        """array[destination] = array[source] for each (source, destination); no row is both."""
        array[pairs[:, 1]] = array[pairs[:, 0]]

    def free_bytes(self) -> int:
        """Memory that can be taken without swapping, in bytes (Linux: MemAvailable, else the physical
        pages).
        """
        try:
            with open("/proc/meminfo", encoding="ascii") as meminfo:
                for line in meminfo:
                    if line.startswith("MemAvailable:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            pass
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

    def synchronize(self) -> None:
        """Nothing is ever in flight on the host."""

    def close(self) -> None:
        """Nothing to give back: numpy frees with the last reference."""


def cuda_problem() -> str | None:
    """Why no CUDA device can be used here, in one line; None if one can."""
    from kernels_numba import compiler

    if not compiler.AVAILABLE:
        return "numba-cuda cannot be imported (install the extra cuda12 or cuda13)"
    if compiler.SIMULATOR:
        return None
    try:
        return None if compiler.cuda.is_available() else "the CUDA driver reports no usable device"
    except (
        Exception
    ) as error:  # a broken driver raises its own kinds of errors; any of them means: not usable
        return f"the CUDA driver failed: {error}"


def open_device(device: str, dtype: str) -> Device:
    """A device by name: "cpu", "cuda", or "auto" (a CUDA device where one is usable, never the simulator).

    dtype: "float32", "bfloat16" or "auto" (bfloat16 on CUDA, float32 on the host).
    Raises ValueError for an unknown name, RuntimeError if "cuda" is asked for and cannot be had.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cuda or cpu, not {device!r}")
    if dtype != "auto" and dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype must be auto, {' or '.join(DTYPE_BYTES)}, not {dtype!r}")
    if device == "auto":
        from kernels_numba import compiler

        device = "cpu" if compiler.SIMULATOR or cuda_problem() else "cuda"
    if device == "cpu":
        return HostDevice("float32" if dtype == "auto" else dtype)
    problem = cuda_problem()
    if problem:
        raise RuntimeError(
            f"device 'cuda' was asked for, but {problem}; device='cpu' runs the numpy reference"
        )
    chosen = "bfloat16" if dtype == "auto" else dtype
    from kernels_numba import compiler

    if compiler.SIMULATOR:
        from sharp.simulated_device import SimulatedDevice

        return SimulatedDevice(chosen)
    from sharp.cuda_device import CudaDevice

    return CudaDevice(chosen)
