"""A CUDA device: its streams, an arena, pinned staging buffers, and the kernels' rungs that run there.

Knows when work of one stream must wait for another's, always by events: nothing here waits for the device but
what says so. Refuses to know what arrays mean. The driver's calls are in driver.py, arrays and pools in
memory.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sharp import driver
from sharp.memory import (
    Arena,
    DeviceArray,
    PinnedBuffer,
    PinnedPool,
    device_array,
    download_async,
    upload_async,
)

CHUNK_BYTES = 8 << 20  # of long copies: two pinned buffers of this size are in turns
STAGE_ALIGNMENT = 16  # bytes: the widest load of any kernel


class PinnedLane:
    """Two pinned buffers in turns, and the stream that copies them: one thread's way to the device."""

    def __init__(self, pool: PinnedPool, stream: driver.Stream) -> None:
        self._pool, self._stream = pool, stream
        self._buffers: list[PinnedBuffer | None] = [None, None]
        self._turn = 0

    def room(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """num_bytes to be written, in the buffer that was sent longest ago; waits until its copy is over."""
        self._turn ^= 1
        buffer = self._buffers[self._turn]
        if buffer is not None:
            buffer.event.synchronize()
        if buffer is None or buffer.capacity < num_bytes:
            self._release(self._turn)
            buffer = self._buffers[self._turn] = self._pool.take(max(num_bytes, 1))
        return buffer.cut(num_bytes)

    def send(self, target: DeviceArray) -> None:
        """Queue the copy of what room() gave last. TypeError and ValueError as upload_async."""
        buffer = self._buffers[self._turn]
        if buffer is None:
            raise ValueError("send() without room() before it")
        upload_async(target, buffer, self._stream)

    def _release(self, turn: int) -> None:
        buffer, self._buffers[turn] = self._buffers[turn], None
        if buffer is not None:
            buffer.release()

    def __enter__(self) -> PinnedLane:
        return self

    def __exit__(self, *error: object) -> None:
        self._release(0)
        self._release(1)


class CudaDevice:
    """The current CUDA device and its rungs.

    stream: the compute stream as numba's kernels and launch.Kernel take it; compute_stream: the same, as
    driver.Stream; copy_stream: runs beside it. Raises CudaError, or what numba raises without a device.
    """

    kind: Literal["cpu", "cuda"] = "cuda"
    default_rung = "plain"

    def __init__(self, dtype: str) -> None:
        from kernels_numba.compiler import cuda

        driver.bind()
        self.dtype = dtype
        self.compute_stream, self.copy_stream = driver.Stream(implicit=True), driver.Stream()
        self.stream: Any = cuda.external_stream(self.compute_stream.handle)
        device = cuda.get_current_device()
        major, minor = device.compute_capability
        self.capability: tuple[int, int] | None = (int(major), int(minor))
        name = device.name.decode() if isinstance(device.name, bytes) else str(device.name)
        self.name = f"cuda:{device.id} {name} (compute capability {major}.{minor})"
        self.pool = PinnedPool()
        self._element = np.dtype(np.float32) if dtype == "float32" else np.dtype(np.uint16)
        self._arena: Arena | None = None
        self._slots: list[DeviceArray] = []  # two, for the indices of two steps
        self._used = [driver.Event(), driver.Event()]  # the step that reads a slot is queued, up to here
        self._turn = 0

    @contextmanager
    def arena(self, num_bytes: int) -> Iterator[Arena]:
        """One allocation that all arrays made inside are cut from; given back at once if that fails.
        CudaOutOfMemory names needed and free bytes."""
        arena = self._arena = Arena(num_bytes)
        try:
            yield arena
        except BaseException:
            with suppress(driver.CudaError):
                self.synchronize()  # copies may be on their way into it
            arena.close()
            raise
        finally:
            self._arena = None

    def empty(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None, *, term: str = "other"
    ) -> DeviceArray:
        """An uninitialised array, of the arena under `term` while one is open, else in an allocation of its
        own; `dtype` None means the engine's element type. ArenaFull or CudaOutOfMemory names `term`."""
        kind = np.dtype(dtype) if dtype is not None else self._element
        if self._arena is not None:
            return self._arena.take(term, shape, kind)
        return device_array(shape, kind, term)

    def upload(self, array: npt.NDArray[Any], *, term: str = "other") -> DeviceArray:
        """A device copy of the array, its dtype kept; complete when this returns."""
        target = self.empty(array.shape, array.dtype, term=term)
        flat, raw = target.reshape(-1).view(np.uint8), np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        with self.lane() as lane:
            for start in range(0, raw.size, CHUNK_BYTES):
                part = raw[start : start + CHUNK_BYTES]
                lane.room(part.size)[:] = part
                lane.send(flat[start : start + part.size])
            self.copy_stream.synchronize()
        return target

    def upload_float(self, array: npt.NDArray[np.float32]) -> DeviceArray:
        """A device copy of a float32 weight, rounded to nearest even in the engine's dtype."""
        if self.dtype == "bfloat16":
            return self.upload(array.astype(ml_dtypes.bfloat16).view(np.uint16))
        return self.upload(array)

    def lane(self) -> PinnedLane:
        """One thread's way to the device: pieces through two pinned buffers on the copy stream."""
        return PinnedLane(self.pool, self.copy_stream)

    def download(self, array: DeviceArray) -> npt.NDArray[Any]:
        """A contiguous array on the host, after all work queued before on the compute stream."""
        host = np.empty(array.shape, array.dtype)
        flat, raw = array.reshape(-1).view(np.uint8), host.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, CHUNK_BYTES):
            part = flat[start : start + CHUNK_BYTES]
            with self.pool.take(part.size) as buffer:
                download_async(buffer, part, self.compute_stream)
                buffer.event.synchronize()
                raw[start : start + part.size] = buffer.array
        return host

    def reserve_staging(self, num_bytes: int) -> None:
        """Buffers for the indices of two steps of up to num_bytes, now and not in the middle of a run. Grows,
        never shrinks."""
        if not self._slots or self._slots[0].nbytes < num_bytes:
            self._slots = [self.empty((num_bytes,), np.uint8, term="staging") for _ in range(2)]
            self.pool.reserve(num_bytes)

    def stage(self, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, DeviceArray]:
        """A step's small arrays in one pinned buffer and one copy beside the compute stream; views of where
        it goes, which the compute stream reaches after the copy. Waits for nothing.

        Two steps' indices are on the device at most: what was staged two calls ago is overwritten, once the
        work that was queued up to the last call is over. Views start on multiples of 16 bytes.
        """
        offsets, total = {}, 0
        for name, array in arrays.items():
            offsets[name] = total
            total += -(-max(array.nbytes, 1) // STAGE_ALIGNMENT) * STAGE_ALIGNMENT
        self.reserve_staging(total)
        self.compute_stream.record(self._used[self._turn])  # all that reads the last step's slot is queued
        self._turn ^= 1
        slot = self._slots[self._turn]
        self.copy_stream.wait(self._used[self._turn])
        with self.pool.take(slot.nbytes) as buffer:  # of one size always, so that none is made in a run
            for name, array in arrays.items():
                raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                buffer.array[offsets[name] : offsets[name] + array.nbytes] = raw
            upload_async(slot[:total], buffer, self.copy_stream)
            self.compute_stream.wait(buffer.event)
        return {
            name: DeviceArray(slot.address + offsets[name], array.shape, array.dtype, None, slot.owner)
            for name, array in arrays.items()
        }

    def fill(self, array: DeviceArray, byte: int) -> None:
        """Queue writing `byte` into every byte of a contiguous array, on the compute stream."""
        flat = array.reshape(-1).view(np.uint8)
        if flat.nbytes:
            driver.fill(flat.address, byte, flat.nbytes, self.compute_stream)

    def copy_rows(self, array: DeviceArray, pairs: npt.NDArray[np.int32]) -> None:
        """array[destination] = array[source] for each (source, destination), queued on the compute stream; no
        row is both. Rows are contiguous: each is one copy inside the device."""
        for source, destination in pairs.tolist():
            there, here = array[destination], array[source]
            driver.copy_on_device(
                there.address, here.address, here.nbytes, self.compute_stream, "a page's copy"
            )

    def free_bytes(self) -> int:
        """Free device memory in bytes as the driver reports it."""
        return driver.memory_info()[0]

    def synchronize(self) -> None:
        """Wait until everything queued on both streams has happened."""
        self.copy_stream.synchronize()
        self.compute_stream.synchronize()

    def close(self) -> None:
        """Wait for the streams and give the staging buffers back; arrays go with their last reference."""
        if driver.poisoned() is None:
            self.synchronize()
        self.pool.close()
        self._slots = []
