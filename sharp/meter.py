"""Readings of a device for the probe: bytes taken, the peak of a call, and copy bandwidth.

Knows /proc, the CUDA driver (driver.py), and NVML through ctypes. Refuses to know models and budgets.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sharp import driver
from sharp.device import Device
from sharp.memory import device_array, pinned_memory

COPY_BYTES = (1 << 16, 1 << 20, 1 << 24, 1 << 26)  # 64 KiB is a step's indices, 64 MiB a layer of weights
ROUNDS = 5


class Meter(Protocol):
    """How many bytes of a device are taken."""

    def free(self) -> int: ...
    def total(self) -> int: ...
    def used(self) -> int: ...
    def start_peak(self) -> None: ...
    def look(self) -> None: ...
    def peak(self) -> int: ...


class HostMeter:
    """Host memory: what this process holds resident, without mapped files (they are the system's to drop)."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._before = 0

    def free(self) -> int:
        return self._device.free_bytes()

    def total(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def used(self) -> int:
        """Bytes of anonymous memory of this process.

        A /proc that does not tell anonymous memory apart gives all that is resident; where there is no /proc
        either, the largest size so far stands in, which never falls.
        """
        return _status("RssAnon") or _status("VmRSS") or _largest()

    def start_peak(self) -> None:
        """From here on peak() counts. Linux forgets its old high-water mark when asked; others do not."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS") or _largest()

    def look(self) -> None:
        """Nothing to do: the kernel keeps the high-water mark."""

    def peak(self) -> int:
        """Most bytes beyond those at start_peak() that were resident at any moment since."""
        return max(0, (_status("VmHWM") or _largest()) - self._before)


def _status(name: str) -> int:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _largest() -> int:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024  # macOS counts bytes, the others KiB


class CudaMeter:
    """Device memory as the driver reports it: of all processes, as what another holds is not free here."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._before = self._least = 0

    def free(self) -> int:
        return self._device.free_bytes()

    def total(self) -> int:
        from kernels_numba import compiler

        if compiler.SIMULATOR:
            return self._device.free_bytes()
        return driver.memory_info()[1]

    def used(self) -> int:
        return self.total() - self.free()

    def start_peak(self) -> None:
        self._before = self._least = self.free()

    def look(self) -> None:
        """Read the free memory while a step is queued: what its launches allocated is held now."""
        self._least = min(self._least, self.free())

    def peak(self) -> int:
        self.look()
        return max(0, self._before - self._least)


def open_meter(device: Device) -> Meter:
    return HostMeter(device) if device.kind == "cpu" else CudaMeter(device)


def free_before_context() -> tuple[int, int] | None:
    """(free, total) bytes of the first visible CUDA device, without making a context; None if nothing tells.

    What a context takes shows only from outside of it, so this asks NVML, by the PCI address of the device
    that the driver lists first (CUDA_VISIBLE_DEVICES counts for one and not for the other).
    """
    try:
        return _ask_nvml(ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvidia-ml.so.1"))
    except (OSError, AttributeError):  # no such library, or one without these functions
        return None


def _ask_nvml(cuda: Any, nvml: Any) -> tuple[int, int] | None:
    device, address = ctypes.c_int(0), ctypes.create_string_buffer(32)
    handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if cuda.cuDeviceGetPCIBusId(address, len(address), device) or nvml.nvmlInit_v2():
        return None
    try:
        if nvml.nvmlDeviceGetHandleByPciBusId_v2(address, ctypes.byref(handle)):
            return None
        failed = nvml.nvmlDeviceGetMemoryInfo(handle, memory)
        return None if failed else (int(memory[1]), int(memory[0]))
    finally:
        nvml.nvmlShutdown()


def copy_bandwidth(device: Device) -> list[dict[str, Any]]:
    """Bytes per second of copies, a row for each way and size: {"way", "bytes", "bytes_per_s"}.

    CUDA: to the device, from it, and both at once (bytes of both counted), from pinned and from pageable
    memory. Host: memory to memory, the bytes counted once. Median of 5, after one that does not count.
    """
    from kernels_numba import compiler

    if device.kind == "cuda" and not compiler.SIMULATOR:
        return _cuda_copies()
    rows = []
    for size in COPY_BYTES:
        source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)

        def copy(target: Any = target, source: Any = source) -> None:
            np.copyto(target, source)

        rows.append(_row("memory to memory", size, _median(copy)))
    return rows


def _cuda_copies() -> list[dict[str, Any]]:
    up, down = driver.Stream(), driver.Stream()
    rows = []
    for size in COPY_BYTES:
        arrays = [device_array((size,), np.uint8, "the bandwidth's array") for _ in range(2)]
        there, back = (array.address for array in arrays)
        for memory in ("pinned", "pageable"):
            source, target = (_host_memory(memory, size) for _ in range(2))
            source[:], target[:] = 1, 1

            def to_device(there: int = there, source: Any = source) -> None:
                driver.copy_to_device(there, source.ctypes.data, source.nbytes, up)
                up.synchronize()

            def from_device(back: int = back, target: Any = target) -> None:
                driver.copy_to_host(target.ctypes.data, back, target.nbytes, down)
                down.synchronize()

            def both(
                there: int = there, back: int = back, source: Any = source, target: Any = target
            ) -> None:
                driver.copy_to_device(there, source.ctypes.data, source.nbytes, up)
                driver.copy_to_host(target.ctypes.data, back, target.nbytes, down)
                up.synchronize()
                down.synchronize()

            rows.append(_row(f"to the device, {memory}", size, _median(to_device)))
            rows.append(_row(f"from the device, {memory}", size, _median(from_device)))
            rows.append(_row(f"both at once, {memory}", 2 * size, _median(both)))
    return rows


def _host_memory(kind: str, size: int) -> Any:
    return pinned_memory(size, driver.Event()) if kind == "pinned" else np.empty(size, np.uint8)


def _median(call: Callable[[], None]) -> float:
    call()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _row(way: str, size: int, seconds: float) -> dict[str, Any]:
    return {"way": way, "bytes": size, "bytes_per_s": size / seconds}
