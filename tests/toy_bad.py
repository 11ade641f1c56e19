"""For the tests of prebuild: of these kernels some cannot be compiled, and one takes its process with it."""

import os

from toy_kernels import not_a_kernel, times_kernel

from kernels_numba.launch import Kernel


def kernels():
    yield times_kernel(5, "first")
    yield not_a_kernel()
    yield Kernel("deadly", lambda: os._exit(9), (), "void(int32)", 32)
    yield times_kernel(7, "last")
