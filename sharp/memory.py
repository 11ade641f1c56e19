"""The arena that device arrays are cut from, and pinned host memory for asynchronous copies.

Knows: alignment, who owns which bytes, and when a pinned buffer may be written again. Refuses to know: what
an array means, and when something is copied. The driver's calls are in driver.py.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sharp import driver
from sharp.device_array import DeviceArray as DeviceArray  # part of this module's interface
from sharp.layout import ALIGNMENT, aligned

SMALLEST = 4096  # bytes of the smallest pinned buffer: a page
AT_LEAST = 2  # pinned buffers of a size: one is written while the other is copied


class ArenaFull(MemoryError):
    """An array that the arena's plan did not foresee."""


class _Block:
    """One allocation: freed by close(), or when the last array of it is collected."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.free = driver.on_collect(self, "cuMemFree", address)


class Arena:
    """num_bytes of device memory in one allocation, handed out upwards and never taken back one by one.

    terms: bytes taken under each name, padding included; what is `left` beside them makes up num_bytes.
    allocate: for tests without a device; gives the owner of num_bytes with their .address and .free().
    """

    def __init__(self, num_bytes: int, allocate: Callable[[int], Any] | None = None) -> None:
        if num_bytes < 1:
            raise ValueError(f"an arena of {num_bytes} bytes; 1 or more are required")
        self.num_bytes = aligned(num_bytes)
        self._block: Any = (allocate or _allocate_block)(self.num_bytes)
        if self._block.address % ALIGNMENT:
            raise ValueError(f"the arena is at {self._block.address:#x}; a multiple of {ALIGNMENT} is needed")
        self.terms: dict[str, int] = {}
        self.left = self.num_bytes

    def take(self, term: str, shape: Sequence[int], dtype: npt.DTypeLike) -> DeviceArray:
        """An uninitialised array on a multiple of 256 bytes. ArenaFull names term, needed and left."""
        if self._block is None:
            raise ValueError(f"{term}: the arena is closed")
        kind = np.dtype(dtype)
        needed = aligned(math.prod(shape) * kind.itemsize)
        if needed > self.left:
            raise ArenaFull(
                f"{term}: {needed:,} bytes for {kind}{list(shape)}, but {self.left:,} of the arena's "
                f"{self.num_bytes:,} are left"
            )
        address = self._block.address + self.num_bytes - self.left
        self.left -= needed
        self.terms[term] = self.terms.get(term, 0) + needed
        return DeviceArray(address, shape, kind, None, self._block)

    def close(self) -> None:
        """Give the memory back now, whoever still has arrays of it. What is queued is waited for by the
        driver. Without this it goes back with the last array."""
        if self._block is not None:
            self._block.free()
            self._block = None


def _allocate_block(num_bytes: int) -> _Block:
    return _Block(driver.allocate(num_bytes, "the arena"))


def device_array(shape: Sequence[int], dtype: npt.DTypeLike, what: str) -> DeviceArray:
    """An uninitialised array in an allocation of its own. CudaOutOfMemory names `what`."""
    kind = np.dtype(dtype)
    block = _Block(driver.allocate(aligned(math.prod(shape) * kind.itemsize), what))
    return DeviceArray(block.address, shape, kind, None, block)


# Pinned host memory --------------------------------------------------------------------------------


class PinnedBuffer:
    """Page-locked host memory that belongs to whoever took it from a PinnedPool, until release().

    array: its bytes, u8[num_bytes]. event: recorded after each copy that uses it; whoever reads what a
    download brought waits for it. release() may be called as soon as the last copy is queued (of a download:
    when the bytes have been read); the pool hands the buffer out again only after its event. Usable as a
    context manager, which releases.
    """

    def __init__(self, pool: PinnedPool, memory: npt.NDArray[np.uint8], event: Any) -> None:
        self._pool, self._memory, self.event = pool, memory, event
        self.capacity = memory.nbytes
        self.array = memory
        self.address = int(memory.ctypes.data)
        self.taken = False

    def cut(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Make .array its first num_bytes, and return it. ValueError if it has fewer."""
        if not 0 <= num_bytes <= self.capacity:
            raise ValueError(f"{num_bytes} bytes of a pinned buffer of {self.capacity}")
        self.array = self._memory[:num_bytes]
        return self.array

    def release(self) -> None:
        """Give it back to the pool. ValueError if it is not taken."""
        self._pool._release(self)

    def __enter__(self) -> PinnedBuffer:
        return self

    def __exit__(self, *error: object) -> None:
        if self.taken:
            self.release()


class PinnedPool:
    """Page-locked buffers in sizes of powers of two, two of each size at least; grows, never shrinks.

    allocate: gives u8[num_bytes] of pinned memory; make_event: gives what has .done and .synchronize() (both
    for tests without a device). Safe to use from several threads.
    """

    def __init__(
        self,
        allocate: Callable[[int, Any], npt.NDArray[np.uint8]] | None = None,
        make_event: Callable[[], Any] = driver.Event,
    ) -> None:
        self._allocate, self._make_event = allocate or pinned_memory, make_event
        self._free: dict[int, list[PinnedBuffer]] = {}  # by capacity, the longest given back first
        self._made: dict[int, int] = {}  # buffers by capacity
        self._lock = threading.Lock()
        self._closed = False

    @property
    def num_bytes(self) -> int:
        """All that is pinned."""
        return sum(capacity * count for capacity, count in self._made.items())

    def reserve(self, num_bytes: int) -> None:
        """Make two buffers of this size now, and not in the middle of a run."""
        with self._lock:
            self._fill(_capacity(num_bytes))

    def take(self, num_bytes: int) -> PinnedBuffer:
        """A buffer whose last copy is over, with .array cut to num_bytes: the one given back longest ago, a
        new one if all are in use. Never waits. ValueError for a closed pool or less than 1 byte."""
        capacity = _capacity(num_bytes)
        with self._lock:
            self._fill(capacity)
            waiting = self._free[capacity]
            at = next((i for i, one in enumerate(waiting) if one.event.done), None)
            buffer = self._make(capacity) if at is None else waiting.pop(at)
            buffer.taken = True
            buffer.cut(num_bytes)
        return buffer

    def _fill(self, capacity: int) -> None:
        if self._closed:
            raise ValueError("the pinned pool is closed")
        waiting = self._free.setdefault(capacity, [])
        while self._made.get(capacity, 0) < AT_LEAST:
            waiting.append(self._make(capacity))

    def _make(self, capacity: int) -> PinnedBuffer:
        event = self._make_event()
        buffer = PinnedBuffer(self, self._allocate(capacity, event), event)
        self._made[capacity] = self._made.get(capacity, 0) + 1
        return buffer

    def _release(self, buffer: PinnedBuffer) -> None:
        with self._lock:
            if not buffer.taken:
                raise ValueError("a pinned buffer was released that nobody has taken")
            buffer.taken = False
            if not self._closed:
                self._free[buffer.capacity].append(buffer)

    def close(self) -> None:
        """Drop the buffers. A buffer's memory goes back when no array of it is left, after its last copy;
        collecting the pool does the same."""
        with self._lock:
            self._closed = True
            self._free.clear()
            self._made.clear()


def _capacity(num_bytes: int) -> int:
    if num_bytes < 1:
        raise ValueError(f"a pinned buffer of {num_bytes} bytes; 1 or more are required")
    return max(SMALLEST, 1 << (num_bytes - 1).bit_length())


def pinned_memory(num_bytes: int, event: Any) -> npt.NDArray[np.uint8]:
    """u8[num_bytes] of page-locked memory, freed after `event` when no view of it is left."""
    address = driver.allocate_pinned(num_bytes, "the pinned pool")
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    driver.on_collect(memory, "cuMemFreeHost", address, after=event)
    return np.ctypeslib.as_array(memory)


def _require_pinned(name: str, buffer: Any) -> None:
    if not isinstance(buffer, PinnedBuffer):
        raise TypeError(
            f"{name} is a {type(buffer).__name__}: a copy from or to pageable memory makes the host wait; "
            "a PinnedBuffer of PinnedPool.take is required"
        )
    if not buffer.taken:
        raise ValueError(f"{name} has been released: take a buffer from the pool first")


def _checked_bytes(array: DeviceArray, buffer: PinnedBuffer, offset: int, num_bytes: int | None) -> int:
    if not array.contiguous:
        raise ValueError(f"a copy of a DeviceArray with shape {array.shape} and strides {array.strides}")
    size = array.nbytes if num_bytes is None else num_bytes
    if not 0 <= size <= array.nbytes:
        raise ValueError(f"{size:,} bytes of a DeviceArray of {array.nbytes:,}")
    if offset < 0 or offset + size > buffer.array.nbytes:
        raise ValueError(
            f"{size:,} bytes at offset {offset:,} are not inside a pinned buffer of {buffer.array.nbytes:,}"
        )
    return size


def upload_async(
    target: DeviceArray, source: PinnedBuffer, stream: Any, *, offset: int = 0, num_bytes: int | None = None
) -> None:
    """Queue a copy of source.array[offset:] to a contiguous array, and record source.event behind it.

    stream: a driver.Stream. num_bytes: of the array's beginning, None: all of it. TypeError for pageable
    memory; ValueError for sizes that do not fit.
    """
    _require_pinned("source", source)
    size = _checked_bytes(target, source, offset, num_bytes)
    if size:
        driver.copy_to_device(target.address, source.address + offset, size, stream)
    stream.record(source.event)


def download_async(
    target: PinnedBuffer, source: DeviceArray, stream: Any, *, offset: int = 0, num_bytes: int | None = None
) -> None:
    """Queue a copy of a contiguous array (num_bytes: of its beginning) to target.array[offset:], and record
    target.event behind it: wait for it before reading. TypeError for pageable memory; ValueError for sizes
    that do not fit."""
    _require_pinned("target", target)
    size = _checked_bytes(source, target, offset, num_bytes)
    if size:
        driver.copy_to_host(target.address + offset, source.address, size, stream)
    stream.record(target.event)
