"""A made-up GPU that keeps the real clock: the whole step runtime over it, so that the host's part of a step
can be timed where there is no GPU.

The calls of sharp/driver.py move times and nothing else: each stream knows when its last work will be over,
events remember it, who waits sleeps as long. Pinned memory is real, ids are all zero. Its figures are round
ones near what an H100 takes; nothing here is a measurement of one, and calls of a real driver take the host
some microseconds more.
"""

from __future__ import annotations

import ctypes
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
from fake_model import model_config
from graph_times import graph_like
from host_driver import HostDriver

from kernels_numba import compiler
from kernels_numba.ops.apply_step import StepLayout
from sharp import driver, graphs, runtime
from sharp.cuda_device import CudaDevice
from sharp.host_time import NoModel
from sharp.predictor import StepWork

COPY_S, KERNEL_S, GRAPH_S = 4e-6, 3e-6, 4e-6  # of a stream: a small copy, a small kernel, a graph's start
NAP_S = 200e-6  # what is left of a wait after sleeping, which may oversleep


class PacedDriver(HostDriver):
    """HostDriver's memory and handles; copies move no bytes."""

    def __init__(self):
        super().__init__(0)
        self.tails, self.times, self.next_graph_s = {}, {}, 0.0

    def _ok(self, *values):
        return (self.CUresult.CUDA_SUCCESS, *values)

    def _busy(self, stream, seconds):
        stream = driver.handle_of(stream)
        self.tails[stream] = max(time.perf_counter(), self.tails.get(stream, 0.0)) + seconds
        return self._ok()

    def _copy(self, target, source, num_bytes, stream, into, out_of):
        if into is self.pinned:
            ctypes.memset(target, 0, num_bytes)
        return self._busy(stream, COPY_S)

    def _sleep_until(self, end):
        while (left := end - time.perf_counter()) > 0:
            time.sleep(max(0.0, left - NAP_S))
        return self._ok()

    def cuStreamSynchronize(self, hStream):
        return self._sleep_until(self.tails.get(int(hStream), 0.0))

    def cuStreamWaitEvent(self, hStream, hEvent, Flags):
        stream = int(hStream)
        self.tails[stream] = max(self.tails.get(stream, 0.0), self.times.get(int(hEvent), 0.0))
        return self._ok()

    def cuEventRecord(self, hEvent, hStream):
        self.times[int(hEvent)] = max(time.perf_counter(), self.tails.get(int(hStream), 0.0))
        return self._ok()

    def cuEventQuery(self, hEvent):
        over = self.times.get(int(hEvent), 0.0) <= time.perf_counter()
        return (self.CUresult.CUDA_SUCCESS if over else self.CUresult.CUDA_ERROR_NOT_READY,)

    def cuEventSynchronize(self, hEvent):
        return self._sleep_until(self.times.get(int(hEvent), 0.0))

    def cuEventElapsedTime(self, hStart, hEnd):
        return self._ok(1e3 * (self.times[int(hEnd)] - self.times[int(hStart)]))

    def cuStreamBeginCapture(self, hStream, mode):
        return self._ok()

    def cuStreamEndCapture(self, hStream):
        return self._ok(self.real.CUgraph(1))

    def cuGraphGetNodes(self, hGraph, numNodes=0):
        return self._ok([], 1)

    def cuGraphInstantiate(self, hGraph, flags):
        return self._ok(self.real.CUgraphExec(1))

    def cuGraphDestroy(self, hGraph):
        return self._ok()

    cuGraphExecDestroy = cuGraphDestroy

    def cuGraphUpload(self, hGraphExec, hStream):
        return self._ok()

    def cuGraphLaunch(self, hGraphExec, hStream):
        return self._busy(hStream, GRAPH_S + self.next_graph_s)


class PacedModel(NoModel):
    """A model whose steps take graph_like's seconds of the real clock; the engine's runtime is the real one.

    scale: of those seconds."""

    overlaps = True

    def __init__(self, max_tokens=4096, max_seqs=256, max_model_len=4096, num_blocks=20_000, scale=1.0):
        super().__init__(model_config(max_model_len), num_blocks, 64)
        self.host, self.scale = driver._driver(), scale
        self.device = CudaDevice("bfloat16")
        self.device.kind = "cuda"
        layout = StepLayout(max_tokens, max_seqs, -(-max_model_len // 64))
        logits = SimpleNamespace()
        sampled = self.device.empty((max_seqs,), np.int32)
        ops = SimpleNamespace(sample=lambda *arguments, **options: None)
        self.runtime = runtime.Runtime(
            lambda *arguments: logits, ops, self.device, layout, logits, sampled, lambda pairs: None,
            graphs=True,
        )  # fmt: skip

    def capture(self, progress=False):
        for bucket in self.runtime.buckets.all():
            self.runtime.graphs.capture(bucket)

    def launch(self, plan):
        self.host.next_graph_s = self.scale * graph_like(StepWork.of(plan))
        return self.runtime.launch(plan)

    def land(self, launched):
        return self.runtime.land(launched)

    def close(self):
        pass


def install():
    """Put a PacedDriver under sharp/driver.py, for the rest of the process; returns it."""
    host = PacedDriver()
    driver.bind, driver._driver = (lambda: None), (lambda: host)
    compiler.cuda = SimpleNamespace(
        external_stream=lambda handle: SimpleNamespace(handle=handle),
        defer_cleanup=nullcontext,
        get_current_device=lambda: SimpleNamespace(compute_capability=(9, 0), name="made up", id=0),
    )
    graphs.keeping = lambda kept: nullcontext()
    runtime.prepare_apply_step = lambda *arrays: lambda stream: host._busy(stream, KERNEL_S)
    return host
