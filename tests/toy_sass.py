"""Kernels whose instructions show what assemble.assemble_kernel must see: "products" as it should be, the
others each with one thing wrong."""

import numpy as np

from kernels_numba.compiler import cuda
from kernels_numba.launch import Kernel


def make_products(loop):
    """(k, out), 384 threads: in a loop or once out f32[256, 8] = tiles of shared memory, 128 idle."""
    from kernels_numba.ptx import control, epilogue, wgmma

    multiply, store = wgmma.make_wgmma(8, 4, wait=0), epilogue.make_store_rows(8, "float32")
    i32 = np.int32

    def products(k, out):
        smem = control.dynamic_shared()
        thread = i32(cuda.threadIdx.x)
        if control.warp_uniform(i32(thread >> 7)) == 0:
            control.setmaxnreg_dec(40)
        else:
            control.setmaxnreg_inc(232)
            acc = cuda.local.array(4, np.float32)
            for i in range(4):
                acc[i] = np.float32(0)
            a, b = wgmma.descriptor_k_major(smem), wgmma.descriptor_k_major(i32(smem + 8192))
            if loop:
                at = i32(0)
                while at < k:
                    multiply(acc, a, b, 1)
                    at = i32(at + 64)
            else:
                multiply(acc, a, b, 1)
            row = i32((thread >> 2) - 32)
            store(acc, out + row * 32 + (thread & 3) * 8, i32(32), i32(0), i32(8), i32(1), i32(1))

    return products


def make_local():
    """(k, out): a local array indexed by a variable lives in local memory."""
    from kernels_numba.ptx.ldst import ld_global_i32, st_global_b32

    def local(k, out):
        many = cuda.local.array(500, np.int32)
        for i in range(k):
            many[i] = ld_global_i32(out + 4 * i)
        for i in range(k):
            st_global_b32(out + 4 * i, many[many[i]])

    return local


def make_large():
    """(k, out): a word through the end of much shared memory."""
    from kernels_numba.ptx import control, ldst

    def large(k, out):
        at = np.int32(control.dynamic_shared() + 199_996)
        ldst.st_shared_b32(at, k)
        ldst.st_global_b32(out, ldst.ld_shared_b32(at))

    return large


def kernels():
    hopper = {"archs": ("sm_90a",), "smem": 16384}
    signature = "void(int32, int64)"
    yield Kernel("products", lambda: make_products(True), (), signature, 384, **hopper)
    yield Kernel("once", lambda: make_products(False), (), signature, 384, **hopper)
    yield Kernel("local", make_local, (), signature, 32)
    yield Kernel("large", make_large, (), signature, 32, smem=200_000)
