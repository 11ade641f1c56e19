"""Arguments for an op at real sizes: random numbers made on the device, small index arrays on the host.

Knows: bfloat16 arrays, poison, what of a call can be read back. Refuses to know: what an op computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from kernels_numba.compiler import SIMULATOR, STORAGE, cuda, element, jit
from kernels_numba.inputs import Call, Cut
from kernels_numba.philox import make_philox

THREADS = 2 if SIMULATOR else 256
POISON = {
    np.dtype(np.uint16): 0x7FC0,
    np.dtype(np.float32): np.nan,
    np.dtype(np.int32): -7,
}  # NaN, NaN, no id


@cache
def make_normal_kernel(dtype: str, threads: int = THREADS) -> Any:
    """flat[i] = scale x a standard normal number, from Philox words of counter i // 4 by Box and Muller 1958.

    Arguments: flat T[n], seed u32, scale f32. Who does what: a thread makes four neighbours.
    """
    philox, from_float = make_philox(), element(dtype).from_float

    @jit()
    def normal_kernel(flat: Any, seed: Any, scale: Any) -> None:
        quad = cuda.blockIdx.x * threads + cuda.threadIdx.x
        words = cuda.local.array(4, np.uint32)
        if quad * 4 < flat.shape[0]:
            words[0], words[1], words[2], words[3] = philox(
                np.uint32(quad), np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(seed), np.uint32(0)
            )
            for pair in range(2):
                first = np.float32(words[2 * pair] >> np.uint32(9)) + np.float32(0.5)
                second = np.float32(words[2 * pair + 1] >> np.uint32(9)) + np.float32(0.5)
                log = np.float32(math.log(first * np.float32(2.0**-23)))
                radius = scale * np.float32(math.sqrt(np.float32(-2.0) * log))
                angle = second * np.float32(2.0**-22 * math.pi)
                i = quad * 4 + 2 * pair
                if i < flat.shape[0]:
                    flat[i] = from_float(radius * np.float32(math.cos(angle)))
                if i + 1 < flat.shape[0]:
                    flat[i + 1] = from_float(radius * np.float32(math.sin(angle)))

    return normal_kernel


@cache
def make_fill_kernel(threads: int = THREADS) -> Any:
    """flat[i] = value. Arguments: flat T[n], value T."""

    @jit()
    def fill_kernel(flat: Any, value: Any) -> None:
        i = cuda.blockIdx.x * threads + cuda.threadIdx.x
        if i < flat.shape[0]:
            flat[i] = value

    return fill_kernel


def poison(array: Any) -> None:
    """Fill a contiguous output with NaN (int32: -7), so that what a kernel does not write is seen."""
    if array.size:
        value = array.dtype.type(POISON[array.dtype])
        make_fill_kernel()[-(-array.size // THREADS), THREADS](array.reshape(array.size), value)


class Maker:
    """Makes the arrays of one buffer set; `shared` ones belong to all sets of a workload."""

    def __init__(self, index: int, shared: dict[str, Any]) -> None:
        self.rng = np.random.default_rng(index)
        self._shared = shared
        self._seed = index * 64

    def normal(self, *shape: int, scale: float = 1.0, dtype: str = "bfloat16") -> Any:
        """Random normal elements on the device; float32, or bfloat16 bits as uint16."""
        array = cuda.device_array(shape, STORAGE[dtype])
        self._seed += 1
        if array.size:
            grid = -(-array.size // (4 * THREADS))
            flat = array.reshape(array.size)
            make_normal_kernel(dtype)[grid, THREADS](flat, np.uint32(self._seed), np.float32(scale))
        return array

    def blank(self, *shape: int, dtype: str = "bfloat16") -> Any:
        """An output, unset."""
        return cuda.device_array(shape, np.int32 if dtype == "int32" else STORAGE[dtype])

    def upload(self, array: Any, dtype: Any = np.int32) -> Any:
        """A host array on the device."""
        return cuda.to_device(np.ascontiguousarray(array, dtype))

    def shared(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gave when this name was first asked for."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]


def to_host(array: Any) -> Any:
    """A device array as numpy; uint16 as the bfloat16 that it means."""
    host = array.copy_to_host()
    return host.view(ml_dtypes.bfloat16) if host.dtype == np.uint16 else host


def read(call: Call, name: str, rows: slice = slice(None)) -> Any:
    """Rows of an argument on the host, cut from the buffer in which it lies."""
    value = call.args[name]
    if isinstance(value, Cut):
        return to_host(call.buffers[value.buffer][rows])[:, value.start : value.stop]
    return to_host(value[rows])


def read_pages(call: Call, name: str, pages: Any) -> Any:
    """Single pages of a cache, in the order given."""
    cache_array = call.args[name]
    none = to_host(cache_array[0:1])[:0]
    return np.concatenate([none, *(to_host(cache_array[int(page) : int(page) + 1]) for page in pages)])


def holes(array: Any) -> int:
    """How many elements of an output are NaN, or still hold the poison."""
    host = array.copy_to_host()
    if host.dtype == np.uint16:
        return int(np.count_nonzero((host & 0x7FFF) > 0x7F80))
    return int(np.count_nonzero(np.isnan(host) if host.dtype.kind == "f" else host == POISON[host.dtype]))
