"""Rung "warp" of the ops between the products: CUDA cores at the speed of memory, sm_80 and newer.

One kernel a file, each with plan_*(views) -> Plan (kernel, grid and arguments, which need no GPU) and its
launcher. All read 16 bytes a lane, several in flight; a launch is sized by the arrays that it is given, and
blocks whose row is at or past the real number of rows, read from device memory, leave at once. So the arrays
may be a bucket's, and a launch may be part of a CUDA graph: it allocates nothing, and its operands are its
arguments. A row's bits depend on the row alone.

From sm_90 on they are links of a chain of dependent launches, which the embedding begins: a product fetches
its weights while a small op still runs. Checked in numpy (in_numpy.py), by the
assembler, and on an H100.
"""
