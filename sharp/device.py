"""Where arrays live: host memory (the numpy reference) or a CUDA device (the numba kernels).

Knows how to allocate, upload and download arrays in the engine's dtype, and which rung family runs there.
Refuses to know what the arrays mean: no shapes of models, no requests.

bfloat16 is stored as `ml_dtypes.bfloat16` on the host (numpy rounds on assignment) and as uint16 bit
patterns on
a CUDA device (kernels convert; numba has no shared arrays of bfloat16). Weights of a bfloat16 host model hold
rounded values in float32 arrays, because BLAS multiplies nothing narrower.
"""

from __future__ import annotations

import os
import platform
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sharp.model_config import DTYPE_BYTES

Array = Any  # np.ndarray on the host, a numba device array on a GPU: the ops accept either family


class Device(Protocol):
    """What staging, the forward and the memory plan ask of a device."""

    kind: Literal["cpu", "cuda"]
    name: str
    dtype: str
    default_rung: str
    capability: tuple[int, int] | None  # compute capability; None without a GPU
    stream: Any

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None) -> Array: ...

    def upload(self, array: npt.NDArray[Any]) -> Array: ...

    def upload_float(self, array: npt.NDArray[np.float32]) -> Array: ...

    def download(self, array: Array) -> npt.NDArray[Any]: ...

    def stage(self, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Array]: ...

    def reserve_staging(self, num_bytes: int) -> None: ...

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

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.name = f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
        self._element = np.dtype(np.float32) if dtype == "float32" else np.dtype(ml_dtypes.bfloat16)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None) -> Array:
        """An uninitialised array; `dtype` None means the engine's element type."""
        return np.empty(shape, dtype or self._element)

    def upload(self, array: npt.NDArray[Any]) -> Array:
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


class CudaDevice:
    """The current CUDA device (or numba's simulator of one) and the `plain` rungs."""

    kind: Literal["cpu", "cuda"] = "cuda"
    default_rung = "plain"

    def __init__(self, dtype: str) -> None:
        from kernels_numba import compiler

        self._cuda = compiler.cuda
        self._simulator = compiler.SIMULATOR
        self.dtype = dtype
        self.stream: Any = 0 if self._simulator else self._cuda.stream()
        self.capability: tuple[int, int] | None = None
        if not self._simulator:
            major, minor = self._cuda.get_current_device().compute_capability
            self.capability = (int(major), int(minor))
        self.name = "numba simulator" if self._simulator else _cuda_name(self._cuda)
        self._element = np.dtype(np.float32) if dtype == "float32" else np.dtype(np.uint16)
        self._pinned: npt.NDArray[np.uint8] | None = None
        self._staged: Array = None

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None) -> Array:
        """An uninitialised device array; `dtype` None means the engine's element type."""
        return self._cuda.device_array(shape, np.dtype(dtype) if dtype is not None else self._element)

    def upload(self, array: npt.NDArray[Any]) -> Array:
        """A device copy of the array, its dtype kept; complete when this returns."""
        copy = self._cuda.to_device(np.ascontiguousarray(array), stream=self.stream)
        self.synchronize()
        return copy

    def upload_float(self, array: npt.NDArray[np.float32]) -> Array:
        """A device copy of a float32 weight, rounded to nearest even in the engine's dtype."""
        if self.dtype == "bfloat16":
            return self.upload(array.astype(ml_dtypes.bfloat16).view(np.uint16))
        return self.upload(array)

    def download(self, array: Array) -> npt.NDArray[Any]:
        """The array on the host, after all work queued before on the stream."""
        host = array.copy_to_host(stream=self.stream)
        self.synchronize()
        return np.asarray(host)

    def reserve_staging(self, num_bytes: int) -> None:
        """Buffers for steps of up to num_bytes, now and not in the middle of a run. Grows, never shrinks."""
        if self._pinned is None or self._pinned.nbytes < num_bytes:
            capacity = 1 << (num_bytes - 1).bit_length()  # doubling: few allocations in a process's life
            self._pinned = self._cuda.pinned_array(capacity, np.uint8)
            self._staged = self._cuda.device_array(capacity, np.uint8)

    def stage(self, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Array]:
        """A step's small arrays in one pinned buffer, one asynchronous copy, and views of the result.

        The buffer is rewritten at the next call, so this waits for whatever still reads it: nothing in the
        steady
        loop, an abandoned step after an interruption. Offsets are multiples of 16 bytes: every view is
        aligned.
        """
        self.synchronize()
        offsets, total = {}, 0
        for name, array in arrays.items():
            offsets[name] = total
            total += -(-max(array.nbytes, 1) // 16) * 16
        self.reserve_staging(total)
        assert self._pinned is not None
        for name, array in arrays.items():
            raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
            self._pinned[offsets[name] : offsets[name] + array.nbytes] = raw
        self._staged[:total].copy_to_device(self._pinned[:total], stream=self.stream)
        views = {}
        for name, array in arrays.items():
            start = offsets[name]
            if array.size:
                flat = self._staged[start : start + array.nbytes].view(array.dtype)
                views[name] = flat.reshape(array.shape) if array.ndim > 1 else flat
            else:
                views[name] = self._cuda.device_array(array.shape, array.dtype)
        return views

    def copy_rows(self, array: Array, pairs: npt.NDArray[np.int32]) -> None:
        """array[destination] = array[source] for each (source, destination), queued on the stream; no row is
        both. Rows are contiguous: each is one copy inside the device."""
        for source, destination in pairs.tolist():
            array[destination].copy_to_device(array[source], stream=self.stream)

    def free_bytes(self) -> int:
        """Free device memory in bytes as the driver reports it (the simulator: a notional 4 GiB)."""
        if self._simulator:
            return 4 << 30
        return int(self._cuda.current_context().get_memory_info().free)

    def synchronize(self) -> None:
        """Wait until everything queued on the stream has happened."""
        if not self._simulator:
            self.stream.synchronize()

    def close(self) -> None:
        """Wait for the stream and drop the staging buffers; arrays are freed with their last reference."""
        self.synchronize()
        self._pinned = self._staged = None


def _cuda_name(cuda: Any) -> str:
    device = cuda.get_current_device()
    name = device.name.decode() if isinstance(device.name, bytes) else str(device.name)
    major, minor = device.compute_capability
    return f"cuda:{device.id} {name} (compute capability {major}.{minor})"


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
    return CudaDevice("bfloat16" if dtype == "auto" else dtype)
