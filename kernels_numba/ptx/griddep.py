"""Programmatic dependent launch: a grid that starts while the one before it ends, sm_90 (PTX ISA,
"griddepcontrol"). The launch carries the attribute: launch.Kernel(pdl=True)."""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

griddep_wait = instruction(
    "griddep_wait", "griddepcontrol.wait;",
    doc="Wait until the grids this one depends on are done and their writes visible (griddepcontrol).",
)  # fmt: skip
griddep_launch = instruction(
    "griddep_launch", "griddepcontrol.launch_dependents;",
    doc="Let dependent grids start when every block has said so or ended (griddepcontrol).",
)  # fmt: skip
