"""Kernels written in numba.cuda, with their numpy definitions; knows arrays and shapes, never requests."""
