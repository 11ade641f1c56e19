"""What this process holds of a GPU's memory, whatever its neighbours do: free memory is the whole device's.

Counted where the product asks for it (sharp/driver.py) and where numba does. Graphs, modules and local memory
belong to the driver and are in neither; NVML tells them of each process, where it tells anything: in a
container it often does not know the process by its number.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sharp import driver

FREES = ("cuMemFree", "cuMemFreeHost")
NOT_TOLD = (1 << 64) - 1  # NVML_VALUE_NOT_AVAILABLE
ROOM = 512  # processes that can be on a device


@dataclass(frozen=True)
class Held:
    """Bytes: asked for on the device, and of pinned memory on the host; all that the driver counts for this
    process on the device (None where nothing tells)."""

    device: int
    pinned: int
    process: int | None


@contextmanager
def counted_memory() -> Iterator[Callable[[], Held]]:
    """Gives what says how much of what was asked for in here is held now."""
    sizes: dict[str, dict[int, int]] = {free: {} for free in FREES}
    allocate, allocate_pinned, on_collect = driver.allocate, driver.allocate_pinned, driver.on_collect

    def counting(asked: Callable[[int, str], int], free: str) -> Callable[[int, str], int]:
        def count(num_bytes: int, what: str) -> int:
            address = asked(num_bytes, what)
            sizes[free][address] = num_bytes
            return address

        return count

    def forgetting(owner: Any, destroy: str, handle: Any, after: Any = None) -> Any:
        finalizer = on_collect(owner, destroy, handle, after)
        if destroy not in FREES:
            return finalizer
        _, callback, arguments, _ = finalizer.peek()

        def free(*given: Any) -> None:
            sizes[destroy].pop(handle, None)  # first: another thread may get this address at once
            callback(*given)

        finalizer.detach()
        finalizer = weakref.finalize(owner, free, *arguments)
        finalizer.atexit = False
        return finalizer

    def held() -> Held:
        device, pinned = (sum(list(sizes[free].values())) for free in FREES)
        return Held(device + _numbas_bytes(), pinned, process_bytes())

    driver.allocate = counting(allocate, FREES[0])
    driver.allocate_pinned = counting(allocate_pinned, FREES[1])
    driver.on_collect = forgetting
    try:
        yield held
    finally:
        driver.allocate, driver.allocate_pinned, driver.on_collect = allocate, allocate_pinned, on_collect


def _numbas_bytes() -> int:
    """On the device, by numba's own arrays."""
    from kernels_numba import compiler

    if compiler.SIMULATOR or not compiler.AVAILABLE:
        return 0
    manager: Any = compiler.cuda.current_context().memory_manager
    return sum(memory.size for memory in list(manager.allocations.values()))


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t, of NVML's documentation."""

    _fields_ = (
        ("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong), ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )  # fmt: skip


def process_bytes() -> int | None:
    """What NVML says this process holds on the first CUDA device; None if it does not say."""
    try:
        return _ask(ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvidia-ml.so.1"), os.getpid())
    except (OSError, AttributeError):  # no such library, or one without these functions
        return None


def _ask(cuda: Any, nvml: Any, pid: int) -> int | None:
    device, address, handle = ctypes.c_int(0), ctypes.create_string_buffer(32), ctypes.c_void_p()
    count, processes = ctypes.c_uint(ROOM), (_Process * ROOM)()
    if cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetPCIBusId(address, len(address), device):
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        if nvml.nvmlDeviceGetHandleByPciBusId_v2(address, ctypes.byref(handle)):
            return None
        if nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), processes):
            return None
        used = [one.used for one in processes[: count.value] if one.pid == pid]
        return int(used[0]) if used and used[0] != NOT_TOLD else None
    finally:
        nvml.nvmlShutdown()
