"""Counters in global memory that blocks share, and what a warp's lanes agree on (PTX ISA, "atom",
"vote.sync", "popc")."""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

atom_add_i32 = instruction(
    "atom_add_i32", "atom.add.relaxed.gpu.global.s32 $0, [$1], $2;", "lr", "r",
    doc="The value before adding: (address, value); orders no other access, as fences.py does (atom).",
)  # fmt: skip
atom_add_acq_rel_i32 = instruction(
    "atom_add_acq_rel_i32",
    "atom.add.acq_rel.gpu.global.s32 $0, [$1], $2;",
    "lr",
    "r",
    doc="atom_add_i32 after all that the thread did and saw, and before all that it will do (atom.acq_rel).",
)
ballot = instruction(
    "ballot", "{\n.reg .pred p;\nsetp.ne.s32 p, $1, 0;\nvote.sync.ballot.b32 $0, p, 0xffffffff;\n}", "r", "r",
    doc="Bit l is set where lane l's `condition` is not 0; all 32 take part (vote.sync.ballot).",
)  # fmt: skip
popc = instruction(
    "popc", "popc.b32 $0, $1;", "r", "r", doc="How many bits are set (popc).", memory=False, volatile=False
)
shfl_up_i32 = instruction(
    "shfl_up_i32", "shfl.sync.up.b32 $0, $1, $2, 0, 0xffffffff;", "rr", "r",
    doc="x of the lane `delta` below; its own before the first (shfl.sync.up).",
)  # fmt: skip
