"""A view of device memory with numpy's attributes, which kernels and copies take and nothing computes with.

Knows: shapes, strides, and the protocols by which numba, kernels_numba/checks.py and the doors recognise a
device array. Refuses to know: where memory comes from (memory.py), and the driver.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class DeviceArray:
    """A view of device memory: an address, a shape, a dtype and strides in bytes. Computes nothing.

    owner: what must live as long as this view (an arena's block); None: somebody else sees to that.
    numba kernels take it through __cuda_array_interface__, checks.py and the doors as a device array.
    """

    __slots__ = (
        "__weakref__",
        "address",
        "contiguous",
        "dtype",
        "nbytes",
        "ndim",
        "owner",
        "shape",
        "size",
        "strides",
    )

    __cuda_ndarray__ = True  # what kernels_numba/checks.py takes for a device array

    def __init__(
        self,
        address: int,
        shape: Sequence[int],
        dtype: npt.DTypeLike,
        strides: Sequence[int] | None = None,
        owner: object = None,
    ) -> None:
        self.address = int(address)
        self.shape = tuple(map(operator.index, shape))
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        if min(self.shape, default=0) < 0:
            raise ValueError(f"shape is {self.shape}; no length may be negative")
        dense = _dense(self.shape, self.dtype.itemsize)
        self.strides = dense if strides is None else tuple(map(operator.index, strides))
        if len(self.strides) != len(self.shape):
            raise ValueError(f"strides are {self.strides} for shape {self.shape}; one an axis is required")
        self.ndim = len(self.shape)
        self.size = math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize
        self.owner = owner
        # Elements follow each other in C order; strides of axes of length 1 do not matter.
        self.contiguous = (
            self.strides == dense
            or not self.size
            or all(
                n == 1 or have == want for n, have, want in zip(self.shape, self.strides, dense, strict=True)
            )
        )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3, without a stream: whoever uses the array orders its work itself, and nobody
        synchronises. An empty array has an address as well: consumers ask the driver about it."""
        return {
            "shape": self.shape,
            "strides": None if self.contiguous else self.strides,
            "data": (self.address, False),
            "typestr": self.dtype.str,
            "stream": None,
            "version": 3,
        }

    @property
    def device_ctypes_pointer(self) -> ctypes.c_void_p:
        """The address as kernels_numba/checks.py asks numba's arrays for it."""
        return ctypes.c_void_p(self.address)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a DeviceArray is in device memory: device.download(array) brings it to the host")

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a DeviceArray without axes")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, address={self.address:#x})"

    def __getitem__(self, index: Any) -> DeviceArray:
        """A view by integers and slices of step 1, one an axis from the first on.

        IndexError for an integer outside or too many; TypeError for another index; ValueError for a step.
        """
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) > self.ndim:
            raise IndexError(f"{len(indices)} indices for a DeviceArray of {self.ndim} axes")
        address, shape, strides = self.address, [], []
        for one, length, stride in zip(indices, self.shape, self.strides, strict=False):
            if isinstance(one, slice):
                start, stop, step = one.indices(length)
                if step != 1:
                    raise ValueError(f"a DeviceArray is cut by slices of step 1, not {step}")
                shape.append(max(0, stop - start))
                strides.append(stride)
            else:
                start = _position(one, length)
            address += start * stride
        shape += self.shape[len(indices) :]
        strides += self.strides[len(indices) :]
        if 0 in shape:  # past the end lies another array, or nothing at all
            address = self.address
        return DeviceArray(address, shape, self.dtype, strides, self.owner)

    def reshape(self, *shape: Any) -> DeviceArray:
        """The same elements in another shape (one length may be -1). ValueError unless contiguous and of as
        many elements."""
        wanted = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else list(shape)
        self._require_contiguous("reshape")
        if wanted.count(-1) == 1:
            known = math.prod(n for n in wanted if n != -1)
            wanted[wanted.index(-1)] = self.size // known if known else 0
        if min(wanted, default=0) < 0 or math.prod(wanted) != self.size:
            raise ValueError(f"shape {self.shape} holds {self.size} elements; {tuple(shape)} does not")
        return DeviceArray(self.address, wanted, self.dtype, None, self.owner)

    def view(self, dtype: npt.DTypeLike) -> DeviceArray:
        """The same bytes as elements of another dtype; the last axis grows or shrinks. ValueError unless
        contiguous and divisible."""
        kind = np.dtype(dtype)
        self._require_contiguous("view")
        if not self.shape:
            if kind.itemsize != self.dtype.itemsize:
                raise ValueError(f"one {self.dtype} cannot be viewed as {kind}")
            return DeviceArray(self.address, (), kind, None, self.owner)
        *outer, last = self.shape
        length, rest = divmod(last * self.dtype.itemsize, kind.itemsize)
        if rest:
            raise ValueError(f"rows of {last} {self.dtype} are no whole number of {kind}")
        return DeviceArray(self.address, (*outer, length), kind, None, self.owner)

    def _require_contiguous(self, what: str) -> None:
        if not self.contiguous:
            raise ValueError(f"{what} of a DeviceArray with shape {self.shape} and strides {self.strides}")


def _dense(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides of C order in bytes."""
    strides, step = [], itemsize
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def _position(index: Any, length: int) -> int:
    try:
        position = operator.index(index)
    except TypeError:
        raise TypeError(
            f"a DeviceArray is indexed by integers and slices, not {type(index).__name__}"
        ) from None
    if not -length <= position < length:
        raise IndexError(f"index {position} is outside an axis of {length}")
    return position % length
