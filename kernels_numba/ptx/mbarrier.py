"""Barriers in shared memory that count arrivals and bytes (PTX ISA, "mbarrier")."""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

mbarrier_init = instruction(
    "mbarrier_init", "mbarrier.init.shared::cta.b64 [$0], $1;", "rr",
    doc="A barrier at shared address `bar` whose phase ends after `count` arrivals (mbarrier.init).",
)  # fmt: skip
fence_mbarrier_init = instruction(
    "fence_mbarrier_init", "fence.mbarrier_init.release.cluster;",
    doc="Make initialised barriers visible to the cluster and to TMA (fence.mbarrier_init).",
)  # fmt: skip
mbarrier_arrive = instruction(
    "mbarrier_arrive", "mbarrier.arrive.shared::cta.b64 _, [$0];", "r", doc="One arrival (mbarrier.arrive)."
)
mbarrier_expect_tx = instruction(
    "mbarrier_expect_tx", "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "rr",
    doc="One arrival; the phase also waits for `bytes` of asynchronous copies (mbarrier.arrive.expect_tx).",
)  # fmt: skip
# Without .release.cluster: that form put a device-wide memory barrier into the main loop.
mbarrier_arrive_remote = instruction(
    "mbarrier_arrive_remote",
    "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, $0, $1;\n"
    "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}",
    "rr",
    doc="One arrival at the same barrier of block `rank` of the cluster (mapa, mbarrier.arrive).",
)
mbarrier_wait = instruction(
    "mbarrier_wait",
    "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;\n"
    "@done bra READY;\nbra AGAIN;\nREADY:\n}",
    "rr",
    doc="Wait until the phase of this parity has ended (mbarrier.try_wait.parity).",
)
