"""For the tests of a warm start: as many kernels as all GEMM tiles make, which must never be compiled."""

from kernels_numba.launch import Kernel


def _make():
    raise AssertionError("a cached kernel was compiled")


def kernels():
    for index in range(250):
        yield Kernel(f"many_{index}", _make, (index,), "void(int64, int32)", 128)
