"""Work captured into a CUDA graph on a GPU. Knows the driver's calls; refuses to know what is captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernels_numba.launch import stream_handle

OWN = 4 << 20  # bytes that the driver may take for a graph by itself


def checked(result: Any) -> Any:
    """The value of a driver call's result, which must be a success."""
    error, *rest = result
    assert int(error) == 0, error
    return rest[0] if rest else None


def captured(stream: Any, work: Callable[[], object]) -> Callable[[], None]:
    """`work` queued on the stream while it is captured -> a function that replays the graph on it."""
    from cuda.bindings import driver

    handle = driver.CUstream(stream_handle(stream))
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    checked(driver.cuStreamBeginCapture(handle, mode))
    work()
    graph = checked(driver.cuStreamEndCapture(handle))
    executable = checked(driver.cuGraphInstantiate(graph, 0))
    return lambda: checked(driver.cuGraphLaunch(executable, handle))
