"""What a process holds of a device is counted (held_memory.py): over a model of the driver, and of NVML."""

from __future__ import annotations

import ctypes
import gc
from types import SimpleNamespace

import held_memory
import host_driver
import numpy as np
from held_memory import ROOM, counted_memory

from sharp.memory import Arena, PinnedPool, device_array


def test_what_is_asked_for_is_counted_until_it_is_free(monkeypatch):
    host_driver.install(monkeypatch, 0)
    before = device_array((1000,), np.uint8, "before")
    with counted_memory() as held:
        assert (held().device, held().pinned) == (0, 0)
        arena, pool = Arena(1 << 16), PinnedPool()
        array = device_array((5000,), np.uint8, "array")
        pool.reserve(1 << 13)
        assert (held().device, held().pinned) == ((1 << 16) + 5120, 2 << 13)
        arena.close()
        assert held().device == 5120
        del array, arena, before
        pool.close()
        gc.collect()
        assert (held().device, held().pinned) == (0, 0)
        kept = device_array((1,), np.uint8, "kept")
        assert held().device == 256
    device_array((1,), np.uint8, "after")
    assert held().device == 256
    del kept


def nvml(processes, code=0):
    """(libcuda, libnvidia-ml) that list these (pid, used)."""

    def listed(handle, count, array):
        count = ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))
        assert count[0] == ROOM
        count[0] = len(processes)
        for place, (pid, used) in enumerate(processes):
            array[place].pid, array[place].used = pid, used
        return code

    def fine(*_):
        return 0

    cuda = SimpleNamespace(cuDeviceGet=fine, cuDeviceGetPCIBusId=fine)
    names = ("nvmlInit_v2", "nvmlShutdown", "nvmlDeviceGetHandleByPciBusId_v2")
    library = SimpleNamespace(**dict.fromkeys(names, fine))
    library.nvmlDeviceGetComputeRunningProcesses_v3 = listed
    return cuda, library


def test_nvml_tells_this_processs_bytes_or_nothing():
    assert ctypes.sizeof(held_memory._Process) == 24
    assert held_memory._ask(*nvml([(5, 100), (7, 300)]), 7) == 300
    assert held_memory._ask(*nvml([(5, 100)]), 7) is None
    assert held_memory._ask(*nvml([(7, held_memory.NOT_TOLD)]), 7) is None
    assert held_memory._ask(*nvml([(7, 300)], code=3), 7) is None
