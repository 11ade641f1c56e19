"""Small sets of kernels for the tests of prebuild: kernels() of this module compile; those of toy_bad.py not
all, those of toy_slow.py not soon."""

from toy_kernels import increment_kernel, ranks_kernel, reverse_kernel, times_kernel

from kernels_numba.launch import Kernel


def kernels():
    yield times_kernel(2)
    yield times_kernel(3, "times_3")
    yield reverse_kernel(512)
    yield Kernel("hopper_only", ranks_kernel(2).make, (2,), "void(int64)", 64, cluster=2, archs=("sm_90a",))
    yield Kernel("never_here", increment_kernel(True).make, (), "void()", 64, archs=("sm_120a",))
