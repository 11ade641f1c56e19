"""The wait of mbarrier.py where there is no try_wait: a loop of test_wait, sm_80 and later (PTX ISA,
"mbarrier.test_wait")."""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

mbarrier_poll = instruction(
    "mbarrier_poll",
    "{\n.reg .pred done;\nAGAIN:\nmbarrier.test_wait.parity.shared::cta.b64 done, [$0], $1;\n"
    "@done bra READY;\nnanosleep.u32 20;\nbra AGAIN;\nREADY:\n}",
    "rr",
    doc="mbarrier_wait for sm_80: ask again and again (mbarrier.test_wait.parity).",
)
