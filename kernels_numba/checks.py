"""Checks at the door of a launcher: dtype, shape, strides, alignment, where the array lives.

Knows: array attributes (numpy and device arrays share them). Refuses to know: values on a device, which could
only be read by making the host wait. Every error is a ValueError that names the op, the argument, what it is
and what it must be.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from kernels_numba.compiler import STORAGE, element_name

ALIGNMENT = 16  # bytes, of a device array's first element: the widest load of any rung
_HOST_FLOATS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
_INT32 = np.dtype(np.int32)
_FLOAT32 = np.dtype(np.float32)


def fail(op: str, name: str, what: str, required: str) -> None:
    """Raise the one ValueError form of all launchers."""
    raise ValueError(f"{op}: {name} {what}; {required} is required")


def check(
    op: str, name: str, array: Any, dtypes: Any, shape: tuple[int | None, ...], *, rows: int = 0
) -> None:
    """One array against its dtypes and shape (None: any length).

    rows: how many leading axes may have free strides (a view cut from a wider buffer); the rest must be
    C-contiguous.
    """
    if array.dtype not in dtypes:
        fail(op, name, f"has dtype {array.dtype}", " or ".join(str(d) for d in dtypes))
    actual = array.shape
    if len(actual) != len(shape) or any(w is not None and a != w for a, w in zip(actual, shape, strict=True)):
        wanted = ", ".join("any" if w is None else str(w) for w in shape)
        fail(op, name, f"has shape {tuple(actual)}", f"({wanted})")
    _check_strides(op, name, array, rows)


def _check_strides(op: str, name: str, array: Any, rows: int) -> None:
    expected = array.dtype.itemsize
    if 0 in array.shape:  # numpy gives empty arrays any strides
        return
    for axis in range(array.ndim - 1, -1, -1):
        length, stride = array.shape[axis], array.strides[axis]
        if length > 1 and (stride < expected if axis < rows else stride != expected):
            fail(
                op, name, f"has strides {tuple(array.strides)} for shape {tuple(array.shape)}",
                f"a stride of {'at least ' if axis < rows else ''}{expected} bytes on axis {axis}",
            )  # fmt: skip
        expected = expected * length if axis >= rows else stride * length


class Host:
    """Arrays of the reference rung: numpy, float32 or ml_dtypes.bfloat16 elements."""

    int32, float32, uint64 = (_INT32,), (_FLOAT32,), (np.dtype(np.uint64),)
    floats = _HOST_FLOATS

    @staticmethod
    def elements(op: str, name: str, array: Any) -> tuple[np.dtype[Any], ...]:
        """The element dtypes allowed for all float arrays of a call: on the host they may be mixed."""
        if not isinstance(array, np.ndarray):
            fail(op, name, f"is a {type(array).__name__}", "a numpy array (rung reference)")
        return _HOST_FLOATS


class Device(Host):
    """Arrays of kernel rungs: numba device arrays, float32 or bfloat16 bits as uint16, one type per call."""

    @staticmethod
    def elements(op: str, name: str, array: Any) -> tuple[np.dtype[Any], ...]:
        """The one element dtype of the call, given by its output."""
        require_device(op, name, array)
        try:
            return (STORAGE[element_name(array)],)
        except ValueError:
            fail(op, name, f"has dtype {array.dtype}", "float32, or bfloat16 bits as uint16,")
            raise


def require_device(op: str, name: str, array: Any) -> None:
    """The array must be numba's and start on a 16-byte boundary: numba would copy a numpy array there and
    back."""
    if not getattr(array, "__cuda_ndarray__", False):
        fail(
            op,
            name,
            f"is a {type(array).__name__}",
            "a numba device array (cuda.to_device, cuda.device_array)",
        )


def check_aligned(op: str, name: str, array: Any) -> None:
    """The first element must lie on a 16-byte boundary (not asked of the simulator's host memory)."""
    pointer = getattr(array, "device_ctypes_pointer", None)
    address = getattr(pointer, "value", None)
    if isinstance(address, int) and address % ALIGNMENT:
        fail(op, name, f"starts at address {address:#x}", f"a multiple of {ALIGNMENT} bytes")
