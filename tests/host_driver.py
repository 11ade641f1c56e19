"""A model of the CUDA driver over host memory, with streams that run as late and as mixed as they may.

Copies, fills and ops wait in their streams' queues. Whoever calls anything here lets some of them happen, of
streams drawn at random: in order within a stream, after the events that the stream was made to wait for, and
in no other order. So a hand-over without its event gives wrong bytes for some seed, memory that is freed or
not pinned is an error at once, and code over sharp/driver.py runs where there is no GPU. It proves nothing
about one: it is what the documentation of these calls promises, written down, and no more.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import pkgutil
import random
import threading
from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np

import kernels_numba.ops as kernels
from kernels_numba import compiler
from kernels_numba.ops import apply_step
from sharp import driver, runtime
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
        self.CUstreamCaptureMode = real.CUstreamCaptureMode
        self.real = real
        self.random = random.Random(seed)
        self.device, self.pinned = {}, {}  # address -> Memory
        self.streams, self.events = {}, {}  # handle -> queue; handle -> what its last record waits for
        self.recorded = {}  # (event, serial) that have happened
        self.serial, self.lock = 0, threading.RLock()
        self.waits = 0  # of the host
        self.peak = 0
        self.captures = {}  # handle of a stream that is captured -> what was queued on it
        self.graphs, self.executables, self.replays = {}, {}, 0
        self.held = set()  # streams that stand still until somebody waits for them
        self.interrupted, self.interruptions = 0.0, 0  # how often Ctrl-C comes where something is queued

    # What happens in its own time

    def _happen(self, at_most):
        """Run up to at_most queued things, of streams drawn at random; False if none can run."""
        moved = False
        with self.lock:
            for _ in range(at_most):
                ready = [
                    queue
                    for handle, queue in self.streams.items()
                    if queue and handle not in self.held and queue[0][0]()
                ]
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
        self.held.clear()
        while not over():
            assert self._happen(1) or over(), "the streams wait for each other for ever"
        return (self.CUresult.CUDA_SUCCESS,)

    def queue(self, stream, what):
        """Queue a call on a stream, or put it into the graph that is being captured there."""
        self.ctrl_c()
        handle = driver.handle_of(stream)
        if handle in self.captures:
            self.captures[handle].append(what)
        else:
            self.streams[handle].append((lambda: True, what))

    def ctrl_c(self):
        """Now and then, what the user does in the middle of it."""
        if self.random.random() < self.interrupted:
            self.interruptions += 1
            raise KeyboardInterrupt

    # Memory

    def _allocate(self, where, num_bytes):
        assert num_bytes > 0
        if self.captures:
            return (self.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, None)
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
            serial = self.serial
            self.queue(hStream, lambda: self.recorded.setdefault(serial, True))
            self.events[int(hEvent)] = serial
        return self._ok()

    def cuEventQuery(self, hEvent):
        self._ok()
        over = self.events[int(hEvent)] in self.recorded
        return (self.CUresult.CUDA_SUCCESS if over else self.CUresult.CUDA_ERROR_NOT_READY,)

    def cuEventSynchronize(self, hEvent):
        serial = self.events[int(hEvent)]
        return self._until(lambda: serial in self.recorded)

    def cuEventElapsedTime(self, hStart, hEnd):
        both = (self.events[int(event)] for event in (hStart, hEnd))
        over = all(serial and serial in self.recorded for serial in both)
        return (self.CUresult.CUDA_SUCCESS if over else self.CUresult.CUDA_ERROR_NOT_READY, 1.0)

    # Graphs

    def cuStreamBeginCapture(self, hStream, mode):
        assert mode == self.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        assert not self.streams[hStream], "a stream that is captured has work"
        self.captures[hStream] = []
        return self._ok()

    def cuStreamEndCapture(self, hStream):
        graph = self.real.CUgraph(0x7000_0000 + len(self.graphs))
        self.graphs[int(graph)] = self.captures.pop(hStream)
        return self._ok(graph)

    def cuGraphGetNodes(self, hGraph, numNodes=0):
        return self._ok([], len(self.graphs[int(hGraph)]))

    def cuGraphInstantiate(self, hGraph, flags):
        executable = self.real.CUgraphExec(0x6000_0000 + len(self.executables))
        self.executables[int(executable)] = self.graphs[int(hGraph)]
        return self._ok(executable)

    def cuGraphDestroy(self, hGraph):
        self.graphs[int(hGraph)] = None
        return self._ok()

    def cuGraphUpload(self, hGraphExec, hStream):
        assert self.executables[int(hGraphExec)] is not None
        return self._ok()

    def cuGraphLaunch(self, hGraphExec, hStream):
        for what in self.executables[int(hGraphExec)]:
            self.queue(hStream, what)
        self.replays += 1
        return self._ok()

    def cuGraphExecDestroy(self, hGraphExec):
        self.executables[int(hGraphExec)] = None
        return self._ok()


def as_documented(name):
    """The parameters of a call as cuda.bindings documents them."""
    from cuda.bindings import driver as real

    head = getattr(real, name).__doc__.split("\n", 1)[0]
    inside = head[head.index("(") + 1 : head.rindex(")")]
    return [part.split(":")[0].split("=")[0].split()[-1] for part in inside.split(",") if part.strip()]


def calls():
    """Names of the calls that the model has."""
    return [name for name, _ in inspect.getmembers(HostDriver, inspect.isfunction) if name.startswith("cu")]


def install(monkeypatch, seed):
    """Put a HostDriver under sharp/driver.py, and a device of no particular kind under numba's name."""
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        importlib.import_module(
            module.name
        )  # each takes numba's name when it is imported: the real one, then
    host = HostDriver(seed)
    monkeypatch.setattr(driver, "bind", lambda: None)
    monkeypatch.setattr(driver, "_driver", lambda: host)
    monkeypatch.setattr(
        compiler,
        "cuda",
        SimpleNamespace(
            external_stream=lambda handle: SimpleNamespace(handle=handle),
            defer_cleanup=nullcontext,
            get_current_device=lambda: SimpleNamespace(compute_capability=(7, 5), name="a model", id=0),
        ),
    )

    def prepare(state, packed, sampled, layout):
        def apply(stream):
            arrays = (state, packed, sampled)
            host.queue(stream, lambda: apply_step.apply_step_reference(*map(host.view, arrays), layout))

        return apply

    monkeypatch.setattr(runtime, "prepare_apply_step", prepare)
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
