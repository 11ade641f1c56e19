"""The CUDA driver's streams, events, copies and allocations, with errors that say what was being done.

Knows: cuda.bindings.driver, the primary context that numba's kernels run in too, which errors no process
survives, and forks. Refuses to know: arrays (memory.py), models, kernels. Nothing of CUDA is imported before
its first use, so that `poisoned` can be asked anywhere. Calls need a context that is current in their thread:
every function here sees to that (`bind`), and so to a clear error in a child of a process that used CUDA.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# After these no call of CUDA works in this process (documentation of CUresult), or its one context is lost.
STICKY = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ILLEGAL_ADDRESS", "LAUNCH_TIMEOUT", "ASSERT", "HARDWARE_STACK_ERROR", "ILLEGAL_INSTRUCTION",
        "MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE", "INVALID_PC", "LAUNCH_FAILED", "TENSOR_MEMORY_LEAK",
        "CONTAINED", "EXTERNAL_DEVICE", "MPS_CLIENT_TERMINATED", "ECC_UNCORRECTABLE", "NVLINK_UNCORRECTABLE",
        "CONTEXT_IS_DESTROYED",
    )
)  # fmt: skip
OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
RESTART = "CUDA is unusable in this process from here on: restart the kernel (or the process)"


class CudaError(RuntimeError):
    """A call of the driver that failed. name: of the error, as in "CUDA_ERROR_ILLEGAL_ADDRESS"; sticky:
    whether CUDA is lost to this process."""

    def __init__(self, what: str, name: str) -> None:
        self.name, self.sticky = name, name in STICKY
        super().__init__(f"{what}: the driver says {name}{f'. {RESTART}' if self.sticky else ''}")


class CudaOutOfMemory(CudaError, MemoryError):
    """Memory, of the device or pinned, that the driver did not have."""


class ForkedError(CudaError):
    """CUDA was used in a process that was forked from one in which it had started."""

    def __init__(self) -> None:
        RuntimeError.__init__(
            self,
            "CUDA had started before this process was forked, and cannot be used in the child; "
            'start processes with multiprocessing.get_context("spawn"), or fork before the first use of CUDA',
        )
        self.name, self.sticky = "CUDA_ERROR_NOT_INITIALIZED", False


# Whether CUDA works --------------------------------------------------------------------------------

_poison: tuple[str, str] | None = None  # what was being done when CUDA was lost, and the error's name
_started = False  # a context has been made, by this process or by the one that it was forked from
_forked = False
_thread = threading.local()  # .bound: the context is current in this thread


def poisoned() -> str | None:
    """What ended CUDA in this process, as one sentence for every caller of every engine; None while it
    works. Needs no CUDA to be asked."""
    return None if _poison is None else str(CudaError(*_poison))


def refuse_if_lost() -> None:
    """Raise that sentence as a CudaError, if there is one."""
    if _poison is not None:
        raise CudaError(*_poison)


def _fork_happened() -> None:
    global _forked
    _forked = _started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fork_happened)


def bind() -> None:
    """Make the primary context of the current device current in this thread, once a thread.

    Raises ForkedError in a child of a process where CUDA had started; what numba raises without a device.
    """
    global _started
    if _forked:
        raise ForkedError
    if not getattr(_thread, "bound", False):
        from kernels_numba import compiler

        compiler.cuda.current_context()  # pushes it, and leaves it there
        _started = _thread.bound = True


def _driver() -> Any:
    """cuda.bindings.driver, with a context current in this thread."""
    bind()
    from cuda.bindings import driver

    return driver


# Errors --------------------------------------------------------------------------------------------


def check(result: Any, what: str) -> Any:
    """The values of a driver call's result (one as it is, several as a tuple, else None).

    what: what was being done, for the error. Raises CudaError (CudaOutOfMemory for want of memory); a sticky
    one is remembered, see poisoned().
    """
    error = result[0]
    if int(error):
        raise _error(what, str(error.name))
    return result[1] if len(result) == 2 else tuple(result[1:]) or None


def _error(what: str, name: str) -> CudaError:
    global _poison
    error = CudaOutOfMemory(what, name) if name == OUT_OF_MEMORY else CudaError(what, name)
    if error.sticky and _poison is None:  # later errors are the first one's echo
        _poison = what, name
    return error


@contextmanager
def during(what: str) -> Iterator[None]:
    """Errors of CUDA from inside, numba's and those of kernel launches too, leave as CudaError with `what`
    at their end: which step, which plan. Others pass as they are."""
    try:
        yield
    except ForkedError:
        raise
    except Exception as error:
        found = re.search(r"CUDA_ERROR_\w+", str(error))
        if found is None:
            raise
        words = str(error).removesuffix(f". {RESTART}").removesuffix(f": the driver says {found.group()}")
        global _poison
        if _poison == (words, found.group()):
            _poison = None  # check() remembered it a moment ago, and did not know during what
        raise _error(f"{words}, during {what}", found.group()) from error


# Streams and events --------------------------------------------------------------------------------


def handle_of(stream: Any) -> int:
    """The CUstream of a Stream, of numba's stream or of an integer. ValueError for the default stream (0 or
    None), whose work waits for all other streams."""
    handle = getattr(stream, "handle", stream)
    number = int(getattr(handle, "value", handle) or 0)
    if number == 0:
        raise ValueError(f"stream is {stream!r}; one that was created is required, not the default stream")
    return number


def _quietly(destroy: Any, handle: Any, after: Event | None) -> None:
    """For finalizers: give something back if CUDA still works. An error here has nobody to go to, and what
    could cause one (a lost context, none at all) has freed everything already."""
    if _forked or _poison:
        return
    with suppress(Exception):
        bind()
        if after is not None:
            after.synchronize()
        destroy(handle)


def on_collect(
    owner: Any, destroy: str, handle: Any, after: Event | None = None
) -> weakref.finalize[Any, Any]:
    """Call the driver's `destroy` on the handle when `owner` is collected, or when what this returns is
    called; after an event if one is given. Not at the interpreter's exit, when all goes back anyway."""
    finalizer = weakref.finalize(owner, _quietly, getattr(_driver(), destroy), handle, after)
    finalizer.atexit = False
    return finalizer


class Event:
    """A point in a stream's work. timing: whether elapsed_ms may be asked."""

    def __init__(self, *, timing: bool = False) -> None:
        driver = _driver()
        flags = driver.CUevent_flags
        flag = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        self._event = check(driver.cuEventCreate(int(flag)), "creating an event")
        self._driver = driver
        on_collect(self, "cuEventDestroy", self._event)

    @property
    def handle(self) -> int:
        return int(self._event)

    @property
    def done(self) -> bool:
        """Whether the work recorded last has happened; True before the first record."""
        bind()
        result = self._driver.cuEventQuery(self._event)
        if result[0] == self._driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        check(result, "asking an event")
        return True

    def synchronize(self) -> None:
        """Wait until the work recorded last has happened; other Python threads run meanwhile."""
        bind()
        check(self._driver.cuEventSynchronize(self._event), "waiting for an event")

    def elapsed_ms(self, end: Event) -> float:
        """Milliseconds from this event to `end`, both made with timing, recorded, and done."""
        bind()
        result = self._driver.cuEventElapsedTime(self._event, end._event)
        return float(check(result, "the time between two events"))


class Stream:
    """A queue of work on the device. handle: the CUstream as an int. implicit: in order with the default
    stream, which numba's own copies use, and which may return before their data has arrived."""

    def __init__(self, *, implicit: bool = False) -> None:
        driver = _driver()
        flags = driver.CUstream_flags
        flag = flags.CU_STREAM_DEFAULT if implicit else flags.CU_STREAM_NON_BLOCKING
        stream = check(driver.cuStreamCreate(int(flag)), "creating a stream")
        self.handle, self._driver = int(stream), driver
        on_collect(self, "cuStreamDestroy", stream)

    def record(self, event: Event) -> None:
        """From here on `event` stands for all that has been queued on this stream so far."""
        bind()
        check(self._driver.cuEventRecord(event._event, self.handle), "recording an event")

    def wait(self, event: Event) -> None:
        """What is queued from here on starts after `event`; the host does not wait."""
        bind()
        check(self._driver.cuStreamWaitEvent(self.handle, event._event, 0), "making a stream wait")

    def synchronize(self) -> None:
        """Wait until everything queued has happened; other Python threads run meanwhile."""
        bind()
        check(self._driver.cuStreamSynchronize(self.handle), "waiting for a stream")


# Memory, by address --------------------------------------------------------------------------------


def memory_info() -> tuple[int, int]:
    """(free, total) bytes of the device, of all processes."""
    free, total = check(_driver().cuMemGetInfo(), "asking for free memory")
    return int(free), int(total)


def allocate(num_bytes: int, what: str) -> int:
    """The address of num_bytes (1 or more) of device memory, on a multiple of 256. CudaOutOfMemory names
    `what`, the bytes and what is free."""
    driver = _driver()
    result, words = driver.cuMemAlloc(num_bytes), f"{what}: {num_bytes:,} bytes of device memory"
    if result[0] == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise CudaOutOfMemory(f"{words}, {memory_info()[0]:,} free", OUT_OF_MEMORY)
    return int(check(result, words))


def allocate_pinned(num_bytes: int, what: str) -> int:
    """The address of num_bytes (1 or more) of page-locked host memory. CudaOutOfMemory names `what`."""
    driver = _driver()
    result = driver.cuMemHostAlloc(num_bytes, driver.CU_MEMHOSTALLOC_PORTABLE)
    return int(check(result, f"{what}: {num_bytes:,} bytes of pinned host memory"))


def copy_to_device(target: int, source: int, num_bytes: int, stream: Any, what: str = "a copy") -> None:
    """Queue a copy from pinned host memory; from pageable memory the driver would make the host wait."""
    result = _driver().cuMemcpyHtoDAsync(target, source, num_bytes, handle_of(stream))
    check(result, f"{what} to the device, {num_bytes:,} bytes")


def copy_to_host(target: int, source: int, num_bytes: int, stream: Any, what: str = "a copy") -> None:
    """Queue a copy into pinned host memory."""
    result = _driver().cuMemcpyDtoHAsync(target, source, num_bytes, handle_of(stream))
    check(result, f"{what} from the device, {num_bytes:,} bytes")


def copy_on_device(target: int, source: int, num_bytes: int, stream: Any, what: str = "a copy") -> None:
    """Queue a copy inside the device."""
    result = _driver().cuMemcpyDtoDAsync(target, source, num_bytes, handle_of(stream))
    check(result, f"{what} on the device, {num_bytes:,} bytes")


def fill(target: int, byte: int, num_bytes: int, stream: Any, what: str = "a fill") -> None:
    """Queue writing `byte` (0 to 255) into num_bytes of device memory."""
    result = _driver().cuMemsetD8Async(target, byte, num_bytes, handle_of(stream))
    check(result, f"{what}, {num_bytes:,} bytes")
