"""The one import of numba.cuda, and what every kernel needs from it.

Knows: whether the compiler or the simulator is behind `cuda`, how bfloat16 is kept (uint16 bit patterns) and
how it becomes float32. Refuses to know: any op, any device, any array's owner.

Importing this module always works. Where numba or numba.cuda cannot be imported (a Mac, a machine without the
CUDA packages) `AVAILABLE` is False, `REASON` says why, and the first use of `cuda` or `jit` raises
KernelsUnavailable. `AVAILABLE` speaks of the import alone: ask `cuda.is_available()` whether there is a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# numpy 2.5 dropped names that numba-cuda 0.30 still looks up while it is being imported.
for _old, _new in (("row_stack", "vstack"), ("in1d", "isin"), ("trapz", "trapezoid")):
    if not hasattr(np, _old):
        setattr(np, _old, getattr(np, _new))


class KernelsUnavailable(RuntimeError):
    """A kernel was asked for where numba.cuda cannot be imported."""


class _MissingCuda:
    """Stands in for numba.cuda: every attribute raises KernelsUnavailable with the reason of the failed
    import."""

    def __getattr__(self, name: str) -> Any:
        # Special names are probed by copy, inspect and test runners, which expect AttributeError.
        if name.startswith("__"):
            raise AttributeError(name)
        raise KernelsUnavailable(
            f"cuda.{name} is needed, but numba.cuda cannot be imported here ({REASON}). "
            'Install numba-cuda with its CUDA packages, or use the "reference" rungs.'
        )


cuda: Any
REASON: str = ""
AVAILABLE: bool = False
SIMULATOR: bool = False
# What kernels_numba/ptx builds instructions from; None in the simulator and where numba.cuda is missing.
intrinsic: Any = None
signature: Any = None
RequireLiteralValue: Any = None
TypingError: Any = None

try:
    with warnings.catch_warnings():
        # numba-cuda 0.30 makes a timedelta without a unit while it is imported, which numpy 2.5 deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        from numba import cuda as _cuda
        from numba.cuda.core import config as _config
except (ImportError, OSError, AttributeError) as _error:
    # a wrong numpy or libcuda shows as any of these three
    cuda = _MissingCuda()
    REASON = f"{type(_error).__name__}: {_error}"
else:
    cuda = _cuda
    AVAILABLE = True
    SIMULATOR = bool(_config.ENABLE_CUDASIM)
    if not SIMULATOR:
        from numba.cuda import extending as _extending
        from numba.cuda.core import errors as _errors
        from numba.cuda.typing import signature as _signature

        intrinsic, signature = _extending.intrinsic, _signature
        RequireLiteralValue, TypingError = _errors.RequireLiteralValue, _errors.TypingError
    # A decode step of one sequence legitimately launches a handful of blocks.
    _config.CUDA_LOW_OCCUPANCY_WARNINGS = 0

_COMPILER_ONLY_OPTIONS = ("forceinline", "launch_bounds", "lineinfo", "max_registers", "fastmath", "cache")


def jit(*, device: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`cuda.jit` with a type: options that the simulator rejects are dropped there.

    device: True for a helper that kernels call. Raises KernelsUnavailable where numba.cuda cannot be
    imported.
    """
    if not AVAILABLE:
        cuda.jit  # raises with the reason  # noqa: B018
    if SIMULATOR:
        options = {name: value for name, value in options.items() if name not in _COMPILER_ONLY_OPTIONS}

    def decorate(function: Callable[..., Any]) -> Any:
        return cuda.jit(device=device, **options)(function)

    return decorate


def _same(value: Any) -> Any:
    return value


def _bf16_to_float(bits: Any) -> Any:
    """uint16 bit pattern of a bfloat16 -> float32 (exact)."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


def _float_to_bf16(value: Any) -> Any:
    """float32 -> uint16 bit pattern of the nearest bfloat16, ties to even; a NaN stays a (quiet) NaN."""
    bits = np.float32(value).view(np.uint32)
    if np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@dataclass(frozen=True)
class Element:
    """How one element type is stored on the device and reached in a kernel.

    name: "float32" or "bfloat16"; storage: numpy dtype of the device array; to_float, from_float: device
    functions storage scalar -> float32 and back (rounded to nearest even).
    """

    name: str
    storage: np.dtype[Any]
    to_float: Any
    from_float: Any


STORAGE: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}
_elements: dict[str, Element] = {}


def element(dtype: str) -> Element:
    """The Element of "float32" or "bfloat16"; ValueError for another name."""
    if dtype not in STORAGE:
        raise ValueError(f"dtype is {dtype!r}; kernels know {', '.join(STORAGE)}")
    if dtype not in _elements:
        if dtype == "float32":
            to_float = from_float = jit(device=True)(_same)
        else:
            to_float, from_float = jit(device=True)(_bf16_to_float), jit(device=True)(_float_to_bf16)
        _elements[dtype] = Element(dtype, STORAGE[dtype], to_float, from_float)
    return _elements[dtype]


def element_name(array: Any) -> str:
    """The element type that a device array of activations, weights or cache pages holds; ValueError if
    none."""
    for name, storage in STORAGE.items():
        if array.dtype == storage:
            return name
    raise ValueError(
        f"device array has dtype {array.dtype}; kernels take float32, or bfloat16 bits as uint16"
    )
