"""Copies of 16 bytes from global to shared memory that run while the thread goes on, sm_80 and later (PTX
ISA, "cp.async")."""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

cp_async_16 = instruction(
    "cp_async_16", "cp.async.cg.shared.global [$0], [$1], 16;", "rl",
    doc="16 bytes to shared address dst, past L1: (dst, src), both multiples of 16 (cp.async.cg).",
)  # fmt: skip
cp_async_16_zfill = instruction(
    "cp_async_16_zfill", "cp.async.cg.shared.global [$0], [$1], 16, $2;", "rlr",
    doc="Of 16 bytes the first valid_bytes (0 to 16), then zeros: (dst, src, valid_bytes) (cp.async.cg).",
)  # fmt: skip
cp_async_commit = instruction(
    "cp_async_commit",
    "cp.async.commit_group;",
    doc="End this thread's group of copies (cp.async.commit_group).",
)
cp_async_wait = instruction(
    "cp_async_wait", "cp.async.wait_group @0;", "n",
    valid=lambda n: 0 <= n <= 15, rule="0 to 15 groups may stay pending",
    doc="Wait until all but the last n of this thread's groups have arrived (cp.async.wait_group).",
)  # fmt: skip
# .noinc: the arrival is one of those the barrier was made for.
cp_async_mbarrier_arrive = instruction(
    "cp_async_mbarrier_arrive", "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", "r",
    doc="One arrival at bar when this thread's copies so far have landed (cp.async.mbarrier.arrive.noinc).",
)  # fmt: skip
