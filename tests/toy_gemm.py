"""Every GEMM kernel of the Hopper rung, for the test of a warm start."""

from kernels_numba.ops.gemm.hopper import kernels as kernels
