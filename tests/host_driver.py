"""A model of the CUDA driver over host memory, with streams that run as late and as mixed as they may.

Copies, fills and ops wait in their streams' queues. Whoever calls anything here lets some of them happen, of
streams drawn at random: in order within a stream, after the events that the stream was made to wait for, and
in no other order. So a hand-over without its event gives wrong bytes for some seed, memory that is freed or
not pinned is an error at once, and code over sharp/driver.py runs where there is no GPU. It proves nothing
about one: it is what the documentation of these calls promises, written down, and no more.
"""

from __future__ import annotations

import ctypes
import inspect
import random
import threading
from collections import deque
from types import SimpleNamespace

import numpy as np

from kernels_numba import compiler
from sharp import driver
from sharp.device_array import DeviceArray

TOTAL_BYTES = 1 << 30
ALIGNMENT = 256


class Memory:
    """One allocation: its bytes, on a multiple of 256."""

    def __init__(self, num_bytes):
        self.raw = np.full(num_bytes + ALIGNMENT, 0xFF, np.uint8)  # NaN in each element type
        self.address = -(-self.raw.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.num_bytes = num_bytes


class HostDriver:
    """The calls of cuda.bindings.driver that sharp/driver.py makes, with their names and results."""

    CU_MEMHOSTALLOC_PORTABLE = 1

    def __init__(self, seed):
        from cuda.bindings import driver as real

        self.CUresult, self.CUstream_flags, self.CUevent_flags = (
            real.CUresult, real.CUstream_flags, real.CUevent_flags,
        )  # fmt: skip
        self.real = real
        self.random = random.Random(seed)
        self.device, self.pinned = {}, {}  # address -> Memory
        self.streams, self.events = {}, {}  # handle -> queue; handle -> what its last record waits for
        self.recorded = {}  # (event, serial) that have happened
        self.serial, self.lock = 0, threading.RLock()
        self.waits = 0  # of the host
        self.peak = 0

    # What happens in its own time

    def _happen(self, at_most):
        """Run up to at_most queued things, of streams drawn at random; False if none can run."""
        moved = False
        with self.lock:
            for _ in range(at_most):
                ready = [queue for queue in self.streams.values() if queue and queue[0][0]()]
                if not ready:
                    break
                moved = True
                self.random.choice(ready).popleft()[1]()
        return moved

    def _ok(self, *values):
        self._happen(self.random.choice([0, 0, 0, 1, 2, 5]))
        return (self.CUresult.CUDA_SUCCESS, *values)

    def _until(self, over):
        self.waits += 1
        while not over():
            assert self._happen(1) or over(), "the streams wait for each other for ever"
        return (self.CUresult.CUDA_SUCCESS,)

    def queue(self, stream, what):
        """Queue a call on a stream."""
        self.streams[driver.handle_of(stream)].append((lambda: True, what))

    # Memory

    def _allocate(self, where, num_bytes):
        assert num_bytes > 0
        if num_bytes > TOTAL_BYTES - self.used():
            return (self.CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0)
        memory = Memory(num_bytes)
        where[memory.address] = memory
        self.peak = max(self.peak, self.used())
        return self._ok(memory.address)

    def used(self):
        return sum(memory.num_bytes for memory in self.device.values())

    def _inside(self, where, address, num_bytes):
        found = any(
            m.address <= address and address + num_bytes <= m.address + m.num_bytes for m in where.values()
        )
        assert found, f"{num_bytes} bytes at {address:#x} are in no living allocation"

    def view(self, array):
        """A DeviceArray as numpy's; what is in it may not have arrived yet."""
        if not isinstance(array, DeviceArray):
            return array
        last = sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True))
        span = last + array.dtype.itemsize if array.size else 0
        self._inside(self.device, array.address, span)
        raw = (ctypes.c_uint8 * max(span, 1)).from_address(array.address)
        return np.ndarray(array.shape, array.dtype, raw, 0, array.strides)

    def cuMemAlloc(self, bytesize):
        return self._allocate(self.device, bytesize)

    def cuMemFree(self, dptr):
        while self._happen(1):  # "may perform implicit synchronization", and does
            pass
        del self.device[dptr]
        return self._ok()

    def cuMemHostAlloc(self, bytesize, Flags):
        return self._allocate(self.pinned, bytesize)

    def cuMemFreeHost(self, p):
        del self.pinned[p]
        return self._ok()

    def cuMemGetInfo(self):
        return self._ok(TOTAL_BYTES - self.used(), TOTAL_BYTES)

    def _copy(self, target, source, num_bytes, stream, into, out_of):
        self._inside(into, target, num_bytes)
        self._inside(out_of, source, num_bytes)

        def happens():
            self._inside(into, target, num_bytes)
            self._inside(out_of, source, num_bytes)
            ctypes.memmove(target, source, num_bytes)

        self.queue(stream, happens)
        return self._ok()

    def cuMemcpyHtoDAsync(self, dstDevice, srcHost, ByteCount, hStream):
        return self._copy(dstDevice, srcHost, ByteCount, hStream, self.device, self.pinned)

    def cuMemcpyDtoHAsync(self, dstHost, srcDevice, ByteCount, hStream):
        return self._copy(dstHost, srcDevice, ByteCount, hStream, self.pinned, self.device)

    def cuMemcpyDtoDAsync(self, dstDevice, srcDevice, ByteCount, hStream):
        return self._copy(dstDevice, srcDevice, ByteCount, hStream, self.device, self.device)

    def cuMemsetD8Async(self, dstDevice, uc, N, hStream):
        self._inside(self.device, dstDevice, N)
        self.queue(hStream, lambda: ctypes.memset(dstDevice, uc, N))
        return self._ok()

    # Streams and events

    def cuStreamCreate(self, Flags):
        with self.lock:
            handle = self.real.CUstream(0x1000 + len(self.streams))
            self.streams[int(handle)] = deque()
        return self._ok(handle)

    def cuStreamDestroy(self, hStream):
        return self._ok()

    def cuStreamSynchronize(self, hStream):
        queue = self.streams[hStream]
        return self._until(lambda: not queue)

    def cuStreamWaitEvent(self, hStream, hEvent, Flags):
        serial = self.events[int(hEvent)]  # of now: later records do not count
        self.streams[hStream].append((lambda: serial in self.recorded, lambda: None))
        return self._ok()

    def cuEventCreate(self, Flags):
        with self.lock:
            handle = self.real.CUevent(0x9000_0000 + len(self.events))
            self.events[int(handle)] = 0
        self.recorded[0] = True  # an event that was never recorded stands for nothing
        return self._ok(handle)

    def cuEventDestroy(self, hEvent):
        return self._ok()

    def cuEventRecord(self, hEvent, hStream):
        with self.lock:
            self.serial += 1
            serial = self.events[int(hEvent)] = self.serial
            self.queue(hStream, lambda: self.recorded.setdefault(serial, True))
        return self._ok()

    def cuEventQuery(self, hEvent):
        self._ok()
        over = self.events[int(hEvent)] in self.recorded
        return (self.CUresult.CUDA_SUCCESS if over else self.CUresult.CUDA_ERROR_NOT_READY,)

    def cuEventSynchronize(self, hEvent):
        serial = self.events[int(hEvent)]
        return self._until(lambda: serial in self.recorded)


def as_documented(name):
    """The parameters of a call as cuda.bindings documents them."""
    from cuda.bindings import driver as real

    head = getattr(real, name).__doc__.split("\n", 1)[0]
    inside = head[head.index("(") + 1 : head.rindex(")")]
    return [part.split(":")[0].split()[-1] for part in inside.split(",") if part.strip()]


def calls():
    """Names of the calls that the model has."""
    return [name for name, _ in inspect.getmembers(HostDriver, inspect.isfunction) if name.startswith("cu")]


def install(monkeypatch, seed):
    """Put a HostDriver under sharp/driver.py, and a device of no particular kind under numba's name."""
    host = HostDriver(seed)
    monkeypatch.setattr(driver, "bind", lambda: None)
    monkeypatch.setattr(driver, "_driver", lambda: host)
    monkeypatch.setattr(
        compiler,
        "cuda",
        SimpleNamespace(
            external_stream=lambda handle: SimpleNamespace(handle=handle),
            get_current_device=lambda: SimpleNamespace(compute_capability=(7, 5), name="a model", id=0),
        ),
    )
    return host


def deferred(host, ops):
    """Ops of the reference over device arrays: a call waits in its stream's queue, as a launch does."""

    def defer(op):
        def launch(*arguments, stream, **options):
            host.queue(
                stream,
                lambda: op(*map(host.view, arguments), **{name: host.view(v) for name, v in options.items()}),
            )
            host._ok()

        return launch

    return SimpleNamespace(**{name: defer(op) for name, op in vars(ops).items()})
