"""CUDA graphs of steps, one a bucket: captured once, replayed by one call of the driver.

Knows: capture, instantiation, replay, what must live as long as a graph, and how much memory graphs take.
Refuses to know: what is launched in them, and what a step is.

What is captured are addresses. So everything that a captured launch reads stays where it is until close():
weights, pages, workspace and the fixed buffers belong to the model; tensor maps belong to prepared launches,
of which the ops remember the latest 4,096 only, so those of each capture are kept here.
"""

from __future__ import annotations

import gc
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sharp import driver
from sharp.buckets import Bucket

# What gives launches with the tensor maps that they read, or memory that launches share: the ops remember a
# limited number of each.
REMEMBERED = {
    "kernels_numba.ops.gemm.hopper": ("prepared",),
    "kernels_numba.ops.gemm.ladder.wgmma": ("_maps",),
    "kernels_numba.ops.gemm_few.hopper": ("prepared",),
    "kernels_numba.ops.decode_attention.tensor_core": ("prepared", "own_workspace"),
    "kernels_numba.ops.prefill_attention.hopper": ("prepared", "own_workspace"),
    "kernels_numba.ops.prefill_attention.mma_sync": ("prepared", "own_workspace"),
    "kernels_numba.ops.warp.lm_head": ("prepared", "own_workspace"),
    "kernels_numba.ops.sample.warp": ("own_workspace",),
}
# Bytes of the device that a launch in a graph takes. Not measured yet: meant to be too much.
NODE_BYTES = 16 << 10
_capturing = threading.Lock()  # one capture at a time in the process: see keeping()

Queue = Callable[[Bucket, Any], None]  # queues the launches of a bucket on a stream


def predicted_bytes(num_layers: int, num_graphs: int) -> int:
    """What graphs of a model take on the device at most: 12 launches a layer, 8 before and after them."""
    return num_graphs * (12 * num_layers + 8) * NODE_BYTES


@contextmanager
def keeping(kept: list[Any]) -> Iterator[None]:
    """Whatever the functions of REMEMBERED return inside goes to `kept` as well. Under _capturing, since it
    stands in for them meanwhile; what other threads get is kept too, which harms nobody."""
    found = [
        (module, name, getattr(module, name))
        for module, names in ((importlib.import_module(path), names) for path, names in REMEMBERED.items())
        for name in names
    ]

    def kept_too(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            kept.append(result)
            return result

        return wrapper

    try:
        for module, name, function in found:
            setattr(module, name, kept_too(function))
        yield
    finally:
        for module, name, function in found:
            setattr(module, name, function)


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage is collected outside: a finalizer that frees device memory would end a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graph:
    """One executable graph, and what must live as long. num_nodes: launches in it."""

    def __init__(self, work: Callable[[Any], None], stream: driver.Stream, what: str) -> None:
        """Capture what `work` queues on `stream`, which nothing else uses. All of it has run before: nothing
        is compiled, loaded or allocated inside. RuntimeError (CudaError) if the driver refuses; what `work`
        raises leaves the stream usable."""
        from kernels_numba import compiler

        cu = driver._driver()
        self.kept: list[Any] = []
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with _capturing, keeping(self.kept), compiler.cuda.defer_cleanup(), no_collection():
            driver.check(cu.cuStreamBeginCapture(stream.handle, mode), f"capturing {what}")
            try:
                work(compiler.cuda.external_stream(stream.handle))
            except BaseException:
                ended = cu.cuStreamEndCapture(stream.handle)
                if not int(ended[0]) and int(ended[1]):
                    cu.cuGraphDestroy(ended[1])
                raise
            graph = driver.check(cu.cuStreamEndCapture(stream.handle), f"capturing {what}")
        try:
            _, self.num_nodes = driver.check(cu.cuGraphGetNodes(graph), f"counting the nodes of {what}")
            self._executable = driver.check(cu.cuGraphInstantiate(graph, 0), f"making the graph of {what}")
        finally:
            driver.check(cu.cuGraphDestroy(graph), f"making the graph of {what}")
        self._what, self._cu = what, cu
        self.destroy = driver.on_collect(self, "cuGraphExecDestroy", self._executable)

    def upload(self, stream: driver.Stream) -> None:
        """Take the device memory that replays need now, and not at the first."""
        driver.check(self._cu.cuGraphUpload(self._executable, stream.handle), f"uploading {self._what}")

    def replay(self, stream: driver.Stream) -> None:
        """Queue all of it, behind what the stream holds and before what comes after."""
        driver.bind()
        driver.check(self._cu.cuGraphLaunch(self._executable, stream.handle), f"replaying {self._what}")


class Graphs:
    """The graphs of an engine by bucket, all replayed on one stream, so that they may share all memory."""

    def __init__(self, queue: Queue, stream: driver.Stream) -> None:
        self._queue, self._stream = queue, stream
        self._side = driver.Stream()  # captured on: work of other threads on the default stream ends nothing
        self._graphs: dict[Bucket, Graph] = {}
        self.num_bytes = 0  # by which free memory fell while graphs were made

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, bucket: Bucket) -> bool:
        return bucket in self._graphs

    @property
    def num_nodes(self) -> int:
        return sum(graph.num_nodes for graph in self._graphs.values())

    def capture(self, bucket: Bucket) -> None:
        """Make a bucket's graph. Its launches have been queued at least once before (Graph says why)."""
        before = driver.memory_info()[0]
        graph = Graph(lambda stream: self._queue(bucket, stream), self._side, f"bucket {bucket}")
        graph.upload(self._stream)
        self._stream.synchronize()
        self.num_bytes += max(0, before - driver.memory_info()[0])
        self._graphs[bucket] = graph

    def capture_all(self, buckets: Sequence[Bucket], warm: Callable[[Bucket], None], progress: bool) -> None:
        """Make the graphs that are missing; warm(bucket) queues a step without tokens first. progress: show a
        bar that names the bucket."""
        from tqdm.auto import tqdm

        missing = [bucket for bucket in buckets if bucket not in self]
        with tqdm(total=len(missing), disable=not progress, unit="graph", desc="capturing") as bar:
            for bucket in missing:
                bar.set_postfix_str(str(bucket))
                warm(bucket)
                self.capture(bucket)
                bar.update()

    def replay(self, bucket: Bucket) -> None:
        """Queue a bucket's graph. KeyError for one that was not captured."""
        self._graphs[bucket].replay(self._stream)

    def close(self) -> None:
        """Wait for the stream, then destroy the graphs and let go of what they kept."""
        if self._graphs and driver.poisoned() is None:
            self._stream.synchronize()
        for graph in self._graphs.values():
            graph.destroy()
        self._graphs.clear()
