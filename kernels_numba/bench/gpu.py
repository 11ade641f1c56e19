"""The device side of timing: one stream, graphs captured through the driver, events.

Knows: streams and events. Refuses to know: what is queued. Plain kernels launch through numba's dispatcher,
which takes numba's streams; prepared launches take these or integer handles: so a contender gets numba's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba.bench.timing import cold_bytes
from kernels_numba.compiler import cuda
from kernels_numba.launch import stream_handle
from kernels_numba.ops.gemm.door import refusal
from kernels_numba.ops.warp.door import NEEDS, RUNG

COPY_BYTES, COPIES = 64 << 20, 8


def _check(result: Any, what: str) -> Any:
    error, *rest = result
    if int(error):
        raise RuntimeError(f"{what}: the driver says {error.name}")
    return rest[0] if rest else None


class DriverLane:
    """See timing.Lane. release() destroys the graphs."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        cuda.current_context()
        self.stream, self._driver = cuda.stream(), driver
        self.cold_bytes = cold_bytes(int(cuda.get_current_device().L2_CACHE_SIZE))
        self._handle = driver.CUstream(stream_handle(self.stream))
        self._start, self._end = (_check(driver.cuEventCreate(0), "making an event") for _ in range(2))
        self._graphs: list[Any] = []

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Whatever fails inside leaves the stream usable."""
        driver, handle = self._driver, self._handle
        cuda.synchronize()
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with cuda.defer_cleanup():  # memory must not be freed while a stream is captured
            _check(driver.cuStreamBeginCapture(handle, mode), "capturing")
            try:
                work()
            except BaseException:
                driver.cuStreamEndCapture(handle)
                raise
            graph = _check(driver.cuStreamEndCapture(handle), "capturing")
        executable = _check(driver.cuGraphInstantiate(graph, 0), "making a graph")
        _check(driver.cuGraphDestroy(graph), "making a graph")
        self._graphs.append(executable)
        return lambda: _check(driver.cuGraphLaunch(executable, handle), "launching a graph")

    def elapsed_us(self, work: Callable[[], Any]) -> float:
        driver = self._driver
        cuda.synchronize()
        _check(driver.cuEventRecord(self._start, self._handle), "timing")
        work()
        _check(driver.cuEventRecord(self._end, self._handle), "timing")
        _check(driver.cuEventSynchronize(self._end), "waiting for a kernel")
        return float(_check(driver.cuEventElapsedTime(self._start, self._end), "timing")) * 1e3

    def release(self) -> None:
        """Destroy the captured graphs, and free what waits to be freed."""
        for executable in self._graphs:
            _check(self._driver.cuGraphExecDestroy(executable), "destroying a graph")
        self._graphs.clear()
        cuda.current_context().deallocations.clear()


def copy_gbs(rounds: int = 5) -> float:
    """GB/s, read and written, at which the driver copies COPY_BYTES within the device, out of memory that L2
    has lost; the best of `rounds` replays of a graph of COPIES copies."""
    from kernels_numba.bench.contest import device_lane

    lane = device_lane()
    buffers = [cuda.device_array(COPY_BYTES, np.uint8) for _ in range(2 * COPIES)]
    places = [int(buffer.__cuda_array_interface__["data"][0]) for buffer in buffers]

    def copies() -> None:
        for source, target in zip(places[::2], places[1::2], strict=True):
            result = lane._driver.cuMemcpyDtoDAsync(target, source, COPY_BYTES, lane._handle)
            _check(result, "copying device memory")

    replay = lane.capture(copies)
    times = [lane.elapsed_us(replay) for _ in range(rounds + 1)]
    lane.release()
    return float(2 * COPIES * COPY_BYTES / min(times[1:]) / 1e3)


def runs_on(rung: str, capability: tuple[int, int]) -> bool:
    """Whether a rung of this name is meant for a device: numba-cuda's oldest is 7.5, tensor-core rungs have
    needs of their own."""
    if rung == RUNG and capability < NEEDS:
        return False
    rung = "hopper" if rung == "unconstrained" else rung  # of decode attention: the same kernel
    return capability >= (7, 5) and not refusal(rung, capability, "bfloat16", ())


def capability() -> tuple[int, int]:
    """Of the current device."""
    major, minor = cuda.get_current_device().compute_capability
    return int(major), int(minor)
