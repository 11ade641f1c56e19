"""Barriers of some of a block's warps, by number (PTX ISA, "bar, barrier").

The count of threads is a multiple of 32, and all who name a barrier give the same.
"""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

named_barrier_sync = instruction(
    "named_barrier_sync", "bar.sync $0, $1;", "rr",
    doc="Wait at barrier id (0 to 15; 0 is syncthreads') until `threads` threads are there (bar.sync).",
)  # fmt: skip
named_barrier_arrive = instruction(
    "named_barrier_arrive", "bar.arrive $0, $1;", "rr",
    doc="Count at barrier id without waiting (bar.arrive).",
)  # fmt: skip
