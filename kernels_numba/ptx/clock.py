"""When and where a thread runs (PTX ISA, "Special Registers"): for pictures of schedules, not for work."""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

now_ns = instruction(
    "now_ns", "mov.u32 $0, %globaltimer_lo;", "", "r",
    doc="The low 32 bits of a clock in nanoseconds that all SMs share (%globaltimer_lo).",
)  # fmt: skip
sm_id = instruction(
    "sm_id", "mov.u32 $0, %smid;", "", "r", memory=False, doc="The SM that the block runs on (%smid)."
)
