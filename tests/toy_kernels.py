"""Small kernels for the launcher's tests, each showing one thing about a launch. In a file of their own, so
that children of a test can make them too."""

from __future__ import annotations

import numpy as np

from kernels_numba import compiler
from kernels_numba.launch import Kernel


def times_kernel(factor=2, name="times"):
    """out[i] = factor * x[i] for i < n: i32; arguments out, x, n."""

    def make():
        from kernels_numba.ptx.ldst import ld_global_i32, st_global_b32

        cuda = compiler.cuda
        int32, int64 = cuda.types.int32, cuda.types.int64

        def times(out, x, n):
            i = int32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
            if i < n:
                st_global_b32(
                    int64(out + int64(i) * 4), int32(ld_global_i32(int64(x + int64(i) * 4)) * factor)
                )

        return times

    return Kernel(name, make, (factor,), "void(int64, int64, int32)", 128)


def scalars_kernel():
    """out[0] = small, out[1..2] = large, out[3] = the bits of real: what a kernel sees."""

    def make():
        from kernels_numba.ptx.ldst import st_global_b32, st_global_f32

        cuda = compiler.cuda
        int32, int64 = cuda.types.int32, cuda.types.int64

        def scalars(out, small, large, real):
            if cuda.threadIdx.x == 0:
                st_global_b32(out, small)
                st_global_b32(int64(out + 4), int32(large))
                st_global_b32(int64(out + 8), int32(large >> 32))
                st_global_f32(int64(out + 12), real)

        return scalars

    return Kernel("scalars", make, (), "void(int64, int32, int64, float32)", 32)


def reverse_kernel(smem):
    """out[i] = block size - 1 - i, passed through the last bytes of `smem` bytes of dynamic shared memory."""

    def make():
        from kernels_numba.ptx.control import dynamic_shared
        from kernels_numba.ptx.ldst import ld_shared_b32, st_global_b32, st_shared_b32

        cuda = compiler.cuda
        int32, int64 = cuda.types.int32, cuda.types.int64

        def reverse(out):
            thread = int32(cuda.threadIdx.x)
            at = int32(dynamic_shared() + (smem - 512))
            st_shared_b32(int32(at + thread * 4), thread)
            cuda.syncthreads()
            value = ld_shared_b32(int32(at + (127 - thread) * 4))
            st_global_b32(int64(out + int64(thread) * 4), value)

        return reverse

    return Kernel("reverse", make, (smem,), "void(int64)", 128, smem)


def ranks_kernel(cluster):
    """out[block] = the block's number in its cluster."""

    def make():
        from kernels_numba.ptx.cluster import cluster_rank, cluster_sync
        from kernels_numba.ptx.ldst import st_global_b32

        cuda = compiler.cuda
        int64 = cuda.types.int64

        def ranks(out):
            cluster_sync()
            if cuda.threadIdx.x == 0:
                st_global_b32(int64(out + int64(cuda.blockIdx.x) * 4), cluster_rank())

        return ranks

    return Kernel("ranks", make, (cluster,), "void(int64)", 64, cluster=cluster)


def increment_kernel(pdl):
    """x[i] += 1 for i < n, after the grid before it and late: lost if nobody waits for that one."""

    def make():
        from kernels_numba.ptx.control import nanosleep
        from kernels_numba.ptx.griddep import griddep_launch, griddep_wait
        from kernels_numba.ptx.ldst import ld_global_i32, st_global_b32

        cuda = compiler.cuda
        int32, int64 = cuda.types.int32, cuda.types.int64

        def increment(x, n):
            i = int32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
            griddep_launch()
            griddep_wait()
            nanosleep(int32(20_000))
            if i < n:
                at = int64(x + int64(i) * 4)
                st_global_b32(at, int32(ld_global_i32(at) + 1))

        return increment

    return Kernel("increment_pdl" if pdl else "increment", make, (), "void(int64, int32)", 128, pdl=pdl)


def not_a_kernel():
    """What a compiler refuses: text added to a number."""
    return Kernel("refused", lambda: lambda n: n + "text", (), "void(int32)", 32)


def no_kernel_at_all():
    return np.zeros(1)


def spin_kernel():
    """One warp that takes its time: `rounds` squares, each of the one before, for which no compiler finds a
    shorter way; then out[0] = the last. Arguments out, rounds."""

    def make():
        from kernels_numba.ptx.ldst import st_global_b32

        cuda = compiler.cuda
        int32, uint32 = cuda.types.int32, cuda.types.uint32

        def spin(out, rounds):
            value = uint32(cuda.threadIdx.x)
            for _ in range(rounds):
                value = uint32(value * value + uint32(1013904223))
            if cuda.threadIdx.x == 0:
                st_global_b32(out, int32(value))

        return spin

    return Kernel("spin", make, (), "void(int64, int32)", 32)
