"""numba's simulator of a CUDA device, for tests and notebooks of the plain kernels at toy sizes.

Knows numba's arrays, which are numpy's there. Refuses to know the driver: nothing is asynchronous, nothing is
pinned, and no arena is planned.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

NOTIONAL_BYTES = 4 << 30  # of a memory that has no size


class SimulatedDevice:
    """The `plain` rungs, interpreted."""

    kind: Literal["cpu", "cuda"] = "cuda"
    default_rung = "plain"
    name = "numba simulator"
    capability: tuple[int, int] | None = None
    stream: Any = 0
    copy_stream: Any = None

    def __init__(self, dtype: str) -> None:
        from kernels_numba import compiler

        self._cuda = compiler.cuda
        self.dtype = dtype
        self._element = np.dtype(np.float32) if dtype == "float32" else np.dtype(np.uint16)

    def empty(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None, *, term: str = "other"
    ) -> Any:
        """An uninitialised array; `dtype` None means the engine's element type."""
        return self._cuda.device_array(shape, np.dtype(dtype) if dtype is not None else self._element)

    def upload(self, array: npt.NDArray[Any], *, term: str = "other") -> Any:
        """A copy of the array, its dtype kept."""
        return self._cuda.to_device(np.ascontiguousarray(array))

    def upload_float(self, array: npt.NDArray[np.float32]) -> Any:
        """A copy of a float32 weight, rounded to nearest even in the engine's dtype."""
        if self.dtype == "bfloat16":
            return self.upload(array.astype(ml_dtypes.bfloat16).view(np.uint16))
        return self.upload(array)

    def download(self, array: Any) -> npt.NDArray[Any]:
        """The array on the host."""
        return np.asarray(array.copy_to_host())

    def stage(self, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
        """Copies of a step's small arrays."""
        return {name: self.upload(array) for name, array in arrays.items()}

    def reserve_staging(self, num_bytes: int) -> None:
        """Nothing is kept between steps."""

    def arena(self, num_bytes: int) -> nullcontext[None]:
        """None: every array is one of its own."""
        return nullcontext()

    def fill(self, array: Any, byte: int) -> None:
        """Write `byte` into every byte of an array."""
        array.copy_to_device(np.full(array.nbytes, byte, np.uint8).view(array.dtype).reshape(array.shape))

    def copy_rows(self, array: Any, pairs: npt.NDArray[np.int32]) -> None:
        """array[destination] = array[source] for each (source, destination); no row is both."""
        for source, destination in pairs.tolist():
            array[destination].copy_to_device(array[source])

    def free_bytes(self) -> int:
        """A notional 4 GiB."""
        return NOTIONAL_BYTES

    def synchronize(self) -> None:
        """Nothing is ever in flight."""

    def close(self) -> None:
        """Nothing to give back."""
